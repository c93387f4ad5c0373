"""Whole passes of the CUDA backend: the reference's numbers, windows that equal steps, nothing that a graph refuses."""

from __future__ import annotations

import gc
import logging
import weakref
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quasar import Model, generate
from quasar.backends.base import KVCache
from quasar.backends.reference import ReferenceBackend
from quasar.models.decoder import Decoder
from quasar_gpu import cache as cache_module
from quasar_gpu import graphs
from quasar_gpu.backend import CudaBackend
from quasar_gpu.cache import CudaCache, reach_bucket
from quasar_gpu.kernels import attention as attention_kernels
from tests.conftest import FAMILIES
from tests.gpu.launches import ViewsOnly, record, recorded_launches
from tests.helpers.moving import PlainInt4, make_static, moved
from tests.helpers.random_models import random_model

PROMPT = [1, 5, 9, 2, 5, 9, 2, 5]
A_LAYER = {"full": 10, "w8a8": 10, "w4a16": 11, "w4a4": 15}  # launches; int4 rotates, and quantises by itself
PRECISIONS = tuple(A_LAYER)
# The interpreter takes milliseconds for each program of a grid, and of those there is one for each row and head.
SIZES = {"vocab_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 200, "hidden_size": 32}
SIZES |= {"intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(autouse=True)
def _quick(kernel_device, monkeypatch):
    """Attention's reach doubles early; and the interpreter does not loop over what is masked."""
    monkeypatch.setattr(cache_module, "_LEAST_REACH", 128)
    if kernel_device.type == "cpu":
        monkeypatch.setattr(attention_kernels, "_UNROLLED", 1)


@cache
def master(family: str, precision: str) -> Model:
    """On the reference backend: "full", "w8a8", "w8a8-static", "w4a16" or "w4a4"."""
    model = random_model(family, precision.partition("-")[0], backend=PlainInt4(), **SIZES)
    if precision == "w8a8-static":
        make_static(model.decoder, PROMPT)
    return model


def on(family: str, precision: str, backend: CudaBackend | ReferenceBackend) -> Model:
    model = master(family, precision)
    decoder = moved(model.decoder, backend)
    decoder.pack()
    return replace(model, decoder=decoder)


def behind(decoder: Decoder, length: int, room: int = 40) -> KVCache:
    """A cache whose first `length` positions are random."""
    new = decoder.new_cache(length + room)
    generator = torch.Generator().manual_seed(0)
    for half in (new.k, new.v):
        shape = (*half.shape[:2], length, half.shape[3])
        half[:, :, :length] = torch.randn(shape, generator=generator).to(half.dtype)
    new.length = length
    return new


def window(decoder: Decoder, cache: KVCache, ids: list[int], keep: int | None = None) -> Tensor:
    return decoder.backend.window_pass(decoder, cache)(ids, len(ids) if keep is None else keep).cpu().clone()


# The numbers.


@pytest.mark.parametrize("precision", [*PRECISIONS, "w8a8-static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_logits_are_the_reference_backends(kernel_device, family, precision):
    """A prompt longer than a window, behind some context, then a window."""
    cuda, reference = (
        on(family, precision, backend).decoder for backend in (CudaBackend(kernel_device, torch.float32), PlainInt4())
    )
    ids = [i * 7 % 96 for i in range(20)]
    found = []
    for decoder in (cuda, reference):
        cache = behind(decoder, 5)
        prompt = decoder.prefill(ids, cache, keep=20).cpu()
        found.append(torch.cat([prompt, window(decoder, cache, [3, 1, 4])]))
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0].argmax(dim=-1), found[1].argmax(dim=-1))
    # Quantised activations near a tie round otherwise when a norm differs in its last place.
    exact = precision in ("full", "w4a16")
    torch.testing.assert_close(*found, rtol=0, atol=(1e-4 if exact else 2e-2) * found[1].abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_as_near_to_float32_as_the_reference_backends(kernel_device, dtype):
    exact = on("qwen3", "full", ReferenceBackend()).decoder
    ids = [i * 7 % 96 for i in range(20)]

    def errors(decoder: Decoder) -> Tensor:
        mine, right = decoder.new_cache(40), exact.new_cache(40)
        both = [
            torch.cat([d.prefill(ids, c, keep=20).cpu(), window(d, c, [3, 1, 4])])
            for d, c in ((decoder, mine), (exact, right))
        ]
        return (both[0] - both[1]).square().mean()

    cuda, reference = CudaBackend(kernel_device, dtype), ReferenceBackend(dtype=dtype)
    assert errors(on("qwen3", "full", cuda).decoder) < 1.3 * errors(on("qwen3", "full", reference).decoder)


@pytest.mark.parametrize(("family", "precision"), [("qwen3", "w8a8"), ("openpangu", "full")])
def test_ids_with_drafts_are_the_plain_ones_and_the_reference_backends(kernel_device, family, precision):
    settings = {"max_new_tokens": 8, "ignore_eos": True}
    expected = generate(master(family, precision), PROMPT, draft="none", **settings).result().token_ids
    model = on(family, precision, CudaBackend(kernel_device, torch.float32))
    drafted = generate(model, PROMPT, gamma=3, **settings).result()
    assert drafted.token_ids == expected
    assert drafted.stats.passes < 7  # some drafts were right
    assert generate(model, PROMPT, draft="none", **settings).result().token_ids == expected


@pytest.mark.parametrize(
    ("precision", "dtype"), [("full", torch.bfloat16), ("w8a8", torch.float32), ("w4a4", torch.bfloat16)]
)
def test_a_row_does_not_depend_on_the_window_around_it(kernel_device, precision, dtype):
    """Windows that end on both sides of where attention's reach doubles, against single steps: the same bits."""
    decoder = on("qwen3", precision, CudaBackend(kernel_device, dtype)).decoder
    ids = [i * 11 % 96 for i in range(6)]
    steps, windows = behind(decoder, 124), behind(decoder, 124)
    alone = []
    for token in ids:
        alone.append(window(decoder, steps, [token]))
        steps.commit(1)
    together = []
    for part in (ids[:2], ids[2:]):  # up to 126, 130
        together.append(window(decoder, windows, part))
        windows.commit(len(part))
    assert reach_bucket(126) < reach_bucket(130)
    assert torch.equal(torch.cat(alone), torch.cat(together))
    assert torch.equal(steps.k[:, :, :130], windows.k[:, :, :130])


# What a graph may hold.


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_pass_is_launches_on_the_same_memory_and_nothing_else(kernel_device, family, precision):
    """No allocation, no waiting, no shape or number that depends on tokens or position."""
    if kernel_device.type == "cuda":
        pytest.skip("a card's own capture refuses all this")
    decoder = on(family, precision, CudaBackend(kernel_device, torch.bfloat16)).decoder
    cache = behind(decoder, 30)
    ids = cache.write_window([3, 1, 4])
    decoder(ids, cache, 3)  # takes the buffers
    passes = []
    for tokens in ([3, 1, 4], [1, 5, 9]):
        cache.write_window(tokens)
        with recorded_launches() as launches, ViewsOnly():
            decoder(ids, cache, 3)
        passes.append([launch.frozen for launch in launches])
        cache.commit(3)
    assert passes[0] == passes[1]
    assert len(passes[0]) == 1 + 2 * A_LAYER[precision] + 2  # embedding, two layers, norm, lm_head


def test_the_guard_refuses_what_a_graph_refuses():
    x = torch.ones(4)
    for refused in (lambda: x + 1, lambda: x.add_(1), lambda: x.sum().item(), lambda: x[x > 0], lambda: torch.empty(2)):
        with pytest.raises(AssertionError, match="in a window pass"), ViewsOnly():
            refused()
    with ViewsOnly():
        assert x.view(2, 2)[1:].shape == (1, 2)


@pytest.fixture
def recording(kernel_device, monkeypatch):
    """Graphs on the CPU: recorded launches. On a card, its own."""
    if kernel_device.type == "cpu":
        monkeypatch.setattr(graphs, "capture", record)
    monkeypatch.setattr(CudaBackend, "graphs", True)

    def backend(dtype: torch.dtype = torch.bfloat16) -> CudaBackend:
        made = CudaBackend(kernel_device, dtype)
        made.graphs = True
        return made

    return backend


def captured(cache: CudaCache, decoder: Decoder) -> dict:
    return cache.memory.captured[decoder].graphs


def test_replayed_windows_are_plain_ones(recording):
    """At other positions and with other tokens than those that were captured, over a doubling of the reach."""
    decoder = on("qwen3", "w8a8", recording()).decoder
    with_graphs, plain = behind(decoder, 119), behind(decoder, 119)
    run = decoder.backend.window_pass(decoder, with_graphs)
    for i in range(6):  # 119, 122, 125, 128, 131, 134
        ids = [i, 30 + i, 60 + i]
        found = run(ids, 2).clone()
        expected = decoder(torch.tensor(ids, device=decoder.backend.device), plain, 2)
        assert torch.equal(found, expected), i
        with_graphs.commit(3)
        plain.commit(3)
    assert torch.equal(with_graphs.k[:, :, :137], plain.k[:, :, :137])
    kinds = captured(with_graphs, decoder)
    assert list(kinds) == [(3, 2, 128), (3, 2, 256)]
    assert all(graph is not None for graph in kinds.values())


def test_qspec_says_what_its_verifier_says(recording):
    """Drafts in W4A4 and windows in W4A16 over one copy of the weights and one cache, each with graphs of its own."""
    settings = {"max_new_tokens": 6, "ignore_eos": True}
    model = on("qwen3", "w4a16", recording())
    drafted = generate(model, PROMPT, draft="self:w4a4", gamma=2, **settings).result()
    assert drafted.stats.passes < 5  # some drafts were right
    assert drafted.token_ids == generate(model, PROMPT, draft="none", **settings).result().token_ids


def test_graphs_and_memory_go_to_the_next_generation(recording):
    model = on("openpangu", "full", recording())
    settings = {"max_new_tokens": 6, "draft": "none", "ignore_eos": True}
    first = generate(model, PROMPT, **settings).result()
    memories = model.decoder.backend._pool._memories
    made = dict(memories[0].captured[model.decoder].graphs)
    assert any(made.values())
    second = generate(model, PROMPT, **settings).result()
    assert second.token_ids == first.token_ids
    assert len(memories) == 1
    for kind, graph in made.items():
        assert graph is None or memories[0].captured[model.decoder].graphs[kind] is graph


def test_memory_in_use_is_never_shared(recording):
    backend = recording()
    first, second = backend.new_cache(1, 1, 10, 16), backend.new_cache(1, 1, 10, 16)
    assert first.memory is not second.memory
    kept = first.memory.k.data_ptr()
    del first
    assert backend.new_cache(1, 1, 200, 16).memory.k.data_ptr() == kept
    assert backend.new_cache(1, 1, 300, 16).capacity == 300  # for which there was none
    assert len(backend._pool._memories) == 2  # what did not fit was let go


def test_everything_goes_with_the_model(recording):
    """By reference counts alone: a card's memory must not wait for the garbage collector."""
    model = on("qwen3", "w8a8", recording())
    generate(model, PROMPT, max_new_tokens=4, draft="none", ignore_eos=True).result()
    decoder, backend = model.decoder, model.decoder.backend
    (memory,) = backend._pool._memories
    assert any(memory.captured[decoder].graphs.values())
    gone = [weakref.ref(thing) for thing in (decoder, backend, memory, memory.k, decoder.cos)]
    gc.disable()
    try:
        del model, decoder, backend, memory
        assert [ref() for ref in gone] == [None] * 5
    finally:
        gc.enable()


def test_a_second_decoder_has_graphs_of_its_own(recording):
    """Which go when it goes, while the cache's memory stays."""
    backend = recording()
    decoders = [on("qwen3", "full", backend).decoder, on("qwen3", "w8a8", backend).decoder]
    cache = behind(decoders[0], 20)
    logits = []
    for decoder in decoders:
        run = backend.window_pass(decoder, cache)
        for _ in range(3):
            logits.append(run([1, 2], 2).clone())
    assert torch.equal(logits[1], logits[2])
    assert torch.equal(logits[4], logits[5])
    assert not torch.equal(logits[2], logits[5])
    assert len(cache.memory.captured) == 2
    del decoders, decoder, run
    assert len(cache.memory.captured) == 0


def test_where_capture_fails_windows_go_on_with_one_warning(recording, monkeypatch, caplog):
    def refused(*args: object) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more lines")

    monkeypatch.setattr(graphs, "capture", refused)
    model = on("openpangu", "full", recording())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert len(generate(model, PROMPT, max_new_tokens=4, draft="none").result().token_ids) == 4
    assert [record.message for record in caplog.records] == [
        "CUDA graph capture failed (CUDA error: operation not permitted when stream is capturing); "
        "windows run without graphs, slower"
    ]


def test_windows_are_checked_before_they_are_replayed(recording):
    decoder = on("qwen3", "full", recording()).decoder
    cache = behind(decoder, 5, room=4)
    run = decoder.backend.window_pass(decoder, cache)
    for _ in range(3):
        run([1, 2, 3, 4], 1)
    cache.commit(1)
    with pytest.raises(ValueError, match="4 tokens do not fit the KV cache: 3 positions are free"):
        run([1, 2, 3, 4], 1)


def test_longer_windows_than_the_kernels_take_run_as_prompts_do(recording):
    decoder = on("qwen3", "full", recording(torch.float32)).decoder
    cache, plain = behind(decoder, 5), behind(decoder, 5)
    ids = [i * 7 % 96 for i in range(18)]
    assert torch.equal(decoder.backend.window_pass(decoder, cache)(ids, 18), decoder.prefill(ids, plain, keep=18))
