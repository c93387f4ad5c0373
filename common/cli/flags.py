"""Flags that several commands share, and what they mean in the API's terms."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quasar.backends import DEVICES, KV_DEFAULT
from quasar.cli import streams
from quasar.drafting import DEFAULT_DRAFT, DRAFTS
from quasar.drafting.memory import DraftMemory
from quasar.drafting.store import CorpusStore, tokenizer_fingerprint
from quasar.errors import QuasarError
from quasar.generation import GenerationSettings
from quasar.loading import LM_HEADS, PRECISIONS, load, texts_or_default
from quasar.models.chat import THINK_MODES
from quasar.models.config import DUMMY_SHAPES
from quasar.models.model import DEFAULT_MODEL, DUMMY_PREFIX, Model
from quasar.quantization.methods import FITTED
from quasar.quantization.recipe import DEFAULT_RECIPE, ROUNDINGS, Recipe
from quasar.reading import read_text


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which model, where, and how it is quantised (all but the precision)."""
    group = parser.add_argument_group("model")
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="M",
        help="checkpoint folder, GGUF file, hub name, smollm2 where its package is installed, or one of the shipped "
        "tiny-qwen3 and tiny-openpangu (default: %(default)s)",
    )
    which.add_argument(
        "--dummy",
        metavar="SHAPE",
        choices=sorted(DUMMY_SHAPES),
        help=f"random weights of a real shape, for timing: {', '.join(DUMMY_SHAPES)}",
    )
    group.add_argument(
        "--device",
        default="auto",
        metavar="D",
        help=f"{', '.join(DEVICES)}; cuda:1 picks a card (default: the best there is)",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        metavar="T",
        help="of activations: bfloat16, float16, float32 (default: float32 on CPU, bfloat16 elsewhere; "
        "bfloat16 on CPU is for long prompts)",
    )
    group.add_argument(
        "--kv",
        default="auto",
        metavar="T",
        help="what keys and values are kept in on CPU: float32, bfloat16, or int8 with a scale for each head and token "
        f"(default: {KV_DEFAULT})",
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that the checkpoint brings (openPangu's tokenizer needs it)",
    )
    group = parser.add_argument_group("quantisation")
    group.add_argument(
        "--calibration",
        metavar="FILE",
        help="JSONL with text, prompt or turns to calibrate on (default: built-in prompts)",
    )
    group.add_argument("--heldout", metavar="FILE", help="JSONL to measure the quantised model on (default: built in)")
    group.add_argument(
        "--alpha",
        default=FITTED,
        metavar="A",
        help="smoothing: SmoothQuant's migration strength, 0 to 1, auto to search it per layer, or fitted: scales that "
        "make rounding noise least (default: %(default)s)",
    )
    group.add_argument(
        "--lm-head",
        choices=LM_HEADS,
        default="full",
        help="of a quantised model: int8 reads half the bytes of its largest layer (default: %(default)s)",
    )
    group.add_argument("--rounding", choices=ROUNDINGS, default="gptq", help="of int8 weights (default: %(default)s)")
    group.add_argument(
        "--wide",
        default=",".join(DEFAULT_RECIPE.wide),
        metavar="NAMES",
        help="linear layers of W8A8 whose inputs keep 12 bits, as two int8 numbers, some of qkv, o, gate_up, down and "
        "lm_head, or none: the same bytes, more products (default: qkv,down,lm_head; quasar quantize: none)",
    )
    group.add_argument(
        "--budget",
        default="0%",
        metavar="P",
        help="leave the layers whose rounding costs most in 16 bits; a pass may read P more bytes for it, as "
        "2%% (default: 0%%)",
    )
    group.add_argument("--force", action="store_true", help="go on with a quantised model that measures as garbage")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="log more; twice for debugging")


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    """What to generate (all but the draft)."""
    defaults = GenerationSettings()
    group = parser.add_argument_group("prompt")
    group.add_argument("prompt", nargs="?", help='text to continue; "-" or nothing reads standard input')
    group.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file")
    group.add_argument("--prompt-ids", metavar="IDS", help="token ids instead of text: 1,2,3")
    group.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    group.add_argument("--system", metavar="TEXT", help="with --chat: the system prompt (default: the model's own)")
    group.add_argument(
        "--think",
        choices=THINK_MODES,
        help="with --chat: think first, answer at once, or let the model choose (auto: openPangu only; "
        "default: the model's own)",
    )
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=defaults.max_new_tokens,
        metavar="N",
        help="stop after N tokens (default: %(default)s)",
    )
    group.add_argument(
        "--gamma",
        type=_gamma,
        metavar="G",
        help="draft exactly G tokens per pass, or auto: adapt to measured acceptance and cost (default: auto)",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=defaults.temperature,
        metavar="T",
        help="0 is greedy (default: %(default)s)",
    )
    group.add_argument(
        "--top-k",
        type=int,
        default=defaults.top_k,
        metavar="K",
        help="sample among the K likeliest tokens; 0 is all (default: %(default)s)",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=defaults.top_p,
        metavar="P",
        help="sample among the likeliest tokens that hold probability P (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=defaults.seed,
        metavar="S",
        help="the same seed gives the same text, whatever the drafts (default: %(default)s)",
    )
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", help="go on past the model's end token")


