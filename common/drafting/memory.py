"""What the drafters of one engine share: learnt weights, recycled runners-up, earlier requests."""

from __future__ import annotations

from quasar.drafting.corpus import Corpus
from quasar.drafting.evidence import Evidence
from quasar.drafting.priors import prior_weights
from quasar.drafting.recycling import Recycled


class DraftMemory:
    """One for each engine and tokenizer; outlives the sequences."""

    def __init__(self, corpus: Corpus | None = None) -> None:
        self.corpus = corpus
        self.recycled = Recycled()
        self._evidence: dict[tuple[bool, bool], Evidence] = {}

    @classmethod
    def for_requests(cls, warm: bool) -> DraftMemory:
        """A memory for one request, or for many that learn from one another."""
        return cls(Corpus() if warm else None)

    def settle(self) -> None:
        """Takes in at once what ended, which otherwise happens little by little."""
        if self.corpus is not None:
            self.corpus.work()

    def evidence(self, corpus: bool, recycled: bool) -> Evidence:
        """The weights for these sources beside the text: what one source says weighs less where others say it too."""
        if (corpus, recycled) not in self._evidence:
            self._evidence[corpus, recycled] = Evidence(prior_weights(corpus, recycled))
        return self._evidence[corpus, recycled]
