"""The kernels compiled for real cards, without one: instructions, registers, shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Compute capability -> shared memory that one program may have (A100, H100, B200).
CARDS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
LINEAR = ("_int8_linear", "_float_linear", "_int4_linear")


@pytest.fixture(scope="module", params=CARDS)
def compiled(request, tmp_path_factory):
    """(capability, what compile_kernels.py found of each launch)."""
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": str(Path.cwd()),
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, Path(__file__).with_name("compile_kernels.py"), str(request.param)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not run.stderr  # no warnings
    return request.param, [json.loads(line) for line in run.stdout.splitlines()]


def test_all_were_compiled(compiled):
    capability, kernels = compiled
    rows = {"_embed", "_add_rms_norm", "_swiglu", "_append_rotated"} if capability == 90 else set()
    always = ("_rotate", "_quantize", "_attend_split", "_combine_splits")
    assert {kernel["kernel"] for kernel in kernels} == {*LINEAR, *rows, *always}


def test_nothing_spills_and_all_fits(compiled):
    capability, kernels = compiled
    assert [kernel for kernel in kernels if kernel["spilled"]] == []
    assert max(kernel["shared"] for kernel in kernels) <= CARDS[capability]
    # Cards of the same instructions with less: 99 KB on capability 8.6 and 8.9.
    assert max(kernel["shared"] for kernel in kernels) <= 99 * 1024


def test_matmuls_stream_their_weights_through_tensor_cores(compiled):
    capability, kernels = compiled
    for kernel in (kernel for kernel in kernels if kernel["kernel"] == "_int8_linear"):
        assert kernel["copies"] == ["0x10"]  # asynchronous, 16 bytes each
        assert any(".s8" in name or "kind::i8" in name for name in kernel["tensor_core"]), kernel
    # The large instruction for the large weights.
    wide = [kernel["tensor_core"] for kernel in kernels if kernel["grid"] == [384]]
    int4_wide = [kernel["tensor_core"] for kernel in kernels if kernel["grid"] == [384, 1]]
    if capability == 90:
        assert ["wgmma.mma_async.sync.aligned.m64n16k32.s32.s8.s8"] in wide
        assert ["wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16"] in wide
        assert int4_wide == [["wgmma.mma_async.sync.aligned.m64n16k32.s32.s8.s8"]]  # W4A4's
    int4 = [kernel for kernel in kernels if kernel["kernel"] == "_int4_linear"]
    assert all("0x10" in kernel["copies"] for kernel in int4)
    assert [bool(kernel["tensor_core"]) for kernel in int4] == [True] * 8 + [False] * (capability == 90)  # float32's
    # float32 stays float32: no TF32.
    assert not any("tf32" in name for kernel in kernels for name in kernel["tensor_core"])


def test_rows_are_loaded_16_bytes_at_a_time(compiled):
    for kernel in compiled[1]:
        if kernel["kernel"] in ("_add_rms_norm", "_swiglu", "_quantize", "_embed"):
            assert any("v4.b32" in load for load in kernel["loads"]), kernel


def test_dependent_launch_where_the_card_has_it(compiled):
    capability, kernels = compiled
    for kernel in kernels:
        assert kernel["dependent"] == (capability >= 90)
        assert kernel["prefetches"] == (capability >= 90 and kernel["kernel"] in LINEAR)
