"""Prompt lookup: what followed the last time the text ended like this (Saxena 2023; section 3 of arXiv 2603.01399)."""

from __future__ import annotations

from collections.abc import Sequence

from quasar.drafting.survival import SurvivalTable
from quasar.speculation.draft import Draft, Drafter, TopRow

MAX_NGRAM = 3
_FIRST = (0.24, 0.39, 0.53)  # of the first token behind a match of one, two and three tokens


def prior(source: str, match: int, depth: int) -> float:
    """Of the token at `depth` behind a match of 1 to 3 tokens being right, its ancestors given."""
    return 1 - (1 - _FIRST[match - 1]) * 0.8**depth


class NGramDrafter(Drafter):
    """Continues the longest suffix n-gram (max 3, min 1) that occurred before, from its latest occurrence.

    An index of every n-gram's latest end makes a committed token cost MAX_NGRAM dictionary writes and a draft at
    most MAX_NGRAM reads, whatever the length of the text. A continuation that runs into the end of the text goes on
    through the draft itself, so a repeating pattern fills the whole window.
    """

    def __init__(self, survival: SurvivalTable | None = None) -> None:
        """survival: a table to share with other sequences."""
        self._survival = SurvivalTable(prior) if survival is None else survival
        self._tokens: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token that followed it last

    def __len__(self) -> int:
        """Tokens seen so far."""
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        known = self._tokens
        for token in tokens:
            # Index the n-grams that end here only now that something follows: a suffix never finds itself.
            for ngram in _ends(known):
                self._latest[ngram] = len(known)
            known.append(token)

    def propose(self, most: int, pending: Sequence[int] = (), least: float = 0.0) -> Draft:
        known, text = self._tokens, len(self._tokens) + len(pending)
        tail, recent = known[-MAX_NGRAM:], {}
        for end, token in enumerate(pending, len(known)):
            recent |= dict.fromkeys(_ends(tail), end)
            tail.append(token)
        for ngram in reversed(_ends(tail)):
            start = recent.get(ngram, self._latest.get(ngram))
            if start is not None:
                draft = [*known[start : start + most], *pending[max(start - len(known), 0) :]][:most]
                while len(draft) < most:
                    draft.append(draft[start - text])
                return Draft.chain(draft, *self._survival.chain("ngram", len(ngram), len(draft)))
        return Draft()

    def observe(self, draft: Draft, verified: int, own: Sequence[int], top: Sequence[TopRow] | None = None) -> None:
        self._survival.learn(draft.outcomes(verified, own))


def _ends(tokens: list[int]) -> list[tuple[int, ...]]:
    """The n-grams that the tokens end with, shortest first."""
    return [tuple(tokens[len(tokens) - n :]) for n in range(1, min(MAX_NGRAM, len(tokens)) + 1)]
