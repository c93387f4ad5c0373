"""The decoder against transformers, on random small checkpoints that transformers saved."""

from pathlib import Path

import pytest
import torch

from quasar import QuasarError
from quasar.backends import get_backend
from quasar.checkpoints import open_checkpoint
from quasar.models.config import read_config
from quasar.models.decoder import CHUNK_ROWS, Decoder
from quasar.models.loader import build_decoder
from quasar.models.runtime import Runtime
from tests.conftest import FAMILIES, random_transformer, save_checkpoint
from tests.helpers.passes import committed, forward, new_slot


def load_decoder(folder: Path, dtype: torch.dtype) -> Decoder:
    return build_decoder(read_config(folder), open_checkpoint(folder), get_backend("reference", dtype))


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
    logits = decoder.read(ids, logits_to_keep=40)
    assert (logits - expected_logits(oracle, ids)).abs().max() <= 1e-4


def test_chunked_prefill_equals_transformers(pair):
    oracle, decoder = pair
    ids = torch.randint(0, decoder.config.vocab_size, (2 * CHUNK_ROWS + 77,))
    logits = decoder.read(ids, logits_to_keep=CHUNK_ROWS + 80)  # across two chunk borders
    assert logits.shape == (CHUNK_ROWS + 80, decoder.config.vocab_size)
    assert (logits - expected_logits(oracle, ids)[-len(logits) :]).abs().max() <= 1e-4


def test_cached_windows_equal_transformers(pair):
    """Prompt, then windows of every size, each half committed: what was not committed leaves no trace."""
    oracle, decoder = pair
    text = torch.randint(0, decoder.config.vocab_size, (80,))
    expected = expected_logits(oracle, text)
    slot = committed(decoder, 100, text[:9])
    size = 1
    while slot.length + size <= len(text):
        start = slot.length
        window = text[start : start + size].clone()
        window[size // 2 + 1 :] = 7  # the rejected part of a draft
        logits = forward(decoder, slot, window)
        kept = size // 2 + 1
        assert (logits[:kept] - expected[start : start + kept]).abs().max() <= 1e-4
        slot.commit(kept)
        size += 1


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_equals_transformers_within_its_rounding(family, tmp_path):
    oracle = random_transformer(family, torch.bfloat16)
    decoder = load_decoder(save_checkpoint(oracle, tmp_path), torch.bfloat16)
    ids = torch.randint(0, decoder.config.vocab_size, (40,))
    logits = decoder.read(ids, logits_to_keep=40)
    exact = expected_logits(oracle.float(), ids)
    ours, theirs = (logits - exact).abs().mean(), (expected_logits(oracle.bfloat16(), ids) - exact).abs().mean()
    assert ours <= 1.2 * theirs  # no further from the float32 result than transformers' own bfloat16 is


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["full", "w8a8"])
@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_a_row_does_not_depend_on_the_window_around_it(shipped, family, precision, device):
    """Bit for bit: what makes speculative output provably that of plain decoding."""
    decoder = shipped(family, precision, device).decoder
    torch.manual_seed(0)
    text = torch.randint(0, decoder.config.vocab_size, (200,))
    slot = committed(decoder, 220, text[:150])
    alone = []
    for token in text[150:]:
        alone.append(forward(decoder, slot, token[None]).clone())
        slot.commit(1)
    alone = torch.cat(alone)
    for size in (*range(2, 18), 31, 32, 33, 50):
        slot.rewind(150)
        assert torch.equal(forward(decoder, slot, text[150 : 150 + size]), alone[:size])
    prompt = new_slot(decoder, 220)
    assert torch.equal(forward(decoder, prompt, text, 50), alone)


def test_a_pass_beyond_the_cache_is_refused(pair):
    _, decoder = pair
    slot = new_slot(decoder, 4)
    with pytest.raises(ValueError, match="5 tokens do not fit"):
        forward(decoder, slot, torch.arange(5))
    with pytest.raises(ValueError, match="cannot commit 5"):
        slot.commit(5)


def test_a_context_beyond_the_models_positions_is_refused(pair):
    _, decoder = pair
    runtime = Runtime(decoder)
    positions = decoder.config.max_position_embeddings
    assert runtime.new_slot(positions).capacity == positions
    with pytest.raises(QuasarError, match=f"a context of {positions + 1} tokens"):
        runtime.new_slot(positions + 1)


def test_keep_zero_computes_no_logits(pair):
    _, decoder = pair
    assert decoder.read(torch.arange(20), logits_to_keep=0).shape == (0, decoder.config.vocab_size)
