"""A base model's files: reading and checking configs, loading parts, adapters, quantized layers.

Which kinds of models train, and how, is in the scripts.
"""
