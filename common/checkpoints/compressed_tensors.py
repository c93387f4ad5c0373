"""compressed-tensors, as llm-compressor writes and vLLM reads it: int-quantized W8A8, pack-quantized W8A16 and W4A16.

config.json carries `quantization_config`: groups of layers with one scheme each, and a list of layers to ignore. Each
int8 projection has `weight` int8 [out, in] and `weight_scale` [out, 1]; static activations add `input_scale` [1], and
`input_zero_point` [1] where they are asymmetric. An int4 projection has `weight_packed` int32 [out, in / 8], eight
values + 8 in a word, lowest bits first, `weight_scale` [out, in / group], `weight_shape`, and where it is asymmetric
`weight_zero_point` int32 [out / 8, in / group], packed along the outputs. W8A16 has `weight_packed` int32
[out, in / 4] of values + 128, `weight_scale` [out, 1] and `weight_shape`. A group may name a format of its own; then
the checkpoint's is mixed-precision. Where the compressed-tensors package is installed, its own QuantizationConfig has
to accept what is read and written here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import regex  # re has no time limit, and the patterns come with the checkpoint
import torch
from torch import Tensor

from quasar.checkpoints.folder import SafetensorsFolder
from quasar.checkpoints.weights import INT4_GROUPS, FullWeights, Int4Weights, Int8Weights, LinearWeights
from quasar.errors import QuasarError

_INT8, _INT4 = "int-quantized", "pack-quantized"
_MIXED = "mixed-precision"
_FORMATS = (_INT8, "naive-quantized", _INT4)  # the second is the name of the first in early releases
_PER_WORD = 8  # int4 values in an int32
_BYTES = 4  # int8 values in an int32
_PATTERN_SECONDS = 0.1
_ANY_LINEAR = "Linear"
# Projections by the linear layer they are fused into, and by the fused layer's own name in vLLM.
_PROJECTIONS = {
    "qkv": r"re:.*\.(q|k|v|qkv)_proj$",
    "o": r"re:.*\.o_proj$",
    "gate_up": r"re:.*\.(gate|up|gate_up)_proj$",
    "down": r"re:.*\.down_proj$",
    "lm_head": "lm_head",
}


class CompressedTensorsFolder(SafetensorsFolder):
    """A compressed-tensors checkpoint whose quantised layers are W8A8, W8A16 or W4A16."""

    format = "compressed-tensors"
    is_quantized = True

    def __init__(self, folder: Path, quantization: dict[str, Any]) -> None:
        super().__init__(folder)
        self._where = folder / "config.json"
        self._groups = _Groups(self._where, quantization)

    def linear(self, name: str, out: int, inputs: int, bias: bool) -> LinearWeights:
        scheme = self._groups.scheme(name)
        if scheme is None:
            return self._full(name, out, inputs, bias)
        if scheme.group:
            return self._packed(name, out, inputs, bias, scheme)
        if scheme.wide:
            return self._wide(name, out, inputs, bias)
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

    def _packed(self, name: str, out: int, inputs: int, bias: bool, scheme: _Scheme) -> Int4Weights:
        if inputs % scheme.group or scheme.group % _PER_WORD:
            raise QuasarError(f"{self._where}: groups of {scheme.group} do not divide the {inputs} inputs of {name}")
        groups = inputs // scheme.group
        if f"{name}.weight_g_idx" in self:
            raise QuasarError(f"{self.folder}: {name}.weight_g_idx reorders inputs; Quasar reads groups of neighbours")
        self.skip(f"{name}.weight_shape")
        values = unpack(self._words(f"{name}.weight_packed", out, inputs // _PER_WORD), 4)
        scale = self._scale(f"{name}.weight_scale", (out, groups)).view(out, groups)
        offset = None
        if not scheme.symmetric:
            zero = unpack(self._words(f"{name}.weight_zero_point", -(-out // _PER_WORD), groups).t(), 4)
            offset = (-zero.t()[:out].float() * scale).bfloat16()
        own = self.get(f"{name}.bias", (out,)) if bias else None
        return Int4Weights(values, scale.bfloat16(), offset, own)

    def _wide(self, name: str, out: int, inputs: int, bias: bool) -> Int8Weights:
        if inputs % _BYTES:
            raise QuasarError(f"{self._where}: the {inputs} inputs of {name} do not fill words of {_BYTES}")
        self.skip(f"{name}.weight_shape")
        words = self._words(f"{name}.weight_packed", out, inputs // _BYTES)
        scale = self._scale(f"{name}.weight_scale", (out, 1), (out,)).contiguous()
        own = self.get(f"{name}.bias", (out,)) if bias else None
        return Int8Weights(unpack(words, 8), scale, own, wide=True)

    def _words(self, name: str, *shape: int) -> Tensor:
        words = self.read(name, shape)
        if words.dtype != torch.int32:
            raise QuasarError(f"{self.files[name]}: tensor {name} is {str(words.dtype)[6:]}; packed values are int32")
        return words

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
    """How one group of layers is quantised; QuasarError unless it is W8A8, W8A16 or W4A16. group: inputs that share a
    scale, 0 for int8. wide: W8A16."""

    def __init__(self, where: str, group: dict[str, Any], layout: str) -> None:
        weights, inputs = group.get("weights"), group.get("input_activations")
        self.group = 0
        self.wide = False
        if layout == _INT4:
            self._read_packed(where, weights, inputs)
            return
        _integers(where, "weights", weights)
        if weights.get("strategy") not in ("channel", "tensor") or not weights.get("symmetric", True):
            raise QuasarError(f"{where}: weights should be symmetric, by channel or tensor; Quasar runs W8A8")
        if inputs is None:
            raise QuasarError(f"{where}: weights only are quantised (W8A16), which has the format {_INT4}")
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

    def _read_packed(self, where: str, weights: Any, inputs: Any) -> None:
        if isinstance(weights, dict) and weights.get("num_bits") == 8:
            _integers(where, "weights", weights)
            if weights.get("strategy") != "channel" or not weights.get("symmetric", True) or inputs is not None:
                raise QuasarError(f"{where}: packed int8 weights should be symmetric, by channel, under 16-bit inputs")
            self.wide = True
            return
        _integers(where, "weights", weights, 4)
        size = weights.get("group_size")
        if weights.get("strategy") != "group" or size not in INT4_GROUPS:
            sizes = ", ".join(map(str, sorted(INT4_GROUPS)))
            raise QuasarError(
                f"{where}: int4 weights should be in groups of {sizes}; not by {weights.get('strategy')} of {size!r}"
            )
        if inputs is not None or weights.get("actorder") == "group":
            raise QuasarError(f"{where}: int4 weights run under 16-bit activations, in groups of neighbouring inputs")
        self.group, self.symmetric = size, bool(weights.get("symmetric", True))


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, words] -> int8 [rows, 32 / bits * words]: what `pack` packed, and what filled the last word up."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values = (words[:, :, None] >> shifts) & (1 << bits) - 1
    return values.sub(1 << bits - 1).to(torch.int8).flatten(1)


def pack(values: Tensor, bits: int) -> Tensor:
    """int8 [rows, n] of so many bits -> int32 [rows, ceil(n * bits / 32)] of values + 2^(bits - 1), the first in the
    lowest bits, filled up with zero bits."""
    rows, n = values.shape
    per_word = 32 // bits
    unsigned = torch.zeros(rows, -(-n // per_word) * per_word, dtype=torch.int64)
    unsigned[:, :n] = values.long() + (1 << bits - 1)
    words = (unsigned.view(rows, -1, per_word) << torch.arange(0, 32, bits)).sum(dim=-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _integers(where: str, what: str, fields: Any, bits: int = 8) -> None:
    if not isinstance(fields, dict) or fields.get("num_bits") != bits or fields.get("type", "int") != "int":
        described = fields if not isinstance(fields, dict) else f"{fields.get('type', 'int')}{fields.get('num_bits')}"
        raise QuasarError(
            f"{where}: {what} are {described}; Quasar runs W8A8 (int-quantized), W8A16 and W4A16 (pack-quantized)"
        )


class _Groups:
    """Which scheme a layer has."""

    def __init__(self, where: Path, fields: dict[str, Any]) -> None:
        self._where = where
        layout = fields.get("format")
        if layout not in (*_FORMATS, _MIXED):
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
            of = f"{where}: config group {name}"
            own = group.get("format") or layout
            if own not in _FORMATS:
                raise QuasarError(f"{of}: format {own!r} is not supported; Quasar reads {' and '.join(_FORMATS)}")
            self._schemes.append((targets, _Scheme(of, group, own)))

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
    """What a checkpoint of this format is made of."""

    format = "compressed-tensors"
    whole_zero_points = True
    shard = "model-{:05d}-of-{:05d}.safetensors"
    index = "model.safetensors.index.json"

    def __init__(
        self,
        scheme: str,
        quantized_lm_head: bool,
        group: int = 128,
        symmetric: bool = True,
        wide: Sequence[str] = (),
    ) -> None:
        """group and symmetric: of the int4 weights of w4a16. wide: linear layers of w8a8 that are W8A16."""
        self._scheme = scheme
        self._lm_head = quantized_lm_head
        self._group = group
        self._symmetric = symmetric
        self._wide = wide

    def linear(self, name: str, weights: LinearWeights, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of one projection; dtype is the checkpoint's. Raises QuasarError for zero points that are not
        whole numbers."""
        tensors = {} if weights.bias is None else {f"{name}.bias": weights.bias.to(dtype)}
        if isinstance(weights, FullWeights):
            return tensors | {f"{name}.weight": weights.weight.to(dtype)}
        if isinstance(weights, Int4Weights):
            return tensors | self._int4(name, weights)
        if weights.wide:
            return tensors | {
                f"{name}.weight_packed": pack(weights.values, 8),
                f"{name}.weight_scale": weights.scale[:, None],
                f"{name}.weight_shape": torch.tensor(weights.values.shape),
            }
        tensors |= {f"{name}.weight": weights.values, f"{name}.weight_scale": weights.scale[:, None]}
        if weights.static_scale is not None:
            tensors[f"{name}.input_scale"] = weights.static_scale
        return tensors

    def _int4(self, name: str, weights: Int4Weights) -> dict[str, Tensor]:
        if weights.hadamard is not None:
            raise QuasarError(f"{name} rotates its input while running, which {self.format} cannot say")
        tensors = {
            f"{name}.weight_packed": pack(weights.values, 4),
            f"{name}.weight_scale": weights.scale,
            f"{name}.weight_shape": torch.tensor(weights.values.shape),
        }
        if weights.offset is not None:
            zero = -weights.offset.float() / weights.scale.float()
            whole = zero.round()
            if not bool(((zero - whole).abs() < 0.1).all()):
                raise QuasarError(f"{name} has zero points that are no whole numbers, which {self.format} cannot say")
            tensors[f"{name}.weight_zero_point"] = pack(whole.to(torch.int8).t(), 4).t()
        return tensors

    def config(self, ignore: list[str]) -> dict[str, Any]:
        """`quantization_config`, every field as the package's classes write it; ignore: layers in full precision."""
        shared = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "actorder": None}
        weights, inputs = shared | {"strategy": "channel", "dynamic": False}, None
        if self._scheme == "w8a8-static":
            inputs = shared | {"strategy": "tensor", "dynamic": False}
        elif self._scheme == "w8a8":
            inputs = shared | {"strategy": "token", "dynamic": True}
        else:
            weights |= {
                "num_bits": 4,
                "strategy": "group",
                "group_size": self._group,
                "symmetric": self._symmetric,
            }
        wide_names = [name for name in self._wide if name != "lm_head" or self._lm_head]
        named_head = self._lm_head and "lm_head" not in wide_names  # vLLM's is not of a class called Linear
        group = {
            "targets": [_ANY_LINEAR, *(["lm_head"] if named_head else [])],
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
        }
        layout = _INT4 if self._scheme == "w4a16" else _INT8
        groups = {"group_0": group}
        if wide_names:
            wide = {"targets": [_PROJECTIONS[name] for name in wide_names], "input_activations": None, "format": _INT4}
            groups = {"group_0": group | {"format": layout}, "group_1": group | wide}
            layout = _MIXED
        return {
            "quant_method": "compressed-tensors",
            "format": layout,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": ignore + ([] if self._lm_head else ["lm_head"]),
            "kv_cache_scheme": None,
        }

    def finish(self, folder: Path, config: dict[str, Any], tensors: dict[str, str]) -> None:
        """Completes config.json's fields; tensors maps names to shards. Whole projections that stayed in full precision
        are named in the ignore list, which vLLM honours."""
        layers = [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]
        ignore = sorted(layer for layer in layers if f"{layer}.weight_scale" not in tensors)
        config["quantization_config"] = self.config(ignore)
        check_with_package(folder / "config.json", config["quantization_config"])
