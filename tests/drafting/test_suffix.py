"""The suffix automaton against brute force, and what is drafted from it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar import QuasarError, generate
from quasar.drafting import suffix as suffix_module
from quasar.drafting.suffix import SuffixDrafter, SuffixStore
from quasar.drafting.suffix_automaton import ROOT, SuffixAutomaton
from tests.helpers.random_models import shared_random_model

texts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=4)


def occurrences(texts: list[list[int]], part: list[int]) -> int:
    return sum(text[i : i + len(part)] == part for text in texts for i in range(len(text) - len(part) + 1))


@given(texts, st.randoms(use_true_random=False))
@settings(max_examples=150)
def test_every_substring_is_found_as_often_as_it_occurs(texts, random):
    automaton, states, fed = SuffixAutomaton(), [ROOT] * len(texts), [0] * len(texts)
    while any(n < len(text) for n, text in zip(fed, texts, strict=True)):  # interleaved, as requests are
        i = random.choice([i for i, text in enumerate(texts) if fed[i] < len(text)])
        states[i] = automaton.extend(states[i], texts[i][fed[i]])
        fed[i] += 1
    for text in texts:
        for start in range(len(text)):
            for end in range(start + 1, len(text) + 1):
                state = ROOT
                for token in text[start:end]:
                    state = automaton.following[state][token]
                assert automaton.count[state] == occurrences(texts, text[start:end])
    for i, text in enumerate(texts):
        assert automaton.length[states[i]] == len(text)
    assert len(automaton.length) <= 2 * sum(map(len, texts)) + 1


@given(st.lists(st.integers(0, 2), min_size=1, max_size=20), st.lists(st.integers(0, 2), max_size=5))
@settings(max_examples=100)
def test_pending_tokens_are_matched_without_being_learnt(text, pending):
    drafter = SuffixDrafter()
    drafter.extend(text)
    states = len(drafter._automaton.length)
    first = drafter.propose(6, pending)
    assert len(first.tokens) <= 6
    assert drafter.propose(6, pending) == first and len(drafter._automaton.length) == states


def test_the_commoner_continuation_wins():
    drafter = SuffixDrafter()
    drafter.extend([1, 2, 3, 1, 2, 3, 1, 2, 4, 9, 1, 2])
    assert drafter.propose(1).tokens == [3]


def test_a_longer_match_beats_a_commoner_shorter_one():
    drafter = SuffixDrafter()
    drafter.extend([5, 1, 2, 7, 7, 7, 0, 1, 2, 3, 0, 1, 2, 3, 5, 1, 2])
    assert drafter.propose(3).tokens[0] == 7


def test_length_follows_the_match():
    text = list(range(10, 40))
    short, long = SuffixDrafter(), SuffixDrafter()
    short.extend([*text, 99, 12])  # one token matches
    long.extend([*text, 99, 10, 11, 12, 13])
    assert short.propose(15).tokens == [13, 14]
    assert long.propose(15).tokens == [14, 15, 16, 17, 18, 19, 20, 21]
    assert long.propose(3).tokens == [14, 15, 16]


def test_a_repeating_text_fills_the_window():
    drafter = SuffixDrafter()
    drafter.extend([1, 2, 3] * 4)
    assert drafter.propose(9).tokens == [1, 2, 3] * 3


def test_nothing_to_go_by():
    drafter = SuffixDrafter()
    drafter.extend([1, 2, 3])
    assert drafter.propose(5).tokens == []


def test_a_store_helps_the_next_request(tmp_path):
    model = shared_random_model("qwen3", "w8a8")
    path = tmp_path / "store.jsonl"
    draft, prompt = f"suffix:{path}", [3, 77, 12, 150]
    first = generate(model, prompt, draft=draft, gamma=5, max_new_tokens=30).result()
    assert json.loads(path.read_text()) == [*prompt, *first.token_ids]
    second = generate(model, prompt, draft=draft, gamma=5, max_new_tokens=30).result()
    assert second.token_ids == first.token_ids
    assert second.stats.passes < first.stats.passes and second.stats.passes <= 7
    suffix_module._stores.clear()  # as in a new process
    third = generate(model, prompt, draft=draft, gamma=5, max_new_tokens=30).result()
    assert third.stats.passes <= second.stats.passes and len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("line", ["{}", "[1, 2", "[1.5]", "[160]", "[true]", '["a"]'])
def test_a_store_of_anything_else_is_refused(tmp_path, line):
    path = tmp_path / "store.jsonl"
    path.write_text("[1, 2]\n" + line + "\n")
    with pytest.raises(QuasarError, match=r"store\.jsonl:2 should be a JSON list of token ids below 160"):
        SuffixStore(path, 160)


def test_a_store_needs_a_folder(tmp_path):
    with pytest.raises(QuasarError, match="there is no folder"):
        SuffixStore(tmp_path / "no" / "store.jsonl", 160)
