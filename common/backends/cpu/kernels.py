"""Kernels in C for decoding on CPU, called on tensors.

Every kernel computes a token row's result from that row alone, in an order that depends neither on the
number of rows, nor on the row's place among them, nor on the number of threads: bit for bit, a window of six
verifies exactly what six single steps decode. Between instruction sets results may differ in the last bits,
except the integer ones.

Weights are packed once (`PackedInt8`, `PackedBf16`, `PackedFloat32`). Tensors are contiguous and on CPU; a
wrong dtype, layout or shape raises `ValueError`, since the C side sees addresses only.

On a machine with other work, GNU OpenMP's habit of spinning for milliseconds makes a call wait for a
scheduler slice: set `GOMP_SPINCOUNT=1000` in the environment before torch is imported. Measured, beside one
busy process on two cores: a pass of 61 ms instead of 1.8 s; on the quiet machine 14.8 against 15.6.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from quasar.errors import QuasarError, shorten

# What the C functions take and do, as csrc/module.c numbers it; both change together.
INTERFACE = 4

_NAME = "quasar.backends.cpu._kernels"
_REBUILD = "build it again with pip install -e . (or pip install --force-reinstall quasar-inference)"


def _open() -> tuple[ModuleType | None, str | None, str | None]:
    """(the extension, the instruction set in use, why there is none although one was built).

    The processor's fastest set unless QUASAR_NATIVE_ISA names another: amx, avx512bf16, avx512, avxvnni, avx2 or plain
    on x86-64, i8mm, dotprod or plain on aarch64.
    """
    try:
        extension = import_module(_NAME)
    except ModuleNotFoundError:  # not built: no C compiler at install time
        return None, None, None
    except ImportError as error:
        return None, None, f"the C kernels cannot be loaded ({shorten(str(error))}): {_REBUILD}"
    if getattr(extension, "INTERFACE", 1) != INTERFACE:
        return None, None, f"the C kernels are of another version than the Python code that calls them: {_REBUILD}"
    sets = extension.supported()
    name = os.environ.get("QUASAR_NATIVE_ISA") or sets[0]
    if name not in sets:
        return None, None, f"QUASAR_NATIVE_ISA={shorten(name)}: this processor runs {', '.join(sets)}"
    extension.select(name)
    return extension, name, None


_kernels, _isa, _problem = _open()
# The runtime that torch itself is linked to, whatever its file is called.
_threads_shared = bool(_kernels and _kernels.use_openmp(str(Path(torch.__path__[0]) / "lib" / "libtorch_cpu.so")))


def available() -> bool:
    """Whether the kernels were built. Raises QuasarError where they were, and cannot run as they are."""
    if _problem is not None:
        raise QuasarError(_problem)
    return _kernels is not None


def instruction_sets() -> list[str]:
    """What this processor can run, fastest first; empty when the kernels were not built."""
    return _kernels.supported() if _kernels is not None else []


def instruction_set() -> str | None:
    """The set in use."""
    return _isa


def threads_shared() -> bool:
    """Whether torch's own OpenMP threads are used; without them every kernel runs on one thread."""
    return _threads_shared


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Run another set's kernels, in the whole process: for tests. `ValueError` where it cannot run."""
    global _isa
    previous = _isa
    _kernels.select(name)
    _isa = name
    try:
        yield
    finally:
        _kernels.select(previous)
        _isa = previous


