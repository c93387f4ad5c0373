"""Answers a model's questions, sampled: how the built-in conversations were made.

    python scripts/experiments/sample_conversations.py QUESTIONS.jsonl OUT.jsonl --seed 0

QUESTIONS are JSONL with a prompt field, or a file of conversations whose first turns are asked again. Each question
goes into the model's chat template, and the full-precision model answers at temperature 0.7.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from quasar import Engine, GenerationSettings, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer at most (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first answer (default: %(default)s)")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.questions.read_text(encoding="utf-8").splitlines()]
    questions = [row["messages"][0]["content"] if "messages" in row else row["prompt"] for row in rows]
    model = load(args.model, precision="full")
    lines = []
    with Engine(model) as engine:
        handles = []
        for seed, question in enumerate(questions, args.seed):
            settings = GenerationSettings(max_new_tokens=args.tokens, temperature=0.7, seed=seed)
            handles.append(engine.submit(model.encode(question, chat=True), settings))
        for question, handle in zip(questions, handles, strict=True):
            answer = {"role": "assistant", "content": handle.result().text.strip()}
            lines.append(json.dumps({"messages": [{"role": "user", "content": question}, answer]}, ensure_ascii=False))
    args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
