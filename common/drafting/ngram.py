"""Prompt lookup: what followed the last time the text ended like this (Saxena 2023; section 3 of arXiv 2603.01399)."""

from __future__ import annotations

from collections.abc import Sequence

from common.drafting.base import Draft, Drafter

MAX_NGRAM = 3


class NGramDrafter(Drafter):
    """Continues the longest suffix n-gram (max 3, min 1) that occurred before, from its latest occurrence.

    An index of every n-gram's latest end makes a committed token cost MAX_NGRAM dictionary writes and a draft at
    most MAX_NGRAM reads, whatever the length of the text. A continuation that runs into the end of the text goes on
    through the draft itself, so a repeating pattern fills the whole window.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token that followed it last

    def __len__(self) -> int:
        """Tokens seen so far."""
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        known = self._tokens
        for token in tokens:
            # Index the n-grams that end here only now that something follows: a suffix never finds itself.
            end = len(known)
            for n in range(1, min(MAX_NGRAM, end) + 1):
                self._latest[tuple(known[end - n :])] = end
            known.append(token)

    def propose(self, gamma: int, pending: Sequence[int] = ()) -> Draft:
        known = self._tokens
        tail = [*known[-MAX_NGRAM:], *pending]
        for n in range(min(MAX_NGRAM, len(tail)), 0, -1):
            start = self._latest.get(tuple(tail[-n:]))
            if start is not None:
                period = len(known) + len(pending) - start
                draft = [*known[start : start + gamma], *pending][:gamma]
                while len(draft) < gamma:
                    draft.append(draft[-period])
                return Draft(draft)
        return Draft()
