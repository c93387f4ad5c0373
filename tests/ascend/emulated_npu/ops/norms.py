"""RMSNorm, alone and fused with the residual addition and the per-token quantisation around it."""

import torch

from emulated_npu.limits import (
    is_inference_card,
    need,
    need_dtype,
    need_emulated,
    need_same_dtype,
    need_shape,
    need_training_card,
)
from emulated_npu.ops.quantised import quantise_rows


def _normalise(x: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 result and 1/rms over the trailing dimensions that gamma spans (kept, with size 1)."""
    need(
        gamma.dim() <= x.dim() and x.shape[x.dim() - gamma.dim() :] == gamma.shape,
        f"gamma {tuple(gamma.shape)} does not match the end of {tuple(x.shape)}",
    )
    x = x.float()
    dims = tuple(range(-gamma.dim(), 0))
    rstd = torch.rsqrt(x.square().mean(dims, keepdim=True) + epsilon)
    return x * rstd * gamma.float(), rstd


def npu_rms_norm(input, gamma, epsilon):
    """[..., n], gamma [n] -> normalised (dtype of input), float32 1/rms [..., 1]. Gamma may be float32."""
    need_dtype("input", input, torch.float32, torch.float16, torch.bfloat16)
    need(input.dim() >= 2, "input needs at least two dimensions")
    if gamma.dtype != torch.float32 or is_inference_card():
        need_same_dtype(input=input, gamma=gamma)
    if is_inference_card():
        need(gamma.shape[-1] * gamma.element_size() >= 32, "inference cards want rows of 32 bytes and more")
    result, rstd = _normalise(input, gamma, epsilon)
    return result.to(input.dtype), rstd


def _added(x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
    """float32: what the fused kernels normalise. They add bfloat16 in float32, float16 in float16."""
    return x1.float() + x2.float() if x1.dtype == torch.bfloat16 else (x1 + x2).float()


def npu_add_rms_norm(x1, x2, gamma, epsilon):
    """Residual addition and norm of the sum -> normalised, float32 1/rms, the sum.

    The normalised value is rounded to the activations' type before gamma is applied, and after.
    """
    need_dtype("x1", x1, torch.float32, torch.float16, torch.bfloat16)
    need_same_dtype(x1=x1, x2=x2, gamma=gamma)
    need_shape("x2", x2, tuple(x1.shape))
    total = _added(x1, x2)
    unweighted, rstd = _normalise(total, torch.ones_like(gamma, dtype=torch.float32), epsilon)
    return (unweighted.to(x1.dtype).float() * gamma.float()).to(x1.dtype), rstd, total.to(x1.dtype)


def npu_add_rms_norm_dynamic_quant(x1, x2, gamma, smooth_scale1, smooth_scale2, beta, epsilon, output_mask, y_dtype):
    """x = x1 + x2, y = norm(x), each quantised per token -> int8 y1, int8 y2, x, float32 scale1, scale2.

    ``output_mask`` chooses which of the two quantised outputs exist (default: the first); the others come
    back with shape [0]. The norm is not rounded to the input's dtype before it is quantised: the documented
    formula has no such step.
    """
    need_training_card("npu_add_rms_norm_dynamic_quant")
    need_dtype("x1", x1, torch.float16, torch.bfloat16)
    need_same_dtype(x1=x1, x2=x2, gamma=gamma, smooth_scale1=smooth_scale1, smooth_scale2=smooth_scale2, beta=beta)
    need(x1.dim() >= 2, "x1 needs at least two dimensions")
    need_shape("x2", x2, tuple(x1.shape))
    for name, vector in (
        ("gamma", gamma),
        ("smooth_scale1", smooth_scale1),
        ("smooth_scale2", smooth_scale2),
        ("beta", beta),
    ):
        need_shape(name, vector, (x1.shape[-1],))
    need_emulated(y_dtype in (None, 1), "only int8")
    smooth = (smooth_scale1, smooth_scale2)
    if output_mask is None:
        need(smooth_scale2 is None or smooth_scale1 is not None, "smooth_scale2 without smooth_scale1")
        wanted = (True, smooth_scale1 is not None and smooth_scale2 is not None)
    else:
        wanted = tuple(output_mask)
        need(any(wanted), "output_mask asks for nothing")
        for want, factor in zip(wanted, smooth, strict=True):
            need(want or factor is None, "a smooth_scale for an output that output_mask leaves out")

    total = _added(x1, x2)
    norm, _ = _normalise(total, gamma, epsilon)
    if beta is not None:
        norm = norm + beta.float()
    outputs, scales = [], []
    for want, factor in zip(wanted, smooth, strict=True):
        branch = norm if factor is None else norm * factor.float()
        y, scale = quantise_rows(branch) if want else (torch.empty(0, dtype=torch.int8), torch.empty(0))
        outputs.append(y)
        scales.append(scale)
    return outputs[0], outputs[1], total.to(x1.dtype), scales[0], scales[1]
