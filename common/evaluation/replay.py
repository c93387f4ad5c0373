"""Replaying logs: the acceptance length that a drafter would have had, without the model that wrote them.

Greedy verification keeps exactly the candidates that equal the model's own answer, so the answer is all that it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from quasar.drafting.free import new_free_drafter
from quasar.drafting.memory import DraftMemory
from quasar.errors import QuasarError
from quasar.reading import parse_json, read_text
from quasar.speculation.draft import Draft, TopRow

_FORMATS = (
    'a trace {"prompt": [ids], "answer": [ids]}, the same with text, OpenAI chat {"messages": [...]}, or a .txt file'
)

TYPICAL_SHARES = (0.8, 0.1, 0.04, 0.02, 0.015, 0.01, 0.008, 0.007)


class Tokenizer(Protocol):
    """As transformers' tokenizers."""

    chat_template: Any

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> Any: ...


@dataclass(frozen=True)
class Logged:
    """One answer of a log."""

    prompt: list[int]
    answer: list[int]
    top: list[TopRow] | None = None  # [answer][k] the model's most probable tokens in each place, where known


@dataclass(frozen=True)
class Replayed:
    """What a drafter reached on a file."""

    file: str
    draft: str
    rows: int  # the most of a pass
    warm: bool
    tokens: int
    passes: int
    accepted_by_source: dict[str, int]

    @property
    def acceptance_length(self) -> float:
        """Committed tokens per verification pass."""
        return self.tokens / self.passes if self.passes else 1.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        figures = {"tokens": self.tokens, "passes": self.passes, "accepted_by_source": self.accepted_by_source}
        length = round(self.acceptance_length, 4)
        return {
            "file": self.file,
            "draft": self.draft,
            "rows": self.rows,
            "warm": self.warm,
            "acceptance_length": length,
            **figures,
        }


def replay(file: str, log: Sequence[Logged], draft: str, rows: int, warm: bool) -> Replayed:
    """Runs a drafter over a log's answers in their order.

    rows: of a pass; it holds the last committed token and rows - 1 candidates. warm: what the drafter learnt from
    earlier requests of the log serves later ones; else each begins afresh. The prompt's own pass, which brings the
    first token, is not counted.
    """
    memory, tokens, passes = DraftMemory.for_requests(warm), 0, 0
    sources: dict[str, int] = {}
    for logged in log:
        if not warm:
            memory = DraftMemory.for_requests(False)
        drafter = new_free_drafter(draft, memory, recycles=logged.top is not None)
        if drafter is None:
            tokens += len(logged.answer) - 1
            passes += len(logged.answer) - 1
            continue
        drafter.extend([*logged.prompt, *logged.answer[:1]])
        at = 1
        while at < len(logged.answer):
            proposal = drafter.propose(rows - 1)
            path, own, top = verify(proposal, logged, at, drafter.top_k)
            kept = [logged.answer[at + i] for i in range(min(len(path) + 1, len(logged.answer) - at))]
            for candidate in path:
                source = str(proposal.keys[candidate][0])
                sources[source] = sources.get(source, 0) + 1
            drafter.observe(proposal, len(proposal), own, top)
            drafter.extend(kept)
            at += len(kept)
            tokens += len(kept)
            passes += 1
        drafter.finish()
        memory.settle()
    return Replayed(file, draft, rows, warm, tokens, passes, sources)


def verify(draft: Draft, logged: Logged, at: int, top_k: int) -> tuple[list[int], list[int], list[TopRow] | None]:
    """The accepted path, the target's own token of each row (-1: the log does not say), and its best tokens."""
    answer = logged.answer
    own = [-1] * (len(draft) + 1)
    top: list[TopRow] | None = None
    if top_k and logged.top is not None:
        top = [[] for _ in own]
        top[0] = logged.top[at][:top_k]
    own[0] = answer[at]
    path: list[int] = []
    last = -1
    for i, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
        if parent == last and token == own[last + 1]:
            path.append(i)
            last = i
            after = at + len(path)
            if after < len(answer):
                own[i + 1] = answer[after]
                if top is not None and logged.top is not None:
                    top[i + 1] = logged.top[after][:top_k]
    return path, own, top


def together(results: Sequence[Replayed]) -> list[Replayed]:
    """Of several files: all tokens over all passes, per drafter and rows."""
    groups: dict[tuple[str, int], list[Replayed]] = {}
    for result in results:
        groups.setdefault((result.draft, result.rows), []).append(result)
    summed = []
    for (draft, rows), group in groups.items():
        sources: dict[str, int] = {}
        for result in group:
            for source, count in result.accepted_by_source.items():
                sources[source] = sources.get(source, 0) + count
        tokens, passes = sum(r.tokens for r in group), sum(r.passes for r in group)
        summed.append(Replayed("all", draft, rows, group[0].warm, tokens, passes, sources))
    return summed


