"""NVIDIA: the CUDA backend, and `python -m quasar_gpu.generate`."""
