"""The text that a model is measured on, and what it is, for whoever reads the figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from quasar.errors import QuasarError
from quasar.generation import GenerationSettings, generate
from quasar.models.model import Model

ANSWER = GenerationSettings(max_new_tokens=128, temperature=0.7, draft="ngram")


@dataclass(frozen=True)
class MeasuredTexts:
    """Token ids of texts, and one line on where they come from."""

    ids: list[list[int]]
    about: str

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))


def plain_texts(model: Model, texts: Sequence[str], source: str) -> MeasuredTexts:
    """Texts as they are. source: where they stand, "the built-in held-out text" or a file's name."""
    return MeasuredTexts([model.encode(text) for text in texts], f"{source}, {len(texts)} texts")


def conversations(
    model: Model,
    questions: Sequence[str],
    source: str,
    settings: GenerationSettings = ANSWER,
    tick: Callable[[], object] = lambda: None,
) -> MeasuredTexts:
    """Questions in the model's chat template, each with the answer that this model gives, sampled: the distribution
    that it meets when it is used. Each answer has a seed of its own. Raises QuasarError without a chat template."""
    if model.tokenizer is None or not model.tokenizer.chat_template:
        raise QuasarError(f"{model.name} has no chat template; leave out --chat")
    ids = []
    for seed, question in enumerate(questions):
        prompt = model.encode(question, chat=True)
        answer = generate(model, prompt, replace(settings, seed=settings.seed + seed)).result().token_ids
        ids.append([*prompt, *answer])
        tick()
    return MeasuredTexts(
        ids,
        f"{source}, {len(questions)} conversations: its questions with {model.name}'s own full-precision answers, up "
        f"to {settings.max_new_tokens} tokens at temperature {settings.temperature:g}",
    )
