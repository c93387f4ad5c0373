#!/usr/bin/env python3
"""What a committed token costs the n-gram drafter as the history grows: its index against a rescan of the context."""

from __future__ import annotations

import argparse
import random
import time

from quasar.drafting.ngram import MAX_NGRAM, NGramDrafter

GAMMA = 5


def rescan(tokens: list[int]) -> list[int]:
    """Prompt lookup without an index: the same draft, found by walking back through the whole history."""
    for n in range(MAX_NGRAM, 0, -1):
        suffix = tokens[-n:]
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == suffix:
                return tokens[start + n : start + n + GAMMA]
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--history", type=int, default=100_000, help="committed tokens at the end (default: %(default)s)"
    )
    parser.add_argument(
        "--vocab", type=int, default=50_000, help="size of the random vocabulary (default: %(default)s)"
    )
    args = parser.parse_args()
    rng = random.Random(0)
    tokens = [rng.randrange(args.vocab) for _ in range(args.history)]
    drafter, steps = NGramDrafter(), 1000
    print(f"{'history':>10}{'index, us per token':>22}{'rescan, us per token':>22}")
    for end in range(args.history // 10, args.history + 1, args.history // 10):
        drafter.extend(tokens[len(drafter) : end - steps])
        clock = time.perf_counter()
        for i in range(end - steps, end):
            drafter.extend(tokens[i : i + 1])
            drafter.propose(GAMMA)
        indexed = (time.perf_counter() - clock) / steps
        clock = time.perf_counter()
        for _ in range(3):
            rescan(tokens[:end])
        print(f"{end:>10}{indexed * 1e6:>22.2f}{(time.perf_counter() - clock) / 3 * 1e6:>22.0f}")


if __name__ == "__main__":
    main()
