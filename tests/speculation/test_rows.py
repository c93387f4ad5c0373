"""The rule for rows: what a pass verifies, by estimated survival and measured cost."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quasar.models.costs import PassCosts
from quasar.speculation.draft import Draft
from quasar.speculation.rows import CAPTURED_SIZES, PUBLISHED_GAMMA, FixedRows, RowRule

RULE = RowRule()
CAPTURED = RowRule(captured=True)
FLAT = PassCosts({1: 1.0, 16: 1.15, 32: 2.0, 64: 4.0})  # a device that is bound by memory up to 16 rows
STEEP = PassCosts({1: 1.0, 64: 64.0})  # each row costs as much as the first


def draft(*survival: float) -> Draft:
    return Draft.chain(list(range(len(survival))), list(survival), [("test", 0, 0)] * len(survival))


def test_free_rows_are_taken_and_dear_ones_are_not():
    likely, unlikely = draft(0.9, 0.8, 0.7), draft(0.004, 0.003)
    assert RULE.candidates([likely], 1, FLAT) == [3]
    assert RULE.candidates([unlikely], 1, FLAT) == [0]
    assert RULE.candidates([likely], 1, STEEP) == [0]


def test_rows_go_to_the_most_likely_of_all_sequences():
    assert RULE.candidates([draft(0.9, 0.8, 0.7, 0.6), draft(0.2, 0.1), draft(0.75)], 3, FLAT, most=8) == [4, 0, 1]
    assert RULE.candidates([draft(0.9)] * 3, 3, FLAT, most=2) == [0, 0, 0]  # a pass of prompts may be longer already


def test_a_step_in_the_cost_may_be_worth_climbing():
    """Sixteen rows cost as much as two: candidates that do not pay one by one pay together."""
    padded = PassCosts({1: 1.0, 2: 1.5, 16: 1.5})
    assert RULE.candidates([draft(*[0.3] * 10)], 1, padded) == [10]
    assert CAPTURED.candidates([draft(*[0.3] * 10)], 1, padded) == [7]
    assert RULE.candidates([draft(0.3)], 1, padded) == [0]


@given(
    st.lists(st.lists(st.floats(0, 1), max_size=5), min_size=1, max_size=4),
    st.lists(st.floats(0.01, 1.0), min_size=30, max_size=30),
)
def test_nothing_beats_the_choice(survivals, steps):
    """Against every choice of prefixes, or on a device that captures passes those that fill one of its sizes."""
    drafts = [draft(*sorted(s, reverse=True)) for s in survivals]
    costs = PassCosts(dict(enumerate(itertools.accumulate(steps), 1)))

    def rate(counts):
        tokens = len(drafts) + sum(sum(d.survival[:n]) for d, n in zip(drafts, counts, strict=True))
        return tokens / costs(len(drafts) + sum(counts))

    choices = list(itertools.product(*(range(len(d) + 1) for d in drafts)))
    assert rate(RULE.candidates(drafts, len(drafts), costs)) == pytest.approx(max(map(rate, choices)))
    filling = [counts for counts in choices if not any(counts) or len(drafts) + sum(counts) in CAPTURED_SIZES]
    assert rate(CAPTURED.candidates(drafts, len(drafts), costs)) == pytest.approx(max(map(rate, filling)))


@given(st.lists(st.floats(0, 1), max_size=40), st.lists(st.floats(0.01, 1.0), min_size=7, max_size=7))
def test_what_is_less_likely_than_the_least_never_pays(survival, steps):
    candidates = draft(*sorted(survival, reverse=True))
    costs = PassCosts(dict(zip((1, 2, 4, 8, 16, 32, 64), itertools.accumulate(steps), strict=True)))
    chosen = RULE.candidates([candidates], 1, costs)[0]
    assert all(s >= RULE.least(1, 1, costs) - 1e-9 for s in candidates.survival[:chosen])


def test_the_least_is_what_a_row_costs():
    costs = PassCosts({1: 1.0, 64: 7.3})  # a tenth of the first row each
    assert RULE.least(1, 1, costs) == pytest.approx(0.1)
    assert RULE.least(16, 16, costs) == pytest.approx(16 * 0.1 / costs(16))
    assert RULE.least(1, 1, STEEP) == pytest.approx(1.0)
    assert RULE.least(64, 64, costs) == 0.0  # no row could be added
    assert FixedRows(3).least(1, 1, costs) == 0.0


def test_a_chain_that_costs_passes_is_as_long_as_it_pays():
    assert RULE.chain([0.9**i for i in range(1, 9)], FLAT, seconds_per_candidate=0.0) == 8
    assert RULE.chain([0.9**i for i in range(1, 9)], FLAT, seconds_per_candidate=1.0) == 0
    short = RULE.chain([0.9**i for i in range(1, 9)], FLAT, seconds_per_candidate=0.4)
    assert 0 < short < 8
    # Others in the pass wait for the draft without gaining from it.
    assert RULE.chain([0.9**i for i in range(1, 9)], FLAT, seconds_per_candidate=0.4, others=8) == 0


def test_what_is_free_may_pay_better_than_a_chain():
    survival = [0.9**i for i in range(1, 9)]
    assert RULE.chain(survival, FLAT, seconds_per_candidate=0.4, free=draft(0.9, 0.8, 0.7)) == 0
    assert RULE.chain(survival, FLAT, seconds_per_candidate=0.1, free=draft(0.2, 0.1)) > 0


@given(
    st.lists(st.floats(0, 1), max_size=8),
    st.lists(st.floats(0, 1), max_size=4),
    st.integers(0, 3),
    st.floats(0, 1),
    st.lists(st.floats(0.01, 1.0), min_size=16, max_size=16),
)
def test_no_other_length_of_a_chain_brings_more(survival, free, others, seconds_per_candidate, steps):
    """Against every length, and against verifying any number of the free candidates instead."""
    survival, free = sorted(survival, reverse=True), sorted(free, reverse=True)
    costs = PassCosts(dict(enumerate(itertools.accumulate(steps), 1)))

    def rate(tokens: list[float], drafting: float) -> float:
        return (1 + others + sum(tokens)) / (costs(1 + others + len(tokens)) + drafting)

    lengths = [rate(survival[:n], n * seconds_per_candidate) for n in range(len(survival) + 1)]
    instead = max(rate(free[:n], 0.0) for n in range(len(free) + 1))
    length = RULE.chain(survival, costs, seconds_per_candidate, others, draft(*free))
    assert max(lengths[length], instead) == pytest.approx(max(*lengths, instead))
    assert length == 0 or lengths[length] > instead
    if not others:
        assert RULE.chain(survival, costs, seconds_per_candidate) == RULE.chain(
            survival, costs, seconds_per_candidate, 0, Draft()
        )


def test_a_pass_is_filled_to_a_size_that_was_captured():
    sizes = {1: 1, 2: 2, 3: 2, 4: 4, 7: 4, 8: 8, 15: 8, 16: 16, 63: 56, 64: 64, 70: 64}
    assert {rows: CAPTURED.filled(rows) for rows in sizes} == sizes
    assert [RULE.filled(rows) for rows in (1, 3, 63, 64, 65)] == [1, 3, 63, 64, 64]
    assert PUBLISHED_GAMMA == 5  # arXiv 2603.01399, section 4


def test_fixed_rows_do_not_look_at_costs():
    assert FixedRows(2).candidates([draft(0.1, 0.1, 0.1), draft(0.9)], 2, STEEP) == [2, 1]
    assert FixedRows(4).chain([0.5] * 3, STEEP, 100.0) == 3


def test_costs_are_interpolated_and_extrapolated():
    costs = PassCosts({1: 1.0, 3: 2.0, 5: 6.0})
    assert [costs(rows) for rows in (1, 2, 3, 4, 5, 7)] == [1.0, 1.5, 2.0, 4.0, 6.0, 10.0]
    assert PassCosts({1: 2.0})(9) == 2.0


def test_costs_follow_the_passes_that_really_ran():
    true = PassCosts({1: 9.0, 8: 12.0, 16: 15.0, 64: 40.0})
    for wrong in ([25.0, 25.5, 26.0, 60.0], [12.0, 20.0, 22.0, 50.0], [8.0, 9.0, 11.0, 90.0]):
        costs = PassCosts(dict(zip((1, 8, 16, 64), wrong, strict=True)))
        for n in range(80):
            rows = (1, 8, 9, 14)[n % 4]
            costs.learn(rows, true(rows) * (1 if n % 7 else 3))  # some are disturbed
        for rows in (1, 8, 16):
            assert costs(rows) == pytest.approx(true(rows), rel=0.25)


def test_rows_that_were_never_tried_are_tried_one_day():
    costs = PassCosts({1: 1.0, 8: 4.0})
    candidates = draft(*[0.3] * 7)
    assert RULE.candidates([candidates], 1, costs) == [0]
    for _ in range(300):
        costs.learn(1, 1.0)
    assert RULE.candidates([candidates], 1, costs) != [0]


def test_rows_for_drafts_that_are_never_right_are_never_tried():
    costs = PassCosts({1: 1.0, 8: 1.1})
    for _ in range(2000):
        assert RULE.candidates([draft(*[0.012] * 7)], 1, costs) == [0]
        costs.learn(1, 1.0)
