"""The schemas of the operators that Quasar calls, in every op-plugin branch, and the binding of a call against them.

op-plugin is the part of torch_npu that declares its operators; each torch_npu release is built with one branch of it.
The emulated runs go through one package, 2.13. Here every call that they make is bound, argument by argument, against
the schemas of the releases that people have installed, so that a call which one of them would refuse fails a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from emulated_npu.limits import Refused

# Branch -> (CANN, torch_npu). The primary target is 26.1.0: CANN 9.1 with torch_npu 2.10.
BRANCHES = {
    "7.0.0": ("8.1 and 8.2", "2.5.1"),
    "7.1.0": ("8.2", "2.5.1.post1 and 2.6.0"),
    "7.2.0": ("8.3.RC1", "2.6.0.post3, 2.7.1 and 2.8.0"),
    "7.3.0": ("8.5.0", "2.6.0.post5, 2.7.1.post2, 2.8.0.post2 and 2.9.0"),
    "26.0.0": ("9.0", "2.7.1.post4 to 2.10"),
    "26.1.0": ("9.1", "2.7.1.post4 to 2.12.0"),
    "master": ("9.1 and later", "2.13.0"),
}
# Those before 7.2.0 lack npu_add_rms_norm_dynamic_quant; `branch_as` emulates them.
CURRENT = ("7.2.0", "7.3.0", "26.0.0", "26.1.0", "master")

# Operator -> (branches, schema) of each form that it has had.
SCHEMAS: dict[str, tuple[tuple[tuple[str, ...], str], ...]] = {
    "npu_add_rms_norm": (
        (
            (
                "7.0.0",
                "7.1.0",
                "7.2.0",
                "7.3.0",
                "26.0.0",
                "26.1.0",
                "master",
            ),
            "npu_add_rms_norm(Tensor x1, Tensor x2, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor, Tensor)",
        ),
    ),
    "npu_add_rms_norm_dynamic_quant": (
        (
            (
                "7.2.0",
                "7.3.0",
            ),
            "npu_add_rms_norm_dynamic_quant(Tensor x1, Tensor x2, Tensor gamma, *, "
            "Tensor? smooth_scale1=None, Tensor? smooth_scale2=None, Tensor? beta=None, "
            "float epsilon=1e-6, bool[2] output_mask=[]) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        ),
        (
            (
                "26.0.0",
                "26.1.0",
            ),
            "npu_add_rms_norm_dynamic_quant(Tensor x1, Tensor x2, Tensor gamma, *, "
            "Tensor? smooth_scale1=None, Tensor? smooth_scale2=None, Tensor? beta=None, "
            "float epsilon=1e-6, bool[2] output_mask=[], ScalarType? y_dtype=None) -> (Tensor, Tensor, "
            "Tensor, Tensor, Tensor)",
        ),
        (
            ("master",),
            "npu_add_rms_norm_dynamic_quant(Tensor x1, Tensor x2, Tensor gamma, *, "
            "Tensor? smooth_scale1=None, Tensor? smooth_scale2=None, Tensor? beta=None, "
            "float epsilon=1e-6, bool[2]? output_mask=None, int? y_dtype=None) -> (Tensor, Tensor, "
            "Tensor, Tensor, Tensor)",
        ),
    ),
    "npu_apply_rotary_pos_emb": (
        (
            (
                "7.0.0",
                "7.1.0",
            ),
            "npu_apply_rotary_pos_emb(Tensor query, Tensor key, Tensor cos, Tensor sin, "
            "str layout='BSH') -> (Tensor, Tensor)",
        ),
        (
            (
                "7.2.0",
                "7.3.0",
                "26.0.0",
            ),
            "npu_apply_rotary_pos_emb(Tensor query, Tensor key, Tensor cos, Tensor sin, "
            "str layout='BSH', str rotary_mode='half') -> (Tensor, Tensor)",
        ),
        (
            (
                "26.1.0",
                "master",
            ),
            "npu_apply_rotary_pos_emb(Tensor query, Tensor key, Tensor cos, Tensor sin, "
            "str layout='BSND', str rotary_mode='half') -> (Tensor, Tensor)",
        ),
    ),
    "npu_convert_weight_to_int4pack": (
        (
            (
                "7.0.0",
                "7.1.0",
                "7.2.0",
                "7.3.0",
                "26.0.0",
                "26.1.0",
                "master",
            ),
            "npu_convert_weight_to_int4pack(Tensor weight, int inner_k_tiles=0) -> Tensor",
        ),
    ),
    "npu_dequant_swiglu_quant": (
        (
            (
                "7.0.0",
                "7.1.0",
            ),
            "npu_dequant_swiglu_quant(Tensor x, *, Tensor? weight_scale=None, "
            "Tensor? activation_scale=None, Tensor? bias=None, Tensor? quant_scale=None, "
            "Tensor? quant_offset=None, Tensor? group_index=None, bool activate_left=False, "
            "int quant_mode=0) -> (Tensor, Tensor)",
        ),
        (
            (
                "7.2.0",
                "7.3.0",
            ),
            "npu_dequant_swiglu_quant(Tensor x, *, Tensor? weight_scale=None, "
            "Tensor? activation_scale=None, Tensor? bias=None, Tensor? quant_scale=None, "
            "Tensor? quant_offset=None, Tensor? group_index=None, bool activate_left=False, "
            "int quant_mode=0, int swiglu_mode=0, float clamp_limit=7.0, float glu_alpha=1.702, "
            "float glu_bias=1.0) -> (Tensor, Tensor)",
        ),
        (
            (
                "26.0.0",
                "26.1.0",
                "master",
            ),
            "npu_dequant_swiglu_quant(Tensor x, *, Tensor? weight_scale=None, "
            "Tensor? activation_scale=None, Tensor? bias=None, Tensor? quant_scale=None, "
            "Tensor? quant_offset=None, Tensor? group_index=None, bool activate_left=False, "
            "int quant_mode=0, int? dst_type=None, int? round_mode=None, int? activate_dim=None, "
            "int swiglu_mode=0, float clamp_limit=7.0, float glu_alpha=1.702, "
            "float glu_bias=1.0) -> (Tensor, Tensor)",
        ),
    ),
    "npu_dynamic_quant": (
        (
            (
                "7.0.0",
                "7.1.0",
                "7.2.0",
                "7.3.0",
            ),
            "npu_dynamic_quant(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, "
            "ScalarType? dst_type=None) -> (Tensor, Tensor)",
        ),
        (
            (
                "26.0.0",
                "26.1.0",
                "master",
            ),
            "npu_dynamic_quant(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, "
            "int? dst_type=None, str quant_mode='pertoken', float dst_type_max=0.0) -> (Tensor, Tensor)",
        ),
    ),
    "npu_fused_infer_attention_score": (
        (
            (
                "7.0.0",
                "7.1.0",
                "7.2.0",
                "7.3.0",
                "26.0.0",
                "26.1.0",
                "master",
            ),
            "npu_fused_infer_attention_score(Tensor query, Tensor key, Tensor value, *, "
            "Tensor? pse_shift=None, Tensor? atten_mask=None, SymInt[]? actual_seq_lengths=None, "
            "SymInt[]? actual_seq_lengths_kv=None, Tensor? dequant_scale1=None, "
            "Tensor? quant_scale1=None, Tensor? dequant_scale2=None, Tensor? quant_scale2=None, "
            "Tensor? quant_offset2=None, Tensor? antiquant_scale=None, Tensor? antiquant_offset=None, "
            "Tensor? key_antiquant_scale=None, Tensor? key_antiquant_offset=None, "
            "Tensor? value_antiquant_scale=None, Tensor? value_antiquant_offset=None, "
            "Tensor? block_table=None, Tensor? query_padding_size=None, Tensor? kv_padding_size=None, "
            "Tensor? key_shared_prefix=None, Tensor? value_shared_prefix=None, "
            "SymInt[]? actual_shared_prefix_len=None, Tensor? query_rope=None, Tensor? key_rope=None, "
            "Tensor? key_rope_antiquant_scale=None, int num_heads=1, float scale=1.0, "
            "int pre_tokens=2147483647, int next_tokens=2147483647, str input_layout='BSH', "
            "int num_key_value_heads=0, int sparse_mode=0, int inner_precise=0, int block_size=0, "
            "int antiquant_mode=0, int key_antiquant_mode=0, int value_antiquant_mode=0, "
            "bool softmax_lse_flag=False) -> (Tensor, Tensor)",
        ),
    ),
    "npu_quant_matmul": (
        (
            ("7.0.0",),
            "npu_quant_matmul(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, "
            "Tensor? pertoken_scale=None, Tensor? bias=None, ScalarType? output_dtype=None) -> Tensor",
        ),
        (
            (
                "7.0.0",
                "7.1.0",
            ),
            "npu_quant_matmul(Tensor x1, Tensor x2, Tensor scale, Tensor? offset=None, "
            "Tensor? bias=None, str? output_dtype=None) -> Tensor",
        ),
        (
            (
                "7.1.0",
                "7.2.0",
                "7.3.0",
            ),
            "npu_quant_matmul(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, "
            "Tensor? pertoken_scale=None, Tensor? bias=None, ScalarType? output_dtype=None, "
            "SymInt[]? group_sizes=None) -> Tensor",
        ),
        (
            (
                "26.0.0",
                "26.1.0",
                "master",
            ),
            "npu_quant_matmul(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, "
            "Tensor? pertoken_scale=None, Tensor? bias=None, int? output_dtype=None, int? x1_dtype=None, "
            "int? x2_dtype=None, int? pertoken_scale_dtype=None, int? scale_dtype=None, "
            "int[]? group_sizes=None, Tensor? y_scale=None) -> Tensor",
        ),
    ),
    "npu_quantize": (
        (
            (
                "7.0.0",
                "7.1.0",
                "7.2.0",
                "7.3.0",
            ),
            "npu_quantize(Tensor self, Tensor scales, Tensor? zero_points, ScalarType dtype, int axis=1, "
            "bool div_mode=True) -> Tensor",
        ),
        (
            (
                "26.0.0",
                "26.1.0",
                "master",
            ),
            "npu_quantize(Tensor self, Tensor scales, Tensor? zero_points, int dtype, int axis=1, "
            "bool div_mode=True) -> Tensor",
        ),
    ),
    "npu_rms_norm": (
        (
            (
                "7.0.0",
                "7.1.0",
                "7.2.0",
                "7.3.0",
                "26.0.0",
                "26.1.0",
                "master",
            ),
            "npu_rms_norm(Tensor self, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)",
        ),
    ),
    "npu_rotary_mul": (
        (
            (
                "7.0.0",
                "7.1.0",
                "7.2.0",
                "7.3.0",
            ),
            "npu_rotary_mul(Tensor self, Tensor r1, Tensor r2, str rotary_mode='half') -> Tensor",
        ),
        (
            (
                "26.0.0",
                "26.1.0",
                "master",
            ),
            "npu_rotary_mul(Tensor self, Tensor r1, Tensor r2, str rotary_mode='half', Tensor? rotate=None) -> Tensor",
        ),
    ),
    "npu_scatter_nd_update_": (
        (
            (
                "7.0.0",
                "7.1.0",
                "7.2.0",
                "7.3.0",
                "26.0.0",
                "26.1.0",
                "master",
            ),
            "npu_scatter_nd_update_(Tensor(a!) self, Tensor indices, Tensor updates) -> Tensor(a!)",
        ),
    ),
    "npu_swiglu": (
        (
            (
                "7.0.0",
                "7.1.0",
                "7.2.0",
                "7.3.0",
                "26.0.0",
                "26.1.0",
                "master",
            ),
            "npu_swiglu(Tensor self, int dim=-1) -> Tensor",
        ),
    ),
    "npu_swiglu_quant": (
        (
            (
                "7.2.0",
                "7.3.0",
                "26.0.0",
                "26.1.0",
                "master",
            ),
            "npu_swiglu_quant(Tensor x, *, Tensor? smooth_scales=None, Tensor? offsets=None, "
            "Tensor? group_index=None, bool activate_left=False, int quant_mode=0, "
            "int group_list_type=0, ScalarType? dst_type=None) -> (Tensor, Tensor)",
        ),
    ),
    "npu_trans_quant_param": (
        (("7.0.0",), "npu_trans_quant_param(Tensor scale, Tensor? offset=None) -> Tensor"),
        (
            (
                "7.1.0",
                "7.2.0",
                "7.3.0",
                "26.0.0",
                "26.1.0",
                "master",
            ),
            "npu_trans_quant_param(Tensor scale, Tensor? offset=None, int? round_mode=0) -> Tensor",
        ),
    ),
    "npu_weight_quant_batchmatmul": (
        (
            (
                "7.0.0",
                "7.1.0",
                "7.2.0",
                "7.3.0",
            ),
            "npu_weight_quant_batchmatmul(Tensor x, Tensor weight, Tensor antiquant_scale, "
            "Tensor? antiquant_offset=None, Tensor? quant_scale=None, Tensor? quant_offset=None, "
            "Tensor? bias=None, int antiquant_group_size=0, int inner_precise=0) -> Tensor",
        ),
        (
            (
                "26.0.0",
                "26.1.0",
                "master",
            ),
            "npu_weight_quant_batchmatmul(Tensor x, Tensor weight, Tensor antiquant_scale, "
            "Tensor? antiquant_offset=None, Tensor? quant_scale=None, Tensor? quant_offset=None, "
            "Tensor? bias=None, int antiquant_group_size=0, int inner_precise=0, "
            "int? weight_dtype=None) -> Tensor",
        ),
    ),
}
# Declared in torch_npu itself, not in op-plugin, and unchanged: (Tensor self, int acl_format) and (Tensor self).
_OWN = ("npu_format_cast", "get_npu_format")

_branches: tuple[str, ...] = CURRENT
calls: set[str] = set()  # every operator that was called by name, since the process began


@contextmanager
def branch_as(branch: str) -> Iterator[None]:
    """Inside the block torch_npu is that branch's: calls are bound against it alone, and what it lacks is not there."""
    import torch_npu

    global _branches
    before, _branches = _branches, (branch,)
    absent = {
        name: getattr(torch_npu, name) for name in SCHEMAS if hasattr(torch_npu, name) and not forms(name, branch)
    }
    for name in absent:
        delattr(torch_npu, name)
    try:
        yield
    finally:
        _branches = before
        for name, function in absent.items():
            setattr(torch_npu, name, function)


