"""Segments of slots in the C kernels: trees have the bits of chains, whatever stands beside them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quasar.backends.base import AttentionSpec, Backend, Batch, Segment, Slot
from quasar.backends.cpu import kernels
from quasar.backends.cpu.backend import CpuBackend
from quasar.backends.reference import ReferenceBackend

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the C kernels were not built")
LAYERS, CAPACITY = 2, 260  # of slots where nothing else is said
POSITIONS = 3000
SHAPES = [(4, 2, 32), (5, 1, 48), (2, 2, 16), (16, 8, 128), (24, 1, 96)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def spec_of(heads: int, kv_heads: int, dim: int) -> AttentionSpec:
    return AttentionSpec(heads, kv_heads, dim, torch.rand(dim), torch.rand(dim), 1e-6)


def tables(dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(POSITIONS)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    return angles.cos(), angles.sin()


def new_slot(backend: Backend, spec: AttentionSpec, capacity: int = CAPACITY) -> Slot:
    return backend.new_slot(LAYERS, spec.kv_heads, capacity, spec.head_dim)


def attended(backend: Backend, spec: AttentionSpec, qkv: Tensor, batch: Batch, layer: int = 1) -> Tensor:
    """One layer's rope, append and attention: [rows, width] -> [rows, heads * head_dim]."""
    cos, sin = list(backend.rope_rows(*tables(spec.head_dim), [spec] * LAYERS, batch))[layer]
    q = backend.append_rotated(qkv, spec, cos, sin, batch, layer)
    return backend.attention(q, spec, batch, layer)


def random_rows(spec: AttentionSpec, rows: int) -> Tensor:
    return torch.randn(rows, (spec.heads + 2 * spec.kv_heads) * spec.head_dim)


@st.composite
def trees(draw: st.DrawFn, most: int = 24) -> list[int] | None:
    rows = draw(st.integers(1, most))
    return [draw(st.integers(-1, i - 1)) for i in range(rows)]


def filled_slot(backend: CpuBackend, spec: AttentionSpec, length: int, capacity: int) -> Slot:
    slot = new_slot(backend, spec, capacity)
    if length:
        attended(backend, spec, random_rows(spec, length), Batch([Segment(slot, [0] * length)]))
        slot.commit(length)
    return slot


def check_batch(
    backend: CpuBackend, spec: AttentionSpec, segments: list[Segment], threads: int, most: int = 99
) -> None:
    """Every row of a batch has the bits that it has alone, behind its ancestors, on one thread, and is within 5e-6 of
    the reference over the same keys and values: 2e-5 on the tile unit, which multiplies queries of 16 bits."""
    on_tiles = kernels.instruction_set() == "amx" and backend.kv == "bfloat16"
    batch = Batch(segments)
    qkv = random_rows(spec, batch.rows)
    torch.set_num_threads(threads)
    together = attended(backend, spec, qkv, batch)
    torch.set_num_threads(1)
    for segment, first in zip(batch.segments, batch.first_rows, strict=False):
        length, rows = segment.slot.length, len(segment.ids)
        for row in {*range(min(rows, most)), rows - 1}:
            path = segment.path(row)
            alone = new_slot(backend, spec, length + len(path))
            alone.share_prefix(segment.slot, length)
            own, at = qkv[[first + ancestor for ancestor in path]], Batch([Segment(alone, [0] * len(path))])
            cos, sin = list(backend.rope_rows(*tables(spec.head_dim), [spec] * LAYERS, at))[1]
            q = backend.append_rotated(own, spec, cos, sin, at, 1)
            y = backend.attention(q, spec, at, 1)
            assert torch.equal(y[-1], together[first + row]), (length, row)
        plain = Slot(LAYERS, spec.kv_heads, length + len(path), spec.head_dim, torch.float32, torch.device("cpu"))
        plain.k, plain.v = alone.k, alone.v
        plain.length = length
        expected = ReferenceBackend().attention(q, spec, Batch([Segment(plain, [0] * len(path))]), 1)
        assert (y - expected).abs().max() < (2e-5 if on_tiles else 5e-6)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("isa", kernels.instruction_sets())
