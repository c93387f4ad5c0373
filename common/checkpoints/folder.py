"""A folder of safetensors: memory-mapped, every tensor checked against the configuration and accounted for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quasar.checkpoints.weights import FullWeights, LinearWeights
from quasar.errors import QuasarError

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; QuasarError if it is missing, not JSON or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QuasarError(f"{path}: no such file; a model is a Hugging Face checkpoint folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise QuasarError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise QuasarError(f"{path}: holds no JSON object")
    return value


class SafetensorsFolder:
    """One file, or shards with an index. Nothing is read before it is asked for; here everything is floating point."""

    format = "full precision"
    is_quantized = False
    single, index = "model.safetensors", "model.safetensors.index.json"

    def __init__(self, folder: Path) -> None:
        index = folder / self.index
        if index.exists():
            where = read_json(index).get("weight_map")
            # A plain name: an index must not lead out of its folder.
            if not isinstance(where, dict) or not all(isinstance(f, str) and Path(f).name == f for f in where.values()):
                raise QuasarError(f"{index}: weight_map should map tensor names to names of files beside it")
            files = {name: folder / file for name, file in where.items()}
            for file in dict.fromkeys(files.values()):
                _require(file)
        else:
            single = folder / self.single
            if not single.exists():
                raise QuasarError(
                    f"{folder}: holds no {self.single} and no {self.index}; "
                    "pickled weights are never loaded, save the model with safe serialization"
                )
            files = dict.fromkeys(_names(single), single)
        self.folder = folder
        self.files = files
        self._unused = set(files)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def get(self, name: str, *shapes: tuple[int, ...]) -> Tensor:
        """A floating-point tensor; QuasarError unless it is there, whole, and has one of these shapes."""
        tensor = self.read(name, *shapes)
        if tensor.dtype not in _FLOATS:
            raise QuasarError(
                f"{self.files[name]}: tensor {name} is {_name(tensor.dtype)}; bfloat16, float16 or float32 is expected"
            )
        return tensor

    def read(self, name: str, *shapes: tuple[int, ...]) -> Tensor:
        """A tensor of any type that has one of these shapes."""
        if name not in self.files:
            raise QuasarError(f"{self.folder}: tensor {name} is missing; config.json asks for it")
        file = self.files[name]
        self._unused.discard(name)
        # Opened for each tensor, so that the pages of a shard do not outlive their use.
        with _open(file) as tensors:
            try:
                shape = tuple(tensors.get_slice(name).get_shape())
                if shape not in shapes:
                    raise QuasarError(
                        f"{file}: tensor {name} has shape {list(shape)}; config.json makes it {list(shapes[0])}"
                    )
                return tensors.get_tensor(name)
            except SafetensorError as error:
                raise QuasarError(f"{file}: tensor {name} cannot be read ({error})") from None

    def linear(self, name: str, out: int, inputs: int, bias: bool) -> LinearWeights:
        """The projection `name`; bias says whether the architecture gives it one."""
        return self._full(name, out, inputs, bias)

    def norm_bias(self, name: str, size: int) -> Tensor | None:
        """What is added to the output of the norm `name`, float32 [size]; only smoothing tools leave such a thing."""
        return None

    def skip(self, *names: str) -> None:
        """Tensors that may be there and are not needed."""
        self._unused.difference_update(names)

    def finish(self) -> None:
        """Called when all were read; QuasarError if something is left over."""
        if self._unused:
            names = sorted(self._unused)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise QuasarError(
                f"{self.folder}: tensors that this architecture does not have: {', '.join(names[:3])}{more}"
            )

    @property
    def nbytes(self) -> int:
        """Of its files, which hold tensors as they are in memory and little else."""
        return sum(file.stat().st_size for file in set(self.files.values()) if file.exists())

    def describe(self) -> dict[str, tuple[str, list[int], int]]:
        """Of every tensor, from the headers alone: type as safetensors names it, shape, bytes."""
        found = {}
        for file in sorted(set(self.files.values())):
            with _open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    part = tensors.get_slice(name)
                    shape = part.get_shape()
                    # I8, BF16, F8_E4M3, BOOL: the number in the name is bits.
                    digits = "".join(c for c in part.get_dtype().partition("_")[0] if c.isdigit())
                    found[name] = (part.get_dtype(), shape, torch.Size(shape).numel() * int(digits or 8) // 8)
        return found

    # What the quantised formats share.

    def _full(self, name: str, out: int, inputs: int, bias: bool) -> FullWeights:
        weight = self.read(f"{name}.weight", (out, inputs))
        if weight.dtype == torch.int8:
            raise QuasarError(
                f"{self.files[f'{name}.weight']}: tensor {name}.weight is int8; the checkpoint describes it as "
                "full precision"
            )
        weight = self.get(f"{name}.weight", (out, inputs))
        return FullWeights(weight, self.get(f"{name}.bias", (out,)) if bias else None)

    def _int8(self, name: str, out: int, inputs: int) -> Tensor:
        weight = self.read(f"{name}.weight", (out, inputs))
        if weight.dtype != torch.int8:
            raise QuasarError(
                f"{self.files[f'{name}.weight']}: tensor {name}.weight is {_name(weight.dtype)}; the checkpoint "
                "describes it as W8A8, which is int8"
            )
        return weight

    def _scale(self, name: str, *shapes: tuple[int, ...]) -> Tensor:
        """Scales, float32, flat: finite and above zero."""
        scale = self.get(name, *shapes).float().flatten()
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise QuasarError(f"{self.files[name]}: tensor {name} holds scales that are not finite or not above zero")
        return scale

    def _zeros(self, name: str, *shapes: tuple[int, ...]) -> None:
        """An offset that may be there and must then be zero: int8 weights are symmetric."""
        if name in self and bool((self.read(name, *shapes) != 0).any()):
            raise QuasarError(f"{self.files[name]}: tensor {name} is not zero; asymmetric weights are not supported")


def _require(file: Path) -> None:
    try:
        there = file.is_file()
    except OSError:  # a name longer than any file's
        there = False
    if not there:
        raise QuasarError(f"{file}: no such file; the checkpoint's index names it")


def _open(file: Path) -> safe_open:
    _require(file)
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise QuasarError(f"{file}: not a whole safetensors file ({error}); download it again") from None


def _names(file: Path) -> Iterable[str]:
    with _open(file) as tensors:
        return list(tensors.keys())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
