"""What each way to quantise costs on text that the model writes itself: KL against bytes, on a real chat model.

    python scripts/experiments/quantization_quality.py --questions HELDOUT.jsonl --calibration CALIBRATION.jsonl

Answers are sampled from the full-precision model at temperature 0.7: those of CALIBRATION are what methods see, those
of HELDOUT (questions of other kinds) what they are measured on, whole conversations and questions alone. Both files are
JSONL with a text, prompt, inputs_pretokenized or turns field. --samples keeps the answers for the next run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quasar import Engine, GenerationSettings
from quasar.models.build import build
from quasar.models.config import ModelConfig
from quasar.models.model import Checkpoint, LoadOptions, open_model
from quasar.quantization.budget import choose_kept, describe
from quasar.quantization.calibration import read_texts
from quasar.quantization.fidelity import FidelityTally
from quasar.quantization.methods import W8A8, Int4, Method, int8_head
from quasar.quantization.recipe import pass_bytes
from quasar.quantization.stream import LayerQuantizer


@dataclass(frozen=True)
class Conversation:
    """Token ids of a question in the chat template and of its answer; `question` counts those of the question."""

    ids: list[int]
    question: int


def sampled(found: Checkpoint, path: Path, count: int, tokens: int, samples: Path | None) -> list[Conversation]:
    """The file's first `count` questions with the model's answers of up to `tokens` tokens."""
    kept = None if samples is None else samples / f"{path.stem}-{count}-{tokens}.json"
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


def ways(found: Checkpoint, calibration: Sequence[Sequence[int]]) -> Iterator[tuple[str, Method, bool]]:
    """Name, method, and whether lm_head is int8 too."""
    c = found.config
    yield "W8A8 as published (alpha 0.5, to nearest)", W8A8(c, 0.5), False
    yield "W8A8 alpha 0.5, GPTQ", W8A8(c, 0.5, rounding="gptq"), False
    yield "W8A8 fitted, to nearest", W8A8(c, "fitted"), False
    yield "W8A8 fitted, GPTQ", W8A8(c, "fitted", rounding="gptq"), False
    for name, budget, int8 in (("2%", int(0.02 * pass_bytes(c)), False), ("lm_head's saving", _saved(c), True)):
        chosen = choose_kept(c, found.weights, found.backend, W8A8(c, "fitted"), calibration, budget)
        print(f"budget {name}: {describe(chosen, pass_bytes(c))}", flush=True)
        keep = [(each.layer, each.name) for each in chosen]
        yield f"W8A8 fitted, GPTQ, budget {name}", W8A8(c, "fitted", rounding="gptq", keep=keep), int8
    yield "W4A16 symmetric 128, rotated, to nearest", Int4(c), False
    for group in (32, 128):
        for whole in (False, True):
            zeros = "whole zero points" if whole else "zero points"
            method = Int4(c, group=group, symmetric=False, rotated=False, rounding="gptq", whole_zeros=whole)
            yield f"W4A16 groups of {group}, {zeros}, GPTQ", method, False


def _saved(c: ModelConfig) -> int:
    """Bytes of a pass that an int8 lm_head saves."""
    return c.vocab_size * c.hidden_size * (c.dtype.itemsize - 1)


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
    after = int8_head(after) if int8 else after
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--questions", type=Path, required=True, metavar="FILE")
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE")
    parser.add_argument("--count", type=int, default=16, help="questions of each file (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer at most (default: %(default)s)")
    parser.add_argument("--samples", type=Path, metavar="DIR", help="keep sampled answers here")
    parser.add_argument("--only", default="", metavar="WORD", help="ways whose name holds this")
    args = parser.parse_args()
    found = open_model(args.model, LoadOptions())
    calibration = [t.ids for t in sampled(found, args.calibration, args.count, args.tokens, args.samples)]
    texts = sampled(found, args.questions, args.count, args.tokens, args.samples)
    measured = sum(len(text.ids) for text in texts)
    print(f"{args.model}: {sum(map(len, calibration))} tokens to calibrate on, {measured} to measure on")
    heads = ["way", "KL, conversations", "top-1", "KL, questions", "top-1", "MB a pass", "CPU seconds"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name, method, int8 in ways(found, calibration):
        if args.only in name:
            clock = time.process_time()
            cells, nbytes = measure(found, method, int8, calibration, texts)
            seconds = time.process_time() - clock
            print(f"| {name} | {' | '.join(cells)} | {nbytes / 1e6:.1f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
