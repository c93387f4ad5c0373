"""The Drafter contract: a tree of candidates, each with the probability that verification keeps it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

TopRow = Sequence[tuple[int, float]]  # the most probable tokens of a row, best first, with their shares of the sum


@dataclass
class Draft:
    """A tree of candidates, most probable first; a chain has the parents -1, 0, 1, ...

    A parent stands before its children, siblings are different tokens, and survival never rises along the list: the
    first n candidates are the n most probable ones, and a tree in themselves.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)  # an index into tokens; -1: the last committed token
    survival: list[float] = field(default_factory=list)  # P(the token and all its ancestors are right)
    keys: list[Hashable] = field(default_factory=list)  # (source, match length, depth): what survival is learnt for

    @classmethod
    def chain(cls, tokens: list[int], survival: list[float], keys: list[Hashable]) -> Draft:
        """Tokens that follow one another."""
        return cls(tokens, list(range(-1, len(tokens) - 1)), survival, keys)

    def __len__(self) -> int:
        """How many candidates there are."""
        return len(self.tokens)

    def first(self, most: int) -> Draft:
        """The `most` most probable candidates."""
        return Draft(self.tokens[:most], self.parents[:most], self.survival[:most], self.keys[:most])

    def depths(self) -> list[int]:
        """Of each candidate: how many of its ancestors are candidates too."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return depths

    def accepted(self, verified: int, own: Sequence[int]) -> list[int]:
        """The candidates that the target agrees with, from the root down: indices, ascending.

        verified: so many candidates, the first ones, were in the pass; own[0]: the target's own token after the last
        committed one, own[i + 1]: after candidate i.
        """
        path, at = [], -1
        for i in range(verified):
            if self.parents[i] == at and self.tokens[i] == own[at + 1]:
                path.append(i)
                at = i
        return path

    def outcomes(self, verified: int, own: Sequence[int]) -> Iterator[tuple[Hashable, bool]]:
        """Key and outcome of every candidate whose ancestors were all right; the others say nothing about theirs.

        That includes candidates that the pass left out, where the target's token in their place is known.
        """
        on_path = {-1}
        for i, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            if parent in on_path:
                right = token == own[parent + 1]
                if right and i < verified:
                    on_path.add(i)
                yield self.keys[i], right


class Drafter(ABC):
    """Proposes what comes next in one sequence. It sees every committed token, prompt first, exactly once."""

    takes_passes = False  # whether a drafted token costs a pass of some decoder, or next to nothing
    passes = 0  # such passes so far
    weight_bytes = 0  # of weights read by them
    top_k = 0  # so many of the verifier's best successors `observe` wants for every row

    @abstractmethod
    def extend(self, tokens: Sequence[int]) -> None:
        """Takes tokens that were committed."""

    @abstractmethod
    def propose(self, most: int, pending: Sequence[int] = (), least: float = 0.0) -> Draft:
        """At most `most` candidates of what follows; empty where there is nothing to go by.

        pending: tokens that stand behind the committed ones but may yet be taken back; least: survival below which a
        candidate will not be verified, so that it need not be looked for.
        """

    def propose_free(self, most: int, least: float = 0.0) -> Draft:
        """What a drafter that takes passes can propose without any."""
        return Draft()

    def observe(self, draft: Draft, verified: int, own: Sequence[int], top: Sequence[TopRow] | None = None) -> None:
        """Learns from a pass, before `extend` brings the tokens that it committed.

        draft: what `propose` returned, of which the first `verified` candidates were in the pass (0: a plain pass);
        own [verified + 1]: the target's own token after the last committed one, then after each of those candidates;
        top [verified + 1][top_k]: the target's most probable tokens in the same places.
        """
        return

    def expected_survival(self, most: int) -> list[float]:
        """Survival of the chain of `most` candidates that a drafter which takes passes would propose."""
        raise NotImplementedError

    def seconds_per_token(self) -> float:
        """What drafting a token will take, for as long as nothing was drafted; next to nothing unless it says more."""
        return 0.0

    def finish(self) -> None:
        """The sequence is over."""
        return
