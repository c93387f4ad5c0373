"""The verifier: one forward pass of the target over many sequences' drafts, one acceptance rule, one commit each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from quasar.backends.base import Batch, Segment, Slot
from quasar.models.runtime import Runtime
from quasar.speculation.acceptance import accept
from quasar.speculation.choice import TokenChooser
from quasar.speculation.draft import Draft, TopRow
from quasar.speculation.sampling import noise_state

UNKNOWN = -1  # the own token of a row that nobody asked for


@dataclass
class Window:
    """One sequence's part of a pass: committed tokens that its slot lacks, and the candidates to verify behind them."""

    slot: Slot
    uncached_tokens: Sequence[int]
    chooser: TokenChooser | None  # None: a part of a prompt, of which no token follows
    draft: Draft = field(default_factory=Draft)
    top_k: int = 0  # of the most probable tokens that the drafter wants to know for every row
    logprobs: int | None = None  # that many alternatives beside every committed token's own


@dataclass
class Verdict:
    """What became of a window."""

    tokens: list[int] = field(default_factory=list)  # committed: the accepted candidates and the target's own last one
    accepted: list[int] = field(default_factory=list)  # candidates, as indices
    own: list[int] = field(default_factory=list)  # [drafted + 1] the target's token in each place, or UNKNOWN
    top: list[TopRow] | None = None  # [drafted + 1][top_k]
    logprobs: list[tuple[float, list[tuple[int, float]]]] | None = (
        None  # of each committed token: its own, alternatives
    )


class Verifier:
    """Whoever steps holds the runtime's lock."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def step(self, windows: Sequence[Window]) -> list[Verdict]:
        """Runs one pass over all windows and commits to their slots what it accepts."""
        batch = Batch([_segment(window) for window in windows])
        logits = self._runtime.run(batch)
        best = argmax = None
        top: dict[int, list[TopRow]] = {}  # by how many are wanted
        if top_k := max(window.top_k for window in windows):
            best = self._runtime.backend.top_k(logits, top_k)
            top = {k: _with_shares(best[:, :k], logits) for k in {window.top_k for window in windows} if k}
        if best is not None and self._runtime.backend.cheap_top_k:
            argmax = best[:, 0].tolist()
        elif any(window.chooser is not None and window.chooser.takes_argmax for window in windows):
            argmax = self._runtime.backend.argmax(logits).tolist()
        sampled = self._sampled(windows, logits)
        verdicts, first = [], 0
        for window, segment in zip(windows, batch.segments, strict=True):
            last = first + segment.logits_to_keep
            found = argmax if window.chooser is not None and window.chooser.takes_argmax else sampled
            rows = None if found is None else list(found[first:last])
            verdict = _judge(window, logits[first:last], rows)
            if window.top_k:
                verdict.top = top[window.top_k][first:last]
            verdicts.append(verdict)
            first = last
        return verdicts

    def _sampled(self, windows: Sequence[Window], logits: Tensor) -> Sequence[int] | None:
        """Sampled tokens of all rows of [kept rows, vocab], where the device samples; others' rows mean nothing."""
        if not any(window.chooser is not None and window.chooser.takes_noise for window in windows):
            return None
        states: list[int] = []
        temperatures: list[float] = []
        for window in windows:
            chooser = window.chooser
            if chooser is None:
                continue
            sampling = chooser.sampling if chooser.takes_noise else None
            depths = [0]  # output tokens before each row's, from the chooser's next on
            for parent in window.draft.parents:
                depths.append(depths[parent + 1] + 1)
            for depth in depths:
                states.append(0 if sampling is None else noise_state(sampling.seed, chooser.index + depth))
                temperatures.append(1.0 if sampling is None else sampling.temperature)
        return self._runtime.backend.gumbel_argmax(logits, states, temperatures)


def _segment(window: Window) -> Segment:
    uncached, draft = len(window.uncached_tokens), window.draft
    if window.chooser is None:
        return Segment(window.slot, window.uncached_tokens, logits_to_keep=0)
    parents = None
    if any(parent != row - 1 for row, parent in enumerate(draft.parents)):
        parents = [*range(-1, uncached - 1), *(parent + uncached for parent in draft.parents)]
    return Segment(window.slot, [*window.uncached_tokens, *draft.tokens], parents, len(draft.tokens) + 1)


def _with_shares(best: Tensor, logits: Tensor) -> list[TopRow]:
    """best [rows, k]: the most probable tokens, best first. Shares are of these alone: the others' sum takes a pass
    over the vocabulary to know."""
    shares = logits.gather(1, best).softmax(dim=1)
    return [list(zip(*row, strict=True)) for row in zip(best.tolist(), shares.tolist(), strict=True)]


def _judge(window: Window, logits: Tensor, argmax: list[int] | None) -> Verdict:
    """logits [drafted + 1, vocab]: after the last committed token, then after each candidate."""
    chooser, draft, uncached = window.chooser, window.draft, len(window.uncached_tokens)
    if chooser is None:
        window.slot.commit(uncached)
        return Verdict()
    own = [UNKNOWN] * (len(draft.tokens) + 1)
    if (chooser.takes_argmax or chooser.takes_noise) and argmax is not None:
        own = argmax
        tokens, path = accept(lambda row: chooser.take(own[row + 1]), draft.tokens, draft.parents)
    else:

        def choose(row: int) -> int:
            own[row + 1] = chooser.choose(logits[row + 1].cpu())
            return own[row + 1]

        tokens, path = accept(choose, draft.tokens, draft.parents)
    window.slot.commit([*range(uncached), *(uncached + row for row in path)])
    verdict = Verdict(tokens, path, own)
    if window.logprobs is not None:
        verdict.logprobs = [
            logprobs_of(logits[row + 1], token, window.logprobs) for row, token in zip([-1, *path], tokens, strict=True)
        ]
    return verdict


def logprobs_of(logits: Tensor, token: int, alternatives: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability of a token by logits float32 [vocab], and the most probable tokens with theirs."""
    logprobs = logits.float().log_softmax(dim=-1)
    best = logprobs.topk(alternatives)
    return float(logprobs[token]), list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
