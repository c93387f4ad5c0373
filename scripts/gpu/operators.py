"""Every operator of a backend against the reference backend, and against itself: a row's result must not depend on the
number of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quasar.backends.base import ActivationQuant, AttentionSpec, Backend, Quantized
from quasar.backends.reference import MAX_WINDOW, ReferenceBackend
from quasar.models.config import ModelConfig


@dataclass(frozen=True)
class OperatorError:
    """One operator over a window of 16 rows.

    error: largest difference from the reference, over the reference's largest value; invariant: whether windows of 1
    to 15 of the same rows gave the same bits.
    """

    operator: str
    error: float
    invariant: bool


@dataclass(frozen=True)
class _Inputs:
    """Random numbers on the host, the same for every backend."""

    hidden: Tensor  # [MAX_WINDOW, hidden]
    residual: Tensor
    gate_up: Tensor  # [MAX_WINDOW, 2 * intermediate]
    qkv: Tensor  # [MAX_WINDOW, qkv_size]
    attended: Tensor  # [MAX_WINDOW, heads * head_dim]
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
        hidden=random(MAX_WINDOW, c.hidden_size),
        residual=random(MAX_WINDOW, c.hidden_size),
        gate_up=random(MAX_WINDOW, 2 * c.intermediate_size),
        qkv=random(MAX_WINDOW, c.qkv_size),
        attended=random(MAX_WINDOW, heads),
        ids=torch.randint(0, 1000, (MAX_WINDOW,), generator=generator),
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
    ids, attended = place(inputs.ids), place(inputs.attended)
    c = config
    spec = AttentionSpec(c.num_heads, c.num_kv_heads, c.head_dim, head_norm, head_norm, c.rms_norm_eps)
    angles = torch.arange(context + MAX_WINDOW)[:, None] / torch.arange(1, c.head_dim // 2 + 1)
    cos, sin = place(angles.cos()), place(angles.sin())
    cache = backend.new_cache(1, c.num_kv_heads, context + MAX_WINDOW, c.head_dim)
    cache.k[0, :, :context], cache.v[0, :, :context] = place(inputs.keys), place(inputs.values)
    cache.length = context

    def host(*results: Tensor) -> Tensor:
        return torch.cat([r.float().cpu().reshape(r.shape[0], -1) for r in results], dim=1)

    def dequantized(y: Tensor | Quantized) -> Tensor:
        assert isinstance(y, Quantized)
        return host(y.values.float() * y.scale[:, None])

    def normed(rows: int, with_residual: bool, quantized: bool) -> Tensor:
        x, other = hidden[:rows].clone(), residual[:rows].clone() if with_residual else None
        y, total = backend.add_rms_norm(x, other, norm, c.rms_norm_eps, quant if quantized else None)
        return torch.cat([dequantized(y) if quantized else host(y), host(total)], dim=1)

    def append(rows: int) -> Tensor:
        rotations = backend.rope_rows(cos, sin, [spec], cache, rows)
        q = backend.append_rotated(qkv[:rows].clone(), spec, *next(iter(rotations)), cache, 0)
        written = slice(context, context + rows)
        return host(q, cache.k[0, :, written].transpose(0, 1), cache.v[0, :, written].transpose(0, 1))

    def attention(rows: int) -> Tensor:
        append(MAX_WINDOW)  # what the window attends to is the same for every number of rows
        q = attended[:rows].view(rows, c.num_heads, c.head_dim).clone()
        return host(backend.attention(q, spec, cache, 0))

    found: dict[str, Callable[[int], Tensor]] = {
        "embed": lambda rows: host(backend.embed(table, ids[:rows])),
        "quantize": lambda rows: dequantized(backend.quantize(hidden[:rows], quant)),
        "rms_norm": lambda rows: normed(rows, False, False),
        "add_rms_norm": lambda rows: normed(rows, True, False),
        "add_rms_norm_quantize": lambda rows: normed(rows, True, True),
        "swiglu": lambda rows: host(backend.swiglu(gate_up[:rows].clone(), None)),
        "swiglu_quantize": lambda rows: dequantized(backend.swiglu(gate_up[:rows].clone(), quant)),
        "append_rotated": append,
        f"attention behind {context}": attention,
    }
    return found | _linears(backend, inputs, host)


def _linears(backend: Backend, inputs: _Inputs, host: Callable[[Tensor], Tensor]) -> dict[str, Callable[[int], Tensor]]:
    reference = ReferenceBackend(dtype=inputs.hidden.dtype)
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
            return host(backend.linear(x[:rows], packed, bias))

        def int8(rows: int, x: Quantized = x8, packed: object = packed8, bias: Tensor = bias) -> Tensor:
            return host(backend.int8_linear(Quantized(x.values[:rows], x.scale[:rows]), packed, bias.float()))

        found |= {f"linear {name}": full, f"int8_linear {name}": int8}
    return found


def operator_errors(backend: Backend, config: ModelConfig, context: int) -> Iterator[OperatorError]:
    """Every operator at the sizes of `config`, the window `context` positions behind the start."""
    inputs = _inputs(config, backend.dtype, context)
    expected = operators(ReferenceBackend(dtype=backend.dtype), config, context, inputs)
    for name, run in operators(backend, config, context, inputs).items():
        whole, right = run(MAX_WINDOW), expected[name](MAX_WINDOW)
        invariant = all(torch.equal(run(rows), whole[:rows]) for rows in range(1, MAX_WINDOW))
        yield OperatorError(name, ((whole - right).abs().max() / right.abs().max()).item(), invariant)
