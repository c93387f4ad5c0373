"""Puts right what Triton's interpreter does unlike a card: it truncates to bfloat16 where cards round, multiplies
bfloat16's bit patterns (it keeps them as uint16), takes integers for such patterns, and leaves the order of sums to
numpy's BLAS, which goes by a row's place."""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def install() -> None:
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounding_cast(self, source, to):
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return TensorHandle(_rounded(source.data), to.scalar)
        if source.dtype.scalar.is_int() and to.scalar == tl.bfloat16:
            return TensorHandle(_rounded(source.data.astype(np.float32)), to.scalar)
        return cast(self, source, to)

    def orderless_dot(self, a, b, sums, *how):
        if not a.dtype.scalar.is_floating():
            return dot(self, a, b, sums, *how)
        a, b = (rounding_cast(self, x, tl.float32).data.astype(np.float64) for x in (a, b))
        return TensorHandle((a @ b + sums.data).astype(np.float32), tl.float32)

    InterpreterBuilder.cast_impl = rounding_cast
    InterpreterBuilder.create_dot = orderless_dot


def _rounded(x: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16's bits, half to even; no NaN comes here."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