def old_cann() -> bool:
    """Whether a branch of before CANN 9 is among those that calls are held to."""
    return any(branch.startswith("7.") for branch in _branches)


@cache
def forms(operator: str, branch: str) -> tuple[Any, ...]:
    """The operator's schemas in a branch, parsed by torch."""
    return tuple(torch._C.parse_schema(schema) for branches, schema in SCHEMAS[operator] if branch in branches)


def watch_calls() -> None:
    """From now on every operator that is called as torch_npu.npu_... is bound before it runs."""
    import torch_npu

    for name in dir(torch_npu):
        function = getattr(torch_npu, name)
        if name.startswith("npu_") and callable(function):
            setattr(torch_npu, name, _Watched(name, function))


class _Watched:
    """torch_npu's function, its overloads (`.out`) within reach."""

    def __init__(self, name: str, function: Any) -> None:
        self._name, self._function = name, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        check_call(self._name, args, kwargs)
        return self._function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)


def check_call(operator: str, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raises Refused if a torch_npu in use would not accept the call.

    Calls of operators outside the table are refused too: nobody has looked at their schemas.
    """
    calls.add(operator)
    if operator in _OWN:
        return
    if operator not in SCHEMAS:
        from emulated_npu.ops import OPERATORS

        if operator not in OPERATORS:
            return  # the device says that it is not emulated
        raise Refused(f"{operator} is not in the table of schemas (tests/ascend/emulated_npu/schemas.py)")
    kinds = tuple(map(_kind, args)), tuple((name, _kind(value)) for name, value in kwargs.items())
    for branch in _branches:
        _check(operator, branch, *kinds)


@cache
def _check(operator: str, branch: str, args: tuple, kwargs: tuple) -> None:
    reasons = [refusal(schema, args, dict(kwargs)) for schema in forms(operator, branch)]
    if None not in reasons:
        cann, releases = BRANCHES[branch]
        why = reasons[0] if reasons else "it has no such operator"
        raise Refused(f"{operator}: torch_npu {releases} (CANN {cann}) refuses this call: {why}")


def refusal(schema: Any, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Why a schema does not take arguments of these kinds; None where it does."""
    positional = [argument for argument in schema.arguments if not argument.kwarg_only]
    if len(args) > len(positional):
        return f"{len(args)} positional arguments, {len(positional)} taken"
    given = {argument.name: kind for argument, kind in zip(positional, args, strict=False)}
    known = {argument.name: argument for argument in schema.arguments}
    for name, kind in kwargs.items():
        if name not in known:
            return f"no argument {name}"
        if name in given:
            return f"two values for {name}"
        given[name] = kind
    for name, argument in known.items():
        if name not in given:
            if not argument.has_default_value():
                return f"{name} is missing"
            given[name] = _kind(argument.default_value)
        if not _fits(given[name], argument.type, argument.N):
            return f"{name} is {_said(given[name])}, the schema says {argument.type}{_length(argument.N)}"
    return None


# What matters of a value to a schema: hashable, so that each kind of call is bound once.
def _kind(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return ("list", *map(_kind, value))
    for kind in (torch.Tensor, torch.dtype):
        if isinstance(value, kind):
            return kind
    return type(value)


def _said(kind: Any) -> str:
    if isinstance(kind, tuple):
        return f"a list of {len(kind) - 1}"
    return getattr(kind, "__name__", str(kind))


def _length(size: int | None) -> str:
    return f" of {size}" if size else ""


def _fits(kind: Any, wanted: Any, size: int | None) -> bool:
    """Whether torch would convert a value of this kind; `size` is the length of a fixed-size list."""
    name = wanted.kind()
    if name == "OptionalType":
        return kind is type(None) or _fits(kind, wanted.getElementType(), size)
    if name == "ListType":
        # A default of the wrong length parses, and fails when the operator is called.
        if not isinstance(kind, tuple) or (size and len(kind) - 1 != size):
            return False
        return all(_fits(element, wanted.getElementType(), None) for element in kind[1:])
    accepted = {
        "TensorType": (torch.Tensor,),
        "IntType": (int, bool, torch.dtype),  # a dtype travels as its number
        "SymIntType": (int,),
        "FloatType": (float, int),
        "BoolType": (bool,),
        "StringType": (str,),
    }
    return kind in accepted[name]
