"""Drafting that makes steps slower than it makes them fewer rests, and comes back when it pays."""

from __future__ import annotations

from quasar.engine.worth import Worth
from tests.helpers.unmeasured import learn_worth


def shares(worth: Worth, steps: int, sequences: int, tokens: int, drafting: float, plain: float) -> float:
    """The share of so many steps in which drafters are asked; their tokens, and the seconds of a step of each kind."""
    asked = 0
    for _ in range(steps):
        asks = worth.asks(sequences)
        asked += asks
        learn_worth(worth, sequences, asks, tokens if asks else sequences, drafting if asks else plain)
    return asked / steps


def test_drafts_that_cost_more_than_they_bring_are_rare() -> None:
    worth = Worth()
    assert shares(worth, 1000, 16, tokens=18, drafting=0.028, plain=0.019) < 0.1
    assert 0 < shares(worth, 1000, 16, tokens=18, drafting=0.028, plain=0.019) < 0.03


def test_drafts_that_pay_are_made_in_almost_every_step() -> None:
    assert shares(Worth(), 1000, 4, tokens=6, drafting=0.012, plain=0.010) > 0.97


def test_a_text_that_drafts_begin_to_match_is_noticed() -> None:
    worth = Worth()
    shares(worth, 500, 1, tokens=1, drafting=0.012, plain=0.010)
    shares(worth, 400, 1, tokens=4, drafting=0.012, plain=0.010)
    assert shares(worth, 400, 1, tokens=4, drafting=0.012, plain=0.010) > 0.97


def test_numbers_of_sequences_are_judged_each_by_itself() -> None:
    worth = Worth()
    shares(worth, 500, 16, tokens=16, drafting=0.03, plain=0.02)
    assert shares(worth, 500, 1, tokens=2, drafting=0.012, plain=0.010) > 0.95
