"""scripts/train_tiny.py: a run that was interrupted ends in the same weights as one that was not."""

import argparse
import shutil

import numpy as np
import pytest
import torch


@pytest.fixture
def run(train_tiny, monkeypatch, tmp_path):
    """Train something much smaller than tiny for four steps; give back its weights."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    monkeypatch.setattr(train_tiny, "SIZES", {**train_tiny.SIZES, **small})
    monkeypatch.setattr(train_tiny, "TOKENS_PER_STEP", 2048)
    monkeypatch.setattr(train_tiny.signal, "signal", lambda number, handler: None)  # pytest keeps its own
    for split in ("train", "held_out"):
        tokens = np.random.default_rng(0).integers(64, size=5000, dtype=np.uint16)
        np.save(tmp_path / f"{split}.npy", tokens, allow_pickle=False)
    arguments = {"work": tmp_path, "steps": 4, "lr": 5e-3, "length": 512, "device": "cpu", "threads": 1}
    arguments |= {
        "micro_tokens": 2048,
        "compile": False,
        "start_from": None,
        "keep": None,
        "log_every": 4,
        "save_every": 2,
    }

    def train(model: str) -> dict[str, torch.Tensor]:
        threads = torch.get_num_threads()
        train_tiny.train(argparse.Namespace(model=model, **arguments))
        torch.set_num_threads(threads)
        return torch.load(tmp_path / f"{model}.pt", weights_only=True)["model"]

    return train


def test_openpangu_takes_over_what_qwen3_computes(train_tiny):
    torch.manual_seed(0)
    qwen3, openpangu = train_tiny.build_model("tiny-qwen3"), train_tiny.build_model("tiny-openpangu")
    for name, weight in qwen3.named_parameters():
        if name.endswith("_norm.weight"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        elif ".self_attn." in name:
            torch.nn.init.normal_(weight, std=0.1)  # so that attention matters
    text = torch.randint(4096, (64,))
    openpangu.load_state_dict(train_tiny.from_qwen3(qwen3.state_dict(), text))
    with torch.no_grad():
        theirs, ours = qwen3(text[None]).logits, openpangu(text[None]).logits
    assert torch.nn.functional.cosine_similarity(theirs, ours, dim=-1).min() > 0.98


@pytest.mark.parametrize("model", ["tiny-qwen3", "tiny-openpangu"])
def test_resuming_changes_nothing(model, run, train_tiny, monkeypatch, tmp_path):
    save = train_tiny.save_checkpoint

    def save_and_keep(path, step, *rest):
        save(path, step, *rest)
        shutil.copyfile(path, tmp_path / f"kept-{step}.pt")

    monkeypatch.setattr(train_tiny, "save_checkpoint", save_and_keep)
    expected = run(model)
    shutil.copyfile(tmp_path / "kept-2.pt", tmp_path / f"{model}.pt")
    resumed = run(model)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)


def test_learning_rate_warms_up_stays_and_decays_to_zero(train_tiny):
    factors = [train_tiny.learning_rate_factor(step, 1000) for step in range(1001)]
    assert factors[0] == 1 / train_tiny.WARMUP_STEPS
    assert set(factors[train_tiny.WARMUP_STEPS : 720]) == {1.0}
    assert factors[720:] == sorted(factors[720:], reverse=True)
    assert factors[1000] == 0


def test_chunks_are_whole_lines_in_order(train_tiny):
    text = "".join(f"line {number}\n" for number in range(100))
    chunks = list(train_tiny.whole_line_chunks(text, 90))
    assert text.startswith("".join(chunks))
    assert all(90 <= len(chunk) < 100 for chunk in chunks)
