"""Quantises a checkpoint with the real llm-compressor (run in its environment), as RedHatAI's W8A8 models are made.

python llm_compressor_quantize.py MODEL OUT [static]
"""

from __future__ import annotations

import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ["def main():\n    print('hello')\n" * 4, "The quick brown fox jumps over the lazy dog." * 3] * 8


def main() -> None:
    source, out, *rest = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if rest == ["static"]:
        weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        recipe = QuantizationModifier(config_groups={"group_0": group}, ignore=["lm_head"])
    else:
        recipe = QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])
    rows = Dataset.from_list([{"input_ids": tokenizer(t)["input_ids"][:128]} for t in TEXTS])
    oneshot(model=model, dataset=rows, recipe=recipe, max_seq_length=128, num_calibration_samples=len(TEXTS))
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
