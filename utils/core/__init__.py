"""What everything else builds on: the errors that users see, seeds, quick imports, and writing files whole.

Nothing here knows of models, photos or flags. This room imports no other.
"""
