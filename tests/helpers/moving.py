"""A decoder with the same weights on another backend."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from quasar.backends.base import Backend, Quantized
from quasar.backends.reference import ReferenceBackend
from quasar.checkpoints.weights import FullWeights, Int8Weights
from quasar.models.decoder import Decoder, DecoderLayer
from quasar.models.linear import FullLinear, Linear, W8A8Linear
from quasar.models.linear_int4 import W4A16Linear


class PlainInt4(ReferenceBackend):
    """The reference, but int4 weights stay as they were given and meet inputs in float64 (PyTorch's kernel takes
    bfloat16 and gives it)."""

    def int4_weight(self, values: Tensor, scale: Tensor, offset: Tensor | None = None) -> tuple[Tensor, ...]:
        return (values, scale) if offset is None else (values, scale, offset)

    def int4_linear(self, x: Tensor | Quantized, weight: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
        values, *grids = weight
        scale, *offset = (grid.double().repeat_interleave(values.shape[1] // grid.shape[1], 1) for grid in grids)
        dense = values.double() * scale + (offset[0] if offset else 0)
        y = x.values.double() @ dense.t() * x.scale[:, None] if isinstance(x, Quantized) else x.double() @ dense.t()
        return (y if bias is None else y + bias).to(self.dtype)


def moved(decoder: Decoder, backend: Backend) -> Decoder:
    """`decoder` of the reference backend, which keeps weights as checkpoints have them, on `backend`.

    int4 weights need a backend of class PlainInt4, which keeps those too.
    """

    def place(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(backend.device, backend.dtype)

    def linear(old: Linear) -> Linear:
        if isinstance(old, FullLinear):  # the reference packs nothing
            return FullLinear(backend, FullWeights(old.packed, old.bias, old.hadamard))
        if isinstance(old, W4A16Linear):
            return type(old)(backend, backend.int4_weight(*old.packed), old.nbytes, old.bias, place(old.hadamard))
        return W8A8Linear(backend, Int8Weights(*old.packed, old.bias, old.static_scale, wide=old.wide))

    layers = [
        DecoderLayer(
            layer.index,
            replace(layer.attention, q_norm=place(layer.attention.q_norm), k_norm=place(layer.attention.k_norm)),
            layer.eps,
            backend,
            input_norm=place(layer.input_norm),
            qkv=linear(layer.qkv),
            o=linear(layer.o),
            post_norm=place(layer.post_norm),
            gate_up=linear(layer.gate_up),
            down=linear(layer.down),
        )
        for layer in decoder.layers
    ]
    return Decoder(
        decoder.config,
        backend,
        embedding=backend.place(decoder.embedding),
        layers=layers,
        norm=place(decoder.norm),
        lm_head=linear(decoder.lm_head),
    )


def make_static(decoder: Decoder, ids: list[int]) -> None:
    """Gives every W8A8 layer the largest scale that one of these tokens had."""
    scales: dict[Linear, Tensor] = {}

    def observe(module: Linear, args: tuple) -> None:
        scale = args[0].scale if isinstance(args[0], Quantized) else args[0].abs().amax(-1) / 127
        scales[module] = scale.amax(0, keepdim=True)

    hooks = [m.register_forward_pre_hook(observe) for m in decoder.linears() if isinstance(m, W8A8Linear)]
    decoder.read(ids, logits_to_keep=0)
    for hook in hooks:
        hook.remove()
    for layer in decoder.layers:
        for name in ("qkv", "o", "gate_up", "down"):
            old = getattr(layer, name)
            setattr(layer, name, W8A8Linear(decoder.backend, Int8Weights(*old.packed, old.bias, scales[old].float())))
