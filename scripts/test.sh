#!/usr/bin/env bash
# Sets up and runs every test, as many at a time as there are cores (four at most: each worker takes 2 GB); the Ascend
# ones in an environment of their own (scripts/test_ascend.sh). Arguments go to pytest, one test runs at a time then, and
# the Ascend tests are left to their own script.
source "$(dirname "$0")/setup_cpu.sh" "[test]"
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check --quiet .
if [ $# -gt 0 ]; then
    exec "$VENV/bin/python" -m pytest "$@"
fi
workers=(-n auto --maxprocesses 4 --dist loadfile)
"$VENV/bin/python" -m pytest "${workers[@]}"
bash scripts/test_ascend.sh "${workers[@]}"
