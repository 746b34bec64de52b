"""What optimizers need beside themselves: their names and memory, stochastic rounding, checks of schedules.

Which optimizer trains, and the learning rate of a step, are in the scripts.
"""
