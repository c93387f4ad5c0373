"""The Ascend format, as msModelSlim writes and vLLM-Ascend and MindIE read it.

`quant_model_description.json` maps every tensor to FLOAT, W8A8 (static), W8A8_DYNAMIC, W8A8_MIX or
W8A16;
`quant_model_weight_*.safetensors` hold them. A projection has

    W8A8_DYNAMIC  weight int8 [n, k], weight_scale and weight_offset [n, 1], bias [n] if it has one
    W8A8          weight, input_scale and input_offset [1], deq_scale [n], quant_bias int32 [n]: y = deq_scale *
                  (x8 W^T + quant_bias), where quant_bias holds the layer's bias and takes the offset's share off
    W8A8_MIX      both: dynamic for prefill and static for decoding on a separate decoding server; elsewhere, and
                  here, dynamic throughout
    W8A16         the tensors of W8A8_DYNAMIC, under 16-bit inputs

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
from quasar.checkpoints.weights import FullWeights, Int8Weights, LinearWeights
from quasar.errors import QuasarError

_DESCRIPTION = "quant_model_description.json"
_TYPES = ("FLOAT", "W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "W8A16")
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
        values = self._int8(name, out, inputs)
        self._zeros(f"{name}.weight_offset", (out, 1), (out,))
        if kind == "W8A8":
            self.skip(f"{name}.bias", f"{name}.weight_scale")
            return self._static(name, values)
        self.skip(*(f"{name}.{part}" for part in _STATIC_ONLY))
        scale = self._scale(f"{name}.weight_scale", (out, 1), (out,)).contiguous()
        own = self.get(f"{name}.bias", (out,)) if bias else None
        return Int8Weights(values, scale, own, wide=kind == "W8A16")

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


def _only(folder: Path, pattern: str, expected: str) -> str | None:
    found = sorted(path.name for path in folder.glob(pattern))
    if len(found) > 1:
        raise QuasarError(f"{folder}: holds {', '.join(found[:3])}; {expected} is expected")
    return found[0] if found else None


class AscendWriter:
    """What a W8A8 checkpoint of this format is made of."""

    format = "ascend"
    schemes = ("w8a8", "w8a8-static")

    def __init__(self, scheme: str, quantized_lm_head: bool, wide: Sequence[str] = ()) -> None:
        """wide: linear layers that are W8A16."""
        self._wide = {projection for name in wide for projection in _PROJECTIONS[name]}
        self._kind = "W8A8" if scheme == "w8a8-static" else "W8A8_DYNAMIC"
        stem = f"quant_model_weight_{self._kind.lower()}"
        self.shard = stem + "-{:05d}-of-{:05d}.safetensors"
        self.index = stem + ".safetensors.index.json"

    def linear(self, name: str, weights: LinearWeights, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of one projection; dtype is the checkpoint's."""
        tensors = {} if weights.bias is None else {f"{name}.bias": weights.bias.to(dtype)}
        if isinstance(weights, FullWeights):
            return tensors | {f"{name}.weight": weights.weight.to(dtype)}
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

    def finish(self, folder: Path, config: dict[str, Any], tensors: dict[str, str]) -> None:
        """Writes the description; tensors maps names to shards."""
        int8 = {name.removesuffix(".weight_offset") for name in tensors if name.endswith(".weight_offset")}

        def kind(name: str) -> str:
            layer, _, part = name.rpartition(".")
            if layer not in int8 or part == "bias":
                return "FLOAT"
            return "W8A16" if layer.rpartition(".")[2] in self._wide else self._kind

        types = {name: kind(name) for name in tensors}
        if config.get("tie_word_embeddings"):
            types["lm_head.weight"] = "FLOAT"  # vLLM-Ascend asks for it although no tensor has the name
        description = {"version": "1.0.0", "model_quant_type": self._kind} | types
        (folder / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
