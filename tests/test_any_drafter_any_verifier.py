"""Whatever drafts and whatever verifies: the output is the verifier's own, and with lossless full precision's."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar import GenerationSettings, QuasarError, generate, generation, load
from quasar.backends.base import KVCache
from quasar.drafting import DraftTarget, new_drafter
from quasar.drafting.cascade import CascadeDrafter
from quasar.drafting.decoder import FollowedText
from quasar.loading import PRECISIONS
from quasar.models.sharing import share
from quasar.speculation.acceptance import GreedyAcceptance
from quasar.speculation.draft import Draft, Drafter
from quasar.speculation.sampling import Sampling, target_distribution
from quasar.speculation.speculator import Speculator
from quasar.speculation.verifier import Verifier
from quasar.speculation.window import FixedWindow
from tests.conftest import FAMILIES
from tests.helpers.random_models import random_model, shared_random_model

PROMPT = [5, 9, 31, 5, 9, 31, 5, 9, 7, 88, 5, 9]
DRAFTS = ("ngram", "suffix", "self:w4a4", "self:skip=1", "self:skip=2", "model:small")
COMBINATIONS = [(d, p) for d, p in itertools.product(DRAFTS, PRECISIONS) if d != "self:w4a4" or p == "w4a16"]


def _model(family: str, precision: str):
    """A random model for which "model:small" is its own first two layers: wrong often, right at times."""
    model = shared_random_model(family, precision)
    if "model:small" not in model.draft_decoders:
        model.decoder.pack()
        model.draft_decoders["model:small"] = share(model.decoder, keep=[0, 1, 3])
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
def block(request, monkeypatch):
    """The cascade's block size: adaptive, or always the same, so that blocks are used whatever passes cost here."""
    if request.param is not None:
        monkeypatch.setattr(generation, "adaptive_window", lambda *_, **__: FixedWindow(request.param))
    return request.param


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("draft", "precision"), [c for c in [("none", "w8a8"), *COMBINATIONS] if c[1] != "full"])
def test_lossless_ids_are_full_precisions(family, draft, precision, block):
    model = _model(family, precision)
    full = generate(_model(family, "full"), PROMPT, draft="none", max_new_tokens=40).result()
    confirmed = generate(model, PROMPT, draft=draft, gamma=2, lossless=True, max_new_tokens=40).result()
    assert confirmed.token_ids == full.token_ids
    if block is not None:
        assert confirmed.stats.drafted > confirmed.stats.passes * block / 2


def test_lossless_streams_full_precisions_text(shipped, block):
    model = load("tiny-qwen3", device="cpu", precision="w8a8", lossless=True)
    full = shipped("qwen3")
    prompt = "def main():\n    "
    confirmed = generate(model, prompt, lossless=True, max_new_tokens=96, ignore_eos=True)
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
            logits = decoder.prefill([*PROMPT, *tokens], decoder.new_cache(32), keep=1)
            for token, q in enumerate(target_distribution(logits, sampling)[0].tolist()):
                if q:
                    longer[(*tokens, token)] = p * q
        found = longer
    return found


@pytest.mark.parametrize(("draft", "precision", "lossless"), CASES)
def test_sampled_tokens_have_the_targets_distribution(draft, precision, lossless, monkeypatch):
    monkeypatch.setattr(generation, "adaptive_window", lambda *_, **__: FixedWindow(2))  # of the cascade's block
    model = _model("qwen3", precision)
    exact = _exact(model.full if lossless else model.decoder, SAMPLED["max_new_tokens"])
    samples = 400
    seen = Counter(
        tuple(generate(model, PROMPT, draft=draft, gamma=3, lossless=lossless, seed=seed, **SAMPLED).result().token_ids)
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


@pytest.mark.parametrize("draft", ["ngram", "suffix"])
def test_point_mass_drafts_keep_the_seeds_text(draft):
    model = _model("openpangu", "w8a8")
    plain = generate(model, PROMPT, draft="none", temperature=0.9, seed=7, max_new_tokens=40).result()
    drafted = generate(model, PROMPT, draft=draft, temperature=0.9, seed=7, max_new_tokens=40).result()
    assert drafted.token_ids == plain.token_ids


# Caches.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("draft", "precision"), [("self:w4a4", "w4a16"), ("self:skip=2", "w8a8"), ("self:skip=1", "full")]
)
def test_the_verifier_overwrites_what_a_self_drafter_wrote(family, draft, precision):
    model = _model(family, precision)
    decoder = model.decoder
    decoder.pack()
    cache, alone = decoder.new_cache(64), decoder.new_cache(64)
    drafter = new_drafter(draft, DraftTarget(model, cache, None))
    verifier = Verifier(decoder, cache, GreedyAcceptance(decoder.backend.argmax))
    text = [*PROMPT, verifier.start(PROMPT)]
    decoder.prefill(PROMPT, alone, keep=0)
    drafter.extend(text)
    speculator = Speculator(verifier, drafter, FixedWindow(3))
    for _ in range(10):
        tokens = speculator.step(text[-1:], len(text) - len(PROMPT), 8)
        for token in [text[-1], *tokens[:-1]]:
            decoder(torch.tensor([token]), alone, keep=0)
            alone.commit(1)
        text += tokens
        drafter.extend(tokens)
        assert cache.length == alone.length == len(text) - 1
        assert torch.equal(cache.k[:, :, : cache.length], alone.k[:, :, : cache.length])
        assert torch.equal(cache.v[:, :, : cache.length], alone.v[:, :, : cache.length])