def read_log(path: str, tokenizer: Callable[[], Tokenizer | None]) -> list[Logged]:
    """Reads a log; `tokenizer` is asked for only where it holds text. Raises QuasarError on anything else."""
    file = Path(path)
    text = read_text(file)
    if file.suffix == ".txt":
        ids = _encode(text, tokenizer, path)
        log = [Logged(ids[:1], ids[1:])]
    else:
        log = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                log += _answers(line, f"{path}:{number}", tokenizer)
    log = [logged for logged in log if len(logged.answer) > 1]
    if not log:
        raise QuasarError(f"{path}: holds no answer of two tokens or more; each line should be {_FORMATS}")
    return log


def _answers(line: str, where: str, tokenizer: Callable[[], Tokenizer | None]) -> list[Logged]:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise QuasarError(f"{where}: is not JSON ({error}); each line should be {_FORMATS}") from None
    if not isinstance(record, dict):
        raise QuasarError(f"{where}: should be {_FORMATS}")
    if isinstance(record.get("messages"), list):
        return _chat(record, where, tokenizer)
    prompt = record.get("prompt", [])
    answer = next((record[name] for name in ("answer", "completion", "response", "text") if name in record), None)
    if _is_ids(prompt) and _is_ids(answer):
        top = record.get("top")
        if top is not None and not (
            isinstance(top, list) and len(top) == len(answer) and all(_is_ids(row) for row in top)
        ):
            raise QuasarError(f'{where}: "top" should be a list of token ids for each of the {len(answer)} of "answer"')
        return [Logged(prompt, answer, None if top is None else _with_shares(top, record.get("shares"), where))]
    if isinstance(answer, str) and (isinstance(prompt, str) or prompt == []):
        begin = _encode(prompt, tokenizer, where) if prompt else []
        return [Logged(begin, _encode(answer, tokenizer, where, special=not begin))]
    raise QuasarError(f"{where}: should be {_FORMATS}")


def _with_shares(top: list[list[int]], shares: Any, where: str) -> list[TopRow]:
    """Runners-up with their shares; without "shares" those that real models' have on average."""
    if shares is None:
        shares = [TYPICAL_SHARES[: len(row)] for row in top]
    try:
        return [[(t, float(s)) for t, s in zip(*pair, strict=True)] for pair in zip(top, shares, strict=True)]
    except (TypeError, ValueError):
        raise QuasarError(f'{where}: "shares" should be a number for each token of "top"') from None


def _chat(record: dict[str, Any], where: str, tokenizer: Callable[[], Tokenizer | None]) -> list[Logged]:
    """Every answer of the assistant; what stands before it is its prompt."""
    messages = list(record["messages"])
    response = record.get("response")
    choices = record.get("choices", response.get("choices") if isinstance(response, dict) else None)
    if isinstance(choices, list):
        messages += [choice["message"] for choice in choices[:1] if isinstance(choice, dict) and "message" in choice]
    log = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise QuasarError(f'{where}: a message should be {{"role": ..., "content": "text"}}')
        content = message.get("content")
        if message["role"] == "assistant" and isinstance(content, str):
            prompt = _chat_prompt(messages[:i], tokenizer, where)
            log.append(Logged(prompt, _encode(content, tokenizer, where, special=False)))
    return log


def _chat_prompt(messages: list[dict[str, Any]], tokenizer: Callable[[], Tokenizer | None], where: str) -> list[int]:
    turns = [{"role": m["role"], "content": _content(m.get("content"))} for m in messages]
    made = _tokenizer(tokenizer, where)
    if not turns:
        return []
    if getattr(made, "chat_template", None):
        text = made.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return made.encode(text, add_special_tokens=False)
    text = "".join(f"{turn['role']}: {turn['content']}\n" for turn in turns) + "assistant: "
    return made.encode(text)


def _content(content: Any) -> str:
    """Of OpenAI's two ways to write a message's text."""
    if isinstance(content, list):
        texts = (part.get("text") for part in content if isinstance(part, dict))
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _encode(text: str, tokenizer: Callable[[], Tokenizer | None], where: str, special: bool = True) -> list[int]:
    return list(_tokenizer(tokenizer, where).encode(text, add_special_tokens=special))


def _tokenizer(tokenizer: Callable[[], Tokenizer | None], where: str) -> Tokenizer:
    made = tokenizer()
    if made is None:
        raise QuasarError(f"{where}: holds text, and there is no tokenizer to read it with; name one with --model")
    return made


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)
