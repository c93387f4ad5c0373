"""What keys and values in fewer bits do to a model's text and to its probabilities.

    python scripts/experiments/compare_kv.py --model smollm2

Each question is answered greedily with keys and values in float32, and again in each smaller format. Where two answers
part, the float32 logits say how near a tie was. It compares the distributions at every token of the float32 answers.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from quasar import load
from quasar.backends.cpu.kernels import KV_FORMATS
from quasar.generation import GenerationSettings, generate
from quasar.models.model import ASSETS, Model
from quasar.quantization.calibration import read_texts


def answer_logits(model: Model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities [answer, vocab] that the model gives at each token of an answer."""
    return model.decoder.read(prompt + answer[:-1], len(answer)).log_softmax(dim=-1)


def first_difference(a: list[int], b: list[int]) -> int | None:
    """The index at which two answers part, None where they do not."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--precision", default="full", help="full or w8a8")
    parser.add_argument(
        "--prompts", type=Path, default=ASSETS / "questions.jsonl", help="JSONL with text, prompt or turns"
    )
    parser.add_argument("--limit", type=int, default=60, help="take the first so many")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()
    model = load(args.model, device="cpu", precision=args.precision)
    backend = model.decoder.backend
    settings = GenerationSettings(max_new_tokens=args.max_new_tokens, draft="none")
    prompts = [model.encode(text, chat=True) for text in read_texts(args.prompts)[: args.limit]]
    answers: dict[str, list[list[int]]] = {}
    for backend.kv in KV_FORMATS:
        answers[backend.kv] = [generate(model, ids, settings).result().token_ids for ids in prompts]
    divergences: dict[str, list[torch.Tensor]] = {kv: [] for kv in KV_FORMATS[1:]}
    gaps: dict[str, list[float]] = {kv: [] for kv in KV_FORMATS[1:]}
    agree: dict[str, list[torch.Tensor]] = {kv: [] for kv in KV_FORMATS[1:]}
    for i, (prompt, answer) in enumerate(zip(prompts, answers["float32"], strict=True)):
        backend.kv = "float32"
        exact = answer_logits(model, prompt, answer)
        for backend.kv in KV_FORMATS[1:]:
            kv = backend.kv
            other = answer_logits(model, prompt, answer)
            divergences[kv].append((exact.exp() * (exact - other)).sum(dim=-1))
            agree[kv].append((exact.argmax(dim=-1) == other.argmax(dim=-1)).float())
            at = first_difference(answer, answers[kv][i])
            if at is not None:
                best = exact[at].topk(2).values
                gaps[kv].append(float(best[0] - best[1]))
    tokens = sum(map(len, answers["float32"]))
    print(f"{args.model}, {args.precision}: {len(prompts)} answers, {tokens} tokens")
    for kv in KV_FORMATS[1:]:
        kl, same = torch.cat(divergences[kv]), torch.cat(agree[kv])
        parted = sorted(gaps[kv])
        print(
            f"{kv:<9} mean KL {kl.mean():.2e}, largest {kl.max():.1e}; top-1 equal {same.mean():.2%}; "
            f"{len(parted)} answers part, gaps of the two best logits there: "
            + (f"median {statistics.median(parted):.3f}, largest {parted[-1]:.3f}" if parted else "none")
        )


if __name__ == "__main__":
    main()
