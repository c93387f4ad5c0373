"""scripts/run_ascend.sh as people run it, in a process of its own: on the emulated NPU, and on a bare machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulated_npu import branch_as
from fused_rounding import FusedRounding

from quasar import generate
from quasar.checkpoints import open_checkpoint
from quasar.models.config import read_config
from quasar.models.loader import build_decoder
from quasar.models.model import Model, load_tokenizer
from quasar_npu import check, verify
from quasar_npu.backend import NpuBackend

ROOT = Path(__file__).parents[2]
PROMPT = "class Stack:\n    def push"


def run(*arguments, **environment):
    return subprocess.run(
        ["bash", "scripts/run_ascend.sh", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def emulated(cache):
    """The first run: it quantises, then generates."""
    options = {"QUASAR_ASCEND_EMULATED": "1", "QUASAR_VENV_ASCEND": sys.prefix, "XDG_CACHE_HOME": str(cache)}
    return run("--json", "--max-new-tokens", "24", "--ignore-eos", PROMPT, **options)


def test_it_runs_to_the_end_with_the_ids_of_the_cpu(emulated, cache):
    assert emulated.returncode == 0, emulated.stderr
    said = json.loads(emulated.stdout.splitlines()[-1])
    assert said["settings"]["device"] == "npu:0"
    assert said["settings"]["precision"] == "w8a8"
    assert len(said["token_ids"]) == 24
    assert said["text"].strip()
    folder = cache / "quasar" / "tiny-openpangu-w8a8"
    model = on_cpu(folder)
    ids = generate(model, PROMPT, max_new_tokens=24, draft="none", ignore_eos=True).result().token_ids
    assert said["token_ids"] == ids


def on_cpu(folder):
    """The quantised folder on the CPU, with the NPU's rounding."""
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    decoder = build_decoder(config, open_checkpoint(folder), FusedRounding("cpu", torch.bfloat16))
    return Model(str(folder), decoder, tokenizer, frozenset(), "w8a8")


def test_it_says_what_it_found_and_quantises_once(emulated, cache):
    assert "ok      NPU 0: Ascend910B2 (A2 or A3: dynamic W8A8, bfloat16)" in emulated.stderr
    assert f"quantising tiny-openpangu into {cache}/quasar/tiny-openpangu-w8a8 (once)" in emulated.stderr
    assert (cache / "quasar" / "tiny-openpangu-w8a8" / "quant_model_description.json").exists()


def test_check_only_reports():
    done = run("--check", QUASAR_ASCEND_EMULATED="1", QUASAR_VENV_ASCEND=sys.prefix)
    assert done.returncode == 0
    assert done.stdout == ""
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["ok"] * 5
    assert "ok      NPU 0 adds" in done.stderr


def test_verify_runs_to_its_end(cache, tmp_path):
    """Each operator, captured passes, ids and speed, in one file to paste."""
    options = {"QUASAR_ASCEND_EMULATED": "1", "QUASAR_VENV_ASCEND": sys.prefix, "XDG_CACHE_HOME": str(cache)}
    report = tmp_path / "report.txt"
    done = run("--verify", "--report", str(report), **options)
    assert done.returncode == 0, done.stdout + done.stderr
    text = report.read_text()
    assert text in done.stdout
    assert "FAILED" not in text
    for line in (
        "EMULATED: no figure here says anything about an NPU",
        "attention of three sequences, heads of 128",
        "tiny-openpangu w8a8, 3 sequences: replayed graphs say what plain passes say, bit for bit",
        "tiny-qwen3 w8a8: 16 of 16 ids equal with n-gram drafts",
        "Quasar: ",
        "all is right",
    ):
        assert line in text, line


def test_verify_says_what_fails_and_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("QUASAR_ASCEND_EMULATED", "1")
    for name in ("captured_passes", "ids", "fused_operators", "speed", "attention"):
        monkeypatch.setattr(verify, name, lambda *_: iter([(True, "looked at")]))
    monkeypatch.setattr(verify, "TINY", ())
    monkeypatch.setattr(NpuBackend, "swiglu", lambda self, gate_up, quant: gate_up[:, :512].clone())
    assert verify.run(["--report", str(tmp_path / "report.txt")]) == 1
    out = capsys.readouterr().out
    assert "FAILED  swiglu: largest error" in out
    assert "looked at" in out
    assert "2 FAILED" in out or "1 FAILED" in out
    assert verify.run(["--report", str(tmp_path / "absent" / "report.txt")]) == 2


