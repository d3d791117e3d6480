"""Custom forward and backward passes and GPU kernels.

The tests compare each of them with a slow, simple version in PyTorch.
"""
