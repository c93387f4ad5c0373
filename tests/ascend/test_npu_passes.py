"""What a pass costs on the NPU: launches per layer and pass, copies, waits; graphs; and that refusals are not lost.

``pytest -s -k launches`` prints the figures that quasar_npu/README.md quotes.
"""

import logging

import pytest
import torch
import torch_npu
from emulated_npu import Refused, counting
from npu_models import on_backend

from quasar import QuasarError, generate
from quasar.backends import get_backend
from quasar.speculation.acceptance import GreedyAcceptance, SamplingAcceptance
from quasar.speculation.draft import Draft
from quasar.speculation.sampling import Sampling
from quasar.speculation.verifier import Verifier
from quasar_npu.backend import NpuBackend
from quasar_npu.graphs import WindowGraphs

WINDOW = Draft([5, 6, 7, 8, 9])
# (family, precision) -> launches per layer of a window of 6 tokens, and of a plain step.
LAYER = {
    ("openpangu", "w8a8"): (12, 11),
    ("qwen3", "w8a8"): (14, 13),
    ("openpangu", "full"): (11, 10),
    ("qwen3", "full"): (13, 12),
}
# Around the layers: embedding, rope rows (gather from inside a graph, gains, rounding), last norm, lm_head, float32.
AROUND = 6


def decoder_on_npu(family="openpangu", precision="w8a8"):
    return on_backend(family, precision, get_backend("npu")).decoder


def verifier_of(decoder, acceptance=None):
    verifier = Verifier(decoder, decoder.new_cache(64), acceptance or GreedyAcceptance(decoder.backend.argmax))
    verifier.start([1, 2, 3])
    return verifier


@pytest.mark.parametrize("family_precision", LAYER, ids="-".join)
def test_launches_per_layer_and_pass(family_precision):
    decoder = decoder_on_npu(*family_precision)
    cache, layers = decoder.new_cache(64), len(decoder.layers)
    decoder.prefill([1, 2, 3], cache, keep=0)
    for tokens, per_layer in zip((6, 1), LAYER[family_precision], strict=True):
        ids = torch.arange(tokens, device="npu")
        decoder(ids, cache, tokens)
        with counting() as counts:
            decoder(ids, cache, tokens)
        print(
            f"\n{' '.join(family_precision)}, {tokens} tokens: {per_layer} launches per layer, "
            f"{counts.total_launches} per pass of {layers} layers: {dict(counts.launches)}"
        )
        assert counts.total_launches == per_layer * layers + AROUND
        assert not any(name.endswith("/contiguous") for name in counts.launches)  # no copy that nobody asked for
        assert counts.host_waits == counts.device_to_host == 0


@pytest.mark.parametrize("sampling", [None, Sampling(0.8, 50, 0.9, 3)], ids=["greedy", "sampled"])
def test_a_window_is_one_replay_one_copy_and_one_wait(sampling):
    verifier = verifier_of(decoder_on_npu(), SamplingAcceptance(sampling) if sampling else None)
    position = 1
    for _ in range(2):  # run plainly, then captured
        position += len(verifier.step([5], WINDOW, position))
    with counting() as counts:
        verifier.step([5], WINDOW, position)
    assert (counts.graph_replays, counts.device_to_host, counts.host_waits) == (1, 1, 1)
    assert counts.graph_updates == 0
    assert counts.host_to_device == (1 if sampling is None else 2)  # ids and positions; uniform numbers
    assert counts.total_launches < 25  # of the acceptance rule
    assert counts.replayed.total() == 12 * 6 + AROUND + 2  # and, inside a graph, positions become rows and a mask


@pytest.mark.parametrize("sampling", [None, Sampling(0.8, 50, 0.9, 3)], ids=["greedy", "sampled"])
def test_without_graphs_a_window_still_waits_once(sampling, monkeypatch):
    monkeypatch.setattr(NpuBackend, "graphs", False)
    verifier = verifier_of(decoder_on_npu(), SamplingAcceptance(sampling) if sampling else None)
    with counting() as counts:
        verifier.step([5], WINDOW, 1)
    assert (counts.graph_replays, counts.device_to_host) == (0, 1)
    assert counts.host_waits == 1


def test_graphs_and_plain_windows_give_the_same_logits():
    decoder = decoder_on_npu("qwen3")
    with_graphs = decoder.new_cache(40)
    decoder.prefill(range(1, 9), with_graphs, keep=0)
    plain = decoder.new_cache(40)
    decoder.prefill(range(1, 9), plain, keep=0)
    run = decoder.backend.window_pass(decoder, with_graphs)
    assert isinstance(run, WindowGraphs)
    for step, (size, keep) in enumerate([(4, 4), (1, 1), (4, 4), (1, 1), (4, 4), (6, 2), (1, 1), (6, 2), (4, 4)]):
        ids = [(7 * step + i) % 100 for i in range(size)]
        with counting() as counts:
            logits = run(ids, keep).cpu()
        assert torch.equal(logits, decoder(torch.tensor(ids).npu(), plain, keep).cpu())
        assert counts.graph_replays == (step >= 2 and step != 5)
        assert torch.equal(with_graphs.memory.cpu(), plain.memory.cpu())
        for cache in (with_graphs, plain):
            cache.commit(2 if size > 1 else 1)


def test_a_window_that_does_not_fit_is_refused():
    decoder = decoder_on_npu()
    cache = decoder.new_cache(12)
    decoder.prefill([1, 2, 3, 4], cache, keep=0)
    run = decoder.backend.window_pass(decoder, cache)
    for _ in range(3):
        run([1, 2, 3, 4], 4)
    cache.commit(6)
    with pytest.raises(ValueError, match="4 tokens do not fit the KV cache: 2 positions are free"):
        run([1, 2, 3, 4], 4)


def test_where_capture_fails_windows_run_plainly(monkeypatch, caplog):
    model = on_backend("openpangu", "w8a8", get_backend("npu"))
    options = {"max_new_tokens": 16, "draft": "ngram", "gamma": 3, "ignore_eos": True}
    expected = generate(model, "class Stack:", **options).result().token_ids

    def refuse(*args, **kwargs):
        raise RuntimeError("capture is not supported by this driver\nand more")

    monkeypatch.setattr(torch.npu, "NPUGraph", refuse)
    with counting() as counts, caplog.at_level(logging.WARNING):
        assert generate(model, "class Stack:", **options).result().token_ids == expected
    assert counts.graph_replays == 0
    assert [record.message for record in caplog.records] == [
        "NPU graph capture failed (capture is not supported by this driver); windows run without graphs, slower"
    ]


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
        lambda a, k: (a, k | {"atten_mask": k["atten_mask"].t().contiguous()}),
        "upper triangle|atten_mask",
    ),
    "strided query": (
        "npu_fused_infer_attention_score",
        lambda a, k: ((a[0].transpose(2, 3).contiguous().transpose(2, 3), *a[1:]), k),
        "not contiguous",
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
    verifier = verifier_of(decoder)
    original = getattr(torch_npu, operator)

    def spoiled(*args, **kwargs):
        args, kwargs = spoil(args, kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch_npu, operator, spoiled)
    with pytest.raises((Refused, RuntimeError), match=message):
        verifier.step([5], WINDOW, 1)


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
