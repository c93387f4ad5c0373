"""SuffixDecoding (arXiv 2411.04975): what most often followed the longest ends of the text that occurred before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from quasar.drafting.ngram import prior
from quasar.drafting.suffix_automaton import ROOT, SuffixAutomaton
from quasar.drafting.survival import SurvivalTable
from quasar.errors import QuasarError
from quasar.models.model import Model
from quasar.reading import parse_json, read_lines
from quasar.speculation.draft import Draft, Drafter, TopRow

# A match of n tokens is trusted for TRUST * n more (the paper's alpha), as far as the counts give the path at least
# LEAST; of the longest MATCHES matches the one that promises most tokens is taken.
TRUST, LEAST, MATCHES = 2, 0.1, 8
LONGEST = 12  # longer matches are counted as this long


def _prior(source: str, match: int, depth: int) -> float:
    return prior(source, min(match, 3), depth + max(match - 3, 0))


class SuffixStore:
    """Sequences that outlive a request: one automaton for all, and a JSONL file of token ids that each is added to."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        """Reads the file if it is there. Raises QuasarError on anything but lists of this vocabulary's ids."""
        self.automaton, self._path = SuffixAutomaton(), path
        lines = read_lines(path, f"--draft suffix:{path}") if path.exists() else []
        if not path.parent.is_dir():
            raise QuasarError(f"--draft suffix:{path}: there is no folder {path.parent} to keep it in")
        for number, line in enumerate(lines, 1):
            state = ROOT
            for token in _ids(line, vocab_size, f"{path}:{number}"):
                state = self.automaton.extend(state, token)

    def keep(self, tokens: Sequence[int]) -> None:
        """Adds a finished sequence to the file; the automaton has it already."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(list(tokens)) + "\n")
        except OSError as error:
            raise QuasarError(f"--draft suffix:{self._path}: cannot be written ({error})") from None


def _ids(line: str, vocab_size: int, where: str) -> list[int]:
    try:
        ids = parse_json(line)
    except ValueError:
        ids = None
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise QuasarError(f"--draft suffix: {where} should be a JSON list of token ids below {vocab_size}")
    return ids


_stores: dict[tuple[Path, str], SuffixStore] = {}


def open_store(path: str, model: Model) -> SuffixStore:
    """The store in a file, read once per process and model."""
    key = (Path(path).expanduser().absolute(), model.name)
    if key not in _stores:
        _stores[key] = SuffixStore(key[0], model.config.vocab_size)
    return _stores[key]


class SuffixDrafter(Drafter):
    """Drafts as much as the matches justify, so its length adapts to the text."""

    def __init__(self, store: SuffixStore | None = None, survival: SurvivalTable | None = None) -> None:
        """survival: a table to share with other sequences."""
        self._store = store
        self._survival = SurvivalTable(_prior) if survival is None else survival
        self._automaton = SuffixAutomaton() if store is None else store.automaton
        self._tokens: list[int] = []
        self._state = ROOT  # of the whole text

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._state = self._automaton.extend(self._state, token)
        self._tokens.extend(tokens)

    def propose(self, most: int, pending: Sequence[int] = (), least: float = 0.0) -> Draft:
        automaton, state = self._automaton, self._state
        for token in pending:
            state = automaton.follow(state, token)
        best: list[int] = []
        best_expected, match = 0.0, 0
        matches = (suffix for suffix in automaton.suffixes(state) if automaton.following[suffix])
        for suffix in islice(matches, MATCHES):
            tokens, expected = self._continue(suffix, min(most, TRUST * automaton.length[suffix]))
            if expected > best_expected:
                best, best_expected, match = tokens, expected, automaton.length[suffix]
        return Draft.chain(best, *self._survival.chain("suffix", min(match, LONGEST), len(best)))

    def observe(self, draft: Draft, verified: int, own: Sequence[int], top: Sequence[TopRow] | None = None) -> None:
        self._survival.learn(draft.outcomes(verified, own))

    def _continue(self, state: int, most: int) -> tuple[list[int], float]:
        """The commonest continuation of a state, and how many of its tokens the counts make us expect."""
        automaton, tokens, path, expected = self._automaton, [], 1.0, 0.0
        while len(tokens) < most:
            while state > ROOT and not automaton.following[state]:  # the text ends here: go on from a shorter match
                state = automaton.shorter[state]
            choices = automaton.following[state]
            if state == ROOT or not choices:
                break
            counts = {token: automaton.count[after] for token, after in choices.items()}
            token = max(counts, key=lambda t: (counts[t], choices[t]))  # of equals the one that came last
            path *= counts[token] / max(sum(counts.values()), 1)
            if path < LEAST:
                break
            tokens.append(token)
            expected += path
            state = choices[token]
        return tokens, expected

    def finish(self) -> None:
        if self._store is not None and self._tokens:
            self._store.keep(self._tokens)
