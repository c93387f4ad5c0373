"""Passes over many sequences: each has the rows that it has alone, launched plainly or captured, chains and trees."""

from functools import cache

import pytest
import torch
from emulated_npu import counting
from fused_rounding import FusedRounding
from npu_models import on_backend

from quasar.backends import get_backend
from quasar.backends.base import Batch, Segment
from quasar.backends.capture import CapturedPasses

PROMPTS = ([1, 2, 3], list(range(5, 140)), [9] * 7, [4, 5])
WINDOWS = ([5, 6, 7], [8, 9, 10, 11, 12], [3], [1, 2])
TREE = [-1, 0, 0, 1, 2, 1]  # of six rows


@cache
def decoder_on(backend_name, family, precision):
    backend = get_backend("npu") if backend_name == "npu" else FusedRounding("cpu", torch.bfloat16)
    return on_backend(family, precision, backend).decoder


def slots_of(decoder, prompts=PROMPTS, room=64):
    """A slot for each prompt, with the prompt committed."""
    c, slots = decoder.config, []
    for ids in prompts:
        slot = decoder.backend.new_slot(c.num_layers, c.num_kv_heads, len(ids) + room, c.head_dim)
        decoder(torch.tensor(ids, device=decoder.backend.device), Batch([Segment(slot, ids, logits_to_keep=0)]))
        slot.commit(len(ids))
        slots.append(slot)
    return slots


def run(decoder, batch):
    return decoder(torch.tensor(batch.ids, device=decoder.backend.device), batch).cpu()


def windows(slots, parents=None):
    return [
        Segment(slot, ids, logits_to_keep=len(ids)) if parents is None else Segment(slot, [7] * 6, parents, 6)
        for slot, ids in zip(slots, WINDOWS, strict=True)
    ]


@pytest.mark.parametrize("precision", ["full", "w8a8"])
@pytest.mark.parametrize("family", ["openpangu", "qwen3"])
@pytest.mark.parametrize("parents", [None, TREE], ids=["chains", "trees"])
def test_a_batch_says_what_its_sequences_say_alone(family, precision, parents):
    npu, oracle = decoder_on("npu", family, precision), decoder_on("oracle", family, precision)
    slots = slots_of(npu)
    together = run(npu, Batch(windows(slots, parents)))
    alone = torch.cat([run(npu, Batch([segment])) for segment in windows(slots, parents)])
    assert torch.equal(together, alone)
    expected = run(oracle, Batch(windows(slots_of(oracle), parents)))
    assert torch.equal(together, expected)


@pytest.mark.parametrize("parents", [None, TREE], ids=["chains", "trees"])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_captured_pass_says_what_a_plain_one_says(count, parents):
    npu = decoder_on("npu", "openpangu", "w8a8")
    slots = slots_of(npu)[:count]
    passes = CapturedPasses(npu.backend, npu)
    for step in range(4):
        batch = Batch(
            [
                Segment(slot, [step + i for i in ids], logits_to_keep=1 + (step + place) % len(ids))
                if parents is None
                else Segment(slot, [step + 7] * (6 - place % 2), parents[: 6 - place % 2], 3)
                for place, (slot, ids) in enumerate(zip(slots, WINDOWS, strict=False))
            ]
        )
        expected = run(npu, batch)
        before = [(slot.k.cpu(), slot.v.cpu()) for slot in slots]
        with counting() as counts:
            logits = passes.run(batch).cpu()
        assert torch.equal(logits, expected)
        assert counts.graph_replays == (step >= 1)  # plainly once, then captured and replayed
        for slot, (keys, values) in zip(slots, before, strict=True):
            assert torch.equal(slot.k.cpu(), keys)
            assert torch.equal(slot.v.cpu(), values)
        for slot, segment in zip(slots, batch.segments, strict=True):
            slot.commit(1 if parents is None else [0, 2][: len(segment.ids)])
    assert counts.total_launches <= 1  # the rows that are kept


def test_a_captured_pass_serves_other_sequences():
    npu = decoder_on("npu", "openpangu", "w8a8")
    passes, (a, b, *_) = CapturedPasses(npu.backend, npu), slots_of(npu, ([1, 2, 3], [7, 8, 9, 10]))
    for slot in (a, a, b):
        batch = Batch([Segment(slot, [5, 6, 7], logits_to_keep=3)])
        expected = run(npu, batch)
        with counting() as counts:
            assert torch.equal(passes.run(batch).cpu(), expected)
    assert counts.graph_replays == 1
    assert counts.total_launches == 0
    assert counts.host_to_device == 1


def test_a_context_that_grows_gets_a_larger_bucket():
    npu = decoder_on("npu", "openpangu", "w8a8")
    (slot,) = slots_of(npu, ([3] * 120,), room=200)
    passes = CapturedPasses(npu.backend, npu)
    keys = set()
    for step in range(8):
        batch = Batch([Segment(slot, [step, 6, 7, 8], logits_to_keep=4)])
        keys.add(npu.backend.pass_key(batch).keys)
        expected = run(npu, batch)
        assert torch.equal(passes.run(batch).cpu(), expected)
        slot.commit(4)
    assert keys == {128, 256}


def test_sequences_in_different_arenas_still_share_a_pass():
    """Where the first arena is full a further one is made: attention and cache then go arena by arena."""
    npu = decoder_on("npu", "qwen3", "w8a8")
    c, few = npu.config, slots_of(npu, ([1, 2, 3],), room=64)
    large = npu.backend.new_slot(c.num_layers, c.num_kv_heads, 40 * 128, c.head_dim)
    run(npu, Batch([Segment(large, [1, 2, 3], logits_to_keep=0)]))
    large.commit(3)
    assert few[0].arena is not large.arena
    batch = Batch([Segment(slot, [5, 6], logits_to_keep=2) for slot in (few[0], large)])
    assert npu.backend.pass_key(batch) is None
    logits = run(npu, batch)
    assert torch.equal(logits[:2], logits[2:])


def test_blocks_come_back_when_a_sequence_ends():
    npu = decoder_on("npu", "openpangu", "w8a8")
    (slot,) = slots_of(npu, ([1, 2, 3],))
    arena, blocks = slot.arena, slot.blocks
    free = arena.free
    del slot
    assert arena.free == free + len(blocks)


def test_a_prefix_is_shared_and_a_path_is_kept():
    npu = decoder_on("npu", "openpangu", "w8a8")
    (slot,) = slots_of(npu, (list(range(200)),))
    c = npu.config
    other = npu.backend.new_slot(c.num_layers, c.num_kv_heads, 300, c.head_dim)
    other.share_prefix(slot, 150)
    assert other.length == 150
    assert torch.equal(other.k[:, :, :150].cpu(), slot.k[:, :, :150].cpu())
    assert torch.equal(other.v[:, :, :150].cpu(), slot.v[:, :, :150].cpu())
    slot.rewind(126)  # a path of a tree that lies across a border of blocks
    run(npu, Batch([Segment(slot, [1, 2, 3, 4, 5, 6], TREE, 6)]))
    before = slot.k.cpu()
    slot.commit([0, 2, 4])
    assert slot.length == 129
    assert torch.equal(slot.k[:, :, 126:129].cpu(), before[:, :, [126, 128, 130]])
    with pytest.raises(ValueError, match="cannot share 200 positions of 129"):
        other.share_prefix(slot, 200)
