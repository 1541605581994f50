"""The kernel of the gradient of attention's bias, a table by relative position, and its launcher:

    grad_b_o = Σ g_ij over all pairs of positions with j - i = o,

and for the first and the last number of the table over all pairs at least as far apart. `attention_kernel.py` says what
g is. A program takes a share of all tiles of queries, one head, and a chunk of BLOCK_N neighbouring offsets: of each
tile of g that meets the chunk it moves row i by i places, so that each offset has a column, and adds up the columns.
The shares are as many on every chip and are summed in order, so that every run gives the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.kernel import load_rows
from ..runtime.backend import device_guard
from ..runtime.tile_tables import arch_of
from ..runtime.triton import cdiv, jit, tl
from .attention_tiles import (
    Scoring,
    load_tile,
    options_of,
    pairs_of,
    positions_of,
    scores_of,
    tile_for,
    tile_of,
    weights_and_flow,
)

# Programs of a head and chunk, at most.
SHARES = 16


@jit()
def _place_of(
    positions_ptr,  # (total_tokens,), from the tile's first key on
    wanted,  # [BLOCK_M, BLOCK_N]
    num_keys,
    BLOCK_N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Which key of a tile stands at each wanted position, as an index; BLOCK_N where none does."""
    place = tl.zeros_like(wanted)
    for step in tl.static_range(STEPS):
        probe = place + (BLOCK_N >> (step + 1))
        position = tl.load(positions_ptr + tl.minimum(probe, num_keys - 1))
        place = tl.where((probe < num_keys) & (position <= wanted), probe, place)
    return tl.where(tl.load(positions_ptr + place) == wanted, place, BLOCK_N)


