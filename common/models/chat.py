"""Conversations: messages to token ids, and generated text to reasoning and answer.

A template is rendered to text first and tokenised afterwards, as the authors of the models do. So a tokenizer that
puts a BOS before every text puts one here too (openPangu); where it puts none, or the template has one, none is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quasar.errors import QuasarError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]  # "role" and "content"; what else the model's template reads
Pieces = list[tuple[str, str]]  # ("reasoning" | "content", text)
THINK_MODES = ("slow", "fast", "auto")


@dataclass(frozen=True)
class ThinkMarkers:
    """The two tokens between which a model writes its reasoning."""

    open: str
    close: str


QWEN3 = ThinkMarkers("<think>", "</think>")
OPENPANGU = ThinkMarkers("[unused16]", "[unused17]")
# openPangu thinks slowly unless the last user turn ends in one of these.
_OPENPANGU_SWITCHES = {"slow": "", "fast": " /no_think", "auto": " /auto_think"}


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, think: str | None = None, **template_kwargs: Any
) -> list[int]:
    """Token ids of a conversation in the model's chat template, up to where the assistant answers.

    think is "slow", "fast" or "auto" (None: the model's own default); template_kwargs go to the template, as tools=...
    and add_generation_prompt=False do. Raises QuasarError where there is no template, where the template refuses the
    messages, or where the model cannot think that way.
    """
    if not tokenizer.chat_template:
        raise QuasarError(f"{tokenizer.name_or_path or 'this model'} has no chat template; leave out --chat")
    if think is not None:
        messages, switches = _with_thinking(tokenizer, messages, think)
        template_kwargs = {**switches, **template_kwargs}
    options = {"add_generation_prompt": True, **template_kwargs, "tokenize": False}
    from jinja2 import TemplateError  # transformers brings it

    try:
        text = tokenizer.apply_chat_template(list(messages), **options)
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QuasarError(f"the model's chat template refuses these messages: {reason}") from None
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    if bos is None or ids[:1] == [bos] or tokenizer.encode("")[:1] != [bos]:
        return list(ids)
    return [bos, *ids]


def think_markers(tokenizer: PreTrainedTokenizerBase | None) -> ThinkMarkers | None:
    """Which markers this model writes, None for a model that does not think aloud."""
    if tokenizer is None:
        return None
    template = str(tokenizer.chat_template or "")
    if "[unused9]" in template and _has_token(tokenizer, OPENPANGU.close):
        return OPENPANGU
    return QWEN3 if _has_token(tokenizer, QWEN3.close) else None


def splitter_for(tokenizer: PreTrainedTokenizerBase | None, prompt_ids: Sequence[int] = ()) -> ReasoningSplitter:
    """A splitter for the text that this model writes after that prompt. Without markers all of it is content."""
    markers = think_markers(tokenizer)
    if tokenizer is None or markers is None:
        return ReasoningSplitter(None)
    # Some templates open the reasoning themselves, so that the text begins inside it.
    tail = tokenizer.decode(list(prompt_ids)[-8:], skip_special_tokens=False).rstrip()
    return ReasoningSplitter(markers, inside=tail.endswith(markers.open))


class ReasoningSplitter:
    """Splits generated text, piece by piece, into reasoning and content.

    Reasoning is what stands between the markers where the text begins with them; a marker further on is content, since
    an answer may speak of markers. White space around the reasoning and before the content belongs to neither.
    """

    def __init__(self, markers: ThinkMarkers | None, inside: bool = False) -> None:
        self._markers = markers
        self._state = "content" if markers is None else "reasoning" if inside else "start"
        self._held = ""  # white space or the beginning of a marker: what follows decides
        self._reasoned = False  # some reasoning has been handed out

    def push(self, text_piece: str) -> Pieces:
        """Takes the next text; returns what became certain, as (kind, text) with kind "reasoning" or "content"."""
        return self._advance(self._held + text_piece, final=False)

    def finish(self) -> Pieces:
        """No more text: returns what was held back."""
        return self._advance(self._held, final=True)

    def _advance(self, text: str, final: bool) -> Pieces:
        out: Pieces = []
        self._held = ""
        if self._state == "start":
            text = self._begin(text, final)
        if self._state == "reasoning":
            text = self._reason(text, final, out)
        if self._state == "leading":
            text = text.lstrip()  # between the reasoning and the content
            if text:
                self._state = "content"
        if self._state == "content" and text:
            out.append(("content", text))
        return out

    def _begin(self, text: str, final: bool) -> str:
        """Returns what is left to split once it is certain whether the text begins with reasoning."""
        body, opening = text.lstrip(), self._markers.open
        if body.startswith(opening):
            self._state = "reasoning"
            return body[len(opening) :]
        if not final and opening.startswith(body):
            self._held = text
            return ""
        self._state = "content"
        return text

    def _reason(self, text: str, final: bool, out: Pieces) -> str:
        """Hands reasoning out; returns what follows it."""
        closing = self._markers.close
        if not self._reasoned:
            text = text.lstrip()
        body, closed, rest = text.partition(closing)
        keep = 0 if final or closed else _partial(body, closing)
        certain = body[: len(body) - keep].rstrip()
        if certain:
            out.append(("reasoning", certain))
            self._reasoned = True
        if closed:
            self._state = "leading"
            return rest
        self._held = "" if final else body[len(certain) :]
        return ""


def _partial(text: str, marker: str) -> int:
    """Length of the longest end of `text` with which the marker begins."""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0)


def _has_token(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    found = tokenizer.convert_tokens_to_ids(token)
    return found is not None and found != tokenizer.unk_token_id


def _with_thinking(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], think: str
) -> tuple[list[Message], dict[str, Any]]:
    """The messages, and what the template is told, for a way of thinking."""
    if think not in THINK_MODES:
        raise QuasarError(f"--think {think} is unknown; use one of {', '.join(THINK_MODES)}")
    messages = list(messages)
    if think_markers(tokenizer) == OPENPANGU:
        last = next((i for i in range(len(messages) - 1, -1, -1) if messages[i].get("role") == "user"), None)
        if last is not None and _OPENPANGU_SWITCHES[think]:
            messages[last] = messages[last] | {"content": f"{messages[last]['content']}{_OPENPANGU_SWITCHES[think]}"}
        return messages, {}
    if "enable_thinking" in str(tokenizer.chat_template):
        if think == "auto":
            raise QuasarError("--think auto: this model does not choose by itself; use slow or fast")
        return messages, {"enable_thinking": think == "slow"}
    raise QuasarError(f"--think {think}: this model's chat template cannot be switched; leave out --think")
