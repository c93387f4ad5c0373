"""A replayed window is the pass that was recorded, bit for bit, wherever it stands and whatever the drafts did."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar import load
from quasar.backends import get_backend
from quasar.backends.base import KVCache, WindowPass
from quasar.backends.cpu import kernels
from quasar.loading import PRECISIONS
from quasar.models.decoder import Decoder
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


def filled_cache(decoder: Decoder, capacity: int = 120) -> KVCache:
    decoder.pack()
    cache = decoder.new_cache(capacity)
    decoder.prefill(PROMPT, cache, keep=0)
    return cache


def windows(decoder: Decoder, cache: KVCache) -> WindowPass:
    return decoder.backend.window_pass(decoder, cache)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=8),
    st.integers(0, 2**31),
    st.sampled_from([1, 2, 3]),
)
@settings(max_examples=10, deadline=None)
def test_replayed_windows_have_the_bits_of_plain_passes(shipped, family, precision, steps, seed, threads):
    """Windows of several sizes, of which any part is kept: the second time a size comes, it is replayed."""
    torch.set_num_threads(threads)
    decoder = shipped(family, precision).decoder
    replayed, plain = filled_cache(decoder), filled_cache(decoder)
    run, g = windows(decoder, replayed), torch.Generator().manual_seed(seed)
    for (size, kept), _ in itertools.product(steps, range(2)):
        ids = torch.randint(0, decoder.config.vocab_size, (size,), generator=g)
        if size > plain.free:
            return
        assert torch.equal(run(ids.tolist(), size), decoder(ids, plain, size))
        for cache in (replayed, plain):
            cache.commit(min(size, kept))
        assert torch.equal(replayed.k, plain.k)
        assert torch.equal(replayed.v, plain.v)


@pytest.mark.parametrize("isa", kernels.instruction_sets())
def test_every_instruction_set_replays(shipped, isa):
    decoder = shipped("qwen3", "w8a8").decoder
    run, plain = windows(decoder, filled_cache(decoder)), filled_cache(decoder)
    with kernels.use_instruction_set(isa):
        run([1, 2, 3], 3)
        assert torch.equal(run([7, 8, 9], 3), decoder(torch.tensor([7, 8, 9]), plain, 3))


def test_windows_in_bfloat16_replay():
    decoder = load("tiny-qwen3", device="cpu", dtype="bfloat16").decoder
    run, plain = windows(decoder, filled_cache(decoder)), filled_cache(decoder)
    for ids in ([1, 2, 3], [7, 8, 9]):
        assert torch.equal(run(ids, 3), decoder(torch.tensor(ids), plain, 3))
    cache = filled_cache(decoder)
    with kernels.recording(cache.k, cache.v) as recording:
        decoder(torch.tensor([1, 2]), cache, keep=2)
    names = [name for name, _ in recording.timed_replay(50, cache.k, cache.v)]
    assert names[1:4] == ["add_rms_norm", "round_bf16", "float_linear"]


def test_a_replay_needs_no_python_and_no_new_memory(shipped, monkeypatch):
    decoder = shipped("qwen3", "w8a8").decoder
    run = windows(decoder, filled_cache(decoder))
    first = run([1, 2, 3], 3)
    expected = first.clone()
    monkeypatch.setattr(Decoder, "forward", lambda *_: pytest.fail("the decoder ran again"))
    run([4, 5, 6], 3)
    again = run([1, 2, 3], 3)
    assert again.data_ptr() == first.data_ptr()
    assert torch.equal(again, expected)


def test_a_recording_holds_the_results_of_few_operations(shipped):
    decoder = shipped("qwen3", "w8a8").decoder
    ids, cache = torch.arange(6), filled_cache(decoder)
    with kernels.recording(cache.k, cache.v) as recording:
        decoder(ids, cache, keep=6)
    c = decoder.config
    one_layer = 6 * 4 * (8 * c.hidden_size + 4 * c.intermediate_size + 4 * c.num_heads * c.head_dim)
    assert recording.buffers.nbytes < 6 * 4 * c.vocab_size + one_layer


@pytest.mark.parametrize(("name", "recorded"), [("llm-compressor-static", True), ("msmodelslim-static", False)])
def test_checkpoints_with_static_scales(name, recorded):
    """Symmetric ones are recorded. Those with an offset compute with PyTorch and run plainly, right all the same."""
    decoder = load(GOLDEN / name, device="cpu").decoder
    run, plain = windows(decoder, filled_cache(decoder)), filled_cache(decoder)
    same_memory = []
    for ids in ([1, 2], [3, 4], [5, 6]):
        logits = run(ids, 2)
        assert torch.equal(logits, decoder(torch.tensor(ids), plain, 2))
        same_memory.append(logits)
    assert (same_memory[1].data_ptr() == same_memory[2].data_ptr()) == recorded


def test_ids_beyond_the_vocabulary_are_refused(shipped):
    decoder = shipped("qwen3").decoder
    cache = filled_cache(decoder)
    run = windows(decoder, cache)
    with pytest.raises(IndexError, match="token ids outside of the vocabulary"):
        run([decoder.config.vocab_size, 1], 2)
    run([1], 1)
    before = cache.k.clone()
    for wrong in (-1, decoder.config.vocab_size):
        with pytest.raises(IndexError, match="token ids outside of the vocabulary"):
            run([wrong], 1)
    assert torch.equal(cache.k, before)


def test_a_window_beyond_the_cache_is_refused(shipped):
    decoder = shipped("qwen3").decoder
    cache = filled_cache(decoder, capacity=53)
    run = windows(decoder, cache)
    run([1, 2, 3], 3)
    cache.commit(1)
    with pytest.raises(ValueError, match="3 tokens do not fit the KV cache: 2 positions are free"):
        run([1, 2, 3], 3)


def test_one_recording_at_a_time():
    cache = torch.zeros(1, 1, 1, 16)
    first, second = kernels.recording(cache, cache), kernels.recording(cache, cache)
    with first, pytest.raises(RuntimeError, match="recording already"), second:
        pass


def test_a_recording_serves_other_caches_of_any_capacity(shipped):
    decoder = shipped("qwen3", "w8a8").decoder
    caches = [filled_cache(decoder, capacity) for capacity in (60, 200, 75)]
    expected = decoder(torch.tensor([5, 6, 7]), filled_cache(decoder), 3)
    for cache in caches * 2:
        assert torch.equal(windows(decoder, cache)([5, 6, 7], 3), expected)
        assert torch.equal(cache.k[:, :, 50:53], caches[0].k[:, :, 50:53])


def test_recordings_go_with_their_decoder():
    model = random_model("qwen3", backend=get_backend("cpu"))
    windows(model.decoder, filled_cache(model.decoder))([1, 2], 2)
    alive = weakref.ref(model.decoder.layers[0].qkv.packed.tensor)
    assert alive() is not None
    del model
    gc.collect()
    assert alive() is None


def test_threads_have_recordings_of_their_own(shipped):
    decoder = shipped("qwen3", "w8a8").decoder
    run = windows(decoder, filled_cache(decoder))
    here = [run([5, 6], 2).data_ptr() for _ in range(2)]
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(run, [5, 6], 2).result()
        assert there.data_ptr() not in here


def test_inputs_that_are_padded_anew_are_not_recorded():
    weight = kernels.PackedInt8(torch.ones(4, 6, dtype=torch.int8), torch.ones(4))
    x, scale, cache = torch.ones(2, 6, dtype=torch.int8), torch.ones(2), torch.zeros(1, 1, 1, 16)
    with pytest.raises(NotImplementedError, match="inputs of 6 are padded"), kernels.recording(cache, cache):
        kernels.int8_linear(x, scale, weight)
    assert kernels.int8_linear(x, scale, weight).tolist() == [[6.0] * 4] * 2


def test_replays_report_the_time_of_each_call(shipped):
    decoder = shipped("openpangu", "w8a8").decoder
    ids, cache = torch.arange(2), filled_cache(decoder)
    with kernels.recording(cache.k, cache.v) as recording:
        decoder(ids, cache, keep=2)
    calls = recording.timed_replay(50, cache.k, cache.v)
    assert all(seconds > 0 for _, seconds in calls)
    layer = ["add_rms_norm", "int8_linear", "rope_qk_append", "attention", "quantize", "int8_linear"]
    layer += ["add_rms_norm", "int8_linear", "swiglu", "int8_linear"]
    assert [name for name, _ in calls] == ["embed", *layer * decoder.config.num_layers, "add_rms_norm", "float_linear"]
