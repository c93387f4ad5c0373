"""Every call that the hardware's documentation rules out must fail, and fail for that reason."""

import pytest
import torch
import torch_npu
from emulated_npu import NotEmulated, Refused, branch_as, soc_as


@pytest.fixture(autouse=True)
def _as_installed():
    with branch_as("master"):
        yield


def half(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.float16, device="npu")


def bf16(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bfloat16, device="npu")


def f32(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, device="npu")


def i8(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.int8, device="npu")


def i32(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.int32, device="npu")


def upper() -> torch.Tensor:
    return torch.ones(2048, 2048, dtype=torch.bool).triu(1).npu()


def matmul(x1=None, x2=None, scale=None, *, output_dtype=torch.bfloat16, **options):
    x1, x2 = i8(4, 16) if x1 is None else x1, i8(16, 8) if x2 is None else x2
    scale = f32(8) if scale is None else scale
    return torch_npu.npu_quant_matmul(x1, x2, scale, output_dtype=output_dtype, **options)


def int4_matmul(x=None, weight=None, scale=None, *, antiquant_group_size=32, **options):
    """x [4, 64] by a packed [64, 16]."""
    x, weight = bf16(4, 64) if x is None else x, i32(64, 2) if weight is None else weight
    scale = bf16(2, 16) if scale is None else scale
    return torch_npu.npu_weight_quant_batchmatmul(
        x, weight, scale, antiquant_group_size=antiquant_group_size, **options
    )


def int4_pack(weight=None, inner_k_tiles=0):
    return torch_npu.npu_convert_weight_to_int4pack(i32(4, 16) if weight is None else weight, inner_k_tiles)


def fia(q=None, k=None, v=None, *, num_heads=2, input_layout="BSND", **options):
    q = half(1, 3, 2, 16) if q is None else q
    k = half(1, 5, 2, 16) if k is None else k
    v = k if v is None else v
    return torch_npu.npu_fused_infer_attention_score(q, k, v, num_heads=num_heads, input_layout=input_layout, **options)


def paged(q=None, k=None, **options):
    """One sequence of three rows over a block of 128 positions."""
    q, k = half(1, 3, 2, 16) if q is None else q, half(2, 128, 32) if k is None else k
    given = {
        "num_heads": 2,
        "input_layout": "BSND",
        "sparse_mode": 3,
        "atten_mask": upper(),
        "block_table": i32(1, 1),
        "block_size": 128,
        "actual_seq_lengths_kv": [5],
    }
    return torch_npu.npu_fused_infer_attention_score(q, k, k, **{**given, **options})


def fused_norm(x1=None, x2=None, gamma=None, **options):
    x1 = half(4, 16) if x1 is None else x1
    return torch_npu.npu_add_rms_norm_dynamic_quant(
        x1, x1 if x2 is None else x2, half(16) if gamma is None else gamma, **options
    )


def quantize(x=None, scale=None, zero=None, dtype=torch.qint8, axis=-1, div_mode=True):
    x, scale = half(4, 16) if x is None else x, f32(1) if scale is None else scale
    return torch_npu.npu_quantize(x, scale, zero, dtype, axis, div_mode)


def dequant_swiglu(x=None, **options):
    return torch_npu.npu_dequant_swiglu_quant(half(4, 16) if x is None else x, **{"quant_mode": 1, **options})


def apply_rope(q=None, k=None, cos=None, sin=None, **options):
    q, k = half(1, 3, 2, 64) if q is None else q, half(1, 3, 1, 64) if k is None else k
    cos = half(1, 3, 1, 64) if cos is None else cos
    return torch_npu.npu_apply_rotary_pos_emb(q, k, cos, cos if sin is None else sin, **options)


def with_fractal(function):
    """Call it with an int8 [64, 32] weight in FRACTAL_NZ."""
    torch.npu.config.allow_internal_format = True
    try:
        return function(torch_npu.npu_format_cast(i8(64, 32), 29))
    finally:
        torch.npu.config.allow_internal_format = False


