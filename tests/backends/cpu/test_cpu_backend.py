"""The fast CPU backend end to end against the reference backend, which defines the numbers."""

import re

import pytest
import torch

from quasar import generate, load
from quasar.backends import get_backend
from quasar.backends.cpu import kernels
from quasar.errors import QuasarError
from quasar.models.model import ASSETS
from quasar.models.weights_cache import WeightsCache
from quasar.quantization.calibration import read_texts
from tests.conftest import FAMILIES

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the C kernels were not built")
PROMPTS = read_texts(ASSETS / "heldout.jsonl")[:4]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_are_those_of_the_reference_backend(shipped, family):
    fast, reference = shipped(family, "full", "cpu", "float32"), shipped(family, "full", "reference")
    assert (fast.decoder.backend.name, reference.decoder.backend.name) == ("cpu", "reference")
    for prompt in PROMPTS:
        ids = fast.encode(prompt)[:100]
        for draft in ("none", "ngram"):
            settings = {"max_new_tokens": 48, "draft": draft, "ignore_eos": True}
            expected = generate(reference, ids, **settings).result().token_ids
            assert len(expected) == 48
            assert generate(fast, ids, **settings).result().token_ids == expected


def prompt_logits(model):
    """float32 [512, vocab] of a prompt of 512 tokens: the kernels' other panels and threads too."""
    ids = [i for text in PROMPTS for i in model.encode(text)][:512]
    assert len(ids) == 512
    return model.runtime.prefill(model.runtime.new_slot(512), ids, logits_to_keep=512)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_has_the_logits_of_the_reference_backend(shipped, family):
    fast = prompt_logits(shipped(family, "full", "cpu", "float32"))
    reference = prompt_logits(shipped(family, "full", "reference"))
    assert (fast - reference).norm() <= 1e-5 * reference.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_w8a8_says_what_the_reference_backend_says_wherever_that_is_sure(shipped, family):
    """The int8 products are equal bit for bit (test_native.py), but sums of float32 in another order move an input by a
    rounding error now and then, and int8 makes a whole step of it. So ids may differ where two tokens are nearly
    equally likely, and only there; and the difference stays below what quantising itself costs."""
    fast = prompt_logits(shipped(family, "w8a8", "cpu", "float32"))
    reference = prompt_logits(shipped(family, "w8a8", "reference"))
    full = prompt_logits(shipped(family, "full", "reference"))
    best = reference.topk(2).values  # [512, 2]
    sure = best[:, 0] - best[:, 1] > 0.25
    assert sure.float().mean() > 0.7
    assert torch.equal(fast.argmax(-1)[sure], reference.argmax(-1)[sure])
    assert (fast - reference).norm() < 0.8 * (reference - full).norm()


# --dtype bfloat16


@pytest.fixture(scope="module")
def in_bfloat16():
    """A shipped model by device."""
    return {device: load("tiny-qwen3", device=device, dtype="bfloat16") for device in ("cpu", "reference")}


def test_bfloat16_says_what_float32_says_within_its_rounding(shipped, in_bfloat16):
    """8 bits of each input leave logits within a hundredth, and nearer than where all between products is bfloat16."""
    full = prompt_logits(shipped("qwen3"))
    fast, reference = (prompt_logits(in_bfloat16[device]) for device in ("cpu", "reference"))
    assert 1e-4 * full.norm() < (fast - full).norm() < 1e-2 * full.norm()
    assert (fast - full).norm() < (reference - full).norm()
    best = full.topk(2).values  # [512, 2]
    sure = best[:, 0] - best[:, 1] > 0.1
    assert sure.float().mean() > 0.8
    assert torch.equal(fast.argmax(-1)[sure], full.argmax(-1)[sure])


def test_bfloat16_is_the_same_for_every_number_of_tokens(in_bfloat16):
    """A prompt at once, in windows, and drafted tokens: no token's logits depend on its company."""
    model = in_bfloat16["cpu"]
    runtime = model.runtime
    ids = model.encode(PROMPTS[0])[:48]
    whole = runtime.prefill(runtime.new_slot(48), ids, logits_to_keep=48)
    for size in (1, 6, 16, 17):
        slot = runtime.new_slot(48)
        parts = [ids[first : first + size] for first in range(0, 48, size)]
        assert torch.equal(torch.cat([runtime.prefill(slot, part, len(part)) for part in parts]), whole)
    plain, drafted = (
        generate(model, PROMPTS[0], max_new_tokens=40, draft=draft, ignore_eos=True).result().token_ids
        for draft in ("none", "ngram")
    )
    assert drafted == plain


def test_bfloat16_rounds_float32_weights_too():
    backend = get_backend("cpu", torch.bfloat16)
    assert (backend.dtype, backend.linear_dtype) == (torch.float32, torch.bfloat16)
    x, weight, bias = torch.randn(20, 64), torch.randn(40, 64), torch.randn(40)
    packed = backend.full_weight(weight)
    assert packed.nbytes == 2 * weight.numel()
    expected = torch.nn.functional.linear(x.bfloat16().double(), weight.bfloat16().double(), bias.double())
    assert torch.allclose(backend.linear(x, packed, bias).double(), expected, rtol=1e-5, atol=1e-5)


# --kv


def test_int8_keys_and_values_say_what_they_cost(caplog):
    load("tiny-qwen3", device="cpu", precision="full", kv="bfloat16")
    assert not caplog.messages
    model = load("tiny-qwen3", device="cpu", precision="full", kv="int8")
    (line,) = caplog.messages
    found = re.fullmatch(r"--kv int8 against float32: mean KL (\S+) nats, .* 512 held-out tokens", line)
    assert 1e-6 < float(found[1]) < 1e-1
    assert model.decoder.backend.kv == "int8"


@pytest.mark.parametrize("kv", ["bfloat16", "int8"])
def test_smaller_keys_and_values_change_logits_a_little_and_no_draft_changes_text(shipped, kv):
    model = shipped("qwen3", kv=kv)
    whole, exact = prompt_logits(model), prompt_logits(shipped("qwen3", kv="float32"))
    assert 0 < (whole - exact).norm() < {"bfloat16": 5e-3, "int8": 3e-2}[kv] * exact.norm()
    plain, drafted = (
        generate(model, PROMPTS[0], max_new_tokens=40, draft=draft, ignore_eos=True).result().token_ids
        for draft in ("none", "ngram")
    )
    assert drafted == plain


def test_bfloat16_is_the_default(shipped):
    assert shipped("qwen3").decoder.backend.kv == "bfloat16"


def test_what_is_calibrated_does_not_depend_on_the_kind_of_keys_and_values(tmp_path):
    """The cache gives a model that was quantised with one kind to all others."""
    made = [
        load("tiny-qwen3", device="cpu", precision="w8a8", kv=kv, cache=WeightsCache(tmp_path, gigabytes=0))
        for kv in kernels.KV_FORMATS
    ]
    for linears in zip(*(model.decoder.linears()[:-1] for model in made), strict=True):
        for other in linears[1:]:
            assert torch.equal(linears[0].packed.tensor, other.packed.tensor)
            assert torch.equal(linears[0].packed.scale, other.packed.scale)


def test_unknown_kinds_of_keys_and_values_are_refused():
    with pytest.raises(QuasarError, match="--kv int3 is unknown; use auto or one of float32, bfloat16, int8"):
        get_backend("cpu", kv="int3")
    with pytest.raises(QuasarError, match="--kv int8 needs --device cpu"):
        get_backend("reference", kv="int8")
