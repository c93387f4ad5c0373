"""The Ascend backend for Atlas A2 and A3: torch_npu's fused operators, as few launches per layer as they allow.

At batch 1 a W8A8 layer is bound by launches, not by arithmetic: each costs the host about as long as the device needs
for the whole operator. Per layer, for any number of sequences (a pass of one row saves the gather):

    npu_add_rms_norm_dynamic_quant   residual + norm + int8
    npu_quant_matmul                 q, k, v with their biases
    index_select                     q before k before v, see places.py
    (npu_rms_norm)                   q and k together; Qwen3 only
    npu_rotary_mul                   all heads in one launch, see rope.py
    npu_scatter_nd_update_           k and v together (Qwen3: one each)
    npu_fused_infer_attention_score  through the table of blocks, all sequences
    npu_dynamic_quant
    npu_quant_matmul                 o
    npu_add_rms_norm_dynamic_quant
    npu_quant_matmul                 gate and up
    npu_dequant_swiglu_quant         silu(gate) * up + int8
    npu_quant_matmul                 down

Where the fused operators round otherwise than the reference backend, it is in tests/ascend/fused_rounding.py, step by
step.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from quasar.backends.base import ActivationQuant, AttentionSpec, Backend, Batch, Forward, Quantized, Segment, Slot
from quasar.errors import QuasarError
from quasar_npu.arena import BLOCK, Arenas
from quasar_npu.device import is_inference_card, open_npu
from quasar_npu.graphs import CapturedGraph, GraphShape, PaddedBatch, graphs_wanted
from quasar_npu.int4 import Int4Weight, int4_packed, quantize_rows_int4
from quasar_npu.places import Group, Places, eager_places, hidden_from, row_order, to_device
from quasar_npu.rope import LayerGains, RopeTables
from quasar_npu.weights import Int8Part, bias_of, float_nz_wanted, fractal, int8_parts, joined

_PER_TOKEN = 1  # quant_mode of npu_dequant_swiglu_quant
_CAUSAL_TO_BOTTOM_RIGHT = 3  # sparse_mode: the last row sees everything, as a window behind a cache must
_TRIANGLE = 2048  # side of the mask that sparse_mode 3 wants, whatever the lengths
_TND_HEAD = 128  # the head size for which sequences of any number of rows go in one launch
_FIRST_ONLY = [True, False]  # output_mask: up to torch_npu 2.12 its default is refused by the operator itself


def npu_backend(device: str, dtype: torch.dtype | None) -> NpuBackend:
    """The backend for the chip that "npu" or "npu:1" is; dtype None takes what that chip computes in."""
    place, soc = open_npu(device)
    if is_inference_card(soc):
        from quasar_npu.inference_card import InferenceCardBackend

        return InferenceCardBackend(place, dtype or torch.float16, soc)
    return NpuBackend(place, dtype or torch.bfloat16, soc)


class NpuBackend(Backend):
    name = "npu"
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    graphs = True  # capture passes
    int4_offsets = True
    runs_before_capture = 1

    def __init__(self, device: torch.device, dtype: torch.dtype, soc: str) -> None:
        if dtype not in self.dtypes:
            raise QuasarError(
                f"--dtype {str(dtype)[6:]}: {soc} runs {' and '.join(str(d)[6:] for d in self.dtypes)} only"
            )
        import torch_npu

        self.ops = torch_npu
        self.device, self.dtype, self.soc = device, dtype, soc
        self.graphs = self.graphs and graphs_wanted()
        # Before CANN 8.3 (torch_npu 2.5.1) the norm and the quantisation are two operators.
        self.fuses_norm_and_quant = hasattr(torch_npu, "npu_add_rms_norm_dynamic_quant") and _fused("NORM")
        self.fuses_swiglu_and_quant = _fused("SWIGLU")
        self._arenas = Arenas(dtype, device)
        self._gains: dict[AttentionSpec, LayerGains] = {}
        # Of every decoder in use: a self-drafter's passes come between its verifier's, whose graphs read these tables.
        self._tables = WeakTensorKeyDictionary()  # the decoder's cos -> RopeTables
        self._orders: dict[tuple[int, ...], Tensor] = {}
        self._static_scales = WeakTensorKeyDictionary()  # a static activation scale -> its reciprocal, and that one's
        # Of the pass that is running, and of captured ones: where rows go, and their mask.
        self._passes: WeakKeyDictionary[Batch, tuple[Places, Tensor | None]] = WeakKeyDictionary()
        self._tree_masks: dict[int, Tensor] = {}  # of the pass that is running
        self._triangle: Tensor | None = None

    # Weights.

    def full_weight(self, weight: Tensor) -> Tensor:
        matrix = weight.to(self.device, self.dtype).t()  # [in, out]
        return fractal(matrix) if float_nz_wanted() else matrix.contiguous()

    def int8_weight(self, values: Tensor, scale: Tensor) -> list[Int8Part]:
        return int8_parts(values.to(self.device), scale.to(self.device))

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    def int8_linear(self, x: Quantized, weight: Any, bias: Tensor | None) -> Tensor:
        tokens = x.values.shape[0]
        # A static scale holds for every token.
        scale = x.scale if x.scale.shape[0] == tokens else x.scale.expand(tokens).contiguous()
        return joined(
            [
                self.ops.npu_quant_matmul(
                    x.values,
                    part.values,
                    part.scale,
                    pertoken_scale=scale,
                    bias=bias_of(part, bias),
                    output_dtype=self.dtype,
                )
                for part in weight
            ]
        )

    # int4 weights.

    def int4_weight(self, values: Tensor, scale: Tensor, offset: Tensor | None = None) -> Int4Weight:
        offset = None if offset is None else offset.to(self.device)
        return int4_packed(values.to(self.device), scale.to(self.device), offset, self.dtype)

    def int4_linear(self, x: Tensor | Quantized, weight: Any, bias: Tensor | None) -> Tensor:
        if isinstance(x, Quantized):
            # int4 values are exact in 16 bits: the numbers of W4A4, at the speed of W4A16.
            y = self._int4_matmul(x.values.to(self.dtype), weight, None) * x.scale[:, None]
            return (y if bias is None else y + bias).to(self.dtype)
        # The operator's bias is float32 with bfloat16 activations, float16 with float16 ones.
        return self._int4_matmul(x, weight, bias if bias is None or self.dtype == torch.bfloat16 else bias.half())

    def _int4_matmul(self, x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
        return self.ops.npu_weight_quant_batchmatmul(
            x,
            weight.values,
            weight.scale,
            antiquant_offset=weight.offset,
            bias=bias,
            antiquant_group_size=weight.group,
        )

    def quantize_int4(self, x: Tensor) -> Quantized:
        return quantize_rows_int4(x)

    def rotate(self, x: Tensor, hadamard: Tensor) -> Tensor:
        return (x.view(-1, len(hadamard)) @ hadamard).view(x.shape)

    # Between the matmuls.

    def quantize(self, x: Tensor, quant: ActivationQuant) -> Quantized:
        if quant.static_scale is None:
            return Quantized(*self.ops.npu_dynamic_quant(x))
        return self._quantize_static(x, quant.static_scale)

    def _quantize_static(self, x: Tensor, scale: Tensor) -> Quantized:
        # Multiplied by the reciprocal: dividing is an operator that older CANN cannot capture. The operator wants it in
        # the activations' type, so the scale that goes on is that of the rounded reciprocal.
        pair = self._static_scales.get(scale)
        if pair is None:
            factor = (1 / scale.float()).to(x.dtype)
            pair = self._static_scales[scale] = factor, 1 / factor.float()
        return Quantized(self.ops.npu_quantize(x, pair[0], None, torch.qint8, -1, False), pair[1])

    def add_rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, quant: ActivationQuant | None
    ) -> tuple[Tensor | Quantized, Tensor]:
        if quant is not None and quant.static_scale is None and self.fuses_norm_and_quant:
            # The fused operator always adds something. These zeros are made by the pass itself: a captured pass would
            # otherwise read memory that a longer pass might replace.
            other = torch.zeros_like(x) if residual is None else residual
            y, _, total, scale, _ = self.ops.npu_add_rms_norm_dynamic_quant(
                x, other, weight, epsilon=eps, output_mask=_FIRST_ONLY
            )
            return Quantized(y, scale), total
        if residual is None:
            y, total = self.ops.npu_rms_norm(x, weight, eps)[0], x
        else:
            y, _, total = self.ops.npu_add_rms_norm(x, residual, weight, eps)
        return (y if quant is None else self.quantize(y, quant)), total

    def swiglu(self, gate_up: Tensor, quant: ActivationQuant | None) -> Tensor | Quantized:
        if quant is not None and quant.static_scale is None and self.fuses_swiglu_and_quant:
            return Quantized(*self.ops.npu_dequant_swiglu_quant(gate_up, activate_left=True, quant_mode=_PER_TOKEN))
        y = self.ops.npu_swiglu(gate_up, dim=-1)
        return y if quant is None else self.quantize(y, quant)

    # Attention.

    def token_ids(self, ids: Sequence[int]) -> Tensor:
        return to_device(torch.tensor(ids), self.device)  # pinned: the host does not wait for the copy

    def rope_rows(
        self, cos: Tensor, sin: Tensor, specs: Sequence[AttentionSpec], batch: Batch
    ) -> Iterable[tuple[Tensor, Tensor]]:
        tables = self._tables.get(cos)
        if tables is None:
            tables = self._tables[cos] = RopeTables(cos, sin, [self._gains_of(spec) for spec in specs], self.dtype)
        places = self._begin(batch)
        order = self._order(batch.rows, specs[0], turning=True)
        return tables.rows(places.start, batch.rows, places.positions, order)

    def _gains_of(self, spec: AttentionSpec) -> LayerGains:
        if spec not in self._gains:
            self._gains[spec] = LayerGains(spec, self.device)
        return self._gains[spec]

    def _begin(self, batch: Batch) -> Places:
        """Where the batch's rows go. A captured pass computes its mask here, at its beginning."""
        self._tree_masks.clear()
        if isinstance(batch, PaddedBatch):
            self._passes[batch] = batch.captured.places, batch.captured.hidden()
        else:
            self._passes[batch] = eager_places(batch, self.device), None
        return self._passes[batch][0]

    def _place(self, batch: Batch) -> tuple[Places, Tensor | None]:
        """Where the batch's rows go, and the mask of a captured pass."""
        if batch not in self._passes:
            self._begin(batch)  # the caller has not asked rope_rows
        return self._passes[batch]

    def _order(self, rows: int, spec: AttentionSpec, turning: bool = False) -> Tensor | None:
        """The order of a pass's rows, see places.py; `turning`: of those that have rotations.

        Kept: captured passes read it where it is, and the layers of a prompt share it.
        """
        if rows == 1:
            return None  # one row has q, k and v side by side
        values = () if turning and self._gains_of(spec).norm is not None else (spec.kv_heads,)
        key = (rows, spec.heads, spec.kv_heads, *values)
        order = self._orders.get(key)
        if order is None:
            order = self._orders[key] = to_device(row_order(*key), self.device)
        return order

    def append_rotated(
        self, qkv: Tensor, spec: AttentionSpec, cos: Tensor, sin: Tensor, batch: Batch, layer: int
    ) -> Tensor:
        gains, tokens = self._gains_of(spec), qkv.shape[0]
        rows = qkv.view(-1, spec.head_dim)
        order = self._order(tokens, spec)
        if order is not None:
            rows = rows.index_select(0, order)  # q [tokens, heads], k [tokens, kv_heads], v [tokens, kv_heads]
        if cos.dim() == 2:  # plain rows: the caller has not asked rope_rows
            cos, sin = gains.rotations(cos, sin, self.dtype, self._order(tokens, spec, turning=True))
        queries, keys = tokens * spec.heads, tokens * spec.kv_heads
        if gains.norm is None:
            turned = self._rotate(rows, cos, sin)
            self._append(turned[queries:], None, batch, layer, spec)
        else:
            normed = self.ops.npu_rms_norm(rows[: queries + keys], gains.norm, spec.eps)[0]
            turned = self._rotate(normed, cos, sin)
            self._append(turned[queries:], rows[queries + keys :], batch, layer, spec)
        return turned[:queries].view(tokens, spec.heads, spec.head_dim)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[rows, head_dim] by cos, sin [1, rows, 1, head_dim]."""
        return self.ops.npu_rotary_mul(x.view(cos.shape), cos, sin).view(x.shape)

    def _append(self, keys: Tensor, values: Tensor | None, batch: Batch, layer: int, spec: AttentionSpec) -> None:
        """Writes keys and values, each [rows * kv_heads, head_dim]; values None: they follow in `keys`."""
        places, _ = self._place(batch)
        if values is None and len(places.groups) == 1:
            group = places.groups[0]
            self.ops.npu_scatter_nd_update_(group.arena.rows(layer), group.slots, keys)
            return
        if values is None:
            keys, values = keys.chunk(2)
        for group in places.groups:
            rows = slice(group.first_row * spec.kv_heads, group.last_row * spec.kv_heads)
            key_slots, value_slots = group.slots.chunk(2)
            self.ops.npu_scatter_nd_update_(group.arena.rows(layer), key_slots, keys[rows])
            self.ops.npu_scatter_nd_update_(group.arena.rows(layer), value_slots, values[rows])

    def attention(self, q: Tensor, spec: AttentionSpec, batch: Batch, layer: int) -> Tensor:
        places, hidden = self._place(batch)
        if hidden is not None:
            return self._captured_attention(q, spec, places.groups[0], hidden, layer)
        parts = [
            self._attend_group(q[group.first_row : group.last_row], spec, batch, group, layer)
            for group in places.groups
        ]
        return joined(parts, dim=0)

    def _captured_attention(self, q: Tensor, spec: AttentionSpec, group: Group, hidden: Tensor, layer: int) -> Tensor:
        # A captured graph cannot be told lengths in a Python list: it reads a bucket of keys, masked.
        sequences = len(group.row_ends)
        y = self._fused_attention(
            q.view(sequences, -1, spec.heads, spec.head_dim),
            spec,
            group,
            layer,
            group.block_table,
            input_layout="BSND",
            atten_mask=hidden,
            actual_seq_lengths_kv=group.lengths,
        )
        return y.view(q.shape[0], -1)

    def _attend_group(self, q: Tensor, spec: AttentionSpec, batch: Batch, group: Group, layer: int) -> Tensor:
        if spec.head_dim == _TND_HEAD and not group.trees:
            y = self._fused_attention(
                q,
                spec,
                group,
                layer,
                group.block_table,
                input_layout="TND",
                atten_mask=self._upper_triangle(),
                sparse_mode=_CAUSAL_TO_BOTTOM_RIGHT,
                actual_seq_lengths=group.row_ends,
                actual_seq_lengths_kv=group.lengths,
            )
            return y.view(q.shape[0], -1)
        return joined([self._attend_alone(q, spec, batch, group, i, layer) for i in range(len(group.row_ends))], dim=0)

    def _attend_alone(
        self, q: Tensor, spec: AttentionSpec, batch: Batch, group: Group, index: int, layer: int
    ) -> Tensor:
        """One sequence: trees, and head sizes for which the operator takes no TND."""
        segment = batch.segments[group.first_segment + index]
        first, last = [0, *group.row_ends][index], group.row_ends[index]
        table = group.block_table[index : index + 1]
        where: dict[str, Any] = {}
        if segment.parents is not None:
            where["atten_mask"] = self._tree_mask(segment, table.shape[1] * BLOCK)
        elif last - first > 1:
            where = {"atten_mask": self._upper_triangle(), "sparse_mode": _CAUSAL_TO_BOTTOM_RIGHT}
        y = self._fused_attention(
            q[None, first:last],
            spec,
            group,
            layer,
            table,
            input_layout="BSND",
            actual_seq_lengths_kv=[group.lengths[index]],
            **where,
        )
        return y.view(last - first, -1)

    def _tree_mask(self, segment: Segment, columns: int) -> Tensor:
        key = id(segment)  # alive as long as the pass
        if key not in self._tree_masks:
            hidden = hidden_from(segment, columns)[None, None]  # [1, 1, rows, columns]
            self._tree_masks[key] = to_device(hidden, self.device)
        return self._tree_masks[key]

    def _fused_attention(
        self, q: Tensor, spec: AttentionSpec, group: Group, layer: int, table: Tensor, **where: Any
    ) -> Tensor:
        keys, values = group.arena.halves(layer)
        return self.ops.npu_fused_infer_attention_score(
            q,
            keys,
            values,
            num_heads=spec.heads,
            num_key_value_heads=spec.kv_heads,
            scale=spec.head_dim**-0.5,
            block_table=table,
            block_size=BLOCK,
            **where,
        )[0]

    def _upper_triangle(self) -> Tensor:
        if self._triangle is None:
            self._triangle = torch.ones(_TRIANGLE, _TRIANGLE, dtype=torch.bool).triu(1).to(self.device)
        return self._triangle

    # Passes that come again.

    captures_rows = True

    def pass_key(self, batch: Batch) -> Hashable | None:
        return GraphShape.of(batch) if self.graphs else None

    def capture(self, forward: Forward, batch: Batch) -> CapturedGraph:
        shape = GraphShape.of(batch)
        if shape is None:
            raise NotImplementedError
        return CapturedGraph(forward, batch, shape, self.device)

    # The device itself.

    def new_slot(self, layers: int, kv_heads: int, capacity: int, head_dim: int) -> Slot:
        return self._arenas.slot(layers, kv_heads, capacity, head_dim)

    def synchronize(self) -> None:
        torch.npu.synchronize(self.device)


def _fused(what: str) -> bool:
    """QUASAR_NPU_FUSED_NORM=0 and QUASAR_NPU_FUSED_SWIGLU=0 quantise in an operator of its own: the fused ones use one
    vector core a row, and which is faster is for hardware to say."""
    return os.environ.get(f"QUASAR_NPU_FUSED_{what}", "1") != "0"
