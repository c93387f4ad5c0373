"""A replayed pass is the pass that was recorded, bit for bit, whichever sequences its rows belong to."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar import load
from quasar.backends import get_backend
from quasar.backends.base import Batch, Segment, Slot
from quasar.backends.cpu import kernels
from quasar.backends.cpu.backend import CpuBackend
from quasar.backends.cpu.recording import RecordedPass
from quasar.loading import PRECISIONS
from quasar.models.decoder import Decoder
from quasar.models.runtime import Runtime
from tests.conftest import FAMILIES
from tests.helpers.random_models import random_model

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the C kernels were not built")
PROMPT = list(range(100, 150))
GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def filled_slot(runtime: Runtime, capacity: int = 120, prompt: list[int] = PROMPT) -> Slot:
    slot = runtime.new_slot(capacity)
    runtime.prefill(slot, prompt, logits_to_keep=0)
    return slot


def plain(runtime: Runtime, batch: Batch) -> torch.Tensor:
    return runtime.decoder(torch.tensor(batch.ids), batch)


def window(slot: Slot, *ids: int) -> Batch:
    return Batch([Segment(slot, list(ids), logits_to_keep=len(ids))])


@st.composite
def schedules(draw: st.DrawFn) -> list[list[tuple[int, list[int], list[int] | None, int]]]:
    """Passes of a few slots' segments: slot, ids, parents, and how many rows (or which path) are committed."""
    passes = []
    for _ in range(draw(st.integers(2, 4))):
        segments = []
        for slot in draw(st.permutations(range(3)))[: draw(st.integers(1, 3))]:
            ids = draw(st.lists(st.integers(0, 150), min_size=1, max_size=5))
            tree = draw(st.booleans())
            parents = [draw(st.integers(-1, i - 1)) for i in range(len(ids))] if tree else None
            segments.append((slot, ids, parents, draw(st.integers(0, len(ids) - 1))))
        passes.append(segments)
    return passes


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
@given(schedules(), st.sampled_from([1, 2, 3]))
@settings(max_examples=3)
def test_a_row_has_the_logits_of_plain_decoding_in_every_batch(shipped, family, precision, schedule, threads):
    """Recorded and replayed passes over chains and trees of three sequences against single tokens without recording."""
    torch.set_num_threads(threads)
    runtime = Runtime(shipped(family, precision).decoder)
    slots = [filled_slot(runtime, capacity, PROMPT[: 20 * n + 9]) for n, capacity in enumerate((75, 120, 90))]
    for segments in schedule:
        batch = Batch([Segment(slots[n], ids, parents, len(ids)) for n, ids, parents, _ in segments])
        logits = runtime.run(batch).clone()
        assert torch.equal(runtime.run(batch), logits)
        for segment, first, (_, ids, _, kept) in zip(batch.segments, batch.first_rows, segments, strict=False):
            alone = runtime.new_slot(120)
            for row in range(len(ids)):
                alone.share_prefix(segment.slot, segment.slot.length)
                for ancestor in segment.path(row):
                    own = plain(runtime, window(alone, ids[ancestor]))
                    alone.commit(1)
                assert torch.equal(own[0], logits[first + row])
            segment.slot.commit(segment.path(kept))


@pytest.mark.parametrize("isa", kernels.instruction_sets())
def test_every_instruction_set_replays(isa):
    with kernels.use_instruction_set(isa):  # weights are packed for it
        runtime = Runtime(load("tiny-qwen3", device="cpu", precision="w8a8").decoder)
        slot, other = filled_slot(runtime), filled_slot(runtime, prompt=PROMPT[:30])
        runtime.run(window(slot, 1, 2, 3))
        batch = Batch([Segment(other, [7]), Segment(slot, [8, 9], [-1, -1], logits_to_keep=2)])
        assert torch.equal(runtime.run(batch), plain(runtime, batch))


def test_passes_in_bfloat16_replay():
    runtime = Runtime(load("tiny-qwen3", device="cpu", dtype="bfloat16").decoder)
    slot = filled_slot(runtime)
    for ids in ([1, 2, 3], [7, 8, 9]):
        assert torch.equal(runtime.run(window(slot, *ids)), plain(runtime, window(slot, *ids)))
    batch = window(slot, 1, 2)
    names = [name for name, _ in RecordedPass(runtime.decoder, batch).timed_replay(batch)]
    assert names[1:4] == ["add_rms_norm", "round_bf16", "float_linear"]


