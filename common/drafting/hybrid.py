"""The default drafter: a tree of what the text itself, earlier requests and the verifier's runners-up suggest."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Mapping, Sequence
from math import exp, log
from typing import Any

from quasar.drafting.evidence import (
    CORPUS_HOW,
    CORPUS_MATCH,
    COUNT_BUCKET,
    COUNTS,
    FREQUENCIES,
    FREQUENCY,
    FREQUENCY_BUCKET,
    HOW,
    LAST,
    MATCH,
    ORDER,
    RANKS,
    RECYCLED,
    RECYCLED_ORDER,
    RUNNERS_UP,
    SHARES,
    Key,
)
from quasar.drafting.memory import DraftMemory
from quasar.drafting.recycling import Row, row_of
from quasar.drafting.successors import Context, Successors
from quasar.speculation.draft import Draft, Drafter, TopRow

# What a source but the text says of a place: the features of tokens that it does not name, what it names, and from
# which feature on a name's number counts (-1: a name has its features themselves).
Advice = tuple[tuple[int, ...], Mapping[int, Any], int]

LIKELY = 8  # so many of the latest continuations of one match are considered
HOPELESS = 0.008  # survival below which a candidate is not worth a row of any pass
MARGIN = 0.5  # of the survival that pays: what is proposed is learnt from, and may be better than expected
CERTAIN = 0.999  # the most that survival is believed to be
_LAST_COUNT, _LAST_FREQUENCY = len(COUNT_BUCKET) - 1, len(FREQUENCY_BUCKET) - 1


class HybridDrafter(Drafter):
    """Grows the tree best first: always below the candidate that is most likely to survive.

    The text's own longest match and its observed successors, those of earlier requests (`memory.corpus`) and the
    verifier's recycled runners-up (`top_k`) are candidates on equal terms: `Evidence` says how probable each is.
    """

    def __init__(
        self, memory: DraftMemory | None = None, *, text: bool = True, corpus: bool = True, top_k: int = 0
    ) -> None:
        """memory: what the sequences share; text, corpus: whether to draft from them; top_k: how many of the
        verifier's best successors to recycle, 0: none.
        """
        self._memory = DraftMemory() if memory is None else memory
        self._text = text
        self.top_k = min(top_k, RUNNERS_UP)
        self._own = Successors(ORDER)
        self._evidence = self._memory.evidence(False, self.top_k > 0)
        self._trust = _Trust()
        self._least = HOPELESS  # survival below which candidates are not looked for
        self._tail: list[int] = []  # the last committed tokens
        self._behind: list[int] = []  # the last tokens in front of the latest draft
        self._last_row: Row = {}  # the verifier's best tokens where the last committed one came
        earlier = self._memory.corpus if corpus else None
        self._corpus = None if earlier is None else earlier.follower()

    def extend(self, tokens: Sequence[int]) -> None:
        if not tokens:
            return
        self._own.extend(tokens)
        self._tail = self._behind = self._own.tokens[-RECYCLED_ORDER:]
        self._last_row = {token: share for token, share in self._last_row.items() if token != self._tail[-1]}
        if self._corpus is not None:
            self._corpus.extend(tokens)

    def finish(self) -> None:
        if self._corpus is not None and self._memory.corpus is not None:
            self._memory.corpus.add(self._own.tokens)

    def propose(self, most: int, pending: Sequence[int] = (), least: float = 0.0) -> Draft:
        draft = Draft()
        self._least = max(HOPELESS, MARGIN * least / self._trust.factor)
        self._evidence = self._memory.evidence(self._corpus is not None and self._corpus.useful, self.top_k > 0)
        if most < 1 or not self._own.tokens:
            return draft
        tokens, parents, survival, keys = draft.tokens, draft.parents, draft.survival, draft.keys
        own, corpus = self._own, self._corpus if self._corpus is not None and self._corpus.useful else None
        context, ahead = own.context() if self._text else own.outside(), []
        earlier = None if corpus is None else corpus.context()
        for token in pending:
            if self._text:
                context = own.follow(context, token, ahead)
            if corpus is not None:
                earlier = corpus.follow(earlier, token)
            ahead.append(token)
        self._behind = (self._tail + ahead)[-RECYCLED_ORDER:]
        root = (context, earlier, ahead, -1)
        places: list[tuple] = []  # of each candidate: the contexts behind it, the tokens ahead, its depth
        waiting: list[tuple] = []  # (survival, serial, parent, token, features, match), the best last
        self._branch(waiting, most, 1.0, -1, root, bool(pending))
        while waiting:
            alive, _, parent, token, features, match = waiting.pop()
            here = len(tokens)
            room = most - here - 1
            context, earlier, ahead, depth = places[parent] if parent >= 0 else root
            tokens.append(token)
            parents.append(parent)
            survival.append(alive)
            keys.append(Key("text" if match else _source(features), match, depth + 1, features))
            if not room:
                break
            if len(waiting) >= room:
                del waiting[: len(waiting) - room]
                if alive <= waiting[0][0]:  # nothing below it could come before those that wait
                    places.append(())
                    continue
            if self._text:
                context = own.follow(context, token, ahead)
            if corpus is not None:
                earlier = corpus.follow(earlier, token)
            place = (context, earlier, [*ahead, token], depth + 1)
            places.append(place)
            self._branch(waiting, room, alive, here, place, True)
        draft.survival = [min(self._trust.factor * s, CERTAIN) for s in survival]
        return draft

    def observe(self, draft: Draft, verified: int, own: Sequence[int], top: Sequence[TopRow] | None = None) -> None:
        self._evidence.learn(outcomes(draft, verified, own))
        self._trust.learn(draft, own[0])
        if top is not None and self.top_k:
            self._recycle(draft, verified, own, top)

    def _recycle(self, draft: Draft, verified: int, own: Sequence[int], top: Sequence[TopRow]) -> None:
        recycled, tokens, parents = self._memory.recycled, draft.tokens, draft.parents
        behind = [self._behind]  # of each row, the last committed token's first
        rows = [row_of(top[0])]
        recycled.take(behind[0], rows[0])
        for row in range(verified):
            behind.append([*behind[parents[row] + 1], tokens[row]][-RECYCLED_ORDER:])
            rows.append(row_of(top[row + 1]))
            if rows[-1]:
                recycled.take(behind[-1], rows[-1])
        path = draft.accepted(verified, own)
        self._last_row = rows[path[-1] + 1 if path else 0]

    def _advice(self, earlier: Context | None, ahead: list[int], committed_end: bool) -> list[Advice]:
        """Of each source but the text."""
        advice: list[Advice] = []
        if earlier is not None:
            advice.append((*_named_by_corpus(self._corpus.successors, earlier), -1))
        if self.top_k:
            text = ahead if len(ahead) >= RECYCLED_ORDER else self._tail + ahead
            order, row = self._memory.recycled.behind(text)
            group = RECYCLED + order * SHARES
            advice.append(((group,), row, group))
            if not committed_end and self._last_row:
                advice.append(((LAST,), self._last_row, LAST))
        return advice

    def _branch(self, waiting: list[tuple], room: int, alive: float, parent: int, place: tuple, inside: bool) -> None:
        """Puts what may follow a candidate among those that wait, of which only the best `room` matter.

        inside: it follows uncommitted tokens.
        """
        own, evidence = self._own, self._evidence
        weights, bound, frequency_bound = evidence.weights, evidence.bound, evidence.frequency_bound
        (nodes, leaf, leaf_order), earlier, ahead, _ = place
        counts = own.counts
        floor = waiting[0][0] if len(waiting) >= room else self._least
        ratio = floor / alive
        if ratio >= 1:
            return
        least = log(ratio / (1 - ratio))
        serial = -256 * (parent + 2)  # of equally probable candidates the first goes first
        base = 0.0
        helped: dict[int, float] = {}  # what the other sources add to a token's log-odds, beyond `base`
        advice = self._advice(earlier, ahead, inside) if earlier is not None or self.top_k else ()
        for absent, named, group in advice:
            silent = 0.0
            for feature in absent:
                silent += weights[feature]
            base += silent
            if group >= 0:
                for token, share in named.items():
                    helped[token] = helped.get(token, 0.0) + weights[group + share] - silent
                continue
            for token, features in named.items():
                odds = -silent
                for feature in features:
                    odds += weights[feature]
                helped[token] = helped.get(token, 0.0) + odds
        most_help = base + max(0.0, max(helped.values())) if helped else base

        matches = MATCH + max(len(nodes) - 1, leaf_order) * (ORDER + 1)
        seen = set()
        groups = [(leaf_order, ((own.at(leaf, ahead), leaf),))] if leaf >= 0 else []  # (match, what followed it)
        for order in range(len(nodes) - 1, 0, -1):
            groups.append((order, reversed(nodes[order][1].items())))
        if self._text:
            groups.append((0, zip(own.common, own.common, strict=True)))
        if helped:
            groups.append((0, zip(helped, helped, strict=True)))
        for order, likely in groups:
            match = matches + order
            named_by = base + weights[match]
            if bound[match] + most_help < least:
                return
            best_frequency = frequency_bound[order] + most_help - base
            how_group = HOW + (order if order < 4 else 4) * RANKS * COUNTS
            frequency_group = FREQUENCY + (order if order < 2 else 2) * FREQUENCIES
            rank = -1
            for token, node in likely:
                rank += 1
                if rank >= LIKELY and order:
                    break
                if token in seen or token < 0:
                    continue
                seen.add(token)
                how = how_group
                if order:
                    how += (rank if rank < RANKS else RANKS - 1) * COUNTS
                    if node.__class__ is not int:
                        count = node[0]
                        how += COUNT_BUCKET[count if count < _LAST_COUNT else _LAST_COUNT]
                odds = named_by + weights[how]
                if odds + best_frequency < least:
                    continue
                count = counts.get(token, 0)
                frequency = frequency_group + FREQUENCY_BUCKET[count if count < _LAST_FREQUENCY else _LAST_FREQUENCY]
                odds += weights[frequency]
                if helped and token in helped:
                    odds += helped[token]
                if odds > least:
                    features = (match, how, frequency)
                    for absent, named, group in advice:
                        if token not in named:
                            features += absent
                        else:
                            features += named[token] if group < 0 else (group + named[token],)
                    serial -= 1
                    insort(waiting, (alive / (1 + exp(-odds)), serial, parent, token, features, order))
                    if len(waiting) > room:
                        del waiting[0]
                    if len(waiting) == room:
                        ratio = waiting[0][0] / alive
                        if ratio >= 1:
                            return
                        least = log(ratio / (1 - ratio))


class _Trust:
    """How much more or less often candidates of one sequence are right than was expected of late.

    The weights move too slowly to notice text that candidates of a few per cent each are never right in.
    """

    FADING, PRIOR, LEAST, MOST = 0.98, 2.0, 0.05, 1.5

    def __init__(self) -> None:
        self.factor = 1.0  # that survival is multiplied by
        self._expected = self._right = 0.0

    def learn(self, draft: Draft, own: int) -> None:
        """own: the token that came where the draft begins."""
        first = [(s, t) for s, t, p in zip(draft.survival, draft.tokens, draft.parents, strict=True) if p < 0]
        self._expected = self.FADING * self._expected + sum(s for s, _ in first) / self.factor
        self._right = self.FADING * self._right + any(token == own for _, token in first)
        factor = (self._right + self.PRIOR) / (self._expected + self.PRIOR)
        self.factor = min(max(factor, self.LEAST), self.MOST)


def _named_by_corpus(earlier: Successors, context: Context) -> tuple[tuple[int, ...], dict[int, tuple[int, ...]]]:
    nodes, leaf, leaf_order = context
    longest = max(len(nodes) - 1, leaf_order)
    matches = CORPUS_MATCH + longest * (ORDER + 1)
    named: dict[int, tuple[int, ...]] = {}
    if leaf >= 0 and (token := earlier.at(leaf, ())) >= 0:
        named[token] = (matches + leaf_order, CORPUS_HOW + min(leaf_order, 4) * RANKS * COUNTS)
    for order in range(len(nodes) - 1, 0, -1):
        group = CORPUS_HOW + (order if order < 4 else 4) * RANKS * COUNTS
        for rank, (token, node) in enumerate(reversed(nodes[order][1].items())):
            if rank == RANKS:
                break
            if token >= 0 and token not in named:
                count = 1 if node.__class__ is int else node[0]
                how = group + rank * COUNTS + COUNT_BUCKET[count if count < _LAST_COUNT else _LAST_COUNT]
                named[token] = (matches + order, how)
        if len(named) >= LIKELY:
            break
    for rank, token in enumerate(earlier.common):
        if token not in named:
            named[token] = (matches, CORPUS_HOW + min(rank, RANKS - 1) * COUNTS)
    return (matches,), named


def outcomes(draft: Draft, verified: int, own: Sequence[int]) -> Iterator[tuple[tuple[int, ...], float, bool]]:
    """Features, probability given the parent, and outcome of the candidates whose ancestors were all right."""
    on_path = {-1}
    survival = draft.survival
    for i, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
        if parent in on_path:
            right = token == own[parent + 1]
            if right and i < verified:
                on_path.add(i)
            key = draft.keys[i]
            if isinstance(key, Key):  # not another's candidate, as a grammar's
                yield key.features, survival[i] if parent < 0 else survival[i] / survival[parent], right


def _source(features: tuple[int, ...]) -> str:
    """Which source names a token that no match in the text names."""
    for feature in features[3:]:
        if CORPUS_MATCH <= feature < RECYCLED and (feature - CORPUS_MATCH) % (ORDER + 1):
            return "corpus"
        if RECYCLED <= feature < LAST and (feature - RECYCLED) % SHARES:
            return "recycled"
        if feature > LAST:
            return "logits"
    return "frequent"
