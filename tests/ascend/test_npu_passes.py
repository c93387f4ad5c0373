"""What a pass costs on the NPU: launches per layer and pass, copies, waits; graphs; and that refusals are not lost.

``pytest -s -k launches`` prints the figures that quasar_npu/README.md quotes.
"""

import logging

import pytest
import torch
import torch_npu
from emulated_npu import Refused, counting
from emulated_npu.graphs import capturing
from npu_models import on_backend

from quasar import QuasarError, generate
from quasar.backends import get_backend
from quasar.backends.base import AttentionSpec, Batch, Segment
from quasar.models.runtime import Runtime
from quasar_npu.backend import NpuBackend

# (family, precision) -> launches per layer of a window of 6 tokens, and of a plain step.
LAYER = {
    ("openpangu", "w8a8"): (12, 11),
    ("qwen3", "w8a8"): (14, 13),
    ("openpangu", "full"): (11, 10),
    ("qwen3", "full"): (13, 12),
}
# Around the layers: embedding, rope rows (gains, rounding), last norm, lm_head, float32. With W8A8 also the zeros that
# the first norm adds; with several rows the rotations are put in the rows' order.
AROUND = 6


def decoder_on_npu(family="openpangu", precision="w8a8"):
    return on_backend(family, precision, get_backend("npu")).decoder


def runtime_of(decoder):
    runtime = Runtime(decoder)
    slot = runtime.new_slot(64)
    runtime.prefill(slot, [1, 2, 3], logits_to_keep=0)
    return runtime, slot


def window_of(slot, ids=(5, 6, 7, 8, 9, 10)):
    return Batch([Segment(slot, list(ids), logits_to_keep=len(ids))])


def step(runtime, slot):
    """A window as the engine runs it: greedy, so one copy to the host."""
    own = runtime.backend.argmax(runtime.run(window_of(slot))).tolist()
    slot.commit(2)
    return own


@pytest.mark.parametrize("family_precision", LAYER, ids="-".join)
def test_launches_per_layer_and_pass(family_precision):
    decoder = decoder_on_npu(*family_precision)
    _, slot = runtime_of(decoder)
    layers = len(decoder.layers)
    for tokens, per_layer in zip((6, 1), LAYER[family_precision], strict=True):
        batch, ids = window_of(slot, range(tokens)), torch.arange(tokens, device="npu")
        decoder(ids, batch)
        with counting() as counts:
            decoder(ids, batch)
        print(
            f"\n{' '.join(family_precision)}, {tokens} tokens: {per_layer} launches per layer, "
            f"{counts.total_launches} per pass of {layers} layers: {dict(counts.launches)}"
        )
        around = AROUND + ("w8a8" in family_precision) + (tokens > 1)
        assert counts.total_launches == per_layer * layers + around
        assert not any(name.endswith("/contiguous") for name in counts.launches)  # no copy that nobody asked for
        assert counts.host_waits == counts.device_to_host == 0


@pytest.mark.parametrize("sequences", [2, 8])
def test_launches_do_not_grow_with_the_number_of_sequences(sequences):
    """Captured: whatever the sequences' lengths, as many launches in a layer as for one of them."""
    decoder = decoder_on_npu()
    runtime, slot = runtime_of(decoder)
    slots = [slot]
    for length in range(4, 3 + sequences):
        slots.append(runtime.new_slot(64))
        runtime.prefill(slots[-1], list(range(length)), logits_to_keep=0)
    for _ in range(2):
        with counting() as counts:
            runtime.run(Batch([Segment(slot, [5, 6, 7], logits_to_keep=3) for slot in slots]))
    assert counts.graph_replays == 1
    assert counts.replayed.total() == 12 * len(decoder.layers) + AROUND + 2 + 2  # positions' rows, and a mask


def test_tnd_serves_all_sequences_in_one_launch():
    """The head size of the real models: sequences of any lengths in one attention, without padding."""
    backend = get_backend("npu")
    spec = AttentionSpec(4, 2, 128, None, None, 1e-6)
    g = torch.Generator().manual_seed(0)
    slots = [backend.new_slot(1, 2, 300, 128) for _ in range(3)]
    qkv, cos = torch.randn(9 * 1, 8 * 128, generator=g).bfloat16().npu(), torch.rand(9, 64, generator=g).npu()
    for slot, length in zip(slots, (140, 3, 0), strict=True):
        slot.arena.memory.copy_(torch.randn(slot.arena.memory.shape, generator=g))
        slot.length = length
    segments = [Segment(slot, [0] * n) for slot, n in zip(slots, (2, 6, 1), strict=True)]
    batch = Batch(segments)
    q = backend.append_rotated(qkv, spec, cos, cos, batch, 0)
    with counting() as counts:
        together = backend.attention(q, spec, batch, 0).cpu()
    assert counts.launches == {"npu_fused_infer_attention_score": 1}
    for segment, first in zip(segments, batch.first_rows, strict=False):
        last = first + len(segment.ids)
        alone = Batch([segment])
        q_alone = backend.append_rotated(qkv[first:last], spec, cos[first:last], cos[first:last], alone, 0)
        assert torch.equal(backend.attention(q_alone, spec, alone, 0).cpu(), together[first:last])


