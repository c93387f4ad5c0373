"""GGUF, llama.cpp's one-file format: metadata, and tensors in blocks that carry their own scales.

The header is parsed here, on the mapped file and with every length held against what is left of it: the `gguf`
package's reader believes what a file says, and takes three seconds over a vocabulary of 49,000 tokens. Tensors are
dequantised when they are asked for, one at a time.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quasar.checkpoints.gguf_blocks import dequantize_blocks
from quasar.checkpoints.weights import FullWeights, LinearWeights
from quasar.errors import QuasarError, shorten

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_MAX_NAME = 65535
_MAX_DIMENSIONS = 4
_CHUNK = 1 << 17  # numbers dequantised at a time: they stay in the processor's caches


@dataclass(frozen=True)
class TensorType:
    """How a tensor's numbers are stored: `block` of them in `nbytes` bytes."""

    name: str
    block: int
    nbytes: int


# By ggml's number for it. Others are refused by number.
TYPES = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    8: TensorType("Q8_0", 32, 34),
    12: TensorType("Q4_K", 256, 144),
    14: TensorType("Q6_K", 256, 210),
    30: TensorType("BF16", 1, 2),
}
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": np.int16}


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies: `shape` outermost first, as torch has it; `start` counts from the file's beginning."""

    name: str
    shape: tuple[int, ...]
    kind: TensorType
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.kind.block * self.kind.nbytes


