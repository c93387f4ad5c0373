"""Whole passes of the CUDA backend: the reference's numbers, rows that depend on no other, nothing that a graph
refuses."""

from __future__ import annotations

import gc
import logging
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quasar import Model, generate, load, quantize
from quasar.backends.base import Batch, Segment, Slot
from quasar.backends.reference import ReferenceBackend
from quasar.export.export import quantize_checkpoint
from quasar.export.settings import ExportSettings
from quasar.models import model as model_module
from quasar.models.decoder import Decoder
from quasar.models.model import LoadOptions
from quasar.models.runtime import Runtime
from quasar_gpu import graphs
from quasar_gpu.backend import CudaBackend
from quasar_gpu.batches import ROW_BUCKETS
from quasar_gpu.kernels import attention as attention_kernels
from quasar_gpu.kernels.launch import Launching, launching_as
from quasar_gpu.slots import PagedSlot
from tests.conftest import FAMILIES
from tests.gpu.launches import ViewsOnly, record, recorded_launches
from tests.helpers.moving import PlainInt4, make_static, moved
from tests.helpers.random_models import random_model

GOLDEN = Path(__file__).parents[1] / "golden"
PROMPT = [1, 5, 9, 2, 5, 9, 2, 5]
# Launches of a layer; int4 rotates, and quantises by itself.
A_LAYER = {
    "full": Counter(_add_rms_norm=2, _float_linear=4, _attend_items=1, _combine_splits=1),
    "w8a8": Counter(_add_rms_norm=2, _int8_linear=4, _attend_items=1, _combine_splits=1, _quantize_by_peak=2),
    "w4a16": Counter(_add_rms_norm=2, _int4_linear=4, _attend_items=1, _combine_splits=1, _rotate=1),
    "w4a4": Counter(_add_rms_norm=2, _int4_linear=4, _attend_items=1, _combine_splits=1, _rotate=1, _quantize=4),
}
A_LAYER["w8a8-wide"] = A_LAYER["w8a8"]  # digits cost no launch
PRECISIONS = tuple(A_LAYER)
# The interpreter takes milliseconds for each program of a grid.
SIZES = {"vocab_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 400, "hidden_size": 32}
SIZES |= {"intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(autouse=True)
def _quick(kernel_device, monkeypatch):
    """The interpreter does not loop over what is masked."""
    if kernel_device.type == "cpu":
        monkeypatch.setattr(attention_kernels, "_UNROLLED", 1)


@cache
def master(family: str, precision: str) -> Model:
    """On the reference backend: "full", "w8a8" with int8 inputs throughout, "w8a8-wide", "w8a8-static", "w4a16" or
    "w4a4", int4 with zero points but for "w4a16-symmetric"."""
    backend = PlainInt4()
    backend.int4_offsets = "symmetric" not in precision
    model = random_model(family, backend=backend, **SIZES)
    if precision != "full":
        wide = ("qkv", "down") if precision == "w8a8-wide" else ()
        quantize(model, precision=precision.partition("-")[0], wide=wide)
    if precision == "w8a8-static":
        make_static(model.decoder, PROMPT)
    return model


def on(family: str, precision: str, backend: CudaBackend | ReferenceBackend) -> Model:
    model = master(family, precision)
    decoder = moved(model.decoder, backend)
    return replace(model, decoder=decoder, _runtimes={})


def behind(decoder: Decoder, length: int, room: int = 40, seed: int = 0) -> Slot:
    """A slot whose first `length` positions are random."""
    c = decoder.config
    slot = decoder.backend.new_slot(c.num_layers, c.num_kv_heads, length + room, c.head_dim)
    generator = torch.Generator().manual_seed(seed)
    shape = (c.num_layers, c.num_kv_heads, length, c.head_dim)
    k, v = (torch.randn(shape, generator=generator).to(decoder.backend.device, decoder.backend.dtype) for _ in range(2))
    if isinstance(slot, PagedSlot):
        slot.write(0, k, v)
    else:
        slot.k[:, :, :length], slot.v[:, :, :length] = k, v
    slot.length = length
    return slot


def window(slot: Slot, ids: Sequence[int], parents: Sequence[int] | None = None, keep: int | None = None) -> Segment:
    return Segment(slot, ids, parents, len(ids) if keep is None else keep)


def plain(decoder: Decoder, *segments: Segment) -> Tensor:
    """Logits of a pass that is not captured."""
    batch = Batch(segments)
    return decoder(torch.tensor(batch.ids, device=decoder.backend.device), batch).cpu().clone()


# The numbers.


@pytest.mark.parametrize("precision", [*PRECISIONS, "w8a8-static", "w4a16-symmetric"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_logits_are_the_reference_backends(kernel_device, family, precision):
    """Some rows behind some context, then a tree of drafts."""
    cuda, reference = (
        on(family, precision, backend).decoder for backend in (CudaBackend(kernel_device, torch.float32), PlainInt4())
    )
    ids = [i * 7 % 96 for i in range(5)]
    found = []
    for decoder in (cuda, reference):
        slot = behind(decoder, 5)
        first = plain(decoder, window(slot, ids))
        slot.commit(5)
        found.append(torch.cat([first, plain(decoder, window(slot, [3, 1, 4], [-1, 0, 0]))]))
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0].argmax(dim=-1), found[1].argmax(dim=-1))
    # Quantised activations near a tie round otherwise when a norm differs in its last place.
    exact = precision in ("full", "w4a16", "w4a16-symmetric")
    torch.testing.assert_close(*found, rtol=0, atol=(1e-4 if exact else 2e-2) * found[1].abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_as_near_to_float32_as_the_reference_backends(kernel_device, dtype):
    exact = on("qwen3", "full", ReferenceBackend()).decoder
    ids = [i * 7 % 96 for i in range(20)]

    def errors(decoder: Decoder) -> Tensor:
        return (plain(decoder, window(behind(decoder, 0), ids)) - right).square().mean()

    right = plain(exact, window(behind(exact, 0), ids))
    cuda, reference = CudaBackend(kernel_device, dtype), ReferenceBackend(dtype=dtype)
    assert errors(on("qwen3", "full", cuda).decoder) < 1.3 * errors(on("qwen3", "full", reference).decoder)


@pytest.mark.parametrize(("family", "precision"), [("qwen3", "w8a8"), ("openpangu", "full")])
def test_ids_with_drafts_are_the_plain_ones_and_the_reference_backends(kernel_device, family, precision):
    settings = {"max_new_tokens": 8, "ignore_eos": True}
    expected = generate(master(family, precision), PROMPT, draft="none", **settings).result().token_ids
    model = on(family, precision, CudaBackend(kernel_device, torch.float32))
    assert generate(model, PROMPT, gamma=3, **settings).result().token_ids == expected


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("full", torch.bfloat16), ("w8a8", torch.float32), ("w8a8-wide", torch.bfloat16), ("w4a4", torch.bfloat16)],
)
def test_a_row_does_not_depend_on_the_batch_around_it(kernel_device, precision, dtype):
    """A text cut in two ways, over the end of a page and in more than 64 rows at once; and beside another sequence."""
    decoder = on("qwen3", precision, CudaBackend(kernel_device, dtype)).decoder
    ids = [i * 11 % 96 for i in range(70)]
    whole, cut, beside = (behind(decoder, 60, room=80) for _ in range(3))
    together = plain(decoder, window(whole, ids))
    parts = []
    for part in (ids[:1], ids[1:20], ids[20:66], ids[66:]):
        parts.append(plain(decoder, window(cut, part)))
        cut.commit(len(part))
    assert torch.equal(torch.cat(parts), together)
    other = behind(decoder, 3, seed=1)
    both = plain(decoder, window(other, [5, 6]), window(beside, ids[:3]))
    assert torch.equal(both[2:], together[:3])


def test_the_pass_finds_its_best_tokens_itself(kernel_device):
    decoder = on("qwen3", "w8a8", CudaBackend(kernel_device, torch.bfloat16)).decoder
    batch = Batch([window(behind(decoder, 3), [1, 2, 3], keep=2)])
    with recorded_launches() as launches:
        logits = decoder(torch.tensor(batch.ids, device=kernel_device), batch)
    assert launches[-1].name == "_float_linear"
    assert torch.equal(decoder.backend.argmax(logits).cpu(), logits.argmax(dim=-1).cpu())
    assert decoder.backend._best[0]() is logits  # no search


@pytest.mark.parametrize("wide", [(), ("qkv", "o", "gate_up", "down", "lm_head")])
def test_an_int8_lm_head(kernel_device, wide):
    """Its logits are float32, its best tokens those of the reference, and found on the way."""
    model = random_model("qwen3", "full", backend=ReferenceBackend(), **SIZES)
    quantize(model, precision="w8a8", lm_head="w8a8", wide=wide)
    decoder = moved(model.decoder, CudaBackend(kernel_device, torch.float32))
    found, right = (plain(d, window(behind(d, 4), PROMPT)) for d in (decoder, model.decoder))
    torch.testing.assert_close(found, right, rtol=0, atol=(1e-3 if wide else 2e-2) * right.abs().max())
    with recorded_launches() as launches:
        logits = decoder(*started(decoder, PROMPT))
    assert launches[-1].name == "_int8_linear"
    assert torch.equal(decoder.backend.argmax(logits).cpu(), logits.argmax(dim=-1).cpu())
    assert decoder.backend._best[0]() is logits  # no search
    assert set(Counter(launch.name for launch in launches)) == {"_embed", *A_LAYER["w8a8"]}


def started(decoder: Decoder, ids: list[int]) -> tuple[Tensor, Batch]:
    """What a decoder is called with."""
    return torch.tensor(ids, device=decoder.backend.device), Batch([window(behind(decoder, 4), ids)])


# What a graph may hold.


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_is_launches_on_the_same_memory_and_nothing_else(kernel_device, family, precision):
    """No allocation, no waiting, no shape or number that depends on tokens, positions, pages or the tree."""
    if kernel_device.type == "cuda":
        pytest.skip("a card's own capture refuses all this")
    backend = CudaBackend(kernel_device, torch.bfloat16)
    decoder = on(family, precision, backend).decoder
    backend.graphs = True
    slot, other = behind(decoder, 30), behind(decoder, 20, seed=1)
    plain(decoder, window(slot, [3]))
    passes = []

    def capture(run, *_):
        with recorded_launches() as launches, ViewsOnly():
            run()
        passes.append(launches)
        return

    graphs_capture, graphs.capture = graphs.capture, capture
    try:
        for segments in ([window(slot, [3, 1, 4])], [window(other, [7]), window(slot, [1, 5, 9], [-1, 0, 0])]):
            batch = Batch(segments)
            assert backend.pass_key(batch) is not None
            backend.capture(decoder, batch)
    finally:
        graphs.capture = graphs_capture
    first, second = ([launch.frozen for launch in launches] for launches in passes)
    assert first == second
    product = "_float_linear"  # lm_head stays in full precision
    once = Counter(_embed=1, _add_rms_norm=1) + Counter({product: 1})
    assert Counter(launch.name for launch in passes[0]) == once + A_LAYER[precision] + A_LAYER[precision]
    assert read_bytes(passes[0]) == decoder.weight_bytes_per_pass - unread(decoder)


def read_bytes(launches: list) -> int:
    """Of the weights that products read, as they are launched: each once."""
    products = [launch for launch in launches if launch.name.endswith("_linear")]
    return sum(launch.args[1].nbytes for launch in products)


def unread(decoder: Decoder) -> int:
    """Bytes of a pass that are no product's weights: scales and biases, norms."""
    inside = decoder.weight_bytes_per_pass
    return inside - sum(linear_values(linear) for linear in decoder.linears())


def linear_values(linear) -> int:
    packed = linear.packed
    if hasattr(packed, "values") and not isinstance(packed, Tensor):  # int4
        return packed.values.nbytes
    return packed.nbytes if isinstance(packed, Tensor) else packed[0].nbytes


def test_the_guard_refuses_what_a_graph_refuses():
    x = torch.ones(4)
    for refused in (lambda: x + 1, lambda: x.add_(1), lambda: x.sum().item(), lambda: x[x > 0], lambda: torch.empty(2)):
        with pytest.raises(AssertionError, match="in a window pass"), ViewsOnly():
            refused()
    with ViewsOnly():
        assert x.view(2, 2)[1:].shape == (1, 2)


@pytest.fixture
def recording(kernel_device, monkeypatch):
    """Graphs on the CPU: recorded launches. On a card, its own."""
    if kernel_device.type == "cpu":
        monkeypatch.setattr(graphs, "capture", record)

    def backend(dtype: torch.dtype = torch.bfloat16) -> CudaBackend:
        made = CudaBackend(kernel_device, dtype)
        made.graphs = True
        return made

    return backend


def captured(runtime: Runtime) -> dict:
    return runtime._passes._passes


def test_replayed_passes_are_plain_ones(recording):
    """At other positions, with other tokens, sequences and trees than those that were captured, over a page's end."""
    decoder = on("qwen3", "w8a8", recording()).decoder
    runtime = Runtime(decoder)
    slots = [behind(decoder, 119), behind(decoder, 20, seed=1)]
    same = [behind(decoder, 119), behind(decoder, 20, seed=1)]
    for i, sizes in enumerate([(3, 0), (4, 0), (2, 2), (3, 1), (3, 0), (1, 3)]):
        parents = [-1, 0, 0] if sizes == (3, 0) else None
        ids = [[i + 7 * j for j in range(size)] for size in sizes]
        batches = [
            Batch(
                [
                    window(slot, part, parents, keep=min(len(part), 2))
                    for slot, part in zip(group, ids, strict=True)
                    if part
                ]
            )
            for group in (slots, same)
        ]
        found = runtime.run(batches[0])
        best = decoder.backend.argmax(found).cpu().clone()
        found = found.cpu().clone()
        expected = decoder(torch.tensor(batches[1].ids, device=decoder.backend.device), batches[1]).cpu()
        assert torch.equal(found, expected), i
        assert torch.equal(best, expected.argmax(dim=-1))
        for group in (slots, same):
            for slot, part in zip(group, ids, strict=True):
                slot.commit([0, 2] if parents and part else len(part))
    assert [slot.length for slot in slots] == [slot.length for slot in same]
    assert torch.equal(slots[0].k[:, :, : slots[0].length], same[0].k[:, :, : same[0].length])
    kinds = captured(runtime)
    assert len(kinds) == 1  # all in the graph of four rows
    assert next(iter(kinds))[1].rows == 4
    # One memory for the logits of all buckets.
    assert {tensor.shape[0] for tensor in decoder.backend._buffers._tensors[(16, 96), torch.float32]} == {16}


def test_buckets_are_few(recording):
    """Each captured once, on the second pass of its kind, in the order of a chat: prompts, then windows."""
    decoder = on("qwen3", "full", recording()).decoder
    runtime = Runtime(decoder)
    slot = behind(decoder, 3)
    for rows in (3, 4, 4, 3, 5, 6, 5):
        runtime.run(Batch([window(slot, [1] * rows)]))
    assert [key[1].rows for key in captured(runtime)] == [4, 6]
    assert set(ROW_BUCKETS) >= {1, 2, 4, 6, 8, 12, 16, 32, 64}
    key = decoder.backend.pass_key(Batch([window(slot, [1])]))
    with launching_as(decoder.backend.device, Launching(dependent=True)):
        assert decoder.backend.pass_key(Batch([window(slot, [1])])) != key  # kernels are launched otherwise
    assert decoder.backend.pass_key(Batch([window(behind(decoder, 0, room=80), [1] * 65)])) is None


def test_memory_for_attention_is_asked_for_once(recording, monkeypatch):
    """For a reach, whatever the number of rows, plain or captured."""
    asked = []
    monkeypatch.setattr(CudaBackend, "require_memory", lambda self, nbytes, what: asked.append((what, nbytes)))
    decoder = on("qwen3", "full", recording()).decoder
    runtime = Runtime(decoder)
    slot = behind(decoder, 3)
    for rows in (1, 3, 3, 6, 6):
        runtime.run(Batch([window(slot, [1] * rows)]))
    workspaces = decoder.backend._workspaces.values()
    assert [nbytes for what, nbytes in asked if what == "memory for attention"] == [w.nbytes for w in workspaces]
    assert len(workspaces) == 1


def test_checkpoints_with_zero_points_run(kernel_device, tmp_path, monkeypatch):
    """What `quasar quantize --scheme w4a16` writes, loaded onto the card and onto the reference."""
    folder, settings = GOLDEN / "small-qwen3", ExportSettings(scheme="w4a16", group=32)
    options = LoadOptions(device="reference")
    quantize_checkpoint(
        str(folder), tmp_path / "out", settings, calibration=["a b c"], heldout=["c d"], options=options, force=True
    )
    found = []
    for backend in (CudaBackend(kernel_device, torch.float32), PlainInt4()):
        monkeypatch.setattr(model_module, "get_backend", lambda *_, backend=backend: backend)
        decoder = load(str(tmp_path / "out"), device="cuda").decoder
        found.append(plain(decoder, window(behind(decoder, 4), PROMPT)))
    assert decoder.layers[0].down.packed[2].any()
    torch.testing.assert_close(*found, rtol=0, atol=1e-4 * found[1].abs().max())


def test_qspec_says_what_its_verifier_says(recording):
    """Drafts in W4A4 and windows in W4A16 over one copy of the weights, each with graphs of its own."""
    settings = {"max_new_tokens": 5, "ignore_eos": True}
    model = on("qwen3", "w4a16", recording())
    drafted = generate(model, PROMPT, draft="self:w4a4", gamma=2, **settings).result()
    assert drafted.token_ids == generate(model, PROMPT, draft="none", **settings).result().token_ids


def test_graphs_and_pages_go_to_the_next_generation(recording):
    model = on("openpangu", "full", recording())
    settings = {"max_new_tokens": 5, "draft": "none", "ignore_eos": True}
    first = generate(model, PROMPT, **settings).result()
    made = dict(captured(model.runtime))
    assert made
    (pool,) = model.decoder.backend._pools.values()
    pages = {page.at for page in pool._free}
    second = generate(model, PROMPT, **settings).result()
    assert second.token_ids == first.token_ids
    assert captured(model.runtime) == made
    assert {page.at for page in pool._free} >= pages


def test_everything_goes_with_the_model(recording):
    """By reference counts alone: a card's memory must not wait for the garbage collector."""
    model = on("qwen3", "w8a8", recording())
    generate(model, PROMPT, max_new_tokens=4, draft="none", ignore_eos=True).result()
    decoder, backend = model.decoder, model.decoder.backend
    (pool,) = backend._pools.values()
    assert captured(model.runtime)
    gone = [weakref.ref(thing) for thing in (decoder, backend, pool, pool.first, decoder.cos)]
    gc.collect()
    gc.disable()
    try:
        del model, decoder, backend, pool
        assert [ref() for ref in gone] == [None] * 5
    finally:
        gc.enable()


def test_where_capture_fails_passes_go_on_with_one_warning(recording, monkeypatch, caplog):
    def refused(*args: object) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more lines")

    monkeypatch.setattr(graphs, "capture", refused)
    model = on("openpangu", "full", recording())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert len(generate(model, PROMPT, max_new_tokens=4, draft="none").result().token_ids) == 4
    assert [record.message for record in caplog.records] == [
        "cuda: a pass could not be captured (CUDA error: operation not permitted when stream is capturing); "
        "passes run plainly"
    ]


def test_a_seed_samples_the_same_text_with_drafts_and_on_the_reference(kernel_device):
    settings = {"max_new_tokens": 6, "ignore_eos": True, "temperature": 0.9, "seed": 3}
    expected = generate(master("qwen3", "full"), PROMPT, draft="none", **settings).result().token_ids
    model = on("qwen3", "full", CudaBackend(kernel_device, torch.float32))
    assert generate(model, PROMPT, gamma=2, **settings).result().token_ids == expected
