"""`quasar chat`, with the real engine."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quasar import Engine, GenerationSettings, Model
from quasar.cli.chat import Chat
from quasar.engine.settings import Result, TokenEvent

ROOT = Path(__file__).parents[2]


@pytest.fixture
def chat(shipped: Callable[..., Model]) -> Iterator[Chat]:
    model = shipped("qwen3")
    with Engine(model, 1) as engine:
        yield Chat(model, engine, GenerationSettings(max_new_tokens=8), io.StringIO())


def said(chat: Chat, *lines: str | type[BaseException]) -> str:
    """What the chat prints when these lines are typed."""
    chat.out = io.StringIO()
    left = iter(lines)

    def ask() -> str:
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    chat.loop(ask)
    return chat.out.getvalue()


def test_a_conversation(chat: Chat) -> None:
    text = said(chat, "Hi", "", "And?")
    assert text.count("[8 tokens") == 2
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2
    assert chat.turns[1]["content"] in text
    assert "\x1b" not in text
    first = chat.turns[1]["content"]
    said(chat, "/clear", "Hi")
    assert chat.turns[1]["content"] == first


def test_commands(chat: Chat) -> None:
    said(chat, "/set temperature 0.5", "/set seed 4", "/system Be brief.", "/colours on", "/think off")
    assert (chat.settings.temperature, chat.settings.seed, chat.system) == (0.5, 4, "Be brief.")
    assert (chat.colours, chat.think) == (True, False)
    assert "\x1b[33m" in said(chat, "/think on", "/help") + said(_free(chat), "Hi")
    told = said(
        chat, "/nonsense", "/set top_p 5", "/set top_k many", "/set colour red", "/think maybe", "/quit", "never"
    )
    for part in ("no command", "top_p is 5.0", "should be a number", "settings are", "say on or off"):
        assert part in told
    assert "never" not in [turn["content"] for turn in chat.turns]
    turns = len(chat.turns)
    said(chat, "/retry")
    assert len(chat.turns) == turns
    said(chat, "/clear")
    assert "nothing was asked" in said(chat, "/retry")


def _free(chat: Chat) -> Chat:
    chat.think = None
    return chat


class Interrupted:
    """An engine whose reader presses Ctrl-C after the second token."""

    cancelled = False

    def submit(self, prompt: list[int], settings: GenerationSettings) -> Interrupted:
        return self

    def events(self) -> Iterator[list[TokenEvent]]:
        yield [TokenEvent(1, "one ")]
        yield [TokenEvent(2, "two ")]
        raise KeyboardInterrupt

    def cancel(self) -> None:
        self.cancelled = True

    def result(self) -> Result:
        return Result(finish_reason="cancelled")


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(chat: Chat) -> None:
    chat.engine = engine = Interrupted()
    text = said(chat, KeyboardInterrupt, "Hi", "/set seed 3")
    assert engine.cancelled
    assert "one two" in text
    assert "stopped" in text
    assert chat.turns == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "one two "}]
    assert chat.settings.seed == 3


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_in_a_terminal(tmp_path: Path) -> None:
    """Editing, a line break and Ctrl-D, as a person types them."""
    pytest.importorskip("prompt_toolkit")
    import os
    import pty
    import select
    import time

    parent, child = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "quasar.cli",
        "chat",
        "--precision",
        "full",
        "--device",
        "cpu",
        "--max-new-tokens",
        "4",
    ]
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=child, stdout=child, stderr=child, env=environment, close_fds=True
    )
    os.close(child)
    screen = b""

    def wait_for(what: bytes, count: int = 1) -> None:
        nonlocal screen
        end = time.monotonic() + 90
        while screen.count(what) < count:
            assert time.monotonic() < end, screen
            if select.select([parent], [], [], 0.1)[0]:
                try:
                    screen += os.read(parent, 65536)
                except OSError:
                    return

    try:
        wait_for(b"/help lists commands")
        wait_for(b">")
        time.sleep(1)  # as long as a person takes, and the prompt to read its first key
        os.write(parent, b"def f(x)\x1b\r    return\r")
        wait_for(b"per pass")
        time.sleep(1)
        os.write(parent, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(parent)
    history = (tmp_path / "quasar" / "chat_history").read_text()
    assert "+def f(x)\n+    return" in history