def test_a_replay_needs_no_python_and_no_new_memory(shipped, monkeypatch):
    runtime = Runtime(shipped("qwen3", "w8a8").decoder)
    slot = filled_slot(runtime)
    first = runtime.run(window(slot, 1, 2, 3))
    expected = first.clone()
    monkeypatch.setattr(Decoder, "forward", lambda *_: pytest.fail("the decoder ran again"))
    runtime.run(window(slot, 4, 5, 6))
    again = runtime.run(window(slot, 1, 2, 3))
    assert again.data_ptr() == first.data_ptr()
    assert torch.equal(again, expected)


def test_only_the_kept_rows_are_computed(shipped):
    runtime = Runtime(shipped("qwen3").decoder)
    slots = [filled_slot(runtime) for _ in range(2)]
    last = Batch([Segment(slots[0], [1, 2, 3, 4], logits_to_keep=2)])
    each = Batch([Segment(slot, [1, 2, 3], logits_to_keep=1) for slot in slots])
    for batch, kept in ((last, 2), (each, 2), (last, 2)):
        logits = runtime.run(batch)
        assert len(logits) == kept
        assert torch.equal(logits, plain(runtime, batch))


def test_one_recording_serves_prompts_beside_windows(shipped, monkeypatch):
    """Whatever rows a pass has, and whichever of them it keeps, few, many or none: nothing is recorded again."""
    runtime = Runtime(shipped("qwen3", "w8a8").decoder)
    slots = [filled_slot(runtime, 700) for _ in range(3)]
    runtime.run(window(slots[0], 1))
    batches = [
        Batch([Segment(slots[0], [1, 2, 3], logits_to_keep=3), Segment(slots[1], list(range(600)), logits_to_keep=0)]),
        Batch([Segment(slots[1], list(range(40))), Segment(slots[0], [4]), Segment(slots[2], list(range(9)))]),
        Batch([Segment(slots[2], list(range(90)), logits_to_keep=0)]),
        window(slots[2], *range(100)),
    ]
    expected = [plain(runtime, batch) for batch in batches]
    monkeypatch.setattr(Decoder, "forward", lambda *_: pytest.fail("the decoder ran again"))
    for batch, logits in zip(batches, expected, strict=True):
        assert torch.equal(runtime.run(batch), logits)


def test_a_recorded_pass_has_the_memory_of_few_operations(shipped):
    """Results take the places of those that no call needs any more."""
    decoder = shipped("qwen3", "w8a8").decoder
    c, rows = decoder.config, 32
    batch = window(CpuBackend().new_slot(c.num_layers, c.num_kv_heads, 60, c.head_dim), *range(rows))
    memory = RecordedPass(decoder, batch).logits.untyped_storage().nbytes()
    one_layer = rows * 4 * (8 * c.hidden_size + 4 * c.intermediate_size + 4 * c.num_heads * c.head_dim)
    assert memory < rows * 4 * c.vocab_size + one_layer


def test_passes_of_very_many_rows_or_logits_run_plainly(shipped, monkeypatch):
    """They would hold much memory; and their rows have the same bits."""
    monkeypatch.setattr("quasar.backends.cpu.recording.LONGEST", 8)
    monkeypatch.setattr("quasar.backends.cpu.recording._MOST_KEPT", 4)
    runtime = Runtime(shipped("qwen3").decoder)
    slot = filled_slot(runtime)
    recorded = runtime.run(window(slot, 1, 2, 3, 4)).clone()
    monkeypatch.setattr(CpuBackend, "capture", lambda *_: pytest.fail("this was to run plainly"))
    assert torch.equal(runtime.run(window(slot, *range(1, 7)))[:4], recorded)
    longer = Batch([Segment(slot, [1, 2, 3, 4], logits_to_keep=4), Segment(filled_slot(runtime), [1] * 9, None, 0)])
    assert torch.equal(runtime.run(longer), recorded)


@pytest.mark.parametrize(("name", "recorded"), [("llm-compressor-static", True), ("msmodelslim-static", False)])
def test_checkpoints_with_static_scales(name, recorded):
    """Symmetric ones are recorded. Those with an offset compute with PyTorch and run plainly, right all the same."""
    runtime = Runtime(load(GOLDEN / name, device="cpu").decoder)
    slot = filled_slot(runtime)
    memory = []
    for ids in ([1, 2], [3, 4], [5, 6]):
        logits = runtime.run(window(slot, *ids))
        assert torch.equal(logits, plain(runtime, window(slot, *ids)))
        memory.append(logits)
    assert (memory[1].data_ptr() == memory[2].data_ptr()) == recorded


