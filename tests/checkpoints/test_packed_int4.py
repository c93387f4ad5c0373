"""int4 in files: what is written is what is read, and what is no int4 checkpoint is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quasar import QuasarError
from quasar.checkpoints.ascend import AscendFolder, AscendWriter
from quasar.checkpoints.compressed_tensors import pack, unpack
from quasar.checkpoints.weights import Int4Weights


@settings(max_examples=50)
@given(st.integers(1, 9), st.integers(1, 33), st.integers(0, 99))
def test_packing_is_undone(rows: int, n: int, seed: int) -> None:
    values = torch.randint(-8, 8, (rows, n), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    words = pack(values, 4)
    assert words.dtype == torch.int32 and words.shape == (rows, -(-n // 8))
    assert torch.equal(unpack(words, 4)[:, :n], values)


@pytest.mark.parametrize(
    ("values", "word"), [([-8] * 8, 0), ([-7] + [-8] * 7, 1), ([7] * 8, -1), ([-8] * 7 + [0], -(1 << 31))]
)
def test_lowest_bits_come_first(values: list[int], word: int) -> None:
    assert pack(torch.tensor([values], dtype=torch.int8), 4).item() == word


@pytest.fixture
def ascend(tmp_path: Path) -> Callable[..., Int4Weights]:
    """Reads one projection of 32 outputs and 256 inputs from an Ascend checkpoint that holds the given tensors."""

    def read(**tensors: torch.Tensor) -> Int4Weights:
        named = {
            f"proj.{name}": tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        save_file(named, tmp_path / "model.safetensors")
        description = tmp_path / "quant_model_description.json"
        description.write_text(json.dumps(dict.fromkeys(named, "W4A16")))
        return AscendFolder(tmp_path, description).linear("proj", 32, 256, False)

    return read


VALUES = torch.randint(-8, 8, (32, 256), dtype=torch.int8, generator=torch.Generator().manual_seed(0))


def bytes_of(values: torch.Tensor) -> torch.Tensor:
    return (values[..., ::2] & 15 | values[..., 1::2] << 4).to(torch.int8)


@pytest.mark.parametrize("groups", [8, 4, 2, 1])
def test_ascend_weights_are_packed_along_outputs_and_along_inputs_where_one_scale_holds_for_all(
    ascend: Callable[..., Int4Weights], groups: int
) -> None:
    scale = torch.rand(32, groups).bfloat16() + 0.5
    zero = torch.randint(-8, 8, (32, groups)).float()
    weight = bytes_of(VALUES) if groups == 1 else bytes_of(VALUES.t()).t()
    read = ascend(weight=weight, weight_scale=scale.float(), weight_offset=zero)
    size = min(256 // groups, 128)
    wide = 256 // groups // size  # larger groups are several that share their scale
    assert read.group == size and torch.equal(read.values, VALUES)
    assert torch.equal(read.scale, scale.repeat_interleave(wide, 1))
    assert torch.equal(read.offset, (-zero * scale.float()).bfloat16().repeat_interleave(wide, 1))
    again = AscendWriter("w4a16", False, size).linear("proj", read, torch.bfloat16)
    if groups > 1:
        assert torch.equal(again["proj.weight"], weight)
        assert torch.equal(again["proj.weight_scale"], scale.float())
        assert torch.allclose(again["proj.weight_offset"], zero, rtol=2**-8)


def test_ascend_weights_of_early_releases_are_not_packed(ascend: Callable[..., Int4Weights]) -> None:
    ones = torch.ones(32, 8)
    read = ascend(weight=VALUES, weight_scale=ones, weight_offset=ones * 0)
    assert torch.equal(read.values, VALUES) and read.offset is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": VALUES * 3}, "holds values that are no int4"),
        ({"weight": VALUES.int()}, "is int32; W4A16 is stored in int8"),
        ({"weight": VALUES[:, :-8]}, r"proj.weight has shape \[32, 248\]"),
        ({"weight_scale": torch.ones(32, 7)}, r"proj.weight_scale has shape \[32, 7\]"),
        ({"weight_scale": torch.ones(32, 16)}, r"proj.weight_scale has shape \[32, 16\]"),
        ({"weight_scale": torch.zeros(32, 8)}, "not above zero"),
        ({"weight_offset": torch.ones(32, 4)}, r"proj.weight_offset has shape \[32, 4\]"),
        ({"weight_offset": torch.full((32, 8), torch.nan)}, "proj.weight_offset is not finite"),
        ({"weight_offset": torch.ones(32, 8, dtype=torch.int8)}, "proj.weight_offset is int8"),
    ],
)
def test_ascend_weights_that_are_wrong_are_refused_in_one_line(
    ascend: Callable[..., Int4Weights], change: dict[str, torch.Tensor], said: str
) -> None:
    ones = torch.ones(32, 8)
    with pytest.raises(QuasarError, match=said) as error:
        ascend(**{"weight": VALUES, "weight_scale": ones, "weight_offset": ones} | change)
    assert "\n" not in str(error.value)
