"""Convolution kernels for the CPU, generated as LLVM IR for the vectors that it has: no compiler on the user's machine.

`pack.pack` transforms and packs a weight once; `operator.winograd_conv2d` is the convolution by F(m x m, 3 x 3) with
its epilogue, and `torch.ops.tersenet.winograd_conv2d` the same for torch.compile and torch.export.
"""
