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
LAYERS, CAPACITY = 2, 260
SHAPES = [(4, 2, 32), (5, 1, 48), (2, 2, 16), (16, 8, 128)]


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
    angles = torch.arange(CAPACITY)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
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


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("isa", kernels.instruction_sets())
@pytest.mark.parametrize("shape", SHAPES)
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1, 47, 62, 63, 64, 120, 190]), trees(), st.booleans()), min_size=1, max_size=4
    ),
    st.sampled_from([1, 3]),
)
@settings(max_examples=6, deadline=None)
def test_rows_of_a_tree_have_the_bits_of_chains(isa, shape, segments, threads):
    """Batches of trees and chains over slots of any length, against each row alone with its ancestors; and within
    5e-6 of the reference."""
    torch.set_num_threads(threads)
    spec, fast, reference = spec_of(*shape), CpuBackend(), ReferenceBackend()
    with kernels.use_instruction_set(isa):
        slots, theirs, rows = [], [], []
        for length, parents, _ in segments:
            prompt = random_rows(spec, length)
            for backend, made in ((fast, slots), (reference, theirs)):
                slot = new_slot(backend, spec, length + len(parents) + len(made))
                if length:
                    attended(backend, spec, prompt, Batch([Segment(slot, [0] * length)]))
                    slot.commit(length)
                made.append(slot)
            rows.append(random_rows(spec, len(parents)))

        def batch(of: list[Slot]) -> Batch:
            return Batch(
                [
                    Segment(slot, [0] * len(parents), parents if tree else None)
                    for slot, (_, parents, tree) in zip(of, segments, strict=True)
                ]
            )

        together = attended(fast, spec, torch.cat(rows), batch(slots))
        assert (together - attended(reference, spec, torch.cat(rows), batch(theirs))).abs().max() < 5e-6
        first = 0
        for segment, qkv in zip(batch(slots).segments, rows, strict=True):
            for row in range(len(qkv)):
                path = segment.path(row)
                alone = new_slot(fast, spec)
                alone.share_prefix(segment.slot, segment.slot.length)
                own = attended(fast, spec, qkv[path], Batch([Segment(alone, [0] * len(path))]))
                assert torch.equal(own[-1], together[first + row])
            first += len(qkv)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("isa", kernels.instruction_sets())
def test_large_trees(isa):
    """One path across chunks of keys, many branches, and the end of a prompt with a tree behind it."""
    spec, backend = spec_of(16, 8, 128), CpuBackend()
    torch.set_num_threads(2)
    slot, alone = new_slot(backend, spec), new_slot(backend, spec)
    with kernels.use_instruction_set(isa):
        attended(backend, spec, random_rows(spec, 127), Batch([Segment(slot, [0] * 127)]))
        slot.commit(127)
        for parents in ([-1, -1, *range(62)], [-1] + [0] * 63, [*range(-1, 100), 98, 99, 98]):
            qkv, segment = random_rows(spec, len(parents)), Segment(slot, [0] * len(parents), parents)
            y = attended(backend, spec, qkv, Batch([segment]))
            for row in (0, 1, 62, len(parents) - 1):
                path = segment.path(row)
                alone.share_prefix(slot, 127)
                chain = attended(backend, spec, qkv[path], Batch([Segment(alone, [0] * len(path))]))
                assert torch.equal(chain[-1], y[row])


@given(st.integers(0, 130), trees(12), st.data())
@settings(max_examples=20, deadline=None)
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
        table.fill([(memory.pointer, *segment) for segment in segments])
    with pytest.raises(IndexError, match="another number of rows"):
        kernels.attention(torch.randn(2, 2, 16), table, 0, 2, 1.0)


def test_slots_of_different_models_are_refused():
    table = kernels.Segments(100)
    memories = [kernels.SlotMemory(1, heads, 100, 16) for heads in (1, 2)]
    with pytest.raises(ValueError, match="the slots of a batch differ"):
        table.fill([(memory.pointer, 0, 1, None) for memory in memories])
    table.fill([(memories[0].pointer, 0, 65, None)])
    with pytest.raises(IndexError, match="the slots are of another model"):
        kernels.attention(torch.randn(65, 2, 16), table, 1, 1, 1.0)
