"""Sampling: the exact distribution, noise that is a function of its key, and drafts that change nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from quasar import QuasarError
from quasar.speculation import sampling as module
from quasar.speculation.acceptance import accept
from quasar.speculation.choice import TokenChooser
from quasar.speculation.sampling import Sampling, distribution, gumbel, own_token

VOCAB = 8
# 99.9 % points of chi-square, by degrees of freedom.
CHI_SQUARE = {5: 20.52, 6: 22.46, 7: 24.32, 8: 26.12}
P = torch.tensor([0.30, 0.02, 0.20, 0.00, 0.25, 0.08, 0.05, 0.10])
Q = torch.tensor([0.05, 0.30, 0.05, 0.10, 0.30, 0.10, 0.10, 0.00])


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> tuple[float, int]:
    """Statistic and degrees of freedom; a token of probability 0 must not have come at all."""
    assert counts[probs == 0].sum() == 0
    expected = probs[probs > 0] * counts.sum()
    return ((counts[probs > 0] - expected) ** 2 / expected).sum().item(), int((probs > 0).sum()) - 1


def counted(p: torch.Tensor, sampling: Sampling, draws: int = 4_000) -> torch.Tensor:
    counts = torch.zeros(len(p))
    for index in range(draws):
        counts[own_token(p.log(), sampling, index)] += 1
    return counts


@pytest.mark.parametrize("seed", [0, 3, 2**70 + 1, -5])
def test_tokens_have_the_target_distribution(seed):
    statistic, freedom = chi_square(counted(P, Sampling(seed=seed)), P)
    assert statistic < CHI_SQUARE[freedom]


def test_the_chi_square_test_finds_a_wrong_rule(monkeypatch):
    """A mistake that looks like sampling: noise that is uniform, not Gumbel's."""
    monkeypatch.setattr(module, "gumbel", lambda *key: module._uniform(module._hash(*key)))
    statistic, freedom = chi_square(counted(P, Sampling(seed=3)), P)
    assert statistic > 5 * CHI_SQUARE[freedom]


def test_seeds_and_indices_are_independent():
    """The same index under neighbouring seeds, and neighbouring indices under one seed: pairs have the product."""
    for pairs in (
        [(Sampling(seed=s), 7, Sampling(seed=s + 1), 7) for s in range(4_000)],
        [(Sampling(seed=1), 2 * i, Sampling(seed=1), 2 * i + 1) for i in range(4_000)],
    ):
        counts = torch.zeros(3, 3)
        p = torch.tensor([0.5, 0.3, 0.2])
        for a, i, b, j in pairs:
            counts[own_token(p.log(), a, i), own_token(p.log(), b, j)] += 1
        statistic, _ = chi_square(counts.flatten(), (p[:, None] * p).flatten())
        assert statistic < CHI_SQUARE[8]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("spread", [0.1, 2.0, 10.0])
def test_large_vocabularies_give_the_argmax_over_all_tokens(spread, top_p):
    """The few tokens whose noise is worth a logarithm hold the winner."""
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(0.8, top_p=top_p, seed=11)
    for index in range(60):
        logits = torch.randn(5000, generator=generator) * spread
        score = distribution(logits, sampling).log().numpy() + gumbel(11, index, np.arange(5000))
        assert own_token(logits, sampling, index) == int(np.argmax(score))


def test_noise_is_the_same_everywhere():
    """Fixed numbers: a text that a seed gave must come again in every later version and on every device."""
    noise = gumbel(7, 3, np.array([0, 1, 151935]))
    np.testing.assert_allclose(noise, FIXED_NOISE, rtol=1e-12)
    assert len({float(gumbel(seed, 0, np.array([5]))[0]) for seed in (0, 1, -1, 2**64 - 1, 2**64, 2**200)}) == 6


FIXED_NOISE = [1.2262450433625853, 1.9926413890463366, -0.29707687323621657]


def test_same_seed_same_tokens_with_and_without_a_draft():
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    plain = TokenChooser(Sampling(seed=9))
    tokens = [plain.choose(row) for row in logits]

    def verified(draft: list[int]) -> list[int]:
        chooser = TokenChooser(Sampling(seed=9))
        return accept(lambda row: chooser.choose(logits[row + 1]), draft, list(range(-1, len(draft) - 1)))[0]

    assert verified(tokens[:5]) == tokens
    assert verified([*tokens[:3], (tokens[3] + 1) % 50, tokens[4]]) == tokens[:4]
    other = TokenChooser(Sampling(seed=10))
    assert [other.choose(row) for row in logits] != tokens


def test_shared_noise_couples_draft_and_target():
    """P(equal) >= (1 - TV) / (1 + TV) (Daliri et al. 2024, theorem 2)."""
    draws = 4_000
    equal = sum(
        own_token(P.log(), Sampling(seed=1), i) == own_token(Q.log(), Sampling(seed=1), i) for i in range(draws)
    )
    distance = (P - Q).abs().sum().item() / 2
    assert equal / draws > (1 - distance) / (1 + distance) - 0.026


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
        Sampling(0.7, min_p=0.1),
    ],
)
@pytest.mark.parametrize(
    ("vocab", "spread", "step"), [(60, 1.0, 0.0), (2000, 5.0, 0.0), (2000, 0.1, 0.0), (2000, 2.0, 0.5)]
)
def test_distribution_equals_transformers_processors(sampling, vocab, spread, step):
    """Small and large vocabularies, peaked, nearly flat (half of the tokens hold top_p), and with many equals."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(1)) * spread
    if step:
        sampling = replace(sampling, top_p=1.0)  # which of the equals at the end of a nucleus stay is anybody's choice
        logits = (logits / step).round() * step
    expected = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k:
        expected = TopKLogitsWarper(sampling.top_k)(None, expected)
    if sampling.top_p < 1:
        expected = TopPLogitsWarper(sampling.top_p)(None, expected)
    if sampling.min_p:
        expected = MinPLogitsWarper(sampling.min_p)(None, expected)
    ours = torch.stack([distribution(row, sampling) for row in logits])
    torch.testing.assert_close(ours.float(), expected.softmax(-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
    ],
)
def test_settings_that_make_no_distribution(settings_, message):
    with pytest.raises(QuasarError, match=message):
        Sampling(**settings_)
