"""The two models in the package: they load with transformers, and they are what their cards say."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "common" / "assets"
MODELS = ["tiny-qwen3", "tiny-openpangu"]
MAX_MEGABYTES = 16

SNIPPETS = [
    "def f(self_name, x_1):\n    if x:\n\treturn 'a'  # two spaces\n\n\n        class A: pass\n",
    "    starts inside a block\r\n  and ends without a line break",
    "naïve 中文 🙂 \u00a0 _ __init__ 0x1F 3.14e-10 \\n \x00 \t\t  ",
    "",
]


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (ASSETS / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", MODELS)
def test_tokenizer_is_lossless(name):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / name)
    assert len(tokenizer) == 4096
    for text in [*SNIPPETS, *(row["text"] for row in rows("heldout.jsonl"))]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert tokenizer(text).input_ids == ids, "nothing is added to the text"
    assert tokenizer.tokenize("x:\n            y")[-2:] == ["ĊĠĠĠĠĠĠĠĠĠĠĠĠ", "y"], "indentation is one token"


@pytest.mark.parametrize("name", MODELS)
def test_chat_template(name):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / name)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode(text)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_small_finite_bf16(name):
    path = ASSETS / name / "model.safetensors"
    assert path.stat().st_size < MAX_MEGABYTES * 1024**2
    with safe_open(path, "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    assert all(weight.dtype == torch.bfloat16 for weight in weights.values())
    assert all(weight.isfinite().all() for weight in weights.values())
    biases = [key for key in weights if key.endswith(".bias")]
    assert len(biases) == (4 * 6 if name == "tiny-openpangu" else 0)
    assert all(weights[key].abs().max() > 1e-3 for key in biases), "biases that a loader must not forget"


def test_config_of_openpangu_has_its_layout():
    config = json.loads((ASSETS / "tiny-openpangu" / "config.json").read_text())
    assert config["architectures"] == ["PanguEmbeddedForCausalLM"]
    assert config["model_type"] == "PanguEmbedded"
    assert config["bias"] is True and config["tie_word_embeddings"] is False


def loss(model, tokenizer, text: str) -> float:
    ids = torch.tensor([[0, *tokenizer.encode(text)]])
    with torch.no_grad():
        return model(ids, labels=ids).loss.item()


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_a_trained_model(name, train_tiny):
    if name == "tiny-qwen3":
        model = AutoModelForCausalLM.from_pretrained(ASSETS / name)
        assert model.dtype == torch.bfloat16
    else:
        model = train_tiny.load_exported(ASSETS / name)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / name)
    ordinary = loss(model, tokenizer, rows("heldout.jsonl")[0]["text"])
    assert ordinary < 4, "an untrained model has ln 4096 = 8.3"


def test_held_out_text_is_not_trained_on(train_tiny):
    names = {row["id"].rsplit("#", 1)[0] for row in rows("heldout.jsonl")}
    assert len(names) > 10
    assert not train_tiny.training_files(dict.fromkeys(names, ""))
    assert train_tiny.training_files({"os.py": "", "heapq.py": ""}) == ["os.py"]


def test_texts_have_the_promised_size():
    held_out = [row["text"] for row in rows("heldout.jsonl")]
    assert 60_000 < sum(len(text.encode()) for text in held_out) < 100_000
    assert len({row["id"] for row in rows("heldout.jsonl")}) == len(held_out)
    assert len(rows("calibration.jsonl")) == 32
    assert all(row["prompt"] for row in rows("calibration.jsonl"))
