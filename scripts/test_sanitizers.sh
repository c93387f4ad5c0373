#!/usr/bin/env bash
# Runs the tests of the C kernels, of recorded passes and of batches with the C extension built by gcc's sanitizers.
#
#   scripts/test_sanitizers.sh              AddressSanitizer and UndefinedBehaviorSanitizer
#   scripts/test_sanitizers.sh thread       ThreadSanitizer
#   scripts/test_sanitizers.sh address -k tree      further arguments go to pytest
#
# The build goes into a copy of the checkout, so that the extension in use stays as it is. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
kind=${1:-address}
shift || true
case "$kind" in
address)
    flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined"
    preload="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
    ;;
thread)
    flags="-fsanitize=thread"
    preload="$(gcc -print-file-name=libtsan.so)"
    ;;
*)
    echo "$0: unknown sanitizer '$kind': address or thread" >&2
    exit 2
    ;;
esac
tests=(tests/backends/cpu/test_cpu_kernels.py tests/backends/cpu/test_cpu_int4.py tests/backends/cpu/test_segments.py
    tests/backends/cpu/test_recording.py)

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z | xargs -0 cp --parents -t "$copy" 2>/dev/null || true
cd "$copy"
CFLAGS="$flags -g -fno-omit-frame-pointer" LDFLAGS="$flags" \
    "$python" -c "from setuptools import setup; setup()" -q build_ext --inplace 2>&1 | grep -E "error:" && exit 1

# Leaks: the interpreter's own. Thread: only code built here is looked at, since torch and Python are not instrumented.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1 exitcode=66"
# Without address randomisation: ThreadSanitizer's own map of memory leaves no room for it.
exec_in_fixed_memory=()
if [ "$kind" = thread ]; then exec_in_fixed_memory=(setarch "$(uname -m)" --addr-no-randomize); fi
LD_PRELOAD="$preload" "${exec_in_fixed_memory[@]}" "$python" -X faulthandler -m pytest -q -p no:cacheprovider "${tests[@]}" "$@"
