"""What the kernels of trained disentangled attention share: scores with distances, and the matrices that hold them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention.kernel import LOG2_E
from ..disentangled_attention.buckets import DistanceTables
from ..layout import PackedLayout
from ..linear import linear_per_head_unchecked
from ..runtime.tile_tables import arch_of, unsqueezed
from ..runtime.triton import cdiv, head_block, jit, tl
from .attention_tiles import Tile
from .dropout import Dropout

# Numbers in one matrix of all tokens and distances: more heads than it holds take turns.
_MATRIX = 1 << 28


@jit()
def scores_of(
    left,  # [LEFT, BLOCK_D]
    right,  # [RIGHT, BLOCK_D]
    of_left_ptr,  # (total_tokens, num_columns), from distance 0 of the left tile's first row on, or None
    of_right_ptr,  # the same of the right tile
    left_row,  # [LEFT], in its tile
    right_row,  # [RIGHT], in its tile
    distance,  # [LEFT, RIGHT]: the query's position less the key's, within reach
    mirrored,  # [RIGHT, LEFT]: the same
    own,  # [LEFT, RIGHT]
    num_columns, scale_log2,
):  # fmt: skip
    """Scores in powers of two, [LEFT, RIGHT]; -inf for pairs that do not meet."""
    scores = tl.dot(left, tl.trans(right), input_precision="ieee")
    if of_left_ptr is not None:
        scores += tl.load(of_left_ptr + (left_row[:, None] * num_columns + distance)).to(tl.float32)
    if of_right_ptr is not None:
        # As the numbers lie in memory, and turned then.
        scores += tl.trans(tl.load(of_right_ptr + (right_row[:, None] * num_columns + mirrored)).to(tl.float32))
    return tl.where(own, scores * scale_log2, -float("inf"))


@jit()
def within(distance, reach):
    return tl.minimum(tl.maximum(distance, -reach), reach)


@jit()
def row_in_tile(
    rows,  # [BLOCK], from the tile's first on
    tiles_ptr,  # (num_tiles, 4), from the tile's line on
):
    """Each row's place in its tile, where rows that are not the tile's own take its last one's."""
    first = tl.load(tiles_ptr).to(tl.int64)
    last = tl.maximum(tl.load(tiles_ptr + 1).to(tl.int64) - 1, first)
    return (tl.minimum(rows, last) - first).to(tl.int32)


@jit()
def keep_flow(
    flow_ptr,  # (total_tokens, num_columns), from distance 0 of the tile's first row on
    flow,  # [OWN, OTHER]
    row,  # [OWN], in its tile
    distance,  # [OWN, OTHER]
    pairs,  # [OWN, OTHER]: which there are
    below, above,  # [OWN]: sums of the flow of the outermost columns
    num_columns, reach,
):  # fmt: skip
    """Stores the flow of pairs within reach, and adds that of the others to the sums, which it returns."""
    inside = pairs & (distance > -reach) & (distance < reach)
    tl.store(flow_ptr + (row[:, None] * num_columns + distance), flow.to(flow_ptr.dtype.element_ty), mask=inside)
    below += tl.sum(tl.where(pairs & (distance <= -reach), flow, 0.0), 1)
    above += tl.sum(tl.where(pairs & (distance >= reach), flow, 0.0), 1)
    return below, above


@jit()
def keep_ends(flow_ptr, row, in_tile, below, above, num_columns, reach):
    """Stores the sums of the outermost columns."""
    tl.store(flow_ptr + (row * num_columns - reach), below.to(flow_ptr.dtype.element_ty), mask=in_tile)
    tl.store(flow_ptr + (row * num_columns + reach), above.to(flow_ptr.dtype.element_ty), mask=in_tile)


class Columns(NamedTuple):
    """The columns of distances.

    Attributes:
        reach: column ``reach`` is distance 0, and the outermost ones hold for all that is farther.
        buckets: (num_columns,), int32: each column's bucket.
        tables: keys and queries of distances, (num_columns, nheads, headdim), or None.
    """

    reach: int
    buckets: Tensor
    tables: tuple[Tensor | None, Tensor | None]

    @classmethod
    def of(cls, tables: DistanceTables, layout: PackedLayout) -> Columns:
        buckets = tables.buckets
        # Only the device knows how far apart given positions are.
        farthest = buckets.reach if layout.positions is not None else min(buckets.reach, layout.max_seqlen - 1)
        # The outermost columns are two.
        reach = max(farthest, 1)
        # A multiple of 16: the library stores products of other widths in small pieces.
        count = cdiv(2 * reach + 1, 16) * 16
        rows = buckets.of(torch.arange(-reach, count - reach, device=buckets.table.device))
        keys, queries = (
            None if table is None else table.index_select(0, rows) for table in (tables.keys, tables.queries)
        )
        return cls(reach, rows, (keys, queries))

    def products(self, tokens: Tensor, side: int, heads: slice) -> Tensor | None:
        """(nheads, total_tokens, num_columns), contiguous: products of tokens with keys, side 0, or queries."""
        table = self.tables[side]
        if table is None:
            return None
        products = linear_per_head_unchecked(tokens[:, heads], table[:, heads].permute(1, 2, 0))
        return products.transpose(0, 1).contiguous()

    def turns(self, q: Tensor) -> Iterator[slice]:
        """Heads that are computed at once."""
        heads = max(1, _MATRIX // max(q.shape[0] * self.buckets.shape[0], 1))
        for first in range(0, q.shape[1], heads):
            yield slice(first, min(first + heads, q.shape[1]))

    def arguments(
        self, q: Tensor, k: Tensor, layout: PackedLayout, scale: float, dropout: Dropout | None, heads: slice
    ) -> dict[str, Any]:
        """What all kernels take, by name."""
        return {
            "of_query_ptr": self.products(q, 0, heads),
            "of_key_ptr": self.products(k, 1, heads),
            "positions_ptr": layout.token_positions,
            "total_tokens": q.shape[0],
            "num_columns": self.buckets.shape[0],
            "reach": self.reach,
            "first_head": heads.start,
            "num_heads": q.shape[1],
            "seed": 0 if dropout is None else dropout.signed_seed,
            "threshold": 0 if dropout is None else dropout.threshold,
            "factor": 1.0 if dropout is None else dropout.factor,
            "scale_log2": scale * LOG2_E,
            "HAS_DROPOUT": dropout is not None,
            "HEAD_DIM": q.shape[2],
            "BLOCK_D": head_block(q.shape[2]),
        }


def disentangled_training_tile(arch: str, dtype: torch.dtype, head_dim: int) -> Tile:
    """The tile of all three kernels: BLOCK_M queries by BLOCK_N keys, as many as registers hold."""
    if dtype == torch.float32 or arch.startswith("gfx"):
        return Tile(16, 16, num_warps=4, num_stages=1)
    # Triton 3.9 spills what it loads ahead on sm_90.
    loads_ahead = head_dim <= 64 and not arch.startswith("sm_90")
    return Tile(32, 32, num_warps=4 if head_dim <= 64 else 8, num_stages=2 if loads_ahead else 1)


def options_of(q: Tensor) -> tuple[Tile, dict[str, Any]]:
    arch = arch_of(q.device)
    tile = disentangled_training_tile(arch, q.dtype, q.shape[2])
    # One wave a SIMD has all of its registers: triton 3.6 spills otherwise.
    alone = {"waves_per_eu": 1} if arch.startswith("gfx") else {}
    return tile, {**tile._asdict(), "enable_fp_fusion": True, **unsqueezed(arch), **alone}
