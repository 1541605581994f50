"""Padded batches of token ids, read and packed by two compiled calls if nothing about them is out of the ordinary."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from .library import BatchStruct, library


class IdLimits(NamedTuple):
    """What ids may be.

    Attributes:
        num_ids, num_types: rows of the tables of words and of token types.
        longest: the most tokens of a row.
        padding_id: a token that takes no position, or None.
        first_position: of a row's first token.
    """

    num_ids: int
    num_types: int
    longest: int
    padding_id: int | None
    first_position: int


class PlainBatch:
    """A batch whose rows are tokens and then padding.

    Attributes:
        num_tokens: how many tokens its rows have together.
        num_rows: how many rows it has, each with a token.
        has_types: whether token types are given.
    """

    def __init__(self, struct: BatchStruct, num_tokens: int, inputs: tuple[Tensor | None, ...]) -> None:
        self._struct = struct
        # Holds the memory that the structure points to.
        self._inputs = inputs
        self.num_tokens = num_tokens
        self.num_rows: int = struct.rows
        self.has_types = inputs[2] is not None

    def pack(self, starts: Tensor, positions: Tensor, ids: Tensor, types: Tensor | None) -> int:
        """Writes the rows one after the other, and returns the length of the longest.

        Args:
            starts: (num_rows + 1,) int32, where each row begins.
            positions, ids, types: (num_tokens,) int32; types as `has_types` says.
        """
        compiled = library()
        assert compiled is not None
        to = (None if each is None else ctypes.c_void_p(each.data_ptr()) for each in (starts, positions, ids, types))
        longest: int = compiled.pack_ids(ctypes.byref(self._struct), *to)
        return longest


def plain_batch(ids: Tensor, mask: Tensor | None, types: Tensor | None, limits: IdLimits) -> PlainBatch | None:
    """A batch of (rows, columns) tensors of one shape as such, or None where it is not, or cannot be told to be.

    That is: int64 on the CPU, contiguous; a mask of 1 and then 0 in each row, the first one 1; ids and types within
    their tables, and no token that takes no position.
    """
    compiled = library()
    inputs = (ids, mask, types)
    if compiled is None or not all(
        each is None or (each.dtype == torch.int64 and each.is_cpu and each.is_contiguous()) for each in inputs
    ):
        return None
    struct = BatchStruct(
        *(None if each is None else each.data_ptr() for each in inputs),
        *ids.shape,
        *limits[:3],
        -1 if limits.padding_id is None else limits.padding_id,
        limits.first_position,
    )
    tokens = compiled.count_tokens(ctypes.byref(struct))
    return None if tokens < 0 else PlainBatch(struct, tokens, inputs)
