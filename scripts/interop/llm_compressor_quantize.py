"""Quantises a checkpoint with the real llm-compressor (run in its environment), as RedHatAI's W8A8 models are made.

    python llm_compressor_quantize.py MODEL OUT [static | FILE]

FILE: JSONL of input_ids to calibrate on, for its own recipe: SmoothQuant with 0.8, then GPTQ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ["def main():\n    print('hello')\n" * 4, "The quick brown fox jumps over the lazy dog." * 3] * 8


def main() -> None:
    source, out, *rest = sys.argv[1:]
    calibration = Path(rest[0]) if rest and rest != ["static"] else None
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto" if calibration else torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = [tokenizer(text)["input_ids"][:128] for text in TEXTS]
    if rest == ["static"]:
        weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        recipe = QuantizationModifier(config_groups={"group_0": group}, ignore=["lm_head"])
    elif calibration is not None:
        ids = [json.loads(line)["input_ids"] for line in calibration.read_text().splitlines()]
        recipe = [
            SmoothQuantModifier(smoothing_strength=0.8),
            GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
        ]
    else:
        recipe = QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])
    rows = Dataset.from_list([{"input_ids": each} for each in ids])
    longest = max(map(len, ids))
    oneshot(model=model, dataset=rows, recipe=recipe, max_seq_length=longest, num_calibration_samples=len(ids))
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
