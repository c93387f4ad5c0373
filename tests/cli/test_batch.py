"""`quasar batch`: answers in order, errors in place, and a run that goes on where it stopped."""

from __future__ import annotations

import json

import pytest

from quasar.cli import main

pytest.importorskip("starlette", reason="the extra [serve] is not installed")

CHAT = {"messages": [{"role": "user", "content": "def f("}], "max_tokens": 6, "temperature": 0}
TEXT = {"prompt": "import os\n", "max_tokens": 5, "seed": 3, "temperature": 0.8}


def line(custom_id: str, url: str = "/v1/completions", **body: object) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": {**TEXT, **body}})


@pytest.fixture
def run(tmp_path):
    def run(*lines: str) -> tuple[int, list[dict]]:
        (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
        output = tmp_path / "out.jsonl"
        code = main(["batch", str(tmp_path / "in.jsonl"), "--output", str(output), "--precision", "full"])
        return code, [json.loads(each) for each in output.read_text().splitlines()] if output.exists() else []

    return run


def text(answer: dict) -> str:
    return answer["response"]["body"]["choices"][0]["text"]


def test_answers_come_in_order_and_errors_in_their_place(run):
    code, answers = run(
        line("a"), "no JSON", line("b", seed=4), line("c", url="/v1/images"), line("d", max_tokens=-1), line("e")
    )
    assert code == 0
    assert [answer["custom_id"] for answer in answers] == ["a", "line-2", "b", "c", "d", "e"]
    assert [answer["error"] is None for answer in answers] == [True, False, True, False, False, True]
    assert text(answers[0]) == text(answers[5])  # the same request
    assert "url is '/v1/images'" in answers[3]["error"]["message"]
    assert answers[4]["response"]["status_code"] == 400 and "max_tokens" in answers[4]["error"]["message"]


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(run, tmp_path):
    lines = [line(str(i), seed=i) for i in range(5)]
    _, whole = run(*lines)
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    first = output.read_bytes().splitlines(keepends=True)
    output.unlink()
    partial.write_bytes(b"".join(first[:2]) + first[2][:30])  # killed in the middle of a line
    _, again = run(*lines)
    assert [text(answer) for answer in again] == [text(answer) for answer in whole]
    assert output.read_bytes().splitlines(keepends=True)[:2] == first[:2]
    assert not partial.exists()


def test_bad_files_and_outputs(run, tmp_path, capsys):
    assert main(["batch", str(tmp_path / "none"), "--output", str(tmp_path / "o")]) == 2
    assert "none: no such file" in capsys.readouterr().err
    (tmp_path / "out.jsonl.partial").write_text('{"custom_id": "other"}\n')
    assert run(line("a"))[0] == 2
    assert "holds answers to other requests" in capsys.readouterr().err
    (tmp_path / "out.jsonl.partial").unlink()
    (tmp_path / "out.jsonl").write_text("")
    assert run(line("a"))[0] == 2
    assert "is there already" in capsys.readouterr().err
