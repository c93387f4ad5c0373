"""One place for what all launches share: no contraction, the right card, and programmatic dependent launch.

Programmatic dependent launch (compute capability 9.0 and later) starts a kernel's programs while the kernel before
it still runs. It is correct because every kernel here executes `await_inputs` before its first load or store of
anything that a kernel writes: griddepcontrol.wait returns when the previous kernel has completed and its writes are
visible, and the previous kernel completed only after its own wait. So nothing of a pass is read early, and nothing is
overwritten that an earlier kernel still reads. Before the wait only addresses are computed and constant weights are
prefetched, into L2, where data cannot become stale. A kernel lets its successor start only when all its own programs
run already, so waiting programs never keep the ones they wait for off the card.

When it lets it start matters. Small kernels do at once: the product behind them becomes resident on the processors
that they leave idle, and fetches its first weights into L2 meanwhile. Products do after their last tile: were the next
product's weights fetched while this one still streams its own, they would be evicted and read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quasar.errors import QuasarError

WINDOW = 16  # rows of the padded tile: the N of the tensor cores' instructions
MOST_ROWS = 64  # rows that read the weights once: up to four tiles for each block of weights

_DEPENDENT_CAPABILITY = (9, 0)


@dataclass(frozen=True)
class Launching:
    """How kernels follow each other on a card; changes no number.

    dependent: programmatic dependent launch. late: products let their successor start after their last tile rather
    than at once. prefetch_kb: weights that the waiting product fetches into L2 on each processor, in KB.
    """

    dependent: bool = False
    late: bool = True
    prefetch_kb: int = 64


# By card (None: Triton's interpreter). A card's own is found at its first launch and stays, so threads need no lock.
_launching: dict[int | None, Launching] = {}


def launching(device: torch.device) -> Launching:
    """How kernels follow each other on this card."""
    key = device.index if device.type == "cuda" else None
    if key not in _launching:
        _launching[key] = Launching(dependent=_has_dependent_launch(device))
    return _launching[key]


@contextmanager
def launching_as(device: torch.device, how: Launching) -> Iterator[None]:
    """For measurements: another way within. Passes captured before keep their own."""
    before, key = launching(device), device.index if device.type == "cuda" else None
    _launching[key] = how
    try:
        yield
    finally:
        _launching[key] = before


def _has_dependent_launch(device: torch.device) -> bool:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _DEPENDENT_CAPABILITY:
        return False
    return triton_at_least(3, 4)  # torch 2.8's; older ones have neither the launch attribute nor its instructions


def triton_at_least(major: int, minor: int) -> bool:
    """Whether the Triton that is here is that version or a later one."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (major, minor)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int = 1, **constants: Any) -> None:
    """Runs `kernel` on the card of its first tensor. Contraction is off, so sums and products round where the
    reference rounds them.

    Raises ValueError where a tensor is not contiguous: the kernels count addresses from shapes.
    """
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError(f"{kernel.fn.__name__}: every tensor has to be contiguous")
    device = tensors[0].device
    how = launching(device)
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    if how.dependent:  # an option that older Tritons do not know, and that says no by default
        options["launch_pdl"] = True
    with _current(device):
        kernel[grid](*args, **constants, DEPENDENT=_mode(how, kernel), **options)


def _mode(how: Launching, kernel: Any) -> int:
    """What kernels are compiled for: 0 no dependent launch, 1 start the next one at once, 2 late."""
    if not how.dependent:
        return 0
    return 2 if how.late and kernel.fn.__name__.endswith("_linear") else 1


def _current(device: torch.device) -> Any:
    """Triton launches on the current card; there may be several, of several kinds."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)


def jit(*, varying: tuple[str, ...] = ()) -> Callable[[Callable], Any]:
    """triton.jit. A kernel is not compiled anew for values of the arguments `varying`."""
    return triton.jit(do_not_specialize=list(varying))


def row_tiles(rows: int, digits: int = 1) -> int:
    """Tiles of 16 columns that a product computes for each block of weights, a row having `digits` of them: up to 8.

    Raises QuasarError beyond 64 rows.
    """
    if not 1 <= rows <= MOST_ROWS:
        raise QuasarError(f"a pass of {rows} rows: CUDA kernels that read the weights once take 1 to {MOST_ROWS}")
    return triton.next_power_of_2(triton.cdiv(rows * digits, WINDOW))


@triton.jit
def await_inputs(DEPENDENT: tl.constexpr):
    """Waits for the previous kernel; lets the next one start before that, unless it is to start late."""
    if DEPENDENT:
        if DEPENDENT == 1:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_start(DEPENDENT: tl.constexpr):
    """Behind a product's last tile."""
    if DEPENDENT == 2:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def rounded(x):
    """Nearest integer, half to even, of float32 well below 2^22, as float32.

    1.5 * 2^23 pushes the fraction out of the float, and the addition rounds it as asked. Works the same in the
    interpreter, where libdevice's rint does not exist.
    """
    magic = 12582912.0
    return (x + magic) - magic


@triton.jit
def round_to_int8(x):
    """`rounded`, clamped to int8."""
    return tl.minimum(tl.maximum(rounded(x), -128.0), 127.0).to(tl.int8)


@triton.jit
def row_scale_of(peak, LIMIT: tl.constexpr):
    """A row's scale from max|row|, float32: peak / LIMIT (127 for int8, 7 for int4), 1 for a row of zeros."""
    return tl.where(peak > 0, tl.div_rn(peak, LIMIT * 1.0), 1.0)


@triton.jit
def silu_times(gate, up, dtype: tl.constexpr):
    """silu(gate) * up, float32 in and out; silu is rounded to `dtype`, as in the reference."""
    silu = tl.div_rn(gate, 1.0 + tl.exp(-gate)).to(dtype).to(tl.float32)
    return (silu * up).to(dtype).to(tl.float32)


@triton.jit
def as_peak(x):
    """|x| of float32 as an integer that grows with it: maxima of integers come out the same in every order."""
    return tl.abs(x).to(tl.int32, bitcast=True)
