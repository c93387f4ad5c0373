"""Whatever drafts and whatever verifies: the output is the verifier's own, and with lossless full precision's."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar import GenerationSettings, QuasarError, generate, generation, load
from quasar.backends.base import Slot
from quasar.drafting import DraftTarget, new_drafter
from quasar.drafting.cascade import CascadeDrafter
from quasar.drafting.decoder_drafter import FollowedText
from quasar.loading import PRECISIONS
from quasar.models.runtime import Runtime
from quasar.models.sharing import share
from quasar.speculation.choice import TokenChooser
from quasar.speculation.rows import FixedRows, RowRule
from quasar.speculation.sampling import Sampling, distribution
from quasar.speculation.verifier import Verifier, Window
from tests.conftest import FAMILIES
from tests.helpers.random_models import random_model, shared_random_model

PROMPT = [5, 9, 31, 5, 9, 31, 5, 9, 7, 88, 5, 9]
DRAFTS = ("ngram", "suffix", "self:w4a4", "self:skip=1", "self:skip=2", "model:small")
COMBINATIONS = [(d, p) for d, p in itertools.product(DRAFTS, PRECISIONS) if d != "self:w4a4" or p == "w4a16"]


def _model(family: str, precision: str):
    """A random model for which "model:small" is its own first two layers: wrong often, right at times."""
    model = shared_random_model(family, precision, "cpu")
    if "model:small" not in model.draft_runtimes:
        model.draft_runtimes["model:small"] = Runtime(share(model.runtime.decoder, keep=[0, 1, 3]))
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("draft", "precision"), COMBINATIONS)
def test_greedy_ids_are_the_verifiers_own(family, draft, precision):
    model = _model(family, precision)
    plain = generate(model, PROMPT, draft="none", max_new_tokens=40).result()
    for gamma in (3, 15, None):
        drafted = generate(model, PROMPT, draft=draft, gamma=gamma, max_new_tokens=40).result()
        assert drafted.token_ids == plain.token_ids
        stats = drafted.stats
        assert stats.accepted <= stats.drafted and stats.tokens == stats.passes + stats.accepted + 1
        if gamma is not None and draft not in ("ngram", "suffix"):
            assert stats.drafted > 0 and stats.draft_passes >= stats.drafted  # each drafted token took a pass
            assert stats.draft_weight_bytes > 0 and stats.seconds_draft > 0


@pytest.mark.parametrize("draft", ["ngram", "suffix", "self:w4a4", "self:skip=1", "model:tiny-openpangu"])
def test_shipped_models_on_the_fast_backend(shipped, draft):
    model = shipped("qwen3", "w4a16")
    for prompt in ("def main():\n    ", "import os\nimport sys\nimport "):
        plain = generate(model, prompt, draft="none", max_new_tokens=40, ignore_eos=True).result()
        drafted = generate(model, prompt, draft=draft, gamma=3, max_new_tokens=40, ignore_eos=True).result()
        assert drafted.token_ids == plain.token_ids and drafted.stats.drafted > 0


@pytest.fixture(params=[None, 1, 7])
def block(request):
    """The cascade's block: as the rule for rows says, or always the same, whatever it costs."""
    return request.param


def lossless(model, prompt, block, **options):
    rule = None if block is None else FixedRows(block)
    return generation.Generation(model, prompt, GenerationSettings(lossless=True, **options), row_rule=rule)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("draft", "precision"), [c for c in [("none", "w8a8"), *COMBINATIONS] if c[1] != "full"])
def test_lossless_ids_are_full_precisions(family, draft, precision, block):
    model = _model(family, precision)
    full = generate(_model(family, "full"), PROMPT, draft="none", max_new_tokens=40).result()
    confirmed = lossless(model, PROMPT, block, draft=draft, gamma=2, max_new_tokens=40).result()
    assert confirmed.token_ids == full.token_ids
    if block is not None:
        assert confirmed.stats.drafted > confirmed.stats.passes * block / 2


def test_lossless_streams_full_precisions_text(shipped, block):
    model = load("tiny-qwen3", device="cpu", precision="w8a8", lossless=True)
    full = shipped("qwen3")
    prompt = "def main():\n    "
    confirmed = lossless(model, model.encode(prompt), block, max_new_tokens=96, ignore_eos=True)
    pieces = "".join(confirmed)
    expected = generate(full, prompt, draft="none", max_new_tokens=96, ignore_eos=True).result()
    assert pieces == expected.text and confirmed.result().token_ids == expected.token_ids