@pytest.mark.parametrize("shape", SHAPES)
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1, 47, 62, 63, 64, 120, 190]), trees(16), st.booleans()), min_size=1, max_size=3
    ),
    st.sampled_from([1, 3]),
    st.sampled_from(kernels.KV_FORMATS),
)
@settings(max_examples=5)
def test_rows_have_their_bits_in_every_batch(isa, shape, sequences, threads, kv):
    """Batches of trees and chains over slots of any length."""
    spec, backend = spec_of(*shape), CpuBackend(kv)
    with kernels.use_instruction_set(isa):
        segments = []
        for length, parents, tree in sequences:
            slot = filled_slot(backend, spec, length, length + len(parents))
            segments.append(Segment(slot, [0] * len(parents), parents if tree else None))
        check_batch(backend, spec, segments, threads)


@pytest.mark.parametrize("isa", kernels.instruction_sets())
@pytest.mark.parametrize("kv", ["float32", "bfloat16"])
@pytest.mark.parametrize("worst", [float("inf"), float("nan")])
def test_what_is_no_number_stays_with_the_rows_that_see_it(isa, kv, worst):
    """Row 5 of 8 has such a value; rows 6 and 7 go on from row 4 or from row 5."""
    spec, backend = spec_of(4, 2, 64), CpuBackend(kv)
    with kernels.use_instruction_set(isa):
        slot = filled_slot(backend, spec, 60, 68)
        qkv = random_rows(spec, 8)
        clean = attended(backend, spec, qkv, Batch([Segment(slot, [0] * 8, [-1, 0, 1, 2, 3, 4, 4, 6])]))
        values = qkv[5].view(-1, spec.head_dim)[-spec.kv_heads :]
        values[0, 7] = worst
        for parents, seeing in (([-1, 0, 1, 2, 3, 4, 4, 6], {5}), ([-1, 0, 1, 2, 3, 4, 5, 6], {5, 6, 7})):
            y = attended(backend, spec, qkv, Batch([Segment(slot, [0] * 8, parents)]))
            for row in range(8):
                finite = y[row].view(spec.heads, -1).isfinite()
                assert finite[2:].all()  # the other key and value head
                assert finite[:2, 7].any() == (row not in seeing) and finite[:2, :7].all() and finite[:2, 8:].all()
                if row not in seeing:
                    assert torch.equal(y[row], clean[row])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("isa", kernels.instruction_sets())
@pytest.mark.parametrize("kv", kernels.KV_FORMATS)
def test_long_contexts_are_summed_in_the_same_spans_whoever_sums_them(isa, kv):
    """Around multiples of 1024 positions; five threads share the spans of one head, one thread takes them in turn."""
    spec, backend = spec_of(2, 1, 32), CpuBackend(kv)
    tree = [-1, 0, 1, 1, 0, 4, 2, 6]
    with kernels.use_instruction_set(isa):
        for lengths in ((1019,), (1024,), (2043, 3), (2047, 1023)):
            slots = [filled_slot(backend, spec, length, length + 8) for length in lengths]
            for parents in (None, tree):
                segments = [Segment(slot, [0] * 8, parents) for slot in slots]
                for threads in (1, 5):
                    check_batch(backend, spec, segments, threads, most=2 if parents is None else 8)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("isa", kernels.instruction_sets())
def test_large_trees(isa):
    """One path across chunks of keys, many branches, and the end of a prompt with a tree behind it."""
    spec, backend = spec_of(16, 8, 128), CpuBackend()
    with kernels.use_instruction_set(isa):
        slot = filled_slot(backend, spec, 127, 260)
        for parents in ([-1, -1, *range(62)], [-1] + [0] * 63, [*range(-1, 100), 98, 99, 98]):
            check_batch(backend, spec, [Segment(slot, [0] * len(parents), parents)], 2, most=2)


@given(st.integers(0, 130), trees(12), st.data())
@settings(max_examples=20)
def test_a_committed_path_is_where_a_chain_would_have_put_it(length, parents, data):
    spec, backend = spec_of(4, 2, 32), CpuBackend()
    slot, chain = new_slot(backend, spec), new_slot(backend, spec)
    if length:
        attended(backend, spec, random_rows(spec, length), Batch([Segment(slot, [0] * length)]))
        slot.commit(length)
        chain.share_prefix(slot, length)
    segment, qkv = Segment(slot, [0] * len(parents), parents), random_rows(spec, len(parents))
    attended(backend, spec, qkv, Batch([segment]))
    path = segment.path(data.draw(st.integers(0, len(parents) - 1)))
    slot.commit(path)
    attended(backend, spec, qkv[path], Batch([Segment(chain, [0] * len(path))]))
    chain.commit(len(path))
    assert slot.length == chain.length == length + len(path)
    following = random_rows(spec, 3)
    both = [attended(backend, spec, following, Batch([Segment(s, [0] * 3)])) for s in (slot, chain)]
    assert torch.equal(*both)


