"""From a folder of photos to crops, masks, captions and cached tensors; and the order in which photos come.

What one example of a batch holds is in the scripts (`DreamBoothDataset`, `collate`).
"""
