"""Golden folders (made by scripts/test_interop.sh with the real tools), and small checkpoints to export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small cost more to share than to multiply, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """small("qwen3" | "qwen3-tied" | "openpangu"): a checkpoint of random weights with a byte tokenizer."""
    made = {"qwen3": GOLDEN / "small-qwen3"}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = folder = tmp_path_factory.mktemp("small") / family
            shutil.copytree(GOLDEN / "small-qwen3", folder)
            {"qwen3-tied": _tie, "openpangu": _make_openpangu}[family](folder)
        return made[family]

    return make


def _tie(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))


def _make_openpangu(folder: Path) -> None:
    """No norms on q and k, biases on q, k, v and o."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: t for name, t in load_file(folder / "model.safetensors").items() if "_norm." not in name}
    for name in [name for name in tensors if "self_attn" in name]:
        bias = torch.randn(len(tensors[name]), generator=generator) * 0.3
        tensors[name.replace("weight", "bias")] = bias.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | {
        "architectures": ["PanguEmbeddedForCausalLM"],
        "model_type": "PanguEmbedded",
        "bias": True,
    }
    del fields["rope_scaling"]  # null; transformers warns of the name
    path.write_text(json.dumps(fields))


@pytest.fixture
def golden(tmp_path: Path) -> Callable[[str], Path]:
    """golden(name): a copy that may be spoiled."""
    return lambda name: Path(shutil.copytree(GOLDEN / name, tmp_path / name))


@pytest.fixture
def edit() -> Callable[..., None]:
    """edit(folder, changes): replaces, adds (a Tensor), or removes (None) tensors; a callable gets the old one."""

    def apply(folder: Path, changes: dict[str, Any]) -> None:
        left = dict(changes)
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            for name in [name for name in left if name in tensors]:
                change = left.pop(name)
                if change is None:
                    del tensors[name]
                else:
                    tensors[name] = change(tensors[name]).contiguous() if callable(change) else change
            save_file(tensors, file, metadata={"format": "pt"})
        assert not left, f"no such tensors: {list(left)}"

    return apply


@pytest.fixture
def edit_json() -> Callable[[Path, Callable[[dict[str, Any]], Any]], None]:
    """edit_json(path, change): has change() work on the object in the file."""

    def apply(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        fields = json.loads(path.read_text())
        change(fields)
        path.write_text(json.dumps(fields))

    return apply
