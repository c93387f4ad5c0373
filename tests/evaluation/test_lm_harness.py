"""The harness's model class, on a local task; needs lm_eval, which the test extra leaves out for its size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quasar import generate

pytest.importorskip("lm_eval", reason="pip install lm_eval to test the harness")

TASK = Path(__file__).parent / "harness_task" / "continue_python.yaml"
PROMPTS = ["import os\nimport ", "class A:\n    def ", "for i in "]


@pytest.fixture(scope="module")
def lm():
    from quasar.evaluation.lm_harness import QuasarLM

    return QuasarLM("tiny-qwen3", precision="w8a8", device="cpu")


class Request:
    def __init__(self, *args):
        self.args = args


def test_scores_are_those_of_the_decoder(lm, shipped):
    model = shipped("qwen3", "w8a8")
    context, continuation = "import os", "\nimport sys\n"  # the harness moves spaces from one to the other
    (score, greedy), (other, _) = lm.loglikelihood([Request(context, continuation), Request(context, "zebra")])
    whole, first = model.encode(context + continuation), model.encode(context)
    logits = model.decoder.read(whole[:-1], logits_to_keep=len(whole) - len(first))
    expected = logits.log_softmax(-1).gather(1, logits.new_tensor(whole[len(first) :]).long()[:, None]).sum().item()
    assert score == pytest.approx(expected, abs=1e-4) and other < score
    assert greedy == (logits.argmax(-1).tolist() == whole[len(first) :])


def test_rolling_scores_add_up_over_windows(lm, monkeypatch):
    text = "def f(x):\n    return x\n" * 4
    (whole,) = lm.loglikelihood_rolling([Request(text)])
    eot, ids = lm.eot_token_id, lm.tok_encode(text, add_special_tokens=False)
    assert whole == pytest.approx(lm._score([eot], ids)[0], abs=1e-4)
    assert whole < 0


def test_generated_text_is_generates(lm, shipped):
    model = shipped("qwen3", "w8a8")
    (text,) = lm.generate_until([Request("def main():", {"until": ["\n\n"], "max_gen_toks": 20})])
    assert text == generate(model, "def main():", max_new_tokens=20, stop=("\n\n",)).result().text


def test_their_command_on_a_local_task(tmp_path, shipped):
    model = shipped("qwen3", "full")
    rows = []
    for i, prompt in enumerate(PROMPTS):
        said = generate(model, prompt, max_new_tokens=12, stop=("\n",)).result().text
        rows.append({"prompt": prompt, "answer": said if i else said + "?"})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / TASK.name).write_text(TASK.read_text().replace("DATA", str(data)))
    arguments = "model=tiny-qwen3,precision=w8a8,lossless=True"
    command = [
        sys.executable,
        "-m",
        "quasar.evaluation.lm_harness",
        "run",
        "--model",
        "quasar",
        "--model_args",
        arguments,
    ]
    command += [
        "--device",
        "cpu",
        "--tasks",
        "continue_python",
        "--include_path",
        str(tmp_path),
        "--output_path",
        str(tmp_path / "out"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())
    # Lossless: full precision's answers, of which one was spoiled.
    assert results["results"]["continue_python"]["exact_match,none"] == pytest.approx(2 / 3)
