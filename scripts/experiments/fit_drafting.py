"""Fits the prior weights of the hybrid drafter to traces, and says how well they do on files left out of the fit.

    python scripts/experiments/fit_drafting.py FILE... [--runners-up FILE...] [--write common/drafting/priors.json]

FILE: traces as `quasar eval replay` reads them. --runners-up: traces with "top", the model's most probable tokens in
each place, and their "shares", for the weights of recycling. Every file in turn is left out of the fit and replayed
with the weights of the others. What is written is fitted to all of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from quasar.drafting import hybrid
from quasar.drafting.corpus import Corpus
from quasar.drafting.evidence import Evidence
from quasar.drafting.hybrid import HybridDrafter, outcomes
from quasar.drafting.memory import DraftMemory
from quasar.drafting.priors import GROUPS, parameters_of, weights_from
from quasar.evaluation.replay import Logged, read_log, verify
from quasar.speculation.draft import Draft

Counts = dict[tuple[int, ...], list[int]]  # features -> [candidates, right ones]
EVERY, CANDIDATES, RIDGE, TYPICAL = 3, 32, 1.0, -0.3


def memory_with(weights: list[float], corpus: Corpus | None) -> DraftMemory:
    memory, evidence = DraftMemory(corpus), Evidence(weights)
    memory.evidence = lambda corpus, recycled: evidence
    return memory


def collect(log: Sequence[Logged], weights: list[float], warm: bool, top: bool) -> Counts:
    """What became of every candidate in every third place of the answers."""
    counts: Counts = {}
    corpus = Corpus() if warm else None
    memory = memory_with(weights, corpus)
    memory.evidence(warm, top).RATE = 0.0
    for number, logged in enumerate(log):
        drafter = HybridDrafter(memory, top_k=8 if top else 0)
        drafter.extend([*logged.prompt, *logged.answer[:1]])
        for at in range(1, len(logged.answer)):
            if at % EVERY == 0 and (number or not warm):
                draft = drafter.propose(CANDIDATES)
                _, own, _ = verify(draft, logged, at, 0)
                for features, _, right in outcomes(draft, len(draft), own):
                    found = counts.setdefault(features, [0, 0])
                    found[0] += 1
                    found[1] += right
            if top:
                drafter.propose(1)
                drafter.observe(Draft(), 0, [logged.answer[at]], [logged.top[at]])
            drafter.extend(logged.answer[at : at + 1])
        drafter.finish()
        memory.settle()
    return counts


def fit(counts: Sequence[Counts]) -> list[float]:
    """Logistic regression by Newton's method, drawn towards TYPICAL: parameters as in `priors`."""
    merged: Counts = {}
    for each in counts:
        for features, (tested, right) in each.items():
            found = merged.setdefault(features, [0, 0])
            found[0] += tested
            found[1] += right
    numbers = {
        p: n for n, p in enumerate(sorted({p for features in merged for f in features for p in parameters_of(f)}))
    }
    design = np.zeros((len(merged), len(numbers)))
    for row, features in enumerate(merged):
        for feature in features:
            for parameter in parameters_of(feature):
                design[row, numbers[parameter]] += 1
    tested, right = np.array(list(merged.values()), dtype=float).T
    w = np.full(len(numbers), TYPICAL)
    for _ in range(30):
        p = 1 / (1 + np.exp(-design @ w))
        gradient = design.T @ (right - tested * p) - RIDGE * (w - TYPICAL)
        curvature = (design * (tested * p * (1 - p))[:, None]).T @ design + RIDGE * np.eye(len(w))
        step = np.linalg.solve(curvature, gradient)
        step *= min(1, 3 / max(abs(step).max(), 1e-9))
        w += step
        if abs(step).max() < 1e-3:
            break
    parameters = [0.0] * GROUPS["end"]
    for parameter, number in numbers.items():
        parameters[parameter] = round(float(w[number]), 2)
    return parameters


def replay(log: Sequence[Logged], weights: list[float], warm: bool, top: bool, rows: int) -> tuple[int, int]:
    """Committed tokens and passes."""
    tokens = passes = 0
    memory = memory_with(weights, Corpus() if warm else None)
    for logged in log:
        if not warm:
            memory = memory_with(weights, None)
        drafter = HybridDrafter(memory, top_k=8 if top else 0)
        drafter.extend([*logged.prompt, *logged.answer[:1]])
        at = 1
        while at < len(logged.answer):
            draft = drafter.propose(rows - 1)
            path, own, best = verify(draft, logged, at, drafter.top_k)
            kept = logged.answer[at : at + len(path) + 1]
            drafter.observe(draft, len(draft), own, best)
            drafter.extend(kept)
            at, tokens, passes = at + len(kept), tokens + len(kept), passes + 1
        drafter.finish()
        memory.settle()
    return tokens, passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*")
    parser.add_argument("--runners-up", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--write", metavar="FILE")
    args = parser.parse_args()
    hybrid.HOPELESS = 1e-4
    written = {}
    if args.write and Path(args.write).exists():
        written = json.loads(Path(args.write).read_text())
    for top, files in ((False, args.files), (True, args.runners_up)):
        logs = {file: read_log(file, lambda: None) for file in files}
        for warm in (False, True) if logs else ():
            start = weights_from([-0.3] * GROUPS["end"])
            for _ in range(2):  # which candidates are looked at depends on the weights
                counts = {file: collect(log, start, warm, top) for file, log in logs.items()}
                start = weights_from(fit(list(counts.values())))
            lengths, tokens, passes = [], 0, 0
            for file, log in logs.items():
                others = [counts[other] for other in logs if other != file] or list(counts.values())
                done = replay(log, weights_from(fit(others)), warm, top, args.rows)
                lengths.append(f"{Path(file).stem} {done[0] / done[1]:.3f}")
                tokens, passes = tokens + done[0], passes + done[1]
            name = ("warm" if warm else "cold") + (" recycled" if top else "")
            print(
                f"{name}: {', '.join(lengths)}; together {tokens / passes:.3f}, each with the others' weights",
                flush=True,
            )
            written[name] = fit(list(counts.values()))
    if args.write:
        Path(args.write).write_text(json.dumps(written) + "\n")


if __name__ == "__main__":
    main()
