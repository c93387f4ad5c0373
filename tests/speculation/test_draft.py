"""The tree of candidates: what is accepted, and what a pass says about every candidate."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quasar.speculation.draft import Draft

#        0 (5) -> 2 (6) -> 4 (8)
# root <                \> 3 (7)
#        1 (9)
TREE = Draft([5, 9, 6, 7, 8], [-1, -1, 0, 0, 2], [0.6, 0.3, 0.3, 0.2, 0.1], list("abcde"))


def test_depths_of_a_tree():
    assert TREE.depths() == [0, 0, 1, 1, 2]


def test_the_accepted_path_follows_the_targets_own_tokens():
    assert TREE.accepted(5, [5, 6, 0, 8, 0, 0]) == [0, 2, 4]
    assert TREE.accepted(5, [5, 7, 0, 8, 0, 0]) == [0, 3]
    assert TREE.accepted(5, [9, 6, 0, 8, 0, 0]) == [1]
    assert TREE.accepted(5, [1, 6, 0, 8, 0, 0]) == []
    assert TREE.accepted(2, [5, 6, 0]) == [0]


def test_outcomes_of_candidates_whose_ancestors_were_right():
    assert list(TREE.outcomes(5, [5, 7, 0, 8, 0, 0])) == [("a", True), ("b", False), ("c", False), ("d", True)]
    assert list(TREE.outcomes(5, [1, 6, 0, 0, 0, 0])) == [("a", False), ("b", False)]


def test_a_candidate_that_the_pass_left_out_is_compared_where_its_place_is_known():
    assert list(TREE.outcomes(0, [9])) == [("a", False), ("b", True)]
    assert list(TREE.outcomes(1, [5, 6])) == [("a", True), ("b", False), ("c", True), ("d", False)]


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), min_size=9, max_size=9))
def test_a_chain_keeps_its_longest_agreeing_prefix(tokens, own):
    draft = Draft.chain(tokens, [0.5**i for i in range(len(tokens))], list(range(len(tokens))))
    agreeing = next((i for i in range(len(tokens)) if tokens[i] != own[i]), len(tokens))
    assert draft.accepted(len(tokens), own) == list(range(agreeing))
    assert draft.first(3).accepted(min(3, len(tokens)), own) == list(range(min(agreeing, 3)))
