#!/usr/bin/env bash
# Runs the tests of the C kernels, of recorded passes, of batches and of the engine with the C extension built by gcc's
# sanitizers. About a quarter of an hour on two cores, a third of it the first build.
#
#   scripts/test_sanitizers.sh              AddressSanitizer and UndefinedBehaviorSanitizer
#   scripts/test_sanitizers.sh thread       ThreadSanitizer
#   scripts/test_sanitizers.sh address -k tree      further arguments go to pytest
#
# The build goes into a copy of the checkout, build/sanitizers-KIND, and only what has changed is compiled again; the
# extension in use stays as it is. PYTHON chooses the interpreter, JOBS how many files are compiled at once.
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
# Under sanitizers a kernel takes ten times as long: of the tests those that run every kernel, and not all their cases.
tests=(tests/backends/cpu tests/engine/test_engine.py tests/test_any_drafter_any_verifier.py)
few=(-k "not reference and not distribution and not shipped")

copy=build/sanitizers-$kind
mkdir -p "$copy"
rm -rf "$copy/common" "$copy/tests" # files that the checkout has no more
git ls-files -z --cached --others --exclude-standard |
    xargs -0 cp --parents --preserve=timestamps -t "$copy" 2>/dev/null || true
cd "$copy"
source=common/backends/cpu/csrc
include=$("$python" -c "import sysconfig; print(sysconfig.get_path('include'))")
# -O1: what the sanitizers add makes -O3 compile for half an hour.
options="$flags -O1 -g1 -fno-omit-frame-pointer -fPIC -std=gnu11 -ffp-contract=off -fno-math-errno -w"
compile() {
    newest=$(ls -t "$1" "$source"/*.h | head -1)
    object="objects/$(basename "$1" .c).o"
    if [ ! -e "$object" ] || [ "$newest" -nt "$object" ]; then
        # shellcheck disable=SC2086 - a list of options
        gcc $options -DPy_LIMITED_API=0x030A0000 -I "$include" -c "$1" -o "$object.new" && mv "$object.new" "$object"
    fi
}
export -f compile
export source include options
mkdir -p objects
printf '%s\n' "$source"/*.c | xargs -P "${JOBS:-$(nproc)}" -I{} bash -c 'compile {}'
# shellcheck disable=SC2086
gcc $flags -shared objects/*.o -lm -ldl -o common/backends/cpu/_kernels.abi3.so

# Leaks: the interpreter's own. Thread: only code built here is looked at, since torch and Python are not instrumented.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1 exitcode=66"
# Without address randomisation: ThreadSanitizer's own map of memory leaves no room for it.
exec_in_fixed_memory=()
if [ "$kind" = thread ]; then exec_in_fixed_memory=(setarch "$(uname -m)" --addr-no-randomize); fi
if [ $# -gt 0 ]; then few=("$@"); fi
LD_PRELOAD="$preload" "${exec_in_fixed_memory[@]}" "$python" -X faulthandler -m pytest -q -p no:cacheprovider \
    "${tests[@]}" "${few[@]}"