@jit(do_not_specialize=["total_tokens", "seed", "threshold", "num_tiles"])
def _attention_bias_gradient_kernel(
    grad_ptr,  # (total_tokens, nheads, headdim)
    q_ptr,  # (total_tokens, nheads, headdim)
    k_ptr,  # (total_tokens, nheads_k, headdim)
    v_ptr,  # (total_tokens, nheads_k, headdim)
    statistics_ptr,  # (2, nheads, total_tokens)
    delta_ptr,  # (nheads, total_tokens)
    sums_ptr,  # (shares, nheads, num_chunks, BLOCK_N)
    bias_ptr,  # (nheads, 2 * REACH + 1)
    positions_ptr,  # (total_tokens,), or None where a row's place is its position
    bound_start_ptr,  # (total_tokens,): each query's first key, or None for its sequence's
    bound_end_ptr,  # (total_tokens,), or None
    tiles_ptr,  # (num_tiles, 4)
    total_tokens, num_tiles, seed, threshold, factor, scale_log2, log2_e,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, REACH: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(2)
    num_chunks = tl.num_programs(2)
    k_ptr += head // GROUP * stride_kh
    v_ptr += head // GROUP * stride_vh
    bias_ptr += head * (2 * REACH + 1) + REACH
    columns = tl.arange(0, BLOCK_N)
    # The first and the last chunk are all that is at least REACH away, on the left and on the right.
    is_left = chunk == 0
    is_right = chunk == num_chunks - 1
    lowest = 1 - REACH + (chunk - 1) * BLOCK_N
    nearest = tl.where(is_left, -total_tokens, tl.where(is_right, REACH, lowest))
    farthest = tl.where(is_left, -REACH, tl.where(is_right, total_tokens, lowest + BLOCK_N - 1))
    if positions_ptr is not None:
        # Rows are at most as far apart as their positions.
        nearest = tl.minimum(nearest, 0)
        farthest = tl.maximum(farthest, 0)

    # [BLOCK_N]
    acc = tl.zeros([BLOCK_N], dtype=tl.float32)
    for tile in range(share, num_tiles, tl.num_programs(0)):
        offs_m, in_tile, key_start, key_end, first_key, last_key, sequence_start = tile_of(
            tiles_ptr + tile * 4, bound_start_ptr, bound_end_ptr, total_tokens, BLOCK_M
        )
        position = positions_of(positions_ptr, offs_m, total_tokens)
        first_row = tl.load(tiles_ptr + tile * 4)
        first_key = tl.maximum(first_key, first_row + nearest)
        last_key = tl.minimum(last_key, first_row + BLOCK_M + farthest)
        if first_key < last_key:
            dropout_row = offs_m.to(tl.int32) * tl.num_programs(1) + tl.program_id(1)
            # [BLOCK_M, BLOCK_D]
            q = load_tile(q_ptr + head * stride_qh, offs_m, in_tile, stride_qt, HEAD_DIM, BLOCK_D)
            grad = load_tile(grad_ptr + head * stride_gh, offs_m, in_tile, stride_gt, HEAD_DIM, BLOCK_D)
            # [BLOCK_M]
            line = head * total_tokens + offs_m
            row_max = tl.load(statistics_ptr + line, mask=in_tile, other=0.0)
            inverse = tl.load(statistics_ptr + tl.num_programs(1) * total_tokens + line, mask=in_tile, other=0.0)
            delta = tl.load(delta_ptr + line, mask=in_tile, other=0.0)
            for start_n in tl.range(first_key, last_key, BLOCK_N):
                offs_n = start_n + columns
                # [BLOCK_N, BLOCK_D]
                k = load_rows(k_ptr, None, start_n, last_key, 0, stride_kt, HEAD_DIM, BLOCK_D, BLOCK_N, TMA=False)
                v = load_rows(v_ptr, None, start_n, last_key, 0, stride_vt, HEAD_DIM, BLOCK_D, BLOCK_N, TMA=False)
                # [BLOCK_M, BLOCK_N]
                offset = positions_of(positions_ptr, offs_n, last_key)[None, :] - position[:, None]
                # Rows after the tile's have no sum, and weigh nothing.
                own = pairs_of(offs_n, key_start, key_end, last_key, bound_start_ptr)
                scores = scores_of(q, k, bias_ptr, offset, own, scale_log2, log2_e, REACH)
                _, flow = weights_and_flow(
                    scores, row_max[:, None], inverse[:, None], delta[:, None], grad, v, dropout_row[:, None],
                    (offs_n - sequence_start)[None, :], seed, threshold, factor, HAS_DROPOUT,
                )  # fmt: skip
                if positions_ptr is None:
                    place = (offs_m[:, None] + (lowest + columns)[None, :] - start_n).to(tl.int32)
                else:
                    place = _place_of(
                        positions_ptr + start_n, position[:, None] + (lowest + columns)[None, :],
                        tl.minimum(last_key - start_n, BLOCK_N), BLOCK_N, STEPS,
                    )  # fmt: skip
                found = (place >= 0) & (place < BLOCK_N)
                if is_left | is_right:
                    # Where the table has one number, the left chunk takes distance 0.
                    far = tl.where(is_left, offset <= -REACH, (offset >= REACH) & (offset > -REACH))
                    moved = tl.where(far, flow, 0.0)
                else:
                    moved = tl.where(found, tl.gather(flow, tl.where(found, place, 0), 1), 0.0)
                acc += tl.sum(moved, 0)
    tl.store(sums_ptr + ((share * tl.num_programs(1) + head) * num_chunks + chunk) * BLOCK_N + columns, acc)


def launch_bias_gradient(
    q: Tensor, k: Tensor, given: dict[str, Tensor], strides: dict[str, int], scoring: Scoring
) -> Tensor:
    """The gradient of the bias, (nheads, 2 * reach + 1) float32.

    Args:
        q: (total_tokens, nheads, headdim), not empty.
        k: (total_tokens, nheads_k, headdim).
        given: the kernel's tensors of rows and what is known of each row, by name.
        strides: those of rows and heads, by name.
        scoring: what enters scores; it has a bias.
    """
    tile = tile_for(arch_of(q.device), q.dtype, q.shape[2])
    if q.shape[2] > 64:
        # Moving g by columns takes registers.
        tile = tile._replace(BLOCK_N=16)
    num_heads, reach = q.shape[1], scoring.reach
    num_chunks = cdiv(max(2 * reach - 1, 0), tile.BLOCK_N) + 2
    tiles = scoring.layout.sequence_tiles(tile.BLOCK_M)
    shares = min(SHARES, tiles.shape[0])
    sums = q.new_empty(shares, num_heads, num_chunks, tile.BLOCK_N, dtype=torch.float32)
    with device_guard(q):
        _attention_bias_gradient_kernel[(shares, num_heads, num_chunks)](
            **given,
            sums_ptr=sums,
            tiles_ptr=tiles,
            num_tiles=tiles.shape[0],
            **scoring.arguments(),
            **strides,
            **options_of(tile, q, k),
            STEPS=tile.BLOCK_N.bit_length() - 1,
        )
    chunks = sums.sum(0)
    left, right = chunks[:, 0].sum(1, keepdim=True), chunks[:, -1].sum(1, keepdim=True)
    if reach == 0:
        return left + right
    return torch.cat((left, chunks[:, 1:-1].flatten(1)[:, : 2 * reach - 1], right), 1)
