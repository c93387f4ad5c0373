"""--lm-head w8a8: the last layer in int8 too."""

import pytest
import torch

from quasar import QuasarError, load, quantize
from quasar.models.linear import W8A8Linear
from tests.conftest import FAMILIES, TINY


@pytest.mark.parametrize("family", FAMILIES)
def test_an_int8_lm_head_reads_less_and_says_nearly_the_same(family, shipped):
    model = load(TINY[family], device="cpu", precision="full")
    embedding = model.decoder.embedding.clone()
    fidelity = quantize(model, lm_head="w8a8")
    with_full_head = shipped(family, "w8a8")
    c = model.config
    assert isinstance(model.decoder.lm_head, W8A8Linear)
    saved = with_full_head.decoder.weight_bytes_per_pass - model.decoder.weight_bytes_per_pass
    assert saved == c.vocab_size * c.hidden_size - 4 * c.vocab_size  # bfloat16 to int8, and a scale per output
    assert torch.equal(model.decoder.embedding, embedding)  # tied or not, it stays
    assert fidelity.top1_agreement > with_full_head.fidelity.top1_agreement - 0.01
    assert fidelity.mean_kl != with_full_head.fidelity.mean_kl


def test_four_bit_models_may_have_one_too():
    fidelity = [
        quantize(load("tiny-qwen3", device="cpu"), precision="w4a16", lm_head=lm_head) for lm_head in ("full", "w8a8")
    ]
    assert fidelity[0].mean_kl != fidelity[1].mean_kl
    assert fidelity[1].top1_agreement > fidelity[0].top1_agreement - 0.01


def test_unknown_lm_heads_are_refused():
    with pytest.raises(QuasarError, match="--lm-head int3 is unknown"):
        quantize(load("tiny-qwen3", device="cpu"), lm_head="int3")