# Sampling: the frequencies of the first tokens against the target's exact probabilities.

SAMPLED = {"temperature": 0.5, "top_k": 2, "max_new_tokens": 4}
CASES = [
    ("ngram", "full", False),
    ("suffix", "w4a16", False),
    ("self:w4a4", "w4a16", False),
    ("self:skip=2", "w8a8", False),
    ("model:small", "full", False),
    ("ngram", "w8a8", True),
    ("self:w4a4", "w4a16", True),
    ("none", "w4a4", True),
]


def _exact(decoder, length: int) -> dict[tuple[int, ...], float]:
    """Probability of every continuation of PROMPT by `length` tokens under SAMPLED."""
    sampling = Sampling(SAMPLED["temperature"], SAMPLED["top_k"])
    found = {(): 1.0}
    for _ in range(length):
        longer = {}
        for tokens, p in found.items():
            logits = decoder.read([*PROMPT, *tokens], logits_to_keep=1)[0]
            for token, q in enumerate(distribution(logits, sampling).tolist()):
                if q:
                    longer[(*tokens, token)] = p * q
        found = longer
    return found


@pytest.mark.parametrize(("draft", "precision", "cascade"), CASES)
def test_sampled_tokens_have_the_targets_distribution(draft, precision, cascade):
    model = _model("qwen3", precision)
    exact = _exact(model.full if cascade else model.decoder, SAMPLED["max_new_tokens"])
    samples = 400
    seen = Counter(
        tuple(
            (
                lossless(model, PROMPT, 2, draft=draft, gamma=3, seed=seed, **SAMPLED)
                if cascade
                else generate(model, PROMPT, draft=draft, gamma=3, seed=seed, **SAMPLED)
            )
            .result()
            .token_ids
        )
        for seed in range(samples)
    )
    assert set(seen) <= set(exact)
    # Pool the rare outcomes, so that every cell expects at least five.
    cells, rest = [], [0.0, 0]
    for tokens, p in exact.items():
        if p * samples >= 5:
            cells.append((p * samples, seen[tokens]))
        else:
            rest = [rest[0] + p * samples, rest[1] + seen[tokens]]
    if rest[0] > 1:
        cells.append(tuple(rest))
    chi_square = sum((observed - expected) ** 2 / expected for expected, observed in cells)
    freedom = len(cells) - 1
    assert freedom >= 3
    # Chi-square's 1 - 1e-5 quantile (Wilson and Hilferty): the seeds are fixed, so this passes or fails for good.
    bound = freedom * (1 - 2 / (9 * freedom) + 4.26 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi_square < bound


def test_a_wrong_distribution_would_be_seen():
    """The same statistic against another temperature's probabilities is far outside the bound."""
    model = _model("qwen3", "full")
    exact, colder = _exact(model.decoder, 3), SAMPLED | {"temperature": 0.3, "max_new_tokens": 3}
    counts = Counter(
        tuple(generate(model, PROMPT, draft="ngram", gamma=3, seed=seed, **colder).result().token_ids)
        for seed in range(300)
    )
    assert sum((counts[t] - 300 * p) ** 2 / (300 * p) for t, p in exact.items()) > 40


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("draft", "precision"), COMBINATIONS)
def test_the_seed_decides_the_text_whatever_drafts(family, draft, precision):
    model = _model(family, precision)
    for seed in (7, 8):
        options = {"temperature": 0.9, "seed": seed, "max_new_tokens": 40}
        plain = generate(model, PROMPT, draft="none", **options).result().token_ids
        assert generate(model, PROMPT, draft=draft, gamma=4, **options).result().token_ids == plain
        if precision != "full":
            full = generate(_model(family, "full"), PROMPT, draft="none", **options).result().token_ids
            assert lossless(model, PROMPT, 5, draft=draft, gamma=4, **options).result().token_ids == full


