"""Devices and processes: launching and connecting, memory, sharded networks, signals, faster networks.

The lines that are special to CUDA, MPS, FSDP or DeepSpeed are kept here.
"""