def wide(*shape: int) -> torch.Tensor:
    """Not contiguous, with this shape."""
    return torch.ones(*shape[:-1], 2 * shape[-1], device="npu", dtype=torch.float16)[..., ::2]


REFUSED = {
    # npu_dynamic_quant
    "dynamic_quant float32": (lambda: torch_npu.npu_dynamic_quant(f32(2, 4)), "torch.float32"),
    "dynamic_quant one dimension": (lambda: torch_npu.npu_dynamic_quant(half(4)), "two dimensions"),
    "dynamic_quant mixed smooth": (
        lambda: torch_npu.npu_dynamic_quant(half(2, 4), smooth_scales=bf16(4)),
        "dtypes must agree",
    ),
    "dynamic_quant smooth shape": (
        lambda: torch_npu.npu_dynamic_quant(half(2, 4), smooth_scales=half(3)),
        "smooth_scales has shape",
    ),
    "dynamic_quant host smooth": (
        lambda: torch_npu.npu_dynamic_quant(half(2, 4), smooth_scales=torch.ones(4).half()),
        "CPU tensor",
    ),
    # npu_quantize
    "quantize float16 scales": (lambda: quantize(scale=half(1)), "scales is torch.float16"),
    "quantize float zero points": (lambda: quantize(zero=f32(1)), "zero_points is torch.float32"),
    "quantize dtype": (lambda: quantize(dtype=torch.quint4x2), "dtype: qint8"),
    "quantize scale shape": (lambda: quantize(scale=f32(5)), "scales has shape"),
    "quantize axis": (lambda: quantize(axis=2), "axis out of range"),
    "quantize mixed without div": (lambda: quantize(scale=f32(1), div_mode=False), "dtypes must agree"),
    "quantize host scales": (lambda: quantize(scale=torch.ones(1)), "CPU tensor"),
    # npu_trans_quant_param
    "trans_quant_param dtype": (lambda: torch_npu.npu_trans_quant_param(bf16(8)), "bfloat16"),
    "trans_quant_param shape": (lambda: torch_npu.npu_trans_quant_param(f32(2, 8)), r"\(1, n\)"),
    "trans_quant_param strided": (lambda: torch_npu.npu_trans_quant_param(f32(8)[::2]), "not contiguous"),
    # npu_quant_matmul
    "matmul output int8 bf16 scale": (lambda: matmul(scale=bf16(8), output_dtype=None), "scale|output"),
    "matmul output float32": (lambda: matmul(output_dtype=torch.float32), "output_dtype|float32"),
    "matmul inner sizes": (lambda: matmul(x2=i8(15, 8)), "k dim of x1 and x2"),
    "matmul float16 scale": (lambda: matmul(scale=half(8)), "scale"),
    "matmul bf16 scale float16 output": (
        lambda: matmul(scale=bf16(8), pertoken_scale=f32(4), output_dtype=torch.float16),
        "scale",
    ),
    "matmul int64 scale bf16 output": (
        lambda: matmul(scale=torch_npu.npu_trans_quant_param(f32(8))),
        "scale",
    ),
    "matmul scale shape": (lambda: matmul(scale=f32(7)), "scale 1st dim"),
    "matmul scale 2d": (lambda: matmul(scale=f32(8, 1)), "scale dim num"),
    "matmul per-token bf16": (lambda: matmul(pertoken_scale=bf16(4)), "pertoken"),
    "matmul per-token 2d": (lambda: matmul(pertoken_scale=f32(4, 1)), "pertoken_scale dim num"),
    "matmul per-token length": (lambda: matmul(pertoken_scale=f32(3)), "pertoken_scale has shape"),
    "matmul per-token int8 output": (
        lambda: matmul(pertoken_scale=f32(4), output_dtype=torch.int8),
        "pertoken",
    ),
    "matmul per-token int32 output": (
        lambda: matmul(pertoken_scale=f32(4), output_dtype=torch.int32),
        "pertoken",
    ),
    "matmul bias float16 bf16 output": (lambda: matmul(pertoken_scale=f32(4), bias=half(8)), "[Bb]ias"),
    "matmul bias float16 per-token": (
        lambda: matmul(pertoken_scale=f32(4), bias=half(8), output_dtype=torch.float16),
        "bias",
    ),
    "matmul bias bf16 float16 output": (
        lambda: matmul(pertoken_scale=f32(4), bias=bf16(8), output_dtype=torch.float16),
        "bias",
    ),
    "matmul bias float32 static float16": (lambda: matmul(bias=f32(8), output_dtype=torch.float16), "bias"),
    "matmul bias float32 int32 output": (lambda: matmul(bias=f32(8), output_dtype=torch.int32), "bias"),
    "matmul bias int64": (lambda: matmul(bias=torch.ones(8, dtype=torch.int64).npu()), "bias"),
    "matmul bias shape": (lambda: matmul(bias=i32(7)), "bias"),
    "matmul offset bf16 output": (lambda: matmul(offset=f32(8)), "offset"),
    "matmul strided x1": (lambda: matmul(x1=i8(4, 32)[:, ::2]), "x1 is not contiguous"),
    "matmul strided x2": (lambda: matmul(x2=i8(16, 16)[:, ::2]), "neither contiguous nor the transpose"),
    "matmul strided scale": (lambda: matmul(scale=f32(16)[::2]), "scale is not contiguous"),
    "matmul host x2": (lambda: matmul(x2=torch.ones(16, 8, dtype=torch.int8)), "x2 is a CPU tensor"),
    "matmul host scale": (lambda: matmul(scale=torch.ones(8)), "scale is a CPU tensor"),
    "matmul k over 65535": (lambda: matmul(x1=i8(1, 65536), x2=i8(65536, 8)), "65535"),
    # npu_convert_weight_to_int4pack
    "int4pack int8": (lambda: int4_pack(i8(4, 16)), "weight is torch.int8"),
    "int4pack three dimensions": (lambda: int4_pack(i32(2, 4, 16)), "two dimensions"),
    "int4pack columns": (lambda: int4_pack(i32(4, 12)), "multiple of 8"),
    "int4pack range": (lambda: int4_pack(i32(4, 16) * 8), "outside int4"),
    "int4pack strided": (lambda: int4_pack(i32(16, 4).t()), "weight is not contiguous"),
    # npu_weight_quant_batchmatmul
    "int4 float32": (lambda: int4_matmul(f32(4, 64), scale=f32(2, 16)), "x is torch.float32"),
    "int4 mixed scale": (lambda: int4_matmul(scale=half(2, 16)), "dtypes must agree"),
    "int4 int64 scale": (lambda: int4_matmul(scale=torch.ones(2, 16, dtype=torch.int64).npu()), "dtypes must agree"),
    "int4 float weight": (lambda: int4_matmul(weight=bf16(64, 16)), "weight is torch.bfloat16"),
    "int4 three dimensions": (lambda: int4_matmul(bf16(1, 4, 64)), "two dimensions"),
    "int4 inner sizes": (lambda: int4_matmul(bf16(4, 32)), "x has 32 columns, weight 64 rows"),
    "int4 empty": (lambda: int4_matmul(bf16(0, 64)), "may not be empty"),
    "int4 group of all": (lambda: int4_matmul(scale=bf16(1, 16), antiquant_group_size=64), "antiquant_group_size 64"),
    "int4 group of 16": (lambda: int4_matmul(scale=bf16(4, 16), antiquant_group_size=16), "antiquant_group_size 16"),
    "int4 group of 48": (lambda: int4_matmul(scale=bf16(2, 16), antiquant_group_size=48), "antiquant_group_size 48"),
    "int4 scale shape": (lambda: int4_matmul(scale=bf16(16, 2)), "antiquant_scale has shape"),
    "int4 float16 offset": (lambda: int4_matmul(antiquant_offset=half(2, 16)), "dtypes must agree"),
    "int4 int32 offset": (lambda: int4_matmul(antiquant_offset=i32(2, 16)), "dtypes must agree"),
    "int4 offset shape": (lambda: int4_matmul(antiquant_offset=bf16(16)), "antiquant_offset has shape"),
    "int4 strided offset": (
        lambda: int4_matmul(antiquant_offset=bf16(2, 32)[:, ::2]),
        "antiquant_offset is neither contiguous nor a transpose",
    ),
    "int4 scales without groups": (lambda: int4_matmul(antiquant_group_size=0), "antiquant_scale has shape"),
    "int4 bias bf16": (lambda: int4_matmul(bias=bf16(16)), "bias is torch.bfloat16"),
    "int4 bias float32 float16": (
        lambda: int4_matmul(half(4, 64), scale=half(2, 16), bias=f32(16)),
        "bias is torch.float32",
    ),
    "int4 bias shape": (lambda: int4_matmul(bias=f32(8)), "bias has shape"),
    "int4 strided x": (lambda: int4_matmul(bf16(4, 128)[:, ::2]), "x is neither contiguous nor a transpose"),
    "int4 strided bias": (lambda: int4_matmul(bias=f32(32)[::2]), "bias is not contiguous"),
    "int4 n over 65535": (
        lambda: int4_matmul(weight=i32(64, 8192), scale=bf16(1), antiquant_group_size=0),
        "65535",
    ),
    "int4 fractal": (
        lambda: with_fractal(lambda _: int4_matmul(weight=torch_npu.npu_format_cast(i32(64, 2), 29))),
        "compiled graphs only",
    ),
    "matmul n over 65535": (lambda: matmul(x2=i8(16, 65536), scale=f32(1)), "65535"),
    # formats
    "fractal slice": (lambda: with_fractal(lambda w: w[1:]), "FRACTAL_NZ"),
    "fractal view": (lambda: with_fractal(lambda w: w.view(-1)), "FRACTAL_NZ"),
    "fractal addition": (lambda: with_fractal(lambda w: w + 1), "FRACTAL_NZ"),
    "format cast of a transpose": (lambda: torch_npu.npu_format_cast(i8(4, 8).t(), 29), "not contiguous"),
    "format cast of a vector": (lambda: torch_npu.npu_format_cast(i8(8), 29), "two dimensions"),
    "format cast of a column": (lambda: torch_npu.npu_format_cast(i8(8, 1), 29), "a dimension of 1"),
    "format cast of int64": (
        lambda: torch_npu.npu_format_cast(torch.ones(4, 4, dtype=torch.int64).npu(), 29),
        "int64",
    ),
    # norms
    "rms_norm mixed halves": (lambda: torch_npu.npu_rms_norm(half(2, 16), bf16(16)), "dtypes must agree"),
    "rms_norm half gamma": (lambda: torch_npu.npu_rms_norm(f32(2, 16), half(16)), "dtypes must agree"),
    "rms_norm gamma shape": (lambda: torch_npu.npu_rms_norm(half(2, 16), half(8)), "does not match"),
    "rms_norm integers": (lambda: torch_npu.npu_rms_norm(i32(2, 16), f32(16)), "torch.int32"),
    "rms_norm one dimension": (lambda: torch_npu.npu_rms_norm(half(16), half(16)), "two dimensions"),
    "rms_norm host gamma": (lambda: torch_npu.npu_rms_norm(half(2, 16), torch.ones(16).half()), "CPU tensor"),
    "add_rms_norm mix": (
        lambda: torch_npu.npu_add_rms_norm(half(2, 16), bf16(2, 16), half(16)),
        "dtypes must agree",
    ),
    "add_rms_norm float32 gamma": (
        lambda: torch_npu.npu_add_rms_norm(half(2, 16), half(2, 16), f32(16)),
        "dtypes must agree",
    ),
    "add_rms_norm shapes": (
        lambda: torch_npu.npu_add_rms_norm(half(2, 16), half(1, 16), half(16)),
        "x2 has shape",
    ),
    "fused norm float32": (lambda: fused_norm(f32(4, 16), gamma=f32(16)), "torch.float32"),
    "fused norm mix": (lambda: fused_norm(x2=bf16(4, 16)), "dtypes must agree"),
    "fused norm float32 gamma": (lambda: fused_norm(gamma=f32(16)), "dtypes must agree"),
    "fused norm float32 smooth": (lambda: fused_norm(smooth_scale1=f32(16)), "dtypes must agree"),
    "fused norm smooth shape": (lambda: fused_norm(smooth_scale1=half(8)), "smooth_scale1 has shape"),
    "fused norm x2 shape": (lambda: fused_norm(x2=half(1, 16)), "x2 has shape"),
    "fused norm empty mask": (lambda: fused_norm(output_mask=[False, False]), "output_mask|at least one"),
    "fused norm masked smooth": (
        lambda: fused_norm(smooth_scale1=half(16), output_mask=[False, True]),
        "output_mask leaves out",
    ),
    "fused norm host gamma": (lambda: fused_norm(gamma=torch.ones(16).half()), "CPU tensor"),
    # rope
    "rotary_mul mix": (
        lambda: torch_npu.npu_rotary_mul(half(1, 3, 2, 16), f32(1, 3, 1, 16), f32(1, 3, 1, 16)),
        "dtypes must agree",
    ),
    "rotary_mul broadcast": (
        lambda: torch_npu.npu_rotary_mul(half(1, 3, 2, 16), half(1, 2, 1, 16), half(1, 2, 1, 16)),
        "broadcast",
    ),
    "rotary_mul half the head": (
        lambda: torch_npu.npu_rotary_mul(half(1, 3, 2, 16), half(1, 3, 1, 8), half(1, 3, 1, 8)),
        "head size",
    ),
    "rotary_mul dimensions": (
        lambda: torch_npu.npu_rotary_mul(half(3, 16), half(3, 16), half(3, 16)),
        "3 or 4 dimensions",
    ),
    "rotary_mul large head": (
        lambda: torch_npu.npu_rotary_mul(half(1, 1, 1, 896), half(1, 1, 1, 896), half(1, 1, 1, 896)),
        "below 896",
    ),
    "apply_rope head size": (
        lambda: apply_rope(half(1, 3, 2, 32), half(1, 3, 1, 32), half(1, 3, 1, 32)),
        "64 or 128",
    ),
    "apply_rope mix": (lambda: apply_rope(cos=f32(1, 3, 1, 64)), "dtypes must agree"),
    "apply_rope broadcast batch": (
        lambda: apply_rope(half(2, 3, 2, 64), half(2, 3, 1, 64)),
        "cos and sin need",
    ),
    "apply_rope layout": (lambda: apply_rope(layout="BNSD"), "BSND or TND"),
    "apply_rope mode": (lambda: apply_rope(rotary_mode="interleave"), "half"),
    "apply_rope many heads": (
        lambda: apply_rope(bf16(1, 1, 128, 128), bf16(1, 1, 8, 128), bf16(1, 1, 1, 128)),
        "on-core memory",
    ),
    # swiglu
    "swiglu strided": (lambda: torch_npu.npu_swiglu(wide(4, 16)), "not contiguous"),
    "swiglu odd": (lambda: torch_npu.npu_swiglu(half(4, 15)), "even"),
    "swiglu integers": (lambda: torch_npu.npu_swiglu(i8(4, 16)), "int8"),
    "swiglu_quant width": (lambda: torch_npu.npu_swiglu_quant(half(1, 8194), quant_mode=1), "exceeds 8192"),
    "swiglu_quant half smooth": (
        lambda: torch_npu.npu_swiglu_quant(half(4, 16), smooth_scales=half(1, 8), quant_mode=1),
        "smooth_scales is",
    ),
    "dequant_swiglu three dimensions": (lambda: dequant_swiglu(half(1, 4, 16)), "must be"),
    "dequant_swiglu float32": (lambda: dequant_swiglu(f32(4, 16)), "torch.float32"),
    "dequant_swiglu odd": (lambda: dequant_swiglu(half(4, 15)), "must be"),
    "dequant_swiglu strided": (lambda: dequant_swiglu(wide(4, 16)), "not contiguous"),
    "dequant_swiglu int32 alone": (lambda: dequant_swiglu(i32(4, 16)), "needs activation_scale"),
    "dequant_swiglu half scaled": (
        lambda: dequant_swiglu(activation_scale=f32(4, 1)),
        "neither activation_scale nor bias",
    ),
    "dequant_swiglu flat token scale": (
        lambda: dequant_swiglu(i32(4, 16), weight_scale=f32(1, 16), activation_scale=f32(4)),
        "activation_scale has",
    ),
    "dequant_swiglu flat weight scale": (
        lambda: dequant_swiglu(i32(4, 16), weight_scale=f32(16), activation_scale=f32(4, 1)),
        "weight_scale has",
    ),
    "dequant_swiglu bf16 weight scale": (
        lambda: dequant_swiglu(i32(4, 16), weight_scale=bf16(1, 16), activation_scale=f32(4, 1)),
        "weight_scale is",
    ),
    # attention
    "attention float32": (lambda: fia(f32(1, 3, 2, 16), f32(1, 5, 2, 16)), "torch.float32"),
    "attention mix": (lambda: fia(k=bf16(1, 5, 2, 16)), "dtypes must agree"),
    "attention strided key": (lambda: fia(k=wide(1, 5, 2, 16)), "key is not contiguous"),
    "attention strided query": (lambda: fia(half(1, 2, 3, 16).transpose(1, 2)), "query is not contiguous"),
    "attention host mask": (
        lambda: fia(sparse_mode=3, atten_mask=torch.ones(2048, 2048, dtype=torch.bool)),
        "CPU tensor",
    ),
    "attention key value shapes": (lambda: fia(v=half(1, 4, 2, 16)), "one shape"),
    "attention heads": (lambda: fia(num_heads=4), "heads"),
    "attention ragged groups": (
        lambda: fia(half(1, 3, 3, 16), num_heads=3, num_key_value_heads=2),
        "whole number",
    ),
    "attention head size alignment": (lambda: fia(half(1, 3, 2, 24), half(1, 5, 2, 24)), "32-byte aligned"),
    "attention of many windows": (lambda: fia(half(129, 3, 2, 16), half(129, 5, 2, 16)), "at most 128"),
    "attention paged without lengths": (lambda: paged(actual_seq_lengths_kv=None), "needs actual_seq_lengths_kv"),
    "attention paged lengths": (lambda: paged(actual_seq_lengths_kv=[129]), "exceeds the table's 128"),
    "attention paged table": (lambda: paged(block_table=i32(1, 1) * 2), "outside the blocks"),
    "attention paged table type": (lambda: paged(block_table=torch.ones(1, 1).long().npu()), "block_table is"),
    "attention paged block size": (lambda: paged(k=half(2, 64, 32), block_size=64), "block_size 64"),
    "attention paged mask": (
        lambda: paged(sparse_mode=0, atten_mask=torch.zeros(1, 1, 3, 64, dtype=torch.bool).npu()),
        "atten_mask has shape",
    ),
    "attention paged blind row": (
        lambda: paged(sparse_mode=0, atten_mask=torch.ones(1, 1, 3, 128, dtype=torch.bool).npu()),
        "sees nothing",
    ),
    "attention paged TND ends": (
        lambda: paged(half(3, 2, 128), half(2, 128, 256), input_layout="TND", actual_seq_lengths=[2]),
        "end with the number of tokens",
    ),
    "attention head size limit": (lambda: fia(half(1, 3, 2, 520), half(1, 5, 2, 520)), "<= 512"),
    "attention length": (lambda: fia(actual_seq_lengths_kv=[6]), "exceeds 5"),
    "attention lengths per batch": (
        lambda: fia(half(3, 3, 2, 16), half(3, 5, 2, 16), actual_seq_lengths_kv=[5, 5]),
        "1 or 3 entries",
    ),
    "attention mask dtype": (lambda: fia(atten_mask=f32(3, 5)), "atten_mask is"),
    "attention mask shape": (
        lambda: fia(atten_mask=torch.zeros(3, 4, dtype=torch.bool).npu()),
        "atten_mask has shape",
    ),
    "attention causal without mask": (lambda: fia(sparse_mode=3), "needs atten_mask"),
    "attention causal mask size": (
        lambda: fia(sparse_mode=3, atten_mask=torch.zeros(3, 5, dtype=torch.bool).npu()),
        "2048 x 2048",
    ),
    "attention causal mask content": (
        lambda: fia(sparse_mode=3, atten_mask=torch.ones(2048, 2048, dtype=torch.bool).tril().npu()),
        "upper triangle",
    ),
    "attention decode with the causal mask": (
        lambda: fia(half(1, 1, 2, 16), sparse_mode=3, atten_mask=upper()),
        "atten_mask has shape",
    ),
    "attention all-mask mode without mask": (lambda: fia(sparse_mode=1), "needs atten_mask"),
    "attention sparse mode": (lambda: fia(sparse_mode=5), "sparse_mode 5"),
    "attention TND head size": (
        lambda: fia(
            half(3, 2, 64),
            half(5, 2, 64),
            input_layout="TND",
            actual_seq_lengths=[3],
            actual_seq_lengths_kv=[5],
        ),
        "head size 128",
    ),
    "attention TND without lengths": (
        lambda: fia(half(3, 2, 128), half(5, 2, 128), input_layout="TND"),
        "needs both",
    ),
    "attention TND plain lengths": (
        lambda: fia(
            half(5, 2, 128),
            half(5, 2, 128),
            input_layout="TND",
            actual_seq_lengths=[3, 2],
            actual_seq_lengths_kv=[3, 2],
        ),
        "cumulated",
    ),
    # the cache
    "scatter mix": (
        lambda: torch_npu.npu_scatter_nd_update_(half(4, 8), i32(2, 1), bf16(2, 8)),
        "dtypes must agree",
    ),
    "scatter out of range": (
        lambda: torch_npu.npu_scatter_nd_update_(half(4, 8), i32(2, 1) * 4, half(2, 8)),
        "outside input",
    ),
    "scatter shape": (
        lambda: torch_npu.npu_scatter_nd_update_(half(4, 8), i32(2, 1), half(2, 7)),
        "updates has",
    ),
    "scatter flat indices": (
        lambda: torch_npu.npu_scatter_nd_update_(half(4, 8), i32(2), half(2, 8)),
        "two dimensions",
    ),
    "scatter int32 data": (
        lambda: torch_npu.npu_scatter_nd_update_(i32(4, 8), i32(2, 1), i32(2, 8)),
        "torch.int32",
    ),
}

