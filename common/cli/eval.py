"""`quasar eval fidelity | tasks | replay`: what precisions and drafters do to text, and to Spec-Bench's questions."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from quasar.cli import flags, replay, report
from quasar.drafting import check_draft
from quasar.errors import QuasarError
from quasar.evaluation import fidelity, tasks
from quasar.evaluation.texts import MeasuredTexts, conversations, plain_texts
from quasar.generation import GenerationSettings
from quasar.loading import texts_or_default
from quasar.models.model import ASSETS, Model
from quasar.quantization.calibration import read_texts
from quasar.quantization.texts import calibration_and_heldout

_DRAFTS = ["ngram", "suffix", "self:skip=1", "self:w4a4"]


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "eval", help="measure fidelity and tasks", description="Measure what precisions and drafters do."
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="fidelity|tasks|replay")
    table = kinds.add_parser(
        "fidelity",
        help="every verifier against full precision",
        description="For every verifier (full, W8A8 with and without SmoothQuant, W4A16, W4A4, layers pruned): "
        "divergence from full precision on text, and acceptance length with every drafter on prompts.",
    )
    table.add_argument(
        "--chat",
        action="store_true",
        help="measure on conversations: the questions of --heldout (default: built in) in the model's chat template, "
        "with the answers that the full-precision model gives at temperature 0.7",
    )
    table.add_argument("--prompts", metavar="FILE", help="JSONL to generate from (default: built in)")
    table.add_argument(
        "--limit", type=int, default=8, metavar="N", help="take the first N prompts (default: %(default)s)"
    )
    table.add_argument(
        "--prompt-tokens", type=int, default=128, metavar="N", help="of each prompt at most (default: %(default)s)"
    )
    table.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="per prompt (default: %(default)s)")
    table.add_argument("--gamma", type=int, metavar="G", help="tokens drafted per pass (default: 5, as published)")
    table.add_argument(
        "--drafts",
        type=lambda text: text.split(","),
        default=_DRAFTS,
        metavar="D,D",
        help=f"drafters (default: {','.join(_DRAFTS)})",
    )
    table.add_argument(
        "--plot",
        type=report.picture_to_write,
        metavar="FILE.png",
        help="draw divergence against bytes (needs matplotlib)",
    )
    table.set_defaults(run=run_fidelity)
    bench = kinds.add_parser(
        "tasks",
        help="Spec-Bench questions by every scheme",
        description="Answer Spec-Bench questions (JSONL of question_id, category, turns) by every scheme, and compare "
        "speed, acceptance length and text per category.",
    )
    bench.add_argument("--tasks", required=True, metavar="FILE_OR_DIR", help="a question file, or a folder of them")
    bench.add_argument("--limit", type=int, metavar="N", help="take N questions of each category (default: all)")
    names = ",".join(scheme.name for scheme in tasks.SCHEMES)
    bench.add_argument(
        "--schemes", default=names, metavar="S,S", help=f"some of {names}; the first is the baseline (default: all)"
    )
    bench.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="per turn (default: %(default)s)")
    bench.add_argument("--gamma", type=int, metavar="G", help="tokens drafted per pass (default: adapts)")
    bench.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    bench.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="put questions into the model's chat template (default: where it has one)",
    )
    bench.add_argument("--warm", action="store_true", help="let earlier questions teach later ones, as a server does")
    bench.add_argument("--answers", metavar="DIR", help="write answers there, one JSONL file per scheme")
    bench.set_defaults(run=run_tasks)
    replay.add_parser(kinds)
    for each in (table, bench):
        report.add_json_flag(each)
        flags.add_model_flags(each)


def run_fidelity(args: argparse.Namespace) -> None:
    for name in args.drafts:
        check_draft(name)
    flags.require_positive(args, "limit", "prompt_tokens")
    settings = GenerationSettings(max_new_tokens=args.max_new_tokens, gamma=args.gamma, ignore_eos=True)
    draw = None if args.plot is None else _plotter(args.plot)
    model = flags.load_model(args, "full")
    if model.tokenizer is None:
        raise QuasarError(f"{model.name} has random weights: its fidelity means nothing; name a --model")
    measured_texts = _measured_texts(args, model)
    texts = measured_texts.ids
    prompts = [model.encode(text, chat=True) for text in _questions(args)] if args.chat else texts
    if args.prompts is not None:
        prompts = [model.encode(text, args.chat) for text in read_texts(Path(args.prompts))]
    prompts = [ids[: args.prompt_tokens] for ids in prompts[: args.limit]]
    calibration_ids, _ = calibration_and_heldout(model.config, model.tokenizer, texts_or_default(args.calibration))
    rows = []
    with tqdm(total=11, unit="verifier", disable=not sys.stderr.isatty(), leave=False) as bar:
        measured = fidelity.measure_fidelity(
            model, texts, prompts, calibration_ids, args.drafts, settings, bar.set_description
        )
        for row in measured:
            rows.append(row)
            bar.update()
    about = f"{model.name}, backend {model.decoder.backend.name}; measured on {measured_texts.about}"
    print(fidelity_table(rows, args.drafts, about))
    report.write_json(args, {"text": measured_texts.about, "verifiers": [row.as_dict() for row in rows]})
    if draw is not None:
        draw(rows)


def _questions(args: argparse.Namespace) -> list[str]:
    return texts_or_default(args.heldout) or read_texts(ASSETS / "questions.jsonl")


def _measured_texts(args: argparse.Namespace, model: Model) -> MeasuredTexts:
    """What divergence is measured on; with --chat another copy of the model answers first."""
    if not args.chat:
        source = args.heldout or "the built-in held-out text"
        return plain_texts(model, texts_or_default(args.heldout) or read_texts(ASSETS / "heldout.jsonl"), source)
    questions = _questions(args)
    with tqdm(total=len(questions), desc="answering", disable=not sys.stderr.isatty(), leave=False) as bar:
        source = args.heldout or "the built-in questions"
        return conversations(flags.load_model(args, "full"), questions, source, tick=bar.update)


def fidelity_table(rows: list[fidelity.VerifierFidelity], drafts: list[str], title: str) -> str:
    """Markdown, a line per verifier."""
    heads = ["verifier", "mean KL", "p99 KL", "top-1", "perplexity", "MB per pass", *(f"L {name}" for name in drafts)]
    lines = [f"{title}, {rows[0].fidelity.tokens} tokens", "", _line(heads), _line(["---"] * len(heads))]
    for row in rows:
        f = row.fidelity
        figures = [f"{f.mean_kl:.1e}", f"{f.p99_kl:.1e}", f"{f.top1_agreement:.1%}", f"{f.perplexity:.2f}"]
        lengths = [f"{row.acceptance[name]:.2f}" if name in row.acceptance else "" for name in drafts]
        lines.append(_line([row.verifier, *figures, f"{row.weight_bytes_per_pass / 1e6:.1f}", *lengths]))
    return "\n".join([*lines, "", "(KL to full precision in nats; L: mean acceptance length, by drafter)"])


def run_tasks(args: argparse.Namespace) -> None:
    known = {scheme.name: scheme for scheme in tasks.SCHEMES}
    chosen = args.schemes.split(",")
    if unknown := [name for name in chosen if name not in known]:
        raise QuasarError(f"--schemes {unknown[0]} is unknown; use some of {', '.join(known)}")
    schemes = [known[name] for name in chosen]
    settings = GenerationSettings(max_new_tokens=args.max_new_tokens, gamma=args.gamma, temperature=args.temperature)
    if args.limit is not None:
        flags.require_positive(args, "limit")
    questions = tasks.read_questions(Path(args.tasks), args.limit)
    wanted = dict.fromkeys(scheme.precision for scheme in schemes)
    lossless = any(scheme.lossless for scheme in schemes)
    models = {precision: flags.load_model(args, precision) for precision in ([*wanted, "full"] if lossless else wanted)}
    for model in models.values():
        model.full = models["full"].decoder if lossless else None
    if args.chat is None:
        args.chat = any(m.tokenizer is not None and bool(m.tokenizer.chat_template) for m in models.values())
    with tqdm(total=len(questions), unit="question", disable=not sys.stderr.isatty(), leave=False) as bar:
        run = tasks.run_tasks(models, schemes, questions, settings, bar.update, args.chat, args.warm)
    rows = run.rows()
    about = _about_tasks(args, next(iter(models.values())), questions)
    print(f"{about}\n\n{tasks_table(rows)}")
    report.write_json(args, {"text": about, "rows": [row.as_dict() for row in rows]})
    if args.answers is not None:
        for path in tasks.write_answers(run, Path(args.answers)):
            print(f"answers: {path}", file=sys.stderr)


def _about_tasks(args: argparse.Namespace, model: Model, questions: list[tasks.Question]) -> str:
    turns = sum(len(question.turns) for question in questions)
    categories = len({question.category for question in questions})
    form = "in its chat template" if args.chat else "as plain text"
    return (
        f"{model.name}, backend {model.decoder.backend.name}; measured on {args.tasks}: {len(questions)} questions of "
        f"{categories} categories, {turns} turns, {form}, answers of up to {args.max_new_tokens} tokens"
    )


def tasks_table(rows: list[tasks.CategoryRow]) -> str:
    """Markdown, a line per category and scheme."""
    heads = ["category", "scheme", "tokens/s", "speed", "acceptance length", "agreement"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in rows:
        figures = [f"{row.tokens_per_second:.1f}", f"{row.speed:.2f}x", f"{row.acceptance_length:.2f}"]
        lines.append(_line([row.category, row.scheme, *figures, f"{row.agreement:.1%}"]))
    return "\n".join([*lines, "", f"(speed and agreement: over and with {rows[0].scheme})"])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _plotter(path: str) -> Any:
    """A function that draws the table; asked for before the measurement, so that nothing is measured in vain."""
    try:
        import matplotlib
    except ImportError:
        raise QuasarError("--plot needs matplotlib; pip install 'quasar-inference[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    def draw(rows: list[fidelity.VerifierFidelity]) -> None:
        figure, axes = pyplot.subplots(figsize=(8, 4.5))
        for row in rows[1:]:  # full precision's own divergence is 0
            pruned = row.verifier.startswith("pruned")
            bytes_, kl = row.weight_bytes_per_pass / 1e6, row.fidelity.mean_kl
            axes.scatter(bytes_, kl, marker="s" if pruned else "o", color="tab:orange" if pruned else "tab:blue")
            axes.annotate(row.verifier, (bytes_, kl), xytext=(5, 4), textcoords="offset points", fontsize=8)
        axes.set_yscale("log")
        axes.margins(x=0.25)
        axes.set_xlabel("weights read per pass, MB")
        axes.set_ylabel("mean KL to full precision, nats")
        figure.savefig(path, dpi=150, bbox_inches="tight")

    return draw
