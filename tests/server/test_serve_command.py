"""`quasar serve` as it is typed."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from quasar.cli import main
from quasar.cli.serve import check_exposure, sampling_defaults
from quasar.errors import QuasarError

ROOT = Path(__file__).parents[2]


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["serve", *argv]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    return told


def test_wrong_flags_get_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--api-key KEY, or --no-api-key" in failure(capsys, "--host", "0.0.0.0")
    assert "QUASAR_API_KEY is not set" in failure(capsys, "--api-key", "env")
    assert "the key is empty" in failure(capsys, "--api-key", "")
    assert "must be 1 or more" in failure(capsys, "--max-sequences", "0")
    assert "ports lie between" in failure(capsys, "--port", "99999")
    assert "no such address" in failure(capsys, "--host", "no.such.host.invalid", "--api-key", "x")
    assert "goes with --engine vllm" in failure(capsys, "--print")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "name another port" in failure(capsys, "--port", port)
        import quasar.server

        monkeypatch.delattr(quasar.server, "run", raising=False)
        monkeypatch.setitem(sys.modules, "quasar.server.run", None)
        assert "quasar-inference[serve]" in failure(capsys, "--port", port)


def test_only_loopback_goes_without_a_key() -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        check_exposure(host, None, False)
    check_exposure("0.0.0.0", "key", False)
    check_exposure("0.0.0.0", None, True)
    with pytest.raises(QuasarError):
        check_exposure("192.168.0.2", None, False)


def test_sampling_comes_from_the_checkpoint(tmp_path: Path) -> None:
    import argparse

    args = argparse.Namespace(model=str(tmp_path), dummy=None, trust_remote_code=False)
    assert sampling_defaults(args) == {}
    config = {"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert sampling_defaults(args) == {"temperature": 0.6, "top_k": 20}


def test_it_serves_and_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "quasar.cli", "serve", "--port", "0", "--precision", "full", "--device", "cpu"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        where = re.search(r"http://127.0.0.1:\d+", line)
        assert where, line + process.stderr.read()
        body = json.dumps({"prompt": "def main():", "max_tokens": 5}).encode()
        request = urllib.request.Request(where[0] + "/v1/completions", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 5
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
