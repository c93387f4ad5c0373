"""What followed every end of a text, up to so many tokens back: a suffix trie that grows only where a text repeats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

SEPARATOR = -1  # between sequences: nothing follows a sequence's end

# A trie's node is [how often its string occurred, {next token: node}], the latest successor last. A string that
# occurred once is a leaf: the position behind it. Most strings stay leaves, so a token costs few writes.
Node = list
Leaf = int


class Context(NamedTuple):
    """The ends of a text that occurred before."""

    nodes: list[Node]  # [longest + 1] of its last 0, 1, 2, ... tokens, those that occurred more than once
    leaf: Leaf  # behind the only earlier occurrence of the longest of all; -1 where there is none
    order: int  # tokens of that one


class Successors:
    """Every string of up to `order` tokens of one or more sequences, and what followed it."""

    COMMON = 8  # so many of the most frequent tokens are kept at hand

    def __init__(self, order: int) -> None:
        self.order = order
        self.tokens: list[int] = []
        self.counts: dict[int, int] = {}  # token -> occurrences
        self.common: list[int] = []  # the most frequent tokens, first the most frequent
        self._root: Node = [0, {}]
        self._nodes: list[Node] = [self._root]  # of the ends of the text

    def __len__(self) -> int:
        """Tokens taken, separators included."""
        return len(self.tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Takes the next tokens of the sequence."""
        text, order, root, counts, common = self.tokens, self.order, self._root, self.counts, self.common
        nodes = self._nodes
        for token in tokens:
            text.append(token)
            behind = len(text)
            grown = [root]
            if len(nodes) > order:  # the longest strings: what followed them is counted, and goes no further
                after = nodes.pop()[1]
                known = after.pop(token, None)
                after[token] = behind if known is None else [2 if known.__class__ is int else known[0] + 1, None]
            for node in nodes:
                after = node[1]
                known = after.pop(token, None)
                if known is None:
                    after[token] = behind
                elif known.__class__ is int:  # a leaf becomes a node: what followed the first time goes into it
                    after[token] = known = [2, {text[known]: known + 1}]
                    grown.append(known)
                else:
                    known[0] += 1
                    after[token] = known
                    grown.append(known)
            nodes = grown
            count = counts[token] = counts.get(token, 0) + 1
            if len(common) < self.COMMON or count > counts[common[-1]] or token in common:
                self._rank(token, count)
        self._nodes = nodes

    def end(self) -> None:
        """The sequence is over; the next tokens are another's."""
        self.tokens.append(SEPARATOR)
        self._nodes = [self._root]

    def _rank(self, token: int, count: int) -> None:
        common, counts = self.common, self.counts
        if token in common:
            at = common.index(token)
        else:
            if len(common) == self.COMMON:
                common.pop()
            at = len(common)
            common.append(token)
        while at and counts[common[at - 1]] < count:
            common[at] = common[at - 1]
            at -= 1
        common[at] = token

    def context(self) -> Context:
        """Of the text as it stands."""
        return Context(self._nodes, -1, 0)

    def outside(self) -> Context:
        """Of an empty text: where another text, which is not taken in, begins to be followed."""
        return Context([self._root], -1, 0)

    def follow(self, context: Context, token: int, ahead: Sequence[int] = ()) -> Context:
        """The context after one more token, which is not taken in.

        ahead: tokens that stand between the text and this one, not taken in either.
        """
        nodes, leaf, order = [self._root], -1, 0
        most = self.order
        for node in context.nodes[:most]:
            known = node[1].get(token)
            if known is None:
                break
            order += 1
            if known.__class__ is int:
                leaf = known
            else:
                nodes.append(known)
        before = context.leaf
        if before >= 0 and self.at(before, ahead) == token:
            return Context(nodes, before + 1, min(context.order + 1, most))
        return Context(nodes, leaf, order) if leaf >= 0 else Context(nodes, -1, 0)

    def at(self, position: int, ahead: Sequence[int]) -> int:
        """The token at a position of the text, or of what stands behind it; SEPARATOR where there is none."""
        beyond = position - len(self.tokens)
        if beyond < 0:
            return self.tokens[position]
        return ahead[beyond] if beyond < len(ahead) else SEPARATOR