def add_precision_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of the model that verifies: full, w8a8 by SmoothQuant, int4 weights with 16-bit (w4a16) or int4 (w4a4) "
        "activations (default: a quantised checkpoint's own, w8a8 of any other)",
    )


def add_draft_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--draft",
        default=DEFAULT_DRAFT,
        metavar="D",
        help=f"how tokens are drafted: {', '.join(DRAFTS)} (default: %(default)s)",
    )


def add_draft_store_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--draft-store",
        metavar="DIR",
        help="keep the token ids of finished requests there, and draft from them (hybrid and corpus drafts)",
    )


@contextmanager
def draft_memory(args: argparse.Namespace, model: Model) -> Iterator[DraftMemory | None]:
    """What --draft-store holds; None without one."""
    if args.draft_store is None:
        yield None
        return
    vocab_size = model.config.vocab_size
    with CorpusStore(args.draft_store, tokenizer_fingerprint(model.tokenizer, vocab_size), vocab_size) as store:
        yield DraftMemory(store)


def add_lossless_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lossless",
        action="store_true",
        help="confirm the quantised model's tokens in full precision, block by block: its output is full precision's",
    )


def load_model(args: argparse.Namespace, precision: str | None, lossless: bool = False) -> Model:
    """The model that the flags describe; lossless keeps its full-precision weights too."""
    name = args.model if args.dummy is None else DUMMY_PREFIX + args.dummy
    progress = sys.stderr.isatty()
    calibration, heldout = texts_or_default(args.calibration), texts_or_default(args.heldout)
    return load(
        name,
        device=args.device,
        precision=precision,
        dtype=args.dtype,
        lossless=lossless,
        trust_remote_code=args.trust_remote_code,
        progress=progress,
        kv=args.kv,
        prompts=calibration,
        heldout=heldout,
        lm_head=args.lm_head,
        recipe=recipe_of(args),
        force=args.force,
    )


def settings_of(args: argparse.Namespace, draft: str, lossless: bool = False) -> GenerationSettings:
    """The generation settings that the flags describe."""
    return GenerationSettings(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        draft=draft,
        gamma=args.gamma,
        lossless=lossless,
        ignore_eos=args.ignore_eos,
        stop=tuple(args.stop),
    )


def prompt_ids(args: argparse.Namespace, model: Model) -> list[int]:
    """Token ids of the one prompt that the flags name."""
    given = [
        flag
        for flag, value in (
            ("PROMPT", args.prompt),
            ("--prompt-file", args.prompt_file),
            ("--prompt-ids", args.prompt_ids),
        )
        if value is not None
    ]
    if len(given) > 1:
        raise QuasarError(f"give one prompt, not {' and '.join(given)}")
    for flag, value in (("--system", args.system), ("--think", args.think)):
        if value is not None and not args.chat:
            raise QuasarError(f"{flag} goes with --chat")
    if args.prompt_ids is not None:
        try:
            return [int(part) for part in args.prompt_ids.split(",")]
        except ValueError:
            raise QuasarError(
                f"--prompt-ids {args.prompt_ids}: should be whole numbers with commas, as 1,2,3"
            ) from None
    return model.encode(_prompt_text(args), args.chat, args.system, args.think)


def _prompt_text(args: argparse.Namespace) -> str:
    if args.prompt_file is not None:
        return read_text(Path(args.prompt_file), f"--prompt-file {args.prompt_file}")
    if args.prompt not in (None, "-"):
        return args.prompt
    if args.prompt is None and sys.stdin.isatty():
        raise QuasarError('no prompt; give one, as quasar generate "def main():", or pipe it in')
    return streams.read_all()


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """Raises QuasarError where one of these flags is below 1."""
    for name in names:
        if getattr(args, name) < 1:
            raise QuasarError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")


def recipe_of(args: argparse.Namespace) -> Recipe:
    """How W8A8 is made."""
    return Recipe(_alpha(args.alpha), args.rounding, _share(args.budget), _names(args.wide))


def _names(text: str) -> tuple[str, ...]:
    """Names with commas between, or none."""
    return () if text == "none" else tuple(text.split(","))


def _alpha(text: str) -> float | str | None:
    """SmoothQuant's migration strength; None for auto."""
    if text in ("auto", FITTED):
        return None if text == "auto" else text
    try:
        return float(text)
    except ValueError:
        raise QuasarError(f"--alpha {text}: should be a number from 0 to 1, auto or {FITTED}") from None


def _share(text: str) -> float:
    try:
        return float(text.removesuffix("%")) / 100
    except ValueError:
        raise QuasarError(f"--budget {text}: should be a percentage, such as 2%") from None


def _gamma(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} should be a whole number, or auto") from None
