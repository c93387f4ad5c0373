"""compressed-tensors, as llm-compressor writes and vLLM reads it: int-quantized W8A8.

config.json carries `quantization_config`: groups of layers with one scheme each, and a list of layers to ignore. Each
int8 projection has `weight` int8 [out, in] and `weight_scale` [out, 1]; static activations add `input_scale` [1], and
`input_zero_point` [1] where they are asymmetric. Where the compressed-tensors package is installed, its own
QuantizationConfig has to accept what is read and written here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import regex  # re has no time limit, and the patterns come with the checkpoint
import torch
from torch import Tensor

from quasar.checkpoints.folder import SafetensorsFolder
from quasar.checkpoints.weights import FullWeights, Int8Weights, LinearWeights
from quasar.errors import QuasarError

_FORMATS = ("int-quantized", "naive-quantized")  # the second is the name of the same layout in early releases
_PATTERN_SECONDS = 0.1
_ANY_LINEAR = "Linear"


class CompressedTensorsFolder(SafetensorsFolder):
    """A compressed-tensors checkpoint whose quantised layers are W8A8."""

    format = "compressed-tensors"

    def __init__(self, folder: Path, quantization: dict[str, Any]) -> None:
        super().__init__(folder)
        self._where = folder / "config.json"
        self._groups = _Groups(self._where, quantization)

    def linear(self, name: str, out: int, inputs: int, bias: bool) -> LinearWeights:
        scheme = self._groups.scheme(name)
        if scheme is None:
            return self._full(name, out, inputs, bias)
        values = self._int8(name, out, inputs)
        per_tensor = ((1,), (), (1, 1))
        scale = self._scale(f"{name}.weight_scale", *(((out, 1), (out,)) if scheme.per_channel else per_tensor))
        scale = scale.expand(out).contiguous()
        self._zeros(f"{name}.weight_zero_point", (out, 1), (out,), *per_tensor)
        own = self.get(f"{name}.bias", (out,)) if bias else None
        if not scheme.static:
            return Int8Weights(values, scale, own)
        static = self._scale(f"{name}.input_scale", *per_tensor)
        offset = self._offset(f"{name}.input_zero_point", scheme.asymmetric, *per_tensor)
        if offset:
            moved = values.sum(dim=1, dtype=torch.int64).double() * (offset * static * scale)
            own = (-moved if own is None else own.double() - moved).float()
        return Int8Weights(values, scale, own, static, offset)

    def _offset(self, name: str, asymmetric: bool, *shapes: tuple[int, ...]) -> float:
        if not asymmetric and name not in self:
            return 0.0
        offset = float(self.read(name, *shapes).flatten()[0])
        if not -128 <= offset <= 127 or (offset and not asymmetric):
            raise QuasarError(
                f"{self.files[name]}: tensor {name} is {offset:g}; an int8 zero point lies between -128 and 127, and "
                "symmetric activations have none"
            )
        return offset


class _Scheme:
    """How one group of layers is quantised; QuasarError unless it is W8A8."""

    def __init__(self, where: str, group: dict[str, Any]) -> None:
        weights, inputs = group.get("weights"), group.get("input_activations")
        _integers(where, "weights", weights)
        if weights.get("strategy") not in ("channel", "tensor") or not weights.get("symmetric", True):
            raise QuasarError(f"{where}: weights should be symmetric, by channel or tensor; Quasar runs W8A8")
        if inputs is None:
            raise QuasarError(f"{where}: weights only are quantised (W8A16); Quasar runs W8A8, with int8 activations")
        _integers(where, "input_activations", inputs)
        if group.get("output_activations") is not None:
            raise QuasarError(f"{where}: output_activations are not supported; they should be null")
        self.per_channel = weights["strategy"] == "channel"
        self.static = not inputs.get("dynamic", False)
        self.asymmetric = not inputs.get("symmetric", True)
        strategy = inputs.get("strategy")
        if strategy != ("tensor" if self.static else "token") or (self.asymmetric and not self.static):
            raise QuasarError(
                f"{where}: input_activations should be dynamic, symmetric, by token, or static by tensor; not "
                f"dynamic {inputs.get('dynamic', False)}, symmetric {not self.asymmetric}, by {strategy}"
            )


def _integers(where: str, what: str, fields: Any) -> None:
    if not isinstance(fields, dict) or fields.get("num_bits") != 8 or fields.get("type", "int") != "int":
        described = fields if not isinstance(fields, dict) else f"{fields.get('type', 'int')}{fields.get('num_bits')}"
        raise QuasarError(f"{where}: {what} are {described}; Quasar runs W8A8, where they are int8")


class _Groups:
    """Which scheme a layer has."""

    def __init__(self, where: Path, fields: dict[str, Any]) -> None:
        self._where = where
        layout = fields.get("format")
        if layout not in _FORMATS:
            raise QuasarError(f"{where}: format {layout!r} is not supported; Quasar reads {' and '.join(_FORMATS)}")
        for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            if fields.get(name):
                raise QuasarError(f"{where}: {name} is not supported; it should be absent or null")
        groups = fields.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise QuasarError(f"{where}: quantization_config has no config_groups")
        check_with_package(where, fields)
        self._ignore = self._names("ignore", fields.get("ignore") or [])
        self._schemes = []
        for name, group in groups.items():
            if not isinstance(group, dict):
                raise QuasarError(f"{where}: config group {name} should be an object")
            targets = self._names(f"targets of {name}", group.get("targets") or [])
            self._schemes.append((targets, _Scheme(f"{where}: config group {name}", group)))

    def scheme(self, layer: str) -> _Scheme | None:
        """None for a layer that stays in full precision."""
        if any(self._matches(target, layer) for target in self._ignore):
            return None
        # A layer's own name or pattern goes before its class.
        for named in (True, False):
            for targets, scheme in self._schemes:
                if any((t != _ANY_LINEAR) == named and self._matches(t, layer) for t in targets):
                    return scheme
        return None

    def _names(self, what: str, names: Any) -> list[str]:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise QuasarError(f"{self._where}: {what} should be a list of layer names, patterns (re:...) or classes")
        return names

    def _matches(self, target: str, layer: str) -> bool:
        if not target.startswith("re:"):
            return target in (layer, _ANY_LINEAR)
        try:
            return regex.match(target[3:], layer, timeout=_PATTERN_SECONDS) is not None
        except TimeoutError:
            raise QuasarError(f"{self._where}: pattern {target!r} takes too long to match; simplify it") from None
        except (regex.error, RecursionError, OverflowError) as error:
            raise QuasarError(f"{self._where}: pattern {target!r} is not a regular expression ({error})") from None


def check_with_package(where: Path, fields: dict[str, Any]) -> None:
    """Has the package's own class read the fields, if the package is installed. QuasarError if it refuses them."""
    if importlib.util.find_spec("compressed_tensors") is None:
        return
    from compressed_tensors.quantization import QuantizationConfig

    try:
        QuantizationConfig.model_validate(fields)
    except ValueError as error:  # pydantic's errors are ValueErrors
        reason = " ".join(str(error).split())
        raise QuasarError(f"{where}: the compressed-tensors package refuses quantization_config ({reason})") from None


