"""What each way to quantise costs on text that the model writes itself: KL against bytes, on a real chat model.

    python scripts/experiments/quantization_quality.py --plot docs/images/quality_smollm2.png

Methods see the built-in calibration texts, as users' do, or the questions of --calibration with the model's answers.
They are measured on --questions with answers sampled from the full-precision model at temperature 0.7: on whole
conversations, and on the questions alone, in the model's chat template. Both files are JSONL with a text, prompt,
inputs_pretokenized or turns field. --samples keeps the answers for the next run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quasar import Engine, GenerationSettings, QuasarError, load
from quasar.checkpoints.weights import LINEARS
from quasar.models.build import build
from quasar.models.model import ASSETS, Checkpoint, LoadOptions, open_model
from quasar.quantization.budget import choose_kept, describe
from quasar.quantization.calibration import read_texts
from quasar.quantization.fidelity import FidelityProbe, FidelityTally
from quasar.quantization.methods import W8A8, Int4, Method, int8_head
from quasar.quantization.recipe import DEFAULT_RECIPE, Recipe, pass_bytes
from quasar.quantization.stream import LayerQuantizer
from quasar.quantization.texts import calibration_and_heldout


@dataclass(frozen=True)
class Conversation:
    """Token ids of a question in the chat template and of its answer; `question` counts those of the question."""

    ids: list[int]
    question: int


def sampled(found: Checkpoint, path: Path, count: int, tokens: int, samples: Path | None) -> list[Conversation]:
    """The file's first `count` questions with the model's answers of up to `tokens` tokens."""
    kept = None if samples is None else samples / f"{path.stem}-{count}-{tokens}.json"
    if samples is not None:
        samples.mkdir(parents=True, exist_ok=True)
    if kept is not None and kept.exists():
        return [Conversation(**fields) for fields in json.loads(kept.read_text())]
    model = found.model(found.decoder())
    prompts = [model.encode(text, chat=True) for text in read_texts(path)[:count]]
    made = []
    with Engine(model) as engine:
        handles = [
            engine.submit(ids, GenerationSettings(max_new_tokens=tokens, temperature=0.7, seed=seed, draft="none"))
            for seed, ids in enumerate(prompts)
        ]
        for ids, handle in zip(prompts, handles, strict=True):
            made.append(Conversation([*ids, *handle.result().token_ids], len(ids)))
    if kept is not None:
        kept.write_text(json.dumps([vars(each) for each in made]))
    return made


def ways(
    found: Checkpoint, calibration: Sequence[Sequence[int]], wanted: Callable[[str], bool]
) -> Iterator[tuple[str, Method, bool]]:
    """Name, method, and whether lm_head is int8 too; layers for a budget are chosen only where the name is wanted."""
    c = found.config
    yield "W8A8 without smoothing, to nearest", W8A8(c, smooth=False), False
    yield "W8A8 as published (alpha 0.5, to nearest)", W8A8(c, 0.5), False
    yield "W8A8 alpha 0.8, GPTQ (llm-compressor's recipe)", W8A8(c, 0.8, rounding="gptq"), False
    yield "W8A8 alpha 0.5, GPTQ", W8A8(c, 0.5, rounding="gptq"), False
    default = ("qkv", "down")
    for wide in ((), ("down",), default, LINEARS):
        words = f", 12-bit inputs before {', '.join(wide)}" if wide else ""
        recipe = Recipe(wide=wide)
        yield f"W8A8 fitted, GPTQ{words}", recipe.method(c), False
        name = f"W8A8 fitted, GPTQ{words}, budget 2%"
        if wide in ((), default) and wanted(name):
            budget = int(0.02 * pass_bytes(c))
            chosen = choose_kept(c, found.weights, found.backend, recipe.method(c), calibration, budget)
            print(f"budget 2%: {describe(chosen, pass_bytes(c))}", flush=True)
            kept = recipe.method(c, [(each.layer, each.name) for each in chosen])
            yield name, kept, False
    yield "W8A8, the default, lm_head int8", DEFAULT_RECIPE.method(c), True
    yield "W8A8, the default, lm_head int8 under int8 inputs", Recipe(wide=("qkv", "down")).method(c), True
    yield "W4A16 symmetric 128, rotated, to nearest", Int4(c), False
    for group in (32, 128):
        for whole in (False, True):
            zeros = "whole zero points" if whole else "zero points"
            method = Int4(c, group=group, symmetric=False, rotated=False, rounding="gptq", whole_zeros=whole)
            yield f"W4A16 groups of {group}, {zeros}, GPTQ", method, False


@torch.inference_mode()
def measure(
    found: Checkpoint, method: Method, int8: bool, calibration: list[list[int]], texts: list[Conversation]
) -> tuple[list[str], int]:
    """Figures over whole conversations and over questions alone; bytes of a pass."""
    walk = LayerQuantizer(found.config, found.weights, found.backend, method, calibration, [t.ids for t in texts])
    states = walk.start()
    nbytes = 0
    for index in range(found.config.num_layers):
        _, layer, states = walk.layer(index, states)
        nbytes += sum(getattr(layer, name).nbytes for name in ("qkv", "o", "gate_up", "down"))
    before = found.weights.head(found.weights.embedding())
    after = method.head(before)
    after = int8_head(after, wide="lm_head" in method.wide) if int8 else after
    full, quantized = build(before.lm_head, found.backend), build(after.lm_head, found.backend)
    whole, questions = FidelityTally(), FidelityTally()
    for text, x, y in zip(texts, states.full, states.quantized, strict=True):
        p, q = walk.log_probs(full, before.norm, x), walk.log_probs(quantized, after.norm, y)
        whole.add(p, q, text.ids[1:])
        asked = text.question - 1
        questions.add(p[:asked], q[:asked], text.ids[1 : asked + 1])
    cells = []
    for figures in (whole.figures(), questions.figures()):
        cells += [f"{figures.mean_kl:.2e}", f"{figures.top1_agreement:.1%}"]
    return cells, nbytes + quantized.nbytes


def measure_checkpoint(found: Checkpoint, name: str, texts: Sequence[Conversation]) -> tuple[list[str], int]:
    """As `measure`, of a checkpoint that holds the model quantised."""
    full, theirs = found.decoder(), load(name).decoder
    cells = []
    for sequences in ([text.ids for text in texts], [text.ids[: text.question] for text in texts]):
        figures = FidelityProbe(full, sequences).compare(theirs)
        cells += [f"{figures.mean_kl:.2e}", f"{figures.top1_agreement:.1%}"]
    return cells, theirs.weight_bytes_per_pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--questions", type=Path, default=ASSETS / "questions.jsonl", metavar="FILE")
    parser.add_argument("--calibration", type=Path, metavar="FILE")
    parser.add_argument("--count", type=int, default=16, help="questions of each file (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer at most (default: %(default)s)")
    parser.add_argument("--samples", type=Path, metavar="DIR", help="keep sampled answers here")
    parser.add_argument(
        "--only", default="", metavar="WORDS", help="ways whose name holds one of these, with ; between"
    )
    parser.add_argument("--checkpoint", metavar="DIR", help="measure what another program made of the model, too")
    parser.add_argument(
        "--keep-calibration", type=Path, metavar="FILE", help="write the calibration texts for it, JSONL of input_ids"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw KL against bytes (needs matplotlib)")
    args = parser.parse_args()
    found = open_model(args.model, LoadOptions())
    if args.calibration is None:
        calibration, _ = calibration_and_heldout(found.config, found.tokenizer)
    else:
        calibration = [t.ids for t in sampled(found, args.calibration, args.count, args.tokens, args.samples)]
    if args.keep_calibration is not None:
        args.keep_calibration.write_text("".join(json.dumps({"input_ids": list(ids)}) + "\n" for ids in calibration))
    texts = sampled(found, args.questions, args.count, args.tokens, args.samples)
    measured = sum(len(text.ids) for text in texts)
    print(f"{args.model}: {sum(map(len, calibration))} tokens to calibrate on, {measured} to measure on")
    points: list[tuple[str, float, float]] = []
    heads = ["way", "KL, conversations", "top-1", "KL, questions", "top-1", "MB a pass", "CPU seconds"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")

    def wanted(name: str) -> bool:
        return any(words in name for words in args.only.split(";"))

    for name, method, int8 in ways(found, calibration, wanted):
        if wanted(name):
            clock = time.process_time()
            cells, nbytes = measure(found, method, int8, calibration, texts)
            seconds = time.process_time() - clock
            print(f"| {name} | {' | '.join(cells)} | {nbytes / 1e6:.1f} | {seconds:.0f} |", flush=True)
            points.append((name, nbytes / 1e6, float(cells[0])))
    if args.checkpoint is not None:
        cells, nbytes = measure_checkpoint(found, args.checkpoint, texts)
        print(f"| {args.checkpoint} | {' | '.join(cells)} | {nbytes / 1e6:.1f} | |")
    if args.plot is not None:
        draw(args.plot, args.model, points)


def draw(path: Path, model: str, points: list[tuple[str, float, float]]) -> None:
    """KL on conversations against megabytes of a pass, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    together: dict[tuple[float, float], list[int]] = {}  # points that the eye cannot tell apart share their numbers
    for number, (name, megabytes, kl) in enumerate(points, 1):
        axes.plot(megabytes, kl, "o", color="C0" if name.startswith("W8A8") else "C1")
        near = next((at for at in together if at[0] == megabytes and 0.8 < at[1] / kl < 1.25), (megabytes, kl))
        together.setdefault(near, []).append(number)
    for at, numbers in together.items():
        label = ", ".join(map(str, numbers))
        axes.annotate(label, at, textcoords="offset points", xytext=(6, -3), fontsize=8)
    names = "\n".join(f"{number}  {name}" for number, (name, _, _) in enumerate(points, 1))
    axes.text(1.04, 0.5, names, transform=axes.transAxes, fontsize=8, va="center", linespacing=1.5)
    axes.set_yscale("log")
    axes.set_xlabel("MB that a pass reads")
    axes.set_ylabel("mean KL to full precision, nats")
    axes.set_title(f"{model}, its own conversations", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, bbox_inches="tight")


if __name__ == "__main__":
    try:
        main()
    except QuasarError as error:
        print(f"quantization_quality: {error}", file=sys.stderr)
        raise SystemExit(2) from None
