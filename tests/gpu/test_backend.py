"""The CUDA backend as far as a machine without a card can test it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quasar import QuasarError
from quasar.backends import get_backend
from quasar_gpu import generate
from quasar_gpu.prompt import padded_int_mm

needs_no_card = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


@given(st.integers(1, 20), st.integers(2, 40), st.integers(1, 40), st.integers(0, 1000))
def test_padding_changes_no_product(tokens, inputs, out, seed):
    g = torch.Generator().manual_seed(seed)
    x, weight = (torch.randint(-128, 128, (n, inputs), dtype=torch.int8, generator=g) for n in (tokens, out))
    assert torch.equal(padded_int_mm(x, weight), (x.long() @ weight.long().t()).int())


def test_the_card_sees_only_sizes_it_takes(monkeypatch):
    seen = []
    original = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: seen.append((*a.shape, *b.shape)) or original(a, b))
    padded_int_mm(torch.ones(6, 30, dtype=torch.int8), torch.ones(13, 30, dtype=torch.int8))
    padded_int_mm(torch.ones(64, 32, dtype=torch.int8), torch.ones(16, 32, dtype=torch.int8))
    assert seen == [(17, 32, 32, 16), (64, 32, 32, 16)]


@needs_no_card
def test_no_card_is_one_line():
    with pytest.raises(QuasarError, match=r"--device cuda:1: .*; .*use --device cpu"):
        get_backend("cuda:1")


@needs_no_card
def test_the_command_runs_on_cpu_and_says_so(capsys):
    assert generate.run(["import os", "--max-new-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    assert "no CUDA device here, running on CPU" in err
    assert "4 tokens" in err
    assert out.strip()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("precision", ["full", "w8a8"])
def test_same_ids_as_the_cpu(precision):
    from quasar import generate, load

    ids = [
        generate(load(device=device, precision=precision, dtype="float32"), "class Stack:\n", max_new_tokens=64)
        .result()
        .token_ids
        for device in ("reference", "cuda")
    ]
    assert ids[0] == ids[1]
