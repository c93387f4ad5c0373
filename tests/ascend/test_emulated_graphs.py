"""NPU graphs: replay is the same work on the same addresses, and capture refuses what hardware refuses."""

import logging

import pytest
import torch
import torch_npu
from emulated_npu import Refused, branch_as, counting


@pytest.fixture(autouse=True)
def _quiet_capture_log():
    # torch_npu logs every failed capture as an error; here the failures are the point.
    logging.getLogger("torch_npu.npugraph").setLevel(logging.CRITICAL)


def capture(function, **options):
    stream, graph = torch.npu.current_stream(), torch.npu.NPUGraph()
    try:
        with torch.npu.graph(graph, **options):
            output = function()
    except RuntimeError as error:
        torch.npu.set_stream(stream)
        raise error.__context__ or error from None  # ending the capture failed as well
    return graph, output


def test_replay_reads_new_inputs_at_the_captured_addresses():
    x, weight = torch.randn(2, 4).npu(), torch.randn(4, 4).npu()
    graph, y = capture(lambda: (x @ weight).relu() + 1)
    address = y.data_ptr()
    for _ in range(3):
        new = torch.randn(2, 4)
        x.copy_(new)
        graph.replay()
        assert torch.equal(y.cpu(), (new @ weight.cpu()).relu() + 1)
    assert y.data_ptr() == address


def test_replay_repeats_in_place_writes_and_npu_operators():
    x = torch.randn(3, 32).bfloat16().npu()
    gamma = torch.ones(32, dtype=torch.bfloat16, device="npu")
    residual = torch.zeros(3, 32, dtype=torch.bfloat16, device="npu")
    position, cache = torch.zeros(1, dtype=torch.int64, device="npu"), torch.zeros(4, 32, device="npu")

    def step():
        residual.add_(x)
        normed = torch_npu.npu_rms_norm(residual, gamma, 1e-6)[0]
        cache.index_copy_(0, position, normed[:1].float())
        position.add_(1)
        return torch_npu.npu_dynamic_quant(normed)

    graph, (quantised, scale) = capture(step)
    residual.zero_(), position.zero_(), cache.zero_()
    x.copy_(torch.randn(3, 32))
    for _ in range(2):
        graph.replay()
    assert position.item() == 2
    assert torch.equal(residual.cpu(), (x.cpu() + x.cpu()))
    expected = torch_npu.npu_dynamic_quant(torch_npu.npu_rms_norm(residual, gamma, 1e-6)[0])
    assert torch.equal(quantised.cpu(), expected[0].cpu())
    assert torch.equal(scale.cpu(), expected[1].cpu())
    assert (cache.cpu()[:2].abs().sum(1) > 0).all()
    assert (cache.cpu()[2:] == 0).all()


def test_a_graph_captured_in_inference_mode_replays_outside():
    x = torch.ones(2, device="npu")
    with torch.inference_mode():
        graph, y = capture(lambda: x.add_(1) * 2)
    x.zero_()
    graph.replay()
    assert y.tolist() == [2, 2]


def test_a_replay_counts_as_one_call_and_its_kernels_apart():
    x = torch.ones(2, device="npu")
    graph, _ = capture(lambda: (x + 1) * 2)
    with counting() as counts:
        graph.replay()
        graph.replay()
    assert counts.graph_replays == 2
    assert counts.replayed == {"aten.add": 2, "aten.mul": 2}
    assert counts.total_launches == counts.host_waits == 0


def test_python_numbers_are_frozen_at_capture():
    state = {"factor": 2}
    x = torch.ones(1, device="npu")
    graph, y = capture(lambda: x * state["factor"])
    state["factor"] = 5
    graph.replay()
    assert y.item() == 2


def attention_over(cache, query, valid):
    return torch_npu.npu_fused_infer_attention_score(
        query,
        cache,
        cache,
        num_heads=2,
        num_key_value_heads=2,
        scale=0.25,
        input_layout="BSND",
        actual_seq_lengths_kv=[valid],
    )[0]


