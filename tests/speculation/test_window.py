"""The adaptive window: what it chooses for known acceptance and cost, and how it closes and opens."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from quasar.drafting.costs import SIZES, PassCosts, pass_costs
from quasar.speculation.window import AdaptiveWindow, FixedWindow
from tests.helpers.random_models import shared_random_model


def flat(tokens: int) -> float:
    return 1.0


def linear(tokens: int) -> float:
    return float(tokens)


def memory_bound(tokens: int) -> float:
    return 1.0 + 0.05 * (tokens - 1)


def observe(window: AdaptiveWindow, drafted: int, accepted: int, seconds: float, around: float = 0.0) -> None:
    """A step of which the pass took what it was said to take, and all that surrounds it `around`."""
    window.observe(drafted, accepted, seconds, 1, flat(1) + around)


def settle(
    window: AdaptiveWindow, acceptance: float, seconds: float = 0.0, steps: int = 400, around: float = 0.0
) -> list[int]:
    """Gammas of the last 200 steps under independent acceptance. Every cost function here is 1 at 1 token."""
    generator, chosen = random.Random(0), []
    for _ in range(steps):
        gamma = window.gamma()
        drafted = max(gamma, 1)
        accepted = next((i for i in range(drafted) if generator.random() >= acceptance), drafted)
        observe(window, drafted, accepted, seconds * drafted, around)
        chosen.append(gamma)
    return chosen[-200:]


def test_free_passes_take_the_whole_window():
    assert set(settle(AdaptiveWindow(flat), 0.99)) == {15}


def test_passes_that_cost_by_the_row_stay_plain():
    assert set(settle(AdaptiveWindow(linear), 0.9)) == {0}


def test_what_surrounds_every_pass_pays_for_longer_windows():
    """Where a step costs ten passes before its pass begins, a second row costs next to nothing."""
    assert set(settle(AdaptiveWindow(linear), 0.8)) == {0}
    assert min(settle(AdaptiveWindow(linear), 0.8, around=10.0)) >= 2


def test_one_interruption_does_not_open_a_window():
    window = AdaptiveWindow(linear)
    settle(window, 0.8)
    observe(window, 1, 1, 0.0, around=1000.0)
    assert window.gamma() == 0


def test_drafts_that_are_never_right_close_the_window_within_a_few_steps():
    window = AdaptiveWindow(memory_bound)
    wasted = 0
    for _ in range(100):
        gamma = window.gamma()
        wasted += gamma > 0
        observe(window, max(gamma, 1), 0, 0.0)
    assert wasted <= 12 and window.gamma() == 0


def test_a_closed_window_opens_when_unverified_drafts_come_true():
    window = AdaptiveWindow(memory_bound)
    for _ in range(100):
        observe(window, 1, 0, 0.0)
    assert window.gamma() == 0
    for _ in range(10):
        observe(window, 1, 1, 0.0)
    assert window.gamma() > 0


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.9])
def test_the_choice_is_near_the_best_in_hindsight(acceptance):
    def rate(gamma: int) -> float:
        return sum(acceptance**i for i in range(gamma + 1)) / memory_bound(gamma + 1)

    chosen = settle(AdaptiveWindow(memory_bound), acceptance, steps=2000)
    assert sum(map(rate, chosen)) / len(chosen) > 0.95 * max(map(rate, range(16)))


def test_a_drafter_as_slow_as_the_target_is_not_used():
    window = AdaptiveWindow(flat, drafts_are_free=False, draft_seconds=1.0)
    chosen = settle(window, 0.8, seconds=1.0)
    assert sum(map(bool, chosen)) <= len(chosen) // 50


def test_the_cooldown_doubles_and_ends_when_drafts_pay():
    window = AdaptiveWindow(memory_bound, drafts_are_free=False, acceptance=0.0)
    probes = []
    for step in range(400):
        gamma = window.gamma()
        if gamma:
            probes.append(step)
            observe(window, gamma, 0, 0.01)
    gaps = [b - a for a, b in pairwise(probes)]
    assert probes[0] == 8 and gaps[:3] == [17, 33, 65] and set(gaps[3:]) <= {65}
    while not window.gamma():
        pass
    for _ in range(30):
        observe(window, 1, 1, 0.01)
    assert window.gamma() > 1


def test_one_interruption_does_not_close_the_window():
    window = AdaptiveWindow(memory_bound, drafts_are_free=False, draft_seconds=0.01, acceptance=0.9)
    before = window.gamma()
    observe(window, before, before, 50.0 * before)
    assert window.gamma() >= before
    for _ in range(4):
        observe(window, before, before, 50.0 * before)
    assert window.gamma() == 0


def test_there_may_be_a_least_window():
    window = AdaptiveWindow(flat, drafts_are_free=False, draft_seconds=5.0, least=8)
    chosen = [window.gamma() for _ in range(100)]
    assert chosen.index(8) == 64 and set(chosen) == {0, 8}
    chosen = settle(AdaptiveWindow(memory_bound, drafts_are_free=False, least=8), 0.6)
    assert min(g for g in chosen if g) == 8  # where 2 would be best without it


def test_a_fixed_window_stays():
    window = FixedWindow(4)
    observe(window, 4, 0, 1.0)
    assert window.gamma() == 4


def test_costs_between_and_beyond_what_was_measured():
    costs = PassCosts({1: 1.0, 4: 2.5, 8: 3.5})
    assert [costs(n) for n in (1, 2, 4, 6, 8, 12)] == pytest.approx([1.0, 1.5, 2.5, 3.0, 3.5, 4.5])
    assert PassCosts({2: 3.0})(9) == 3.0


def test_costs_are_measured_once_and_grow_with_the_window():
    decoder = shared_random_model("qwen3", "w8a8").decoder
    costs = pass_costs(decoder)
    assert pass_costs(decoder) is costs
    seconds = [costs(size) for size in range(1, SIZES[-1] + 1)]
    assert seconds[0] > 0
    assert all(b - a >= 0.019 * seconds[0] for a, b in pairwise(seconds[:2]))  # no row is free: windows can close
    assert seconds == sorted(seconds)


def test_an_empty_draft_says_nothing():
    window = AdaptiveWindow(memory_bound)
    before = vars(window).copy()
    observe(window, 0, 0, 0.0)
    assert vars(window) == before
