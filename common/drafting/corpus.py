"""Earlier requests as a source of drafts: one index for all sequences, of bounded size."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from quasar.drafting.evidence import ORDER
from quasar.drafting.successors import Context, Successors

MOST_TOKENS = 400_000  # in the index; some 250 bytes each
_USEFUL = 32  # tokens from which on it is consulted
_WORK = 4  # tokens taken in for each token that a sequence commits


class Corpus:
    """An index over the latest `most_tokens / 2` to `most_tokens` tokens of finished sequences.

    When it is half full a successor begins that takes the same sequences, and takes over when it is full. A finished
    sequence waits in a queue and is taken in little by little, so that no pass has to wait for a long one.
    """

    def __init__(self, most_tokens: int = MOST_TOKENS) -> None:
        self.successors = Successors(ORDER)
        self._next: Successors | None = None
        self._most = max(most_tokens, 2)
        self._queue: deque[tuple[int, Sequence[int]]] = deque()  # (taken so far, tokens)
        self._lock = threading.Lock()

    def add(self, tokens: Sequence[int]) -> None:
        """Takes a finished sequence; `work` brings it into the index."""
        if tokens:
            self._queue.append((0, list(tokens)))

    def work(self, most: int | None = None) -> None:
        """Indexes up to so many waiting tokens; None: all of them."""
        with self._lock:
            while self._queue and (most is None or most > 0):
                taken, tokens = self._queue.popleft()
                until = len(tokens) if most is None else taken + most
                self._take(tokens[taken:until], ends=until >= len(tokens))
                if until < len(tokens):
                    self._queue.appendleft((until, tokens))
                if most is not None:
                    most -= min(until, len(tokens)) - taken

    def _take(self, tokens: Sequence[int], ends: bool) -> None:
        for index in (self.successors, self._next):
            if index is not None:
                index.extend(tokens)
                if ends:
                    index.end()
        if ends and self._next is None and len(self.successors) >= self._most // 2:
            self._next = Successors(ORDER)
        elif self._next is not None and ends and len(self.successors) >= self._most:
            self.successors, self._next = self._next, None

    def follower(self) -> Follower:
        """Follows one sequence through the index."""
        return Follower(self)


class Follower:
    """The place of one sequence in the index."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self.successors = corpus.successors
        self._context = self.successors.outside()
        self._tail: list[int] = []  # the sequence's last tokens

    @property
    def useful(self) -> bool:
        """Whether the index holds enough to ask it."""
        return len(self.successors) >= _USEFUL

    def extend(self, tokens: Sequence[int]) -> None:
        """Takes committed tokens."""
        self._corpus.work(_WORK * len(tokens))
        self._tail = [*self._tail, *tokens][-ORDER:]
        if self.successors is not self._corpus.successors or len(tokens) > ORDER:
            self.successors = self._corpus.successors
            self._context = self.successors.outside()
            tokens = self._tail
        for token in tokens:
            self._context = self.successors.follow(self._context, token)

    def context(self) -> Context:
        """Behind the committed tokens."""
        return self._context

    def follow(self, context: Context, token: int) -> Context:
        """The context after one more token."""
        return self.successors.follow(context, token)