class CompressedTensorsWriter:
    """What a W8A8 checkpoint of this format is made of."""

    format = "compressed-tensors"
    shard = "model-{:05d}-of-{:05d}.safetensors"
    index = "model.safetensors.index.json"

    def __init__(self, static: bool, quantized_lm_head: bool) -> None:
        self._static, self._lm_head = static, quantized_lm_head

    def linear(self, name: str, weights: LinearWeights, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of one projection; dtype is the checkpoint's."""
        tensors = {} if weights.bias is None else {f"{name}.bias": weights.bias.to(dtype)}
        if isinstance(weights, FullWeights):
            return tensors | {f"{name}.weight": weights.weight}
        tensors |= {f"{name}.weight": weights.values, f"{name}.weight_scale": weights.scale[:, None]}
        if weights.static_scale is not None:
            tensors[f"{name}.input_scale"] = weights.static_scale
        return tensors

    def config(self) -> dict[str, Any]:
        """`quantization_config`, every field as the package's classes write it."""
        shared = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "actorder": None}
        inputs = {"strategy": "tensor", "dynamic": False} if self._static else {"strategy": "token", "dynamic": True}
        group = {
            # vLLM's lm_head is not of a class called Linear, so it is named.
            "targets": [_ANY_LINEAR, *(["lm_head"] if self._lm_head else [])],
            "weights": shared | {"strategy": "channel", "dynamic": False},
            "input_activations": shared | inputs,
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": _FORMATS[0],
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": [] if self._lm_head else ["lm_head"],
            "kv_cache_scheme": None,
        }

    def finish(self, folder: Path, config: dict[str, Any], tensors: dict[str, str]) -> None:
        """Completes config.json's fields; tensors maps names to shards."""
        config["quantization_config"] = self.config()
        check_with_package(folder / "config.json", config["quantization_config"])
