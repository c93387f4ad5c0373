"""Ascend: the NPU backend, and `python -m quasar_npu.generate`."""
