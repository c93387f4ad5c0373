"""`quasar bench step | decode | memory`: speed, as ratios within one run, and memory."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from quasar.backends import get_backend
from quasar.backends.base import Backend
from quasar.backends.cpu import kernels
from quasar.cli import flags, report
from quasar.errors import QuasarError
from quasar.evaluation import decode, footprint, peers, profile, serving, speed
from quasar.generation import GenerationSettings
from quasar.loading import PRECISIONS, texts_or_default
from quasar.models.model import ASSETS, DUMMY_PREFIX, Model, find_checkpoint
from quasar.quantization.calibration import read_texts


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench", help="measure speed", description="Measure speed, as ratios within one run."
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="step|decode|serving|memory")
    step = kinds.add_parser(
        "step",
        help="one forward pass of M new tokens",
        description="Time forward passes of M new tokens behind a context, every precision in turn, against the time "
        "that reading the weights once takes at the bandwidth measured in the same run.",
    )
    step.add_argument(
        "--rows",
        type=_numbers,
        default=[1, 2, 4, 6, 8, 16],
        metavar="M,M",
        help="new tokens per pass (default: 1,2,4,6,8,16); more than 512 are a prompt: its last token alone has logits",
    )
    step.add_argument("--context", type=int, default=128, metavar="N", help="committed tokens (default: %(default)s)")
    step.add_argument(
        "--precisions",
        type=_precisions,
        default=["full", "w8a8"],
        metavar="P,P",
        help=f"of {', '.join(PRECISIONS)} (default: full,w8a8)",
    )
    step.add_argument("--peer", action="append", default=[], choices=peers.PEERS, help="time another engine too")
    step.add_argument(
        "--profile", action="store_true", help="say what each kernel takes of a pass, instead of comparing (CPU)"
    )
    step.set_defaults(run=run_step)
    ends = kinds.add_parser(
        "decode",
        help="tokens per second end to end",
        description="Decode by all schemes, in turn: real prompts, or --acceptance L, which replays a stated "
        "acceptance length (for random weights) and says so.",
    )
    ends.add_argument("--prompts", metavar="FILE", help="JSONL with text, prompt or turns (default: built in)")
    ends.add_argument(
        "--limit", type=int, default=8, metavar="N", help="take the first N prompts (default: %(default)s)"
    )
    ends.add_argument("--acceptance", type=float, metavar="L", help="replay this acceptance length instead")
    ends.add_argument(
        "--context", type=int, default=128, metavar="N", help="with --acceptance: prompt tokens (default: %(default)s)"
    )
    ends.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="per prompt (default: %(default)s)")
    ends.add_argument("--gamma", type=int, metavar="G", help="fixed window (default: adapts)")
    ends.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    ends.set_defaults(run=run_decode)
    many = kinds.add_parser(
        "serving",
        help="many sequences at once",
        description="Tokens per second, time to the first token and between tokens, of full precision and W8A8, "
        "plain and with drafts, at several numbers of sequences in one engine.",
    )
    many.add_argument(
        "--sequences", type=_numbers, default=[1, 2, 4, 8, 16], metavar="N,N", help="at once (default: 1,2,4,8,16)"
    )
    many.add_argument(
        "--prompts", metavar="FILE", help="JSONL of prompts (default: built-in ones; random with --dummy)"
    )
    many.add_argument("--context", type=int, default=64, metavar="N", help="tokens of a prompt (default: %(default)s)")
    many.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="per prompt (default: %(default)s)")
    many.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    flags.add_draft_flag(many)
    many.set_defaults(run=run_serving)
    for each, repeats in ((step, 9), (ends, 3), (many, 3)):
        each.add_argument("--repeats", type=int, default=repeats, metavar="N", help="rounds (default: %(default)s)")
        report.add_json_flag(each)
        flags.add_model_flags(each)
    memory = kinds.add_parser(
        "memory",
        help="peak memory of the process",
        description="Peak memory after loading, quantising and generating, each precision in a process of its own.",
    )
    memory.add_argument(
        "--precisions",
        type=lambda text: _precisions(text, "auto"),
        default=["full", "w8a8"],
        metavar="P,P",
        help=f"of auto (as the checkpoint is), {', '.join(PRECISIONS)} (default: full,w8a8)",
    )
    memory.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help="(default: %(default)s)")
    report.add_json_flag(memory)
    flags.add_model_flags(memory)
    memory.set_defaults(run=run_memory)
    step.add_argument(
        "--plot",
        type=report.picture_to_write,
        metavar="FILE.png",
        help="draw bars against the memory floor (needs matplotlib)",
    )


def run_step(args: argparse.Namespace) -> None:
    flags.require_positive(args, "repeats", "context")
    if args.profile:
        run_profile(args)
        return
    target = None if args.plot is None else _plotter(args.plot)
    device = get_backend(args.device).device
    for peer in args.peer:
        peers.require(peer, device)
    steps: dict[str, speed.Step] = {}
    for precision in args.precisions:
        model = flags.load_model(args, precision)
        steps[precision] = speed.decoder_step(model.decoder, args.context, max(args.rows))
        config, backend = model.config, model.decoder.backend
    folder = None if args.dummy else find_checkpoint(args.model)
    for peer in args.peer:
        steps |= peers.peer_steps(peer, config, folder, args.context, max(args.rows), backend.device)
    with tqdm(total=args.repeats + 2, desc="timing", unit="round", disable=not sys.stderr.isatty(), leave=False) as bar:
        costs = speed.time_steps(steps, args.rows, args.repeats, config.vocab_size, backend, bar.update)
    print(step_table(costs, args.dummy or args.model, args.context, _name(backend)))
    if (others := peers.not_installed()) and not args.peer and backend.device.type == "cpu":
        print(
            f"(other engines in the same run: {'; '.join(f'--peer {peer}: {line}' for peer, line in others.items())})"
        )
    figures = [asdict(c) | {"floor_ms": c.floor_ms, "gigabytes_per_second": c.gigabytes_per_second} for c in costs]
    report.write_json(args, {"backend": backend.name, "device": str(backend.device), "steps": figures})
    if target is not None:
        target(costs)


def run_profile(args: argparse.Namespace) -> None:
    figures = []
    for precision in args.precisions:
        model = flags.load_model(args, precision)
        print(f"{args.dummy or args.model}, {precision}, {args.context} tokens of context, backend ", end="")
        print(f"{_name(model.decoder.backend)}, {torch.get_num_threads()} threads; median ms and share of a pass")
        for rows in args.rows:
            times = profile.profile_pass(model.decoder, args.context, rows, args.repeats)
            figures += [{"precision": precision, "rows": rows} | asdict(t) for t in times]
            print("\n".join(f"M={rows:<4}{t.kernel:<20}{t.milliseconds:>9.2f}{t.share:>8.1%}" for t in times))
    report.write_json(args, {"backend": _name(model.decoder.backend), "profile": figures})


def run_memory(args: argparse.Namespace) -> None:
    flags.require_positive(args, "max_new_tokens")
    name = f"{DUMMY_PREFIX}{args.dummy}" if args.dummy else args.model
    tokens = args.max_new_tokens
    print(f"{name}, {footprint.PROMPT_TOKENS} tokens of prompt and {tokens} new ones; peak MiB of the process")
    print(f"{'precision':<12}{'imports':>9}{'load':>9}{'quantise':>10}{'generate':>10}{'weights, embedding':>20}")
    figures = []
    for precision in args.precisions:
        f = footprint.measure(name, precision, args.lm_head, args.device, tokens)
        figures.append(asdict(f))
        quantise = "" if f.quantise is None else f"{f.quantise:.0f}"
        print(f"{precision:<12}{f.imports:>9.0f}{f.load:>9.0f}{quantise:>10}{f.generate:>10.0f}{f.weights:>20.0f}")
    report.write_json(args, {"memory": figures})


def _name(backend: Backend) -> str:
    """The backend, and on CPU the instruction set, without which no figure says anything."""
    fast = backend.name.startswith("cpu") and kernels.instruction_set()
    return f"{backend.name} ({fast})" if fast else backend.name


def step_table(costs: list[speed.StepCost], name: str, context: int, backend: str) -> str:
    """A line per scheme and number of rows."""
    bandwidths = [c.bandwidth / 1e9 for c in costs]
    lines = [
        f"{name}, {context} tokens of context, backend {backend}, {torch.get_num_threads()} threads, "
        f"bandwidth measured in each round, medians {min(bandwidths):.1f} to {max(bandwidths):.1f} GB/s",
        f"{'scheme':<24}{'M':>4}{'ms':>10}{'spread':>8}{'MB read':>10}{'GB/s':>8}{'of floor':>10}{'vs full':>9}",
    ]
    for c in sorted(costs, key=lambda c: c.rows):
        own = (
            f"{c.weight_bytes / 1e6:>10.1f}{c.gigabytes_per_second:>8.1f}{c.of_floor:>10.0%}"
            if c.weight_bytes
            else f"{'':>28}"
        )
        ratio = "" if c.vs_full is None else f"{c.vs_full:>8.2f}x"
        lines.append(f"{c.scheme:<24}{c.rows:>4}{c.milliseconds:>10.2f}{c.spread:>8.0%}{own}{ratio}")
    return "\n".join(lines)


def run_decode(args: argparse.Namespace) -> None:
    flags.require_positive(args, "repeats", "context", "limit", "max_new_tokens")
    if args.acceptance is not None and not 1 <= args.acceptance <= decode.PUBLISHED_GAMMA + 1:
        most = decode.PUBLISHED_GAMMA + 1
        raise QuasarError(f"--acceptance {args.acceptance}: tokens per pass lie between 1 and {most}")
    models = {precision: flags.load_model(args, precision) for precision in ("full", "w8a8")}
    if args.acceptance is not None:
        runs = decode.replayed(models, args.acceptance, args.context, args.max_new_tokens)
    else:
        settings = GenerationSettings(
            max_new_tokens=args.max_new_tokens, gamma=args.gamma, temperature=args.temperature
        )
        runs = decode.over_prompts(models, _prompts(args, models["full"]), settings)
    with tqdm(
        total=args.repeats + 1, desc="decoding", unit="round", disable=not sys.stderr.isatty(), leave=False
    ) as bar:
        speeds = decode.compare_runs(runs, args.repeats, args.acceptance is not None, bar.update)
    print(f"backend {_name(models['full'].decoder.backend)}, {torch.get_num_threads()} threads")
    print(decode_table(speeds))
    report.write_json(args, {"backend": models["full"].decoder.backend.name, "decode": [s.as_dict() for s in speeds]})


def decode_table(speeds: list[decode.DecodeSpeed]) -> str:
    """A line per scheme."""
    lines = [f"{'scheme':<24}{'tokens/s':>10}{'spread':>8}{'acceptance':>12}{'vs plain':>10}"]
    lines += [
        f"{s.scheme:<24}{s.tokens_per_second:>10.1f}{s.spread:>8.0%}{s.acceptance_length:>12.2f}{s.speed:>9.2f}x"
        for s in speeds
    ]
    lines.append(f"Quasar over n-gram in full precision: {speeds[3].speed / speeds[1].speed:.2f}x")
    if speeds[0].replayed:
        lines.append("(acceptance lengths are replayed as stated, not measured)")
    return "\n".join(lines)


def run_serving(args: argparse.Namespace) -> None:
    flags.require_positive(args, "repeats", "context", "max_new_tokens")
    models = {precision: flags.load_model(args, precision) for precision in ("full", "w8a8")}
    model = models["full"]

    def settings(draft: str | None) -> GenerationSettings:
        return GenerationSettings(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            draft=draft or args.draft,
            ignore_eos=True,  # as many tokens for every scheme
        )

    if args.prompts is None and model.tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        shape = (max(args.sequences) * (args.repeats + 1), args.context)
        prompts = torch.randint(0, model.config.vocab_size, shape, generator=generator).tolist()
    else:
        texts = texts_or_default(args.prompts) or read_texts(ASSETS / "calibration.jsonl")
        prompts = [model.encode(text)[: args.context] for text in texts]
    total = (args.repeats + 1) * len(args.sequences) * len(serving.SCHEMES)
    with tqdm(total=total, desc="serving", unit="run", disable=not sys.stderr.isatty(), leave=False) as bar:
        served = serving.compare(models, prompts, args.sequences, settings, args.repeats, bar.update)
    print(serving_table(served))
    report.write_json(args, {"backend": model.decoder.backend.name, "serving": [s.as_dict() for s in served]})


def serving_table(served: list[serving.Served]) -> str:
    """A line per scheme and number of sequences."""
    plain = {s.sequences: s.tokens_per_second for s in served if s.scheme == "plain, W8A8"}
    lines = [
        f"{'scheme':<24}{'sequences':>10}{'tokens/s':>10}{'first, ms':>11}{'between, ms':>13}{'acceptance':>12}"
        f"{'vs plain W8A8':>15}"
    ]
    lines += [
        f"{s.scheme:<24}{s.sequences:>10}{s.tokens_per_second:>10.1f}{s.first_token * 1e3:>11.1f}"
        f"{s.between_tokens * 1e3:>13.2f}{s.acceptance_length:>12.2f}{s.tokens_per_second / plain[s.sequences]:>14.2f}x"
        for s in served
    ]
    return "\n".join(lines)


def _prompts(args: argparse.Namespace, model: Model) -> list[list[int]]:
    texts = texts_or_default(args.prompts) or read_texts(ASSETS / "calibration.jsonl")
    return [model.encode(text) for text in texts[: args.limit]]


def _plotter(path: str) -> Any:
    """A function that draws the costs; asked for before the measurement, so that nothing is measured in vain."""
    try:
        import matplotlib
    except ImportError:
        raise QuasarError("--plot needs matplotlib; pip install 'quasar-inference[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    def draw(costs: list[speed.StepCost]) -> None:
        names, rows = list(dict.fromkeys(c.scheme for c in costs)), sorted({c.rows for c in costs})
        figure, axes = pyplot.subplots(figsize=(9, 4.5))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            own = {c.rows: c for c in costs if c.scheme == name}
            places = [at + i * width for at in range(len(rows))]
            bars = axes.bar(places, [own[m].milliseconds for m in rows], width * 0.9, label=name)
            floors = [own[m].floor_ms for m in rows]
            if any(floors):
                axes.hlines(
                    floors,
                    [at - width / 2 for at in places],
                    [at + width / 2 for at in places],
                    colors="black",
                    label="its weights, read once" if i == 0 else None,
                )
            axes.bar_label(bars, fmt="%.3g", fontsize=7)
        axes.set_xticks([at + width * (len(names) - 1) / 2 for at in range(len(rows))], [f"M = {m}" for m in rows])
        axes.set_ylabel("ms per pass")
        axes.margins(y=0.3)  # room for the legend
        axes.legend()
        figure.savefig(path, dpi=150, bbox_inches="tight")

    return draw


def _numbers(text: str) -> list[int]:
    try:
        rows = [int(part) for part in text.split(",")]
    except ValueError:
        rows = []
    if not rows or min(rows) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should be numbers above 0 with commas, as 1,6")
    return rows


def _precisions(text: str, *more: str) -> list[str]:
    names, known = text.split(","), (*more, *PRECISIONS)
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
    return names
