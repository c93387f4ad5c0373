#!/usr/bin/env bash
# Sets up and runs every test, the Ascend ones in an environment of their own (scripts/test_ascend.sh).
# Arguments go to pytest, and then the Ascend tests are left to their own script.
source "$(dirname "$0")/setup_cpu.sh" "[test]"
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check --quiet .
"$VENV/bin/python" -m pytest "$@"
[ $# -gt 0 ] || bash scripts/test_ascend.sh
