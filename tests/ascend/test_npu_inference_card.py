"""Atlas inference cards: float16, static scales, plain attention; under the limits of an Ascend310P3."""

import pytest
import torch
from npu_models import on_backend

from quasar import QuasarError, generate
from quasar.backends.base import ActivationQuant, AttentionSpec, Batch, Segment
from quasar.backends.reference import ReferenceBackend
from quasar_npu.backend import npu_backend
from quasar_npu.device import chip_kind, is_inference_card, open_npu
from quasar_npu.inference_card import InferenceCardBackend
from tests.conftest import FAMILIES


@pytest.fixture
def card(inference_card):
    return InferenceCardBackend(torch.device("npu", 0), torch.float16, "Ascend310P3")


@pytest.mark.parametrize(
    ("soc", "kind"),
    [
        ("Ascend310P3", "inference card"),
        ("Ascend910B2", "A2 or A3"),
        ("Ascend910B4-1", "A2 or A3"),
        ("Ascend910B2C", "A2 or A3"),
        ("Ascend910_9392", "A2 or A3"),
        ("Ascend910A", None),
        ("Ascend910PremiumA", None),
        ("Ascend310", None),
        ("Ascend310B1", None),
        ("Ascend950DT", None),
    ],
)
def test_the_chip_s_name_chooses(soc, kind):
    assert chip_kind(soc) == kind
    assert is_inference_card(soc) == (kind == "inference card")


def test_a_chip_that_nobody_has_looked_at_is_refused(monkeypatch):
    monkeypatch.setattr(torch.npu, "get_device_name", lambda index=0: "Ascend910A")
    with pytest.raises(QuasarError, match="--device npu: Ascend910A is a chip that Quasar does not know; it runs on"):
        open_npu("npu")


def test_operators_of_inference_cards_are_not_compiled_at_their_first_call(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.npu, "set_compile_mode", lambda **options: asked.append(options))
    open_npu("npu")
    monkeypatch.setattr(torch.npu, "get_device_name", lambda index=0: "Ascend310P3")
    open_npu("npu")
    assert asked == [{"jit_compile": False}]


def test_a_tree_s_paths_say_what_chains_say(card):
    spec, g = AttentionSpec(4, 2, 64, None, None, 1e-6), torch.Generator().manual_seed(1)
    rows = torch.randn(4, 8 * 64, generator=g).half().npu()
    outputs = {}
    for parents, kept in (([-1, 0, 0, 2], [0, 2, 3]), (None, [0, 2, 3])):
        slot = card.new_slot(1, 2, 32, 64)
        given = rows if parents else rows[kept]
        batch = Batch([Segment(slot, [0] * len(given), parents)])
        angle = torch.tensor(batch.positions).float()[:, None] * torch.ones(1, 32)
        q = card.append_rotated(given, spec, angle.cos().npu(), angle.sin().npu(), batch, 0)
        out = card.attention(q, spec, batch, 0).cpu()
        outputs[parents is None] = out if parents is None else out[kept]
    assert (outputs[True].float() - outputs[False].float()).abs().max() <= 2**-9


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
    scale, static = torch.rand(70, generator=g) * 1e-2, torch.tensor([2.0**-5])
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
        slot = backend.new_slot(1, 2, 32, head_dim)
        for qkv in (prompt, window):
            rows = slice(slot.length, slot.length + len(qkv))
            if len(qkv):
                batch = Batch([Segment(slot, [0] * len(qkv))])
                q = backend.append_rotated(qkv.to(backend.device), spec, cos[rows], sin[rows], batch, 0)
                out = backend.attention(q, spec, batch, 0).cpu()
            slot.length = before
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
    logits = decoder.read(ids, len(ids)).cpu()
    reference = on_backend(family, precision, ReferenceBackend("cpu", torch.float16)).decoder
    expected = reference.read(ids, len(ids))
    # Of a logit's spread: float16 rounds at 2^-11, W8A8 steps may fall the other way.
    assert (logits - expected).abs().mean() <= (0.005 if precision == "full" else 0.03) * expected.std()
