"""How the dispatcher is to treat one npu operator."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Operator:
    """An emulated operator.

    Attributes:
        function: computes on host views; its parameters are the schema's.
        meta: the package has a Meta kernel for it, which must accept every call.
        strided: arguments that may be non-contiguous; the operator copies them first, in a kernel of its own.
        any_layout: arguments whose layout the function itself judges.
        host: arguments that may be CPU tensors.
        allocates: no kernel; the function takes device tensors and returns device tensors.
    """

    function: Callable
    meta: bool = True
    strided: tuple[str, ...] = ()
    any_layout: tuple[str, ...] = ()
    host: tuple[str, ...] = ()
    allocates: bool = False