def test_list_arguments_change_only_by_update():
    cache, query = torch.randn(1, 8, 2, 16).half().npu(), torch.randn(1, 3, 2, 16).half().npu()
    frozen, y = capture(lambda: attention_over(cache, query, 8))
    frozen.replay()
    assert torch.equal(y.cpu(), attention_over(cache, query, 8).cpu())

    graph, y = capture(lambda: attention_over(cache, query, 8) * 2, auto_dispatch_capture=True)
    for valid in (3, 5):
        with counting() as counts:
            graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [valid]}])
            graph.replay()
        assert counts.graph_updates == 1
        assert counts.total_launches == 0
        assert torch.equal(y.cpu(), attention_over(cache, query, valid).cpu() * 2)


def test_an_update_may_follow_the_replay_it_serves():
    cache, query = torch.randn(1, 8, 2, 16).half().npu(), torch.randn(1, 3, 2, 16).half().npu()
    graph, y = capture(lambda: attention_over(cache, query, 8), auto_dispatch_capture=True)
    graph.replay()
    with pytest.raises(Refused, match=r"waits for graph\.update"):
        cache + 1
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [4]}])
    assert torch.equal(y.cpu(), attention_over(cache, query, 4).cpu())


FORBIDDEN = {
    "item": (lambda x: x.sum().item(), "host wait"),
    "copy to host": (lambda x: x.cpu(), "between host and device"),
    "copy to device": (lambda x: torch.ones(2).npu(), "between host and device"),
    "data-dependent shape": (lambda x: x.nonzero(), "host wait"),
    "boolean index": (lambda x: x[x > 0], "host wait"),
    "synchronize": (lambda x: torch.npu.synchronize(), "while a graph is being captured"),
    "stream synchronize": (
        lambda x: torch.npu.current_stream().synchronize(),
        "while a graph is being captured",
    ),
    "format cast": (lambda x: torch_npu.npu_format_cast(x.view(2, 2), 29), "before graph capture"),
    "quantisation by division": (
        lambda x: torch_npu.npu_quantize(x.view(2, 2), x[:1], None, torch.qint8, -1, True),
        "div_mode is an aclop",
    ),
    "random numbers": (lambda x: torch.rand(2, device="npu"), "random numbers"),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_capture_refuses(name):
    function, message = FORBIDDEN[name]
    x = torch.ones(4, device="npu")
    with pytest.raises(RuntimeError, match=message):
        capture(lambda: function(x))
    assert (x + 1).tolist() == [2, 2, 2, 2]  # and the device works on


def test_a_refused_operator_breaks_the_capture_and_leaves_its_stream_in_use():
    """What CANN does (error 107025), and torch.npu.graph does not catch."""
    x, stream = torch.ones(4, device="npu"), torch.npu.current_stream()
    with pytest.raises(RuntimeError, match="107025"), torch.npu.graph(torch.npu.NPUGraph()):
        x.sum().item()
    assert torch.npu.current_stream() != stream
    torch.npu.set_stream(stream)


def test_a_floating_point_weight_in_fractal_nz_is_refused_in_capture():
    torch.npu.config.allow_internal_format = True
    weight = torch_npu.npu_format_cast(torch.ones(32, 32, dtype=torch.float16, device="npu"), 29)
    torch.npu.config.allow_internal_format = False
    x = torch.ones(2, 32, dtype=torch.float16, device="npu")
    with pytest.raises(Refused, match="FRACTAL_NZ weight, during graph capture"):
        capture(lambda: x @ weight)
    with branch_as("26.1.0"):
        capture(lambda: x @ weight)


def test_a_graph_that_reads_freed_memory_gives_other_values():
    x, others = torch.ones(4, device="npu"), [torch.ones(4, device="npu")]
    graph, y = capture(lambda: (x * 2 + others[0]) + 1)
    graph.replay()
    assert y.tolist() == [4] * 4
    others.clear()
    graph.replay()
    assert y.tolist() == [88] * 4


def test_capture_on_the_default_stream_is_refused_by_torch_npu():
    graph = torch.npu.NPUGraph()
    with pytest.raises(RuntimeError, match="non-default stream"):
        graph.capture_begin()


def test_replay_before_capture_is_refused_by_torch_npu():
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        torch.npu.NPUGraph().replay()
