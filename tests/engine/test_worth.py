"""A drafter that takes more time than it saves is asked ever less often, and again as soon as it pays."""

from __future__ import annotations

import pytest

from quasar.engine.worth import Worth
from tests.helpers.unmeasured import learn_worth

TOKEN, STEP = 0.01, 0.04  # seconds that the engine takes for a token and a step; four sequences run


def asked(worth: Worth, steps: int, accepted: int, seconds: float) -> int:
    """In how many of so many steps a drafter is asked that always brings and takes so much."""
    count = 0
    for _ in range(steps):
        if worth.is_asked():
            count += 1
            learn_worth(worth, accepted, seconds, TOKEN, STEP, drafters=4)
    return count


@pytest.mark.parametrize("seconds", [0.0001, 0.002, 0.02])
def test_a_drafter_that_is_never_right_takes_a_hundredth_of_the_time(seconds: float) -> None:
    worth = Worth()
    asked(worth, 1000, 0, seconds)
    assert 0 < asked(worth, 4000, 0, seconds) * seconds * 4 <= 0.011 * 4000 * STEP


def test_a_drafter_that_pays_is_asked_in_every_step() -> None:
    assert asked(Worth(), 100, accepted=1, seconds=0.009) == 100
    assert asked(Worth(), 100, accepted=1, seconds=0.02) < 20


def test_a_drafter_that_begins_to_pay_is_asked_again_at_once() -> None:
    worth = Worth()
    asked(worth, 200, 0, 0.001)
    assert asked(worth, 50, 3, 0.001) >= 40
