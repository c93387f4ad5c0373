"""Writes a small random Qwen3 checkpoint with a byte tokenizer, from which the golden folders in tests/ are made.

    python small_model.py OUT [--dtype float16]

Runs wherever transformers does (msModelSlim wants 4.51), so it imports nothing of Quasar.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=257,
            hidden_size=64,
            num_hidden_layers=2,
            intermediate_size=128,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=4096,
            tie_word_embeddings=False,  # msModelSlim wants it so
            initializer_range=0.08,
        )
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:  # a norm of ones would hide what smoothing does to it
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    model = model.to(getattr(torch, args.dtype))
    model.generation_config.eos_token_id = 256
    model.save_pretrained(args.out)

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    fast.save_pretrained(args.out)

    path = args.out / "config.json"
    fields = json.loads(path.read_text())
    fields["torch_dtype"] = args.dtype  # msModelSlim reads this name only
    fields.pop("dtype", None)
    fields.update(bos_token_id=None, eos_token_id=256, sliding_window=None)
    path.write_text(json.dumps(fields, indent=2))
    path = args.out / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(fields, indent=2))
    for file in args.out.iterdir():
        file.chmod(0o644)  # msModelSlim refuses what others may write


if __name__ == "__main__":
    main()
