"""Checks of flag values, the parser's helpers, config files, and the precision that flags ask for.

The flags themselves, their help and their ranges are in the scripts, because experiments add some.
"""
