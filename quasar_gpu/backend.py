"""The CUDA backend: Triton kernels for passes of up to 64 rows, captured as CUDA graphs.

At small batches a pass costs what reading its weights costs, if nothing else gets in the way. Per layer, W8A8:

    add_rms_norm_quantize   residual + norm + int8
    int8_linear             q, k, v with their biases
    attend_items            norms of q and k, rotation, append to the pages, blocks of keys
    combine                 the sum of those, and each row's peak
    quantize_by_peak        int8
    int8_linear             o
    add_rms_norm_quantize
    int8_linear             gate and up, silu(gate) * up, and each row's peak
    quantize_by_peak
    int8_linear             down

A linear layer's result is a `Product`, which is launched when its consumer is known, for that may be fused into it.
Results lie in reused buffers, so a pass allocates nothing; all that changes between passes is read from device memory,
so a captured pass serves every batch of its size. Longer passes (prompts) use PyTorch's int8 matmul, whose sums are
exact too; everything else of them runs in the same kernels, 64 rows at a time where sums are rounded, so that a row's
bits never depend on how a prompt was cut.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quasar.backends.base import ActivationQuant, AttentionSpec, Backend, Batch, Forward, Quantized, Slot
from quasar.backends.buffers import Buffers
from quasar.errors import QuasarError
from quasar_gpu import graphs
from quasar_gpu.batches import HostTables, PassInputs, tables_of
from quasar_gpu.device import require_free
from quasar_gpu.graphs import CudaPass, PaddedBatch
from quasar_gpu.kernels import attention as attention_kernels
from quasar_gpu.kernels import int4 as int4_kernels
from quasar_gpu.kernels import linear as linear_kernels
from quasar_gpu.kernels import rows as row_kernels
from quasar_gpu.kernels.launch import MOST_ROWS, WINDOW, launching
from quasar_gpu.kernels.sampling import gumbel_best
from quasar_gpu.prompt import padded_int_mm
from quasar_gpu.slots import PagedSlot, PagePool


@dataclass(frozen=True)
class Product:
    """A linear layer's result [rows, outputs], to be computed: `run(out, epilogue)` launches it. Longer ones than a
    pass take no epilogue."""

    backend: CudaBackend
    rows: int
    outputs: int
    run: Callable[[Tensor, linear_kernels.Epilogue], None]

    def __add__(self, other: Tensor) -> Tensor:
        """For whoever runs a layer by itself and adds the residual stream."""
        return self.backend.result(self) + other


@dataclass(frozen=True)
class PassRows:
    """What `rope_rows` hands to a layer: whole tables of angles, and what the pass reads from the device."""

    cos: Tensor
    sin: Tensor
    inputs: PassInputs


@dataclass(frozen=True)
class Unattended:
    """What `append_rotated` hands to attention, which appends: q, k and v [rows, ...] before norms and rotation."""

    qkv: Tensor
    rows: PassRows


class CudaBackend(Backend):
    name = "cuda"
    graphs = True  # capture passes
    fuses_digits = True
    int4_offsets = True
    runs_before_capture = 1

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """device as `open_cuda` returns it; a CPU, under Triton's interpreter, for tests."""
        self.device, self.dtype = device, dtype
        self.graphs = self.graphs and device.type == "cuda"
        self._buffers = Buffers(device)
        self._pools: dict[tuple[int, int, int], PagePool] = {}
        self._workspaces: dict[int, Tensor] = {}  # for partial sums of attention, by their number of floats
        self._inputs: dict[Hashable, PassInputs] = {}  # of captured passes
        self._heads: dict[PagePool, AttentionSpec] = {}  # of the decoder that a pool is for, without norms
        self._made: tuple[Callable[[], Batch | None], HostTables] | None = None  # tables of the batch that comes next
        self._graph_memory: Any = None  # shared by all graphs
        with torch.inference_mode(False):
            self._peaks = torch.zeros(MOST_ROWS, dtype=torch.int32, device=device)
            self._keys = torch.zeros(MOST_ROWS, dtype=torch.int64, device=device)
            on_card = device.type == "cuda"
            self._host_keys = torch.zeros(MOST_ROWS, dtype=torch.int64, pin_memory=True) if on_card else self._keys
        # The logits of the last pass, where its keys are, and which of them belong to its rows.
        self._best: tuple[Callable[[], Tensor | None], Tensor, list[int] | None] | None = None

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """For a result with shape[0] rows."""
        if shape[0] <= MOST_ROWS:
            return self._buffers.take(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self.device)

    # Weights.

    def full_weight(self, weight: Tensor) -> Tensor:
        return weight.to(self.device, self.dtype).contiguous()

    def int8_weight(self, values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return values.to(self.device).contiguous(), scale.to(self.device, torch.float32).contiguous()

    def int4_weight(self, values: Tensor, scale: Tensor, offset: Tensor | None = None) -> int4_kernels.Int4Weight:
        offset = None if offset is None else offset.to(self.device)
        return int4_kernels.pack_int4(values.to(self.device), scale.to(self.device), offset)

    # Products: launched by `result` and by what follows them.

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None) -> Any:
        def run(out: Tensor, epilogue: linear_kernels.Epilogue) -> None:
            for rows, results in zip(x.split(MOST_ROWS), out.split(MOST_ROWS), strict=True):
                linear_kernels.float_linear(rows, weight, bias, results, epilogue=epilogue)

        return Product(self, x.shape[0], weight.shape[0], run)

    def int8_linear(self, x: Quantized, weight: Any, bias: Tensor | None) -> Any:
        rows = x.values.shape[:1]
        if x.scale.shape != rows:  # one for all of them
            x = Quantized(x.values, self._new(rows, torch.float32).copy_(x.scale))
        return self._int8_product(x, weight, bias)

    def wide_int8_linear(self, x: Tensor | Quantized, weight: Any, bias: Tensor | None) -> Any:
        """x: in floating point, or digits int8 [2 * rows, in] with the scale [rows] of the lower ones."""
        digits = self.quantize(x, ActivationQuant(wide=True)) if isinstance(x, Tensor) else x
        return self._int8_product(digits, weight, bias)

    def _int8_product(self, x: Quantized, weight: Any, bias: Tensor | None) -> Product:
        """x: int8 [rows, in], or both digits [2 * rows, in]; with a scale for each row."""
        (values, weight_scale), rows = weight, x.scale.shape[0]

        def run(out: Tensor, epilogue: linear_kernels.Epilogue) -> None:
            if rows <= MOST_ROWS:
                linear_kernels.int8_linear(x.values, x.scale, values, weight_scale, bias, out, epilogue=epilogue)
                return
            sums = padded_int_mm(x.values, values)
            if sums.shape[0] > rows:
                upper, lower = sums.chunk(2)
                sums = lower.add_(upper, alpha=16)
            y = sums.float().mul_(x.scale[:, None]).mul_(weight_scale)
            out.copy_(y if bias is None else y.add_(bias))

        return Product(self, rows, values.shape[0], run)

    def int4_linear(self, x: Tensor | Quantized, weight: Any, bias: Tensor | None) -> Any:
        values, scale = (x.values, x.scale) if isinstance(x, Quantized) else (x, None)

        def run(out: Tensor, epilogue: linear_kernels.Epilogue) -> None:
            int4_kernels.int4_linear(values, scale, weight, bias, out, epilogue)

        return Product(self, values.shape[0], weight.values.shape[0], run)

    def result(self, y: Tensor | Product, dtype: torch.dtype | None = None) -> Tensor:
        """A linear layer's result as a tensor [rows, outputs] of `dtype` (None: the backend's)."""
        if isinstance(y, Tensor):
            return y
        out = self._new((y.rows, y.outputs), dtype or self.dtype)
        y.run(out, None)
        return out

    def quantize_int4(self, x: Tensor) -> Quantized:
        y = self._quantized(x.shape)
        row_kernels.quantize(x, y.values, y.scale, row_kernels.INT4)
        return y

    def rotate(self, x: Tensor, hadamard: Tensor) -> Tensor:
        out = self._new(x.shape, x.dtype)
        int4_kernels.rotate(x, hadamard, out)
        return out

    # Between the matmuls.

    def embed(self, table: Tensor, ids: Tensor) -> Tensor:
        out = self._new((ids.shape[0], table.shape[1]), self.dtype)
        row_kernels.embed(table, ids, out, self._keys)
        return out

    def quantize(self, x: Tensor, quant: ActivationQuant) -> Quantized:
        if quant.static_scale is not None:
            return self._quantize_static(x, quant.static_scale)
        y = self._quantized(x.shape, quant)
        (row_kernels.digits if quant.wide else row_kernels.quantize)(x.contiguous(), y.values, y.scale)
        return y

    def _quantized(self, shape: tuple[int, ...], quant: ActivationQuant | None = None) -> Quantized:
        """Room for rows of int8; for both digits of wide ones, with a scale for each row all the same."""
        rows, size = shape
        scale = self._new((rows,), torch.float32)
        if quant is None or not quant.wide:
            return Quantized(self._new(shape, torch.int8), scale)
        if rows <= MOST_ROWS:
            return Quantized(self._buffers.take((2 * rows, size), torch.int8), scale)
        return Quantized(torch.empty((2 * rows, size), dtype=torch.int8, device=self.device), scale)

    def _quantize_static(self, x: Tensor, scale: Tensor) -> Quantized:
        # PyTorch's own operators: only checkpoints made elsewhere have static scales.
        scaled = torch.div(x, scale, out=self._new(x.shape, torch.float32))
        y = self._quantized(x.shape)
        y.values.copy_(scaled.round_().clamp_(-128, 127))
        y.scale.copy_(scale)
        return y

    def _quantize_with_peaks(self, x: Tensor, quant: ActivationQuant) -> Quantized:
        """x, which left its peaks in `_peaks` unless it has too many rows or a static scale."""
        if quant.static_scale is not None or x.shape[0] > MOST_ROWS:
            return self.quantize(x, quant)
        y = self._quantized(x.shape, quant)
        row_kernels.quantize_by_peak(x, self._peaks, y.values, y.scale)
        return y

    def add_rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, quant: ActivationQuant | None
    ) -> tuple[Tensor | Quantized, Tensor]:
        x = self.result(x)
        total = x if residual is None else self._new(x.shape, self.dtype)
        peaks = self._peaks if x.shape[0] <= MOST_ROWS else None
        if quant is not None and quant.static_scale is None:
            y = self._quantized(x.shape, quant)
            row_kernels.add_rms_norm_quantize(x, residual, weight, eps, total, y.values, y.scale, peaks)
            return y, total
        y = self._new(x.shape, self.dtype)
        row_kernels.add_rms_norm(x, residual, weight, eps, total, y, peaks)
        return (y if quant is None else self.quantize(y, quant)), total

    def swiglu(self, gate_up: Tensor | Product, quant: ActivationQuant | None) -> Tensor | Quantized:
        """A product gets it as its end, and the norm before the product made `_peaks` ready."""
        if isinstance(gate_up, Product) and gate_up.rows <= MOST_ROWS:
            y = self._new((gate_up.rows, gate_up.outputs // 2), self.dtype)
            gate_up.run(y, linear_kernels.SwiGLU(self._peaks))
            return y if quant is None else self._quantize_with_peaks(y, quant)
        gate_up = self.result(gate_up)
        shape = (gate_up.shape[0], gate_up.shape[1] // 2)
        if quant is not None and quant.static_scale is None:
            quantized = self._quantized(shape, quant)
            row_kernels.swiglu_quantize(gate_up, quantized.values, quantized.scale)
            return quantized
        y = self._new(shape, self.dtype)
        row_kernels.swiglu(gate_up, y)
        return y if quant is None else self.quantize(y, quant)

    # Attention.

    def rope_rows(
        self, cos: Tensor, sin: Tensor, specs: Sequence[AttentionSpec], batch: Batch
    ) -> Iterable[tuple[Any, Any]]:
        heads = replace(specs[0], q_norm=None, k_norm=None)
        if isinstance(batch, PaddedBatch):
            if batch.heads != heads:
                raise RuntimeError("two decoders have keys and values of one shape, and different heads")
            return [(PassRows(cos, sin, batch.inputs), sin)] * len(specs)
        self._heads[_pool(batch)] = heads
        host = self._take_tables(batch, heads)
        inputs = PassInputs.of(host, self.device, self._workspace(heads, host.shape.bucket_of_partials))
        return [(PassRows(cos, sin, inputs), sin)] * len(specs)

    def _take_tables(self, batch: Batch, heads: AttentionSpec) -> HostTables:
        """Of this batch, which `pass_key` may have made already."""
        made, self._made = self._made, None
        if made is not None and made[0]() is batch:
            return made[1]
        return tables_of(batch, attention_kernels.tile_rows(heads, self.dtype))

    def _workspace(self, heads: AttentionSpec, partials: int) -> Tensor:
        """For so many partial sums. They come in powers of two, so that all together are at most twice the largest."""
        floats = attention_kernels.partial_floats(partials, heads.heads, heads.head_dim)
        if floats not in self._workspaces:
            self.require_memory(4 * floats, "memory for attention")
            with torch.inference_mode(False):
                self._workspaces[floats] = torch.empty(floats, dtype=torch.float32, device=self.device)
        return self._workspaces[floats]

    def append_rotated(
        self, qkv: Tensor | Product, spec: AttentionSpec, cos: Any, sin: Any, batch: Batch, layer: int
    ) -> Any:
        """Hands on: `attention` and `attend` append as they attend. cos as `rope_rows` made it."""
        return Unattended(self.result(qkv), cos)

    def attention(self, q: Any, spec: AttentionSpec, batch: Batch, layer: int) -> Tensor:
        return self._attend(q, spec, batch, layer, None)

    def attend(
        self, q: Any, spec: AttentionSpec, batch: Batch, layer: int, quant: ActivationQuant | None
    ) -> Tensor | Quantized:
        with_peaks = quant is not None and quant.static_scale is None and q.qkv.shape[0] <= MOST_ROWS
        y = self._attend(q, spec, batch, layer, self._peaks if with_peaks else None)
        return y if quant is None else self._quantize_with_peaks(y, quant)

    def _attend(self, q: Unattended, spec: AttentionSpec, batch: Batch, layer: int, peaks: Tensor | None) -> Tensor:
        pool, inputs = _pool(batch), q.rows.inputs
        out = self._new((q.qkv.shape[0], spec.heads * spec.head_dim), self.dtype)
        for part in inputs.launched:
            attention_kernels.attend_items(
                q.qkv,
                spec,
                q.rows.cos,
                q.rows.sin,
                pool.layer_k[layer],
                pool.layer_v[layer],
                inputs.tables,
                inputs.tables.items[part.items.start : part.items.stop],
                inputs.workspace,
                peaks,
            )
            if part.rows:
                done = out[part.rows.start : part.rows.stop]
                attention_kernels.combine(spec, inputs.tables, part.rows, inputs.workspace, done, peaks)
        return out

    # Logits, and the largest of them.

    def kept(self, x: Tensor | Product, batch: Batch) -> Tensor:
        return super().kept(self.result(x), batch)

    def logits(self, lm_head: Callable[[Any], Any], x: Tensor | Quantized) -> Tensor:
        """float32, from sums that were never rounded to `dtype`; those of up to 64 rows lie in the memory of the
        passes before."""
        y = lm_head(x)
        if y.rows > MOST_ROWS:
            return self.result(y, torch.float32)
        most = WINDOW if y.rows <= WINDOW else MOST_ROWS
        logits = self._buffers.take((most, y.outputs), torch.float32)[: y.rows]
        y.run(logits, linear_kernels.Best(self._keys))
        self._best = weakref.ref(logits), self._keys, None
        return logits

    def argmax(self, logits: Tensor) -> Tensor:
        """The last pass found it on its way, and a captured one has copied it to the host."""
        if self._best is None or self._best[0]() is not logits:
            return logits.argmax(dim=-1)
        _, keys, rows = self._best
        if keys is self._host_keys and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return linear_kernels.best_tokens(keys[: len(logits)] if rows is None else keys[rows])

    def gumbel_argmax(self, logits: Tensor, states: Sequence[int], temperatures: Sequence[float]) -> Sequence[int]:
        signed = [state - (state >> 63 << 64) for state in states]  # as int64 has them
        on_device = torch.tensor(signed, dtype=torch.int64, device=self.device)
        rates = torch.tensor(temperatures, dtype=torch.float64, device=self.device)
        return gumbel_best(logits, on_device, rates).tolist()

    # Captured passes.

    captures_rows = True

    def pass_key(self, batch: Batch) -> Hashable | None:
        if not self.graphs or batch.rows > MOST_ROWS:
            return None
        pool = _pool(batch)
        if pool not in self._heads:  # the first pass finds out
            return None
        host = self._take_tables(batch, self._heads[pool])
        self._made = weakref.ref(batch), host
        return id(pool), host.shape.bucket(), launching(self.device)

    def capture(self, forward: Forward, batch: Batch) -> CudaPass:
        pool = _pool(batch)
        heads = self._heads[pool]
        host = self._take_tables(batch, heads)
        shape = host.shape.bucket()
        if (pool, shape) not in self._inputs:
            self._inputs[pool, shape] = PassInputs(shape, self.device, self._workspace(heads, shape.partials))
        inputs = self._inputs[pool, shape]
        inputs.write(host)
        run = partial(forward, inputs.tables.ids, PaddedBatch(batch, inputs, heads))
        logits = run()  # compiles, takes buffers, and is this pass
        if self._graph_memory is None and self.device.type == "cuda":
            self._graph_memory = torch.cuda.graph_pool_handle()

        def run_and_copy() -> None:
            run()
            if self._host_keys is not self._keys:
                self._host_keys.copy_(self._keys, non_blocking=True)

        graph = graphs.capture(run_and_copy, self.device, self._graph_memory)
        return CudaPass(self, graph, inputs, heads, logits, self.keep(logits, batch, self._keys))

    def replay(self, captured: CudaPass, batch: Batch) -> Tensor:
        """Logits [kept rows, vocab]."""
        captured.inputs.write(self._take_tables(batch, captured.heads))
        captured.graph.replay()
        return self.keep(captured.all_logits, batch, self._host_keys)

    def keep(self, logits: Tensor, batch: Batch, keys: Tensor) -> Tensor:
        """The batch's kept rows of a captured pass's logits [bucket, vocab], whose best tokens are in `keys`."""
        rows = None if batch.keeps_all else batch.kept_rows
        kept = logits[: batch.rows] if rows is None else logits[torch.tensor(rows, device=self.device)]
        self._best = weakref.ref(kept), keys, rows
        return kept

    # The device itself.

    def require_memory(self, nbytes: int, what: str) -> None:
        if self.device.type != "cuda":
            return
        try:
            require_free(self.device, nbytes, what)
        except QuasarError:
            for pool in self._pools.values():  # pages that are kept for later
                pool.release()
            require_free(self.device, nbytes, what)

    def new_slot(self, layers: int, kv_heads: int, capacity: int, head_dim: int) -> Slot:
        size = (layers, kv_heads, head_dim)
        if size not in self._pools:
            self._pools[size] = PagePool(*size, self.dtype, self.device, _requires_memory_of(self))
        return PagedSlot(self._pools[size], capacity)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _pool(batch: Batch) -> PagePool:
    slot = batch.segments[0].slot
    assert isinstance(slot, PagedSlot)
    return slot.pool


def _requires_memory_of(backend: CudaBackend) -> Callable[[int, str], None]:
    """`require_memory` for a pool, which must not keep its backend."""
    weakly = weakref.ref(backend)

    def require(nbytes: int, what: str) -> None:
        if (alive := weakly()) is not None:
            alive.require_memory(nbytes, what)

    return require
