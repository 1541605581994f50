"""The kernel of attention over packed rows, its tiles and its launcher:

    out_i = Σ_j softmax_j(q_i · k_j · scale + b_(j - i)) v_j,    j in i's sequence and window.

A program computes one head of a tile of BLOCK_M rows, by one of two schedules. A *token tile* is BLOCK_M neighbouring
rows, whatever sequences they belong to: each row is masked to the bounds [start, end) of its own sequence, so that
short sequences share a tile. A *sequence tile* holds rows of one sequence, so that a long one reads no neighbour's
keys. Lengths are read on the device and never reach the compiler: one CUDA graph serves every mixture of lengths.

With grouped queries GROUP query heads in a row read the same head of keys and values.

A window narrows the bounds of each row, and a token tile then reads no more keys than its rows' windows hold. The bias
b is a table by relative position, whose first and last values hold for everything farther away.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..layout import PackedLayout, PaddedRows
from ..runtime.backend import device_guard
from ..runtime.invariance import choices
from ..runtime.tile_tables import AttentionTile, arch_of, attention_tile, unsqueezed
from ..runtime.tma import descriptor, is_aligned
from ..runtime.triton import cdiv, head_block, jit, tl

LOG2_E = 1.4426950408889634
NO_WINDOW = (-1, -1)
_STRIDES = ("stride_qt", "stride_qh", "stride_kt", "stride_kh", "stride_vt", "stride_vh", "stride_ot", "stride_oh")


@jit()
def load_rows(
    ptr, desc, start_n, last_key, column, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Keys or values, [BLOCK_N, BLOCK_D]: zero from row ``last_key`` on, except that TMA loads those rows as well."""
    if TMA:
        return desc.load([start_n, column])
    # The loads are masked, not the scores alone: stale memory may hold NaN, and a weight of zero times NaN is NaN. The
    # tile's address takes 64 bits; offsets within it take 32 and are the same in every step.
    offs_d = tl.arange(0, BLOCK_D)
    return tl.load(
        ptr + tl.cast(start_n, tl.int64) * stride + (tl.arange(0, BLOCK_N)[:, None] * stride + offs_d[None, :]),
        mask=(start_n + tl.arange(0, BLOCK_N) < last_key)[:, None] & (offs_d < HEAD_DIM)[None, :],
        other=0.0,
    )


@jit()
def isolated(v):
    """Values with 0 in place of those that are not finite, and NaN for the keys, [BLOCK_N], that have such values."""
    defect = (v - v).to(tl.float32)
    return tl.where(defect == 0.0, v, 0.0), tl.sum(defect, 1)


