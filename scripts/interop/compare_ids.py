"""Quasar's side of the comparison with vLLM (run in Quasar's environment).

python compare_ids.py prompts MODEL PROMPTS.json        writes 200 prompts of token ids
python compare_ids.py check DIR PROMPTS.json VLLM.json  compares with what vllm_generate.py wrote; exit 1 below 95 %
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import torch

from quasar import generate, load
from quasar.models.model import ASSETS
from quasar.quantization.calibration import read_texts

PROMPTS, LENGTH, NEW_TOKENS, LEAST = 200, 24, 32, 0.95


def write_prompts(model: str, path: str) -> None:
    """Pieces of held-out text, LENGTH tokens each."""
    loaded = load(model)
    ids = [i for text in read_texts(ASSETS / "heldout.jsonl") for i in loaded.encode(text)]
    step = (len(ids) - LENGTH) // PROMPTS
    Path(path).write_text(json.dumps([ids[i * step : i * step + LENGTH] for i in range(PROMPTS)]))


def check(folder: str, prompts: str, theirs: str) -> None:
    torch.set_num_threads(1)  # the models are too small to share
    model = load(folder, device="cpu", dtype="float32")
    same, tokens, differences = 0, 0, []
    rows = json.loads(Path(theirs).read_text())
    for ids, row in zip(json.loads(Path(prompts).read_text()), rows, strict=True):
        own = generate(model, ids, max_new_tokens=NEW_TOKENS, ignore_eos=True).result().token_ids
        same += own == row["ids"]
        tokens += sum(a == b for a, b in zip(own, row["ids"], strict=True))
        decoder = model.decoder
        log_probs = decoder.read(ids, logits_to_keep=1).log_softmax(dim=-1)[0]
        differences.append(abs(float(log_probs[row["ids"][0]]) - row["logprob"]))
    share = same / len(rows)
    print(
        f"{folder}: {same} of {len(rows)} prompts give the same {NEW_TOKENS} ids in vLLM and Quasar ({share:.1%}), "
        f"{tokens / (len(rows) * NEW_TOKENS):.1%} of tokens; first-token logprob differs by "
        f"{statistics.mean(differences):.1e} on average, {max(differences):.1e} at most"
    )
    if share < LEAST:
        sys.exit(f"below {LEAST:.0%}")


if __name__ == "__main__":
    {"prompts": write_prompts, "check": check}[sys.argv[1]](*sys.argv[2:])
