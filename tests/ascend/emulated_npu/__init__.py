"""An emulated Ascend NPU: the real ``torch_npu`` package on a machine that has no NPU and no CANN.

What is real: torch_npu's Python layer, its C++ extension, operator schemas, Meta kernels, caching allocator,
streams, graphs API, storage formats and copies. What is emulated:

- the ACL runtime below it, over host memory (``host_runtime.c``);
- ordinary aten operators, on CPU tensors that alias the device's memory (``device.py``);
- the ``npu`` operators we call, one function each in ``ops/``: first the package's own Meta kernel must
  accept the call, then the documented constraints are checked, then plain PyTorch computes the formula;
- NPU graphs, as a list of launches that a replay runs again on the same addresses (``graphs.py``).

Every kernel launch, copy and host wait is counted (``counts.py``). A call that the hardware's documentation
rules out raises :class:`Refused`; one that it allows but nobody has written here raises :class:`NotEmulated`.

What this does NOT show, and must never be cited for:

- speed, memory bandwidth or memory footprint of any kind;
- hardware numerics beyond the documented formula. Inside a fused operator the intermediate values here are
  float32 (matrix products and attention: float64, so that rows do not depend on their neighbours) and rounded
  once, to nearest even, at each documented output. The hardware may accumulate in another order or precision,
  flush denormals, or saturate where float16 overflows here;
- races between streams: launches run at once and in program order, so a missing event is invisible;
- limits that CANN enforces and its documentation does not mention.

Use: ``install()`` once per process before torch_npu is imported, or run a module under it with
``python -m emulated_npu MODULE ARGS...`` (this folder's parent on PYTHONPATH).
"""

import os

# Importing torch would otherwise load torch_npu at once, before there is a runtime for it.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

from emulated_npu.counts import Counts, counting
from emulated_npu.limits import NotEmulated, Refused, soc_as, soc_name
from emulated_npu.schemas import branch_as
from emulated_npu.toolchain import install, unavailable

__all__ = ["Counts", "NotEmulated", "Refused", "branch_as", "counting", "install", "soc_as", "soc_name", "unavailable"]