def test_a_bare_machine_gets_a_line_for_each_missing_piece(tmp_path):
    done = run("--check", PYTHON=sys.executable, HOME=str(tmp_path), ASCEND_TOOLKIT_HOME="")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "MISSING CANN",
        "WARN    NPU driver",
        "WARN    npu-smi",
        "MISSING torch-npu does not load (libhccl.so",
        "No /dev/davinci_manager here",
    ]
    assert all("install" in line or "driver" in line or "docker" in line for line in lines)


def test_flags_that_lack_a_value_are_one_line():
    done = run("--model")
    assert (done.returncode, done.stderr) == (2, "run_ascend.sh: --model needs a folder or a name\n")


def test_cann_s_version_is_read_and_judged(monkeypatch, tmp_path):
    monkeypatch.delenv("QUASAR_ASCEND_EMULATED", raising=False)
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(tmp_path))
    assert check._cann() == (
        "WARN",
        "CANN: no version file under ASCEND_TOOLKIT_HOME; torch-npu loads, so it is there in some form",
    )
    (tmp_path / "aarch64-linux").mkdir()
    file = tmp_path / "aarch64-linux" / "ascend_toolkit_install.info"
    file.write_text("package_name=Ascend-cann-toolkit\nversion=8.1.RC1\ninnerversion=V100R001\n")
    assert check._cann() == ("ok", "CANN 8.1.RC1")
    file.write_text("version=9.1.0\n")
    assert check._cann() == ("ok", "CANN 9.1.0")
    file.write_text("version=7.0.0\n")
    assert check._cann() == ("MISSING", "CANN 7.0.0: install 8.1 or later; 9.1 is best tested")


@pytest.mark.parametrize(
    ("ours", "torchs", "level"),
    [
        ("2.7.1.dev20250724", "2.7.1+cpu", "ok"),
        ("2.10.0.post4", "2.10.0", "ok"),
        ("2.8.0+gitabc", "2.8.0", "ok"),
        ("2.9.0", "2.10.0", "MISSING"),
        ("2.1.0.post10", "2.1.0", "MISSING"),
    ],
)
def test_releases_are_compared_and_not_their_builds(monkeypatch, ours, torchs, level):
    monkeypatch.setattr("importlib.metadata.version", lambda name: ours)
    monkeypatch.setattr(torch, "__version__", torchs)
    assert [found for found, _ in check._versions()] == [level]


def test_without_the_fused_norm_there_is_a_warning(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: torch.__version__)
    with branch_as("7.0.0"):
        (_, _), (level, line) = check._versions()
    assert level == "WARN"
    assert "two operators instead of one" in line


def test_a_card_that_cannot_be_opened_does_not_end_the_check(monkeypatch):
    monkeypatch.setenv("QUASAR_ASCEND_EMULATED", "1")
    monkeypatch.setattr(torch.npu, "device_count", lambda: 2)

    def memory(index):
        if index == 1:
            raise RuntimeError("another process holds it\nand more")
        return 60_000_000_000, 64_000_000_000

    monkeypatch.setattr(torch.npu, "mem_get_info", memory)
    found = {line.partition(":")[0]: level for level, line in check.findings(None)}
    assert found["NPU 1 cannot be opened (another process holds it); the others can be used"] == "WARN"
    assert found["NPU 0"] == "ok"


def test_a_device_that_cannot_add_lacks_cann_s_kernels(monkeypatch):
    monkeypatch.setenv("QUASAR_ASCEND_EMULATED", "1")

    def refuse(*args, **kwargs):
        raise RuntimeError("aclnnAdds: binary not found\nand more")

    monkeypatch.setattr(torch, "ones", refuse)
    assert check._kernels(0) == (
        "MISSING",
        "NPU 0 cannot add (aclnnAdds: binary not found): install CANN's kernels (ops) package",
    )


def test_versions_and_memory_that_do_not_fit_are_findings(monkeypatch):
    monkeypatch.setenv("QUASAR_ASCEND_EMULATED", "1")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.5.1.post1")
    monkeypatch.setattr(torch.npu, "mem_get_info", lambda index=0: (1_000_000, 64_000_000_000))
    lines = [line for level, line in check.findings("tiny-openpangu") if level == "MISSING"]
    ours = torch.__version__.partition("+")[0]
    assert lines[0] == f"torch {ours}, torch-npu 2.5.1.post1: pip install torch-npu=={ours}"
    assert lines[1].endswith("NPU 0 has 0.0 GB free: stop other processes on it")
    assert len(lines) == 2
