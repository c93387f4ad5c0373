"""The decoder against transformers, on random small checkpoints that transformers saved."""

from pathlib import Path

import pytest
import torch

from quasar.backends import get_backend
from quasar.checkpoints import open_checkpoint
from quasar.models.config import read_config
from quasar.models.decoder import PREFILL_CHUNK, Decoder
from quasar.models.loader import build_decoder
from tests.conftest import FAMILIES, random_transformer, save_checkpoint


def load_decoder(folder: Path, dtype: torch.dtype) -> Decoder:
    decoder = build_decoder(read_config(folder), open_checkpoint(folder), get_backend("reference", dtype))
    decoder.pack()
    return decoder


@pytest.fixture(params=FAMILIES)
def pair(request, tmp_path):
    oracle = random_transformer(request.param)
    return oracle, load_decoder(save_checkpoint(oracle, tmp_path), torch.float32)


def expected_logits(oracle, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return oracle(input_ids=ids[None]).logits[0].float()


def test_prefill_equals_transformers(pair):
    oracle, decoder = pair
    ids = torch.randint(0, decoder.config.vocab_size, (40,))
    logits = decoder.prefill(ids, decoder.new_cache(40), keep=40)
    assert (logits - expected_logits(oracle, ids)).abs().max() <= 1e-4


def test_chunked_prefill_equals_transformers(pair):
    oracle, decoder = pair
    ids = torch.randint(0, decoder.config.vocab_size, (2 * PREFILL_CHUNK + 77,))
    cache = decoder.new_cache(len(ids))
    logits = decoder.prefill(ids, cache, keep=PREFILL_CHUNK + 80)  # across two chunk borders
    assert logits.shape == (PREFILL_CHUNK + 80, decoder.config.vocab_size)
    assert cache.length == len(ids)
    assert (logits - expected_logits(oracle, ids)[-len(logits) :]).abs().max() <= 1e-4


def test_cached_windows_equal_transformers(pair):
    """Prompt, then windows of every size, each half committed: what was not committed leaves no trace."""
    oracle, decoder = pair
    text = torch.randint(0, decoder.config.vocab_size, (80,))
    expected = expected_logits(oracle, text)
    cache = decoder.new_cache(100)
    decoder.prefill(text[:9], cache)
    size = 1
    while cache.length + size <= len(text):
        start = cache.length
        window = text[start : start + size].clone()
        window[size // 2 + 1 :] = 7  # the rejected part of a draft
        logits = decoder(window, cache, keep=size)
        kept = size // 2 + 1
        assert (logits[:kept] - expected[start : start + kept]).abs().max() <= 1e-4
        cache.commit(kept)
        size += 1


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_equals_transformers_within_its_rounding(family, tmp_path):
    oracle = random_transformer(family, torch.bfloat16)
    decoder = load_decoder(save_checkpoint(oracle, tmp_path), torch.bfloat16)
    ids = torch.randint(0, decoder.config.vocab_size, (40,))
    logits = decoder.prefill(ids, decoder.new_cache(40), keep=40)
    exact = expected_logits(oracle.float(), ids)
    ours, theirs = (logits - exact).abs().mean(), (expected_logits(oracle.bfloat16(), ids) - exact).abs().mean()
    assert ours <= 1.2 * theirs  # no further from the float32 result than transformers' own bfloat16 is


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["full", "w8a8"])
@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_a_row_does_not_depend_on_the_window_around_it(shipped, family, precision, device):
    """Bit for bit: what makes speculative output provably that of plain decoding."""
    decoder = shipped(family, precision, device).decoder
    decoder.pack()
    torch.manual_seed(0)
    text = torch.randint(0, decoder.config.vocab_size, (200,))
    cache = decoder.new_cache(220)
    decoder.prefill(text[:150], cache)
    alone = []
    for token in text[150:166]:
        alone.append(decoder(token[None], cache, keep=1))
        cache.commit(1)
    alone = torch.cat(alone)
    for size in range(2, 17):
        cache.length = 150
        assert torch.equal(decoder(text[150 : 150 + size], cache, keep=size), alone[:size])


def test_a_pass_beyond_the_cache_is_refused(pair):
    _, decoder = pair
    cache = decoder.new_cache(4)
    with pytest.raises(ValueError, match="5 tokens do not fit"):
        decoder(torch.arange(5), cache, keep=1)
    with pytest.raises(ValueError, match="cannot commit 5"):
        cache.commit(5)


def test_keep_zero_computes_no_logits(pair):
    _, decoder = pair
    assert decoder.prefill(torch.arange(20), decoder.new_cache(20), keep=0).shape == (0, decoder.config.vocab_size)