class Recording:
    """The kernel calls of one pass, in order, made by one call: no Python and one team of threads.

    Every result has so many elements for each row of the pass, so one recording serves passes of any number of rows.
    What else may differ: the contents of the ids' tensor, and what the pass's `Segments` were filled with since.
    """

    def __init__(self) -> None:
        self.results: list[Tensor] = []  # of the recorded calls: shapes, whose memory the calls point to until `finish`
        self.kept: list[object] = []  # weights, and what went in
        self._calls = None
        self._threads = _threads()
        self._width = 0  # of the pass's result
        self._memory = torch.empty(0, dtype=torch.uint8)  # of the results; it grows, and moves when it does

    def finish(self, result: Tensor) -> None:
        """Gives the results of all calls their places in one memory, where each takes that of others which were used
        for the last time. result: what the pass returns, float32 [kept rows, width]."""
        last = next(i for i, made in enumerate(self.results) if made.data_ptr() == result.data_ptr())
        self.results.append(self.results.pop(last))
        addresses = torch.tensor([[made.data_ptr(), made.nbytes] for made in self.results])
        _kernels.share(self._calls, len(self.results), addresses.data_ptr())
        self._width = result.shape[1]
        self.results = []

    def replay(self, rows: int, kept: int, nanoseconds: int = 0) -> Tensor:
        """Makes the calls for a pass over so many rows; returns its result, which the next replay overwrites.

        Raises IndexError, and changes nothing, for ids that `embed` has no rows for, rotary positions beyond the
        tables, and segments of another model or number of rows."""
        nbytes, result = _kernels.replay_bytes(self._calls, rows, kept)
        if nbytes > self._memory.nbytes:
            self._memory = torch.empty(nbytes, dtype=torch.uint8)
        _kernels.replay(self._calls, self._threads, rows, kept, self._memory.data_ptr(), nanoseconds)
        return self._memory[result : result + 4 * kept * self._width].view(_float32).view(kept, self._width)

    def timed_replay(self, rows: int, kept: int) -> list[tuple[str, float]]:
        """The same; returns each call's name with the seconds until all threads had done it."""
        names = _kernels.calls(self._calls)
        nanoseconds = torch.zeros(len(names), dtype=torch.int64)
        self.replay(rows, kept, nanoseconds.data_ptr())
        return [(name, 1e-9 * n) for name, n in zip(names, nanoseconds.tolist(), strict=True)]


class _Recorder(threading.local):
    """The recording that this thread is making, if any."""

    recording: Recording | None = None


_recorder = _Recorder()


@contextmanager
def recording(rows: int) -> Iterator[Recording]:
    """Records the kernel calls that this thread makes inside, a pass over so many rows, and runs none of them.

    Raises NotImplementedError from the call that cannot be repeated: `int8_linear` whose inputs are no multiple of 4.
    """
    made = Recording()
    _kernels.record(rows)
    _recorder.recording = made
    try:
        yield made
    finally:
        _recorder.recording = None
        made._calls = _kernels.recorded()


KV_FORMATS = ("float32", "bfloat16", "int8")
KV_MOST_DIM = 1024  # of a head
_KV_CHUNK = 64
_HUGE_PAGE = 2 << 20


def kv_bytes(layers: int, kv_heads: int, head_dim: int, kv: str = "float32") -> int:
    """Bytes of one position's keys and values; int8 with a float32 scale for each head's key and value."""
    row = {"float32": 4 * head_dim, "bfloat16": 2 * head_dim, "int8": head_dim + 4}[kv]
    return 2 * layers * kv_heads * row


