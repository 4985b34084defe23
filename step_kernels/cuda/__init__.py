"""Launchers of the CUDA kernels in csrc, one file an op, and the driver that compiles and loads them."""