def test_ids_beyond_the_vocabulary_are_refused(shipped):
    runtime = Runtime(shipped("qwen3").decoder)
    slot, vocabulary = filled_slot(runtime), runtime.config.vocab_size
    with pytest.raises(IndexError, match="token ids outside of the vocabulary"):
        runtime.run(window(slot, vocabulary, 1))
    runtime.run(window(slot, 1))
    before = slot.k[:, :, :51].clone()
    for wrong in (-1, vocabulary):
        with pytest.raises(IndexError, match="token ids outside of the vocabulary"):
            runtime.run(window(slot, wrong))
    assert torch.equal(slot.k[:, :, :51], before)


def test_a_replay_stays_within_the_slot_and_the_rope_tables(shipped):
    runtime = Runtime(shipped("qwen3").decoder)
    slot = filled_slot(runtime, capacity=53)
    batch = window(slot, 1, 2, 3)
    runtime.run(batch)
    slot.commit(1)
    with pytest.raises(ValueError, match="3 tokens do not fit the KV cache: 2 positions are free"):
        window(slot, 1, 2, 3)
    with pytest.raises(ValueError, match="3 tokens do not fit the KV cache: 2 positions are free"):
        runtime.run(batch)  # made before the slot grew
    c = runtime.config
    longer = runtime.backend.new_slot(c.num_layers, c.num_kv_heads, c.max_position_embeddings + 8, c.head_dim)
    longer.length = c.max_position_embeddings - 2
    for run in (runtime.run, lambda batch: plain(runtime, batch)):
        with pytest.raises(IndexError, match="positions beyond the rope tables"):
            run(window(longer, 1, 2, 3))
    other_model = runtime.backend.new_slot(c.num_layers + 1, 2 * c.num_kv_heads, 60, c.head_dim)
    with pytest.raises(IndexError, match="the slots are of another model"):
        runtime.run(window(other_model, 1, 2, 3))


def test_more_threads_than_a_recording_has_room_for(shipped):
    runtime = Runtime(shipped("qwen3", "w8a8").decoder)
    slot = filled_slot(runtime)
    recorded = RecordedPass(runtime.decoder, window(slot, 1, 2, 3))
    expected = recorded.logits.clone()
    recorded._recording._threads = 1000
    assert torch.equal(recorded.replay(window(slot, 1, 2, 3)), expected)


def test_one_recording_at_a_time():
    first, second = kernels.recording(1), kernels.recording(1)
    with first, pytest.raises(RuntimeError, match="recording already"), second:
        pass


def test_recordings_go_with_their_runtime():
    runtime = Runtime(random_model("qwen3", backend=get_backend("cpu")).decoder)
    runtime.run(window(filled_slot(runtime), 1, 2))
    alive = weakref.ref(runtime.decoder.layers[0].qkv.packed.tensor)
    assert alive() is not None
    del runtime
    gc.collect()
    assert alive() is None


def test_inputs_that_are_padded_anew_are_not_recorded():
    weight = kernels.PackedInt8(torch.ones(4, 6, dtype=torch.int8), torch.ones(4))
    x, scale = torch.ones(2, 6, dtype=torch.int8), torch.ones(2)
    with pytest.raises(NotImplementedError, match="inputs of 6 are padded"), kernels.recording(2):
        kernels.int8_linear(x, scale, weight)
    assert kernels.int8_linear(x, scale, weight).tolist() == [[6.0] * 4] * 2


def test_replays_report_the_time_of_each_call(shipped):
    runtime = Runtime(shipped("openpangu", "w8a8").decoder)
    slot = filled_slot(runtime)
    batch = window(slot, 1, 2)
    calls = RecordedPass(runtime.decoder, batch).timed_replay(batch)
    assert all(seconds > 0 for _, seconds in calls)
    wide = ["digits", "int8_linear"]
    layer = ["add_rms_norm", *wide, "rope_qk_append", "attention", "quantize", "int8_linear"]
    layer += ["add_rms_norm", "int8_linear", "swiglu", *wide]
    head = ["keep_rows", "keep_rows", "add_rms_norm", "float_linear"]
    assert [name for name, _ in calls] == ["embed", *layer * runtime.config.num_layers, *head]
