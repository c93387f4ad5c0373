"""Rope, append and split attention of a window, against the reference backend."""

import pytest
import torch

from quasar.backends.base import ActivationQuant, AttentionSpec, KVCache
from quasar.backends.reference import ReferenceBackend

pytest.importorskip("triton")
from quasar_gpu.kernels import attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPACITY = 300


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_cache(kv_heads, head_dim, length, dtype):
    """Positions from `length` on are NaN: nobody may read them."""
    cache = KVCache(1, kv_heads, CAPACITY, head_dim, dtype, torch.device("cpu"))
    cache.k[:, :, :length] = random(kv_heads, length, head_dim, dtype=dtype, seed=1)
    cache.v[:, :, :length] = random(kv_heads, length, head_dim, dtype=dtype, seed=2)
    cache.k[:, :, length:] = cache.v[:, :, length:] = float("nan")
    return cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "normed"), [(4, 2, 16, True), (3, 3, 24, False)])
def test_append_rotated(kernel_device, dtype, heads, kv_heads, head_dim, normed):
    start, tokens = 41, 3
    angles = random(CAPACITY, head_dim // 2) * 3
    cos, sin = angles.cos(), angles.sin()
    q_norm, k_norm = (random(head_dim, dtype=dtype, seed=seed) if normed else None for seed in (3, 4))
    qkv = random(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    cache, mine = (random_cache(kv_heads, head_dim, start, dtype) for _ in range(2))
    cache.length = start
    spec = AttentionSpec(heads, kv_heads, head_dim, q_norm, k_norm, 1e-6)
    here = slice(start, start + tokens)
    want = ReferenceBackend("cpu", dtype).append_rotated(qkv, spec, cos[here], sin[here], cache, 0)

    q = torch.empty(tokens, heads, head_dim, dtype=dtype, device=kernel_device)
    k, v = mine.k[0].to(kernel_device), mine.v[0].to(kernel_device)
    norms = [norm if norm is None else norm.to(kernel_device) for norm in (q_norm, k_norm)]
    tables = cos.to(kernel_device), sin.to(kernel_device)
    attention.append_rotated(
        qkv.to(kernel_device), torch.tensor([start], device=kernel_device), *tables, *norms, 1e-6, k, v, q
    )
    tolerance = (
        {"rtol": 2 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps} if normed else {"rtol": 0, "atol": 0}
    )
    torch.testing.assert_close(q.cpu(), want, **tolerance)
    torch.testing.assert_close(k.cpu(), cache.k[0], equal_nan=True, **tolerance)
    torch.testing.assert_close(v.cpu(), cache.v[0], equal_nan=True, rtol=0, atol=0)


def test_rows_beyond_the_capacity_are_dropped(kernel_device):
    whole = torch.zeros(3, 4, 8, device=kernel_device)
    k, v = whole[0:1], whole[2:3]  # k's next rows are whole[1], which is nobody's
    angles = random(4, 4).to(kernel_device)
    qkv, q = random(3, 3 * 8).to(kernel_device), torch.empty(3, 1, 8, device=kernel_device)
    start = torch.tensor([3], device=kernel_device)
    attention.append_rotated(qkv, start, angles.cos(), angles.sin(), None, None, 1e-6, k, v, q)
    assert (k[0, :3] == 0).all()
    assert (whole[1] == 0).all()
    assert torch.equal(v[0, 3], qkv[0, 16:])


def attend(q, cache, start, reach, device, quantized=False):
    tokens, heads, head_dim = q.shape
    out = torch.empty(tokens, heads * head_dim, dtype=q.dtype, device=device)
    shape = attention.attention_partials_shape(tokens, heads, head_dim, reach)
    partials = torch.full(shape, float("nan"), device=device)
    inputs = q.to(device), cache.k[0].to(device), cache.v[0].to(device), torch.tensor([start], device=device)
    if not quantized:
        attention.window_attention(*inputs, head_dim**-0.5, out, partials, reach)
        return out.cpu()
    values, scale = torch.empty_like(out, dtype=torch.int8), torch.empty(tokens, device=device)
    attention.window_attention_quantize(*inputs, head_dim**-0.5, out, partials, reach, values, scale)
    return values.cpu(), scale.cpu()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "start", "tokens"),
    [(4, 1, 32, 0, 1), (6, 2, 24, 127, 6), (2, 2, 16, 128, 16), (7, 1, 16, 255, 3), (8, 2, 80, 60, 5)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(kernel_device, dtype, heads, kv_heads, head_dim, start, tokens):
    cache = random_cache(kv_heads, head_dim, start + tokens, dtype)
    cache.length = start
    q = random(tokens, heads, head_dim, dtype=dtype)
    got = attend(q, cache, start, 512, kernel_device)
    exact = KVCache(1, kv_heads, CAPACITY, head_dim, torch.float32, torch.device("cpu"))
    exact.k.copy_(cache.k)
    exact.v.copy_(cache.v)
    exact.length = start
    spec = AttentionSpec(heads, kv_heads, head_dim, None, None, 0.0)
    want = ReferenceBackend().attention(q.float(), spec, exact, 0)
    tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_neither_window_nor_reach(kernel_device, dtype):
    start, tokens = 125, 6  # the window crosses a split
    cache = random_cache(2, 16, start + tokens, dtype)
    q = random(tokens, 6, 16, dtype=dtype)
    window = attend(q, cache, start, 256, kernel_device)
    assert torch.equal(attend(q, cache, start, 1024, kernel_device), window)
    for i in range(tokens):
        assert torch.equal(attend(q[i : i + 1], cache, start + i, 256, kernel_device)[0], window[i])
    assert torch.equal(attend(q[2:5], cache, start + 2, 512, kernel_device), window[2:5])


@pytest.mark.parametrize("reach", [256, 4096])  # combined and quantised in one kernel, and in two
def test_quantised_attention_is_attention_quantised(kernel_device, reach):
    cache = random_cache(2, 24, 134, torch.bfloat16)
    q = random(4, 6, 24, dtype=torch.bfloat16)
    values, scale = attend(q, cache, 130, reach, kernel_device, quantized=True)
    want = ReferenceBackend("cpu", torch.bfloat16).quantize(
        attend(q, cache, 130, 256, kernel_device), ActivationQuant()
    )
    assert torch.equal(values, want.values)
    assert torch.equal(scale, want.scale)