class SlotMemory:
    """Keys and values of one sequence as the kernels have them: for each 64 positions, all layers and heads together.

    Memory is uninitialised, and the system gives it out page by page: a slot costs what its text takes. Pages are huge
    where 64 positions take half of one or more.
    kv: float32; bfloat16, rounded half to even; or int8 with a scale for each head and position.
    """

    def __init__(self, layers: int, kv_heads: int, capacity: int, head_dim: int, kv: str = "float32") -> None:
        if head_dim % 16 or not 0 < head_dim <= KV_MOST_DIM:
            raise ValueError(f"{head_dim=} must be a multiple of 16, at most {KV_MOST_DIM}")
        self._shape = (-(-capacity // _KV_CHUNK), layers, kv_heads)
        self._head_dim, self._kv = head_dim, kv
        nbytes = self._shape[0] * _KV_CHUNK * kv_bytes(layers, kv_heads, head_dim, kv) // 2
        self._memory = [torch.empty(nbytes, dtype=torch.uint8) for _ in range(2)]
        pointers = [memory.data_ptr() for memory in self._memory]
        if _KV_CHUNK * kv_bytes(layers, kv_heads, head_dim, kv) >= _HUGE_PAGE:  # else short texts would take much more
            for pointer in pointers:
                _kernels.use_huge_pages(pointer, nbytes)
        self._slot = torch.tensor([*pointers, capacity, layers, kv_heads, head_dim, KV_FORMATS.index(kv)])
        self.pointer = self._slot.data_ptr()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values for the whole capacity."""
        return sum(memory.nbytes for memory in self._memory)

    @property
    def k(self) -> Tensor:
        """A copy: float32 [layers, kv_heads, capacity rounded up to 64, head_dim]."""
        return self._copy(self._memory[0])

    @property
    def v(self) -> Tensor:
        """A copy: float32 [layers, kv_heads, capacity rounded up to 64, head_dim]."""
        return self._copy(self._memory[1])

    def _copy(self, memory: Tensor) -> Tensor:
        chunks = memory.view(*self._shape, -1)
        if self._kv == "int8":
            split = _KV_CHUNK * self._head_dim
            values = chunks[..., :split].contiguous().view(_int8).view(*self._shape, _KV_CHUNK, -1)
            rows = values * chunks[..., split:].contiguous().view(_float32)[..., None]
        else:
            rows = chunks.view(getattr(torch, self._kv)).view(*self._shape, _KV_CHUNK, -1).float()
        return rows.movedim(0, 2).flatten(2, 3)

    def keep(self, length: int, rows: Sequence[int]) -> None:
        """Moves `rows`, ascending, counted from position `length`, to positions length, length + 1, ..."""
        _kernels.slot_keep(self.pointer, length, list(rows))

    def repeat(self, positions: int, to: int) -> None:
        """Copies the chunks of the first `positions` behind them, up to position `to`."""
        have, wanted = -(-positions // _KV_CHUNK), -(-to // _KV_CHUNK)
        for memory in self._memory:
            chunks = memory.view(self._shape[0], -1)
            for first in range(have, wanted, have):
                last = min(first + have, wanted)
                chunks[first:last] = chunks[: last - first]

    def copy_from(self, other: SlotMemory, positions: int) -> None:
        """Takes over the first `positions` of another sequence of the same model."""
        _kernels.slot_copy(other.pointer, self.pointer, positions)


class Segments:
    """The table of what a pass runs over, at a fixed address. A recorded pass reads what it holds by then."""

    __slots__ = ("_room", "_table", "pointer")

    def __init__(self, room: int) -> None:
        """room: the most rows, and segments, of a pass."""
        self._room = room
        self._table = torch.empty(_kernels.segments_bytes(room) // 8 + 1, dtype=torch.int64)
        self.pointer = self._table.data_ptr()
        self.fill([])

    def fill(self, segments: list[tuple[int, int, int, Sequence[int] | None, int]]) -> None:
        """A tuple for each segment: its `SlotMemory.pointer`, committed positions, rows, parents (None: a chain), and
        how many of the last rows are kept.

        Raises ValueError where rows do not fit their slot or the table, or a parent does not come before its row.
        """
        _kernels.fill_segments(self.pointer, self._room, segments)


Quantized = tuple[Tensor, Tensor]  # int8 [m, k], float32 scale per row [m]

_BLOCK = 32  # outputs per block of a packed weight
_float32, _int8 = torch.float32, torch.int8
_threads = torch.get_num_threads
_MOST_TOP_K = 64
_INT4_MOST_GROUP = 16384  # inputs, of which int32 holds the sum


def _pointer(tensor: Tensor, dtype: torch.dtype, elements: int) -> int:
    """The tensor's address, once it is known to be what the kernel takes it for."""
    right = tensor.dtype is dtype and tensor.numel() == elements and tensor.is_contiguous() and tensor.is_cpu
    if not right:
        raise ValueError(
            f"expected {elements} contiguous elements of {dtype} on CPU, "
            f"got {tuple(tensor.shape)} with strides {tensor.stride()} of {tensor.dtype} on {tensor.device}"
        )
    return tensor.data_ptr()


def _constant(tensor: Tensor | None, dtype: torch.dtype, elements: int) -> int:
    """The address, 0 for None, of what is the same in every replay, and is kept for them."""
    if tensor is None:
        return 0
    if _recorder.recording is not None:
        _recorder.recording.kept.append(tensor)
    return _pointer(tensor, dtype, elements)


def _weight(packed: _Packed | PackedInt4) -> int:
    if _recorder.recording is not None:
        _recorder.recording.kept.append(packed)
    if packed.instruction_set != _isa:
        raise ValueError(f"a weight packed for {packed.instruction_set} does not fit the kernels of {_isa}")
    return packed.pointer


def _new(shape: tuple[int, ...], dtype: torch.dtype = _float32) -> Tensor:
    made = torch.empty(shape, dtype=dtype)
    if _recorder.recording is not None:
        _recorder.recording.results.append(made)
    return made


def _output(out: Tensor | None, *shape: int) -> tuple[Tensor, int]:
    """`out`, or a new float32 tensor, and its address."""
    if out is None:
        out = _new(shape)
        return out, out.data_ptr()
    return out, _pointer(out, _float32, math.prod(shape))


class _Packed:
    """A weight in the layout of the instruction set in use: `n` outputs, `k` inputs, `tensor` keeps the bytes alive."""

    __slots__ = ("instruction_set", "k", "n", "pointer", "tensor")
    bits: int

    def __init__(self, weight: Tensor, dtype: torch.dtype, k_step: int):
        if weight.dim() != 2:
            raise ValueError(f"expected a weight of shape [n, k], got {tuple(weight.shape)}")
        self.n, self.k = weight.shape
        self.instruction_set = _isa
        source = _pointer(weight, dtype, self.n * self.k)
        blocks, steps = -(-self.n // _BLOCK), -(-self.k // k_step)
        # in the layouts of csrc/pack.c, which pad to blocks of 32 outputs; the address must not change from here on
        self.tensor = torch.empty(blocks * steps * _BLOCK * k_step, dtype=torch.uint8 if dtype is _int8 else dtype)
        self.pointer = self.tensor.data_ptr()
        _kernels.pack(self.bits, source, self.pointer, self.n, self.k)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight itself, padding apart."""
        return self.n * self.k * self.tensor.element_size()


class PackedInt8(_Packed):
    """int8 weight [n, k] with a float32 scale per output [n]."""

    __slots__ = ("_scale_pointer", "scale")
    bits = 8

    def __init__(self, weight: Tensor, scale: Tensor):
        super().__init__(weight, _int8, 8)
        self.scale = scale.to(_float32).contiguous().clone()
        self._scale_pointer = _pointer(self.scale, _float32, self.n)


class PackedBf16(_Packed):
    """bfloat16 weight [n, k], read as bf16; multiplied by float32 inputs, or by inputs rounded to bfloat16."""

    __slots__ = ()
    bits = 16

    def __init__(self, weight: Tensor):
        super().__init__(weight, torch.bfloat16, 2)


class PackedFloat32(_Packed):
    """float32 weight [n, k]."""

    __slots__ = ()
    bits = 32

    def __init__(self, weight: Tensor):
        super().__init__(weight, _float32, 1)


class PackedInt4:
    """int4 weight, int8 [n, k] between -8 and 7, with a bfloat16 scale per group of inputs [n, k / group], and an
    offset likewise or None."""

    __slots__ = ("group", "instruction_set", "k", "n", "offset", "pointer", "scale", "tensor")

    def __init__(self, weight: Tensor, scale: Tensor, offset: Tensor | None = None):
        (self.n, self.k), groups = weight.shape, scale.shape[1]
        self.instruction_set = _isa
        self.group = self.k // groups
        if self.k % groups or self.group % 8 or self.group > _INT4_MOST_GROUP:
            raise ValueError(
                f"{groups} groups of {self.k} inputs: a group must be a multiple of 8, at most {_INT4_MOST_GROUP}"
            )
        blocks = -(-self.n // _BLOCK)
        # [blocks, k / 8, 32, 4] and [blocks, groups, 32], see csrc/pack.c; the addresses must not change from here on
        self.tensor = torch.empty(blocks * _BLOCK * self.k // 2, dtype=torch.uint8)
        self.scale = torch.empty(blocks * _BLOCK * groups, dtype=torch.bfloat16)
        self.pointer = self.tensor.data_ptr()
        _kernels.pack(4, _pointer(weight, _int8, self.n * self.k), self.pointer, self.n, self.k)
        source = _pointer(scale, torch.bfloat16, self.n * groups)
        _kernels.pack_scales(source, self.scale.data_ptr(), self.n, groups)
        self.offset = None
        if offset is not None:
            self.offset = torch.empty_like(self.scale)
            source = _pointer(offset, torch.bfloat16, self.n * groups)
            _kernels.pack_scales(source, self.offset.data_ptr(), self.n, groups)


def int4_linear(x: Tensor | Quantized, weight: PackedInt4, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, the exact sum of each group times its scale, summed in float32: -> float32 [m, n].

    x: float32 [m, k], rounded to integers of 14 bits by a power of two for each group (W4A16); or int8 [m, k] between
    -7 and 7 with its float32 scale [m] (W4A4).
    """
    values, scale = (x, None) if isinstance(x, Tensor) else x
    m, n, k = values.shape[0], weight.n, weight.k
    groups, digits = k // weight.group, 2 if scale is None else 1
    source = _pointer(values, _float32 if scale is None else _int8, m * k)
    q, sums, out = _new((m, digits, k), _int8), _new((m, groups), torch.int32), _new((m, n))
    if scale is None:
        scale = _new((m, 2, groups))
        scale_pointer = made_scale = scale.data_ptr()
    else:
        scale_pointer, made_scale = _pointer(scale, _float32, m), 0
    _kernels.int4_inputs(source, q.data_ptr(), made_scale, sums.data_ptr(), m, k, weight.group, _threads())
    _kernels.int4_linear(
        q.data_ptr(), scale_pointer, sums.data_ptr(), _weight(weight), weight.scale.data_ptr(),
        0 if weight.offset is None else weight.offset.data_ptr(), _constant(bias, _float32, n), out.data_ptr(),
        m, n, k, weight.group, digits, _threads(),
    )  # fmt: skip
    return out


def hadamard(x: Tensor, block: int) -> Tensor:
    """Each `block` of float32 [m, k] times Sylvester's normalised Hadamard matrix; block is a power of two."""
    m, k = x.shape
    if block & (block - 1) or k % block:
        raise ValueError(f"blocks of {block} of {k}: a power of two that divides it is needed")
    out, out_pointer = _output(None, m, k)
    _kernels.hadamard(_pointer(x, _float32, m * k), out_pointer, block, m, k, _threads())
    return out


def int8_linear(
    x: Tensor, x_scale: Tensor, weight: PackedInt8, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """`((x @ weight.T) * x_scale[:, None]) * w_scale + bias` with exact int32 sums.

    x: int8 [m, k], x_scale: float32 [m], bias: float32 [n] or None; returns float32 [m, n] (`out` if given).
    """
    m = x.shape[0]
    x_pointer, scale_pointer = _pointer(x, _int8, m * weight.k), _pointer(x_scale, _float32, m)
    return _int8_linear(x_pointer, scale_pointer, weight, bias, out, m, wide=False)


def _int8_linear(
    x: int, scale: int, weight: PackedInt8, bias: Tensor | None, out: Tensor | None, m: int, wide: bool
) -> Tensor:
    n, k = weight.n, weight.k
    out, out_pointer = _output(out, m, n)
    _kernels.int8_linear(
        x, scale, _weight(weight), weight._scale_pointer, _constant(bias, _float32, n), out_pointer, m, n, k,
        _threads(), wide,
    )  # fmt: skip
    return out


def float_linear(
    x: Tensor, weight: PackedBf16 | PackedFloat32, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """`x @ weight.T + bias`, multiplied and summed in float32: float32 [m, k], bias float32 [n] -> float32 [m, n]."""
    m, n, k = x.shape[0], weight.n, weight.k
    out, out_pointer = _output(out, m, n)
    _kernels.float_linear(
        weight.bits == 16, _pointer(x, _float32, m * k), _weight(weight),
        _constant(bias, _float32, n), out_pointer, m, n, k, _threads(), False,
    )  # fmt: skip
    return out


def bf16_linear(x: Tensor, weight: PackedBf16, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`bfloat16(x) @ weight.T + bias`, summed in float32: float32 [m, k], bias float32 [n] -> float32 [m, n].

    Inputs are rounded half to even; products of two bfloat16 are exact in float32. With avx512bf16 the processor adds
    them in pairs, without it this is `float_linear` of the rounded inputs.
    """
    m, n, k = x.shape[0], weight.n, weight.k
    out, out_pointer = _output(out, m, n)
    rounded = _new((m, k))
    _kernels.round_bf16(_pointer(x, _float32, m * k), rounded.data_ptr(), m, k, _threads())
    _kernels.float_linear(
        True, rounded.data_ptr(), _weight(weight), _constant(bias, _float32, n), out_pointer, m, n, k, _threads(), True
    )
    return out


def embed(table: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` (int64 [m]) of `table`, bfloat16 or float32 [vocab, k], as float32 [m, k].

    A replay looks up what the ids' tensor holds by then. Raises IndexError where that is no row.
    """
    vocab, k = table.shape
    m, bf16 = ids.shape[0], table.dtype == torch.bfloat16
    out, out_pointer = _output(None, m, k)
    _kernels.embed(
        bf16, _constant(table, torch.bfloat16 if bf16 else _float32, vocab * k), _constant(ids, torch.int64, m),
        out_pointer, vocab, m, k, _threads(),
    )  # fmt: skip
    return out


def _quantized(m: int, k: int, out: Quantized | None) -> tuple[Tensor, Tensor, int, int]:
    if out is None:
        q, scale = _new((m, k), _int8), _new((m,))
        return q, scale, q.data_ptr(), scale.data_ptr()
    q, scale = out
    return q, scale, _pointer(q, _int8, m * k), _pointer(scale, _float32, m)


def quantize_per_token(x: Tensor, out: Quantized | None = None, limit: int = 127) -> Quantized:
    """float32 [m, k] -> int8 [m, k] in [-limit, limit] and float32 scale [m] (`out` if given).

    `scale = max(max|x| / limit, smallest normal float32)`, so a zero row gives zeros and nothing divides by
    zero; `q = x / scale` rounded half to even: the same bits as PyTorch's division and `round`. A NaN or an
    infinity in the row becomes its scale.
    """
    m, k = x.shape
    q, scale, q_pointer, scale_pointer = _quantized(m, k, out)
    _kernels.quantize(_pointer(x, _float32, m * k), q_pointer, scale_pointer, limit, m, k, _threads(), 0)
    return q, scale


def quantize_static(x: Tensor, scale: Tensor) -> Quantized:
    """float32 [m, k] by one calibrated scale, float32 [1] -> int8 [m, k], clipped, and the scale for each row [m]."""
    m, k = x.shape
    q, scales, q_pointer, scales_pointer = _quantized(m, k, None)
    _kernels.quantize(
        _pointer(x, _float32, m * k), q_pointer, scales_pointer, 127, m, k, _threads(), _constant(scale, _float32, 1)
    )
    return q, scales


def wide_int8_linear(x: Tensor, weight: PackedInt8, bias: Tensor | None = None) -> Tensor:
    """`int8_linear` of float32 [m, k] that keeps 12 bits of each number (`Backend.digits`), with exact int32 sums.

    The numbers are int16 where the instruction set takes those, else two rows of int8 digits: bit for bit the same.
    """
    m, k = x.shape[0], weight.k
    shape, dtype = ((m, k), torch.int16) if _kernels.takes_int16() else ((m, 2, k), _int8)
    q, scale = _new(shape, dtype), _new((m,))
    _kernels.digits(_pointer(x, _float32, m * k), q.data_ptr(), scale.data_ptr(), m, k, _threads())
    return _int8_linear(q.data_ptr(), scale.data_ptr(), weight, bias, None, m, wide=True)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """Adds `residual` to `x` IN PLACE (unless None), returns `x * rsqrt(mean(x^2) + eps) * weight`.

    x, residual: float32 [m, k], weight: float32 [k]; returns float32 [m, k] (`out` if given).
    """
    m, k = x.shape
    out, out_pointer = _output(out, m, k)
    _kernels.add_rms_norm(
        _pointer(x, _float32, m * k), 0 if residual is None else _pointer(residual, _float32, m * k),
        _constant(weight, _float32, k), eps, out_pointer, 0, 0, m, k, _threads(),
    )  # fmt: skip
    return out


def add_rms_norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Quantized | None = None
) -> Quantized:
    """`quantize_per_token(add_rms_norm(...))` in one pass, bit for bit: int8 [m, k], float32 scale [m]."""
    m, k = x.shape
    q, scale, q_pointer, scale_pointer = _quantized(m, k, out)
    _kernels.add_rms_norm(
        _pointer(x, _float32, m * k), 0 if residual is None else _pointer(residual, _float32, m * k),
        _constant(weight, _float32, k), eps, 0, q_pointer, scale_pointer, m, k, _threads(),
    )  # fmt: skip
    return q, scale


def swiglu(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """`silu(gate) * up`: float32 [m, 2 * k], gate first -> float32 [m, k]."""
    m, k = gate_up.shape[0], gate_up.shape[1] // 2
    out, out_pointer = _output(out, m, k)
    _kernels.swiglu(_pointer(gate_up, _float32, 2 * m * k), out_pointer, 0, 0, m, k, _threads())
    return out


def swiglu_quantize(gate_up: Tensor, out: Quantized | None = None) -> Quantized:
    """`quantize_per_token(swiglu(gate_up))` in one pass, bit for bit: int8 [m, k], float32 scale [m]."""
    m, k = gate_up.shape[0], gate_up.shape[1] // 2
    q, scale, q_pointer, scale_pointer = _quantized(m, k, out)
    _kernels.swiglu(_pointer(gate_up, _float32, 2 * m * k), 0, q_pointer, scale_pointer, m, k, _threads())
    return q, scale


def rope_qk_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    segments: Segments,
    layer: int,
    heads: int,
    dim: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Splits `qkv`, normalises and rotates q and k, writes k and v of `layer` into the segments' slots, returns q.

    qkv: float32 [m, (heads + 2 * kv_heads) * dim], the heads of q, then of k, then of v. cos, sin of all positions:
    float32 [positions, dim / 2] or [positions, dim], of which the first half is read; the pairs are (i, i + dim / 2).
    q_weight, k_weight: float32 [dim], RMSNorm of each head before the rotation (Qwen3), or None.
    Returns q: float32 [m, heads, dim]. Raises IndexError where positions leave the tables or the slots are of another
    model.
    """
    m, width = qkv.shape
    kv_heads = (width // dim - heads) // 2
    positions, stride = cos.shape
    fits = kv_heads >= 1 and width == (heads + 2 * kv_heads) * dim and stride in (dim, dim // 2)
    if dim % 16 or dim > KV_MOST_DIM or not fits:
        raise ValueError(f"{heads=} {dim=}, tables {tuple(cos.shape)}: dim must be a multiple of 16")
    q = _new((m, heads, dim))
    _kernels.rope_qk_append(
        _pointer(qkv, _float32, m * width),
        _constant(q_weight, _float32, dim),
        _constant(k_weight, _float32, dim),
        eps, _constant(cos, _float32, positions * stride), _constant(sin, _float32, positions * stride),
        q.data_ptr(), _segments(segments), layer,
        m, heads, kv_heads, dim, positions, stride, _threads(),
    )  # fmt: skip
    return q


def attention(q: Tensor, segments: Segments, layer: int, kv_heads: int, scale: float) -> Tensor:
    """Attention of each row to the committed positions of its slot, its ancestors and itself, grouped queries.

    q: float32 [m, heads, dim]; the slots hold the rows' keys and values already. A row's result is bit for bit that
    of a chain of its ancestors. Returns float32 [m, heads * dim].
    """
    m, heads, dim = q.shape
    if dim % 16 or heads % kv_heads:
        raise ValueError(f"{heads=} {kv_heads=} {dim=}")
    out = _new((m, heads * dim))
    _kernels.attention(
        _pointer(q, _float32, m * heads * dim), _segments(segments), layer, out.data_ptr(),
        scale, m, heads, kv_heads, dim, _threads(),
    )  # fmt: skip
    return out


def keep_rows(x: Tensor, segments: Segments, kept: int) -> Tensor:
    """The rows of x, float32 [m, k], that the segments keep: float32 [kept, k]."""
    m, k = x.shape
    out = _new((kept, k))
    _kernels.keep_rows(_pointer(x, _float32, m * k), _segments(segments), out.data_ptr(), kept, k, _threads())
    return out


def _segments(segments: Segments) -> int:
    if _recorder.recording is not None:
        _recorder.recording.kept.append(segments)
    return segments.pointer


def argmax(x: Tensor) -> Tensor:
    """Index of each row's largest value, the lowest on ties: float32 [m, n] -> int64 [m]."""
    m, n = x.shape
    if not 0 < n < 2**31:
        raise ValueError(f"argmax over {n} values")
    out = _new((m,), torch.int64)
    _kernels.argmax(_pointer(x, _float32, m * n), out.data_ptr(), m, n, _threads())
    return out


def top_k(x: Tensor, k: int) -> Tensor:
    """Indices of each row's k largest values, the largest first and the lower index first on ties.

    float32 [m, n] -> int64 [m, k]; k from 1 to 64.
    """
    m, n = x.shape
    if not 0 < k <= min(n, _MOST_TOP_K):
        raise ValueError(f"the {k} largest of {n} values")
    out = torch.empty(m, k, dtype=torch.int64)
    _kernels.top_k(_pointer(x, _float32, m * n), out.data_ptr(), m, n, k, _threads())
    return out


def read(x: Tensor) -> int:
    """Reads the int32 tensor (a multiple of 16 elements) once, with all threads; returns the xor of its elements.

    Nothing a kernel does with weights can be faster than this.
    """
    if x.numel() % 16:
        raise ValueError(f"{x.numel()} elements: lines of 16 are read")
    return _kernels.read(_pointer(x, torch.int32, x.numel()), x.numel() // 16, _threads())
