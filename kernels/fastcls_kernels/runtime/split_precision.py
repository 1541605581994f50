"""Products whose left side keeps more bits than its 16-bit dtype: as pairs of a high part and a remainder."""

from __future__ import annotations

from .triton import jit, tl


@jit()
def as_pair(values, DTYPE: tl.constexpr):
    """Float32 ``values`` as (high, low) in DTYPE; where DTYPE is float32, low is zero."""
    high = values.to(DTYPE)
    return high, (values - high.to(tl.float32)).to(DTYPE)


@jit()
def pair_dot(high, low, other, acc, PAIR: tl.constexpr):
    """``acc + (high + low) @ other`` with float32 sums; without PAIR, ``acc + high @ other``."""
    acc = tl.dot(high, other, acc, input_precision="ieee")
    if PAIR:
        acc = tl.dot(low, other, acc, input_precision="ieee")
    return acc
