"""How long each kernel takes within a captured graph, and how fast it reads what it has to read."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, pairwise

import torch
from torch import Tensor

from quasar.backends.base import AttentionSpec, Batch, Segment
from quasar.models.config import ModelConfig
from quasar_gpu.backend import CudaBackend
from quasar_gpu.kernels import attention, int4, linear, rows
from quasar_gpu.kernels.launch import MOST_ROWS
from quasar_gpu.slots import PagedSlot

_COLD_BYTES = 400_000_000  # read between two uses of one weight: several times the largest L2 cache
_LAUNCHES = 96  # in a graph, so that launching the graph itself weighs nothing
_MOST_COPIES = 48
_REPLAYS = 7


@dataclass(frozen=True)
class KernelTime:
    """One launch: median over replays of a graph of many."""

    kernel: str
    rows: int
    microseconds: float
    nbytes: int  # that it must read

    @property
    def gigabytes_per_second(self) -> float:
        return self.nbytes / self.microseconds / 1e3


def graph_seconds(run: Callable[[int], None], launches: int) -> float:
    """Median seconds of one of `launches` launches, `run(i)` for each i, replayed as one graph."""
    for i in range(launches):  # compiles, and warms up
        run(i)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            run(i)
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_REPLAYS + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    spent = [before.elapsed_time(after) for before, after in pairwise(events)]
    return statistics.median(spent) / launches / 1e3


Timer = Callable[[Callable[[int], None], int], float]


class KernelBench:
    """The kernels of one decoder layer, and lm_head, at the sizes of `config` on `device`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, timer: Timer) -> None:
        self._config, self._dtype, self._device, self._timer = config, dtype, device, timer

    def _random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self._device).to(dtype or self._dtype)

    def _int8(self, *shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=self._device)

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self._dtype, device=self._device)

    def _time(self, name: str, count: int, nbytes: int, run: Callable[[int], None]) -> KernelTime:
        return KernelTime(name, count, 1e6 * self._timer(run, _LAUNCHES), nbytes)

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """[out, in] of each linear layer."""
        c = self._config
        return {
            "qkv": (c.qkv_size, c.hidden_size),
            "o": (c.hidden_size, c.num_heads * c.head_dim),
            "gate_up": (2 * c.intermediate_size, c.hidden_size),
            "down": (c.hidden_size, c.intermediate_size),
            "lm_head": (c.vocab_size, c.hidden_size),
        }

    def int8_linear(
        self, name: str, counts: list[int], config: linear.LinearConfig | None = None, digits: int = 1
    ) -> Iterator[KernelTime]:
        """With W8A8 weights, under inputs of one digit or two; config None takes the backend's choice."""
        out, inner = self.matrices[name]
        copies = _copies(out * inner)
        weights, scales = [self._int8(out, inner) for _ in range(copies)], self._random(out, dtype=torch.float32)
        for m in counts:
            x, scale = self._int8(digits * m, inner), self._random(m, dtype=torch.float32)
            y = self._empty(m, out)

            def run(i: int, x: Tensor = x, scale: Tensor = scale, y: Tensor = y) -> None:
                linear.int8_linear(x, scale, weights[i % copies], scales, None, y, config)

            yield self._time(f"{'wide_' * (digits - 1)}int8_linear {name}", m, out * inner, run)

    def int4_linear(
        self, name: str, counts: list[int], group: int, zeros: bool, config: int4.Int4Config | None = None
    ) -> Iterator[KernelTime]:
        """With W4A16 weights in groups, with zero points or symmetric; config None takes the backend's choice."""
        out, inner = self.matrices[name]
        group = min(group, inner & -inner)
        scale = self._random(out, inner // group)
        weight = int4.pack_int4(self._int8(out, inner), scale.bfloat16(), scale.bfloat16() if zeros else None)
        nbytes = weight.values.nbytes + weight.scale.nbytes * (1 + zeros)
        copies = _copies(nbytes)
        weights = [weight] + [replace(weight, values=weight.values.clone()) for _ in range(copies - 1)]
        about = f"groups of {group}{' with zero points' if zeros else ''}"
        for m in counts:
            x, y = self._random(m, inner), self._empty(m, out)

            def run(i: int, x: Tensor = x, y: Tensor = y) -> None:
                int4.int4_linear(x, None, weights[i % copies], None, y, config=config)

            yield self._time(f"int4_linear {name}, {about}", m, nbytes, run)

    def float_linear(
        self, name: str, counts: list[int], config: linear.LinearConfig | None = None
    ) -> Iterator[KernelTime]:
        """With weights of the backend's type; lm_head's results are float32."""
        out, inner = self.matrices[name]
        nbytes = out * inner * self._dtype.itemsize
        copies = _copies(nbytes)
        weights = [self._random(out, inner) for _ in range(copies)]
        for m in counts:
            x, y = self._random(m, inner), self._empty(m, out, dtype=torch.float32 if name == "lm_head" else None)

            def run(i: int, x: Tensor = x, y: Tensor = y) -> None:
                linear.float_linear(x, weights[i % copies], None, y, config)

            yield self._time(f"float_linear {name}", m, nbytes, run)

    def row_kernels(self, m: int) -> Iterator[KernelTime]:
        """What lies between the matmuls; bytes are those of the rows."""
        c = self._config
        x, total, gain = self._random(m, c.hidden_size), self._empty(m, c.hidden_size), self._random(c.hidden_size)
        scale, values = self._empty(m, dtype=torch.float32), self._empty(m, c.hidden_size, dtype=torch.int8)
        act, act8 = self._random(m, c.intermediate_size), self._empty(m, c.intermediate_size, dtype=torch.int8)
        two = self._empty(2 * m, c.intermediate_size, dtype=torch.int8)
        peaks, keys = (torch.zeros(MOST_ROWS, dtype=kind, device=self._device) for kind in (torch.int32, torch.int64))
        table = self._random(4096, c.hidden_size)
        ids = torch.arange(m, device=self._device)
        size = c.hidden_size * self._dtype.itemsize * m
        runs: dict[str, tuple[int, Callable[[int], None]]] = {
            "embed": (2 * size, lambda i: rows.embed(table, ids, total, keys)),
            "add_rms_norm_quantize": (
                3 * size,
                lambda i: rows.add_rms_norm_quantize(x, x, gain, c.rms_norm_eps, total, values, scale, peaks),
            ),
            "quantize": (size, lambda i: rows.quantize(x, values, scale)),
            "quantize_by_peak": (act.nbytes, lambda i: rows.quantize_by_peak(act, peaks, act8, scale)),
            "quantize_by_peak, two digits": (act.nbytes, lambda i: rows.quantize_by_peak(act, peaks, two, scale)),
        }
        for name, (nbytes, run) in runs.items():
            yield self._time(name, m, nbytes, run)

    def attention_kernels(self, m: int, context: int) -> Iterator[KernelTime]:
        """attend_items, which appends and attends behind `context` positions, and combine; bytes are those of keys and
        values."""
        c = self._config
        backend = CudaBackend(self._device, self._dtype)
        gain = self._random(c.head_dim)
        spec = AttentionSpec(c.num_heads, c.num_kv_heads, c.head_dim, gain, gain, c.rms_norm_eps)
        nbytes = 2 * c.num_kv_heads * (context + m) * c.head_dim * self._dtype.itemsize
        slot = backend.new_slot(_copies(nbytes), c.num_kv_heads, context + m, c.head_dim)
        assert isinstance(slot, PagedSlot)
        slot.length = context
        batch = Batch([Segment(slot, [0] * m)])
        cos, qkv = self._random(context + m, c.head_dim // 2, dtype=torch.float32), self._random(m, c.qkv_size)
        out = self._empty(m, c.num_heads * c.head_dim)
        ((made, _),) = backend.rope_rows(cos, cos, [spec], batch)
        tables, workspace, pool = made.inputs.tables, made.inputs.workspace, slot.pool
        for page in slot.pages:
            page.memory.normal_()  # as it comes it may hold NaN

        def attend(i: int) -> None:
            layer = i % len(pool.layer_k)
            k, v = pool.layer_k[layer], pool.layer_v[layer]
            attention.attend_items(qkv, spec, cos, cos, k, v, tables, tables.items, workspace)

        def combine(i: int) -> None:
            attention.combine(spec, tables, range(m), workspace, out)

        yield self._time(f"attend_items behind {context}", m, nbytes, attend)
        yield self._time(f"combine behind {context}", m, nbytes, combine)

    def everything(self, counts: list[int], contexts: list[int]) -> Iterator[tuple[str, Iterator[KernelTime]]]:
        """All of them for each number of rows, by name, to be iterated one by one."""
        for name in self.matrices:
            yield f"int8_linear {name}", self.int8_linear(name, counts)
            yield f"float_linear {name}", self.float_linear(name, counts)
            if name in ("qkv", "down"):
                yield f"wide_int8_linear {name}", self.int8_linear(name, counts, digits=2)
            if name != "lm_head":
                for group, zeros in ((32, True), (128, False)):
                    yield f"int4_linear {name}, groups of {group}", self.int4_linear(name, counts, group, zeros)
        for m in counts:
            yield f"rows, M = {m}", self.row_kernels(m)
            for context in contexts:
                yield f"attention, M = {m} behind {context}", self.attention_kernels(m, context)

    def sweep(self, name: str, m: int) -> Iterator[tuple[str, Iterator[KernelTime]]]:
        """Every cut of the int8, the 16-bit and the int4 matmul, by what it is, to be iterated one by one."""
        for config in linear.linear_configs():
            cut = f"{config.outputs}x{config.bytes_inside} B, {config.warps} warps, {config.stages} stages"
            yield cut, chain(self.int8_linear(name, [m], config), self.float_linear(name, [m], config))
        for small in int4.int4_configs(32) if name != "lm_head" else ():
            cut = f"{small.outputs} outputs, {small.warps} warps, {small.stages} stages"
            yield cut, self.int4_linear(name, [m], small.step, True, small)


def _copies(nbytes: int) -> int:
    """Of a tensor, so that none is found in a cache when its turn comes."""
    return min(max(-(-_COLD_BYTES // nbytes), 1), _MOST_COPIES)


def table_row(time: KernelTime) -> dict[str, object]:
    """For a report."""
    return {
        "kernel": time.kernel,
        "M": time.rows,
        "us": round(time.microseconds, 2),
        "GB/s": round(time.gigabytes_per_second, 1),
    }
