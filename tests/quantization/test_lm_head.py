"""--lm-head w8a8: the last layer in int8 too."""

import pytest
import torch

from common import QuasarError, load, quantize
from common.quantization.linear import W8A8Linear
from tests.conftest import FAMILIES, TINY


@pytest.mark.parametrize("family", FAMILIES)
def test_an_int8_lm_head_reads_less_and_says_nearly_the_same(family, shipped):
    model = load(TINY[family], device="cpu", precision="full")
    embedding = model.decoder.embedding.clone()
    fidelity = quantize(model, lm_head="w8a8")
    with_full_head = shipped(family, "w8a8")
    with_full_head.decoder.pack()
    c = model.config
    assert isinstance(model.decoder.lm_head, W8A8Linear)
    saved = with_full_head.decoder.weight_bytes_per_pass - model.decoder.weight_bytes_per_pass
    assert saved == c.vocab_size * c.hidden_size - 4 * c.vocab_size  # bfloat16 to int8, and a scale per output
    assert torch.equal(model.decoder.embedding, embedding)  # tied or not, it stays
    assert fidelity.top1_agreement > with_full_head.fidelity.top1_agreement - 0.01
    assert fidelity.mean_kl != with_full_head.fidelity.mean_kl


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{"precision": "w4a16", "lm_head": "w8a8"}, {"lm_head": "int3"}])
def test_impossible_lm_heads_are_refused(family, options):
    with pytest.raises(QuasarError, match="--lm-head"):
        quantize(load(TINY[family], device="cpu"), **options)
