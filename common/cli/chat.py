"""`quasar chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TextIO

from quasar.cli import flags, streams
from quasar.engine.settings import GenerationSettings, Result, TokenEvent
from quasar.errors import QuasarError
from quasar.models.chat import render_chat, splitter_for
from quasar.models.model import Model

_HELP = """Enter sends; Esc then Enter breaks the line. Ctrl-C stops an answer, Ctrl-D ends.
/system TEXT     the system message (nothing: none)
/set NAME VALUE  one of temperature, top_p, top_k, min_p, seed, max_new_tokens
/think on|off    whether a model that can think does
/colours on|off  green: drafted and accepted, yellow: the verifier's own
/retry           the last question again
/clear           a new chat
/help            this text
/quit            ends, as Ctrl-D does"""
_SETTINGS = ("temperature", "top_p", "top_k", "min_p", "seed", "max_new_tokens")
_DRAFTED, _OWN, _FAINT, _END = "\x1b[32m", "\x1b[33m", "\x1b[2m", "\x1b[0m"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="a conversation in the terminal",
        description="Talk to a model in the terminal. /help lists commands; Ctrl-C stops an answer and keeps the chat.",
    )
    defaults = GenerationSettings()
    group = parser.add_argument_group("generation")
    group.add_argument("--system", metavar="TEXT", help="the system message")
    group.add_argument(
        "--max-new-tokens", type=int, default=1024, metavar="N", help="of an answer (default: %(default)s)"
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=defaults.temperature,
        metavar="T",
        help="0 is greedy (default: %(default)s)",
    )
    group.add_argument("--top-p", type=float, default=defaults.top_p, metavar="P", help="(default: %(default)s)")
    group.add_argument("--top-k", type=int, default=defaults.top_k, metavar="K", help="(default: %(default)s)")
    group.add_argument("--seed", type=int, default=defaults.seed, metavar="S", help="(default: %(default)s)")
    group.add_argument("--no-colours", action="store_true", help="do not colour tokens by how they came")
    flags.add_draft_flag(parser)
    flags.add_draft_store_flag(parser)
    flags.add_precision_flag(parser)
    flags.add_lossless_flag(parser)
    flags.add_model_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.dummy is not None:
        raise QuasarError(f"--dummy {args.dummy}: random weights have nothing to say; name a --model")
    settings = GenerationSettings(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        draft=args.draft,
        lossless=args.lossless,
    )
    ask = line_reader()
    model = flags.load_model(args, args.precision, args.lossless)
    if model.tokenizer is None:
        raise QuasarError(f"{model.name} has no tokenizer to chat with")
    from quasar.engine.engine import Engine

    with (
        flags.draft_memory(args, model) as memory,
        Engine(model, 1, lossless=args.lossless, draft_memory=memory) as engine,
    ):
        colours = not args.no_colours and "NO_COLOR" not in os.environ and sys.stdout.isatty()
        chat = Chat(model, engine, settings, sys.stdout, args.system, colours)
        print(f"{model.name} ({model.precision}); /help lists commands", file=sys.stderr)
        chat.loop(ask)


def line_reader() -> Callable[[], str]:
    """Asks for a message: with editing and history on a terminal, else a line at a time. EOFError ends."""
    if not sys.stdin.isatty():
        return streams.read_line
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings
    except ImportError:
        raise QuasarError("chatting needs prompt_toolkit; pip install 'quasar-inference[serve]'") from None
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    path = Path(os.environ.get("XDG_STATE_HOME", Path.home() / ".local" / "state")) / "quasar" / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        history: Any = FileHistory(str(path))
    except OSError:
        history = InMemoryHistory()
    session: Any = PromptSession(
        history=history,
        multiline=True,
        key_bindings=keys,
        prompt_continuation=lambda *_: "  ",
        enable_open_in_editor=True,
    )
    return lambda: session.prompt("> ")


@dataclass
class Chat:
    """A conversation and its settings. `loop` reads messages and commands until the end."""

    model: Model
    engine: Any
    settings: GenerationSettings
    out: TextIO
    system: str | None = None
    colours: bool = False
    turns: list[dict[str, str]] = field(default_factory=list)
    think: bool | None = None  # None: the model's own default
    _last_prompt: list[int] = field(default_factory=list)

    def loop(self, ask: Callable[[], str]) -> None:
        """Until ask raises EOFError, or /quit. KeyboardInterrupt at the prompt drops the line."""
        while True:
            try:
                text = ask().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                continue
            if not text:
                continue
            try:
                if not text.startswith("/"):
                    self.answer(text)
                elif self.command(text):
                    return
            except QuasarError as error:
                print(error, file=self.out)

    def command(self, text: str) -> bool:
        """Does what /words say; returns whether the chat is over. Raises QuasarError."""
        name, _, rest = text[1:].partition(" ")
        rest = rest.strip()
        if name in ("quit", "exit", "q"):
            return True
        if name == "help":
            print(_HELP, file=self.out)
        elif name == "clear":
            self.turns.clear()
        elif name == "system":
            self.system = rest or None
        elif name == "retry":
            self._retry()
        elif name in ("think", "colours"):
            if rest not in ("on", "off"):
                raise QuasarError(f"/{name} {rest}: say on or off")
            setattr(self, name, rest == "on")
        elif name == "set":
            self._set(*rest.partition(" ")[::2])
        else:
            raise QuasarError(f"/{name} is no command; /help lists them")
        return False

    def _retry(self) -> None:
        last = next((i for i in range(len(self.turns) - 1, -1, -1) if self.turns[i]["role"] == "user"), None)
        if last is None:
            raise QuasarError("/retry: nothing was asked yet")
        text = self.turns[last]["content"]
        del self.turns[last:]
        self.answer(text)

    def _set(self, name: str, value: str) -> None:
        if name not in _SETTINGS:
            raise QuasarError(f"/set {name}: settings are {', '.join(_SETTINGS)}")
        kinds = {each.name: type(each.default) for each in fields(GenerationSettings)}
        try:
            self.settings = replace(self.settings, **{name: kinds[name](value)})
        except ValueError:
            raise QuasarError(f"/set {name} {value}: should be a number") from None

    def answer(self, text: str) -> None:
        """Prints the model's answer as it comes. Ctrl-C stops it; what came stays in the chat."""
        handle = self.engine.submit(self._prompt(text), self.settings)
        self.turns.append({"role": "user", "content": text})
        writer = _Writer(self.out, splitter_for(self.model.tokenizer, self._last_prompt), self.colours)
        try:
            for events in _interruptible(handle):
                writer.write(events)
        finally:
            writer.finish()
            self.turns.append({"role": "assistant", "content": writer.content})
        print(_figures(handle.result()), file=self.out)

    def _prompt(self, text: str) -> list[int]:
        turns = [*self.turns, {"role": "user", "content": text}]
        if self.system:
            turns = [{"role": "system", "content": self.system}, *turns]
        tokenizer = self.model.tokenizer
        if tokenizer.chat_template:
            think = None if self.think is None else "slow" if self.think else "fast"
            self._last_prompt = render_chat(tokenizer, turns, think=think)
        else:
            self._last_prompt = self.model.encode(text)  # a model that only continues texts
        return self._last_prompt