@dataclass(frozen=True)
class GGUFFile:
    """A file whose header has been read and found consistent."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))


def open_gguf(path: Path) -> GGUFFile:
    """Reads the header. Raises QuasarError, in one line, on anything but a whole GGUF file."""
    try:
        status = path.stat()
    except OSError as error:
        raise QuasarError(f"{path}: cannot be read ({error.strerror})") from None
    return _open(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=2)  # config, weights and tokenizer of one model ask for the same header
def _open(path: Path, size: int, _modified: int) -> GGUFFile:
    try:
        with path.open("rb") as file:
            if file.read(4) != _MAGIC:
                raise QuasarError(f"{path}: not a GGUF file; it should begin with GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(path, data, size).read()
    except OSError as error:
        raise QuasarError(f"{path}: cannot be read ({error.strerror})") from None


class _Header:
    """A cursor over the header; every read is checked against the file's end."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 4

    def read(self) -> GGUFFile:
        version = self._number("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            hint = "; it is big-endian" if swapped in _VERSIONS else ""
            raise self._bad(f"version {version} is not supported{hint}; Quasar reads little-endian versions 2 and 3")
        tensors, pairs = self._number("Q"), self._number("Q")
        # The least that each takes: a key or name of 8 bytes length, a type, a value.
        for what, count, least in (("metadata entries", pairs, 13), ("tensors", tensors, 24)):
            if count > self.size // least:
                raise self._bad(f"states {count} {what}, more than its {self.size} bytes can hold")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string(_MAX_NAME)
            if key in metadata:
                raise self._bad(f"metadata {shorten(key)} stands there twice")
            metadata[key] = self._value(self._number("I"), key)
        infos = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._bad(f"general.alignment is {shorten(repr(alignment))}; it should be a power of two")
        begin = -(-self.at // alignment) * alignment
        found = [GGUFTensor(t.name, t.shape, t.kind, begin + t.start) for t in infos]
        self._check(found, alignment)
        return GGUFFile(self.path, metadata, {tensor.name: tensor for tensor in found})

    def _tensor(self) -> GGUFTensor:
        name = self._string(_MAX_NAME)
        dimensions = self._number("I")
        if not 0 < dimensions <= _MAX_DIMENSIONS:
            raise self._bad(f"tensor {shorten(name)} has {dimensions} dimensions; 1 to {_MAX_DIMENSIONS} are possible")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        kind, start = self._number("I"), self._number("Q")
        if kind not in TYPES:
            known = ", ".join(t.name for t in TYPES.values())
            raise self._bad(f"tensor {shorten(name)} has type {kind}, which Quasar does not read; it reads {known}")
        if 0 in shape or shape[-1] % TYPES[kind].block:
            raise self._bad(
                f"tensor {shorten(name)} has shape {list(shape)}; rows of {TYPES[kind].name} are multiples of "
                f"{TYPES[kind].block}"
            )
        return GGUFTensor(name, shape, TYPES[kind], start)

    def _check(self, tensors: list[GGUFTensor], alignment: int) -> None:
        """Names are there once, and data lies within the file, aligned and apart."""
        names, end, last = set(), 0, ""
        for tensor in sorted(tensors, key=lambda tensor: tensor.start):
            name = shorten(tensor.name)
            if tensor.name in names:
                raise self._bad(f"tensor {name} stands there twice")
            names.add(tensor.name)
            stop = tensor.start + tensor.nbytes
            if tensor.start % alignment:
                raise self._bad(f"tensor {name} begins at byte {tensor.start}, not at a multiple of {alignment}")
            if stop > self.size:
                raise self._bad(
                    f"tensor {name} ends at byte {stop}, the file at {self.size}; it is cut short, download it again"
                )
            if tensor.start < end:
                raise self._bad(f"tensor {name} overlaps tensor {last}")
            end, last = stop, name

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _FORMATS:
            raise self._bad(f"metadata {shorten(key)} has type {kind}; types 0 to 12 exist")
        value = self._number(_FORMATS[kind])
        return bool(value) if kind == 7 else value

    def _array(self, key: str) -> list[Any]:
        kind, count = self._number("I"), self._number("Q")
        if kind == _STRING:
            if count > (self.size - self.at) // 8:
                raise self._bad(f"metadata {shorten(key)} states {count} texts, more than the file can hold")
            return [self._string() for _ in range(count)]
        if kind not in _FORMATS:
            nested = "arrays within an array" if kind == _ARRAY else f"elements of type {kind}"
            raise self._bad(f"metadata {shorten(key)} holds {nested}, which Quasar does not read")
        width = struct.calcsize("<" + _FORMATS[kind])
        if count > (self.size - self.at) // width:
            raise self._bad(f"metadata {shorten(key)} states {count} elements, more than the file can hold")
        values = struct.unpack_from(f"<{count}{_FORMATS[kind]}", self.data, self.at)
        self.at += count * width
        return list(values)

    def _number(self, form: str) -> Any:
        width = struct.calcsize("<" + form)
        if self.size - self.at < width:
            raise self._bad(f"ends at byte {self.size}, within its header; it is cut short, download it again")
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += width
        return value

    def _string(self, most: int | None = None) -> str:
        length = self._number("Q")
        if length > self.size - self.at or (most is not None and length > most):
            raise self._bad(f"states a text of {length} bytes at byte {self.at - 8}; the file has {self.size}")
        text = self.data[self.at : self.at + length]
        self.at += length
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            raise self._bad(f"the text at byte {self.at - length} is not UTF-8") from None

    def _bad(self, what: str) -> QuasarError:
        return QuasarError(f"{self.path}: {what}")


# llama.cpp's names of the tensors of a layer, and ours.
_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "pangu-embedded": "PanguEmbeddedForCausalLM",
}
ROPE_FACTORS = "rope_freqs.weight"  # what llama3's scaling divides each frequency by


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """The fields of the config.json that the metadata amounts to. Raises QuasarError on other architectures."""
    metadata, architecture = file.metadata, file.architecture
    if architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise QuasarError(
            f"{file.path}: general.architecture {shorten(architecture)} is not supported; Quasar runs {known}"
        )
    if metadata.get("split.count", 0) not in (0, 1):
        raise QuasarError(f"{file.path}: one of several parts; join them with llama.cpp's gguf-split --merge")

    def of(name: str) -> Any:
        return metadata.get(f"{architecture}.{name}")

    if of("attention.sliding_window"):
        raise QuasarError(f"{file.path}: {architecture}.attention.sliding_window is not supported")
    if of("expert_count"):
        raise QuasarError(f"{file.path}: mixtures of experts are not supported; Quasar runs dense models")
    heads, hidden = of("attention.head_count"), of("embedding_length")
    plain = isinstance(heads, int) and isinstance(hidden, int) and heads > 0
    head_dim = of("attention.key_length") or (hidden // heads if plain else None)
    if of("attention.value_length") not in (None, head_dim):
        raise QuasarError(f"{file.path}: keys and values of different sizes are not supported")
    if head_dim is not None and of("rope.dimension_count") not in (None, head_dim):
        raise QuasarError(
            f"{file.path}: {architecture}.rope.dimension_count is {shorten(repr(of('rope.dimension_count')))}; Quasar "
            f"rotates whole heads, which have {head_dim}"
        )
    embedding = file.tensors.get("token_embd.weight")
    vocab = embedding.shape[0] if embedding is not None else of("vocab_size")
    bias = "blk.0.attn_q.bias" in file.tensors
    fields = {
        "architectures": [_ARCHITECTURES[architecture]],
        "model_type": "PanguEmbedded" if architecture == "pangu-embedded" else architecture,
        "hidden_act": "silu",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv"),
        "head_dim": head_dim,
        "intermediate_size": of("feed_forward_length"),
        "max_position_embeddings": of("context_length"),
        "rope_theta": of("rope.freq_base") or 10000.0,
        "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": bias,
        "bias": bias,
        "dtype": _dtype(file),
    }
    kind = of("rope.scaling.type")
    if kind not in (None, "none"):
        fields["rope_scaling"] = {
            "rope_type": kind,
            "factor": of("rope.scaling.factor"),
            "original_max_position_embeddings": of("rope.scaling.original_context_length"),
            "attention_factor": _attention_factor(of("rope.scaling.attn_factor"), of("rope.scaling.factor")),
            "beta_fast": of("rope.scaling.yarn_beta_fast"),
            "beta_slow": of("rope.scaling.yarn_beta_slow"),
        }
    return fields


def _attention_factor(own: Any, factor: Any) -> Any:
    """llama.cpp multiplies the paper's magnitude by its own factor, where Hugging Face replaces one by the other."""
    if not isinstance(own, (int, float)) or not isinstance(factor, (int, float)) or factor <= 0:
        return own
    return own * (0.1 * math.log(max(factor, 1.0)) + 1.0)


def _dtype(file: GGUFFile) -> str:
    """Of matrices where all have one type that is not in blocks; else what blocks are dequantised to."""
    kinds = {tensor.kind.name for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return {("F16",): "float16", ("F32",): "float32"}.get(tuple(kinds), "bfloat16")


class GGUFSource:
    """The tensors of a GGUF file under the names that checkpoints in safetensors have for them."""

    is_quantized = False  # blocks are dequantised: full precision as far as the file goes

    def __init__(self, file: GGUFFile, dtype: torch.dtype = torch.bfloat16) -> None:
        """dtype: of matrices that are stored in blocks. float32 holds what they stand for exactly; bfloat16 rounds it
        as the checkpoints are rounded that such files are made of, and costs half the memory."""
        self.file, self.dtype = file, dtype
        self._shapes_only = False
        kinds = Counter(tensor.kind.name for tensor in file.tensors.values() if len(tensor.shape) > 1)
        self.format = f"GGUF ({', '.join(name for name, _ in kinds.most_common())})"
        self._unused = set(file.tensors) - {ROPE_FACTORS}
        self._permuted = file.architecture == "llama"
        self._heads = {
            "attn_q": file.metadata.get(f"{file.architecture}.attention.head_count"),
            "attn_k": file.metadata.get(f"{file.architecture}.attention.head_count_kv"),
        }

    def __contains__(self, name: str) -> bool:
        return _stored_name(name) in self.file.tensors

    def get(self, name: str, *shapes: tuple[int, ...]) -> Tensor:
        """The named tensor in floating point; QuasarError unless it is there and has one of these shapes."""
        stored = _stored_name(name)
        tensor = self.file.tensors.get(stored)
        path = self.file.path
        if tensor is None:
            raise QuasarError(f"{path}: tensor {stored} is missing; the metadata asks for it")
        self._unused.discard(stored)
        if tensor.shape not in shapes:
            raise QuasarError(
                f"{path}: tensor {stored} has shape {list(tensor.shape)}; the metadata makes it {list(shapes[0])}"
            )
        if self._shapes_only:
            return torch.empty(tensor.shape, dtype=_FLOATS.get(tensor.kind.name, self.dtype), device="meta")
        values = dequantize(path, tensor, self.dtype)
        part = stored.rpartition(".")[0].rpartition(".")[2]
        if self._permuted and part in self._heads:
            values = _half_layout(values, self._heads[part] or self._heads["attn_q"])
        return values

    def shapes(self) -> GGUFSource:
        """The same for those who look and do not compute: tensors on the meta device, nothing is read."""
        source = GGUFSource(self.file, self.dtype)
        source._shapes_only = True
        return source

    def linear(self, name: str, out: int, inputs: int, bias: bool) -> LinearWeights:
        """The projection `name`, dequantised."""
        weight = self.get(f"{name}.weight", (out, inputs))
        return FullWeights(weight, self.get(f"{name}.bias", (out,)) if bias else None)

    def norm_bias(self, name: str, size: int) -> Tensor | None:
        """None: no tool writes such a thing into GGUF."""
        return None

    def skip(self, *names: str) -> None:
        """Tensors that may be there and are not needed."""
        self._unused.difference_update(map(_stored_name, names))

    def finish(self) -> None:
        """Called when all were read; QuasarError if something is left over."""
        if self._unused:
            names = sorted(self._unused)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            listed = ", ".join(map(shorten, names[:3]))
            raise QuasarError(f"{self.file.path}: tensors that this architecture does not have: {listed}{more}")

    @property
    def nbytes(self) -> int:
        """Of its tensors in memory."""
        tensors = self.file.tensors.values()
        return sum(math.prod(t.shape) * _FLOATS.get(t.kind.name, self.dtype).itemsize for t in tensors)

    def describe(self) -> dict[str, tuple[str, list[int], int]]:
        """Of every tensor: type, shape, bytes in the file."""
        return {t.name: (t.kind.name, list(t.shape), t.nbytes) for t in self.file.tensors.values()}


def rope_factors(file: GGUFFile, head_dim: int) -> tuple[float, ...]:
    """What each rotary frequency is divided by; empty where the file does not say."""
    tensor = file.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return ()
    if tensor.shape != (head_dim // 2,):
        raise QuasarError(f"{file.path}: tensor {ROPE_FACTORS} has shape {list(tensor.shape)}, not [{head_dim // 2}]")
    factors = dequantize(file.path, tensor, torch.float32)
    if not bool((factors.isfinite() & (factors > 0)).all()):
        raise QuasarError(f"{file.path}: tensor {ROPE_FACTORS} holds factors that are not finite or not above zero")
    return tuple(factors.tolist())


def dequantize(path: Path, tensor: GGUFTensor, dtype: torch.dtype) -> Tensor:
    """F32, F16 and BF16 as they are, mapped; blocks in dtype. Raises QuasarError where scales are not finite."""
    kind = tensor.kind
    try:
        if kind.name in _PLAIN:
            raw = np.memmap(path, dtype=_PLAIN[kind.name], mode="c", offset=tensor.start, shape=tensor.shape)
            values = torch.from_numpy(raw)
            return values.view(torch.bfloat16) if kind.name == "BF16" else values
        shape = (math.prod(tensor.shape) // kind.block, kind.nbytes)
        raw = np.memmap(path, dtype=np.uint8, mode="c", offset=tensor.start, shape=shape)
    except (OSError, ValueError) as error:
        raise QuasarError(f"{path}: tensor {shorten(tensor.name)} cannot be read ({error})") from None
    blocks = torch.from_numpy(raw)
    values = torch.empty(math.prod(tensor.shape), dtype=dtype)
    finite, step = True, _CHUNK // kind.block
    for start in range(0, len(blocks), step):
        numbers = dequantize_blocks(blocks[start : start + step], kind.name).view(-1)
        finite = finite and math.isfinite(numbers.sum().item())
        values[start * kind.block : start * kind.block + len(numbers)] = numbers
    if not finite:
        raise QuasarError(f"{path}: tensor {shorten(tensor.name)} holds scales that are not finite")
    return values.view(tensor.shape)


def _half_layout(values: Tensor, heads: int) -> Tensor:
    """Rows of q or k as Hugging Face has them. llama.cpp rotates neighbouring rows of a head where Hugging Face rotates
    rows half a head apart, so its converter stores row i of the first half at 2 i and of the second at 2 i + 1."""
    pairs = values.view(heads, -1, 2, *values.shape[1:])  # [heads, head_dim / 2, 2, ...]
    return pairs.transpose(1, 2).reshape(values.shape)


def _stored_name(name: str) -> str:
    """ "model.layers.3.mlp.up_proj.weight" -> "blk.3.ffn_up.weight"."""
    module, _, part = name.rpartition(".")
    if module.startswith("model.layers."):
        layer, _, inner = module.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{_LAYER_NAMES.get(inner, inner)}.{part}"
    return f"{_TOP_NAMES.get(module, module)}.{part}"
