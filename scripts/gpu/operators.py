"""Every operator of a backend against the reference backend, and against itself: a row's result must not depend on the
number of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quasar.backends.base import ActivationQuant, AttentionSpec, Backend, Batch, Quantized, Segment
from quasar.backends.reference import ReferenceBackend
from quasar.models.config import ModelConfig
from quasar_gpu.backend import CudaBackend
from quasar_gpu.slots import PagedSlot

ROWS = 40  # of the longest pass
FEWER = (1, 2, 6, 15, 16, 17, 33)  # of those held against it


@dataclass(frozen=True)
class OperatorError:
    """One operator over a pass of ROWS rows.

    error: largest difference from the reference, over the reference's largest value; invariant: whether passes of
    FEWER of the same rows gave the same bits.
    """

    operator: str
    error: float
    invariant: bool


@dataclass(frozen=True)
class _Inputs:
    """Random numbers on the host, the same for every backend."""

    hidden: Tensor  # [ROWS, hidden]
    residual: Tensor
    gate_up: Tensor  # [ROWS, 2 * intermediate]
    qkv: Tensor  # [ROWS, qkv_size]
    attended: Tensor  # [ROWS, heads * head_dim]
    ids: Tensor
    table: Tensor  # [1000, hidden]
    norm: Tensor  # [hidden]
    head_norm: Tensor  # [head_dim]
    weights: dict[str, Tensor]  # [out, in]
    keys: Tensor  # [kv_heads, context, head_dim]
    values: Tensor


def _inputs(config: ModelConfig, dtype: torch.dtype, context: int) -> _Inputs:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    c = config
    heads = c.num_heads * c.head_dim
    sizes = {
        "qkv": (c.qkv_size, c.hidden_size),
        "o": (c.hidden_size, heads),
        "gate_up": (2 * c.intermediate_size, c.hidden_size),
        "down": (c.hidden_size, c.intermediate_size),
    }
    return _Inputs(
        hidden=random(ROWS, c.hidden_size),
        residual=random(ROWS, c.hidden_size),
        gate_up=random(ROWS, 2 * c.intermediate_size),
        qkv=random(ROWS, c.qkv_size),
        attended=random(ROWS, heads),
        ids=torch.randint(0, 1000, (ROWS,), generator=generator),
        table=random(1000, c.hidden_size),
        norm=random(c.hidden_size) + 1,
        head_norm=random(c.head_dim) + 1,
        weights={name: random(*size, scale=size[1] ** -0.5) for name, size in sizes.items()},
        keys=random(c.num_kv_heads, context, c.head_dim),
        values=random(c.num_kv_heads, context, c.head_dim),
    )


def operators(
    backend: Backend, config: ModelConfig, context: int, inputs: _Inputs
) -> dict[str, Callable[[int], Tensor]]:
    """Each operator by name: takes the number of rows, returns its results, float32 [rows, -1] on the host."""
    place, quant = backend.place, ActivationQuant()
    hidden, residual, gate_up, qkv = map(place, (inputs.hidden, inputs.residual, inputs.gate_up, inputs.qkv))
    norm, head_norm, table = place(inputs.norm), place(inputs.head_norm), place(inputs.table)
    ids = place(inputs.ids)
    c = config
    spec = AttentionSpec(c.num_heads, c.num_kv_heads, c.head_dim, head_norm, head_norm, c.rms_norm_eps)
    angles = torch.arange(context + ROWS)[:, None] / torch.arange(1, c.head_dim // 2 + 1)
    cos, sin = place(angles.cos()), place(angles.sin())
    slot = backend.new_slot(1, c.num_kv_heads, context + ROWS, c.head_dim)
    keys, values = place(inputs.keys)[None], place(inputs.values)[None]
    if isinstance(slot, PagedSlot):
        slot.write(0, keys, values)
    else:
        slot.k[:, :, :context], slot.v[:, :, :context] = keys, values
    slot.length = context

    def host(*results: Tensor) -> Tensor:
        return torch.cat([r.float().cpu().reshape(r.shape[0], -1) for r in results], dim=1)

    def dequantized(y: Tensor | Quantized) -> Tensor:
        assert isinstance(y, Quantized)
        return host(y.values.float() * y.scale[:, None])

    def normed(rows: int, with_residual: bool, quantized: bool) -> Tensor:
        x, other = hidden[:rows].clone(), residual[:rows].clone() if with_residual else None
        y, total = backend.add_rms_norm(x, other, norm, c.rms_norm_eps, quant if quantized else None)
        return torch.cat([dequantized(y) if quantized else host(y), host(total)], dim=1)

    def attention(rows: int, quantized: bool = False) -> Tensor:
        batch = Batch([Segment(slot, [0] * rows)])
        rotations = backend.rope_rows(cos, sin, [spec], batch)
        q = backend.append_rotated(qkv[:rows].clone(), spec, *next(iter(rotations)), batch, 0)
        if quantized:
            return dequantized(backend.attend(q, spec, batch, 0, quant))
        y = backend.attention(q, spec, batch, 0)
        written = slice(context, context + rows)
        return host(y, slot.k[0, :, written].transpose(0, 1), slot.v[0, :, written].transpose(0, 1))

    found: dict[str, Callable[[int], Tensor]] = {
        "embed": lambda rows: host(backend.embed(table, ids[:rows])),
        "quantize": lambda rows: dequantized(backend.quantize(hidden[:rows], quant)),
        "rms_norm": lambda rows: normed(rows, False, False),
        "add_rms_norm": lambda rows: normed(rows, True, False),
        "add_rms_norm_quantize": lambda rows: normed(rows, True, True),
        "swiglu": lambda rows: host(backend.swiglu(gate_up[:rows].clone(), None)),
        "swiglu_quantize": lambda rows: dequantized(backend.swiglu(gate_up[:rows].clone(), quant)),
        f"append and attention behind {context}": attention,
        f"attend, quantised, behind {context}": lambda rows: attention(rows, quantized=True),
    }
    return found | _linears(backend, inputs, host)


def _linears(backend: Backend, inputs: _Inputs, host: Callable[[Tensor], Tensor]) -> dict[str, Callable[[int], Tensor]]:
    reference = ReferenceBackend(dtype=inputs.hidden.dtype)
    unnormed, norm = backend.place(inputs.hidden), backend.place(inputs.norm)

    def computed(y: Any) -> Tensor:
        return backend.result(y) if isinstance(backend, CudaBackend) else y

    found: dict[str, Callable[[int], Tensor]] = {}
    for name, weight in inputs.weights.items():
        source = {"o": inputs.attended, "down": inputs.gate_up.chunk(2, dim=1)[0]}.get(name, inputs.hidden)
        x, bias = backend.place(source.contiguous()), backend.place(inputs.weights[name][:, 0].contiguous())
        # Quantised by the reference, so that int8 products can be compared bit for bit.
        values = (weight.float() * 40 * weight.shape[1] ** 0.5).round().clamp(-127, 127).to(torch.int8)
        scale = torch.linspace(0.5, 1.5, len(values)) / (40 * weight.shape[1] ** 0.5)
        y = reference.quantize(source, ActivationQuant())
        x8 = Quantized(backend.place(y.values), backend.place(y.scale))
        packed, packed8 = backend.full_weight(weight), backend.int8_weight(values, scale)

        def full(rows: int, x: Tensor = x, packed: object = packed, bias: Tensor = bias) -> Tensor:
            return host(computed(backend.linear(x[:rows], packed, bias)))

        def int8(rows: int, x: Quantized = x8, packed: object = packed8, bias: Tensor = bias) -> Tensor:
            return host(computed(backend.int8_linear(Quantized(x.values[:rows], x.scale[:rows]), packed, bias.float())))

        found |= {f"linear {name}": full, f"int8_linear {name}": int8}

        def swiglu(rows: int, x: Quantized = x8, packed: object = packed8) -> Tensor:
            backend.add_rms_norm(unnormed[:rows].clone(), None, norm, 1e-6, None)  # as before every such product
            y = backend.int8_linear(Quantized(x.values[:rows], x.scale[:rows]), packed, None)
            quantized = backend.swiglu(y, ActivationQuant())
            assert isinstance(quantized, Quantized)
            return host(quantized.values.float() * quantized.scale[:, None])

        if name == "gate_up":
            found["int8_linear gate_up with swiglu"] = swiglu
    return found


def operator_errors(backend: Backend, config: ModelConfig, context: int) -> Iterator[OperatorError]:
    """Every operator at the sizes of `config`, the window `context` positions behind the start."""
    inputs = _inputs(config, backend.dtype, context)
    expected = operators(ReferenceBackend(dtype=backend.dtype), config, context, inputs)
    for name, run in operators(backend, config, context, inputs).items():
        whole, right = run(ROWS), expected[name](ROWS)
        invariant = all(torch.equal(run(rows), whole[:rows]) for rows in FEWER if rows < ROWS)
        yield OperatorError(name, ((whole - right).abs().max() / right.abs().max()).item(), invariant)
