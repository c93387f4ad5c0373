"""The engines that users would otherwise run, on the same weights, behind the same context.

Each converts the weights itself, from transformers' module, into what its users would have.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

from quasar.errors import QuasarError
from quasar.evaluation.speed import Step
from quasar.models.config import ModelConfig

# Peer -> the packages it needs, as Python imports them and as pip installs them.
_PACKAGES = {
    "transformers": {"transformers": "transformers"},
    "openvino": {"openvino": "openvino", "nncf": "nncf"},
    "llama.cpp": {"llama_cpp": "llama-cpp-python", "gguf": "gguf"},
}
PEERS = tuple(_PACKAGES)


def not_installed() -> dict[str, str]:
    """Peers that could be compared once installed, and the command that installs each."""
    missing = {
        peer: [package for module, package in packages.items() if find_spec(module) is None]
        for peer, packages in _PACKAGES.items()
    }
    return {peer: f"pip install {' '.join(packages)}" for peer, packages in missing.items() if packages}


def require(peer: str, device: torch.device) -> None:
    """Raises QuasarError unless the peer is installed and runs on this device."""
    if command := not_installed().get(peer):
        raise QuasarError(f"--peer {peer} is not installed; {command}")
    if peer != "transformers" and device.type != "cpu":
        raise QuasarError(f"--peer {peer} is compared on CPU only; add --device cpu")


def peer_steps(
    peer: str, config: ModelConfig, folder: Path | None, context: int, most_rows: int, device: torch.device
) -> dict[str, Step]:
    """The peer's passes by name, one for each precision that it offers. folder None takes the random weights that
    `--dummy` has."""
    require(peer, device)
    if peer == "openvino":
        from quasar.evaluation.peers.openvino import openvino_step

        return {"OpenVINO int8": openvino_step(config, folder, context)}
    if peer == "llama.cpp":
        from quasar.evaluation.peers.llama_cpp import llama_cpp_step

        return {"llama.cpp Q8_0": llama_cpp_step(config, folder, context, most_rows)}
    from quasar.evaluation.peers.transformers import transformers_step

    dtypes = (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.bfloat16,)
    return {
        f"transformers {str(dtype).removeprefix('torch.')}": transformers_step(config, folder, context, device, dtype)
        for dtype in dtypes
    }
