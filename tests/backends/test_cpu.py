"""The fast CPU backend end to end against the reference backend, which defines the numbers."""

import pytest
import torch

from common import generate
from common.backends import native
from common.models.model import ASSETS
from common.quantization.calibration import read_texts
from tests.conftest import FAMILIES

pytestmark = pytest.mark.skipif(not native.available(), reason="the C kernels were not built")
PROMPTS = read_texts(ASSETS / "heldout.jsonl")[:4]


@pytest.mark.parametrize("precision", ["full", "w8a8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_are_those_of_the_reference_backend(shipped, family, precision):
    fast, reference = shipped(family, precision, "cpu"), shipped(family, precision, "reference")
    assert (fast.decoder.backend.name, reference.decoder.backend.name) == ("cpu", "reference")
    for prompt in PROMPTS:
        ids = fast.encode(prompt)[:100]
        for draft in ("none", "ngram"):
            settings = {"max_new_tokens": 48, "draft": draft, "ignore_eos": True}
            expected = generate(reference, ids, **settings).result().token_ids
            assert len(expected) == 48
            assert generate(fast, ids, **settings).result().token_ids == expected


@pytest.mark.parametrize("precision", ["full", "w8a8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_has_the_logits_of_the_reference_backend(shipped, family, precision):
    """512 tokens: the kernels' other panels and threads. int8 inputs may round the other way here and there."""
    logits = []
    for device in ("cpu", "reference"):
        model = shipped(family, precision, device)
        model.decoder.pack()
        ids = [i for text in PROMPTS for i in model.encode(text)][:512]
        assert len(ids) == 512
        logits.append(model.decoder.prefill(torch.tensor(ids), model.decoder.new_cache(512), keep=512))
    fast, reference = logits
    assert (fast - reference).norm() <= (1e-5 if precision == "full" else 5e-3) * reference.norm()
