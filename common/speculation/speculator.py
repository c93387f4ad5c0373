"""One step of speculative decoding: draft a window, verify it, learn from it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from quasar.speculation.draft import Draft, Drafter
from quasar.speculation.verifier import Verifier
from quasar.speculation.window import Window


class Speculator:
    """A drafter (None decodes plainly), a verifier and a window over one sequence."""

    def __init__(self, verifier: Verifier, drafter: Drafter | None, window: Window) -> None:
        self.verifier, self.drafter, self._window = verifier, drafter, window
        self.drafted = self.accepted = 0
        self.seconds_draft = 0.0

    def step(self, behind: Sequence[int], position: int, most: int, pending: Sequence[int] = ()) -> list[int]:
        """Returns 1 to `most` tokens, the first of output index `position`, that follow the text.

        behind: the text's tokens that the verifier's cache lacks; pending: those that the drafter was not yet told
        of. Telling it of the tokens that this step returns is left to the caller, who may take them back.
        """
        # A pass commits one token more than it drafts: never draft what could not be kept.
        gamma = min(self._window.gamma(), most - 1) if self.drafter is not None else 0
        clock = time.perf_counter()
        proposal = self._propose(gamma, pending)
        drafted = time.perf_counter()
        draft = proposal if gamma else Draft()
        tokens = self.verifier.step(behind, draft, position)
        verified = time.perf_counter()
        accepted, seconds = len(tokens) - 1, drafted - clock
        self._window.observe(
            len(proposal.tokens),
            accepted if gamma else int(proposal.tokens[:1] == tokens[:1]),
            seconds,
            len(behind) + len(draft.tokens),
            verified - drafted,
        )
        self.drafted += len(draft.tokens)
        self.accepted += accepted
        self.seconds_draft += seconds
        return tokens

    def _propose(self, gamma: int, pending: Sequence[int]) -> Draft:
        if self.drafter is None or (not gamma and self.drafter.takes_passes):
            return Draft()
        # A plain step still drafts one token where that costs no pass: whether it was right says when to resume.
        return self.drafter.propose(max(gamma, 1), pending)
