"""Every drafter, precision and gamma against plain decoding on a real model: the ids must be the same.

python scripts/experiments/check_speculation.py --model smollm2 --prompts QUESTIONS.jsonl --log FILE

Random prompts are ids drawn from the whole vocabulary, 1 to --longest of them; real ones are the texts of JSONL or .txt
files, in the model's chat template where it has one. Each prompt is decoded plainly once for each precision, greedily
and with a seed, and compared with --each of the combinations, in turn, so that all of them come up equally often. The
log holds a line for each comparison; a run that was interrupted goes on from it. Exits with 1 where ids differ.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from quasar import GenerationSettings, Model, QuasarError, generate, load
from quasar.quantization.calibration import read_texts
from quasar.reading import read_text

DRAFTS = ("ngram", "suffix", "hybrid", "recycling", "text", "self:skip=4")
PRECISIONS = ("full", "w8a8", "w4a16", "w4a4")
GAMMAS = (None, 1, 2, 5, 11, 32)
CASCADE = "cascade"  # a precision of its own here: w8a8, confirmed by full precision


def combinations(precisions: list[str], drafts: list[str]) -> list[tuple[str, str, int | None, float]]:
    """(precision, draft, gamma, temperature), shuffled so that neighbours have little in common."""
    found = [
        combination
        for combination in itertools.product(precisions, [*drafts, "self:w4a4"], GAMMAS, (0.0, 0.8))
        if combination[1] != "self:w4a4" or combination[0] == "w4a16"
    ]
    random.Random(0).shuffle(found)
    return found


def prompts(model: Model, args: argparse.Namespace) -> Iterator[tuple[str, list[int]]]:
    """(kind, token ids): the random ones and the real ones take turns."""
    dice = random.Random(args.seed)
    vocabulary = model.config.vocab_size
    made = [[dice.randrange(vocabulary) for _ in range(dice.randint(1, args.longest))] for _ in range(args.random)]
    texts = [text for name in args.prompts for text in texts_of(Path(name))]
    dice.shuffle(texts)
    chat = bool(model.tokenizer and model.tokenizer.chat_template)
    real = [model.encode(text, chat=chat)[: args.longest] for text in texts[: args.real]]
    for pair in itertools.zip_longest(made, real):
        yield from ((kind, ids) for kind, ids in zip(("random", "real"), pair, strict=True) if ids)


def texts_of(path: Path) -> list[str]:
    """Of a .txt file its paragraphs, else a text for each line."""
    if path.suffix == ".txt":
        return [part for part in read_text(path).split("\n\n") if part.strip()]
    return read_texts(path)


class Models:
    """The model in each precision, loaded when it is asked for."""

    def __init__(self, name: str, device: str) -> None:
        self._name, self._device, self._made = name, device, {}

    def __getitem__(self, precision: str) -> Model:
        if precision not in self._made:
            own = "w8a8" if precision == CASCADE else precision
            self._made[precision] = load(
                self._name, device=self._device, precision=own, lossless=precision == CASCADE, force=True
            )
        return self._made[precision]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", nargs="*", default=[], metavar="FILE", help="JSONL, or .txt of paragraphs")
    parser.add_argument("--random", type=int, default=200, metavar="N")
    parser.add_argument("--real", type=int, default=100, metavar="N")
    parser.add_argument("--longest", type=int, default=200, metavar="N", help="tokens of a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--each", type=int, default=12, metavar="N", help="combinations for each prompt")
    parser.add_argument("--precisions", default=",".join((*PRECISIONS, CASCADE)), metavar="P,P")
    parser.add_argument("--drafts", default=",".join(DRAFTS), metavar="D,D")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", required=True, type=Path, metavar="FILE")
    args = parser.parse_args()
    done = [json.loads(line) for line in args.log.read_text().splitlines()] if args.log.exists() else []
    seen = {(row["prompt"], *row["combination"]) for row in done}
    models = Models(args.model, args.device)
    turns = itertools.cycle(combinations(args.precisions.split(","), args.drafts.split(",")))
    work = list(prompts(models["full"], args))
    with args.log.open("a") as log:
        for number, (kind, ids) in enumerate(tqdm(work, unit="prompt", disable=not sys.stderr.isatty())):
            plain: dict[Any, list[int]] = {}
            for combination in itertools.islice(turns, args.each):
                if (number, *combination) not in seen:
                    row = {"prompt": number, "kind": kind, "combination": combination}
                    done.append(row | compare(models, ids, combination, args.max_new_tokens, plain))
                    log.write(json.dumps(done[-1]) + "\n")
                    log.flush()
    sys.exit(report(args, done))


def compare(
    models: Models,
    ids: list[int],
    combination: tuple[str, str, int | None, float],
    tokens: int,
    plain: dict[Any, list[int]],
) -> dict[str, Any]:
    """What one combination decodes after a prompt, against what `plain` holds or gets."""
    precision, draft, gamma, temperature = combination
    settings = GenerationSettings(
        max_new_tokens=tokens, temperature=temperature, seed=len(ids), draft="none", ignore_eos=True
    )
    # The cascade's text is full precision's.
    verifier = "full" if precision == CASCADE else precision
    if (verifier, temperature) not in plain:
        plain[verifier, temperature] = generate(models[verifier], ids, settings).result().token_ids
    expected = plain[verifier, temperature]
    settings = replace(settings, draft=draft, gamma=gamma, lossless=precision == CASCADE)
    result = generate(models[precision], ids, settings).result()
    same = next((i for i, pair in enumerate(zip(expected, result.token_ids, strict=False)) if pair[0] != pair[1]), None)
    equal = result.token_ids == expected
    return {"prompt_tokens": len(ids), "tokens": len(expected), "accepted": result.stats.accepted, "equal": equal} | (
        {} if equal else {"differs_at": same, "ids": ids}
    )


def report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> int:
    """Prints the counts; 1 where ids differ."""
    prompts = {kind: len({row["prompt"] for row in rows if row["kind"] == kind}) for kind in ("random", "real")}
    tokens, accepted = (sum(row[name] for row in rows) for name in ("tokens", "accepted"))
    wrong = [row for row in rows if not row["equal"]]
    print(
        f"{args.model}: {len(rows)} comparisons on {prompts['random']} random and {prompts['real']} real prompts, "
        f"{tokens} tokens, {accepted} of them drafted; {len(wrong)} comparisons differ"
    )
    for title, at in (("precision", 0), ("draft", 1), ("gamma", 2), ("temperature", 3)):
        counts, bad = (Counter(_name(row["combination"][at]) for row in part) for part in (rows, wrong))
        print(f"  {title}: " + ", ".join(f"{name} {bad[name]} of {counts[name]}" for name in sorted(counts)))
    return 1 if wrong else 0


def _name(value: object) -> str:
    return "auto" if value is None else str(value)


if __name__ == "__main__":
    try:
        main()
    except QuasarError as error:
        sys.exit(f"check_speculation: {error}")
