"""Spec-Bench questions by every scheme: speed, acceptance and agreement per category (Xia et al. 2024)."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from uuid import uuid4

from quasar.drafting import DEFAULT_DRAFT
from quasar.drafting.memory import DraftMemory
from quasar.errors import QuasarError
from quasar.generation import GenerationSettings, Result, generate
from quasar.models.chat import render_chat
from quasar.models.model import Model
from quasar.reading import parse_json, read_lines


@dataclass(frozen=True)
class Scheme:
    """A way of decoding: which precision verifies, what drafts, and whether full precision confirms."""

    name: str
    precision: str
    draft: str
    lossless: bool = False


SCHEMES = (
    Scheme("plain-full", "full", "none"),
    Scheme("ngram-full", "full", "ngram"),
    Scheme("plain-w8a8", "w8a8", "none"),
    Scheme("ngram-w8a8", "w8a8", "ngram"),  # the paper's Quasar
    Scheme("quasar", "w8a8", DEFAULT_DRAFT),
    Scheme("plain-w4a16", "w4a16", "none"),
    Scheme("qspec", "w4a16", "self:w4a4"),
    Scheme("lossless", "w8a8", DEFAULT_DRAFT, lossless=True),
)


@dataclass(frozen=True)
class Question:
    """As in Spec-Bench's question.jsonl."""

    question_id: int | str
    category: str
    turns: list[str]


@dataclass
class Tally:
    """One scheme's counts over the questions of one category."""

    tokens: int = 0
    passes: int = 0
    seconds: float = 0.0
    agreed: int = 0  # leading tokens equal to those of the first scheme
    compared: int = 0

    def add(self, result: Result, baseline: Sequence[int]) -> None:
        stats = result.stats
        self.tokens += stats.tokens - 1
        self.passes += stats.passes
        self.seconds += stats.seconds_decode
        pairs = zip(result.token_ids, baseline, strict=False)
        self.agreed += next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(result.token_ids), len(baseline)))
        self.compared += len(baseline)


@dataclass(frozen=True)
class CategoryRow:
    """A line of the table."""

    category: str
    scheme: str
    tokens_per_second: float
    speed: float  # over the first scheme
    acceptance_length: float
    agreement: float  # share of the first scheme's tokens before the first that differs

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass
class TaskRun:
    """Everything measured: tallies by category and scheme, and answers by scheme, ready to be written."""

    tallies: dict[str, dict[str, Tally]] = field(default_factory=dict)
    answers: dict[str, list[dict[str, object]]] = field(default_factory=dict)

    def rows(self) -> list[CategoryRow]:
        """Per category, and over all of them."""
        everything: dict[str, Tally] = {}
        for tallies in self.tallies.values():
            for scheme, tally in tallies.items():
                total = everything.setdefault(scheme, Tally())
                for name, value in vars(tally).items():
                    setattr(total, name, getattr(total, name) + value)
        rows = []
        for category, tallies in {**self.tallies, "all": everything}.items():
            rates = {scheme: t.tokens / t.seconds if t.seconds else 0.0 for scheme, t in tallies.items()}
            first = next(iter(rates.values()))
            for scheme, t in tallies.items():
                speed = rates[scheme] / first if first else 1.0
                length = t.tokens / t.passes if t.passes else 1.0
                rows.append(CategoryRow(category, scheme, rates[scheme], speed, length, t.agreed / max(t.compared, 1)))
        return rows


