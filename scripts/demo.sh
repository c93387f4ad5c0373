#!/usr/bin/env bash
# Sets up and runs the main job on the shipped model: real text, W8A8, n-gram drafts, and what it saved.
source "$(dirname "$0")/setup_cpu.sh" ""
prompt=${1:-class Stack:}
# Sampled: a model this small loops when decoded greedily, which flatters every drafter.
sampling=(--temperature 0.7 --top-p 0.95 --seed 1)
echo "== quasar generate: W8A8 with n-gram drafts, streamed ==" >&2
"$VENV/bin/quasar" generate "$prompt" --max-new-tokens 96 "${sampling[@]}"
echo >&2
echo "== quasar compare: the same prompt by every scheme ==" >&2
"$VENV/bin/quasar" compare "$prompt" --max-new-tokens 256 --ignore-eos "${sampling[@]}"
echo >&2
echo "== the same behind OpenAI's interface, with a page to chat on: quasar serve (docs/serving.md) ==" >&2
