"""The dispatch mode that runs operators on ``npu`` tensors: aten ones on the CPU, npu ones by ``ops/``."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from emulated_npu import counts, graphs
from emulated_npu.graphs import Launch
from emulated_npu.limits import NotEmulated, Refused, is_fractal, is_inference_card, need, soc_name
from emulated_npu.memory import device_copy, host_view
from emulated_npu.ops import OPERATORS, OUT_OVERLOADS, Operator
from emulated_npu.schemas import old_cann

aten = torch.ops.aten

# torch_npu's C++ allocates and inspects for real; none of these starts a kernel.
_NATIVE = {
    aten.empty,
    aten.empty_strided,
    aten.empty_like,
    aten.new_empty,
    aten.new_empty_strided,
    aten.set_,
    aten.resize_,
    aten._resize_output_,
    aten.record_stream,
    aten.is_pinned,
    aten._pin_memory,
    aten.pin_memory,
    aten._has_compatible_shallow_copy_type,
    aten.is_same_size,
    aten.lift,
}
_NATIVE_NPU = {"get_npu_format", "get_storage_size", "empty_with_format", "unsafe_empty_with_format"}
_MATRIX_PRODUCTS = {
    aten.mm,
    aten.bmm,
    aten.addmm,
    aten.baddbmm,
    aten.matmul,
    aten.linear,
    aten.mv,
    aten.addmv,
    aten.dot,
    aten._int_mm,
}
# A weight in FRACTAL_NZ may be looked at this way; any other view or kernel would read scrambled elements.
_FRACTAL_VIEWS = {aten.t, aten.transpose, aten.detach, aten.alias}


class EmulatedDevice(TorchDispatchMode):
    """While entered, operators on ``npu`` tensors run; everything else passes through untouched."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        on_device = [tensor for tensor in tensors if tensor.device.type == "npu"]
        device = kwargs.get("device")
        if not on_device and (device is None or torch.device(device).type != "npu"):
            return func(*args, **kwargs)
        graphs.refuse_if_stalled()
        # Host views outlive the call when a graph records it, so they must not be inference tensors.
        try:
            with torch.inference_mode(False), torch.no_grad():
                return self._run(func, args, kwargs, tensors, on_device)
        except Refused:
            graphs.break_capture()
            raise

    def _run(
        self, func: Any, args: tuple, kwargs: dict, tensors: list[torch.Tensor], on_device: list[torch.Tensor]
    ) -> Any:
        packet = func.overloadpacket
        if func.namespace == "npu":
            if packet.__name__ in _NATIVE_NPU:
                return func(*args, **kwargs)
            operator = OUT_OVERLOADS.get(func.__name__) or OPERATORS.get(packet.__name__)
            if operator is None:
                raise NotEmulated(f"{func} is not emulated")
            return _run_npu(func, operator, args, kwargs, tensors)
        if func.namespace not in ("aten", "prims"):
            raise NotEmulated(f"{func} is not emulated")
        if packet in _NATIVE:
            result = func(*args, **kwargs)
            graphs.own(result)
            return result
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        if _is_view(func):
            fractal = any(is_fractal(host_view(tensor)) for tensor in on_device)
            need(not fractal or packet in _FRACTAL_VIEWS, f"{func} on a FRACTAL_NZ tensor")
            return func(*args, **kwargs)
        if packet is aten._local_scalar_dense:
            _wait(func)
            counts.happened("device_to_host")
            return host_view(args[0]).item()
        if packet is aten._to_copy:
            return _to_copy(func, *args, **kwargs)
        if packet is aten.copy_:
            return _copy_into(func, *args, **kwargs)
        return _run_aten(func, args, kwargs, tensors)


@cache
def _is_composite(func: Any) -> bool:
    # Inside torch.inference_mode such operators arrive whole instead of as what they are made of. Those that torch_npu
    # has a kernel for are run whole, unless they may return a view or a copy (`to`, `contiguous`, `reshape`).
    own = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "PrivateUse1")
    return func._can_decompose() and (not own or _is_view(func))


def _is_view(func: Any) -> bool:
    # The schema marks an output that aliases an input without writing to it.
    alias = [output.alias_info for output in func._schema.returns if output.alias_info]
    return any(not info.is_write for info in alias) or func.overloadpacket is aten._unsafe_view


def _wait(func: Any) -> None:
    need(not graphs.capturing(), f"{func} makes the host wait for the device, during graph capture")
    counts.happened("host_waits")


# --- aten ---------------------------------------------------------------------------------------------------


