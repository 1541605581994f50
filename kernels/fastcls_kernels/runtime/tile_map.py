"""The sequence of each row or tile of packed tokens, found on the device once for all layers.

Sequence i is rows ``cu_seqlens[i]:cu_seqlens[i + 1]``, so a binary search finds a row's sequence. Tiles of BLOCK_M rows
can hold rows of one sequence each: the tiles of sequence i are then numbered from ``cu_seqlens[i] // BLOCK_M + i`` on.
That gives each sequence its ceil(length / BLOCK_M) numbers without a sum over those before it, and leaves at most one
of them unused. The rows after the last sequence count as one more sequence, which attends to nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import device_guard, runs_triton
from .triton import cdiv, jit, tl

BLOCK = 128


@jit()
def _last_not_above(
    cu_seqlens_ptr,  # (num_sequences + 1,)
    wanted,  # [BLOCK]
    num_sequences,
    num_steps,
    BLOCK_M: tl.constexpr,
):
    """The last i in 0..num_sequences whose key, ``cu_seqlens[i]`` or its first tile's number, is at most ``wanted``."""
    low = wanted * 0
    high = low + num_sequences
    for _ in range(num_steps):
        middle = (low + high + 1) // 2
        key = tl.load(cu_seqlens_ptr + middle)
        if BLOCK_M > 0:
            key = key // BLOCK_M + middle
        low = tl.where(key <= wanted, middle, low)
        high = tl.where(key <= wanted, high, middle - 1)
    return low


@jit(do_not_specialize=["total_tokens", "num_sequences", "num_steps"])
def _row_bounds_kernel(
    cu_seqlens_ptr,  # (num_sequences + 1,)
    start_ptr,  # (total_tokens,)
    end_ptr,  # (total_tokens,)
    total_tokens,
    num_sequences,
    num_steps,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_rows = rows < total_tokens
    sequence = _last_not_above(cu_seqlens_ptr, rows, num_sequences, num_steps, 0)
    in_sequence = sequence < num_sequences
    start = tl.load(cu_seqlens_ptr + sequence, mask=in_sequence, other=0)
    end = tl.load(cu_seqlens_ptr + sequence + 1, mask=in_sequence, other=0)
    tl.store(start_ptr + rows, start, mask=in_rows)
    tl.store(end_ptr + rows, end, mask=in_rows)


@jit(do_not_specialize=["total_tokens", "num_sequences", "num_steps", "num_tiles"])
def _sequence_tiles_kernel(
    cu_seqlens_ptr,  # (num_sequences + 1,)
    tiles_ptr,  # (num_tiles, 4)
    total_tokens,
    num_sequences,
    num_steps,
    num_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_tiles = tiles < num_tiles
    sequence = _last_not_above(cu_seqlens_ptr, tiles, num_sequences, num_steps, BLOCK_M)
    in_sequence = sequence < num_sequences
    start = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1, mask=in_sequence, other=0)
    first_row = start + (tiles - start // BLOCK_M - sequence) * BLOCK_M
    last_row = tl.where(in_sequence, end, total_tokens)
    # A tile whose number is unused must not read the sequence's keys.
    has_keys = in_sequence & (first_row < last_row)
    tiles_ptr += tiles * 4
    tl.store(tiles_ptr, first_row, mask=in_tiles)
    tl.store(tiles_ptr + 1, last_row, mask=in_tiles)
    tl.store(tiles_ptr + 2, tl.where(has_keys, start, 0), mask=in_tiles)
    tl.store(tiles_ptr + 3, tl.where(has_keys, end, 0), mask=in_tiles)


def _launch_row_bounds(
    cu_seqlens: Tensor,  # (num_sequences + 1,)
    total_tokens: int,
) -> tuple[Tensor, Tensor]:
    # Not two rows of one tensor: a pointer that is less aligned would compile the kernel once more.
    start, end = cu_seqlens.new_empty(total_tokens), cu_seqlens.new_empty(total_tokens)
    num_sequences = cu_seqlens.numel() - 1
    if total_tokens:
        with device_guard(cu_seqlens):
            _row_bounds_kernel[(cdiv(total_tokens, BLOCK),)](
                cu_seqlens_ptr=cu_seqlens,
                start_ptr=start,
                end_ptr=end,
                total_tokens=total_tokens,
                num_sequences=num_sequences,
                num_steps=num_sequences.bit_length(),
                BLOCK=BLOCK,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return start, end


def row_bounds(cu_seqlens: Tensor, total_tokens: int) -> tuple[Tensor, Tensor]:
    """For each row its sequence's start and end, two int32 tensors (total_tokens,), both 0 where there is none."""
    if runs_triton(cu_seqlens):
        return _launch_row_bounds(cu_seqlens, total_tokens)
    rows = torch.arange(total_tokens, dtype=torch.int32, device=cu_seqlens.device)
    # A row belongs to the first sequence that ends above it; the rows after the last one belong to one from 0 to 0.
    sequence = torch.searchsorted(cu_seqlens[1:], rows, right=True)
    bounds = torch.stack((cu_seqlens[:-1], cu_seqlens[1:]))
    start, end = torch.nn.functional.pad(bounds, (0, 1))[:, sequence]
    return start, end


def launch_sequence_tiles(
    cu_seqlens: Tensor,  # (num_sequences + 1,)
    total_tokens: int,
    block_m: int,
) -> Tensor:
    """(num_tiles, 4) int32: each tile's first row, the end of the rows it may write, and its keys' start and end."""
    num_sequences = cu_seqlens.numel() - 1
    num_tiles = total_tokens // block_m + num_sequences + 1
    tiles = cu_seqlens.new_empty(num_tiles, 4)
    with device_guard(cu_seqlens):
        _sequence_tiles_kernel[(cdiv(num_tiles, BLOCK),)](
            cu_seqlens_ptr=cu_seqlens,
            tiles_ptr=tiles,
            total_tokens=total_tokens,
            num_sequences=num_sequences,
            num_steps=num_sequences.bit_length(),
            num_tiles=num_tiles,
            BLOCK_M=block_m,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return tiles
