"""Bytes that are no text, byte-order marks, and terminals that show ASCII alone."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quasar.cli import main

SMALL = str(Path(__file__).parents[1] / "golden" / "small-qwen3")
GENERATE = ("--model", SMALL, "--precision", "full", "--device", "cpu", "--max-new-tokens", "8", "--ignore-eos")
HALF = "\\ud800"  # half a surrogate pair, as JSON says it


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refusal(*argv): the one line of a command that ends with exit code 2."""

    def call(*argv: str) -> str:
        try:
            code = main(argv)
        except SystemExit as stop:
            code = stop.code
        _, err = capsys.readouterr()
        assert code == 2
        *before, line = err.splitlines()
        assert all("/help lists" in greeting for greeting in before)
        return line

    return call


def standard_input(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """As Python opens it where the locale is C: what is no UTF-8 comes through in disguise."""
    stream = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", stream)


@pytest.mark.parametrize(
    "argv",
    [("generate", *GENERATE), ("generate", "-", *GENERATE), ("compare", "--model", SMALL), ("chat", "--model", SMALL)],
    ids=lambda argv: argv[0],
)
def test_standard_input_that_is_no_text(
    argv: tuple[str, ...], refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    standard_input(monkeypatch, b"ab\xff\xfe\n")
    assert "standard input: cannot be read as text ('utf-8' codec" in refusal(*argv)


@pytest.mark.parametrize("argv", [("generate", "ab\udcff"), ("chat", "--system", "\udcff"), ("inspect", "\udc80")])
def test_arguments_that_are_no_text(argv: tuple[str, ...], refusal: Callable[..., str]) -> None:
    assert "holds bytes that are not UTF-8" in refusal(*argv)


FILES: list[tuple[str, tuple[str, ...]]] = [
    ("p.txt", ("generate", "--prompt-file", "FILE", *GENERATE)),
    ("p.txt", ("compare", "--prompt-file", "FILE", "--model", SMALL)),
    ("p.jsonl", ("batch", "FILE", "--output", "/dev/null/x", "--model", SMALL)),
    ("p.jsonl", ("eval", "tasks", "--tasks", "FILE", "--model", SMALL)),
    ("p.jsonl", ("eval", "fidelity", "--heldout", "FILE", "--model", SMALL)),
    ("p.jsonl", ("eval", "replay", "FILE", "--model", SMALL)),
    ("p.txt", ("corpus", "build", "FILE", "--draft-store", "FILE.store", "--model", SMALL)),
    ("p.jsonl", ("generate", "x", *GENERATE, "--draft", "suffix:FILE")),
    ("p.jsonl", ("quantize", "--model", SMALL, "--output", "FILE.out", "--calibration", "FILE")),
]


@pytest.mark.parametrize(("name", "argv"), FILES, ids=lambda value: value[0] if isinstance(value, tuple) else "")
def test_files_that_are_no_text(name: str, argv: tuple[str, ...], refusal: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"text": "ab\xff\xfe"}\n')
    assert f"{path}: cannot be read as text" in refusal(*(word.replace("FILE", str(path)) for word in argv))


@pytest.mark.parametrize(
    ("line", "argv"),
    [
        ('{"turns": ["T"], "question_id": 1, "category": "c"}', ("eval", "tasks", "--tasks", "FILE", "--no-chat")),
        ('{"prompt": "T", "answer": "x"}', ("eval", "replay", "FILE")),
        ('{"text": "T"}', ("corpus", "build", "FILE", "--draft-store", "FILE.store")),
        ('{"text": "T"}', ("eval", "fidelity", "--heldout", "FILE")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_half_a_character_in_json(
    line: str, argv: tuple[str, ...], refusal: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(line.replace("T", HALF))
    words = [word.replace("FILE", str(path)) for word in argv]
    assert "half a surrogate pair is no text" in refusal(*words, "--model", SMALL)


def test_json_nested_beyond_reason(refusal: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("[" * 100_000)
    for argv in (("eval", "tasks", "--tasks"), ("eval", "replay"), ("eval", "fidelity", "--heldout")):
        refusal(*argv, str(path), "--model", SMALL)


@pytest.mark.parametrize(
    "argv",
    [
        ("generate", "x", *GENERATE, "--draft", f"suffix:{'x' * 5000}"),
        ("generate", "--prompt-file", "x" * 5000, *GENERATE),
        ("generate", "x", "--model", "x" * 5000),
        ("eval", "tasks", "--tasks", "x" * 5000),
        ("batch", __file__, "--output", "x" * 5000),
        ("quantize", "--model", SMALL, "--output", "x" * 5000),
    ],
    ids=lambda argv: argv[0],
)
def test_names_longer_than_any_files(argv: tuple[str, ...], refusal: Callable[..., str]) -> None:
    assert len(refusal(*argv)) < 1100


def prompt_ids(capsys: pytest.CaptureFixture[str], *argv: str) -> int:
    assert main(["generate", *argv, *GENERATE, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["prompt_tokens"]


def test_a_byte_order_mark_is_no_part_of_a_prompt(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("abcdef", encoding="utf-8-sig")
    standard_input(monkeypatch, path.read_bytes())
    assert prompt_ids(capsys, "--prompt-file", str(path)) == prompt_ids(capsys, "-") == len("abcdef")


def test_batch_answers_lines_that_hold_other_ends_of_lines_and_half_characters(tmp_path: Path) -> None:
    path, output = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    body = {"prompt": "a\u2028b", "max_tokens": 2}
    lines = [{"custom_id": "\ud800", "url": "/v1/completions", "body": body}]
    lines += [{"custom_id": "2", "url": "/v1/completions", "body": body | {"prompt": "\udfff"}}]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_bytes(text.encode(errors="backslashreplace"))
    argv = ("batch", str(path), "--output", str(output), "--model", SMALL, "--precision", "full", "--device", "cpu")
    assert main(argv) == 0
    first, second = map(json.loads, output.read_text().splitlines())
    assert (first["custom_id"], first["response"]["status_code"]) == ("\ud800", 200)
    assert second["response"]["status_code"] == 400
    assert "surrogate" in second["error"]["message"]


@pytest.mark.parametrize("option", ["--stream", "--no-stream", "--json"])
def test_output_that_is_ascii(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PYTHONIOENCODING=ascii makes it. What the model says is escaped, and JSON stays JSON."""
    written = {}
    for encoding in ("utf-8", "ascii"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr("sys.stdout", stream)
        assert main(["generate", "ab", *GENERATE, option]) == 0
        written[encoding] = stream.buffer.getvalue().decode(encoding)
    assert not written["utf-8"].isascii()
    if option == "--json":
        texts = [json.loads(text)["text"] for text in written.values()]
        assert texts[0] == texts[1]
    else:
        assert written["ascii"] == written["utf-8"].encode("ascii", "backslashreplace").decode()


def test_chat_on_a_terminal_that_is_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    standard_input(monkeypatch, "é\n".encode())
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    argv = ["chat", "--model", SMALL, "--precision", "full", "--device", "cpu", "--max-new-tokens", "8"]
    assert main(argv) == 0
    sys.stdout.flush()
    assert b"\\x" in stream.buffer.getvalue() or b"\\u" in stream.buffer.getvalue()
