"""The NPU says what the CPU says: same ids, both families, full and W8A8, greedy and sampled, with and without drafts.

The CPU here is the reference backend with the NPU's rounding (fused_rounding.py says where and why).
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from fused_rounding import FusedRounding
from npu_models import CALIBRATION, PRECISIONS, on_backend

from quasar import generate, load
from quasar.backends import get_backend
from quasar.backends.reference import ReferenceBackend
from quasar.checkpoints import open_checkpoint
from quasar.models.config import DTYPES
from quasar.models.loader import build_decoder
from tests.conftest import FAMILIES

GOLDEN = Path(__file__).parent.parent / "golden"
PROMPT = "class Stack:\n    def push(self, item):\n        self.items.append(item)\n    def push"
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 7}


@cache
def on_npu(family, precision, dtype=torch.bfloat16):
    return on_backend(family, precision, get_backend("npu", dtype))


@cache
def oracle(family, precision, dtype=torch.bfloat16):
    return on_backend(family, precision, FusedRounding("cpu", dtype))


def ids_of(model, **options):
    return generate(model, PROMPT, max_new_tokens=32, ignore_eos=True, **options).result()


@pytest.mark.parametrize("draft", [{"draft": "none"}, {"draft": "ngram"}, {"draft": "ngram", "gamma": 5}])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_ids_as_the_cpu_with_the_same_rounding(family, precision, sampling, draft):
    result = ids_of(on_npu(family, precision), **sampling, **draft)
    assert result.token_ids == plain_ids(family, precision, tuple(sampling.items()))
    if draft.get("gamma") and not sampling["temperature"]:
        assert result.stats.accepted > 0  # or the drafts would have been compared with nothing


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_float16_says_the_same_ids(family, precision):
    result = ids_of(on_npu(family, precision, torch.float16), draft="ngram", gamma=4)
    assert result.token_ids == ids_of(oracle(family, precision, torch.float16), draft="none").token_ids


def test_statically_quantised_checkpoints_say_the_same_ids():
    """One calibrated scale per tensor, as msModelSlim's W8A8: A2 and A3 run it too."""
    result = ids_of(on_npu("openpangu", "w8a8-static"), draft="ngram", gamma=3)
    assert result.token_ids == ids_of(oracle("openpangu", "w8a8-static"), draft="none").token_ids


CHECKPOINTS = sorted(path.parent.name for path in GOLDEN.glob("*-*/config.json") if path.parent.name != "small-qwen3")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_that_other_tools_quantised_say_the_same_ids(name):
    """Folders that the real msmodelslim (W8A8, W8A8_DYNAMIC, W8A8_MIX, W4A16) and llm-compressor have written."""
    dtype = "float16" if "fp16" in name else "bfloat16"
    npu = load(str(GOLDEN / name), device="npu", dtype=dtype)
    assert npu.precision == ("w4a16" if "w4a16" in name else "w8a8")
    decoder = build_decoder(npu.config, open_checkpoint(GOLDEN / name), FusedRounding("cpu", DTYPES[dtype]))
    result = ids_of(npu, draft="ngram", gamma=4)
    assert result.token_ids == ids_of(replace(npu, decoder=decoder), draft="none").token_ids


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_near_to_float32_as_the_reference_backend_in_bfloat16(family, precision):
    """Fused rounding may move a near tie, so ids are not compared with the reference backend one by one. But its logits
    may not be worse, and where float32 is sure of a token (by more than twice the largest error) the NPU says it."""
    exact = logits_of(on_backend(family, precision, ReferenceBackend("cpu", torch.float32)))
    plain = logits_of(on_backend(family, precision, ReferenceBackend("cpu", torch.bfloat16)))
    npu = logits_of(on_npu(family, precision))
    error, allowed = (npu - exact).abs(), (plain - exact).abs()
    assert error.mean() <= 1.15 * allowed.mean()
    best, second = exact.topk(2, dim=-1).values.unbind(-1)
    sure = best - second > 2 * max(error.max(), allowed.max())
    assert sure.sum() > 0
    assert torch.equal(npu.argmax(-1)[sure], exact.argmax(-1)[sure])
    assert torch.equal(plain.argmax(-1)[sure], exact.argmax(-1)[sure])


def logits_of(model):
    decoder, ids = model.decoder, model.encode(PROMPT + CALIBRATION)
    return decoder.read(ids, len(ids)).cpu()


@cache
def plain_ids(family, precision, sampling):
    """Of the oracle, without drafts: those must not matter."""
    return ids_of(oracle(family, precision), draft="none", **dict(sampling)).token_ids