def _interruptible(handle: Any) -> Iterator[list[TokenEvent]]:
    """The events; after KeyboardInterrupt those that had come already."""
    events = handle.events()
    while True:
        try:
            batch = next(events, None)
        except KeyboardInterrupt:
            handle.cancel()
            handle.result()
            return
        if batch is None:
            return
        yield batch


class _Writer:
    """Prints tokens coloured by how they came, thinking faint."""

    def __init__(self, out: TextIO, splitter: Any, colours: bool) -> None:
        self._out = out
        self._splitter = splitter
        self._colours = colours
        self._kind = ""
        self.content = ""

    def write(self, events: list[TokenEvent]) -> None:
        for event in events:
            self._show(self._splitter.push(event.text), _DRAFTED if event.drafted else _OWN)
        self._out.flush()

    def finish(self) -> None:
        self._show(self._splitter.finish(), _OWN)
        print(file=self._out, flush=True)

    def _show(self, pieces: list[tuple[str, str]], colour: str) -> None:
        for kind, text in pieces:
            if kind != self._kind and self._kind:
                self._out.write("\n\n")
            self._kind = kind
            if kind == "content":
                self.content += text
            if not self._colours:
                self._out.write(text)
            else:
                self._out.write(f"{_FAINT if kind == 'reasoning' else ''}{colour}{text}{_END}")


def _figures(result: Result) -> str:
    stats = result.stats
    how = {"cancelled": ", stopped", "length": ", cut at the limit"}.get(result.finish_reason, "")
    return (
        f"[{stats.tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, {stats.acceptance_length:.2f} per pass, "
        f"{stats.accepted} of {stats.drafted} drafted accepted{how}]"
    )
