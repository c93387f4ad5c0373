"""The default drafter: its trees are trees, learn from what came, and find what the sources hold."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar.drafting.corpus import Corpus
from quasar.drafting.evidence import SIZE, Evidence
from quasar.drafting.free import FREE_DRAFTS, new_free_drafter
from quasar.drafting.hybrid import HybridDrafter
from quasar.drafting.memory import DraftMemory
from quasar.drafting.priors import prior_weights
from quasar.errors import QuasarError
from quasar.speculation.draft import Draft

tokens = st.lists(st.integers(0, 5), min_size=1, max_size=40)


def assert_tree(draft: Draft, most: int) -> None:
    assert len(draft) <= most
    assert len(draft.tokens) == len(draft.parents) == len(draft.survival) == len(draft.keys)
    assert all(parent < i for i, parent in enumerate(draft.parents))
    assert len(set(zip(draft.parents, draft.tokens, strict=True))) == len(draft)  # siblings differ
    assert draft.survival == sorted(draft.survival, reverse=True)
    assert all(0 < survival < 1 for survival in draft.survival)
    assert [key.depth for key in draft.keys] == draft.depths()


@pytest.mark.parametrize("name", [name for name in FREE_DRAFTS if name not in ("none", "ngram", "suffix")])
@given(tokens, tokens, st.integers(1, 20), st.lists(st.integers(0, 5), max_size=4), st.data())
@settings(max_examples=25)
def test_whatever_was_seen_the_draft_is_a_tree(name, earlier, text, most, pending, data):
    memory = DraftMemory(Corpus())
    memory.corpus.add(earlier * 4)
    memory.settle()
    drafter = new_free_drafter(name, memory)
    drafter.extend(text)
    for _ in range(3):
        draft = drafter.propose(most, pending)
        assert_tree(draft, most)
        assert drafter.propose(most, pending) == draft  # nothing is learnt by asking
        draft = drafter.propose(most)
        verified = data.draw(st.integers(0, len(draft)))
        own = data.draw(st.lists(st.integers(0, 5), min_size=verified + 1, max_size=verified + 1))
        top = [[(token, 0.7), (token + 1, 0.2), (9, 0.1)] for token in own] if drafter.top_k else None
        drafter.observe(draft, verified, own, top)
        path = draft.accepted(verified, own)
        drafter.extend([own[i] for i in [0, *(i + 1 for i in path)]])
    drafter.finish()


@given(tokens, st.integers(1, 12))
@settings(max_examples=25)
def test_a_short_draft_begins_a_long_one(text, most):
    drafter = HybridDrafter()
    drafter.extend(text)
    long = drafter.propose(20).first(most)
    short = drafter.propose(most)
    assert short.survival == pytest.approx(long.survival)


def test_a_repetition_is_continued():
    drafter = HybridDrafter()
    drafter.extend([3, 14, 15, 92, 65, 35, 89, 3, 14, 15])
    draft = drafter.propose(7)
    assert draft.tokens[draft.parents.index(-1)] == 92
    spine = [t for t, p, k in zip(draft.tokens, draft.parents, draft.keys, strict=True) if k.match >= 3]
    assert spine[:4] == [92, 65, 35, 89]


def test_two_continuations_are_both_candidates():
    drafter = HybridDrafter()
    drafter.extend([7, 1, 2, 8, 1, 3, 9, 1])
    draft = drafter.propose(7)
    assert {2, 3} <= {t for t, p in zip(draft.tokens, draft.parents, strict=True) if p == -1}


def test_a_draft_of_a_loop_goes_on_through_itself():
    drafter = HybridDrafter()
    drafter.extend([4, 5, 6] * 5)
    draft = drafter.propose(7)
    path, at = [], -1
    while at in draft.parents:
        at = draft.parents.index(at)
        path.append(draft.tokens[at])
    assert path[:4] == [4, 5, 6, 4]


def test_the_verifiers_runners_up_come_again():
    drafter = HybridDrafter(top_k=4)
    drafter.extend([1, 2])
    drafter.observe(drafter.propose(3), 0, [3], [[(3, 0.5), (30, 0.4), (31, 0.1), (32, 0.0)]])
    drafter.extend([3, 9, 2])
    draft = drafter.propose(7)
    first = [t for t, p in zip(draft.tokens, draft.parents, strict=True) if p == -1]
    assert {3, 30} <= set(first)
    assert "recycled" in {key.source for key in draft.keys}


def test_survival_follows_what_comes_true():
    memory = DraftMemory()
    drafter = HybridDrafter(memory)
    drafter.extend([1, 2, 3, 4, 1, 2, 3])
    before = drafter.propose(4).survival[0]
    for _ in range(150):  # never right
        drafter.observe(drafter.propose(4), 0, [99])
    low = drafter.propose(4).survival[0]
    assert low < before / 2
    for _ in range(200):
        draft = drafter.propose(4)
        drafter.observe(draft, 0, [draft.tokens[0]])
    assert drafter.propose(4).survival[0] > 2 * low


def test_text_that_is_never_right_is_soon_believed_to_be_so():
    drafter = HybridDrafter()
    drafter.extend([n % 7 for n in range(40)])
    first = sum(drafter.propose(7).survival)
    for n in range(30):
        drafter.observe(drafter.propose(7), 0, [1000 + n])
    assert sum(drafter.propose(7).survival) < 0.3 * first


def test_bounds_hold_after_learning():
    evidence = Evidence(prior_weights(False, False))
    for n in range(200):
        evidence.learn([((n % SIZE, (7 * n) % SIZE), 0.5, n % 3 == 0)])
    fresh = Evidence(evidence.weights)
    assert all(a <= b + 2 * Evidence.RATE * 64 for a, b in zip(fresh.bound, evidence.bound, strict=True))


def test_every_set_of_sources_has_priors():
    for corpus in (False, True):
        for recycled in (False, True):
            assert len(prior_weights(corpus, recycled)) == SIZE


def test_a_drafter_of_models_is_refused_where_there_is_none():
    with pytest.raises(QuasarError, match="self:w4a4: needs a model"):
        new_free_drafter("self:w4a4", DraftMemory())


def test_an_empty_text_has_no_draft():
    assert HybridDrafter().propose(7) == Draft()
