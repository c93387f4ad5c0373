"""The window follows the acceptance that is measured."""

import random

import pytest

from common.drafting.window import MAX_GAMMA, AdaptiveWindow, FixedWindow


def run(window, acceptance, steps, seed=0):
    """Simulates decoding at a true acceptance rate per token; returns (tokens, rows paid for, gammas)."""
    rng, tokens, cost, gammas = random.Random(seed), 0, 0.0, []
    for _ in range(steps):
        gamma = window.gamma()
        gammas.append(gamma)
        proposed = max(gamma, 1)
        accepted = next((i for i in range(proposed) if rng.random() >= acceptance), proposed)
        window.observe(proposed, accepted)
        tokens += (accepted if gamma else 0) + 1
        cost += 1 + AdaptiveWindow.COST * gamma
    return tokens, cost, gammas


def test_closes_when_no_draft_is_right_and_costs_next_to_nothing():
    tokens, cost, gammas = run(AdaptiveWindow(), 0.0, 400)
    assert set(gammas[40:]) == {0}
    assert cost / tokens < 1.02  # against 1 for plain decoding


def test_opens_again_when_drafts_come_true():
    window = AdaptiveWindow()
    run(window, 0.0, 400)
    assert window.gamma() == 0
    _, _, gammas = run(window, 1.0, 40)
    assert gammas[-1] == MAX_GAMMA


@pytest.mark.parametrize("acceptance", [0.0, 0.2, 0.5, 0.8, 0.95])
def test_is_near_the_best_fixed_gamma(acceptance):
    def speed(window):
        tokens, cost, _ = run(window, acceptance, 3000)
        return tokens / cost

    best = max(speed(FixedWindow(gamma)) for gamma in range(MAX_GAMMA + 1))
    assert speed(AdaptiveWindow()) > 0.93 * best


def test_an_empty_draft_says_nothing():
    window = AdaptiveWindow()
    before = vars(window).copy()
    window.observe(0, 0)
    assert vars(window) == before
