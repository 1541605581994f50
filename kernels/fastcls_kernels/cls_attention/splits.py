"""The spans of tokens that query rows read, split among programs, and the merging of their partial results.

A split gives the result of its own softmax and the log of its weights' sum. The merged result is the mean of the
splits' results, weighed by these sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import PackedLayout
from ..runtime.backend import multiprocessor_count
from ..runtime.invariance import choices
from ..runtime.triton import cdiv, jit, next_power_of_2, tl

# Each query row's first token and the end of its tokens, int32: (num_rows,) each.
RowBounds = tuple[Tensor, Tensor]


@jit(do_not_specialize=["num_splits"])
def _merge_splits_kernel(
    partial_ptr,  # (num_rows, num_splits, nheads, width)
    lse_ptr,  # (num_rows, num_splits, nheads)
    out_ptr,  # (num_rows, nheads, width)
    num_splits, NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    query_row = row // NUM_HEADS
    head = row % NUM_HEADS
    offs_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    in_width = offs_w < WIDTH
    # [BLOCK_W]
    acc = tl.zeros([BLOCK_W], dtype=tl.float32)
    total = 0.0
    largest = -1e30
    for split in range(num_splits):
        partial_row = (query_row * num_splits + split) * NUM_HEADS + head
        lse = tl.load(lse_ptr + partial_row)
        new_largest = tl.maximum(largest, lse)
        rescale = tl.exp2(largest - new_largest)
        weight = tl.exp2(lse - new_largest)
        partial = tl.load(partial_ptr + partial_row * WIDTH + offs_w, mask=in_width, other=0.0)
        acc = acc * rescale + weight * partial
        total = total * rescale + weight
        largest = new_largest
    tl.store(out_ptr + row * WIDTH + offs_w, (acc / total).to(out_ptr.dtype.element_ty), mask=in_width)


class Partials:
    """Where a pass writes: with one split the output itself, else float32 partial results and their log-sums.

    Args:
        out: (num_rows, nheads, width).
        num_splits: programs that share a row's tokens.
    """

    def __init__(self, out: Tensor, num_splits: int) -> None:
        num_rows, num_heads, width = out.shape
        self.out = out
        self.num_splits = num_splits
        self.lse = out.new_empty(num_rows, num_splits, num_heads, dtype=torch.float32)
        self.target = (
            out if num_splits == 1 else out.new_empty(num_rows, num_splits, num_heads, width, dtype=torch.float32)
        )

    def merge(self) -> Tensor:
        """The output, (num_rows, nheads, width)."""
        if self.num_splits > 1:
            num_rows, num_heads, width = self.out.shape
            block_w = min(1024, next_power_of_2(width))
            _merge_splits_kernel[(num_rows * num_heads, cdiv(width, block_w))](
                partial_ptr=self.target,
                lse_ptr=self.lse,
                out_ptr=self.out,
                num_splits=self.num_splits,
                NUM_HEADS=num_heads,
                WIDTH=width,
                BLOCK_W=block_w,
                num_warps=4,
                enable_fp_fusion=True,
            )
        return self.out


def default_num_splits(device: torch.device, num_programs: int, max_seqlen: int) -> int:
    """How many splits fill the chip twice, given ``num_programs`` without any; each has at least 128 tokens."""
    if not choices().split_sequences:
        return 1
    wanted = 2 * multiprocessor_count(device)
    if num_programs >= wanted:
        return 1
    return max(1, min(cdiv(max_seqlen, 128), cdiv(wanted, num_programs)))


def bounds_of(layout: PackedLayout, row_bounds: RowBounds | None) -> RowBounds:
    """The bounds of each query row: those of its sequence where ``row_bounds`` is None."""
    return (layout.cu_seqlens[:-1], layout.cu_seqlens[1:]) if row_bounds is None else row_bounds
