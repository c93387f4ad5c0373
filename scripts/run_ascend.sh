#!/usr/bin/env bash
# Generate on an Ascend NPU, from an empty shell: find CANN, check the machine, quantise on first use, generate.
#
#   bash scripts/run_ascend.sh [--check | --verify] [--model PATH] [flags of quasar generate]
#
# --check only reports. --verify looks at every operator, captured passes, token ids and speed, in under five minutes, and
# writes quasar-ascend-report.txt (--report FILE) to paste into an issue. The model is a folder, a hub name or a shipped
# one (default: tiny-openpangu); its W8A8 copy is kept beside it as PATH-quasar-w8a8 (for names: in ~/.cache/quasar).
#   PYTHON                       the interpreter that has torch and torch-npu (default: python3)
#   ASCEND_RT_VISIBLE_DEVICES    which NPUs; unset, the one with the most free memory
#   QUASAR_ASCEND_EMULATED=1     no NPU: the emulated device of tests/ascend (scripts/test_ascend.sh makes its
#                                environment, QUASAR_VENV_ASCEND, default .venv-ascend)
#
# In a container of Ascend's images (quay.io/ascend/cann, quay.io/ascend/vllm-ascend), from the checkout:
#   docker run --rm -it --shm-size=1g --device /dev/davinci0 --device /dev/davinci_manager --device /dev/devmm_svm \
#     --device /dev/hisi_hdc -v /usr/local/dcmi:/usr/local/dcmi -v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi \
#     -v /usr/local/Ascend/driver/lib64:/usr/local/Ascend/driver/lib64 \
#     -v /usr/local/Ascend/driver/version.info:/usr/local/Ascend/driver/version.info \
#     -v /etc/ascend_install.info:/etc/ascend_install.info -v "$PWD:/quasar" -v /path/to/models:/models -w /quasar \
#     quay.io/ascend/vllm-ascend:TAG bash scripts/run_ascend.sh --verify
set -euo pipefail
cd "$(dirname "$0")/.."

check_only='' verify='' trust='' report_file=() model=tiny-openpangu precision=w8a8 flags=() for_quantize=()
while [ $# -gt 0 ]; do
    case "$1" in
        --check) check_only=1 ;;
        --verify) verify=1 ;;
        --report)
            [ $# -gt 1 ] || { echo "run_ascend.sh: --report needs a file" >&2; exit 2; }
            report_file=(--report "$2")
            shift
            ;;
        --report=*) report_file=("$1") ;;
        --model)
            [ $# -gt 1 ] || { echo "run_ascend.sh: --model needs a folder or a name" >&2; exit 2; }
            model="$2"
            shift
            ;;
        --model=*) model="${1#*=}" ;;
        --precision)
            precision="${2-}"
            flags+=("$1")
            ;;
        --calibration | --heldout | --alpha | --lm-head)
            flags+=("$1")
            for_quantize+=("$1" "${2-}")
            ;;
        *)
            case "$1" in
                --precision=*) precision="${1#*=}" ;;
                --dummy | --dummy=*) model='' ;;       # random weights instead of a model
                --lossless) precision=full ;;          # needs the model itself, and quantises it in memory
                --trust-remote-code)
                    trust=1
                    for_quantize+=("$1")
                    ;;
                --force | --calibration=* | --heldout=* | --alpha=* | --lm-head=*)
                    for_quantize+=("$1")
                    ;;
            esac
            flags+=("$1")
            ;;
    esac
    shift
done

missing=0
report() {  # report ok|WARN|MISSING TEXT: only what is MISSING ends the run
    printf '%-8s%s\n' "$1" "$2" >&2
    [ "$1" != MISSING ] || missing=1
}

emulated="${QUASAR_ASCEND_EMULATED:-0}"
if [ "$emulated" = 1 ]; then
    python="${QUASAR_VENV_ASCEND:-.venv-ascend}/bin/python"
    [ -x "$python" ] || { report MISSING "$python: make it with bash scripts/test_ascend.sh"; exit 1; }
    export TORCH_DEVICE_BACKEND_AUTOLOAD=0 PYTHONPATH="tests/ascend${PYTHONPATH:+:$PYTHONPATH}"
    launch=("$python" -m emulated_npu)
