"""quasar quantize, inspect and serve, as they are typed."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from quasar.cli import main
from quasar.models.config import read_config
from tests.helpers.gguf_files import write_gguf

GOLDEN = Path(__file__).parent / "golden"


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a command that exits with 2."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("flags", [[], ["--scheme", "w4a16"], ["--scheme", "w4a16", "--format", "ascend"]])
def test_quantize_inspect_generate(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "def main():\n    return 1\n" * 9}) + "\n")
    precision = "w4a16" if flags else "w8a8"
    flags = [*flags, "--calibration", str(texts), "--heldout", str(texts), "--device", "reference", "--force"]
    out = tmp_path / "out"
    assert main(["quantize", "--model", str(GOLDEN / "small-qwen3"), "--output", str(out), *flags]) == 0
    assert "top-1 agreement" in capsys.readouterr().err
    assert "quasar " in (out / "README.md").read_text()

    assert main(["inspect", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("layers 0 to 1 ") and line.endswith(f" {precision}")]
    assert lines[-1].split() == ["runs", "here", "yes"]

    assert (
        main(["generate", "--model", str(out), "--device", "reference", "--max-new-tokens", "3", "--json", "Hi"]) == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["settings"]["precision"] == precision
    assert f"is quantised ({precision})" in failure(
        capsys, "generate", "--model", str(out), "--precision", "full", "Hi"
    )


def test_inspect_counts_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the float model: what a pass reads is all but the embedding."""
    assert main(["inspect", str(GOLDEN / "small-qwen3")]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "pass" not in line)
    assert lines["architecture"].startswith("Qwen3ForCausalLM: 2 layers, hidden 64")
    assert lines["weights"] == "0.2 MB in 25 tensors: BF16 0.2 MB"
    assert lines["lm_head"] == "full (bfloat16)"


