"""The device itself: memory, copies, aten operators, what is counted, what is refused."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from emulated_npu import NotEmulated, Refused, counting, toolchain, unavailable
from transformers import LlamaConfig, LlamaForCausalLM


def test_the_package_is_the_real_one():
    assert "site-packages" in torch_npu.__file__
    assert torch.npu.is_available()
    assert torch.npu.device_count() == 1
    assert torch.npu.get_device_name(0) == "Ascend910B2"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool])
def test_a_round_trip_keeps_every_bit(dtype):
    host = torch.randn(3, 5).mul(3).to(dtype)
    there = host.npu()
    assert there.device == torch.device("npu:0")
    assert torch.equal(there.cpu(), host)
    assert torch.equal(host.t().npu().cpu(), host.t())
    assert torch.equal(there[1:, ::2].cpu(), host[1:, ::2])


def test_converting_copies_convert():
    host = torch.randn(4, 6)
    assert torch.equal(host.to("npu", torch.bfloat16).cpu(), host.bfloat16())
    assert torch.equal(host.npu().to("cpu", torch.bfloat16), host.bfloat16())
    target = torch.zeros(6, 4, device="npu", dtype=torch.float16)
    target.t().copy_(host)
    assert torch.equal(target.cpu(), host.t().half())
    back = torch.zeros(6, 4)
    back.t().copy_(host.npu())
    assert torch.equal(back, host.t())


def test_aten_operators_compute_what_the_cpu_computes():
    a, b = torch.randn(4, 8), torch.randn(8, 5)
    assert torch.equal((a.npu() @ b.npu()).relu().softmax(-1).cpu(), (a @ b).relu().softmax(-1))
    assert torch.equal(torch.arange(7, device="npu").cpu(), torch.arange(7))
    values, places = a.npu().topk(3)
    assert torch.equal(values.cpu(), a.topk(3).values)
    assert torch.equal(places.cpu(), a.topk(3).indices)
    table = torch.randn(10, 4)
    ids = torch.tensor([3, 1, 3])
    assert torch.equal(F.embedding(ids.npu(), table.npu()).cpu(), F.embedding(ids, table))


def test_writes_through_views_reach_the_base():
    cache = torch.zeros(2, 6, 3, device="npu")
    alias = cache
    cache[:, 2:4] = torch.ones(2, 2, 3, device="npu")
    cache.index_copy_(1, torch.tensor([5], device="npu"), torch.full((2, 1, 3), 7.0, device="npu"))
    cache[0].add_(1)
    expected = torch.zeros(2, 6, 3)
    expected[:, 2:4], expected[:, 5] = 1, 7
    expected[0] += 1
    assert alias is cache
    assert torch.equal(cache.cpu(), expected)


def test_out_arguments_are_written_in_place():
    target = torch.empty(3, device="npu")
    address = target.data_ptr()
    assert torch.add(torch.ones(3, device="npu"), 1, out=target) is target
    assert target.data_ptr() == address
    assert target.tolist() == [2, 2, 2]


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2**-7), (torch.float16, 2**-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("causal", [False, True])
def test_scaled_dot_product_attention(dtype, bound, causal):
    q, k, v = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal, enable_gqa=True)
    with counting() as counts:
        got = F.scaled_dot_product_attention(q.npu(), k.npu(), v.npu(), is_causal=causal, enable_gqa=True)
    assert counts.launches["npu_fusion_attention_v3"] == 1
    assert (got.cpu().float() - expected).abs().max() <= bound * expected.abs().max()


def test_scaled_dot_product_attention_with_a_mask():
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    mask = torch.rand(3, 6) > 0.3
    mask[:, 0] = True
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    got = F.scaled_dot_product_attention(q.npu(), k.npu(), v.npu(), attn_mask=mask.npu())
    assert torch.allclose(got.cpu(), expected, atol=1e-6)


def test_random_numbers_follow_the_device_seed():
    torch.npu.manual_seed(11)
    first, second = torch.rand(5, device="npu").cpu(), torch.rand(5, device="npu").cpu()
    torch.npu.manual_seed(11)
    assert torch.equal(torch.rand(5, device="npu").cpu(), first)
    assert not torch.equal(first, second)
    generator = torch.Generator(device="npu").manual_seed(4)
    draw = torch.empty(5, device="npu").exponential_(generator=generator).cpu()
    generator.manual_seed(4)
    assert torch.equal(torch.empty(5, device="npu").exponential_(generator=generator).cpu(), draw)


def test_another_thread_has_the_device_too():
    results = []
    thread = threading.Thread(target=lambda: results.append((torch.ones(2, device="npu") + 1).tolist()))
    thread.start()
    thread.join()
    assert results == [[2, 2]]


def test_inference_mode_works():
    with torch.inference_mode():
        x = torch.ones(2, device="npu")
        x.add_(1)
        assert (x * 2).tolist() == [4, 4]


def test_a_whole_transformers_model_generates_the_same_ids():
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        attention_bias=True,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model, ids = LlamaForCausalLM(config).eval(), torch.randint(0, 97, (1, 9))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    with counting() as counts:
        got = model.to("npu").generate(ids.npu(), **options)
    assert torch.equal(got.cpu(), expected)
    assert counts.launches["npu_fusion_attention_v3"] == 2 * 8  # layers x forward passes


# --- counting -----------------------------------------------------------------------------------------------


def test_launches_are_counted_and_views_are_free():
    x = torch.randn(4, 6).npu()
    with counting() as counts:
        x.view(2, 12).t()[1:].unsqueeze(0).expand(3, 11, 2)
        torch.empty(3, device="npu")
        assert counts.total_launches == 0
        y = x + 1
        y.mul_(2)
        x.t().contiguous()
    assert counts.launches == {"aten.add": 1, "aten.mul_": 1, "aten.clone": 1}
    assert counts.host_to_device == counts.device_to_host == counts.host_waits == 0


def test_copies_and_waits_are_counted():
    with counting() as counts:
        x = torch.ones(3).npu()
        pinned = torch.empty(3).pin_memory()
        pinned.copy_(x, non_blocking=True)
    assert (counts.host_to_device, counts.device_to_host, counts.host_waits) == (1, 1, 0)
    with counting() as counts:
        x.cpu()
        x[0].item()
        bool(x[0] > 0)
        torch.nonzero(x)
        x[x > 0]
        torch.npu.synchronize()
        torch.npu.current_stream().synchronize()
    assert counts.device_to_host == 3
    assert counts.host_waits == 7


def test_counting_nests():
    x = torch.ones(3, device="npu")
    with counting() as outer:
        x + 1
        with counting() as inner:
            x + 1
        x + 1
    assert outer.launches["aten.add"] == 3
    assert inner.launches["aten.add"] == 1


# --- refusals -----------------------------------------------------------------------------------------------


def test_a_cpu_tensor_in_a_device_operator_is_refused():
    x = torch.ones(3, 4, device="npu")
    with pytest.raises(Refused, match="CPU tensor"):
        x + torch.ones(4)
    with pytest.raises(Refused, match="CPU tensor"):
        x[torch.tensor([0, 1])]
    assert (x + torch.tensor(1.0)).sum().item() == 24  # a 0-dim CPU tensor is a scalar


def test_integer_matrix_products_are_refused():
    x = torch.ones(4, 4, dtype=torch.int8, device="npu")
    with pytest.raises(Refused, match="npu_quant_matmul"):
        x @ x
    with pytest.raises(Refused, match="npu_quant_matmul"):
        torch._int_mm(x, x)


def test_float64_is_refused():
    with pytest.raises(Refused, match="float64"):
        torch.ones(3, dtype=torch.float64).npu() + 1


def test_bfloat16_is_refused_on_an_inference_card(inference_card):
    x = torch.ones(3, dtype=torch.bfloat16).npu()
    with pytest.raises(Refused, match="bfloat16"):
        x + 1
    assert (x.cpu().half().npu() + 1).tolist() == [2, 2, 2]


def test_an_operator_nobody_emulated_says_so():
    with pytest.raises(NotEmulated, match="npu_gelu"):
        torch_npu.npu_gelu(torch.ones(3, device="npu"))


# --- the launcher and what it needs ------------------------------------------------------------------------

PROBE = """
import torch, torch_npu
print(torch.npu.get_device_name(0), (torch.ones(2, device="npu") + 1).tolist())
"""


@pytest.mark.parametrize("soc", ["Ascend910B2", "Ascend310P3"])
def test_a_module_runs_under_the_launcher(soc, tmp_path, monkeypatch):
    (tmp_path / "probe.py").write_text(PROBE)
    monkeypatch.setenv("QUASAR_ASCEND_SOC", soc)
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{tmp_path}")
    done = subprocess.run(
        [sys.executable, "-m", "emulated_npu", "probe"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{soc} [2.0, 2.0]"


def test_the_launcher_without_a_module_explains_itself(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-m", "emulated_npu"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "usage: python -m emulated_npu MODULE [ARGUMENT...]"


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    assert unavailable() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert unavailable() == "no C compiler (install gcc, or name one in CC)"


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setattr(toolchain, "BUILD", tmp_path / "build")
    with pytest.raises(RuntimeError, match="no such luck"):
        toolchain.build()
    assert list((tmp_path / "build").iterdir()) == []
