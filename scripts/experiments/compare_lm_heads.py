"""Whether W8A8 may quantise lm_head too: what it costs in top-1 agreement with full precision on held-out text.

    python scripts/experiments/compare_lm_heads.py

Ends with the verdict on --lm-head's default: w8a8 if no model loses more than 0.1 points, full otherwise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from quasar import load, quantize
from quasar.loading import LM_HEADS
from quasar.models.model import ASSETS
from quasar.quantization.calibration import read_texts
from quasar.quantization.fidelity import Fidelity, FidelityProbe

ALLOWED_POINTS = 0.1  # percentage points of agreement


def fidelity(name: str, lm_head: str, texts: list[str], tokens: int) -> Fidelity:
    """Of the model in W8A8, over up to `tokens` held-out tokens."""
    model = load(name, device="cpu", precision="full")
    probe = FidelityProbe(model.decoder, [model.encode(text) for text in texts], tokens)
    quantize(model, lm_head=lm_head)
    return probe.compare(model.decoder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tiny-qwen3", "tiny-openpangu"], metavar="M")
    parser.add_argument("--heldout", type=Path, default=ASSETS / "heldout.jsonl", metavar="FILE")
    parser.add_argument("--tokens", type=int, default=32768, help="held-out tokens at most (default: %(default)s)")
    args = parser.parse_args()
    texts, lost = read_texts(args.heldout), []
    for name in args.model:
        found = {lm_head: fidelity(name, lm_head, texts, args.tokens) for lm_head in LM_HEADS}
        for lm_head, figures in found.items():
            print(f"{name}, lm_head {lm_head}: {figures}", flush=True)
        lost.append(100 * (found["full"].top1_agreement - found["w8a8"].top1_agreement))
        print(f"{name}: an int8 lm_head costs {lost[-1]:+.2f} points of top-1 agreement", flush=True)
    verdict = "w8a8" if max(lost) <= ALLOWED_POINTS else "full"
    print(f"default of --lm-head by this: {verdict} (at most {ALLOWED_POINTS} points may be lost)")


if __name__ == "__main__":
    main()
