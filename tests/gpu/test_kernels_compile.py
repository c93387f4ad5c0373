"""The kernels compiled for real cards, without one: instructions and their order, registers, shared memory."""

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
def compiled(request):
    """(capability, what compile_kernels.py found of each launch). Triton keeps what it compiled: a second run of the
    same kernels takes seconds."""
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, Path(__file__).with_name("compile_kernels.py"), str(request.param)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not run.stderr  # no warnings
    return request.param, [json.loads(line) for line in run.stdout.splitlines()]


def test_all_were_compiled(compiled):
    capability, kernels = compiled
    rows = {"_embed", "_add_rms_norm", "_swiglu", "_quantize", "_quantize_by_peak"}
    always = {"_rotate", "_attend_items", "_combine_splits", "_move_rows"}
    assert {kernel["kernel"] for kernel in kernels} == {*LINEAR, *always} | (rows if capability == 90 else set())


def test_nothing_spills_and_all_fits(compiled):
    capability, kernels = compiled
    assert [kernel for kernel in kernels if kernel["spilled"]] == []
    assert max(kernel["shared"] for kernel in kernels) <= CARDS[capability]
    # Cards of the same instructions with less: 99 KB on capability 8.6 and 8.9.
    assert max(kernel["shared"] for kernel in kernels) <= 99 * 1024


def test_matmuls_stream_their_weights_through_tensor_cores(compiled):
    capability, kernels = compiled
    for kernel in (kernel for kernel in kernels if kernel["kernel"] == "_int8_linear"):
        assert "0x10" in kernel["copies"]  # asynchronous, 16 bytes each
        assert any(".s8" in name or "kind::i8" in name for name in kernel["tensor_core"]), kernel
    int4 = [kernel for kernel in kernels if kernel["kernel"] == "_int4_linear"]
    assert all("0x10" in kernel["copies"] for kernel in int4 if kernel["grid"][1] == 1 and kernel["group"] == 128)
    assert all(kernel["copies"] for kernel in int4)
    # Four shapes, W4A16 and W4A4; for capability 9.0 in two kinds of groups, and float32's.
    assert [bool(kernel["tensor_core"]) for kernel in int4] == (
        [True] * 16 + [False] if capability == 90 else [True] * 8
    )
    # float32 stays float32: no TF32.
    assert not any("tf32" in name for kernel in kernels for name in kernel["tensor_core"])


def test_zero_points_and_small_groups_stream_as_much(compiled):
    """Else inputs would be waited for in every step, or too few bytes be under way: the ring is that of symmetric
    groups of 128."""
    if compiled[0] != 90:
        pytest.skip("other groups are compiled for capability 9.0")
    rings = {}
    for kernel in compiled[1]:
        if kernel["kernel"] == "_int4_linear" and kernel["tensor_core"] and kernel["grid"][1] == 1:
            at = kernel["grid"][0], kernel["tensor_core"][0]
            rings.setdefault(at, {})[kernel["group"]] = kernel["shared"]
    assert len(rings) == 6
    assert all(ring[32] >= 0.9 * ring[128] for ring in rings.values()), rings


def test_float_weights_meet_one_instruction_at_every_number_of_rows(compiled):
    """Else a row's sums would depend on the rows beside it. The large instruction for the large weights, of integers
    too, whose sums are exact at every width; two digits of a row take the same one as one."""
    capability, kernels = compiled
    if capability != 90:
        pytest.skip("several numbers of rows are compiled for capability 9.0")
    found = {}
    for kernel in kernels:
        if kernel["kernel"] in LINEAR[:2] and kernel["tensor_core"]:
            many = kernel["grid"][0] in (192, 384, 1187, 2374)  # gate_up, lm_head; down has 4096 outputs
            at = kernel["kernel"], many, kernel["digits"]
            found.setdefault(at, set()).add((kernel["tiles"], *kernel["tensor_core"]))
    small, large = "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32", "wgmma.mma_async.sync.aligned.m64n{}k32"
    assert found == {
        ("_float_linear", False, 1): {(n, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") for n in (1, 4)},
        ("_float_linear", True, 1): {(n, "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16") for n in (1, 4)},
        ("_int8_linear", False, 1): {(n, small) for n in (1, 4)},
        ("_int8_linear", False, 2): {(n, small) for n in (1, 8)},
        ("_int8_linear", True, 1): {(n, large.format(16 * n) + ".s32.s8.s8") for n in (1, 4)},
        ("_int8_linear", True, 2): {(n, large.format(16 * n) + ".s32.s8.s8") for n in (1, 8)},
    }


def test_few_rows_of_two_digits_cost_what_one_costs(compiled):
    """The same instruction, ring and registers, or fewer; so wide inputs of six rows read as fast."""
    one, two = (
        {
            kernel["grid"][0]: kernel
            for kernel in compiled[1]
            if kernel["kernel"] == "_int8_linear"
            and (kernel["tiles"], kernel["digits"]) == (1, digits)
            and kernel["prefetches"] == (compiled[0] >= 90)
        }
        for digits in (1, 2)
    )
    assert one.keys() == two.keys() != set()
    for key, kernel in two.items():
        assert (kernel["tensor_core"], kernel["shared"]) == (one[key]["tensor_core"], one[key]["shared"])
        assert kernel["registers"] <= one[key]["registers"] + 8


def test_maxima_are_taken_of_integers(compiled):
    """Floats would need no more than this, but their maximum is no single instruction; sums would depend on order."""
    for kernel in compiled[1]:
        assert all(name.endswith(("max.s32", "max.s64")) for name in kernel["atomics"]), kernel


def test_rows_are_loaded_16_bytes_at_a_time(compiled):
    for kernel in compiled[1]:
        if kernel["kernel"] in ("_add_rms_norm", "_swiglu", "_quantize", "_embed", "_attend_items"):
            assert any("v4.b32" in load for load in kernel["loads"]) or "0x10" in kernel["copies"], kernel


def test_dependent_launch_where_the_card_has_it(compiled):
    """Nothing that another kernel writes is touched before the wait, in PTX and in the machine's own instructions."""
    capability, kernels = compiled
    for kernel in kernels:
        assert kernel["dependent"] == (capability >= 90)
        if capability >= 90:
            assert kernel["waits_first"], kernel
            assert kernel["sass_waits_first"], kernel


def test_products_let_their_successor_start_late(compiled):
    """And prefetch while they wait themselves; both are switches, of which the last kernels here are the other side."""
    capability, kernels = compiled
    if capability < 90:
        assert {kernel["starts_next"] for kernel in kernels} == {"never"}
        assert not any(kernel["prefetches"] for kernel in kernels)
        return
    early = kernels[-6:] if capability == 90 else []
    for kernel in kernels[: len(kernels) - len(early)]:
        product = kernel["kernel"] in LINEAR
        if product and kernel["tensor_core"]:
            assert kernel["starts_next"] == "late", kernel
        elif not product:
            assert kernel["starts_next"] == "early", kernel
        assert kernel["prefetches"] == product
    for kernel in early:
        assert (kernel["starts_next"], kernel["prefetches"]) == ("early", False)
