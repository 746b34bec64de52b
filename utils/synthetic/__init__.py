"""The small world in which quality is measured: drawn shapes, models with random weights, small tokenizers."""
