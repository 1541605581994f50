"""Which numbers dropout keeps: a function of a seed, a row and a column, so that no mask need be stored.

A backward pass asks again and gets the same answer, on a CPU and in a Triton kernel bit for bit. Each number's 32 bits
are a hash of the seed and its place: the multiply-and-shift mixer of Wellons' hash-prospector (lowbias32), once over
rows, once over columns, once over both. A number is kept if its bits, read as a signed integer, reach a threshold.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.triton import jit, tl

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B
_STEP = 0x9E3779B9


class Dropout(NamedTuple):
    """Dropout at one place of a model.

    Attributes:
        rate: the probability that a number is dropped, from 0 to 1.
        seed: 32 bits without sign, one for each place and step.
    """

    rate: float
    seed: int

    @property
    def threshold(self) -> int:
        """The least hash, as a signed integer of 32 bits, whose number is kept."""
        return min(round(self.rate * 2**32), 2**32 - 1) - 2**31

    @property
    def factor(self) -> float:
        """What numbers that are kept are multiplied by: 0 at a rate of 1, where one hash of 2^32 is kept, too."""
        return 1 / (1 - self.rate) if self.rate < 1 else 0.0

    @property
    def signed_seed(self) -> int:
        """The seed's bits as a signed integer, as kernels take it."""
        return self.seed - 2**32 if self.seed >= 2**31 else self.seed

    def row_keys(self, rows: Tensor) -> Tensor:
        """The part of the hash that depends on the seed and the row, int32 as ``rows`` are."""
        return mix_((rows ^ self.signed_seed).mul_(_signed(_STEP)))

    def kept(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Whether numbers are kept: bool, of the shape to which rows and columns, both int32, broadcast."""
        return mix_(self.row_keys(rows) ^ mix_(columns.clone())) >= self.threshold


def drop(values: Tensor, dropout: Dropout | None) -> Tensor:
    """``values`` (num_rows, width) behind dropout, which None leaves out; what is dropped is 0, NaN included."""
    if dropout is None:
        return values
    num_rows, width = values.shape
    rows = torch.arange(num_rows, dtype=torch.int32, device=values.device)[:, None]
    columns = torch.arange(width, dtype=torch.int32, device=values.device)
    return (values * dropout.factor).masked_fill_(~dropout.kept(rows, columns), 0.0)


def _signed(bits: int) -> int:
    return bits - 2**32 if bits >= 2**31 else bits


def mix_(bits: Tensor) -> Tensor:
    """Mixes int32 ``bits`` in place."""
    # Right shifts of signed integers repeat the sign, which the masks remove.
    bits ^= (bits >> 16) & 0xFFFF
    bits *= _FIRST
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= _signed(_SECOND)
    bits ^= (bits >> 16) & 0xFFFF
    return bits


@jit()
def mixed_bits(bits):
    """`mix_` in a kernel, of uint32."""
    bits ^= bits >> 16
    bits *= tl.cast(0x7FEB352D, tl.uint32)
    bits ^= bits >> 15
    bits *= tl.cast(0x846CA68B, tl.uint32)
    bits ^= bits >> 16
    return bits


@jit()
def kept_numbers(
    seed,  # int32
    threshold,  # int32
    rows,  # int32, of any shape
    columns,  # int32, of a shape that broadcasts with it
):
    """`Dropout.kept` in a kernel, of the shape to which ``rows`` and ``columns`` broadcast."""
    row_keys = mixed_bits((rows ^ seed).to(tl.uint32, bitcast=True) * tl.cast(0x9E3779B9, tl.uint32))
    bits = mixed_bits(row_keys ^ mixed_bits(columns.to(tl.uint32, bitcast=True)))
    return bits.to(tl.int32, bitcast=True) >= threshold