def test_inspect_says_what_it_can(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"architectures": ["MixtralForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "model.safetensors").write_bytes((GOLDEN / "small-qwen3" / "model.safetensors").read_bytes())
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert main(["inspect", "--check", str(tmp_path)]) == 1
    assert main(["inspect", "--check", str(GOLDEN / "small-qwen3")]) == 0
    assert "25 tensors" in out
    assert "no: " in out
    assert "architecture MixtralForCausalLM is not supported" in out


@pytest.mark.parametrize(
    ("folder", "device", "expected"),
    [
        ("llm-compressor", "cuda", []),
        ("llm-compressor", "cpu", ["--enforce-eager"]),
        ("msmodelslim-mix", "npu", ["--quantization", "ascend"]),
    ],
)
def test_serve_prints_the_command(
    folder: str, device: str, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(GOLDEN / folder)
    argv = ["serve", "--engine", "vllm", "--model", path, "--tensor-parallel", "2", "--device", device, "--print"]
    assert main(argv) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[:5] == ["vllm", "serve", path, "--tensor-parallel-size", "2"]
    drafting = json.loads(words[words.index("--speculative-config") + 1])
    assert drafting == {
        "method": "ngram",
        "num_speculative_tokens": 5,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    assert words[7:] == expected


def test_serve_prints_other_drafts_and_one_device(capsys: pytest.CaptureFixture[str]) -> None:
    serve = ["serve", "--engine", "vllm", "--model", str(GOLDEN / "msmodelslim-mix"), "--print"]
    assert main([*serve, "--device", "npu:3", "--draft", "suffix"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[:3] == ["ASCEND_RT_VISIBLE_DEVICES=3", "vllm", "serve"]
    drafting = json.loads(words[words.index("--speculative-config") + 1])
    assert drafting == {"method": "suffix", "num_speculative_tokens": 15}
    assert main([*serve, "--device", "npu", "--draft", "none"]) == 0
    assert "--speculative-config" not in capsys.readouterr().out
    assert "vLLM drafts by ngram, suffix, none" in failure(capsys, *serve, "--device", "npu", "--draft", "self:w4a4")
    assert "npu:1 picks a device" in failure(capsys, *serve, "--device", "npu:x")


def test_serve_says_that_nobody_has_verified_openpangu_s_entry(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(read_config(GOLDEN / "msmodelslim-mix"), architecture="PanguEmbeddedForCausalLM")
    monkeypatch.setattr("quasar.cli.serve.read_config", lambda folder: config)
    argv = ["serve", "--engine", "vllm", "--model", str(GOLDEN / "msmodelslim-mix"), "--device", "npu", "--print"]
    assert main(argv) == 0
    assert "no entry for openPangu Embedded" in capsys.readouterr().err


def test_serve_becomes_the_engine(tmp_path: Path) -> None:
    """It does not stay in between: signals and exit codes are the engine's."""
    program(tmp_path / "vllm", 'echo "$@"; exit 7')
    argv = ["serve", "--engine", "vllm", "--model", str(GOLDEN / "llm-compressor"), "--device", "cuda"]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "quasar.cli", *argv]
    done = subprocess.run(command, env=environment, cwd=GOLDEN.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 7
    assert done.stdout.startswith(f"serve {GOLDEN / 'llm-compressor'} --tensor-parallel-size 1")


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_msmodelslim_as_the_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the tool, which scripts/test_interop.sh runs for real."""
    out = tmp_path / "out"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    argv = ["quantize", "--model", str(GOLDEN / "small-qwen3"), "--output", str(out), "--engine", "msmodelslim"]
    program(tmp_path / "msmodelslim", "echo 'SomeError: it broke' >&2; exit 3")
    assert "the tool failed (SomeError: it broke)" in failure(capsys, *argv, "--device", "reference")
    assert [path.name for path in tmp_path.iterdir()] == ["msmodelslim"]

    made = GOLDEN / "msmodelslim-dynamic"
    finds = 'while [ "$1" != --save_path ]; do shift; done'
    program(tmp_path / "msmodelslim", f'{finds}; cp -r "{made}" "$2"')
    assert main([*argv, "--device", "reference"]) == 0
    assert "top-1 agreement" in capsys.readouterr().err
    assert "anti_method m4" in (out / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"msmodelslim", "out"}


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small, mix = str(GOLDEN / "small-qwen3"), str(GOLDEN / "msmodelslim-mix")
    serve = ["serve", "--engine", "vllm", "--model"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "shared by 1, 2, 4 devices" in failure(capsys, *serve, small, "--tensor-parallel", "3")
    assert "shared by" in failure(capsys, *serve, small, "--tensor-parallel", "0")
    assert "NPUs only; for cuda quantise with" in failure(capsys, *serve, mix, "--device", "cuda")
    assert "no vllm on the PATH; pip install vllm" in failure(capsys, *serve, small, "--device", "cuda")
    assert "no such folder" in failure(capsys, "inspect", str(tmp_path / "nowhere"))
    quantize = ["quantize", "--model", small, "--output", str(tmp_path / "out")]
    assert "no msmodelslim on the PATH" in failure(capsys, *quantize, "--engine", "msmodelslim")
    assert "leave it out" in failure(capsys, *quantize, "--engine", "msmodelslim", "--alpha", "0.7")
    assert "exists; name a new folder" in failure(capsys, *quantize[:-1], str(tmp_path))
    dummy = ["quantize", "--dummy", "qwen3-0.6b", "--output", str(tmp_path / "out")]
    assert "not worth saving" in failure(capsys, *dummy)
    assert not (tmp_path / "out").exists()


def test_inspect_of_a_gguf_file_reads_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_gguf(tmp_path / "model.gguf", kind="Q4_K")
    with path.open("r+b") as file:  # what is written over is not looked at
        file.seek(-1000, 2)
        file.write(b"\xff" * 1000)
    assert main(["inspect", "--check", str(path)]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM: 2 layers, hidden 256" in out
    assert "GGUF (Q4_K)" in out
    assert "300 tokens, with a chat template" in out
    assert "holds scales that are not finite" in failure(capsys, "generate", "--model", str(path), "Hi")


def test_a_folder_without_a_tokenizer_takes_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((GOLDEN / "small-qwen3" / name).read_bytes())
    for precision in ("full", "w8a8"):
        flags = ["--model", str(tmp_path), "--precision", precision, "--max-new-tokens", "4", "--ignore-eos"]
        assert main(["generate", *flags, "--prompt-ids", "1,2,3"]) == 0
        assert len(capsys.readouterr().out.split()) == 4
    assert "has no tokenizer; give token ids" in failure(capsys, "generate", "--model", str(tmp_path), "Hi")
