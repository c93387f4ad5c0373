"""What careless people type: one line, exit code 2, and nothing measured or loaded in vain."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from quasar import QuasarError, load
from quasar.cli import main

SMALL = Path(__file__).parents[1] / "golden" / "small-qwen3"
MODEL = ("--model", str(SMALL), "--device", "cpu")


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and err.count("\n") == 1 and not out, (argv, code, out, err)
    return err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("serve", "--draft", "x"), "--draft x is unknown"),
        (("serve", "--api-key", "a\nb"), "no request can bring a key"),
        (("serve", "--api-key", " a"), "no request can bring a key"),
        (("serve", "--cors", "example.com"), "should be an origin, as https://example.com, or *"),
        (("serve", "--cors", ""), "should be an origin"),
        (("serve", "--shutdown-seconds", "nan"), "must be 0 or more"),
        (("serve", "--served-name", ""), "the name is empty"),
        (("serve", "--tensor-parallel", "2"), "--tensor-parallel goes with --engine vllm"),
        (("batch", "requests.jsonl", "--output", "o", "--draft", "x"), "--draft x is unknown"),
        (("batch", "requests.jsonl", "--output", "o", "--max-sequences", "0"), "must be 1 or more"),
        (("quantize", "--output", "o", "--group", "64"), "--group 64 goes with --scheme w4a16"),
        (("generate", "a", "--device", "cpu:9"), "--device cpu:9 is unknown"),
        (("eval", "fidelity", "--limit", "0"), "--limit 0: must be 1 or more"),
        (("eval", "fidelity", "--prompt-tokens", "-1"), "--prompt-tokens -1: must be 1 or more"),
        (("eval", "tasks", "--tasks", "q", "--limit", "0"), "--limit 0: must be 1 or more"),
    ],
)
def test_flags(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], said: str) -> None:
    model = MODEL[:2] if "--device" in argv else MODEL
    assert said in refusal(capsys, *argv, *model)


@pytest.mark.parametrize("flag", ["--json", "--plot"])
def test_files_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path, flag: str) -> None:
    folder = tmp_path / "folder.png"
    folder.mkdir()
    for kind in ("eval fidelity", "bench step"):
        assert "should name a file" in refusal(capsys, *kind.split(), flag, str(folder), *MODEL)
        assert "there is no folder" in refusal(capsys, *kind.split(), flag, str(tmp_path / "no" / "x.png"), *MODEL)
    if flag == "--plot":
        assert "should end with .png" in refusal(capsys, "bench", "step", flag, str(tmp_path / "x.doc"), *MODEL)
    assert list(tmp_path.iterdir()) == [folder]


def test_chat_without_a_tokenizer(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(SMALL / name, tmp_path)
    said = refusal(capsys, "chat", "--model", str(tmp_path), "--precision", "full")
    assert "has no tokenizer to chat with" in said


def test_a_prompt_longer_than_any_context(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Tokenizing eight million characters takes ten seconds and a gigabyte."""
    (tmp_path / "prompt.txt").write_text("a" * (5 << 20))
    said = refusal(capsys, "generate", "--prompt-file", str(tmp_path / "prompt.txt"), *MODEL, "--precision", "full")
    assert "a prompt of 5242880 characters is too long; at most 4194304" in said


@pytest.mark.parametrize("value", ["inf", "nan", "-1", "many"])
def test_size_of_the_cache(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("QUASAR_CACHE_GB", value)
    assert "should be a number of gigabytes" in refusal(capsys, "cache", "list")


@pytest.mark.parametrize("field", ["tie_word_embeddings", "attention_bias"])
def test_switches_of_a_config(tmp_path: Path, field: str) -> None:
    model = Path(shutil.copytree(SMALL, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").chmod(0o644)
    (model / "config.json").write_text(json.dumps(config | {field: "maybe"}))
    with pytest.raises(QuasarError, match=f"{field} is 'maybe'; it must be true or false"):
        load(model, device="reference", precision="full")


@pytest.mark.parametrize(
    "fields",
    [
        {"eos_token": "\ud800"},
        {"extra_special_tokens": ["\ud800"]},
        {"added_tokens_decoder": {"300": {"content": "a\ud800"}}},
    ],
)
def test_tokens_that_are_no_text(tmp_path: Path, fields: dict[str, object]) -> None:
    model = Path(shutil.copytree(SMALL, tmp_path / "model"))
    path = model / "tokenizer_config.json"
    path.chmod(0o644)
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(QuasarError, match=r"tokenizer_config.json: the token .* holds half a surrogate pair"):
        load(model, device="reference", precision="full")
