"""The adaptive window against plain decoding and every fixed gamma: on text where no draft is ever right, on a
repetitive text, and on ordinary ones.

    python scripts/bench_window.py --model tiny-qwen3 --precision w8a8
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from quasar import GenerationSettings, Model, drafting, generate, load
from quasar.loading import PRECISIONS
from quasar.models.model import ASSETS
from quasar.quantization.calibration import read_texts
from quasar.speculation.draft import Draft, Drafter

GAMMAS = (1, 2, 3, 5, 8, 15)


class AlwaysWrong(Drafter):
    """Drafts a token that plain decoding was seen not to say anywhere."""

    unsaid = 0

    def extend(self, tokens: Sequence[int]) -> None:
        return

    def propose(self, gamma: int, pending: Sequence[int] = ()) -> Draft:
        return Draft([type(self).unsaid] * gamma)


def rate(model: Model, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> float:
    """Tokens per second of decoding over all prompts."""
    stats = [generate(model, ids, settings).result().stats for ids in prompts]
    return sum(s.tokens - 1 for s in stats) / sum(s.seconds_decode for s in stats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-qwen3")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="w8a8", choices=PRECISIONS)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    model = load(args.model, device=args.device, precision=args.precision)
    drafting._DRAFTERS["always-wrong"] = AlwaysWrong
    texts = [model.encode(text) for text in read_texts(ASSETS / "heldout.jsonl")]
    corpora = {
        "never right": ("always-wrong", [ids[:64] for ids in texts[:4]]),
        "repetitive": ("ngram", [texts[0][:24] * 8, texts[1][:12] * 12]),
        "ordinary": ("ngram", [ids[:256] for ids in texts[:6]]),
    }
    print(f"{args.model}, {args.precision}, backend {model.decoder.backend.name}; tokens/s over plain decoding's\n")
    print("| text | auto | " + " | ".join(f"gamma {g}" for g in GAMMAS) + " | auto over the best |")
    print("|---" * (len(GAMMAS) + 3) + "|")
    for name, (draft, prompts) in corpora.items():
        ways: list[tuple[str, int | None]] = [("none", None), (draft, None), *((draft, g) for g in GAMMAS)]
        said = {
            token
            for ids in prompts
            for token in generate(model, ids, draft="none", max_new_tokens=args.max_new_tokens, ignore_eos=True)
            .result()
            .token_ids
        }
        AlwaysWrong.unsaid = next(t for t in range(model.config.vocab_size) if t not in said)
        rounds = []
        for _ in range(args.repeats + 1):
            rounds.append(
                [
                    rate(
                        model,
                        prompts,
                        GenerationSettings(max_new_tokens=args.max_new_tokens, draft=way, gamma=gamma, ignore_eos=True),
                    )
                    for way, gamma in ways
                ]
            )
        ratios = [statistics.median(r[i] / r[0] for r in rounds[1:]) for i in range(len(ways))]
        best = max(ratios[2:] if name != "never right" else ratios[:1])
        cells = [f"{ratio:.2f}x" for ratio in ratios[1:]]
        print(f"| {name} | " + " | ".join(cells) + f" | {ratios[1] / best:.1%} |", flush=True)
    print("\n(where no draft is right the best is plain decoding)")


if __name__ == "__main__":
    main()
