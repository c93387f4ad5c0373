"""`quasar eval`: the figures mean what they say, and mistakes get one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from quasar import GenerationSettings, QuasarError, generate
from quasar.checkpoints.weights import FullWeights
from quasar.cli import main
from quasar.evaluation.fidelity import acceptance_length, verifiers
from quasar.evaluation.tasks import SCHEMES, encode_turns, read_questions, run_tasks
from quasar.models.build import assemble
from quasar.models.pruning import layer_influence, layers_to_keep
from quasar.models.sharing import share
from tests.helpers.random_models import random_model, shared_random_model

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["def main():", "And again:"]},
    {"question_id": 82, "category": "math", "turns": ["import os"], "reference": ["1"]},
    {"question_id": 83, "category": "math", "turns": ["class A:"]},
]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    return path


def test_fidelity_table_has_every_verifier(capsys, tmp_path):
    out = tmp_path / "figures.json"
    heldout = tmp_path / "text.jsonl"
    heldout.write_text(json.dumps({"text": "def f(x):\n    return x\n" * 20}) + "\n")
    argv = ["eval", "fidelity", "--limit", "1", "--prompt-tokens", "24", "--max-new-tokens", "8", "--json", str(out)]
    assert main([*argv, "--heldout", str(heldout), "--drafts", "ngram,self:w4a4,self:skip=2"]) == 0
    rows = json.loads(out.read_text())["verifiers"]
    by_name = {row["verifier"].split(" (")[0]: row for row in rows}
    assert list(by_name) == [
        *("full", "w8a8", "w8a8, int8 inputs throughout", "w8a8 as published", "w8a8 without SmoothQuant"),
        *("w4a16 with zero points", "w4a16", "w4a4"),
        *("pruned 10%", "pruned 25%", "pruned 50%"),
    ]
    figures = {name: row["fidelity"] for name, row in by_name.items()}
    assert figures["full"]["mean_kl"] == figures["full"]["p99_kl"] == 0 and figures["full"]["top1_agreement"] == 1
    assert 0 < figures["w8a8"]["mean_kl"] < figures["w4a16"]["mean_kl"] < figures["w4a4"]["mean_kl"]
    assert figures["pruned 10%"]["mean_kl"] < figures["pruned 50%"]["mean_kl"]
    assert all(f["p99_kl"] > f["mean_kl"] for name, f in figures.items() if name != "full")
    weights = {name: row["weight_bytes_per_pass"] for name, row in by_name.items()}
    assert weights["full"] > weights["w8a8"] > weights["w4a16"] == weights["w4a4"]
    own = [name for name, row in by_name.items() if "self:w4a4" in row["acceptance"]]
    assert own == ["w4a16 with zero points", "w4a16"]
    assert all(1 <= length <= 6 for row in rows for length in row["acceptance"].values())
    printed = capsys.readouterr().out
    assert printed.count("\n|") == 13 and "tiny-qwen3" in printed


def test_verifiers_leave_the_model_as_it_was():
    model = random_model("qwen3")
    before = model.decoder.linears()
    made = dict(verifiers(model, [list(range(40))]))
    for verifier in made.values():
        generate(verifier, [1, 2, 3], max_new_tokens=2).result()
    assert all(linear is b for linear, b in zip(model.decoder.linears(), before, strict=True))
    assert [len(v.decoder.layers) for v in made.values()] == [4] * 8 + [3, 3, 2]


def test_acceptance_length_is_tokens_per_pass():
    model = shared_random_model("qwen3", "w8a8")
    settings = GenerationSettings(max_new_tokens=20, draft="ngram", gamma=5)
    stats = [generate(model, ids, settings).result().stats for ids in ([1, 2, 1, 2], [7])]
    expected = sum(s.tokens - 1 for s in stats) / sum(s.passes for s in stats)
    assert acceptance_length(model, [[1, 2, 1, 2], [7]], settings) == expected
    assert acceptance_length(model, [[7]], GenerationSettings(draft="self:w4a4", gamma=3)) is None


def test_a_layer_that_does_nothing_goes_first():
    model = random_model("openpangu")
    idle = model.weights.layers[2]
    nothing = {name: FullWeights(getattr(idle, name).weight * 0, None) for name in ("o", "down")}
    model.weights.layers[2] = replace(idle, **nothing)
    decoder = assemble(model.config, model.weights, model.decoder.backend)
    influence = layer_influence(decoder, [list(range(30)), list(range(50, 60))])
    assert influence[2] == pytest.approx(0, abs=1e-6) and min(influence[:2]) > 1e-3
    assert layers_to_keep(decoder, 1, [list(range(30))]) == [0, 1, 3]
    pruned = share(decoder, keep=[0, 2, 3])
    assert layers_to_keep(pruned, 1, [list(range(30))]) == [0, 3]  # of what is left, by the layers' own numbers


def test_tasks_by_every_scheme(capsys, tmp_path, questions):
    out, answers = tmp_path / "figures.json", tmp_path / "answers"
    argv = ["eval", "tasks", "--tasks", str(questions), "--max-new-tokens", "12", "--limit", "1"]
    assert main([*argv, "--json", str(out), "--answers", str(answers)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["category"] for row in rows] == [c for c in ("writing", "math", "all") for _ in SCHEMES]
    for row in rows:
        if row["scheme"] in ("plain-full", "ngram-full", "lossless"):
            assert row["agreement"] == 1
        if row["scheme"].startswith("plain"):
            assert row["acceptance_length"] == 1
        assert row["tokens_per_second"] > 0
    assert sorted(path.stem for path in answers.iterdir()) == sorted(scheme.name for scheme in SCHEMES)
    lines = [json.loads(line) for line in (answers / "quasar.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [81, 82]
    choice = lines[0]["choices"][0]
    assert len(choice["turns"]) == len(choice["wall_time"]) == len(choice["decoding_steps"]) == 2
    assert sum(choice["accept_lengths"]) + 2 == sum(choice["new_tokens"])  # a turn's first token is the prompt's
    assert sum(choice["decoding_steps"]) == len(choice["accept_lengths"])
    assert "| all | quasar |" in capsys.readouterr().out


def test_a_later_turn_sees_the_earlier_answer(shipped, questions):
    model = shipped("qwen3", "w8a8")
    run = run_tasks(
        {"w8a8": model},
        [scheme for scheme in SCHEMES if scheme.name == "quasar"],
        read_questions(questions)[:1],
        GenerationSettings(max_new_tokens=9),
    )
    first, second = run.answers["quasar"][0]["choices"][0]["turns"]
    ids = encode_turns(model, QUESTIONS[0]["turns"], [first], 9)
    assert generate(model, ids, max_new_tokens=9).result().text == second
    assert len(encode_turns(model, ["x " * 9000], [], 100)) == model.config.max_position_embeddings - 100


@pytest.mark.parametrize(
    "line", ["[]", "{", '{"question_id": 1, "category": "a"}', '{"category": "a", "turns": ["x"]}']
)
def test_what_is_no_question(tmp_path, line):
    path = tmp_path / "q.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(QuasarError, match=r"q\.jsonl:1: should be an object with question_id and turns"):
        read_questions(tmp_path)


def test_a_question_without_a_category_has_its_files(tmp_path):
    (tmp_path / "alpaca.jsonl").write_text('{"question_id": 1, "category": "", "turns": ["a"]}\n' * 3)
    (tmp_path / "writing.jsonl").write_text(
        '{"question_id": 1, "turns": ["a"]}\n{"question_id": 2, "category": "maths", "turns": ["b"]}\n'
    )
    asked = read_questions(tmp_path, per_category=2)
    assert [question.category for question in asked] == ["alpaca", "alpaca", "writing", "maths"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["tasks", "--tasks", "/no/where"], "/no/where: no such file"),
        (["tasks", "--tasks", ".", "--schemes", "magic"], "--schemes magic is unknown; use some of plain-full"),
        (["fidelity", "--drafts", "ngram,magic"], "--draft magic is unknown"),
        (["fidelity", "--prompts", "/no/file"], "/no/file: no such file"),
    ],
)
def test_mistakes_get_one_line(capsys, argv, words):
    assert main(["eval", *argv]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said


def test_with_warm_a_question_that_comes_again_takes_fewer_passes(capsys, tmp_path, questions):
    twice = tmp_path / "twice.jsonl"
    twice.write_text(questions.read_text().splitlines()[0] + "\n" + questions.read_text().splitlines()[0] + "\n")
    argv = ["eval", "tasks", "--tasks", str(twice), "--max-new-tokens", "24", "--schemes", "quasar", "--gamma", "5"]
    lengths = []
    for options in ([], ["--warm"]):
        assert main([*argv, *options, "--json", str(tmp_path / "out.json")]) == 0
        lengths.append(json.loads((tmp_path / "out.json").read_text())["rows"][-1]["acceptance_length"])
    assert lengths[1] > lengths[0]
