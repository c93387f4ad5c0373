"""What a CUDA graph is, on a machine without a card: launches with frozen addresses and numbers, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction


@dataclass(frozen=True)
class Launch:
    """A kernel of Triton's interpreter and what it was launched with."""

    kernel: InterpretedFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def again(self) -> None:
        """Launches it on the same memory, with the same numbers."""
        self.kernel.run(*self.args, grid=self.grid, warmup=False, **self.options)

    @property
    def name(self) -> str:
        """Of the kernel."""
        return self.kernel.fn.__name__

    @property
    def frozen(self) -> tuple[object, ...]:
        """All that a graph would keep of it: addresses, shapes, numbers."""
        values = [*self.args, *self.options.values()]
        return self.name, self.grid, *((v.data_ptr(), v.shape) if isinstance(v, Tensor) else v for v in values)


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """The launches within, which run as they always do. What the interpreter itself does with tensors, no mode sees."""
    launches: list[Launch] = []
    original = InterpretedFunction.run

    def run(self: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        with _disable_current_modes():
            # Other tensors of the same memory, as a graph keeps addresses: Buffers see who refers to theirs.
            kept = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
            launches.append(Launch(self, grid, kept, options))
            return original(self, *args, grid=grid, warmup=warmup, **options)

    InterpretedFunction.run = run
    try:
        yield launches
    finally:
        InterpretedFunction.run = original


class RecordedGraph:
    """Replays the launches of one run, and nothing else that was done in it."""

    def __init__(self, launches: list[Launch]) -> None:
        self.launches, self.replays = launches, 0

    def replay(self) -> None:
        self.replays += 1
        for launch in self.launches:
            launch.again()


def record(run: Callable[[], object], device: torch.device, pool: object) -> RecordedGraph:
    """In place of quasar_gpu.graphs.capture."""
    with recorded_launches() as launches:
        run()
    return RecordedGraph(launches)


class ViewsOnly(TorchDispatchMode):
    """Refuses every PyTorch operator but views: allocation, copies to the host, whatever waits for the device, shapes
    that depend on data, and kernels of PyTorch's own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        results = result if isinstance(result, (tuple, list)) else [result]
        alias = all(isinstance(r, Tensor) and r.untyped_storage().data_ptr() in given for r in results)
        if not alias or func._schema.is_mutable:
            raise AssertionError(f"{func} in a window pass")
        return result
