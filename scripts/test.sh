#!/usr/bin/env bash
# Sets up and runs every test; arguments go to pytest. The Ascend tests follow in an environment of their own.
source "$(dirname "$0")/setup_cpu.sh" "[test]"
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check --quiet .
"$VENV/bin/python" -m pytest tests "$@"
