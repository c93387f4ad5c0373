"""Every npu call of the backends, held to the schemas of every torch_npu that people run."""

import re
from pathlib import Path

import pytest
import torch
import torch_npu
from emulated_npu import Refused, branch_as, schemas, soc_as
from npu_models import on_backend

import quasar_npu
from quasar.backends import get_backend
from quasar.backends.base import Batch, Segment
from quasar.backends.capture import CapturedPasses
from quasar.quantization.methods import Int4
from quasar.quantization.stream import quantized_decoder
from quasar_npu.inference_card import InferenceCardBackend


def passes_over(decoder):
    """A prompt, windows plainly and captured, a tree, and two sequences at once."""
    c, backend = decoder.config, decoder.backend
    slots = [backend.new_slot(c.num_layers, c.num_kv_heads, 200, c.head_dim) for _ in range(2)]
    passes = CapturedPasses(backend, decoder)
    for slot in slots:
        passes.run(Batch([Segment(slot, range(60), logits_to_keep=1)]))
        slot.commit(60)
    for _ in range(2):
        for segments in (
            [Segment(slots[0], [1, 2, 3], logits_to_keep=3)],
            [Segment(slots[0], [1])],
            [Segment(slots[0], [1, 2, 3], [-1, 0, 0], 3)],
            [Segment(slot, [1, 2], logits_to_keep=2) for slot in slots],
        ):
            passes.run(Batch(segments))


def int4_decoder(backend):
    model = on_backend("qwen3", "full", backend)
    method = Int4(model.config, group=32, symmetric=False)
    return quantized_decoder(model.config, model.weights, backend, method, [])[0]


@pytest.mark.parametrize("branch", [None, "7.0.0", "7.1.0"])
def test_every_call_is_one_that_this_torch_npu_takes(branch, monkeypatch):
    """None: bound against all current branches at once, as in every other test here. The older two, which lack an
    operator, one by one."""
    schemas.calls.clear()
    with branch_as(branch) if branch else torch.inference_mode():
        for family, precision in (("openpangu", "w8a8"), ("qwen3", "w8a8"), ("openpangu", "full")):
            passes_over(on_backend(family, precision, get_backend("npu")).decoder)
        passes_over(on_backend("openpangu", "w8a8-static", get_backend("npu", torch.float16)).decoder)
        passes_over(int4_decoder(get_backend("npu")))
        monkeypatch.setenv("QUASAR_NPU_FUSED_NORM", "0")
        monkeypatch.setenv("QUASAR_NPU_FUSED_SWIGLU", "0")
        passes_over(on_backend("qwen3", "w8a8", get_backend("npu")).decoder)
        with soc_as("Ascend310P3"):
            card = InferenceCardBackend(torch.device("npu", 0), torch.float16, "Ascend310P3")
            passes_over(on_backend("openpangu", "w8a8-static", card).decoder)
    written = set()
    for file in Path(quasar_npu.__file__).parent.glob("*.py"):
        written |= set(re.findall(r"(?:ops|torch_npu)\.(npu_\w+)\(", file.read_text()))
    if branch in ("7.0.0", "7.1.0"):
        written.remove("npu_add_rms_norm_dynamic_quant")
    assert len(written) > 10
    assert schemas.calls == written


def test_the_table_has_every_operator_for_every_branch():
    for operator in schemas.SCHEMAS:
        absent = [branch for branch in schemas.BRANCHES if not schemas.forms(operator, branch)]
        assert absent in ([], ["7.0.0", "7.1.0"])
    assert schemas.forms("npu_add_rms_norm_dynamic_quant", "7.0.0") == ()
    assert set(schemas.CURRENT) == set(schemas.BRANCHES) - {"7.0.0", "7.1.0"}


def x(*shape, dtype=torch.bfloat16):
    return torch.ones(*shape, dtype=dtype, device="npu")


CALLS = {
    "a default that has the wrong length": (
        lambda: torch_npu.npu_add_rms_norm_dynamic_quant(x(2, 32), x(2, 32), x(32)),
        r"torch_npu 2\.6\.0\.post3, 2\.7\.1 and 2\.8\.0 \(CANN 8\.3\.RC1\) refuses this call: "
        r"output_mask is a list of 0, "
        r"the schema says List\[bool\] of 2",
    ),
    "a list of the wrong length": (
        lambda: torch_npu.npu_add_rms_norm_dynamic_quant(x(2, 32), x(2, 32), x(32), output_mask=[True]),
        "output_mask is a list of 1",
    ),
    "an argument that came later": (
        lambda: torch_npu.npu_weight_quant_batchmatmul(x(2, 64), x(64, 8), x(8), weight_dtype=None),
        "no argument weight_dtype",
    ),
    "an argument by a name of its own": (lambda: torch_npu.npu_swiglu(input=x(2, 32)), "no argument input"),
    "too many": (lambda: torch_npu.npu_dynamic_quant(x(2, 32), None), "2 positional arguments, 1 taken"),
    "too few": (lambda: torch_npu.npu_rms_norm(x(2, 32)), "gamma is missing"),
    "twice": (lambda: torch_npu.npu_rms_norm(x(2, 32), x(32), gamma=x(32)), "two values for gamma"),
    "a number for a tensor": (lambda: torch_npu.npu_rms_norm(x(2, 32), 1.0), "gamma is float, the schema says Tensor"),
    "an operator that nobody looked up": (
        lambda: torch_npu.npu_fusion_attention_v3(x(1, 2, 3, 16), x(1, 2, 3, 16), x(1, 2, 3, 16), 2, "BNSD"),
        "not in the table of schemas",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_some_torch_npu_refuses_fails(name):
    call, message = CALLS[name]
    with pytest.raises(Refused, match=message):
        call()


def test_what_a_branch_lacks_is_not_there():
    with branch_as("7.0.0"):
        assert not hasattr(torch_npu, "npu_add_rms_norm_dynamic_quant")
        assert hasattr(torch_npu, "npu_add_rms_norm")
    assert hasattr(torch_npu, "npu_add_rms_norm_dynamic_quant")


def test_a_dtype_travels_as_a_number():
    y = torch_npu.npu_quantize(x(2, 32), x(1), None, torch.qint8, -1, False)
    assert y.dtype == torch.int8
