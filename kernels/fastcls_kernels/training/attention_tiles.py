"""What the kernels of trained attention share: tiles of rows, their scores, and the flow of gradients through these."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention.kernel import LOG2_E, NO_WINDOW
from ..layout import PackedLayout
from ..runtime.tile_tables import arch_of, unsqueezed
from ..runtime.triton import head_block, jit, tl
from .dropout import Dropout, kept_numbers


class Tile(NamedTuple):
    """One launch: BLOCK_M rows a program, of queries or of keys, by BLOCK_N of the other kind in a step."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


class Scoring(NamedTuple):
    """What enters the scores of a launch beside queries and keys.

    Attributes:
        layout: where each sequence lies.
        scale: factor on products.
        window: (left, right) in positions, -1 for no limit.
        bias: (nheads, 2 * reach + 1) float32 or the rows' dtype, or None.
        dropout: what drops probabilities, or None.
    """

    layout: PackedLayout
    scale: float
    window: tuple[int, int]
    bias: Tensor | None
    dropout: Dropout | None

    def bounds(self, *, of_keys: bool = False) -> tuple[Tensor | None, Tensor | None]:
        """For each query the start and end of its keys, or for each key those of its queries; None for all of them."""
        if self.window == NO_WINDOW:
            return None, None
        left, right = self.window
        return self.layout.window_bounds(right, left) if of_keys else self.layout.window_bounds(left, right)

    def arguments(self, *, of_keys: bool = False) -> dict[str, Any]:
        """The kernels' arguments, by the names that all of them have."""
        start, end = self.bounds(of_keys=of_keys)
        dropout = self.dropout
        return {
            "bias_ptr": self.bias,
            "positions_ptr": None if self.bias is None else self.layout.positions,
            "bound_start_ptr": start,
            "bound_end_ptr": end,
            "total_tokens": self.layout.total_tokens,
            "seed": 0 if dropout is None else dropout.signed_seed,
            "threshold": 0 if dropout is None else dropout.threshold,
            "factor": 1.0 if dropout is None else dropout.factor,
            "scale_log2": self.scale * LOG2_E,
            "log2_e": LOG2_E,
            "REACH": self.reach,
            "HAS_DROPOUT": dropout is not None,
        }

    @property
    def reach(self) -> int:
        return 0 if self.bias is None else self.bias.shape[1] // 2


def strides_of(**tensors: Tensor) -> dict[str, int]:
    """The strides of tokens and of heads of (total_tokens, nheads, headdim), by the kernels' names for them."""
    return {
        f"stride_{name}{axis}": stride
        for name, tensor in tensors.items()
        for axis, stride in zip("th", tensor.stride(), strict=False)
    }


@jit()
def tile_of(
    tiles_ptr,  # (num_tiles, 4), from the tile's line on
    bound_start_ptr,  # (total_tokens,), or None
    bound_end_ptr,  # (total_tokens,), or None
    total_tokens,
    BLOCK: tl.constexpr,
):
    """A tile's rows [BLOCK] and which of them are its own; the start and end of what each meets, [BLOCK] or
    one for all; the first and the end of what any of them meets; and the sequence's first row."""
    rows = tl.load(tiles_ptr).to(tl.int64) + tl.arange(0, BLOCK)
    in_tile = rows < tl.load(tiles_ptr + 1)
    sequence_start = tl.load(tiles_ptr + 2)
    first = sequence_start
    last = tl.load(tiles_ptr + 3)
    start = first
    end = last
    if bound_start_ptr is not None:
        start = tl.load(bound_start_ptr + rows, mask=in_tile, other=0)
        end = tl.load(bound_end_ptr + rows, mask=in_tile, other=0)
        # A row that meets nothing has start = end = 0; it must not widen the span that the tile reads.
        first = tl.min(tl.where(end > start, start, total_tokens))
        last = tl.max(end)
    return rows, in_tile, start, end, first, last, sequence_start


@jit()
def pairs_of(
    rows,  # [BLOCK_N]
    start,  # [BLOCK_M]
    end,  # [BLOCK_M]
    last,
    bound_start_ptr,  # (total_tokens,), or None
):
    """Which rows each row of a tile meets, [BLOCK_M, BLOCK_N] or one line for all of them."""
    pairs = (rows < last)[None, :]
    if bound_start_ptr is not None:
        pairs = (rows[None, :] >= start[:, None]) & (rows[None, :] < end[:, None])
    return pairs