def _run_aten(func: Any, args: tuple, kwargs: dict, tensors: list[torch.Tensor]) -> Any:
    _check_aten(func, tensors)
    if _depends_on_data(func, args):
        _wait(func)
    device = kwargs.get("device")
    stays = device is None or torch.device(device).type == "npu"
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    call: Callable = func
    if torch.Tag.nondeterministic_seeded in func.tags:
        need(not graphs.capturing(), f"{func}: random numbers inside a captured graph are not emulated")
        call, kwargs = _seeded(func, kwargs)
    if func.overloadpacket in _MATRIX_PRODUCTS and tensors[0].dtype in (torch.bfloat16, torch.float16):
        call = _rounded_once(func, tensors[0].dtype)
    name = f"aten.{func.overloadpacket.__name__}"
    return launch(name, call, args, kwargs, stays=stays)


def _check_aten(func: Any, tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        # A 0-dim CPU tensor travels as a scalar argument; any other would be a host pointer in a kernel.
        need(tensor.device.type == "npu" or tensor.dim() == 0, f"{func}: a CPU tensor beside npu tensors")
        need(tensor.dtype != torch.float64 or tensor.dim() == 0, f"{func}: the NPU has no float64")
        need(tensor.dtype != torch.bfloat16 or not is_inference_card(), f"{func}: {soc_name()} has no bfloat16")
    product = func.overloadpacket in _MATRIX_PRODUCTS
    for tensor in tensors:
        if product and graphs.capturing() and tensor.device.type == "npu" and old_cann():
            # vllm-ascend issues 3927 and 4960: on older CANN such a product is an aclop.
            need(not is_fractal(host_view(tensor)), f"{func} with a FRACTAL_NZ weight, during graph capture")
        if product:
            need(tensor.is_floating_point(), f"{func}: integer matrices multiply in npu_quant_matmul only")
        elif tensor.device.type == "npu":
            need(not is_fractal(host_view(tensor)), f"{func} on a FRACTAL_NZ tensor")


def _depends_on_data(func: Any, args: tuple) -> bool:
    if torch.Tag.data_dependent_output in func.tags:
        return True
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func.overloadpacket is aten.index:  # only a mask has to be counted before the output can be allocated
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return True


def _seeded(func: Any, kwargs: dict) -> tuple[Callable, dict]:
    """Draw from the CPU generator in a state derived from the npu generator's, then advance the latter."""
    generator = kwargs.get("generator") or torch.npu.default_generators[0]
    if generator.device.type != "npu":
        return func, kwargs
    seed, offset = generator.initial_seed(), generator.get_offset()
    generator.set_offset(offset + 4)
    kwargs = {key: value for key, value in kwargs.items() if key != "generator"}

    def call(*args: Any, **options: Any) -> Any:
        state = torch.default_generator.get_state()
        torch.default_generator.manual_seed((seed * 1_000_003 + offset) % 2**63)
        try:
            return func(*args, **options)
        finally:
            torch.default_generator.set_state(state)

    return call, kwargs


def _rounded_once(func: Any, dtype: torch.dtype) -> Callable:
    """The product in float64, rounded to `dtype`: what a row gives cannot then depend on its neighbours, as it may in
    a CPU library that sums in an order of its own for each shape."""

    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        wide = tree_map(lambda leaf: leaf.double() if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs))
        return func(*wide[0], **wide[1]).to(dtype)

    return call


def launch(name: str, call: Callable, args: tuple, kwargs: dict, *, stays: bool = True) -> Any:
    """Run one kernel on host views, count it, and give its results device memory.

    Results that are one of the inputs (in-place operators, ``out=``) come back as the caller's own tensors.
    """
    leaves, structure = tree_flatten((args, kwargs))
    views = [host_view(leaf) if _on_device(leaf) else leaf for leaf in leaves]
    owners = {id(view): leaf for view, leaf in zip(views, leaves, strict=True) if view is not leaf}
    addresses = {key: owner.data_ptr() for key, owner in owners.items()}
    host_args, host_kwargs = tree_unflatten(views, structure)
    results = call(*host_args, **host_kwargs)
    counts.launched(name)
    outside = graphs.outside_memory(leaves)

    targets: list[torch.Tensor | None] = []

    def place(result: Any) -> Any:
        if not isinstance(result, torch.Tensor) or not stays:
            return result
        if id(result) in owners:
            if result.data_ptr() != addresses[id(result)]:
                raise NotEmulated(f"{name} resized its output")
            targets.append(None)
            return owners[id(result)]
        tensor = device_copy(result)
        targets.append(host_view(tensor))
        return tensor

    placed = tree_map(place, results)
    graphs.own(placed)
    graphs.record(Launch(name, call, host_args, host_kwargs, targets, outside))
    return placed