class _Script(Drafter):
    """Proposes the true continuation, spoiled where the script says so."""

    def __init__(self, truth: list[int], script: list[int]) -> None:
        self._truth, self._script, self._known = truth, itertools.cycle(script), 0

    def extend(self, tokens):
        self._known += len(tokens)

    def propose(self, gamma, pending=()):
        start = self._known + len(pending)
        right = next(self._script)
        tokens = [t if i < right else (t + 1) % 160 for i, t in enumerate(self._truth[start : start + gamma])]
        return Draft(tokens[: right + 2])


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_any_pattern_of_acceptance_gives_the_same_ids_and_cache(script, gamma):
    decoder = _model("qwen3", "w4a16").decoder
    decoder.pack()
    plain, cache = decoder.new_cache(64), decoder.new_cache(64)
    verifier = Verifier(decoder, plain, GreedyAcceptance(decoder.backend.argmax))
    truth = [*PROMPT, verifier.start(PROMPT)]
    for position in range(1, 24):
        truth += verifier.step(truth[-1:], Draft(), position)
    drafter = _Script(truth, script)
    verifier = Verifier(decoder, cache, GreedyAcceptance(decoder.backend.argmax))
    text = [*PROMPT, verifier.start(PROMPT)]
    drafter.extend(text)
    speculator = Speculator(verifier, drafter, FixedWindow(gamma))
    while len(text) < len(truth):
        tokens = speculator.step(text[-1:], len(text) - len(PROMPT), len(truth) - len(text))
        text += tokens
        drafter.extend(tokens)
    assert text == truth
    assert torch.equal(cache.k[:, :, : cache.length], plain.k[:, :, : cache.length])


@given(st.lists(st.tuples(st.integers(1, 7), st.integers(0, 7)), min_size=1, max_size=6), st.booleans())
@settings(max_examples=20, deadline=None)
def test_the_cascades_cache_follows_the_confirmed_text(rounds, agree_with_bonus):
    """Blocks of any size, confirmed up to anywhere: what the quantised model proposes is what it says by itself."""
    decoder = _model("openpangu", "w8a8").decoder
    decoder.pack()
    inner = new_drafter("ngram", DraftTarget(_model("openpangu", "w8a8"), decoder.new_cache(1), None))
    drafter = CascadeDrafter(decoder, decoder.new_cache(120), inner, FixedWindow(3), None)
    text = [*PROMPT, 17]
    drafter.extend(text)
    for block, kept in rounds:
        proposed = drafter.propose(block).tokens
        assert len(proposed) == block
        cache = decoder.new_cache(120)
        verifier = Verifier(decoder, cache, GreedyAcceptance(decoder.backend.argmax))
        expected = [verifier.start(text)]
        while len(expected) < block:
            expected += verifier.step(expected[-1:], Draft(), len(expected))
        assert proposed == expected
        confirmed = [*proposed[: min(kept, block)], 40 if agree_with_bonus else 41]
        text += confirmed
        drafter.extend(confirmed)


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=4), st.lists(st.integers(0, 1), max_size=5)), max_size=8)
)
@settings(max_examples=200, deadline=None)
def test_a_followed_text_holds_what_the_cache_holds(rounds):
    cache = KVCache(1, 1, 200, 1, torch.float32, torch.device("cpu"))
    followed, committed = FollowedText(cache), [1]
    for confirmed, ahead in rounds:
        behind = followed.behind(committed, ahead)
        text = [*committed, *ahead]
        assert behind and followed.held + behind == text and cache.length == len(followed.held)
        followed.held += behind  # the decoder runs over them
        cache.commit(len(behind))
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
