"""The npu operators we call, each as one function over host views with its schema's argument names.

A function checks the documented constraints (``Refused``), then computes the documented formula in float32
and rounds once per output, to nearest even.
"""

from emulated_npu.ops.activations import npu_dequant_swiglu_quant, npu_swiglu, npu_swiglu_quant
from emulated_npu.ops.attention import (
    fused_infer_attention,
    fused_infer_attention_out,
    fused_infer_attention_output,
    fused_infer_attention_workspace,
    npu_fusion_attention_v3,
)
from emulated_npu.ops.int4 import npu_convert_weight_to_int4pack, npu_weight_quant_batchmatmul
from emulated_npu.ops.norms import npu_add_rms_norm, npu_add_rms_norm_dynamic_quant, npu_rms_norm
from emulated_npu.ops.operator import Operator
from emulated_npu.ops.quantised import (
    npu_dynamic_quant,
    npu_quant_matmul,
    npu_quantize,
    npu_trans_quant_param,
)
from emulated_npu.ops.rope import npu_apply_rotary_pos_emb, npu_rotary_mul
from emulated_npu.ops.storage import npu_format_cast, npu_scatter_nd_update_

OPERATORS = {
    "npu_dynamic_quant": Operator(npu_dynamic_quant, strided=("input", "smooth_scales")),
    "npu_quantize": Operator(npu_quantize, strided=("input", "scales", "zero_points")),
    "npu_trans_quant_param": Operator(npu_trans_quant_param),
    "npu_quant_matmul": Operator(npu_quant_matmul, any_layout=("x2",)),
    "npu_convert_weight_to_int4pack": Operator(npu_convert_weight_to_int4pack, meta=False),
    "npu_weight_quant_batchmatmul": Operator(
        npu_weight_quant_batchmatmul, any_layout=("x", "weight", "antiquant_scale", "antiquant_offset")
    ),
    "npu_rms_norm": Operator(npu_rms_norm, strided=("input", "gamma")),
    "npu_add_rms_norm": Operator(npu_add_rms_norm, strided=("x1", "x2", "gamma")),
    "npu_add_rms_norm_dynamic_quant": Operator(npu_add_rms_norm_dynamic_quant, strided=("x1", "x2", "gamma")),
    "npu_rotary_mul": Operator(npu_rotary_mul, strided=("input", "r1", "r2")),
    "npu_apply_rotary_pos_emb": Operator(npu_apply_rotary_pos_emb, strided=("query", "key", "cos", "sin")),
    "npu_swiglu": Operator(npu_swiglu),
    "npu_swiglu_quant": Operator(npu_swiglu_quant, strided=("x", "smooth_scales")),
    "npu_dequant_swiglu_quant": Operator(npu_dequant_swiglu_quant),
    "npu_fused_infer_attention_score": Operator(fused_infer_attention),
    "_npu_fused_infer_attention_score_get_max_workspace": Operator(
        fused_infer_attention_workspace, meta=False, allocates=True
    ),
    "_npu_fused_infer_attention_score_infer_output": Operator(fused_infer_attention_output, meta=False, allocates=True),
    "npu_fusion_attention_v3": Operator(
        npu_fusion_attention_v3,
        strided=("query", "key", "value", "atten_mask"),
        host=("actual_seq_qlen", "actual_seq_kvlen"),
    ),
    "npu_scatter_nd_update_": Operator(npu_scatter_nd_update_, strided=("input", "indices", "updates")),
    "npu_format_cast": Operator(npu_format_cast, meta=False, allocates=True),
}
"""torch_npu operator name -> its emulation."""

# The overload that graph capture swaps in writes into tensors it was given; it has no Meta kernel.
OUT_OVERLOADS = {"npu_fused_infer_attention_score.out": Operator(fused_infer_attention_out, meta=False)}
