"""The acceptance rules: greedy against argmax, sampling against the exact distribution."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar import QuasarError
from quasar.speculation import acceptance
from quasar.speculation.acceptance import (
    GreedyAcceptance,
    Sampling,
    SamplingAcceptance,
    rejection_sample,
    sample_inverse_cdf,
    target_distribution,
)
from quasar.speculation.draft import Draft

VOCAB = 8
# 99.9 % points of chi-square, by degrees of freedom.
CHI_SQUARE = {5: 20.52, 6: 22.46, 7: 24.32}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.data())
def test_greedy_keeps_the_agreeing_prefix_and_adds_one(own, data):
    draft = data.draw(st.lists(st.integers(0, 3), min_size=len(own) - 1, max_size=len(own) - 1))
    logits = torch.nn.functional.one_hot(torch.tensor(own), 4).float()
    kept = GreedyAcceptance(partial(torch.argmax, dim=-1))(logits, Draft(draft), 0)
    agreed = next((i for i, (a, b) in enumerate(zip(draft, own, strict=False)) if a != b), len(draft))
    assert kept == own[: agreed + 1]


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> tuple[float, int]:
    """Statistic and degrees of freedom; a token of probability 0 must not have come at all."""
    assert counts[probs == 0].sum() == 0
    expected = probs[probs > 0] * counts.sum()
    return ((counts[probs > 0] - expected) ** 2 / expected).sum().item(), int((probs > 0).sum()) - 1


def first_tokens(p: torch.Tensor, q: torch.Tensor | None, draws: int = 4_000) -> torch.Tensor:
    """How often each token comes first, when one token is drafted from q (None: always token 2) and verified."""
    rule = SamplingAcceptance(Sampling(seed=3))
    generator = torch.Generator().manual_seed(4)
    logits = p.log().float().expand(2, -1)
    drafts = [2] * draws if q is None else torch.multinomial(q, draws, replacement=True, generator=generator).tolist()
    counts = torch.zeros(VOCAB)
    for position, token in enumerate(drafts):
        draft = Draft([token], None if q is None else q[None])
        counts[rule(logits, draft, 2 * position)[0]] += 1
    return counts


P = torch.tensor([0.30, 0.02, 0.20, 0.00, 0.25, 0.08, 0.05, 0.10])
Q = torch.tensor([0.05, 0.30, 0.05, 0.10, 0.30, 0.10, 0.10, 0.00])


@pytest.mark.parametrize("q", [None, Q, P], ids=["point mass", "another distribution", "the target itself"])
def test_output_has_the_target_distribution(q):
    statistic, freedom = chi_square(first_tokens(P, q), P)
    assert statistic < CHI_SQUARE[freedom]


def test_the_chi_square_test_finds_a_wrong_rejection_rule(monkeypatch):
    """The classic mistake: after a rejection, sampling from p instead of max(p - q, 0)."""

    def wrong(probs, tokens, draft_probs, uniforms):
        right = rejection_sample(probs, tokens, draft_probs, uniforms)
        own = sample_inverse_cdf(probs, uniforms[:, 1]).tolist()
        return right if len(right) > len(tokens) else [*right[:-1], own[len(right) - 1]]

    monkeypatch.setattr(acceptance, "rejection_sample", wrong)
    statistic, freedom = chi_square(first_tokens(P, Q).where(P > 0, 0), P)
    assert statistic > 5 * CHI_SQUARE[freedom]


def test_the_chi_square_test_finds_a_rule_that_always_accepts(monkeypatch):
    monkeypatch.setattr(acceptance, "_until_mismatch", lambda own, tokens: [*tokens, own[-1]])
    statistic, freedom = chi_square(first_tokens(P, None), P)
    assert statistic > 5 * CHI_SQUARE[freedom]


def test_a_whole_window_has_the_joint_distribution():
    """Two drafted tokens under a Markov target: pairs of first two output tokens, drafted from another chain."""
    generator = torch.Generator().manual_seed(0)
    start = torch.tensor([0.5, 0.3, 0.2])
    chain = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]])
    wrong = torch.tensor([[0.2, 0.6, 0.2], [0.4, 0.3, 0.3], [0.6, 0.2, 0.2]])
    rule = SamplingAcceptance(Sampling(seed=1))
    counts, position = torch.zeros(3, 3), 0
    for _ in range(4_000):
        first = int(torch.multinomial(wrong[0], 1, generator=generator))
        second = int(torch.multinomial(wrong[first], 1, generator=generator))
        probs = torch.stack([start, chain[first], chain[second]])
        draft = Draft([first, second], torch.stack([wrong[0], wrong[first]]))
        tokens = rule(probs.log(), draft, position)
        position += 3
        if len(tokens) == 1:  # the next window gives the second token
            tokens += rule(chain[tokens[0]].log()[None], Draft(), position)
            position += 1
        counts[tokens[0], tokens[1]] += 1
    statistic, _ = chi_square(counts.flatten(), (start[:, None] * chain).flatten())
    assert statistic < 26.12  # 99.9 % point, 8 degrees of freedom


def test_accepts_as_often_as_the_distributions_overlap():
    """The acceptance rate is sum min(p, q) (Leviathan et al. 2023, corollary 3.6)."""
    rule, generator, accepted, draws = SamplingAcceptance(Sampling()), torch.Generator().manual_seed(0), 0, 4_000
    for position, token in enumerate(torch.multinomial(Q, draws, replacement=True, generator=generator).tolist()):
        accepted += len(rule(P.log().expand(2, -1), Draft([token], Q[None]), 2 * position)) - 1
    assert accepted / draws == pytest.approx(torch.minimum(P, Q).sum().item(), abs=0.026)


def test_same_seed_same_tokens_with_and_without_a_draft():
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    plain = SamplingAcceptance(Sampling(seed=9))
    tokens = [plain(logits[i : i + 1], Draft(), i)[0] for i in range(6)]
    drafted = SamplingAcceptance(Sampling(seed=9))
    assert drafted(logits, Draft(tokens[:5]), 0) == tokens
    wrong = [*tokens[:3], (tokens[3] + 1) % 50, tokens[4]]
    assert SamplingAcceptance(Sampling(seed=9))(logits, Draft(wrong), 0) == tokens[:4]
    other = SamplingAcceptance(Sampling(seed=10))
    assert [other(logits[i : i + 1], Draft(), i)[0] for i in range(6)] != tokens


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7),
        Sampling(1.3, top_k=5),
        Sampling(1.0, top_p=0.6),
        Sampling(0.8, 20, 0.9),
        Sampling(1.0, top_p=0.01),
        Sampling(1.0, top_k=1),
        Sampling(1.0, top_k=300, top_p=0.99),
    ],
)
@pytest.mark.parametrize(
    ("vocab", "spread", "step"), [(60, 1.0, 0.0), (2000, 5.0, 0.0), (2000, 0.1, 0.0), (2000, 2.0, 0.5)]
)
def test_distribution_equals_transformers_processors(sampling, vocab, spread, step):
    """Small and large vocabularies, peaked, nearly flat (half of the tokens hold top_p), and with many equals."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(1)) * spread
    if step:
        sampling = replace(sampling, top_p=1.0)  # which of the equals at the end of a nucleus stay is anybody's choice
        logits = (logits / step).round() * step
    expected = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k:
        expected = TopKLogitsWarper(sampling.top_k)(None, expected)
    if sampling.top_p < 1:
        expected = TopPLogitsWarper(sampling.top_p)(None, expected)
    torch.testing.assert_close(target_distribution(logits, sampling).float(), expected.softmax(-1))


def test_inverse_cdf_never_draws_the_impossible():
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).double().expand(4, -1)
    uniform = torch.tensor([0.0, 0.4999999, 0.5, 1 - 1e-16], dtype=torch.float64)
    assert sample_inverse_cdf(probs, uniform).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
    ],
)
def test_settings_that_make_no_distribution(settings_, message):
    with pytest.raises(QuasarError, match=message):
        Sampling(**settings_)