@jit()
def softmax_step(scores, v, acc, row_max, row_sum):
    """One step of the online softmax: the next (acc, row_max, row_sum). A score of -inf leaves its key out."""
    # new_max is at least -1e30, so a masked score weighs exp2(-inf) = 0 and never meets inf - inf.
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    weights = tl.exp2(scores - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return acc, new_max, row_sum


@jit()
def _attend(
    q,  # [BLOCK_M, BLOCK_D]
    k_ptr,  # (total_tokens, headdim)
    v_ptr,  # (total_tokens, headdim)
    k_desc,  # (total_tokens, nheads_k * headdim), or None
    v_desc,  # (total_tokens, nheads_k * headdim), or None
    bias_ptr,  # (2 * REACH + 1,), from its middle on, or None
    positions_ptr,  # (total_tokens,), or None
    row_position,  # [BLOCK_M]
    row_start,  # [BLOCK_M]
    row_end,  # [BLOCK_M]
    first_key, last_key, column, scale_log2, log2_e, stride_kt, stride_vt,
    HEAD_DIM: tl.constexpr, REACH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WHOLE_SEQUENCE: tl.constexpr, TMA: tl.constexpr, ISOLATE: tl.constexpr,
):  # fmt: skip
    """The weighted sums of values, [BLOCK_M, BLOCK_D], and the sums of the weights, [BLOCK_M], of a tile's rows."""
    # [BLOCK_M, BLOCK_D]
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # [BLOCK_M]
    row_max = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    # The isolating pass is rare and must take no registers from the common one, so it is not pipelined.
    for start_n in tl.range(first_key, last_key, BLOCK_N, num_stages=1 if ISOLATE else None):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        # [BLOCK_N, BLOCK_D]
        k = load_rows(k_ptr, k_desc, start_n, last_key, column, stride_kt, HEAD_DIM, BLOCK_D, BLOCK_N, TMA)
        v = load_rows(v_ptr, v_desc, start_n, last_key, column, stride_vt, HEAD_DIM, BLOCK_D, BLOCK_N, TMA)
        # [BLOCK_M, BLOCK_N]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        if bias_ptr is not None:
            key_position = offs_n
            if positions_ptr is not None:
                # Keys after the last take its position, and are masked below.
                key_position = tl.load(positions_ptr + tl.minimum(offs_n, last_key - 1))
            offset = key_position[None, :] - row_position[:, None]
            # Clamped, so that pairs of two sequences, which are masked below, read within the table, too.
            scores += tl.load(bias_ptr + tl.minimum(tl.maximum(offset, -REACH), REACH)).to(tl.float32) * log2_e
        if ISOLATE:
            # NaN goes into the scores, which the mask keeps to its own sequence.
            v, defects = isolated(v)
            scores += defects[None, :]
        if WHOLE_SEQUENCE:
            own = (offs_n < last_key)[None, :]
        else:
            own = (offs_n[None, :] >= row_start[:, None]) & (offs_n[None, :] < row_end[:, None])
        scores = tl.where(own, scores, -float("inf"))
        acc, row_max, row_sum = softmax_step(scores, v, acc, row_max, row_sum)
    return acc, row_sum


@jit(do_not_specialize=["total_tokens"])
def _attention_kernel(
    q_ptr,  # (total_tokens, nheads, headdim)
    k_ptr,  # (total_tokens, nheads_k, headdim)
    v_ptr,  # (total_tokens, nheads_k, headdim)
    k_desc,  # (total_tokens, nheads_k * headdim), or None without TMA
    v_desc,  # (total_tokens, nheads_k * headdim), or None without TMA
    out_ptr,  # (total_tokens, nheads, headdim)
    bias_ptr,  # (nheads, 2 * REACH + 1), or None
    positions_ptr,  # (total_tokens,), or None where a row's place is its position
    row_start_ptr,  # (total_tokens,), or None with WHOLE_SEQUENCE
    row_end_ptr,  # (total_tokens,), or None with WHOLE_SEQUENCE
    tiles_ptr,  # (num_tiles, 4), or None without PER_SEQUENCE
    total_tokens, scale_log2, log2_e,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, REACH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PER_SEQUENCE: tl.constexpr, WHOLE_SEQUENCE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    in_head = offs_d < HEAD_DIM
    k_ptr += head // GROUP * stride_kh
    v_ptr += head // GROUP * stride_vh
    column = tl.program_id(1) // GROUP * HEAD_DIM

    if PER_SEQUENCE:
        tiles_ptr += tl.program_id(0) * 4
        offs_m = tl.load(tiles_ptr).to(tl.int64) + tl.arange(0, BLOCK_M)
        in_tile = offs_m < tl.load(tiles_ptr + 1)
        first_key = tl.load(tiles_ptr + 2)
        last_key = tl.load(tiles_ptr + 3)
        row_start = first_key
        row_end = last_key
    else:
        offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_tile = offs_m < total_tokens
    if not WHOLE_SEQUENCE:
        # A row that belongs to no sequence has start = end = 0; it must not widen the span of keys that the tile reads.
        row_start = tl.load(row_start_ptr + offs_m, mask=in_tile, other=0)
        row_end = tl.load(row_end_ptr + offs_m, mask=in_tile, other=0)
        first_key = tl.min(tl.where(row_end > row_start, row_start, total_tokens))
        last_key = tl.max(row_end)

    row_position = offs_m.to(tl.int32)
    if bias_ptr is not None:
        bias_ptr += head * (2 * REACH + 1) + REACH
        if positions_ptr is not None:
            row_position = tl.load(positions_ptr + offs_m, mask=in_tile, other=0)

    # [BLOCK_M, BLOCK_D]
    q = tl.load(
        q_ptr + offs_m[:, None] * stride_qt + head * stride_qh + offs_d[None, :],
        mask=in_tile[:, None] & in_head[None, :],
        other=0.0,
    )
    acc, row_sum = _attend(
        q, k_ptr, v_ptr, k_desc, v_desc, bias_ptr, positions_ptr, row_position, row_start, row_end, first_key, last_key,
        column, scale_log2, log2_e, stride_kt, stride_vt, HEAD_DIM, REACH, BLOCK_D, BLOCK_M, BLOCK_N, WHOLE_SEQUENCE,
        TMA, ISOLATE=False,
    )  # fmt: skip
    # A value that is not finite (a text that overflowed) spoils every row of the tile, since 0 * inf is NaN. Such tiles
    # are rare: they are computed again, so that the value reaches its own sequence's rows alone, with few keys a step,
    # which take fewer registers than the common pass.
    if tl.max(tl.max(tl.where(acc == acc, 0, 1), 1)) > 0:
        acc, row_sum = _attend(
            q, k_ptr, v_ptr, k_desc, v_desc, bias_ptr, positions_ptr, row_position, row_start, row_end, first_key,
            last_key, column, scale_log2, log2_e, stride_kt, stride_vt, HEAD_DIM, REACH, BLOCK_D, BLOCK_M, 16,
            WHOLE_SEQUENCE, TMA=False, ISOLATE=True,
        )  # fmt: skip

    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    tl.store(
        out_ptr + offs_m[:, None] * stride_ot + head * stride_oh + offs_d[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=in_tile[:, None] & in_head[None, :],
    )


def choose_tile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout | PaddedRows,
    window: tuple[int, int] = NO_WINDOW,
    biased: bool = False,
) -> AttentionTile:
    """The tile for q, (total_tokens, nheads, headdim), and k and v, (total_tokens, nheads_k, headdim)."""
    # In a window a row sees few keys: it shares a tile, as the rows of the shortest sequences do.
    mean_seqlen = cdiv(layout.total_tokens, max(layout.num_sequences, 1)) if window == NO_WINDOW else 1
    tile = attention_tile(arch_of(q.device), q.dtype, q.shape[2], mean_seqlen, fits_tma(k) and fits_tma(v))
    if biased and not tile.TMA:
        # Gathering the bias takes registers, and so do keys on their way to shared memory.
        tile = tile._replace(BLOCK_N=max(tile.BLOCK_N // 2, 16))
    shares = window != NO_WINDOW and choices().shared_tiles
    return tile._replace(PER_SEQUENCE=False) if shares else tile


def fits_tma(tensor: Tensor) -> bool:
    """Whether the copy engine takes all heads as one matrix: its tiles then never reach into another head."""
    num_tokens, num_heads, head_dim = tensor.shape
    return (
        num_tokens > 0
        and head_block(head_dim) == head_dim
        and (num_heads == 1 or tensor.stride(1) == head_dim)
        and is_aligned(tensor)
    )


def _descriptor(tensor: Tensor, block_n: int) -> Any:
    _, num_heads, head_dim = tensor.shape
    return descriptor(tensor, num_heads * head_dim, block_n, head_dim)


def strides_of(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> dict[str, int]:
    """The strides of tokens and of heads, by the kernels' names for them."""
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2])
    return dict(zip(_STRIDES, strides, strict=True))


def launch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout | PaddedRows,
    scale: float,
    tile: AttentionTile,
    *,
    row_bounds: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Attention of q, (total_tokens, nheads, headdim), in that shape.

    Args:
        q, k, v, layout, scale: as `attention_varlen` has checked them.
        tile: how the kernel is launched.
        row_bounds: (starts, ends), (total_tokens,) each: the rows that each row attends to, None for its sequence's.
        bias: (nheads, 2 * reach + 1), or None.
        positions: (total_tokens,): where rows stand, None where their distances are those of their places.
    """
    total_tokens, num_heads, head_dim = q.shape
    out = q.new_empty(total_tokens, num_heads, head_dim)
    if out.numel() == 0:
        return out
    tiles = layout.sequence_tiles(tile.BLOCK_M) if tile.PER_SEQUENCE else None
    num_tiles = cdiv(total_tokens, tile.BLOCK_M) if tiles is None else tiles.shape[0]
    whole_sequence = tile.PER_SEQUENCE and row_bounds is None
    row_start, row_end = (None, None) if whole_sequence else row_bounds or layout.row_bounds
    with device_guard(q):
        _attention_kernel[(num_tiles, num_heads)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            k_desc=_descriptor(k, tile.BLOCK_N) if tile.TMA else None,
            v_desc=_descriptor(v, tile.BLOCK_N) if tile.TMA else None,
            out_ptr=out,
            bias_ptr=bias,
            positions_ptr=positions,
            row_start_ptr=row_start,
            row_end_ptr=row_end,
            tiles_ptr=tiles,
            total_tokens=total_tokens,
            scale_log2=scale * LOG2_E,
            log2_e=LOG2_E,
            **strides_of(q, k, v, out),
            GROUP=num_heads // k.shape[1],
            HEAD_DIM=head_dim,
            REACH=0 if bias is None else bias.shape[1] // 2,
            BLOCK_D=head_block(head_dim),
            BLOCK_M=tile.BLOCK_M,
            BLOCK_N=tile.BLOCK_N,
            PER_SEQUENCE=tile.PER_SEQUENCE,
            WHOLE_SEQUENCE=whole_sequence,
            TMA=tile.TMA,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
            **({} if bias is None else unsqueezed(arch_of(q.device))),
        )
    return out
