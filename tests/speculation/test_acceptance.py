"""The one acceptance rule: the longest path that equals the target's own tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quasar.speculation.acceptance import accept
from tests.helpers.trees import trees


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.data())
def test_a_chain_keeps_the_agreeing_prefix_and_adds_one(own, data):
    draft = data.draw(st.lists(st.integers(0, 3), min_size=len(own) - 1, max_size=len(own) - 1))
    tokens, path = accept(lambda row: own[row + 1], draft, list(range(-1, len(draft) - 1)))
    agreed = next((i for i, (a, b) in enumerate(zip(draft, own, strict=False)) if a != b), len(draft))
    assert tokens == own[: agreed + 1] and path == list(range(agreed))


@given(trees(tokens=3), st.lists(st.integers(0, 2), min_size=13, max_size=13))
def test_a_tree_is_followed_as_a_chain_would_be(tree, own):
    """Node by node as defined: from the committed text to the child that the target says, as long as there is one."""
    tokens, parents = tree
    at, expected = -1, [own[0]]
    path = []
    while True:
        child = next((i for i, p in enumerate(parents) if p == at and tokens[i] == expected[-1]), None)
        if child is None:
            break
        at = child
        path.append(child)
        expected.append(own[child + 1])
    asked = []
    assert accept(lambda row: asked.append(row) or own[row + 1], tokens, parents) == (expected, path)
    assert asked == [-1, *path]  # nothing is asked that may not be certain


def test_tokens_and_parents_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError):
        accept(lambda row: 0, [0, 0], [-1])
