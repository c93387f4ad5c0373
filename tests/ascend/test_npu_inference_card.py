"""Atlas inference cards: float16, static scales, plain attention; under the limits of an Ascend310P3."""

import pytest
import torch
from npu_models import on_backend

from quasar import QuasarError, generate
from quasar.backends.base import ActivationQuant, AttentionSpec
from quasar.backends.reference import ReferenceBackend
from quasar_npu.backend import npu_backend
from quasar_npu.device import is_inference_card
from quasar_npu.inference_card import InferenceCardBackend
from tests.conftest import FAMILIES


@pytest.fixture
def card(inference_card):
    return InferenceCardBackend(torch.device("npu", 0), torch.float16, "Ascend310P3")


def test_the_chip_s_name_chooses():
    assert is_inference_card("Ascend310P3")
    assert not is_inference_card("Ascend910B2")
    assert not is_inference_card("Ascend910_9392")


def test_the_chip_s_name_chooses_the_backend(monkeypatch, inference_card):
    monkeypatch.setattr("quasar_npu.backend.open_npu", lambda device: (torch.device("npu", 0), "Ascend310P3"))
    backend = npu_backend("npu", None)
    assert isinstance(backend, InferenceCardBackend)
    assert backend.dtype == torch.float16
    with pytest.raises(QuasarError, match="--dtype bfloat16: Ascend310P3 runs float16 only"):
        npu_backend("npu", torch.bfloat16)


def test_scales_per_token_are_refused_in_one_line(card):
    with pytest.raises(QuasarError, match="Ascend310P3 has no scales per token; quantise with one per tensor"):
        card.quantize(torch.ones(2, 32, dtype=torch.float16, device="npu"), ActivationQuant())


@pytest.mark.parametrize("with_bias", [False, True])
def test_int8_linear_within_the_packed_scale_s_rounding(card, with_bias):
    g = torch.Generator().manual_seed(0)
    values = torch.randint(-127, 128, (70, 64), generator=g).to(torch.int8)
    scale, static = torch.rand(70, generator=g) * 1e-2, torch.tensor([0.03])
    bias = torch.randn(70, generator=g) if with_bias else None
    x = torch.randn(5, 64, generator=g).half()
    reference = ReferenceBackend("cpu", torch.float16)
    quant = ActivationQuant(static)
    expected = reference.int8_linear(reference.quantize(x, quant), reference.int8_weight(values, scale), bias)
    got = card.int8_linear(
        card.quantize(x.npu(), ActivationQuant(static.npu())),
        card.int8_weight(values, scale),
        None if bias is None else bias.npu(),
    )
    # 11 significant bits survive in the packed scale (truncated); the bias is a whole number of products.
    bound = expected.abs().float() * (2**-10 + 2**-11) + scale * static
    assert ((got.cpu().float() - expected.float()).abs() <= bound).all()


@pytest.mark.parametrize(("before", "tokens"), [(0, 20), (20, 6), (20, 1)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_near_the_reference(card, head_dim, before, tokens):
    spec = AttentionSpec(4, 2, head_dim, None, None, 1e-6)
    reference, g = ReferenceBackend("cpu", torch.float16), torch.Generator().manual_seed(1)
    prompt, window = (torch.randn(n, 8 * head_dim, generator=g).half() for n in (before, tokens))
    angle = torch.rand(64, head_dim // 2, generator=g) * 6
    outputs = []
    for backend in (card, reference):
        cos, sin = angle.cos().to(backend.device), angle.sin().to(backend.device)
        cache = backend.new_cache(1, 2, 32, head_dim)
        for qkv in (prompt, window):
            rows = slice(cache.length, cache.length + len(qkv))
            if len(qkv):
                q = backend.append_rotated(qkv.to(backend.device), spec, cos[rows], sin[rows], cache, 0)
                out = backend.attention(q, spec, cache, 0).cpu()
            cache.length = before
        outputs.append(out)
    assert (outputs[0].float() - outputs[1].float()).abs().max() <= 8 * 2**-11 * outputs[1].float().abs().max()


@pytest.mark.parametrize("precision", ["full", "w8a8-static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generates_with_and_without_drafts(card, family, precision):
    """Ids like the reference's as far as float16 is sure: the first tokens, and the same with drafts as without."""
    model = on_backend(family, precision, card)
    options = {"max_new_tokens": 12, "ignore_eos": True}
    plain = generate(model, "class Stack:\n    def", draft="none", **options).result().token_ids
    drafted = generate(model, "class Stack:\n    def", draft="ngram", gamma=3, **options).result().token_ids
    assert drafted == plain
    decoder, ids = model.decoder, model.encode("class Stack:\n    def push(self, item):\n")
    logits = decoder.prefill(ids, decoder.new_cache(64), keep=len(ids)).cpu()
    reference = on_backend(family, precision, ReferenceBackend("cpu", torch.float16)).decoder
    reference.pack()
    expected = reference.prefill(ids, reference.new_cache(64), keep=len(ids))
    # Of a logit's spread: float16 rounds at 2^-11, W8A8 steps may fall the other way.
    assert (logits - expected).abs().mean() <= (0.005 if precision == "full" else 0.03) * expected.std()