# Caches.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("draft", "precision"), [("self:w4a4", "w4a16"), ("self:skip=2", "w8a8"), ("self:skip=1", "full")]
)
def test_the_verifier_overwrites_what_a_self_drafter_wrote(family, draft, precision):
    model = _model(family, precision)
    runtime = model.runtime
    slot, alone = runtime.new_slot(64), runtime.new_slot(64)
    drafter = new_drafter(draft, DraftTarget(model, slot, None))
    verifier, chooser = Verifier(runtime), TokenChooser()
    text = [*PROMPT, *verifier.step([Window(slot, PROMPT, chooser)])[0].tokens]
    runtime.prefill(alone, PROMPT, logits_to_keep=0)
    drafter.extend(text)
    for _ in range(10):
        tokens = verifier.step([Window(slot, text[-1:], chooser, drafter.propose(3))])[0].tokens
        for token in [text[-1], *tokens[:-1]]:
            runtime.prefill(alone, [token], logits_to_keep=0)
        text += tokens
        drafter.extend(tokens)
        assert slot.length == alone.length == len(text) - 1
        assert torch.equal(slot.k[:, :, : slot.length], alone.k[:, :, : slot.length])
        assert torch.equal(slot.v[:, :, : slot.length], alone.v[:, :, : slot.length])


@given(st.lists(st.tuples(st.integers(1, 7), st.integers(0, 7)), min_size=1, max_size=6), st.booleans())
@settings(max_examples=20)
def test_the_cascades_slot_follows_the_confirmed_text(rounds, other_token):
    """Blocks of any size, confirmed up to anywhere: what the quantised model proposes is what it says by itself. With
    the text's last token they are rows of a size that passes have."""
    model = _model("openpangu", "w8a8")
    inner = new_drafter("ngram", DraftTarget(model, model.runtime.new_slot(1), None))
    drafter = CascadeDrafter(model.runtime, model.runtime.new_slot(120), inner, None, gamma=3)
    text = [*PROMPT, 17]
    drafter.extend(text)
    for block, kept in rounds:
        proposed = drafter.propose(block).tokens
        assert len(proposed) == RowRule(model.runtime.backend.captures_rows).filled(1 + block) - 1
        assert proposed == generate(model, text, draft="none", max_new_tokens=len(proposed)).result().token_ids
        confirmed = [*proposed[: min(kept, len(proposed))], 40 if other_token else 41]
        text += confirmed
        drafter.extend(confirmed)


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=4), st.lists(st.integers(0, 1), max_size=5)), max_size=8)
)
@settings(max_examples=200)
def test_a_followed_text_holds_what_the_slot_holds(rounds):
    slot = Slot(1, 1, 200, 1, torch.float32, torch.device("cpu"))
    followed, committed = FollowedText(slot), [1]
    for confirmed, ahead in rounds:
        uncached = followed.uncached(committed, ahead)
        text = [*committed, *ahead]
        assert uncached and followed.held + uncached == text and slot.length == len(followed.held)
        followed.held += uncached  # the decoder runs over them
        slot.commit(len(uncached))
        committed = [*committed, *confirmed]


# What makes no sense is said in one line.


@pytest.mark.parametrize(
    ("draft", "precision", "words"),
    [
        ("self:w4a4", "w8a8", "say --precision w4a16"),
        ("self:w4a4", "full", "say --precision w4a16"),
        ("self:skip=3", "w8a8", "skip 1 to 2"),
        ("self:skip=0", "w8a8", "skip 1 to 2"),
        ("model:dummy:qwen3-0.6b", "w8a8", "needs the same tokenizer"),
        ("model:nowhere", "w8a8", "no such folder"),
    ],
)
def test_a_draft_that_the_model_cannot_have(draft, precision, words):
    with pytest.raises(QuasarError, match=words):
        generate(_model("qwen3", precision), PROMPT, draft=draft).result()


@pytest.mark.parametrize(
    "draft", ["self", "self:", "self:skip=", "self:skip=x", "model:", "suffix:", "n-gram", "self:w8a8"]
)
def test_an_unknown_draft(draft):
    with pytest.raises(QuasarError, match="--draft"):
        GenerationSettings(draft=draft)


def test_lossless_needs_a_quantised_model_and_the_full_one():
    with pytest.raises(QuasarError, match="already is lossless"):
        generate(_model("qwen3", "full"), PROMPT, lossless=True)
    with pytest.raises(QuasarError, match="lossless=True"):
        generate(random_model("qwen3", "w8a8"), PROMPT, lossless=True)
