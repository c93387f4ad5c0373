"""Greedy ids of a checkpoint by vLLM itself (run in vLLM's environment).

    python vllm_generate.py DIR PROMPTS.json OUT.json

PROMPTS.json is a list of lists of token ids. OUT.json gets `rows`, for each the generated ids and the first one's
logprob; `dtype` of activations; and `exact`: whether vLLM's int8 products are, which those of oneDNN are not on
processors without VNNI.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0-1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, which knows what this one registers
os.environ.setdefault("HF_HUB_OFFLINE", "1")

NEW_TOKENS = 32


def main() -> None:
    import torch

    # Where there is AMX, vLLM takes a kernel that refuses float32 activations.
    torch.cpu._is_amx_tile_supported = lambda: False
    from vllm import LLM, SamplingParams

    folder, prompts, out = sys.argv[1:4]
    config = json.loads((Path(folder) / "config.json").read_text())
    if config["model_type"] == "PanguEmbedded":
        _know_pangu_config()
    # float32, as the CPU backend of Quasar computes: the comparison is of checkpoints, not of rounding. vLLM's int4
    # kernel on CPU has no float32.
    dtype = "bfloat16" if config["quantization_config"]["format"] == "pack-quantized" else "float32"
    engine = LLM(folder, dtype=dtype, enforce_eager=True, max_model_len=1024, trust_remote_code=False)
    settings = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=1, detokenize=False)
    inputs = [{"prompt_token_ids": ids} for ids in json.loads(Path(prompts).read_text())]
    results = []
    for output in engine.generate(inputs, settings):
        completion = output.outputs[0]
        ids = list(completion.token_ids)
        results.append({"ids": ids, "logprob": completion.logprobs[0][ids[0]].logprob})
    Path(out).write_text(json.dumps({"dtype": dtype, "exact": dtype != "float32" or _exact(), "rows": results}))


def _exact() -> bool:
    """Of numbers so large that two products do not fit 16 bits."""
    import torch
    from vllm import _custom_ops as ops

    x, one = torch.full((64, 256), 127, dtype=torch.int8), torch.ones(64, 1)
    handler = ops.create_onednn_scaled_mm(x.t(), one, torch.float32, True, False, 32)
    y = ops.onednn_scaled_mm(handler, x, torch.empty(64, 64), one, None, None, None)
    return bool((y == 256 * 127**2).all())


def _know_pangu_config() -> None:
    """vLLM has the model class and no config class: published openPangu checkpoints bring theirs as Python code, which
    the shipped tiny model does not. This is what theirs says that a Llama config does not."""
    from transformers import AutoConfig, LlamaConfig

    class PanguEmbeddedConfig(LlamaConfig):
        model_type = "PanguEmbedded"
        bias: bool = True

    AutoConfig.register("PanguEmbedded", PanguEmbeddedConfig)


if __name__ == "__main__":
    main()
