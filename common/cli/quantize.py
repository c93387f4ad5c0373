"""`quasar quantize`: a W8A8 checkpoint that Quasar, vLLM, vLLM-Ascend and MindIE load."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from quasar.checkpoints import WRITERS
from quasar.checkpoints.weights import INT4_GROUPS
from quasar.cli import flags
from quasar.errors import QuasarError
from quasar.export.export import quantize_checkpoint
from quasar.export.msmodelslim import quantize_with_msmodelslim
from quasar.export.settings import SCHEMES, ExportSettings
from quasar.loading import texts_or_default
from quasar.models.model import LoadOptions
from quasar.quantization.methods import FITTED

ENGINES = ("quasar", "msmodelslim")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "quantize",
        help="write a W8A8 checkpoint",
        description="Quantise a model once, layer by layer, into a new folder that Quasar, vLLM, vLLM-Ascend and "
        "MindIE load. Interrupted and run again it resumes.",
    )
    parser.add_argument("--output", required=True, metavar="DIR", type=Path, help="the folder to make")
    parser.add_argument(
        "--format", choices=list(WRITERS), help="default: compressed-tensors (vLLM); ascend with --engine msmodelslim"
    )
    parser.add_argument(
        "--scheme",
        choices=SCHEMES,
        default="w8a8",
        help="w8a8: int8 activations with a scale per token, computed on the fly; w8a8-static: one per tensor, "
        "calibrated; w4a16: int4 weights with zero points, 16-bit activations (default: w8a8)",
    )
    parser.add_argument(
        "--group",
        choices=[str(size) for size in sorted(INT4_GROUPS)],
        help="inputs that share an int4 scale (default: 32)",
    )
    parser.add_argument(
        "--engine", choices=ENGINES, default="quasar", help="who quantises (default: quasar); the other runs the tool"
    )
    flags.add_model_flags(parser)
    # Every program that reads these formats runs W8A8; W8A16 fewer.
    parser.set_defaults(run=run, wide="none")


def run(args: argparse.Namespace) -> None:
    if args.dummy is not None:
        raise QuasarError(f"--dummy {args.dummy}: random weights are not worth saving; name a --model")
    if args.group is not None and args.scheme != "w4a16":
        raise QuasarError(f"--group {args.group} goes with --scheme w4a16")
    options = LoadOptions(args.device, args.dtype, args.trust_remote_code, sys.stderr.isatty())
    if args.engine == "msmodelslim":
        _refuse_what_the_tool_decides(args)
        scheme, command = args.scheme, shlex.join(["quasar", *sys.argv[1:]])
        fidelity = quantize_with_msmodelslim(args.model, args.output, scheme, options, args.force, command)
        print(f"{args.output}: {fidelity}", file=sys.stderr)
        return
    fidelity = quantize_checkpoint(
        args.model,
        args.output,
        ExportSettings(
            args.format or "compressed-tensors", args.scheme, flags.recipe_of(args), args.lm_head, int(args.group or 32)
        ),
        calibration=texts_or_default(args.calibration),
        heldout=texts_or_default(args.heldout),
        options=options,
        force=args.force,
        command=shlex.join(["quasar", *sys.argv[1:]]),
        report=lambda line: print(f"{args.output}: {line}", file=sys.stderr),
    )
    print(f"{args.output}: {fidelity}", file=sys.stderr)


def _refuse_what_the_tool_decides(args: argparse.Namespace) -> None:
    for flag, value, default in (
        ("--format", args.format or "ascend", "ascend"),
        ("--lm-head", args.lm_head, "full"),
        ("--calibration", args.calibration, None),
        ("--alpha", args.alpha, FITTED),
        ("--rounding", args.rounding, "gptq"),
        ("--budget", args.budget, "0%"),
        ("--wide", args.wide, "none"),
        ("--scheme", args.scheme, args.scheme if args.scheme != "w4a16" else "w8a8"),
    ):
        if value != default:
            raise QuasarError(f"{flag} {value}: --engine msmodelslim decides this itself; leave it out")
