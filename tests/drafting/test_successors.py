"""The suffix trie against brute force."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from quasar.drafting.successors import SEPARATOR, Context, Successors

ORDER = 4
texts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=3)


def followers(sequences: list[list[int]], match: list[int]) -> list[int]:
    """What followed each occurrence of `match`, in order."""
    found = []
    for sequence in sequences:
        for end in range(len(match), len(sequence)):
            if sequence[end - len(match) : end] == match:
                found.append(sequence[end])
    return found


def check(trie: Successors, context: Context, sequences: list[list[int]], tail: list[int]) -> None:
    """Every match of the tail is there, with its continuations, their counts and their order."""
    for order in range(1, min(ORDER, len(tail)) + 1):
        found = followers(sequences, tail[-order:])
        occurrences = len(found) + sum(s[-order:] == tail[-order:] for s in sequences)
        if order < len(context.nodes):
            after = context.nodes[order][1]
            named = [token for token in after if token != SEPARATOR]
            assert named == sorted(set(found), key=lambda t: len(found) - found[::-1].index(t))
            for token in named:
                count = 1 if isinstance(after[token], int) else after[token][0]
                assert count == found.count(token)
        elif occurrences == 1 and found:
            assert context.leaf >= 0 and trie.at(context.leaf, ()) == found[0] and context.order >= order


@given(texts, st.lists(st.integers(0, 2), max_size=6))
@settings(max_examples=100)
def test_every_end_of_a_followed_text_is_found(sequences, tail):
    trie = Successors(ORDER)
    for sequence in sequences:
        trie.extend(sequence)
        trie.end()
    context = trie.outside()
    for n in range(len(tail)):
        context = trie.follow(context, tail[n])
        check(trie, context, sequences, tail[: n + 1])


@given(st.lists(st.integers(0, 2), min_size=1, max_size=24))
@settings(max_examples=100)
def test_the_end_of_the_text_itself(text):
    trie = Successors(ORDER)
    for n, token in enumerate(text):
        trie.extend([token])
        assert trie.tokens == text[: n + 1]
        check(trie, trie.context(), [text[: n + 1]], text[: n + 1])
    assert trie.counts == {token: text.count(token) for token in set(text)}
    assert [trie.counts[t] for t in trie.common] == sorted(trie.counts.values(), reverse=True)[: trie.COMMON]


def test_a_draft_goes_on_through_itself():
    trie = Successors(ORDER)
    trie.extend([1, 2, 1, 2])
    context, ahead = trie.context(), []
    for _ in range(6):
        named = [*reversed(context.nodes[-1][1])] if len(context.nodes) > 1 else []
        token = trie.at(context.leaf, ahead) if context.leaf >= 0 else named[0]
        context = trie.follow(context, token, ahead)
        ahead.append(token)
    assert ahead == [1, 2, 1, 2, 1, 2]


def test_nothing_follows_the_end_of_a_sequence():
    trie = Successors(ORDER)
    for sequence in ([1, 2, 3], [4, 5]):
        trie.extend(sequence)
        trie.end()
    context = trie.follow(trie.outside(), 3)
    assert context.leaf < 0 or trie.at(context.leaf, ()) == SEPARATOR


def test_what_ahead_follows_is_not_taken_in():
    trie = Successors(ORDER)
    trie.extend([1, 2, 3, 1, 2])
    before = (list(trie.tokens), dict(trie.counts))
    trie.follow(trie.follow(trie.context(), 9, ()), 8, [9])
    assert (trie.tokens, trie.counts) == before
