"""The Ascend format, as msModelSlim writes and vLLM-Ascend and MindIE read it.

`quant_model_description.json` maps every tensor to FLOAT, W8A8 (static), W8A8_DYNAMIC, W8A8_MIX, W8A16 or W4A16;
`quant_model_weight_*.safetensors` hold them. A projection has

    W8A8_DYNAMIC  weight int8 [n, k], weight_scale and weight_offset [n, 1], bias [n] if it has one
    W8A8          weight, input_scale and input_offset [1], deq_scale [n], quant_bias int32 [n]: y = deq_scale *
                  (x8 W^T + quant_bias), where quant_bias holds the layer's bias and takes the offset's share off
    W8A8_MIX      both: dynamic for prefill and static for decoding on a separate decoding server; elsewhere, and
                  here, dynamic throughout
    W8A16         the tensors of W8A8_DYNAMIC, under 16-bit inputs
    W4A16         weight_scale and weight_offset [n, k / group]: a weight is (value - offset) * scale. Two values are
                  one int8 of weight, the first in the lower four bits: neighbouring outputs in [n / 2, k], or, where
                  one scale holds for all inputs, neighbouring inputs in [n, k / 2]. Before version 1.0.0 weight is
                  [n, k], one value each

deq_scale is float32, or, where the model is not bfloat16, int64 that holds a float32's bits. Smoothing that shifts
channels (anti_method m4) leaves `*_layernorm.bias`, which is added to a norm's output, and biases on projections that
the architecture gives none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quasar.checkpoints.folder import SafetensorsFolder, read_json
from quasar.checkpoints.weights import INT4_GROUPS, FullWeights, Int4Weights, Int8Weights, LinearWeights
from quasar.errors import QuasarError

_DESCRIPTION = "quant_model_description.json"
_TYPES = ("FLOAT", "W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "W8A16", "W4A16")
# Projections by the linear layer they are fused into.
_PROJECTIONS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
    "lm_head": ("lm_head",),
}
_STATIC_ONLY = ("input_scale", "input_offset", "deq_scale", "quant_bias")


def find_description(folder: Path) -> Path | None:
    """The description that makes a folder an Ascend checkpoint; older tools put the type into its name."""
    found = sorted(folder.glob(f"{Path(_DESCRIPTION).stem}*.json"))
    if len(found) > 1:
        raise QuasarError(f"{folder}: holds {len(found)} files {Path(_DESCRIPTION).stem}*.json; there should be one")
    return found[0] if found else None


class AscendFolder(SafetensorsFolder):
    """A checkpoint of msModelSlim, or of Quasar in the same format."""

    format = "ascend"
    is_quantized = True

    def __init__(self, folder: Path, description: Path) -> None:
        self.index = _only(folder, "*.safetensors.index.json", "one index or none") or SafetensorsFolder.index
        if not (folder / self.index).exists():
            self.single = _only(folder, "*.safetensors", "one file, or an index") or SafetensorsFolder.single
        super().__init__(folder)
        self._description, self._types = description, read_json(description)

    def linear(self, name: str, out: int, inputs: int, bias: bool) -> LinearWeights:
        kind = self._types.get(f"{name}.weight")
        if kind not in _TYPES:
            said = "is not described" if kind is None else f"is {kind!r}"
            raise QuasarError(f"{self._description}: {name}.weight {said}; Quasar runs {', '.join(_TYPES)}")
        bias = bias or f"{name}.bias" in self
        if kind == "FLOAT":
            return self._full(name, out, inputs, bias)
        if kind == "W4A16":
            return self._int4(name, out, inputs, bias)
        values = self._int8(name, out, inputs)
        self._zeros(f"{name}.weight_offset", (out, 1), (out,))
        if kind == "W8A8":
            self.skip(f"{name}.bias", f"{name}.weight_scale")
            return self._static(name, values)
        self.skip(*(f"{name}.{part}" for part in _STATIC_ONLY))
        scale = self._scale(f"{name}.weight_scale", (out, 1), (out,)).contiguous()
        own = self.get(f"{name}.bias", (out,)) if bias else None
        return Int8Weights(values, scale, own, wide=kind == "W8A16")

    def _int4(self, name: str, out: int, inputs: int, bias: bool) -> Int4Weights:
        stored = self.read(f"{name}.weight", (out // 2, inputs), (out, inputs // 2), (out, inputs))
        file = self.files[f"{name}.weight"]
        if stored.dtype != torch.int8:
            raise QuasarError(f"{file}: tensor {name}.weight is {str(stored.dtype)[6:]}; W4A16 is stored in int8")
        values = stored
        if stored.shape == (out // 2, inputs):
            values = _unpacked(stored.t()).t()
        elif stored.shape == (out, inputs // 2):
            values = _unpacked(stored)
        elif bool(((stored < -8) | (stored > 7)).any()):
            raise QuasarError(f"{file}: tensor {name}.weight holds values that are no int4, between -8 and 7")
        if values.shape != (out, inputs):
            raise QuasarError(f"{file}: {name}.weight has two values in a byte, of {out} outputs and {inputs} inputs")
        shapes = [(out, groups) for groups in range(1, inputs // INT4_GROUPS[-1] + 1) if inputs % groups == 0]
        scale = self._scale(f"{name}.weight_scale", *shapes).view(out, -1)
        zero = self.get(f"{name}.weight_offset", tuple(scale.shape)).float()
        offset = (-zero * scale).bfloat16()
        if not bool(offset.isfinite().all()):
            raise QuasarError(f"{self.files[f'{name}.weight_offset']}: tensor {name}.weight_offset is not finite")
        size = inputs // scale.shape[1]
        group = next((group for group in INT4_GROUPS if size % group == 0), None)
        if group is None:
            raise QuasarError(
                f"{file}: {name} has int4 weights in groups of {size} inputs; Quasar runs multiples of 32"
            )
        scale, offset = (part.repeat_interleave(size // group, dim=1) for part in (scale.bfloat16(), offset))
        own = self.get(f"{name}.bias", (out,)) if bias else None
        return Int4Weights(values.contiguous(), scale, offset if bool((zero != 0).any()) else None, own)

    def _static(self, name: str, values: Tensor) -> Int8Weights:
        out = len(values)
        deq_scale = self._deq_scale(f"{name}.deq_scale", out)
        input_scale = self._scale(f"{name}.input_scale", (1,), ())
        quant_bias = self.read(f"{name}.quant_bias", (out,))
        offset = float(self.read(f"{name}.input_offset", (1,), ()).flatten()[0])
        if quant_bias.dtype != torch.int32 or not -128 <= offset <= 127 or offset % 1:
            raise QuasarError(
                f"{self.files[f'{name}.quant_bias']}: {name} has quant_bias {str(quant_bias.dtype)[6:]} and "
                f"input_offset {offset:g}; int32 and a whole number from -128 to 127 are expected"
            )
        bias = (quant_bias.double() * deq_scale.double()).float()
        return Int8Weights(values, deq_scale / input_scale, bias, input_scale, offset)

    def _deq_scale(self, name: str, out: int) -> Tensor:
        raw = self.read(name, (out,), (out, 1))
        if raw.dtype != torch.int64:
            return self._scale(name, (out,), (out, 1))
        scale = raw.flatten().to(torch.int32).view(torch.float32)
        if bool((raw.flatten() >> 31 != 0).any()) or not bool((scale.isfinite() & (scale > 0)).all()):
            raise QuasarError(f"{self.files[name]}: tensor {name} holds no float32 scales above zero in its int64")
        return scale

    def norm_bias(self, name: str, size: int) -> Tensor | None:
        if f"{name}.bias" not in self:
            return None
        bias = self.get(f"{name}.bias", (size,)).float()
        if not bool(bias.isfinite().all()):
            raise QuasarError(f"{self.files[f'{name}.bias']}: tensor {name}.bias is not finite")
        return bias if bool((bias != 0).any()) else None


def _unpacked(pairs: Tensor) -> Tensor:
    """int8 [rows, n] of two int4 each -> int8 [rows, 2 n], the lower four bits first."""
    return torch.stack([(pairs << 4) >> 4, pairs >> 4], dim=-1).flatten(1)


def _packed(values: Tensor) -> Tensor:
    """int8 [rows, n] between -8 and 7 -> int8 [rows, n / 2]."""
    return values[:, ::2] & 15 | values[:, 1::2] << 4


def _only(folder: Path, pattern: str, expected: str) -> str | None:
    found = sorted(path.name for path in folder.glob(pattern))
    if len(found) > 1:
        raise QuasarError(f"{folder}: holds {', '.join(found[:3])}; {expected} is expected")
    return found[0] if found else None


class AscendWriter:
    """What a quantised checkpoint of this format is made of."""

    format = "ascend"
    whole_zero_points = False

    def __init__(
        self,
        scheme: str,
        quantized_lm_head: bool,
        group: int = INT4_GROUPS[0],
        symmetric: bool = True,
        wide: Sequence[str] = (),
    ) -> None:
        """group: of the int4 weights of w4a16. wide: linear layers that are W8A16."""
        self._wide = {projection for name in wide for projection in _PROJECTIONS[name]}
        self._kind = {"w8a8": "W8A8_DYNAMIC", "w8a8-static": "W8A8", "w4a16": "W4A16"}[scheme]
        self._group = group if scheme == "w4a16" else None
        stem = f"quant_model_weight_{self._kind.lower()}"
        self.shard = stem + "-{:05d}-of-{:05d}.safetensors"
        self.index = stem + ".safetensors.index.json"

    def linear(self, name: str, weights: LinearWeights, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of one projection; dtype is the checkpoint's."""
        tensors = {} if weights.bias is None else {f"{name}.bias": weights.bias.to(dtype)}
        if isinstance(weights, FullWeights):
            return tensors | {f"{name}.weight": weights.weight.to(dtype)}
        if isinstance(weights, Int4Weights):
            return tensors | self._int4(name, weights)
        scale = weights.scale[:, None]
        tensors |= {
            f"{name}.weight": weights.values,
            f"{name}.weight_scale": scale,
            f"{name}.weight_offset": torch.zeros_like(scale),
        }
        if weights.static_scale is not None:
            deq_scale = weights.scale * weights.static_scale
            bias = torch.zeros_like(deq_scale) if weights.bias is None else weights.bias.float()
            limit = torch.iinfo(torch.int32)
            quant_bias = (bias.double() / deq_scale.double()).round().clamp(limit.min, limit.max)
            tensors |= {
                f"{name}.input_scale": weights.static_scale,
                f"{name}.input_offset": torch.zeros_like(weights.static_scale),
                f"{name}.deq_scale": deq_scale if dtype == torch.bfloat16 else deq_scale.view(torch.int32).long(),
                f"{name}.quant_bias": quant_bias.to(torch.int32),
            }
        return tensors

    def _int4(self, name: str, weights: Int4Weights) -> dict[str, Tensor]:
        if weights.hadamard is not None:
            raise QuasarError(f"{name} rotates its input while running, which {self.format} cannot say")
        scale, values = weights.scale.float(), weights.values
        zero = torch.zeros_like(scale) if weights.offset is None else -weights.offset.float() / scale
        return {
            f"{name}.weight": _packed(values) if scale.shape[1] == 1 else _packed(values.t()).t().contiguous(),
            f"{name}.weight_scale": scale,
            f"{name}.weight_offset": zero,
        }

    def finish(self, folder: Path, config: dict[str, Any], tensors: dict[str, str]) -> None:
        """Writes the description; tensors maps names to shards."""
        quantized = {name.removesuffix(".weight_offset") for name in tensors if name.endswith(".weight_offset")}

        def kind(name: str) -> str:
            layer, _, part = name.rpartition(".")
            if layer not in quantized or part == "bias":
                return "FLOAT"
            return "W8A16" if layer.rpartition(".")[2] in self._wide else self._kind

        types = {name: kind(name) for name in tensors}
        if config.get("tie_word_embeddings"):
            types["lm_head.weight"] = "FLOAT"  # vLLM-Ascend asks for it although no tensor has the name
        group = {} if self._group is None else {"group_size": self._group}
        description = {"version": "1.0.0", "model_quant_type": self._kind} | group | types
        (folder / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