def test_a_window_is_one_replay_one_copy_and_one_wait():
    runtime, slot = runtime_of(decoder_on_npu())
    for _ in range(2):  # run plainly, then captured
        step(runtime, slot)
    with counting() as counts:
        step(runtime, slot)
    assert (counts.graph_replays, counts.device_to_host, counts.host_waits) == (1, 1, 1)
    assert counts.graph_updates == 0
    assert counts.host_to_device == 1  # ids, positions and places
    assert counts.total_launches == 1  # argmax
    # Inside a graph positions become rows and a mask.
    assert counts.replayed.total() == 12 * 6 + AROUND + 2 + 2


def test_without_graphs_a_window_still_waits_once(monkeypatch):
    monkeypatch.setattr(NpuBackend, "graphs", False)
    runtime, slot = runtime_of(decoder_on_npu())
    with counting() as counts:
        step(runtime, slot)
    assert (counts.graph_replays, counts.device_to_host) == (0, 1)
    assert counts.host_waits == 1


def test_a_window_that_does_not_fit_is_refused():
    _, slot = runtime_of(decoder_on_npu())
    slot.length = slot.capacity - 2
    with pytest.raises(ValueError, match="6 tokens do not fit the KV cache: 2 positions are free"):
        window_of(slot)


def test_memory_that_a_graph_reads_is_never_replaced():
    """A window of 3 is captured, a longer one comes, and the graph's memory is still its own."""
    decoder = decoder_on_npu()
    runtime, slot = runtime_of(decoder)
    plain = decoder_on_npu()
    for size in (3, 3, 6, 3, 40, 3):
        batch = window_of(slot, range(7, 7 + size))
        expected = plain(torch.tensor(batch.ids).npu(), batch).cpu()
        with counting() as counts:
            assert torch.equal(runtime.run(batch).cpu(), expected)
    assert counts.graph_replays == 1


def test_a_graph_that_reads_freed_memory_is_found_out():
    """The test above is worth something: the emulated device gives such a graph other values."""
    x = torch.ones(4, device="npu")
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        y = x + 1
    graph.replay()
    assert y.tolist() == [2, 2, 2, 2]
    del x
    graph.replay()
    assert y.tolist() != [2, 2, 2, 2]


OPTIONS = {"max_new_tokens": 16, "draft": "ngram", "gamma": 3, "ignore_eos": True}


def test_where_capture_fails_windows_run_plainly(monkeypatch, caplog):
    model = on_backend("openpangu", "w8a8", get_backend("npu"))
    expected = generate(model, "class Stack:", **OPTIONS).result().token_ids

    def refuse(*args, **kwargs):
        raise RuntimeError("capture is not supported by this driver\nand more")

    monkeypatch.setattr(torch.npu, "NPUGraph", refuse)
    model = on_backend("openpangu", "w8a8", get_backend("npu"))
    with counting() as counts, caplog.at_level(logging.WARNING):
        assert generate(model, "class Stack:", **OPTIONS).result().token_ids == expected
    assert counts.graph_replays == 0
    assert [record.message for record in caplog.records] == [
        "npu: a pass could not be captured (capture is not supported by this driver); passes run plainly"
    ]


def test_an_operator_that_cannot_be_captured_is_survived(monkeypatch, caplog):
    """An aclop in the middle breaks the capture, and torch.npu.graph leaves its stream in use (error 107025)."""
    logging.getLogger("torch_npu.npugraph").setLevel(logging.CRITICAL)
    model = on_backend("openpangu", "w8a8", get_backend("npu"))
    expected = generate(model, "class Stack:", **OPTIONS).result().token_ids
    swiglu = NpuBackend.swiglu

    def with_an_aclop(self, gate_up, quant):
        scale = torch.ones(1, device="npu") if not capturing() else self.spare
        self.spare = scale
        torch_npu.npu_quantize(gate_up, scale, None, torch.qint8, -1, True)
        return swiglu(self, gate_up, quant)

    monkeypatch.setattr(NpuBackend, "swiglu", with_an_aclop)
    model = on_backend("openpangu", "w8a8", get_backend("npu"))
    stream = torch.npu.current_stream()
    with counting() as counts, caplog.at_level(logging.WARNING):
        assert generate(model, "class Stack:", **OPTIONS).result().token_ids == expected
    assert torch.npu.current_stream() == stream
    assert counts.graph_replays == 0
    (record,) = [record for record in caplog.records if record.name.startswith("quasar")]
    assert record.message == (
        "npu: a pass could not be captured (npu_quantize with div_mode is an aclop, during graph capture); "
        "passes run plainly"
    )


