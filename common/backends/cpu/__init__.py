"""The CPU backend and its kernels in C."""
