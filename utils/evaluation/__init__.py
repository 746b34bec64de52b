"""How well a result does: similarity to photos and prompts, the reader of drawn shapes, tables with errors."""
