"""Prompt lookup against its definition, written the slow way."""

from hypothesis import given, settings
from hypothesis import strategies as st

from quasar.drafting.ngram import NGramDrafter


def by_definition(tokens: list[int], gamma: int) -> list[int]:
    """The continuation of the latest earlier occurrence of the longest suffix n-gram, n = 3, 2, 1."""
    for n in (3, 2, 1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if len(tokens) > n and tokens[start : start + n] == tokens[-n:]:
                text = list(tokens)  # it goes on through itself where the text ends
                for i in range(gamma):
                    text.append(text[start + n + i])
                return text[len(tokens) :]
    return []


@settings(max_examples=400)
@given(st.lists(st.lists(st.integers(0, 4), max_size=8), max_size=8), st.integers(1, 8))
def test_equals_the_definition_however_the_tokens_arrive(pieces, gamma):
    drafter, text = NGramDrafter(), []
    for piece in pieces:
        drafter.extend(piece)
        text += piece
        draft = drafter.propose(gamma)
        assert draft.parents == list(range(-1, len(draft) - 1))
        assert draft.tokens == by_definition(text, gamma)


@settings(max_examples=400)
@given(st.lists(st.integers(0, 4), max_size=30), st.lists(st.integers(0, 4), max_size=12), st.integers(1, 8))
def test_pending_tokens_count_as_text_and_are_not_learnt(text, pending, gamma):
    drafter = NGramDrafter()
    drafter.extend(text)
    assert drafter.propose(gamma, pending).tokens == by_definition(text + pending, gamma)
    assert drafter.propose(gamma).tokens == by_definition(text, gamma)


def draft_after(tokens, gamma=5):
    drafter = NGramDrafter()
    drafter.extend(tokens)
    return drafter.propose(gamma).tokens


def test_longest_match_wins_over_the_latest():
    assert draft_after([1, 2, 3, 7, 8, 9, 2, 3, 5, 3, 6, 1, 2, 3], gamma=2) == [7, 8]


def test_latest_of_equally_long_matches():
    assert draft_after([1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3], gamma=1) == [8]


def test_a_loop_fills_the_window():
    assert draft_after([1, 2, 1, 2], gamma=5) == [1, 2, 1, 2, 1]
    assert draft_after([4, 4], gamma=5) == [4] * 5


def test_nothing_to_go_by():
    assert draft_after([]) == draft_after([1]) == draft_after([1, 2, 3]) == []
