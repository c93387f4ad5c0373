"""Reads the commands that `quasar serve --print` wrote with vLLM's own parser (run in vLLM's environment).

python parse_serve.py FILE...
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main() -> None:
    for file in sys.argv[1:]:
        command = Path(file).read_text().strip()
        program, verb, *words = shlex.split(command)
        assert (program, verb) == ("vllm", "serve"), command
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
        validate_parsed_serve_args(args)
        engine = AsyncEngineArgs.from_cli_args(args)
        engine.model = args.model_tag
        assert args.speculative_config["method"] == "ngram"
        if engine.tensor_parallel_size == 1:  # more devices than are here cannot be configured, only parsed
            config = engine.create_engine_config()
            assert config.speculative_config.num_speculative_tokens == 5
            assert config.model_config.quantization == "compressed-tensors"
        print(f"vLLM takes: {command}")


if __name__ == "__main__":
    main()
