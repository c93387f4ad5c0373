"""The NPU says what the CPU says: same ids, both families, full and W8A8, greedy and sampled, with and without drafts."""

from functools import cache

import pytest
import torch
from fused_rounding import FusedRounding
from npu_models import CALIBRATION, PRECISIONS, master, on_backend

from common import generate
from common.backends import get_backend
from common.backends.reference import ReferenceBackend
from tests.conftest import FAMILIES

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


@cache
def plain_ids(family, precision, sampling):
    """Of the oracle, without drafts: those must not matter."""
    return ids_of(oracle(family, precision), draft="none", **dict(sampling)).token_ids