def test_float_weights_in_fractal_nz_are_survived_on_old_cann(monkeypatch, caplog):
    logging.getLogger("torch_npu.npugraph").setLevel(logging.CRITICAL)
    expected = generate(on_backend("openpangu", "full", get_backend("npu")), "class Stack:", **OPTIONS).result()
    monkeypatch.setenv("QUASAR_NPU_FLOAT_NZ", "1")
    model = on_backend("openpangu", "full", get_backend("npu"))
    with counting() as counts, caplog.at_level(logging.WARNING):
        assert generate(model, "class Stack:", **OPTIONS).result().token_ids == expected.token_ids
    assert counts.graph_replays == 0
    assert "with a FRACTAL_NZ weight, during graph capture); passes run plainly" in caplog.text


def test_static_scales_are_captured_too():
    """By multiplying with the reciprocal: dividing is an aclop."""
    runtime, slot = runtime_of(decoder_on_npu(precision="w8a8-static"))
    for _ in range(3):
        with counting() as counts:
            step(runtime, slot)
    assert counts.graph_replays == 1


def test_a_task_queue_that_cannot_capture_is_one_line(monkeypatch, caplog):
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    with caplog.at_level(logging.WARNING):
        backend = get_backend("npu")
    assert not backend.graphs
    assert caplog.messages == ["TASK_QUEUE_ENABLE=2 rules NPU graphs out: passes run without them, slower; set it to 1"]
    graph = torch.npu.NPUGraph()
    stream = torch.npu.current_stream()
    with pytest.raises(Refused, match="TASK_QUEUE_ENABLE=2"), torch.npu.graph(graph):
        pass
    torch.npu.set_stream(stream)


def test_graphs_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("QUASAR_NPU_GRAPHS", "0")
    assert not get_backend("npu").graphs


# An argument that the hardware rejects must fail here, whatever the backend does around it.
SPOILED = {
    "scale dtype": ("npu_quant_matmul", lambda a, k: ((a[0], a[1], a[2].half()), k), "scale"),
    "output dtype left out": ("npu_quant_matmul", lambda a, k: (a, without(k, "output_dtype")), "bias is torch.float"),
    "float32 activations": ("npu_dynamic_quant", lambda a, k: ((a[0].float(),), k), "float32"),
    "mixed norm": ("npu_add_rms_norm_dynamic_quant", lambda a, k: ((a[0], a[1].half(), a[2]), k), "agree|dtype"),
    "mask on the wrong side": (
        "npu_fused_infer_attention_score",
        lambda a, k: (a, k | {"atten_mask": k["atten_mask"].transpose(-2, -1).contiguous()}),
        "upper triangle|atten_mask",
    ),
    "strided query": (
        "npu_fused_infer_attention_score",
        lambda a, k: ((a[0].transpose(2, 3).contiguous().transpose(2, 3), *a[1:]), k),
        "not contiguous",
    ),
    "no output mask": (
        "npu_add_rms_norm_dynamic_quant",
        lambda a, k: (a, without(k, "output_mask")),
        r"torch_npu 2.6.0.post3, 2.7.1 and 2.8.0 \(CANN 8.3.RC1\) refuses this call: output_mask is a list of 0",
    ),
    "an argument of later versions": (
        "npu_rotary_mul",
        lambda a, k: (a, k | {"rotate": None}),
        "refuses this call: no argument rotate",
    ),
    "host indices": ("npu_scatter_nd_update_", lambda a, k: ((a[0], a[1].cpu(), a[2]), k), "CPU tensor"),
    "short tables": ("npu_rotary_mul", lambda a, k: ((a[0], a[1][..., 1:], a[2][..., 1:]), k), "head size|shape|r1"),
}


def without(options, name):
    return {key: value for key, value in options.items() if key != name}


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", SPOILED)
def test_an_argument_that_hardware_rejects_is_not_swallowed(name, graphs, monkeypatch):
    operator, spoil, message = SPOILED[name]
    decoder = decoder_on_npu()
    decoder.backend.graphs = graphs
    runtime, slot = runtime_of(decoder)
    original = getattr(torch_npu, operator)

    def spoiled(*args, **kwargs):
        args, kwargs = spoil(args, kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch_npu, operator, spoiled)
    with pytest.raises((Refused, RuntimeError), match=message):
        step(runtime, slot)


def test_a_data_type_the_chip_does_not_have_is_one_line():
    with pytest.raises(QuasarError, match="--dtype float32: Ascend910B2 runs bfloat16 and float16 only"):
        get_backend("npu", torch.float32)


@pytest.mark.parametrize(
    ("device", "message"),
    [("npu:3", "there are 1 NPUs, counted from 0"), ("npu:x", "write npu, or npu:1 for the second NPU")],
)
def test_a_device_that_is_not_there_is_one_line(device, message):
    with pytest.raises(QuasarError, match=message):
        get_backend(device)
