"""Log-probabilities of a prompt's own tokens: `echo` with `logprobs`, which evaluation harnesses ask for."""

from __future__ import annotations

from collections.abc import Sequence

from quasar.backends.base import Batch, Segment
from quasar.models.runtime import PROMPT_ROWS, Runtime
from quasar.server.errors import ApiError
from quasar.server.service import Service

Score = tuple[int, float | None, list[tuple[int, float]] | None]  # token, log-probability, best alternatives


async def score_prompt(service: Service, prompt: Sequence[int], top: int) -> list[Score]:
    """Each token given those before it; the first has none."""
    runtime = getattr(service.engine, "runtime", None)
    if runtime is None:
        raise ApiError("this server cannot score prompts", param="echo")
    return await service.unhurried(lambda: _score(runtime, prompt, top))


def _score(runtime: Runtime, prompt: Sequence[int], top: int) -> list[Score]:
    slot = runtime.new_slot(len(prompt))
    scores: list[Score] = [(prompt[0], None, None)]
    for first in range(0, len(prompt) - 1, PROMPT_ROWS):
        chunk = list(prompt[first : first + PROMPT_ROWS])
        following = list(prompt[first + 1 : first + 1 + len(chunk)])
        with runtime.lock:  # the engine's passes go on between chunks
            logits = runtime.run(Batch([Segment(slot, chunk, logits_to_keep=len(chunk))]))
            rows = logits[: len(following)].float().log_softmax(dim=-1).cpu()
            slot.commit(len(chunk))
        best = rows.topk(min(top, rows.shape[-1]), dim=-1) if top else None
        for i, token in enumerate(following):
            alternatives = (
                [] if best is None else list(zip(best.indices[i].tolist(), best.values[i].tolist(), strict=True))
            )
            scores.append((token, float(rows[i, token]), alternatives))
    return scores
