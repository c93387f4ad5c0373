"""Attention: the fused operator for prefill and verification windows, and the one behind SDPA."""

import torch

from emulated_npu.limits import (
    need,
    need_dtype,
    need_emulated,
    need_same_dtype,
    need_shape,
    need_training_card,
)

OPTIMISED_MASK = 2048  # side of the one mask that sparse modes 2, 3 and 4 take
_TRIANGLE = torch.ones(OPTIMISED_MASK, OPTIMISED_MASK, dtype=torch.bool).triu(1)


def _attend(query, key, value, scale, masked):
    """One sequence, float64 inside: q [N, q, D], k, v [kv heads, kv, D], masked [.., q, kv] -> [N, q, D].

    A row with every position masked gives zeros.
    """
    group = query.shape[0] // key.shape[0]
    key, value = (t.double().repeat_interleave(group, 0) for t in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * scale
    if masked is not None:
        scores = scores.masked_fill(masked, -torch.inf)
    return torch.nan_to_num(torch.softmax(scores, -1)) @ value


def _lengths(name: str, given, batch: int, limit: int) -> list[int]:
    """Valid length of each sequence: all of it, one figure for all, or one each."""
    if given is None:
        return [limit] * batch
    given = list(given)
    need(len(given) == 1 or len(given) >= batch, f"{name} needs 1 or {batch} entries")
    lengths = given * batch if len(given) == 1 else given[:batch]
    need(all(0 <= length <= limit for length in lengths), f"{name} {lengths} exceeds {limit}")
    return lengths


def _check_optimised_mask(mask) -> None:
    """Sparse modes 2 to 4 want the fixed 2048 x 2048 upper triangle (True above the diagonal)."""
    need(mask is not None, "this sparse_mode needs atten_mask")
    need(
        mask.dim() in (2, 3, 4) and mask.numel() == OPTIMISED_MASK**2 and mask.shape[-1] == OPTIMISED_MASK,
        f"this sparse_mode wants a 2048 x 2048 mask, not {tuple(mask.shape)}",
    )
    need(
        torch.equal(mask.reshape(OPTIMISED_MASK, OPTIMISED_MASK).bool(), _TRIANGLE),
        "the mask must be the upper triangle",
    )


def _causal(q: int, kv: int, *, bottom_right: bool) -> torch.Tensor:
    """True where a query may not look: right of the diagonal from the top left or to the bottom right."""
    return torch.ones(q, kv, dtype=torch.bool).triu(1 + (kv - q if bottom_right else 0))


def fused_infer_attention(
    query,
    key,
    value,
    num_heads,
    scale,
    input_layout,
    num_key_value_heads,
    sparse_mode,
    atten_mask,
    actual_seq_lengths,
    actual_seq_lengths_kv,
    pre_tokens,
    next_tokens,
    inner_precise,
    softmax_lse_flag,
    block_size,
    antiquant_mode,
    key_antiquant_mode,
    value_antiquant_mode,
    block_table=None,
    **others,
):
    """softmax(scale * q k^T, masked) v for a prompt or a window -> (output laid out as query, empty float32).

    Layouts: BSH, BSND, BNSD, BNSD_BSND, TND. ``sparse_mode`` 0 takes the full mask (True = hidden) or none; 2
    and 3 are causal, aligned to the top left and the bottom right of the valid lengths. Rows past
    ``actual_seq_lengths`` are zero here and undefined on the hardware. With ``block_table`` keys and values are
    [blocks, block_size, kv heads * head size], and the query BSND or TND.
    """
    need_training_card("npu_fused_infer_attention_score")
    used = [name for name, value in others.items() if value is not None]
    need_emulated(not used and not softmax_lse_flag, f"not emulated: {used or 'softmax_lse_flag'}")
    need_dtype("query", query, torch.float16, torch.bfloat16)
    need_same_dtype(query=query, key=key, value=value)
    need_dtype("atten_mask", atten_mask, torch.bool, torch.int8, torch.uint8)
    need(key.shape == value.shape, "key and value must have one shape")
    kv_heads = num_key_value_heads or num_heads
    need(
        num_heads % kv_heads == 0 and num_heads // kv_heads <= 64,
        "query heads per kv head: a whole number <= 64",
    )
    need(num_heads <= 256, "at most 256 heads")
    if block_table is not None:
        return _paged(
            query,
            key,
            value,
            kv_heads,
            scale,
            input_layout,
            sparse_mode,
            atten_mask,
            actual_seq_lengths,
            actual_seq_lengths_kv,
            block_table,
            block_size,
        )
    if input_layout == "TND":
        return _variable_length(
            query,
            key,
            value,
            num_heads,
            kv_heads,
            scale,
            sparse_mode,
            atten_mask,
            actual_seq_lengths,
            actual_seq_lengths_kv,
        )
    q, k, v = (
        _to_bnsd(t, heads, input_layout) for t, heads in ((query, num_heads), (key, kv_heads), (value, kv_heads))
    )
    batch, _, q_length, head = q.shape
    kv_length = k.shape[2]
    need(k.shape[0] == batch and k.shape[3] == head, "query and key differ in batch or head size")
    _check_query(batch, q_length, head, q.element_size())
    need(q_length > 1 or kv_length <= 262144, "decoding takes at most 262144 cached positions")
    need(q_length > 1 or input_layout != "BNSD_BSND", "BNSD_BSND is for more than one query position")
    # Documented: with one query position the lengths of the query and sparse_mode are ignored.
    q_valid = _lengths("actual_seq_lengths", actual_seq_lengths if q_length > 1 else None, batch, q_length)
    kv_valid = _lengths("actual_seq_lengths_kv", actual_seq_lengths_kv, batch, kv_length)
    mode = sparse_mode if q_length > 1 else 0
    need(mode in (0, 1, 2, 3, 4), f"sparse_mode {mode}")
    need_emulated(mode != 4, "sparse_mode 4 (band)")
    if mode in (2, 3):
        _check_optimised_mask(atten_mask)
    else:
        need(mode == 0 or atten_mask is not None, "sparse_mode 1 needs atten_mask")
        atten_mask = _full_mask(atten_mask, batch, q_length, kv_length)
        wide = pre_tokens >= kv_length and next_tokens >= kv_length
        need_emulated(mode == 1 or atten_mask is None or wide, "pre_tokens / next_tokens that cut")

    out = torch.zeros_like(q, dtype=torch.float64)
    for row, (rows, columns) in enumerate(zip(q_valid, kv_valid, strict=True)):
        if mode in (2, 3):
            masked = _causal(rows, columns, bottom_right=mode == 3)
        else:
            masked = None if atten_mask is None else atten_mask[row, 0, :rows, :columns]
        if columns:
            out[row, :, :rows] = _attend(q[row, :, :rows], k[row, :, :columns], v[row, :, :columns], scale, masked)
    result = _from_bnsd(out, input_layout).to(query.dtype)
    return result, torch.empty(0)


def _check_query(batch: int, q_length: int, head: int, itemsize: int) -> None:
    need(head <= 512 and head * itemsize % 32 == 0, f"head size {head}: <= 512 and 32-byte aligned")
    need(q_length == 1 or batch <= 128, f"{batch} sequences: at most 128 with more than one query position")


def _paged(q, k, v, kv_heads, scale, layout, sparse_mode, mask, q_ends, kv_lengths, block_table, block_size):
    """Keys and values in blocks: sequence i's positions lie in the blocks of row i of the table, in order."""
    need_dtype("block_table", block_table, torch.int32)
    need(block_table.dim() == 2, "block_table must be [sequences, blocks]")
    need(k.dim() == 3 and k.shape[1] == block_size, "paged keys must be [blocks, block_size, kv heads * head size]")
    need(k.shape[2] % kv_heads == 0 and k.shape[2] <= 65535, "paged keys: kv heads * head size <= 65535")
    need(kv_lengths is not None, "block_table needs actual_seq_lengths_kv")
    need(bool(((block_table >= 0) & (block_table < k.shape[0])).all()), "block_table points outside the blocks")
    sequences, most = block_table.shape[0], block_table.shape[1] * block_size
    lengths = list(kv_lengths)
    need(len(lengths) == sequences, f"actual_seq_lengths_kv needs {sequences} entries")
    need(all(0 < length <= most for length in lengths), f"actual_seq_lengths_kv {lengths} exceeds the table's {most}")
    head = q.shape[-1]
    need(k.shape[2] == kv_heads * head, "query and key differ in head size")
    if layout == "TND":
        need(head in (128, 192), f"TND takes head size 128 or 192, not {head}")
        need(q.dim() == 3 and q_ends is not None, "TND wants [tokens, heads, head size] and actual_seq_lengths")
        ends = list(q_ends)
        need(len(ends) == sequences and sorted(ends) == ends, "actual_seq_lengths must be cumulated, one per sequence")
        need(ends[-1] == q.shape[0], "actual_seq_lengths must end with the number of tokens")
        need(sparse_mode == 3, "TND with block_table is emulated with sparse_mode 3 only")
        queries, rows = [q[first:last] for first, last in _spans(ends)], max(b - a for a, b in _spans(ends))
        _check_query(sequences, rows, head, q.element_size())
    else:
        need_emulated(layout == "BSND", f"block_table with layout {layout}")
        need(q.dim() == 4 and q.shape[0] == sequences, "BSND wants [sequences, rows, heads, head size]")
        need_emulated(q_ends is None, "BSND with actual_seq_lengths")
        queries, rows = list(q), q.shape[1]
        _check_query(sequences, rows, head, q.element_size())
    need(block_size % (128 if rows > 1 else 16) == 0 and block_size <= 512, f"block_size {block_size}")
    mode = sparse_mode if rows > 1 or layout == "TND" else 0
    need_emulated(mode in (0, 3), "block_table with sparse_mode 0 or 3")
    if mode == 3:
        _check_optimised_mask(mask)
    else:
        mask = _full_mask(mask, sequences, rows, most)
    outputs = []
    for i, (rows_of, length) in enumerate(zip(queries, lengths, strict=True)):
        keys, values = (t[block_table[i].long()].reshape(most, kv_heads, head)[:length].transpose(0, 1) for t in (k, v))
        if mode == 3:
            masked = _causal(rows_of.shape[0], length, bottom_right=True)
        else:
            masked = None if mask is None else mask[i, 0, :, :length]
            need(masked is None or not bool(masked.all(-1).any()), "a row that sees nothing gives NaN")
        outputs.append(_attend(rows_of.transpose(0, 1), keys, values, scale, masked).transpose(0, 1))
    result = torch.cat(outputs) if layout == "TND" else torch.stack(outputs)
    return result.contiguous().to(q.dtype), torch.empty(0)


def _to_bnsd(tensor, heads: int, layout: str):
    dims = 3 if layout == "BSH" else 4
    need_emulated(layout in ("BSH", "BSND", "BNSD", "BNSD_BSND"), f"layout {layout}")
    need(tensor.dim() == dims, f"{layout} wants {dims} dimensions")
    if layout == "BSH":
        need(tensor.shape[-1] % heads == 0, "the last dimension is not heads x head size")
        tensor = tensor.unflatten(-1, (heads, -1))
    if layout in ("BSH", "BSND"):
        tensor = tensor.transpose(1, 2)
    need(tensor.shape[1] == heads, f"{tensor.shape[1]} heads where {heads} were announced")
    return tensor


def _from_bnsd(tensor, layout: str):
    if layout == "BNSD":
        return tensor.contiguous()
    tensor = tensor.transpose(1, 2)
    return tensor.flatten(2).contiguous() if layout == "BSH" else tensor.contiguous()


def _full_mask(mask, batch: int, q: int, kv: int):
    """The mask as bool [batch, 1, q, kv], if its shape is one of the documented ones."""
    if mask is None:
        return None
    allowed = {(1, q, kv), (batch, 1, q, kv), (1, 1, q, kv), (q, kv) if q > 1 else (batch, kv)}
    need(
        tuple(mask.shape) in allowed,
        f"atten_mask has shape {tuple(mask.shape)}, not one of {sorted(allowed)}",
    )
    if mask.dim() == 2 and q == 1:
        mask = mask.view(batch, 1, 1, kv)
    return mask.bool().expand(batch, 1, q, kv)


def _variable_length(q, k, v, heads, kv_heads, scale, sparse_mode, mask, q_ends, kv_ends):
    """TND: sequences one after another, each addressed by the cumulated length where it ends."""
    need(
        q.dim() == 3 and q.shape[1] == heads and k.shape[1] == kv_heads,
        "TND wants [tokens, heads, head size]",
    )
    need(q.shape[-1] in (128, 192), f"TND takes head size 128 or 192, not {q.shape[-1]}")
    need(q_ends is not None and kv_ends is not None, "TND needs both actual_seq_lengths, cumulated")
    q_ends, kv_ends = list(q_ends), list(kv_ends)
    need(
        len(q_ends) == len(kv_ends) and sorted(q_ends) == q_ends and sorted(kv_ends) == kv_ends,
        "actual_seq_lengths must be cumulated, one entry per sequence",
    )
    need(q_ends[-1] <= q.shape[0] and kv_ends[-1] <= k.shape[0], "actual_seq_lengths exceed the tokens given")
    need_emulated(sparse_mode in (0, 3), "TND with sparse_mode 0 or 3")
    if sparse_mode == 3:
        _check_optimised_mask(mask)
    else:
        need_emulated(mask is None, "TND with a full mask")
    out = torch.zeros_like(q, dtype=torch.float64)
    for (q0, q1), (k0, k1) in zip(_spans(q_ends), _spans(kv_ends), strict=True):
        masked = _causal(q1 - q0, k1 - k0, bottom_right=True) if sparse_mode == 3 else None
        out[q0:q1] = _attend(
            q[q0:q1].transpose(0, 1), k[k0:k1].transpose(0, 1), v[k0:k1].transpose(0, 1), scale, masked
        ).transpose(0, 1)
    return out.to(q.dtype), torch.empty(0)


def _spans(ends: list[int]) -> list[tuple[int, int]]:
    return list(zip([0, *ends[:-1]], ends, strict=True))


def fused_infer_attention_out(workspace, out, **arguments):
    """The same into given tensors: what torch_npu calls while it captures with auto_dispatch_capture."""
    result, lse = fused_infer_attention(**arguments)
    need(out[0].shape == result.shape and out[0].dtype == result.dtype, "out has another shape or dtype")
    out[0].copy_(result)
    return out[0], out[1] if len(out) > 1 else lse


def fused_infer_attention_workspace(**arguments):
    """Scratch memory for the call above; its size means nothing here."""
    return torch.empty(512, dtype=torch.uint8, device="npu")


def fused_infer_attention_output(
    query,
    value,
    input_layout,
    quant_scale2,
    block_table,
    num_heads,
    num_key_value_heads,
    softmax_lse_flag,
    query_rope,
):
    """Empty tensors for the two results, as the real Meta kernel sizes them."""
    q, v = (torch.empty(t.shape, dtype=t.dtype, device="meta") for t in (query, value))
    results = torch.ops.npu.npu_fused_infer_attention_score(
        q,
        v,
        v,
        num_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        input_layout=input_layout,
        softmax_lse_flag=softmax_lse_flag,
    )
    return tuple(torch.empty(r.shape, dtype=r.dtype, device="npu") for r in results)


def npu_fusion_attention_v3(
    query,
    key,
    value,
    head_num,
    input_layout,
    atten_mask,
    scale,
    keep_prob,
    sparse_mode,
    actual_seq_qlen,
    actual_seq_kvlen,
    pse,
    padding_mask,
    prefix,
    sink,
    **others,
):
    """What scaled_dot_product_attention becomes: BNSD; no mask, a full bool one, or causal from the top left.

    Only the first result is computed; the softmax statistics, which a backward pass would read, are zeros.
    """
    need_training_card("npu_fusion_attention_v3")
    need_emulated(input_layout == "BNSD" and keep_prob == 1.0 and sparse_mode in (0, 2), "only what SDPA asks for")
    extras = (actual_seq_qlen, actual_seq_kvlen, pse, padding_mask, prefix, sink)
    need_emulated(all(extra is None for extra in extras), "only what SDPA asks for")
    need_dtype("query", query, torch.float32, torch.float16, torch.bfloat16)
    need_same_dtype(query=query, key=key, value=value)
    need_dtype("atten_mask", atten_mask, torch.bool, torch.uint8)
    batch, heads, q_length, _ = query.shape
    need(heads == head_num and heads % key.shape[1] == 0, "head counts do not fit")
    if sparse_mode == 2:
        _check_optimised_mask(atten_mask)
        masked = _causal(q_length, key.shape[2], bottom_right=False).expand(batch, 1, q_length, -1)
    elif atten_mask is None:
        masked = None
    else:
        square = (q_length, key.shape[2])
        shapes = square, (1, 1, *square), (batch, 1, *square), (batch, heads, *square)
        need_shape("atten_mask", atten_mask, *shapes)
        masked = atten_mask.bool().expand(batch, heads, *square)
    rows = [
        _attend(query[row], key[row], value[row], scale, None if masked is None else masked[row])
        for row in range(batch)
    ]
    statistics = torch.zeros(batch, heads, q_length, 8)
    out = torch.stack(rows).to(query.dtype)
    dropout = torch.zeros(1, dtype=torch.int64)  # seed and offset of a dropout that never happens
    return out, statistics, statistics.clone(), torch.empty(0, dtype=query.dtype), dropout, dropout.clone()
