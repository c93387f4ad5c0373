"""`quasar compare`: one prompt by plain decoding, n-gram drafts and Quasar's own, in full precision and in W8A8."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from quasar.cli import flags, streams
from quasar.cli.generate import as_json
from quasar.drafting import DEFAULT_DRAFT
from quasar.evaluation.decode import SCHEMES
from quasar.generation import GenerationSettings, Result, generate
from quasar.models.model import Model

LOSSLESS = "Quasar --lossless"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="one prompt by plain decoding, n-gram drafts, W8A8 and Quasar",
        description="Generate from one prompt by all schemes and the lossless cascade in one run, and show what "
        "each costs and whether the text stays that of plain full precision.",
    )
    flags.add_generation_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    flags.add_model_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    settings = flags.settings_of(args, "none")
    models = {precision: flags.load_model(args, precision) for precision in ("full", "w8a8")}
    ids = flags.prompt_ids(args, models["full"])
    models["w8a8"].full = models["full"].decoder
    rows = [(title, models[precision], replace(settings, draft=draft)) for title, precision, draft in SCHEMES]
    rows.append((LOSSLESS, models["w8a8"], replace(settings, draft=DEFAULT_DRAFT, lossless=True)))
    for _, model, row_settings in rows:  # each scheme's first pass pays for allocations that are not its own
        generate(model, ids, replace(row_settings, max_new_tokens=min(8, settings.max_new_tokens))).result()
    results = [
        (title, model, row_settings, generate(model, ids, row_settings).result()) for title, model, row_settings in rows
    ]
    baseline = results[0][3].token_ids
    if args.json:
        streams.print_json(
            {
                title: as_json(result, model, used) | {"agreement": agreement(result.token_ids, baseline)}
                for title, model, used, result in results
            }
        )
        return
    print(table(results))
    if models["w8a8"].fidelity is not None:
        print(f"W8A8 against full precision: {models['w8a8'].fidelity}")


def table(results: list[tuple[str, Model, GenerationSettings, Result]]) -> str:
    """A line per scheme."""
    baseline = results[0][3]
    lines = [
        f"{'scheme':<24}{'tokens':>7}{'passes':>8}{'acceptance':>12}{'MB/token':>10}{'tokens/s':>10}"
        f"{'speed':>8}{'same text':>11}",
    ]
    for title, _, _, result in results:
        stats = result.stats
        speed = stats.tokens_per_second / baseline.stats.tokens_per_second if baseline.stats.tokens_per_second else 1.0
        same = agreement(result.token_ids, baseline.token_ids)
        lines.append(
            f"{title:<24}{stats.tokens:>7}{stats.passes:>8}{stats.acceptance_length:>12.2f}"
            f"{stats.weight_bytes_per_token / 1e6:>10.1f}{stats.tokens_per_second:>10.1f}{speed:>7.2f}x"
            f"{same:>11.0%}"
        )
    lines.append(
        "(acceptance: tokens per pass; MB/token: weights read; same text: leading tokens equal to the first row's)"
    )
    return "\n".join(lines)


def agreement(ids: list[int], baseline: list[int]) -> float:
    """Share of the baseline's tokens before the first that differs."""
    same = next(
        (i for i, (a, b) in enumerate(zip(ids, baseline, strict=False)) if a != b), min(len(ids), len(baseline))
    )
    return same / max(len(baseline), 1)
