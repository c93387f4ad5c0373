"""A suffix automaton over any number of token sequences: every substring, and how often it occurred (Blumer et al.
1985), built token by token in amortised constant time."""

from __future__ import annotations

from collections.abc import Iterator

ROOT = 0
_COUNTED_SUFFIXES = 64  # per token, longest first: a text that repeats one token has as many suffixes as tokens


class SuffixAutomaton:
    """States stand for sets of substrings that end at the same places; state s holds suffixes of its longest string.

    following[s]: token -> state; shorter[s]: the state of the longest suffix that also ends elsewhere, the suffix
    link; length[s]: of the longest string; count[s]: occurrences.
    """

    def __init__(self) -> None:
        self.following: list[dict[int, int]] = [{}]
        self.shorter, self.length, self.count = [-1], [0], [0]

    def extend(self, last: int, token: int) -> int:
        """Takes the next token of a sequence whose tokens so far are state `last` (ROOT at its beginning); returns
        the new state of the whole."""
        known = self.following[last].get(token)
        if known is not None:
            state = self._exactly(last, token, known)
        else:
            state = self._new(self.length[last] + 1, {}, ROOT, 0)
            at = last
            while at != -1 and token not in self.following[at]:
                self.following[at][token] = state
                at = self.shorter[at]
            if at != -1:
                self.shorter[state] = self._exactly(at, token, self.following[at][token])
        for suffix, _ in zip(self.suffixes(state), range(_COUNTED_SUFFIXES), strict=False):
            self.count[suffix] += 1
        return state

    def suffixes(self, state: int) -> Iterator[int]:
        """The states of ever shorter suffixes, beginning with `state` itself, the empty one left out."""
        while state > ROOT:
            yield state
            state = self.shorter[state]

    def follow(self, state: int, token: int) -> int:
        """The state of the longest suffix of (state, token) that ever occurred."""
        while state != -1 and token not in self.following[state]:
            state = self.shorter[state]
        return ROOT if state == -1 else self.following[state][token]

    def _exactly(self, at: int, token: int, state: int) -> int:
        """The state whose longest string is that of `at` and the token: `state` if that is so, else a part of it."""
        if self.length[state] == self.length[at] + 1:
            return state
        part = self._new(self.length[at] + 1, dict(self.following[state]), self.shorter[state], self.count[state])
        self.shorter[state] = part
        while at != -1 and self.following[at].get(token) == state:
            self.following[at][token] = part
            at = self.shorter[at]
        return part

    def _new(self, length: int, following: dict[int, int], shorter: int, count: int) -> int:
        self.following.append(following)
        self.shorter.append(shorter)
        self.length.append(length)
        self.count.append(count)
        return len(self.length) - 1
