"""Count what costs time on an NPU: kernel launches, copies, waits of the host, graph replays."""

import ctypes
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Counts:
    """What happened on the device while a ``counting()`` block ran.

    Attributes:
        launches: operator name -> kernels launched one by one (``npu_quant_matmul``, ``aten.add``, ...). An
            operator that had to copy a strided input first adds ``<name>/contiguous``.
        replayed: the same for kernels that ran inside graph replays.
        graph_replays, graph_updates: calls of ``NPUGraph.replay`` and task updates of ``NPUGraph.update``.
        host_to_device, device_to_host: copies between the two memories.
        host_waits: times the host stood still for the device: blocking copies to the host, ``.item()``,
            operators whose output shape depends on data, ``synchronize()`` of device, stream or event.
    """

    launches: Counter[str] = field(default_factory=Counter)
    replayed: Counter[str] = field(default_factory=Counter)
    graph_replays: int = 0
    graph_updates: int = 0
    host_to_device: int = 0
    device_to_host: int = 0
    host_waits: int = 0

    @property
    def total_launches(self) -> int:
        """Kernels launched one by one, all names together."""
        return self.launches.total()


_active: list[Counts] = []
_runtime: ctypes.CDLL | None = None
_waits_inside_copies = 0


def watch(runtime: ctypes.CDLL) -> None:
    """Take the explicit synchronisations from the C runtime, which sees those torch_npu makes by itself."""
    global _runtime
    _runtime = runtime


def _explicit_waits() -> int:
    return (_runtime.emulated_host_waits() if _runtime else 0) - _waits_inside_copies


@contextmanager
def counting() -> Iterator[Counts]:
    """Count until the block ends; blocks nest. ``host_waits`` is complete once the block has ended."""
    counts = Counts()
    before = _explicit_waits()
    _active.append(counts)
    try:
        yield counts
    finally:
        _active.pop()
        counts.host_waits += _explicit_waits() - before


@contextmanager
def inside_copy() -> Iterator[None]:
    """The runtime's own waits in here belong to one copy, which is counted as a whole."""
    global _waits_inside_copies
    before = _explicit_waits()
    try:
        yield
    finally:
        _waits_inside_copies += _explicit_waits() - before


def launched(name: str) -> None:
    for counts in _active:
        counts.launches[name] += 1


def replayed(names: list[str]) -> None:
    for counts in _active:
        counts.graph_replays += 1
        counts.replayed.update(names)


def happened(what: str) -> None:
    """Add one to the attribute ``what`` of every active count."""
    for counts in _active:
        setattr(counts, what, getattr(counts, what) + 1)