else
    python="${PYTHON:-python3}"
    launch=("$python" -m)
    export PYTORCH_NPU_ALLOC_CONF="${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}"
    command -v "$python" >/dev/null || { report MISSING "$python: install Python 3.10 or later, or set PYTHON"; exit 1; }

    # Level 2 cannot capture graphs.
    export TASK_QUEUE_ENABLE="${TASK_QUEUE_ENABLE:-1}"
    # In an environment that works already (a container's, say) nothing is sourced a second time.
    if "$python" -c 'import torch, torch_npu' >/dev/null 2>&1; then
        report ok "CANN environment: already there"
    else
        found=
        for root in "${ASCEND_TOOLKIT_HOME:-}" /usr/local/Ascend/ascend-toolkit /usr/local/Ascend/cann \
            "$HOME/Ascend/ascend-toolkit" "$HOME/Ascend/cann"; do
            for file in "$root/set_env.sh" "$(dirname "${root:-/}")/set_env.sh"; do
                if [ -n "$root" ] && [ -z "$found" ] && [ -f "$file" ]; then found="$file"; fi
            done
        done
        # They read variables that may be unset, and may return non-zero though all is well.
        set +eu
        if [ -n "$found" ]; then
            # shellcheck disable=SC1090
            source "$found"
            report ok "CANN environment: $found"
        else
            report MISSING "CANN: no set_env.sh under /usr/local/Ascend or ~/Ascend: install the CANN toolkit and kernels"
        fi
        for file in /usr/local/Ascend/nnal/atb/set_env.sh "$HOME/Ascend/nnal/atb/set_env.sh"; do
            # shellcheck disable=SC1090
            if [ -f "$file" ]; then source "$file"; break; fi
        done
        set -euo pipefail
    fi

    # Whether the NPU can be used, torch-npu says (below). Without these it may work, and often does in containers.
    driver=/usr/local/Ascend/driver/version.info
    if [ -f "$driver" ]; then
        report ok "driver $(sed -n 's/^[Vv]ersion=//p' "$driver" | head -n 1)"
    else
        report WARN "NPU driver: no $driver: install the Ascend driver and firmware (in a container: mount it)"
    fi
    if ! command -v npu-smi >/dev/null; then
        report WARN "npu-smi: it comes with the driver (in a container: mount /usr/local/bin/npu-smi)"
    elif ! npu-smi info >/dev/null 2>&1; then
        report WARN "npu-smi info fails: the user must be in group HwHiAiUser, /dev/davinci* visible"
    else
        report ok "npu-smi sees the NPUs"
    fi
fi

# A module of Quasar on the device.
quasar() { "${launch[@]}" "$@"; }

if "$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))'; then
    said="$(quasar quasar_npu.check ${model:+"$model"} 2>&1)" || missing=1
    # What is not a finding is a warning of somebody else's, or the reason why the check could not run at all.
    findings="$(grep -E '^(ok|WARN|MISSING) ' <<<"$said")" || findings="MISSING $(tail -n 1 <<<"$said")"
    printf '%s\n' "$findings" >&2
    if [ -z "${ASCEND_RT_VISIBLE_DEVICES:-}" ]; then  # the check looks at the one with the most free memory
        picked="$(sed -n 's/^ok *NPU \([0-9]*\):.*/\1/p' <<<"$findings")"
        [ -z "$picked" ] || export ASCEND_RT_VISIBLE_DEVICES="$picked"
    fi
else
    report MISSING "torch: pip install torch torch-npu, or set PYTHON to an interpreter that has them"
fi
if [ "$missing" = 1 ] && [ "$emulated" != 1 ] && [ ! -e /dev/davinci_manager ]; then
    echo "No /dev/davinci_manager here: in a container, start it with the docker line at the top of this script." >&2
fi
if [ -n "$check_only" ] || [ "$missing" = 1 ]; then exit "$missing"; fi
if [ -n "$verify" ]; then
    exec "${launch[@]}" quasar_npu.verify ${model:+--model "$model"} ${trust:+--trust-remote-code} \
        "${report_file[@]+"${report_file[@]}"}"
fi

# Quantised once, on first use. A checkpoint that is quantised already is taken as it is.
quantised() {
    [ -n "$(find "$1" -maxdepth 1 -name 'quant_model_description*.json' 2>/dev/null)" ] ||
        grep -q '"quantization_config"' "$1/config.json" 2>/dev/null
}
if [ "$precision" = w8a8 ] && [ -n "$model" ] && ! quantised "$model"; then
    if [ -d "$model" ]; then
        copy="${model%/}-quasar-w8a8"
    else
        copy="${XDG_CACHE_HOME:-$HOME/.cache}/quasar/${model//\//--}-w8a8"
    fi
    if [ ! -e "$copy" ]; then
        echo "quantising $model into $copy (once)" >&2
        scheme=w8a8 device=npu
        if grep -q 'inference card' <<<"$findings"; then scheme=w8a8-static device=cpu; fi # no bfloat16 to calibrate in
        if [ "$emulated" = 1 ]; then device=cpu; fi # the same numbers, without emulating millions of launches
        mkdir -p "$(dirname "$copy")"
        quasar quasar.cli quantize --model "$model" --output "$copy" --format ascend --scheme "$scheme" \
            --device "$device" "${for_quantize[@]+"${for_quantize[@]}"}"
    fi
    model="$copy"
fi

[ ${#flags[@]} -gt 0 ] || flags=("class Stack:")
exec "${launch[@]}" quasar_npu.generate ${model:+--model "$model"} "${flags[@]}"
