"""The Backend contract: everything a decoder asks of a device, and nothing about models or drafts.

A backend is free to fuse (an RMSNorm may quantise its output, attention may append to the cache first), so
the contract is cut where devices fuse, not where textbooks cut. Shapes use these names:

    tokens      rows of a pass: new positions of one or many sequences
    in, out     features of a linear layer
    heads, kv_heads, head_dim, capacity    attention and its cache
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from quasar.errors import QuasarError


@dataclass(frozen=True)
class ActivationQuant:
    """How a linear layer wants its input: symmetric int8.

    static_scale: None for one scale per token, computed on the fly; a float32 [1] tensor for one calibrated
    scale per tensor. wide: two int8 digits of each number, for `wide_int8_linear`; asked only of backends with
    `fuses_digits`.
    """

    static_scale: Tensor | None = None
    wide: bool = False


@dataclass(frozen=True)
class Quantized:
    """Quantised activations: `values` int8 [tokens, in] times `scale` float32 [tokens] (or [1] if static).

    int4 activations come in int8 too, between -7 and 7.
    """

    values: Tensor
    scale: Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention: head counts, scale, and the per-head RMSNorms of q and k where there are any."""

    heads: int
    kv_heads: int
    head_dim: int
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    eps: float


class Slot:
    """Keys and values of one sequence, in memory of its own; only committed positions count.

    A pass writes its rows at positions length, length + 1, ...; `commit` keeps those that turned out right. What is not
    committed is overwritten by the next pass and never attended to, so rejecting a draft costs nothing.
    """

    def __init__(
        self, layers: int, kv_heads: int, capacity: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (layers, kv_heads, capacity, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.capacity = capacity
        self.length = 0

    @property
    def free(self) -> int:
        """Positions that are left."""
        return self.capacity - self.length

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, used or not."""
        return self.k.nbytes + self.v.nbytes

    def commit(self, rows: int | Sequence[int]) -> None:
        """Keeps the first `rows` rows of the last pass, or the rows of a path through its draft tree, in order.

        A path's rows move to where a chain would have written them. Raises ValueError beyond the capacity.
        """
        count = rows if isinstance(rows, int) else len(rows)
        if not 0 <= count <= self.free:
            raise ValueError(f"cannot commit {count} positions: {self.length} of {self.capacity} are in use")
        if not isinstance(rows, int):
            moved = next((i for i, row in enumerate(rows) if row != i), count)
            if moved < count:
                self._move([self.length + row for row in rows[moved:]], self.length + moved)
        self.length += count

    def _move(self, positions: Sequence[int], to: int) -> None:
        """Copies keys and values of all layers from `positions` to `to`, `to` + 1, ..."""
        source = torch.tensor(positions, device=self.k.device)
        for memory in (self.k, self.v):
            memory[:, :, to : to + len(positions)] = memory[:, :, source]

    def rewind(self, length: int) -> None:
        """Keeps only the first `length` positions. Raises ValueError if there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot keep {length} positions: {self.length} are in use")
        self.length = length

    def share_prefix(self, other: Slot, length: int) -> None:
        """Becomes the first `length` positions of another slot of the same model. Raises ValueError beyond either."""
        if not 0 <= length <= min(other.length, self.capacity):
            raise ValueError(f"cannot share {length} positions of {other.length} with a slot for {self.capacity}")
        self.k[:, :, :length] = other.k[:, :, :length]
        self.v[:, :, :length] = other.v[:, :, :length]
        self.length = length


@dataclass(frozen=True)
class Segment:
    """One sequence's part of a pass: `ids` follow its committed text, as a chain or as a tree of drafts.

    Row i follows row `parents[i]` < i, or the committed text where that is -1; None is the chain -1, 0, 1, ... Its
    keys and values are written at position length + i, it is rotated by position length + its depth, and it attends to
    the committed text and its ancestors. Logits are kept of the last `logits_to_keep` rows.
    """

    slot: Slot
    ids: Sequence[int]
    parents: Sequence[int] | None = None
    logits_to_keep: int = 1

    def depths(self) -> Sequence[int]:
        """How many rows of the segment each row follows."""
        if self.parents is None:
            return range(len(self.ids))
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return depths

    def path(self, row: int) -> list[int]:
        """The rows that `row` attends to: its ancestors, first to last, and itself."""
        if self.parents is None:
            return list(range(row + 1))
        path = []
        while row >= 0:
            path.append(row)
            row = self.parents[row]
        return path[::-1]


class Batch:
    """What one pass runs over: segments of different slots, their rows one after another.

    A row's numbers depend on its own segment's committed text and its ancestors: on no other row, bit for bit.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        """Raises ValueError where a segment does not fit its slot."""
        self.segments = tuple(segments)
        self.ids: list[int] = []
        self.first_rows = [0]  # of each segment; the last entry is the number of rows
        self.keeps_all = True
        self.on_device: Any = None  # what the backend made of the batch
        for segment in self.segments:
            if len(segment.ids) > segment.slot.free:
                raise ValueError(
                    f"{len(segment.ids)} tokens do not fit the KV cache: {segment.slot.free} positions are free"
                )
            self.ids += segment.ids
            self.first_rows.append(len(self.ids))
            self.keeps_all = self.keeps_all and segment.logits_to_keep == len(segment.ids)

    @property
    def rows(self) -> int:
        """New positions in this pass."""
        return len(self.ids)

    @property
    def positions(self) -> list[int]:
        """The position by which each row is rotated."""
        return [segment.slot.length + depth for segment in self.segments for depth in segment.depths()]

    @property
    def kept_rows(self) -> list[int]:
        """The rows whose logits are kept, in order."""
        ends = self.first_rows[1:]
        return [
            row
            for segment, end in zip(self.segments, ends, strict=True)
            for row in range(end - segment.logits_to_keep, end)
        ]


# The decoder's call: ids [rows] on the device, batch -> logits float32 [kept rows, vocab].
Forward = Callable[[Tensor, Batch], Tensor]


class CapturedPass(Protocol):
    """A pass that ran once and can be made again for every batch of the same `Backend.pass_key`."""

    logits: Tensor  # [kept rows, vocab], overwritten by the next replay

    def replay(self, batch: Batch) -> Tensor:
        """Runs the pass over another batch; returns `logits`."""


class Backend(ABC):
    """One device. `dtype` is the floating-point type that activations and the KV cache have on it."""

    name: str
    device: torch.device
    dtype: torch.dtype

    @property
    def linear_dtype(self) -> torch.dtype:
        """What full-precision products round their inputs to, and what `get_backend` takes for this backend."""
        return self.dtype

    # Weights: given in checkpoint layout once, kept in whatever form the device reads fastest.

    def place(self, tensor: Tensor) -> Tensor:
        """A checkpoint's tensor on this device, in its own type where the device has it."""
        return tensor.to(self.device)

    @abstractmethod
    def full_weight(self, weight: Tensor) -> Any:
        """Takes a float weight [out, in]; returns the handle that `linear` wants."""

    @abstractmethod
    def int8_weight(self, values: Tensor, scale: Tensor) -> Any:
        """Takes int8 [out, in] and float32 [out]; returns the handle that `int8_linear` wants."""

    @abstractmethod
    def linear(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        """[tokens, in] -> [tokens, out], full precision."""

    @abstractmethod
    def int8_linear(self, x: Quantized, weight: Any, bias: Tensor | None) -> Tensor:
        """[tokens, in] int8 -> [tokens, out] of `dtype`: int32 accumulation, one rescale, then the bias."""

    fuses_digits = False  # whether what comes before a wide layer makes its digits, in a form of the backend's own

    def wide_int8_linear(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        """`int8_linear` of [tokens, in] floating point that keeps 12 bits of each number, as two int8 digits.

        One product over twice the rows reads the weight once.
        """
        return fold_digits(self.int8_linear(self.digits(x), weight, None), bias).to(self.dtype)

    def digits(self, x: Tensor) -> Quantized:
        """[tokens, in] -> int8 [2 * tokens, in]: each number as an integer, 16 * upper + lower, of all tokens first the
        upper digits, -127 to 127, then the lower ones, -8 to 7.

        The integer is x / scale, rounded half to even, scale = max|row| / `widest` (1 for a row of zeros); the digits'
        scales are 16 * scale and scale."""
        x = x.float()
        peak = x.abs().amax(dim=-1)
        scale = torch.where(peak > 0, peak / widest(x.shape[-1]), 1.0)
        whole = (x / scale[:, None]).round()
        upper = ((whole + 8) / 16).floor()
        return Quantized(torch.cat([upper, whole - 16 * upper]).to(torch.int8), torch.cat([16 * scale, scale]))

    # int4, where the device has it: the other precisions do not need it.

    int4_offsets = False  # whether `int4_weight` takes offsets

    def int4_weight(self, values: Tensor, scale: Tensor, offset: Tensor | None = None) -> Any:
        """Takes int8 [out, in] between -8 and 7 and bfloat16 [out, in / group], group 32, 64 or 128; returns the
        handle that `int4_linear` wants. offset, of scale's shape and type, is added to values * scale.

        Raises QuasarError where the device has no kernel for it."""
        where = "cpu, cuda and Atlas A2 and A3"
        raise QuasarError(f"int4 weights run on {where}; --device {self.device.type} has --precision full and w8a8")

    def int4_linear(self, x: Tensor | Quantized, weight: Any, bias: Tensor | None) -> Tensor:
        """[tokens, in], 16-bit or int4, -> [tokens, out] of `dtype`."""
        raise NotImplementedError

    def quantize_int4(self, x: Tensor) -> Quantized:
        """[tokens, in] -> int4, scale = max|row| / 7 per token (1 for a row of zeros), round half to even."""
        raise NotImplementedError

    def rotate(self, x: Tensor, hadamard: Tensor) -> Tensor:
        """[tokens, in], each block of in times `hadamard` [block, block]."""
        raise NotImplementedError

    # Everything between the matmuls.

    def embed(self, table: Tensor, ids: Tensor) -> Tensor:
        """Rows `ids` [tokens] of `table` [vocab, hidden] -> [tokens, hidden] of `dtype`."""
        return table[ids].to(self.dtype)

    @abstractmethod
    def quantize(self, x: Tensor, quant: ActivationQuant) -> Quantized:
        """[tokens, in] -> int8. Per token: scale = max|row| / 127 (1 for a row of zeros), round half to even.

        Static: the same with the given scale, clamped to -128 .. 127.
        """

    @abstractmethod
    def add_rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, quant: ActivationQuant | None
    ) -> tuple[Tensor | Quantized, Tensor]:
        """Adds [tokens, hidden] to the residual stream and normalises the sum.

        Returns (normalised, quantised if the next layer wants it so; the new residual stream).
        """

    @abstractmethod
    def swiglu(self, gate_up: Tensor, quant: ActivationQuant | None) -> Tensor | Quantized:
        """[tokens, 2 * intermediate], gate first -> silu(gate) * up."""

    @abstractmethod
    def append_rotated(
        self, qkv: Tensor, spec: AttentionSpec, cos: Tensor, sin: Tensor, batch: Batch, layer: int
    ) -> Tensor:
        """Splits [tokens, (heads + 2 * kv_heads) * head_dim], norms q and k per head if the model does, rotates
        them by cos, sin [tokens, head_dim / 2] ("half" layout), writes k and v of row i of a segment at position
        length + i of its slot.

        cos and sin may also come as this backend's `rope_rows` made them. Returns q [tokens, heads, head_dim].
        """

    @abstractmethod
    def attention(self, q: Tensor, spec: AttentionSpec, batch: Batch, layer: int) -> Tensor:
        """Each row sees its slot's committed positions, its ancestors in the segment, and itself.

        Returns [tokens, heads * head_dim].
        """

    def attend(
        self, q: Tensor, spec: AttentionSpec, batch: Batch, layer: int, quant: ActivationQuant | None
    ) -> Tensor | Quantized:
        """`attention`, quantised if the next layer wants it so."""
        y = self.attention(q, spec, batch, layer)
        return y if quant is None else self.quantize(y, quant)

    def argmax(self, logits: Tensor) -> Tensor:
        """[tokens, vocab] -> int64 [tokens], the first of equals."""
        return logits.argmax(dim=-1)

    # Whether top_k takes next to nothing, and begins with the argmax also where tokens are equally probable.
    cheap_top_k = False

    def top_k(self, logits: Tensor, k: int) -> Tensor:
        """[tokens, vocab] -> int64 [tokens, k]: the most probable tokens, best first."""
        return logits.topk(k, dim=-1).indices

    def gumbel_argmax(
        self, logits: Tensor, states: Sequence[int], temperatures: Sequence[float]
    ) -> Sequence[int] | None:
        """The token of each row of [rows, vocab] with the largest logits / temperature + noise, where `sampling` has
        the noise of a state; None where the host takes them one by one."""
        return None

    # Once per pass.

    def token_ids(self, ids: Sequence[int]) -> Tensor:
        """int64 [tokens] on this device."""
        return torch.tensor(ids, device=self.device)

    def rope_rows(
        self, cos: Tensor, sin: Tensor, specs: Sequence[AttentionSpec], batch: Batch
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """What `append_rotated` takes as cos and sin for the batch's positions, a pair for each layer.

        cos, sin [positions, head_dim / 2] are the decoder's whole tables and `specs` its layers. A device may lay the
        rows out for its rotation, fold a layer's q and k norms into them, or look positions up on the device.
        """
        rows = torch.tensor(batch.positions, device=self.device)
        return [(cos[rows], sin[rows])] * len(specs)

    def kept(self, x: Tensor, batch: Batch) -> Tensor:
        """The rows of x [tokens, hidden] whose logits are kept."""
        if batch.keeps_all:
            return x
        rows = batch.kept_rows
        first = rows[0] if rows else batch.rows
        if batch.rows - first == len(rows):  # the last ones
            return x[first:]
        return x[torch.tensor(rows, device=self.device)]

    # Passes that come again: `CapturedPasses` (capture.py) decides when, the device how.

    runs_before_capture = 0  # passes of a kind that run plainly before one is captured

    captures_rows = False  # whether a pass is captured for its number of rows alone

    def pass_key(self, batch: Batch) -> Hashable | None:
        """What a captured pass depends on: batches of equal keys share one. None: this batch runs plainly."""
        return None

    def capture(self, forward: Forward, batch: Batch) -> CapturedPass:
        """Runs the pass, and returns it for replays. Raises NotImplementedError or RuntimeError where it cannot be
        captured; then nothing was committed and a plain pass over the batch is still right."""
        raise NotImplementedError

    def logits(self, lm_head: Callable[[Any], Tensor], x: Tensor | Quantized) -> Tensor:
        """`lm_head` of x [tokens, hidden] -> float32 [tokens, vocab] (float64 for float64).

        A device whose matmul accumulates in float32 may leave out the rounding to `dtype` in between.
        """
        logits = lm_head(x)
        return logits if logits.dtype == torch.float64 else logits.float()

    # The device itself.

    def require_memory(self, nbytes: int, what: str) -> None:
        """Raises QuasarError unless `nbytes` are free for `what`; called before they are used, where that is known."""
        return

    def kv_bytes(self, layers: int, kv_heads: int, head_dim: int) -> int:
        """Bytes of the keys and values of one position, all layers together."""
        return 2 * layers * kv_heads * head_dim * self.dtype.itemsize

    def new_slot(self, layers: int, kv_heads: int, capacity: int, head_dim: int) -> Slot:
        """An empty slot for `capacity` positions on this device."""
        return Slot(layers, kv_heads, capacity, head_dim, self.dtype, self.device)

    @contextmanager
    def exact_kv(self) -> Iterator[None]:
        """New slots keep keys and values as they are computed, whatever --kv says: so calibration does not depend on
        it."""
        yield

    def synchronize(self) -> None:
        """Waits until the device has finished; a no-op where calls are synchronous. For clocks."""
        return


def widest(inputs: int) -> int:
    """The largest integer of `Backend.digits`: 2039, whose upper digit is 127, or, beyond 8228 inputs, what keeps every
    sum of products with int8 weights within int32."""
    return min(2039, (2**31 - 1) // (128 * inputs))


def fold_digits(y: Tensor, bias: Tensor | None) -> Tensor:
    """The product of `Backend.digits`, [2 * tokens, out], -> [tokens, out]: both digits together, then the bias."""
    upper, lower = y.chunk(2)
    return upper + lower if bias is None else upper + lower + bias
