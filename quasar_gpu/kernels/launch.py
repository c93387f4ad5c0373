"""One place for what all launches share: no contraction, and programmatic dependent launch where the card has it.

Programmatic dependent launch (compute capability 9.0 and later) starts a kernel's programs while the kernel before
it still runs; between two kernels of a pass that hides the launch itself, some microseconds a layer. It is correct
because every kernel here executes `await_inputs` before its first load or store of anything that a kernel writes:
griddepcontrol.wait returns when the previous kernel has completed and its writes are visible, and the previous
kernel completed only after its own wait. So nothing of a pass is read early, and nothing is overwritten that an earlier
kernel still reads. Before the wait only addresses are computed and constant weights are prefetched, into L2, where data
cannot become stale. A kernel lets its successor start only when all its own programs run already, so waiting
programs never keep the ones they wait for off the card.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from quasar.errors import QuasarError

WINDOW = 16  # rows of the padded tile: the N of the tensor cores' instructions, and the longest window

_dependent_launch = False


def use_dependent_launch(on: bool) -> None:
    """Switches programmatic dependent launch for all launches from here on. For compute capability 9.0 and later."""
    global _dependent_launch
    _dependent_launch = on


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int = 1, **constants: Any) -> None:
    """Runs `kernel`. Contraction is off, so sums and products round where the reference rounds them.

    Raises ValueError where a tensor is not contiguous: the kernels count addresses from shapes.
    """
    if not all(tensor.is_contiguous() for tensor in args if isinstance(tensor, Tensor)):
        raise ValueError(f"{kernel.fn.__name__}: every tensor has to be contiguous")
    kernel[grid](
        *args,
        **constants,
        DEPENDENT=_dependent_launch,
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=False,
        launch_pdl=_dependent_launch,
    )


def jit(*, varying: tuple[str, ...] = ()) -> Callable[[Callable], Any]:
    """triton.jit. A kernel is not compiled anew for values of the arguments `varying`."""
    return triton.jit(do_not_specialize=list(varying))


def check_window(rows: int) -> None:
    """Raises QuasarError where a window is longer than the kernels' tile."""
    if not 1 <= rows <= WINDOW:
        raise QuasarError(f"--gamma {rows - 1}: CUDA kernels take windows of 1 to {WINDOW} tokens; use --gamma 1 to 15")


@triton.jit
def await_inputs(DEPENDENT: tl.constexpr):
    """Lets the next kernel start, then waits for the previous one. Both do nothing without dependent launch."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def round_to_int8(x):
    """Nearest integer, half to even, of float32 well below 2^22, clamped to int8.

    1.5 * 2^23 pushes the fraction out of the float, and the addition rounds it as asked. Works the same in the
    interpreter, where libdevice's rint does not exist.
    """
    magic = 12582912.0
    return tl.minimum(tl.maximum((x + magic) - magic, -128.0), 127.0).to(tl.int8)


@triton.jit
def row_scale_of(peak, LIMIT: tl.constexpr):
    """A row's scale from max|row|, float32: peak / LIMIT (127 for int8, 7 for int4), 1 for a row of zeros."""
    return tl.where(peak > 0, tl.div_rn(peak, LIMIT * 1.0), 1.0)