def _on_device(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.device.type == "npu"


# --- copies -------------------------------------------------------------------------------------------------


def _to_copy(
    func: Any,
    source: torch.Tensor,
    *,
    device: Any = None,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format = torch.preserve_format,
) -> torch.Tensor:
    dtype = dtype or source.dtype
    target = torch.device(device) if device is not None else source.device
    if target.type == source.device.type:
        return _run_aten(func, (source,), {"dtype": dtype, "memory_format": memory_format}, [source])
    like = torch.empty_like(source, dtype=dtype, device="meta", memory_format=memory_format)
    options = {"dtype": dtype, "device": target, "pin_memory": bool(pin_memory)}
    result = torch.empty_strided(like.size(), like.stride(), **options)
    return _copy_into(aten.copy_.default, result, source, non_blocking)


def _copy_into(func: Any, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if target.device == source.device:
        return _run_aten(func, (target, source), {}, [target, source])
    to_host = target.device.type == "cpu"
    need(not graphs.capturing(), "a copy between host and device, during graph capture")
    scrambled = to_host and is_fractal(host_view(source))
    ready = source.is_contiguous() and source.size() == target.size() and source.dtype == target.dtype
    if scrambled or not ready:
        # Only bytes cross; converting and gathering happen where the data is.
        call = (source, target.dtype, target.size())
        source = launch("aten._to_copy", _densify, call, {}) if to_host else _densify(*call)
    if not target.is_contiguous():
        staged = torch.empty(target.size(), dtype=target.dtype, device=target.device)
        _copy_into(func, staged, source, non_blocking)
        if to_host:
            target.copy_(staged)
            return target
        return _run_aten(func, (target, staged), {}, [target, staged])
    counts.happened("device_to_host" if to_host else "host_to_device")
    if to_host and not non_blocking:
        counts.happened("host_waits")
    if non_blocking:
        # torch_npu would queue it for a thread of its own; what follows on the stream must find it done.
        host, device = (target, host_view(source)) if to_host else (source, host_view(target))
        (host if to_host else device).copy_(device if to_host else host)
        return target
    with counts.inside_copy():
        func(target, source, non_blocking)  # torch_npu's own copy, through aclrtMemcpy
    return target


def _densify(source: torch.Tensor, dtype: torch.dtype, size: torch.Size) -> torch.Tensor:
    return source.to(dtype).expand(size).clone(memory_format=torch.contiguous_format)


# --- npu operators ------------------------------------------------------------------------------------------


def bind(func: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """All arguments of a call by their schema names, defaults filled in."""
    bound = {}
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args):
            bound[argument.name] = args[position]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value
    return bound


def _run_npu(func: Any, operator: Operator, args: tuple, kwargs: dict, tensors: list[torch.Tensor]) -> Any:
    name = func.overloadpacket.__name__
    bound = bind(func, args, kwargs)
    for key, value in bound.items():
        if isinstance(value, torch.Tensor) and key not in operator.host:
            need(value.device.type == "npu", f"{name}: {key} is a CPU tensor")
    expected = None
    if operator.meta:
        meta_args, meta_kwargs = tree_map(_as_meta, (args, kwargs))
        expected = func(*meta_args, **meta_kwargs)  # the package's own checks; its errors are the refusal
    strided = 0
    for key, value in bound.items():
        if isinstance(value, torch.Tensor) and not value.is_contiguous() and key not in operator.any_layout:
            need(key in operator.strided, f"{name}: {key} is not contiguous")
            strided += 1
    if graphs.updating():
        graphs.update_arguments(tree_map(lambda leaf: host_view(leaf) if _on_device(leaf) else leaf, bound))
        return bound.get("out")
    if operator.allocates:
        result = operator.function(**bound)
        graphs.own(result)
        return result
    for _ in range(strided):
        # The operator accepts strided input by copying it first, in a kernel of its own.
        counts.launched(f"{name}/contiguous")
        graphs.record(Launch(f"{name}/contiguous", lambda: None, (), {}, []))
    results = launch(name, operator.function, (), bound)
    if expected is not None:
        _check_results(name, results, expected)
    return results


def _as_meta(leaf: Any) -> Any:
    if _on_device(leaf):
        return torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device="meta")
    return leaf


def _check_results(name: str, results: Any, expected: Any) -> None:
    """The emulation must return what the package promises; otherwise the emulation itself is wrong."""
    for result, promise in zip(tree_flatten(results)[0], tree_flatten(expected)[0], strict=True):
        if (result.shape, result.dtype) != (promise.shape, promise.dtype):
            raise AssertionError(
                f"{name}: emulated {tuple(result.shape)} {result.dtype}, "
                f"Meta kernel {tuple(promise.shape)} {promise.dtype}"
            )
