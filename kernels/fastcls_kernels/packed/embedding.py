"""Embeddings on a CPU: word, token type and position embeddings summed and normalised in one call.

A table of words may be kept as int8 rows, a quarter of the memory: q from -127 to 127, with a scale for each row and
group of 128 columns.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ..embedding import embedding_layer_norm_unchecked
from .library import TableStruct, library
from .weight import GROUP

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
# Up to this many numbers a second thread costs more than it brings.
_FEW_NUMBERS = 1 << 18


class PackedTable:
    """A table of embeddings as int8 rows. It never changes, so copies and threads share it.

    Args:
        values: (rows, width) int8.
        scales: (rows, groups) float32.
    """

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        self.values, self.scales = values, scales

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedTable:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedTable, (self.values, self.scales)

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return self.values.nbytes + self.scales.nbytes

    def rows(self, ids: Tensor) -> Tensor:
        """(num_ids, width) float32, the embeddings of some ids."""
        scales = self.scales[ids].repeat_interleave(GROUP, 1)[:, : self.values.shape[1]]
        return self.values[ids].float() * scales


def pack_table(table: Tensor) -> PackedTable:
    """Packs a table of embeddings as int8 rows.

    Args:
        table: (rows, width), on the CPU, floating point, finite.

    Raises:
        TypeError: another dtype.
        ValueError: a shape or device that does not fit, or a table that is not finite.
    """
    if not table.is_floating_point():
        raise TypeError(f"table must be a floating point tensor, got {table.dtype}")
    if table.ndim != 2 or table.device.type != "cpu":
        raise ValueError(f"table must have shape (rows, width) on the CPU, got {tuple(table.shape)} on {table.device}")
    rows, width = table.shape
    values = torch.empty(rows, width, dtype=torch.int8)
    scales = torch.empty(rows, -(-width // GROUP))
    for group, (part, to) in enumerate(zip(table.detach().split(GROUP, 1), values.split(GROUP, 1), strict=True)):
        wide = part.float()
        scale = wide.abs().amax(1) / 127
        if not bool(scale.isfinite().all()):
            raise ValueError("table must be finite to be packed as int8, got NaN or infinity in it")
        # The smallest normal number stands in for zeros.
        scales[:, group] = scale.clamp_(min=torch.finfo(torch.float32).tiny)
        to.copy_((wide / scale[:, None]).round_())
    return PackedTable(values, scales)


def packs_embedding(table: Tensor) -> bool:
    """Whether the compiled kernel reads tables of this dtype and width on this machine."""
    return library() is not None and table.dtype in _KINDS and table.shape[1] % 16 == 0


def packed_embedding_unchecked(
    token_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word_table: Tensor | PackedTable,
    position_table: Tensor | None,
    token_type_table: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """`embedding_layer_norm` of arguments that are known to fit, ids in int32 and contiguous, with a float32 result."""
    words = word_table.values if isinstance(word_table, PackedTable) else word_table
    compiled = library()
    if compiled is None or not packs_embedding(words):
        if isinstance(word_table, PackedTable):
            # The rows stand in for the table: one for each token.
            word_table = word_table.rows(token_ids)
            token_ids = torch.arange(token_ids.shape[0], device="cpu")
        tables = (word_table, position_table, token_type_table)
        return embedding_layer_norm_unchecked(
            token_ids, position_ids, token_type_ids, *tables, weight, norm_bias, eps
        ).float()
    count, width = token_ids.shape[0], words.shape[1]
    out = torch.empty(count, width, device="cpu")
    others = [
        None if each is None else ctypes.byref(TableStruct(_KINDS[each.dtype], width, each.data_ptr(), None))
        for each in (token_type_table, None if position_ids is None else position_table)
    ]
    scales = word_table.scales.data_ptr() if isinstance(word_table, PackedTable) else None
    norm = [None if each is None else each.float() for each in (weight, norm_bias)]
    compiled.embed(
        ctypes.byref(TableStruct(_KINDS[words.dtype], width, words.data_ptr(), scales)),
        *others,
        *(None if each is None else ctypes.c_void_p(each.data_ptr()) for each in (token_ids, token_type_ids)),
        None if position_ids is None else ctypes.c_void_p(position_ids.data_ptr()),
        *(None if each is None else ctypes.c_void_p(each.data_ptr()) for each in norm),
        ctypes.c_float(eps),
        count,
        ctypes.c_void_p(out.data_ptr()),
        torch.get_num_threads() if count * width > _FEW_NUMBERS else 1,
    )
    return out
