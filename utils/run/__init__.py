"""What belongs to a whole run: checkpoint folders, checks before a resume, clashing flags and folders, metrics, the
start-up screen's form.

What a checkpoint holds and when it is written is in the scripts.
"""
