#!/usr/bin/env bash
# Run tests/ascend through the real torch_npu on an emulated NPU. Arguments go to pytest.
#
# Makes a second virtual environment, because torch-npu without CANN breaks `import torch` in the first.
#   QUASAR_VENV_ASCEND   where it lies (default: .venv-ascend in the checkout); reused while its recipe stays
#   PYTHON               the interpreter it is made with (default: python3)
#   CI=true              what cannot be tested is a failure, not a skip
#   CC                   the C compiler for the emulated runtime (default: cc or gcc)
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH_NPU="torch-npu==2.13.0"
environment="${QUASAR_VENV_ASCEND:-.venv-ascend}"

skip() {
    echo "Ascend tests skipped: $1"
    # In CI a skip would be a hole that nobody sees.
    [ "${CI:-}" != true ] || exit 1
    exit 0
}

[ "$(uname -s)" = Linux ] || skip "torch-npu is built for Linux only"
command -v "${CC:-cc}" >/dev/null || command -v gcc >/dev/null || skip "no C compiler (install gcc)"

# Importing torch must not load torch_npu by itself: its libraries are there only once the emulation is.
export TORCH_DEVICE_BACKEND_AUTOLOAD=0

recipe="$(cat pyproject.toml scripts/constraints-cpu.txt; echo "$TORCH_NPU"; pwd)"
if [ "$recipe" != "$(cat "$environment/recipe" 2>/dev/null)" ]; then
    echo "making $environment (torch and $TORCH_NPU; once, a few minutes)"
    "${PYTHON:-python3}" -m venv "$environment"
    log="$environment/pip.log"
    install() {
        "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
            --constraint scripts/constraints-cpu.txt "$@" >"$log" 2>&1
    }
    if ! install "$TORCH_NPU" pyyaml; then  # first and alone, so that its absence can be told from other failures
        if grep -q "No matching distribution found for torch-npu" "$log"; then
            skip "the package index has no $TORCH_NPU for $(uname -m) and this Python"
        fi
        cat "$log"
        exit 1
    fi
    install --editable ".[test]" || { cat "$log"; exit 1; }
    echo "$recipe" >"$environment/recipe"
fi

# tests/conftest.py imports models of transformers, which import torch_npu: not before tests/ascend has made it importable.
export QUASAR_ASCEND_TESTS=1
exec "$environment/bin/python" -m pytest --confcutdir=tests/ascend tests/ascend "$@"
