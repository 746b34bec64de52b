"""How much memory and time a run will need, and what to do when memory was not enough."""
