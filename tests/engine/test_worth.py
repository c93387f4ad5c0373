"""Drafts that take more time than they save are rare, and come back when they pay."""

from __future__ import annotations

import pytest

from quasar.engine.worth import Worth
from tests.helpers.unmeasured import learn_worth

PLAIN = 0.01  # seconds of a step without drafts


def share(worth: Worth, steps: int, sequences: int, accepted: int, taken: float) -> float:
    """The share of so many steps in which drafters are asked; what each brings, and the seconds it takes."""
    asked = 0
    for _ in range(steps):
        if worth.asks(sequences):
            asked += 1
            learn_worth(worth, sequences, accepted, taken, PLAIN)
    return asked / steps


@pytest.mark.parametrize("taken", [0.0002, 0.001, 0.004])
def test_drafts_that_are_never_right_take_a_hundredth_of_the_time(taken: float) -> None:
    worth = Worth()
    share(worth, 1000, 1, accepted=0, taken=taken)
    assert 0 < share(worth, 4000, 1, accepted=0, taken=taken) * taken <= 0.0105 * PLAIN


def test_a_candidate_is_worth_less_to_many_sequences() -> None:
    assert share(Worth(), 1000, 1, accepted=1, taken=0.004) == 1
    assert share(Worth(), 1000, 16, accepted=1, taken=0.004) < 0.1


def test_a_text_that_drafts_begin_to_match_is_noticed() -> None:
    worth = Worth()
    share(worth, 500, 1, accepted=0, taken=0.0004)
    assert share(worth, 100, 1, accepted=2, taken=0.0004) > 0.95


def test_one_step_of_luck_or_of_none_decides_nothing() -> None:
    worth = Worth()
    share(worth, 100, 1, accepted=1, taken=0.002)
    share(worth, 1, 1, accepted=0, taken=0.004)
    assert worth.asks(1)


def test_numbers_of_sequences_are_judged_each_by_itself() -> None:
    worth = Worth()
    share(worth, 500, 16, accepted=0, taken=0.004)
    assert worth.asks(1)