@pytest.mark.parametrize("kv", kernels.KV_FORMATS)
def test_what_is_kept_of_keys_and_values(kv):
    """float32 to the bit, bfloat16 rounded half to even, int8 within half a step of each head's own scale."""
    spec, backend = spec_of(4, 2, 48), CpuBackend(kv)
    slot, qkv = new_slot(backend, spec, 70), random_rows(spec, 70)
    attended(backend, spec, qkv, Batch([Segment(slot, [0] * 70)]))
    values = qkv.view(70, -1, 48)[:, -2:].transpose(0, 1)
    kept = slot.v[1, :, :70]
    if kv == "int8":
        assert ((kept - values).abs() <= values.abs().amax(-1, keepdim=True) / 127 * 0.5001).all()
    else:
        assert torch.equal(kept, values if kv == "float32" else values.bfloat16().float())
    assert backend.kv_bytes(LAYERS, 2, 48) == {"float32": 1536, "bfloat16": 768, "int8": 416}[kv]
    assert slot.nbytes == 128 * backend.kv_bytes(LAYERS, 2, 48)
    other = new_slot(backend, spec, 66)
    slot.commit(70)
    other.share_prefix(slot, 65)
    assert torch.equal(other.k[1, :, :65], slot.k[1, :, :65])


def test_a_slot_takes_memory_as_its_text_grows():
    """40,000 positions of 28 layers and 8 heads of 128 in float32 would be 9 GB."""

    def resident() -> int:
        with open("/proc/self/statm") as statm:  # noqa: PTH123 (a pseudo-file)
            return int(statm.read().split()[1]) * 4096

    backend = CpuBackend()
    before = resident()
    slots = [backend.new_slot(28, 8, 40_000, 128) for _ in range(16)]
    assert resident() - before < 50 << 20
    assert sum(slot.nbytes for slot in slots) > 100 << 30


def test_slots_refuse_what_they_do_not_hold():
    spec, backend = spec_of(4, 2, 32), CpuBackend()
    slot, other = new_slot(backend, spec, 10), new_slot(backend, spec, 5)
    slot.commit(8)
    with pytest.raises(ValueError, match="cannot commit 3 positions: 8 of 10 are in use"):
        slot.commit(3)
    for wrong in ([1, 0], [0, 2], [-1]):
        with pytest.raises(ValueError, match=r"row -?\d cannot be kept: rows ascend, and 2 positions are free"):
            slot.commit(wrong)
    with pytest.raises(ValueError, match="cannot share 6 positions of 8 with a slot for 5"):
        other.share_prefix(slot, 6)
    slot.rewind(3)
    assert slot.free == 7
    with pytest.raises(ValueError, match="cannot keep 4 positions: 3 are in use"):
        slot.rewind(4)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([(0, 3, None)], "3 tokens do not fit the KV cache: 2 positions are free"),
        ([(-1, 1, None)], "do not fit"),
        ([(0, 0, None)], "0 tokens do not fit"),
        ([(0, 2, [-1, 1])], "a row's parent must come before it"),
        ([(0, 2, [-1, -2])], "a row's parent must come before it"),
        ([(0, 2, [-1])], "2 rows have 1 parents"),
        ([(0, 2, None)] * 2, "the batch has more than 3 rows"),
    ],
)
def test_tables_that_would_leave_memory_are_refused(segments, message):
    memory = kernels.SlotMemory(1, 2, 2, 16)
    table = kernels.Segments(3)
    with pytest.raises(ValueError, match=message):
        table.fill([(memory.pointer, *segment, 0) for segment in segments])
    with pytest.raises(IndexError, match="another number of rows"):
        kernels.attention(torch.randn(2, 2, 16), table, 0, 2, 1.0)


def test_slots_of_different_models_are_refused():
    table = kernels.Segments(100)
    memories = [kernels.SlotMemory(1, heads, 100, 16) for heads in (1, 2)]
    with pytest.raises(ValueError, match="the slots of a batch differ"):
        table.fill([(memory.pointer, 0, 1, None, 1) for memory in memories])
    table.fill([(memories[0].pointer, 0, 65, None, 1)])
    with pytest.raises(IndexError, match="the slots are of another model"):
        kernels.attention(torch.randn(65, 2, 16), table, 1, 1, 1.0)
