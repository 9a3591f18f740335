"""Devices and tensors between them: CUDA and NCCL."""
