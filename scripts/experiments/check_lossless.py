"""The cascade against full precision: the same ids on many prompts, and what it costs beside the other schemes.

python scripts/experiments/check_lossless.py --prompts 500 --model tiny-qwen3
"""

from __future__ import annotations

import argparse
import sys

from tqdm import tqdm

from quasar import GenerationSettings, Model, load
from quasar.evaluation.tasks import SCHEMES, Scheme
from quasar.generation import Generation
from quasar.models.model import ASSETS
from quasar.quantization.calibration import read_texts
from quasar.speculation.rows import PUBLISHED_GAMMA, FixedRows

NAMES = ("plain-full", "ngram-full", "quasar", "lossless")


def pieces(model: Model, count: int, tokens: int) -> list[list[int]]:
    """`count` prompts of `tokens` ids, evenly spaced over the held-out text."""
    ids = [i for text in read_texts(ASSETS / "heldout.jsonl") for i in model.encode(text)]
    step = (len(ids) - tokens) // count
    if step < 1:
        sys.exit(f"--prompts {count}: the held-out text has only {len(ids)} tokens")
    return [ids[i * step : i * step + tokens] for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-qwen3")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--block", type=int, help="confirm blocks of N, drafted 5 at a time (default: both adapt)")
    args = parser.parse_args()
    block = None if args.block is None else FixedRows(args.block)
    quantised = load(args.model, device=args.device, precision="w8a8", lossless=True)
    assert quantised.full is not None
    full = quantised.with_decoder(quantised.full, "full")
    models = {"full": full, "w8a8": quantised}
    schemes = [scheme for scheme in SCHEMES if scheme.name in NAMES]
    totals = {scheme.name: [0, 0, 0.0, 0.0, 0] for scheme in schemes}  # tokens, passes, seconds, bytes, equal

    def run(scheme: Scheme, ids: list[int]) -> list[int]:
        settings = GenerationSettings(
            max_new_tokens=args.max_new_tokens,
            draft=scheme.draft,
            gamma=None if args.block is None else PUBLISHED_GAMMA,
            lossless=scheme.lossless,
            ignore_eos=True,
        )
        rule = block if scheme.lossless else None
        result = Generation(models[scheme.precision], ids, settings, row_rule=rule).result()
        s, total = result.stats, totals[scheme.name]
        for i, value in enumerate((s.tokens - 1, s.passes, s.seconds_decode)):
            total[i] += value
        total[3] += s.weight_bytes_per_token * (s.tokens - 1)
        return result.token_ids

    prompts = pieces(full, args.prompts, args.prompt_tokens)
    for scheme in schemes:
        run(scheme, prompts[0])
    totals = {name: [0, 0, 0.0, 0.0, 0] for name in totals}
    for ids in tqdm(prompts, disable=not sys.stderr.isatty()):
        outputs = [run(scheme, ids) for scheme in schemes]
        for scheme, output in zip(schemes, outputs, strict=True):
            totals[scheme.name][4] += output == outputs[0]
    print(f"{args.model}, backend {full.decoder.backend.name}, {args.prompts} prompts x {args.max_new_tokens} tokens\n")
    print("| scheme | same ids as full precision | tokens per pass | MB of weights per token | tokens/s | speed |")
    print("|---|---|---|---|---|---|")
    plain = totals["plain-full"][0] / totals["plain-full"][2]
    for name, (tokens, passes, seconds, read, equal) in totals.items():
        print(
            f"| {name} | {equal} of {args.prompts} | {tokens / passes:.2f} | {read / tokens / 1e6:.2f} | "
            f"{tokens / seconds:.0f} | {tokens / seconds / plain:.2f}x |"
        )
    if totals["lossless"][4] != args.prompts:
        sys.exit("the cascade's ids differ from full precision's")


if __name__ == "__main__":
    main()
