"""Greedy ids of a checkpoint by vLLM itself (run in vLLM's environment).

    python vllm_generate.py DIR PROMPTS.json OUT.json

PROMPTS.json is a list of lists of token ids. OUT.json gets, for each, the generated ids and the first one's logprob.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0-1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

NEW_TOKENS = 32


def main() -> None:
    from vllm import LLM, SamplingParams

    folder, prompts, out = sys.argv[1:4]
    # float32, as the CPU backend of Quasar computes: the comparison is of checkpoints, not of rounding.
    engine = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=1024, trust_remote_code=False)
    settings = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=1, detokenize=False)
    inputs = [{"prompt_token_ids": ids} for ids in json.loads(Path(prompts).read_text())]
    results = []
    for output in engine.generate(inputs, settings):
        completion = output.outputs[0]
        ids = list(completion.token_ids)
        results.append({"ids": ids, "logprob": completion.logprobs[0][ids[0]].logprob})
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
