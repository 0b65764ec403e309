"""Winograd's convolution on GPUs, as Triton kernels. Nothing here needs Triton before a kernel runs."""
