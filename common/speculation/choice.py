"""The target's own token of one sequence, row by row: greedy or sampled, with penalties, biases and a grammar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from quasar.speculation.sampling import Sampling, own_token


class Grammar(Protocol):
    """What a sequence may say next, for example by a JSON schema. One object for each sequence."""

    def allowed(self) -> Tensor | None:
        """bool [vocab] of the tokens that may come next; None: all of them."""

    def advance(self, token: int) -> None:
        """Takes the token that came."""

    def forced(self) -> list[int]:
        """The tokens that must come next, as far as they are certain."""

    def valid_prefix(self, tokens: Sequence[int]) -> int:
        """How many of these tokens may follow one another from here. The state stays."""


@dataclass(frozen=True)
class Rules:
    """What changes logits before a token is chosen: OpenAI's and transformers' parameters of these names."""

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0  # before these many, `ends` are forbidden
    ends: frozenset[int] = frozenset()


class TokenChooser:
    """Chooses the tokens of one sequence in order; each choice advances it."""

    def __init__(
        self,
        sampling: Sampling | None = None,
        rules: Rules | None = None,
        grammar: Grammar | None = None,
        prompt: Sequence[int] = (),
    ) -> None:
        """sampling: None is greedy; prompt: what repetition_penalty counts besides the output."""
        self.sampling = sampling
        self.grammar = grammar
        self.index = 0  # output index of the next token
        self._rules = rules if rules is not None and rules != Rules(ends=rules.ends) else None
        self._output: Counter[int] = Counter()
        self._prompt = frozenset(prompt) if self._rules is not None else frozenset()

    @property
    def takes_argmax(self) -> bool:
        """Whether the argmax of the logits as they are is the token: then the device can take it for all rows."""
        return self.sampling is None and self._rules is None and self.grammar is None

    @property
    def takes_noise(self) -> bool:
        """Whether the argmax of logits / temperature + noise is the token: then too, where the device has the noise."""
        s = self.sampling
        kept = s is not None and (s.top_k, s.top_p, s.min_p) == (0, 1, 0)
        return kept and self._rules is None and self.grammar is None

    def take(self, token: int) -> int:
        """Takes the token that was chosen for this index."""
        self.index += 1
        if self._rules is not None:
            self._output[token] += 1
        if self.grammar is not None:
            self.grammar.advance(token)
        return token

    def choose(self, logits: Tensor) -> int:
        """The token for the next index from logits float32 [vocab] on the host, which stay as they are."""
        logits = self._changed(logits)
        token = int(logits.argmax()) if self.sampling is None else own_token(logits, self.sampling, self.index)
        return self.take(token)

    def _changed(self, logits: Tensor) -> Tensor:
        allowed = None if self.grammar is None else self.grammar.allowed()
        if self._rules is None:
            return logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)
        logits, rules = logits.clone(), self._rules
        seen = torch.tensor(sorted(self._prompt | self._output.keys()), dtype=torch.long)
        if rules.repetition_penalty != 1.0:
            old = logits[seen]
            logits[seen] = torch.where(old > 0, old / rules.repetition_penalty, old * rules.repetition_penalty)
        for token, count in self._output.items():
            logits[token] -= rules.frequency_penalty * count + rules.presence_penalty
        for token, bias in rules.logit_bias.items():
            logits[token] += bias
        if self.index < rules.min_tokens:
            logits[sorted(rules.ends)] = -torch.inf
        return logits if allowed is None else logits.masked_fill_(~allowed, -torch.inf)
