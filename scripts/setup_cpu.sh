# Sourced by demo.sh and test.sh: makes (or reuses) one virtual environment with the CPU torch and the project in it.
# $1: extras in brackets, as "[test]", or nothing. QUASAR_VENV chooses another folder, PYTHON another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
VENV=${QUASAR_VENV:-.venv}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    { echo "setup: $PYTHON is not Python 3.10 or newer; install one and say PYTHON=/path/to/python3" >&2; exit 2; }

if [ ! -x "$VENV/bin/python" ]; then
    echo "setup: making $VENV (once)" >&2
    "$PYTHON" -m venv "$VENV" ||
        { echo "setup: $PYTHON cannot make virtual environments; install its venv package (python3-venv)" >&2; exit 2; }
fi
# The stamp names what was installed, so that a changed pyproject.toml or kernel source installs again.
stamp="$VENV/.quasar-$(cat pyproject.toml scripts/constraints-cpu.txt common/backends/cpu/csrc/* 2>/dev/null | cksum | tr ' ' '-')${1:-}"
if [ ! -e "$stamp" ]; then
    echo "setup: installing into $VENV" >&2
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c scripts/constraints-cpu.txt -e ".${1:-}"
    rm -f "$VENV"/.quasar-*
    touch "$stamp"
fi
