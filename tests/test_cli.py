"""The commands as people type them: streams, JSON, and one clear line for every mistake."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from quasar.cli import main
from quasar.cli.compare import LOSSLESS, SCHEMES

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(capsys):
    """run(*argv) -> (exit code, stdout, stderr)."""

    def call(*argv: str) -> tuple[int, str, str]:
        try:
            code = main(argv)
        except SystemExit as stop:  # argparse's own way out
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_generate_streams_text_and_ends_with_one_summary(run):
    code, out, err = run("generate", "def main():\n", "--max-new-tokens", "12", "--device", "cpu")
    assert code == 0
    assert out.strip()
    assert err.count("\n") == 1
    assert "12 tokens" in err
    assert "acceptance length" in err
    assert run("generate", "def main():\n", "--max-new-tokens", "12", "--no-stream", "--device", "cpu")[1] == out


def test_json_is_one_object_with_everything(run):
    code, out, err = run(
        "generate", "import os\n", "--max-new-tokens", "20", "--json", "--seed", "4", "--device", "cpu"
    )
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["prompt_tokens"] > 0
    assert len(answer["token_ids"]) == answer["stats"]["tokens"] <= 20
    stats = answer["stats"]
    assert stats["acceptance_length"] == (stats["tokens"] - 1) / stats["passes"]
    assert {
        "drafted",
        "accepted",
        "seconds_prefill",
        "seconds_decode",
        "tokens_per_second",
        "weight_bytes_per_pass",
    } <= set(stats)
    assert answer["settings"]["precision"] == "w8a8"
    assert answer["settings"]["seed"] == 4
    assert answer["fidelity"]["top1_agreement"] > 0.9


def test_the_same_prompt_in_four_ways(run, tmp_path, monkeypatch):
    text = "class Stack:\n"
    (tmp_path / "prompt.py").write_text(text)
    common = ("--json", "--max-new-tokens", "6", "--precision", "full", "--device", "cpu")
    answers = [run("generate", text, *common), run("generate", "--prompt-file", str(tmp_path / "prompt.py"), *common)]
    for argv in ((), ("-",)):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        answers.append(run("generate", *argv, *common))
    ids = [json.loads(out)["token_ids"] for _, out, _ in answers]
    assert ids[1:] == ids[:-1]


def test_prompt_ids_and_chat(run):
    code, out, _ = run("generate", "--prompt-ids", "5,6,7", "--json", "--max-new-tokens", "3", "--precision", "full")
    assert (code, json.loads(out)["prompt_tokens"]) == (0, 3)
    plain, chat = (
        json.loads(run("generate", "hi", "--json", "--max-new-tokens", "1", "--precision", "full", *flag)[1])
        for flag in ((), ("--chat",))
    )
    assert chat["prompt_tokens"] > plain["prompt_tokens"]


def test_compare_shows_what_each_scheme_costs(run):
    code, out, err = run("compare", "class Stack:\n", "--max-new-tokens", "60", "--device", "cpu", "--ignore-eos")
    assert code == 0
    assert err == ""
    for title in (*(title for title, _, _ in SCHEMES), LOSSLESS):
        assert title in out
    assert "W8A8 against full precision: mean KL" in out


def test_compare_as_json(run):
    code, out, _ = run(
        "compare", "class Stack:\n", "--max-new-tokens", "60", "--json", "--device", "cpu", "--ignore-eos"
    )
    answer = json.loads(out)
    assert (code, len(answer)) == (0, 6)
    plain, ngram, w8a8, w8a8_ngram, quasar = (answer[title] for title, _, _ in SCHEMES)
    assert plain["token_ids"] == ngram["token_ids"]
    assert w8a8["token_ids"] == w8a8_ngram["token_ids"] == quasar["token_ids"]
    assert plain["stats"]["passes"] == 59 > ngram["stats"]["passes"]
    assert quasar["stats"]["passes"] < 59
    assert quasar["stats"]["weight_bytes_per_pass"] < 0.75 * plain["stats"]["weight_bytes_per_pass"]
    assert plain["agreement"] == ngram["agreement"] == answer[LOSSLESS]["agreement"] == 1.0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("generate", "x", "--model", "/no/where"), "--model /no/where: no such folder"),
        (("generate", "x", "--device", "tpu"), "--device tpu is unknown; use one of auto, cpu"),
        (("generate", "x", "--dtype", "int3"), "--dtype int3 is unknown"),
        (("generate", "x", "--precision", "w1a1"), "invalid choice: 'w1a1'"),
        (("generate", "x", "--draft", "magic"), "--draft magic is unknown; use one of none, ngram"),
        (("generate", "x", "--alpha", "much"), "--alpha much: should be a number"),
        (("generate", "x", "--alpha", "7"), "--alpha 7.0: SmoothQuant's migration strength"),
        (("generate", "x", "--calibration", "/no/file"), "/no/file: no such file"),
        (("generate", "x", "--heldout", "/no/file"), "/no/file: no such file"),
        (("generate", "x", "--max-new-tokens", "0"), "max_new_tokens is 0"),
        (("generate", "x", "--max-new-tokens", "many"), "invalid int value: 'many'"),
        (("generate", "x", "--gamma", "99"), "gamma is 99; it must lie between 1 and 32"),
        (("generate", "x", "--temperature", "-1"), "temperature is -1.0"),
        (("generate", "x", "--temperature", "1", "--top-p", "0"), "top_p is 0.0"),
        (("generate", "", "--precision", "full"), "the prompt is empty"),
        (("generate", "x", "--prompt-ids", "1"), "give one prompt, not PROMPT and --prompt-ids"),
        (("generate", "--prompt-ids", "1,x"), "--prompt-ids 1,x: should be whole numbers"),
        (("generate", "--prompt-ids", "999999", "--precision", "full"), "token id 999999 is outside the vocabulary"),
        (("generate", "--prompt-file", "/no/file", "--precision", "full"), "--prompt-file /no/file: no such file"),
        (("generate", "x", "--frobnicate"), "unrecognized arguments: --frobnicate"),
        (("generate", "x", "--precision", "full", "--lm-head", "w8a8"), "--lm-head w8a8 goes with a quantised"),
        (("generate", "x", "--dummy", "gpt-9"), "invalid choice: 'gpt-9'"),
        (("compare", "x", "--model", "nope"), "--model nope: no such folder; shipped models are"),
        ((), "arguments are required: COMMAND"),
        (("fly",), "invalid choice: 'fly'"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(run, argv, message):
    code, out, err = run(*argv)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


def test_a_terminal_without_a_prompt_is_told_what_to_do(run, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    code, _, err = run("generate", "--precision", "full")
    assert code == 2
    assert 'quasar generate "def main():"' in err


@pytest.mark.parametrize("command", [(), ("generate",), ("compare",)])
def test_help_teaches(run, command):
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert "quasar" in out
    assert len(out) > 500


def quasar(*argv: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "quasar.cli", *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def test_a_reader_that_leaves_early_is_no_error():
    process = quasar("generate", "def f(", "--max-new-tokens", "400", "--precision", "full", "--ignore-eos")
    process.stdout.read(5)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(timeout=120) == 0
    assert "Traceback" not in err
    process.stderr.close()


def test_interrupting_exits_130_without_a_traceback():
    process = quasar(
        *("generate", "def f(", "--max-new-tokens", "2000", "--precision", "full", "--ignore-eos", "--draft", "none"),
        # A suite that runs in the background ignores interrupts, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Traceback" not in err
