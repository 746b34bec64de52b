"""The Hugging Face Hub: requests with timeouts, uploads, data sets, and the model card.

When a run uploads, and what, is in the scripts (`share`).
"""