@jit()
def load_tile(
    ptr,  # (total_tokens, headdim)
    rows,  # [BLOCK]
    in_tile,  # [BLOCK]
    stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of one head, [BLOCK, BLOCK_D], 0 where they are not the tile's own."""
    offs_d = tl.arange(0, BLOCK_D)
    return tl.load(
        ptr + rows[:, None] * stride + offs_d[None, :],
        mask=in_tile[:, None] & (offs_d < HEAD_DIM)[None, :],
        other=0.0,
    )


@jit()
def store_tile(
    ptr,  # (total_tokens, headdim)
    values,  # [BLOCK, BLOCK_D]
    rows,  # [BLOCK]
    in_tile,  # [BLOCK]
    stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Stores what `load_tile` would load."""
    offs_d = tl.arange(0, BLOCK_D)
    tl.store(
        ptr + rows[:, None] * stride + offs_d[None, :],
        values.to(ptr.dtype.element_ty),
        mask=in_tile[:, None] & (offs_d < HEAD_DIM)[None, :],
    )


@jit()
def positions_of(positions_ptr, rows, last):
    """The positions of rows, int32; rows from ``last`` on, which are masked elsewhere, take the one before it."""
    positions = rows.to(tl.int32)
    if positions_ptr is not None:
        positions = tl.load(positions_ptr + tl.minimum(rows, last - 1))
    return positions


@jit()
def scores_of(
    left,  # [LEFT, BLOCK_D]
    right,  # [RIGHT, BLOCK_D]
    bias_ptr,  # (2 * REACH + 1,), from its middle on, or None
    offset,  # [LEFT, RIGHT]: the key's position less the query's
    own,  # [LEFT, RIGHT]
    scale_log2, log2_e,
    REACH: tl.constexpr,
):  # fmt: skip
    """Scores in powers of two, [LEFT, RIGHT]; -inf for pairs that do not meet."""
    scores = tl.dot(left, tl.trans(right), input_precision="ieee") * scale_log2
    if bias_ptr is not None:
        # Clamped, so that pairs that do not meet read within the table, too.
        scores += tl.load(bias_ptr + tl.minimum(tl.maximum(offset, -REACH), REACH)).to(tl.float32) * log2_e
    return tl.where(own, scores, -float("inf"))


@jit()
def weights_and_flow(
    scores,  # [LEFT, RIGHT], as `scores_of` gives them
    maxima,  # [LEFT, RIGHT], or what broadcasts to it: of queries, in powers of two
    inverses,  # as maxima
    deltas,  # as maxima
    left,  # [LEFT, BLOCK_D]: gradients of queries' outputs, or values
    right,  # [RIGHT, BLOCK_D]: the other ones
    dropout_rows, dropout_columns,  # int32, of all that meets: one along, one across
    seed, threshold, factor,
    HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """The probabilities behind dropout, but for its factor, and the gradients of the scores: [LEFT, RIGHT] both."""
    weights = tl.exp2(scores - maxima) * inverses
    flow = tl.dot(left, tl.trans(right), input_precision="ieee")
    kept_weights = weights
    if HAS_DROPOUT:
        kept = kept_numbers(seed, threshold, dropout_rows, dropout_columns)
        kept_weights = tl.where(kept, weights, 0.0)
        flow = tl.where(kept, flow * factor, 0.0)
    return kept_weights, weights * (flow - deltas)


def tile_for(arch: str, dtype: torch.dtype, head_dim: int) -> Tile:
    """The tile of every kernel here; chosen by compiling, not by measuring: see the cases of `tests/aot_worker.py`."""
    is_wide = head_dim > 64
    if arch.startswith("gfx"):
        # Masks live in scalar registers, which bound the rows of a step.
        if dtype == torch.float32:
            return Tile(32, 16, num_warps=8, num_stages=1)
        return Tile(64, 16, num_warps=4, num_stages=1)
    if dtype == torch.float32:
        return Tile(16, 16, num_warps=8, num_stages=1) if is_wide else Tile(32, 32, num_warps=8, num_stages=1)
    # Four warps are what one product of 64 rows takes there. Elsewhere triton 3.6 spills tiles of that size.
    if arch.startswith("sm_90") and not is_wide:
        return Tile(64, 32, num_warps=4, num_stages=2)
    return Tile(32, 32, num_warps=4, num_stages=2)


def options_of(tile: Tile, q: Tensor, k: Tensor) -> dict[str, Any]:
    """Sizes of tiles and launch options, by name, of a kernel over q and k."""
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "HEAD_DIM": q.shape[2],
        "BLOCK_D": head_block(q.shape[2]),
        "BLOCK_M": tile.BLOCK_M,
        "BLOCK_N": tile.BLOCK_N,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
        **unsqueezed(arch_of(q.device)),
    }