def read_questions(path: Path, per_category: int | None = None) -> list[Question]:
    """A question file, or every .jsonl file of a folder; the first `per_category` of each category, which is the file's
    name where a question has none.

    Raises QuasarError on anything else.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    questions = []
    for file in files:
        lines = read_lines(file, f"--tasks {file}")
        questions += [_question(line, file, n) for n, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise QuasarError(
            f"--tasks {path}: holds no questions; Spec-Bench's are JSONL with question_id, category, turns"
        )
    taken: Counter[str] = Counter()
    kept = []
    for question in questions:
        taken[question.category] += 1
        if per_category is None or taken[question.category] <= per_category:
            kept.append(question)
    return kept


def _question(line: str, file: Path, number: int) -> Question:
    try:
        row = parse_json(line)
        turns = row["turns"]
        if isinstance(turns, list) and turns and all(isinstance(turn, str) and turn for turn in turns):
            return Question(row["question_id"], str(row.get("category") or file.stem), turns)
    except (ValueError, KeyError, TypeError):
        pass
    raise QuasarError(f"--tasks {file}:{number}: should be an object with question_id and turns, a list of texts")


def run_tasks(
    models: dict[str, Model],
    schemes: Sequence[Scheme],
    questions: Sequence[Question],
    settings: GenerationSettings,
    tick: Callable[[], object] = lambda: None,
    chat: bool | None = None,
    warm: bool = False,
) -> TaskRun:
    """Every question by every scheme, question by question so that a drifting machine treats schemes alike.

    models: by precision; the lossless ones keep their full-precision weights. A later turn's prompt holds the earlier
    turns with the first scheme's answers, so that all schemes continue the same text. chat: whether questions go into
    the chat template, None where there is one. warm: what a scheme's drafter learns from a
    question serves the next ones, as in a server; else every answer begins afresh.
    """
    memories = {scheme.name: DraftMemory.for_requests(True) if warm else None for scheme in schemes}
    run = TaskRun()
    for scheme in schemes:  # first passes, and the window's timings, are nobody's question
        ids = encode_turns(models[scheme.precision], [questions[0].turns[0]], [], 8, chat)
        generate(models[scheme.precision], ids, _settings(settings, scheme, max_new_tokens=8)).result()
    for question in questions:
        results: dict[str, list[Result]] = {scheme.name: [] for scheme in schemes}
        said: list[str] = []
        for turn in range(len(question.turns)):
            for scheme in schemes:
                model = models[scheme.precision]
                ids = encode_turns(model, question.turns[: turn + 1], said, settings.max_new_tokens, chat)
                results[scheme.name].append(
                    generate(model, ids, _settings(settings, scheme), draft_memory=memories[scheme.name]).result()
                )
            said.append(results[schemes[0].name][turn].text)
        tallies = run.tallies.setdefault(question.category, {})
        for scheme in schemes:
            tally = tallies.setdefault(scheme.name, Tally())
            for result, baseline in zip(results[scheme.name], results[schemes[0].name], strict=True):
                tally.add(result, baseline.token_ids)
            model = models[scheme.precision]
            run.answers.setdefault(scheme.name, []).append(
                answer(question, f"{model.name}-{scheme.name}", results[scheme.name])
            )
        tick()
    return run


def _settings(settings: GenerationSettings, scheme: Scheme, **changes: int) -> GenerationSettings:
    return replace(settings, draft=scheme.draft, lossless=scheme.lossless, **changes)


def encode_turns(
    model: Model, turns: Sequence[str], said: Sequence[str], room: int, chat: bool | None = None
) -> list[int]:
    """Token ids of a conversation: in the model's chat template (chat; None: where it has one), else its texts in turn.
    What does not fit with `room` tokens of answer loses its beginning."""
    tokenizer = model.tokenizer
    has_template = tokenizer is not None and bool(tokenizer.chat_template)
    if chat and not has_template:
        raise QuasarError(f"{model.name} has no chat template; leave out --chat")
    if has_template and chat is not False:
        messages = []
        for i, turn in enumerate(turns):
            messages.append({"role": "user", "content": turn})
            if i < len(said):
                messages.append({"role": "assistant", "content": said[i]})
        ids = render_chat(tokenizer, messages)
    else:
        parts = [part for i, turn in enumerate(turns) for part in (turn, *said[i : i + 1])]
        ids = model.encode("\n".join(parts) + "\n")
    most = model.config.max_position_embeddings - room
    return list(ids)[-max(most, 1) :]


def answer(question: Question, model_id: str, results: Sequence[Result]) -> dict[str, object]:
    """A line of Spec-Bench's model_answer files, which its own speed.py and equal.py read."""
    return {
        "question_id": question.question_id,
        "category": question.category,
        "answer_id": uuid4().hex,
        "model_id": model_id,
        "choices": [
            {
                "index": 0,
                "turns": [r.text for r in results],
                "decoding_steps": [r.stats.passes for r in results],
                "new_tokens": [r.stats.tokens for r in results],
                "wall_time": [r.stats.seconds_prefill + r.stats.seconds_decode for r in results],
                "accept_lengths": [length for r in results for length in r.accept_lengths],
            }
        ],
        "tstamp": time.time(),
    }


def write_answers(run: TaskRun, folder: Path) -> list[Path]:
    """One JSONL file per scheme. Raises QuasarError where the folder cannot be written."""
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for scheme, answers in run.answers.items():
            path = folder / f"{scheme}.jsonl"
            lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
            path.write_bytes(lines.encode(errors="backslashreplace"))
            written.append(path)
    except OSError as error:
        raise QuasarError(f"--answers {folder}: cannot be written ({error})") from None
    return written