REFUSED_ON_INFERENCE_CARDS = {
    "per-token scale": (
        lambda: matmul(pertoken_scale=f32(4), output_dtype=torch.float16),
        "no pertoken_scale",
    ),
    "bfloat16 output": (lambda: matmul(), "output_dtype"),
    "int4 weight": (lambda: int4_matmul(half(4, 64), scale=half(2, 16)), "weight is torch.int32"),
    "int4 packing": (lambda: int4_pack(), "does not exist"),
    "int32 output": (lambda: matmul(output_dtype=torch.int32), "output_dtype"),
    "float32 bias": (lambda: matmul(bias=f32(8), output_dtype=torch.float16), "bias"),
    "untransposed fractal weight": (
        lambda: with_fractal(lambda w: matmul(i8(4, 64), w, f32(32), output_dtype=torch.float16)),
        "transposed",
    ),
    "dynamic_quant": (lambda: torch_npu.npu_dynamic_quant(half(2, 4)), "does not exist"),
    "fused norm": (lambda: fused_norm(), "does not exist"),
    "swiglu": (lambda: torch_npu.npu_swiglu(half(4, 16)), "does not exist"),
    "swiglu_quant": (lambda: torch_npu.npu_swiglu_quant(half(4, 16), quant_mode=1), "does not exist"),
    "dequant_swiglu": (lambda: dequant_swiglu(), "does not exist"),
    "attention": (lambda: fia(), "does not exist"),
    "bfloat16 norm": (lambda: torch_npu.npu_rms_norm(bf16(2, 16), bf16(16)), "bfloat16"),
    "float32 gamma": (lambda: torch_npu.npu_rms_norm(half(2, 16), f32(16)), "dtypes must agree"),
    "short norm rows": (lambda: torch_npu.npu_rms_norm(half(2, 8), half(8)), "32 bytes"),
    "bfloat16 rope": (
        lambda: apply_rope(bf16(1, 3, 2, 64), bf16(1, 3, 1, 64), bf16(1, 3, 1, 64)),
        "bfloat16",
    ),
    "rotary_mul head size": (
        lambda: torch_npu.npu_rotary_mul(half(1, 3, 2, 64), half(1, 3, 1, 64), half(1, 3, 1, 64)),
        "head size 128",
    ),
    "scatter": (lambda: torch_npu.npu_scatter_nd_update_(half(4, 8), i32(2, 1), half(2, 8)), "does not exist"),
    "bfloat16 quantize": (lambda: quantize(bf16(2, 4)), "bfloat16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, message = REFUSED[name]
    with pytest.raises(RuntimeError, match=message) as error:
        call()
    assert not isinstance(error.value, NotEmulated)


@pytest.mark.parametrize("name", REFUSED_ON_INFERENCE_CARDS)
def test_refused_on_inference_cards(name):
    call, message = REFUSED_ON_INFERENCE_CARDS[name]
    with soc_as("Ascend310P3"), pytest.raises(Refused, match=message):
        call()


def test_what_inference_cards_do_take(inference_card):
    scale = torch_npu.npu_trans_quant_param(f32(32))
    x = quantize(half(4, 64), f32(1), i32(1), torch.qint8)
    assert torch_npu.npu_quant_matmul(x, i8(64, 32), scale, bias=i32(32), output_dtype=torch.float16).shape == (4, 32)
    torch.npu.config.allow_internal_format = True
    fractal = torch_npu.npu_format_cast(i8(32, 64), 29)  # [n, k], cast, then passed transposed
    torch.npu.config.allow_internal_format = False
    assert torch_npu.npu_quant_matmul(x, fractal.t(), scale, output_dtype=torch.float16).shape == (4, 32)
    assert torch_npu.npu_rms_norm(half(4, 16), half(16))[0].shape == (4, 16)
    assert torch_npu.npu_add_rms_norm(half(4, 16), half(4, 16), half(16))[2].shape == (4, 16)
    apply_rope()


def test_an_unknown_chip_has_no_limits_to_apply():
    with soc_as("Ascend999"), pytest.raises(NotEmulated, match="Ascend999"):
        torch_npu.npu_dynamic_quant(half(2, 4))


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch_npu.npu_dynamic_quant(half(2, 8), dst_type=torch.quint4x2),
        lambda: int4_pack(inner_k_tiles=1),
        lambda: int4_matmul(weight=i8(64, 16)),
        lambda: int4_matmul(inner_precise=1),
        lambda: int4_matmul(quant_scale=f32(1, 16)),
        lambda: dequant_swiglu(quant_mode=0),
        lambda: fia(softmax_lse_flag=True),
        lambda: torch_npu.npu_rotary_mul(half(1, 3, 2, 16), half(1, 3, 1, 16), half(1, 3, 1, 16), "interleave"),
    ],
)
def test_what_the_emulation_lacks_is_not_called_refused(call):
    with pytest.raises(NotEmulated):
        call()
