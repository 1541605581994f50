"""Bidirectional attention over packed sequences: out_i = Σ_j softmax_j(q_i · k_j · scale) v_j, j in i's sequence.

One program takes a tile of BLOCK_M packed tokens and one head, by one of two schedules. *Token tiles* hold whatever
sequences lie there: every row carries the bounds [start, end) of its own one and is masked to them, so that short
sequences share a tile. *Sequence tiles* hold rows of one sequence, so that long ones do not read their neighbours'
keys. In both a length is only ever read on the device: none reaches the compiler, and one CUDA graph serves every
mixture.

A window, |j - i| bounded on either side, is nothing but tighter bounds of each row: token tiles then read no more than
their rows' windows. A bias by relative position adds b[j - i] to the scores, from a table that ends in one value for
all that is further away.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .._tracing import traceable
from ..layout import PackedLayout, Run
from ..runtime.backend import device_guard, runs_triton
from ..runtime.checks import check_device, check_head_dim, check_last_dim_contiguous, check_tensor
from ..runtime.invariance import is_batch_invariant
from ..runtime.tile_tables import AttentionTile, arch_of, attention_tile, unsqueezed
from ..runtime.tma import descriptor, is_aligned
from ..runtime.triton import cdiv, head_block, jit, tl

LOG2_E = 1.4426950408889634
NO_WINDOW = (-1, -1)
# Up to this many tokens a CPU is faster by plain batched products in float32 than by its fused attention, whose
# bookkeeping outweighs the scores that it never stores. In 16 bits the plain form would round the scores.
SHORT = 64
# Of fewer keys than a vector has places the fused attention takes a row whose scores are all NaN for one without keys,
# and gives zero: these are plain products, in 16 bits in float32, unless all numbers are known to be finite.
FEW_KEYS = 16
# Queries that a CPU takes at once: in a window few, so that few keys are read in vain; without one many, which bounds
# the memory that a bias takes.
WINDOW_BLOCK = 64
BIAS_BLOCK = 512


@jit()
def load_rows(
    ptr, desc, start_n, last_key, column, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Rows of keys or values, [BLOCK_N, BLOCK_D], zero from ``last_key`` on; but TMA brings the rows behind, too."""
    if TMA:
        return desc.load([start_n, column])
    # Masked loads, not only masked scores: stale memory may hold NaN, and a weight of zero times NaN is NaN. The tile's
    # place is one 64-bit number; offsets within it are the same in every step, and 32 bits hold them.
    offs_d = tl.arange(0, BLOCK_D)
    return tl.load(
        ptr + tl.cast(start_n, tl.int64) * stride + (tl.arange(0, BLOCK_N)[:, None] * stride + offs_d[None, :]),
        mask=(start_n + tl.arange(0, BLOCK_N) < last_key)[:, None] & (offs_d < HEAD_DIM)[None, :],
        other=0.0,
    )


@jit()
def _attend(
    q,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    bias_ptr,
    positions_ptr,
    row_position,
    row_start,
    row_end,
    first_key,
    last_key,
    column,
    scale_log2,
    log2_e,
    stride_kt,
    stride_vt,
    HEAD_DIM: tl.constexpr,
    REACH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE_SEQUENCE: tl.constexpr,
    TMA: tl.constexpr,
    ISOLATE: tl.constexpr,
):
    # [BLOCK_M, BLOCK_D]
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # [BLOCK_M]
    row_max = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    # The rare pass must not cost the common one registers, so it is not pipelined.
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
                # What stands in for the keys after the last is masked with them.
                key_position = tl.load(positions_ptr + tl.minimum(offs_n, last_key - 1))
            offset = key_position[None, :] - row_position[:, None]
            # In the table for every pair, and so for those of two sequences, too.
            scores += tl.load(bias_ptr + tl.minimum(tl.maximum(offset, -REACH), REACH)).to(tl.float32) * log2_e
        if ISOLATE:
            # v - v is 0, or NaN where v is not finite: that goes to the scores of its own sequence's rows alone.
            defect = (v - v).to(tl.float32)
            v = tl.where(defect == 0.0, v, 0.0)
            scores += tl.sum(defect, 1)[None, :]
        if WHOLE_SEQUENCE:
            own = (offs_n < last_key)[None, :]
        else:
            own = (offs_n[None, :] >= row_start[:, None]) & (offs_n[None, :] < row_end[:, None])
        # new_max is at least -1e30, so a masked score weighs exp2(-inf) = 0 and never meets inf - inf.
        scores = tl.where(own, scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        row_max = new_max
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return acc, row_sum


@jit(do_not_specialize=["total_tokens"])
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    out_ptr,
    bias_ptr,
    positions_ptr,
    row_start_ptr,
    row_end_ptr,
    tiles_ptr,
    total_tokens,
    scale_log2,
    log2_e,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    HEAD_DIM: tl.constexpr,
    REACH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    WHOLE_SEQUENCE: tl.constexpr,
    TMA: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    in_head = offs_d < HEAD_DIM
    k_ptr += head * stride_kh
    v_ptr += head * stride_vh
    column = tl.program_id(1) * HEAD_DIM

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
    # A value that is not finite (a text that overflowed) spoils every row of the tile, since 0 * inf is NaN. Such
    # tiles are rare and are computed once more, so that it reaches the rows of its own sequence only. Few keys a step
    # take fewer registers than the common pass does.
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


class _PaddedRows:
    """Where the tokens of a padded batch lie, as `PackedLayout` says it of packed ones."""

    def __init__(self, seqlens: Tensor, seqlen: int) -> None:
        self.seqlens = seqlens
        self.seqlen = seqlen
        self.num_sequences = seqlens.numel()
        self.total_tokens = self.num_sequences * seqlen

    def _bounds(self, block_m: int) -> tuple[Tensor, Tensor, Tensor]:
        """For each block of rows, (batch, blocks), the first one and the start and end of its keys."""
        starts = torch.arange(self.num_sequences, device=self.seqlens.device)[:, None] * self.seqlen
        blocks = torch.arange(0, self.seqlen, block_m, device=self.seqlens.device)
        real = blocks[None, :] < self.seqlens[:, None]
        return starts + blocks, starts * real, (starts + self.seqlens[:, None]) * real

    @property
    def row_bounds(self) -> tuple[Tensor, Tensor]:
        _, starts, ends = self._bounds(1)
        return starts.flatten().int(), ends.flatten().int()

    def sequence_tiles(self, block_m: int) -> Tensor:
        first, starts, ends = self._bounds(block_m)
        last = first[:, :1] + self.seqlen
        return torch.stack((first, last.expand_as(first), starts, ends), -1).flatten(0, 1).int()


def _choose_tile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout | _PaddedRows,
    window: tuple[int, int] = NO_WINDOW,
    biased: bool = False,
) -> AttentionTile:
    # In a window rows see few keys, and share tiles, as those of the shortest sequences do.
    mean_seqlen = cdiv(layout.total_tokens, max(layout.num_sequences, 1)) if window == NO_WINDOW else 1
    tile = attention_tile(arch_of(q.device), q.dtype, q.shape[2], mean_seqlen, _fits_tma(k) and _fits_tma(v))
    if biased and not tile.TMA:
        # Gathering the bias takes registers that keys on their way to shared memory take, too.
        tile = tile._replace(BLOCK_N=max(tile.BLOCK_N // 2, 16))
    shares = window != NO_WINDOW and not is_batch_invariant()
    return tile._replace(PER_SEQUENCE=False) if shares else tile


def _fits_tma(tensor: Tensor) -> bool:
    """Whether all heads are one matrix as the copy engine takes it: its tiles then never reach into another head."""
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


def _launch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout | _PaddedRows,
    scale: float,
    tile: AttentionTile,
    *,
    row_bounds: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """``row_bounds``: each row's keys, where they are not all of its sequence."""
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
            stride_qt=q.stride(0),
            stride_qh=q.stride(1),
            stride_kt=k.stride(0),
            stride_kh=k.stride(1),
            stride_vt=v.stride(0),
            stride_vh=v.stride(1),
            stride_ot=out.stride(0),
            stride_oh=out.stride(1),
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


class _ScoreTerms:
    """What a CPU adds to scores: the bias, and -inf outside of the window."""

    def __init__(self, layout: PackedLayout, window: tuple[int, int], bias: Tensor | None, like: Tensor) -> None:
        self.layout = layout
        # In 64 bits, as limits of a window may be.
        self.positions = None if layout.positions is None else layout.positions.long()
        self.window = window
        # Wide enough to lose nothing of either.
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.bias = like.new_zeros(1, 1, dtype=dtype) if bias is None else bias.to(dtype)
        self.longest = max((run.length for run in layout.runs), default=1)
        # [1 or nheads, 2 * longest - 1], of all offsets that there are between rows without positions of their own.
        self.by_offset = self._of(torch.arange(1 - self.longest, self.longest, device=like.device))

    def _of(self, offsets: Tensor) -> Tensor:
        reach = self.bias.shape[1] // 2
        left, right = self.window
        terms = self.bias[:, offsets.clamp(-reach, reach) + reach]
        if left >= 0:
            terms.masked_fill_(offsets < -left, -float("inf"))
        if right >= 0:
            terms.masked_fill_(offsets > right, -float("inf"))
        return terms

    def block(self, run: Run, rows: slice, keys: slice) -> Tensor:
        """(1 or num_sequences, 1 or nheads, rows, keys)."""
        if self.positions is not None and self.layout.has_gaps(run):
            positions = run.batch(self.positions)
            return self._of(positions[:, None, keys] - positions[:, rows, None]).transpose(0, 1)
        first, last = self.longest + keys.start - rows.stop, self.longest + keys.stop - rows.start - 1
        # One row further is one offset less: each is the same numbers, moved by one.
        return self.by_offset[:, first:last].unfold(1, keys.stop - keys.start, 1).flip(1).unsqueeze(0)


def _blocks(length: int, window: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Rows of a sequence, and those that their keys are among: positions rise by no less than rows do."""
    left, right = (length if limit < 0 else limit for limit in window)
    size = BIAS_BLOCK if min(window) < 0 else WINDOW_BLOCK
    for start in range(0, length, size):
        end = min(start + size, length)
        yield slice(start, end), slice(max(start - left, 0), min(end + right, length))


def _attention_runs(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float, window: tuple[int, int], bias: Tensor | None
) -> Tensor:
    out = q.new_empty(q.shape)
    end_token = 0
    terms = None if bias is None and window == NO_WINDOW else _ScoreTerms(layout, window, bias, q)
    unused = q.new_empty(1, 1, 1, dtype=torch.promote_types(q.dtype, torch.float32))
    # Looked at once for all; but where no text may change another's bits, once a run.
    is_finite = None
    if bias is not None and not is_finite_all(bias):
        is_finite = False
    elif (q.dtype.itemsize < 4 or terms is not None) and not is_batch_invariant():
        is_finite = is_finite_all(*_in_one_piece(q, k, v))
    longest_short = SHORT if q.dtype.itemsize >= 4 else 0 if is_finite else FEW_KEYS - 1
    for run in layout.runs:
        if run.length <= longest_short and (terms is None or (bias is None and _all_in_window(run, window, layout))):
            _attend_short(q, k, v, out, run, scale, unused)
            end_token = run.end_token
            continue
        # [num_sequences, nheads, length, headdim]
        queries, keys, values, attended = (run.batch(tensor).transpose(1, 2) for tensor in (q, k, v, out))
        if terms is not None and (bias is not None or not _all_in_window(run, window, layout)):
            for rows, near in _blocks(run.length, window):
                near_by = (queries[:, :, rows], keys[:, :, near], values[:, :, near])
                attended[:, :, rows] = attend_batch(*near_by, scale, terms.block(run, rows, near), is_finite=is_finite)
        else:
            attended.copy_(attend_batch(queries, keys, values, scale, is_finite=is_finite))
        end_token = run.end_token
    out[end_token:] = 0
    return out


def _all_in_window(run: Run, window: tuple[int, int], layout: PackedLayout) -> bool:
    return not layout.has_gaps(run) and all(limit < 0 or run.length <= limit + 1 for limit in window)


def _attend_short(q: Tensor, k: Tensor, v: Tensor, out: Tensor, run: Run, scale: float, unused: Tensor) -> None:
    """A run's rows of ``out``. Written without detours: there are many runs, and each has little to compute."""
    count, start, length = run.num_sequences, run.start_token, run.length
    end, (_, num_heads, head_dim) = start + count * length, q.shape
    shape = (count, length, num_heads, head_dim)
    # [num_sequences * nheads, length, headdim]
    queries, keys, values = (
        tensor[start:end].view(shape).transpose(1, 2).to(unused.dtype).reshape(count * num_heads, length, head_dim)
        for tensor in (q, k, v)
    )
    scores = torch.baddbmm(unused, queries, keys.transpose(1, 2), beta=0, alpha=scale)
    attended = torch.bmm(scores.softmax(-1), values).view(count, num_heads, length, head_dim)
    out[start:end].view(shape).copy_(attended.transpose(1, 2))


@traceable
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float | None = None,
    *,
    window_size: tuple[int, int] = NO_WINDOW,
    bias: Tensor | None = None,
    layout: PackedLayout | None = None,
) -> Tensor:
    """Bidirectional attention inside each of many packed sequences.

    Args:
        q, k, v: (total_tokens, nheads, headdim), float32, float16 or bfloat16, head sizes from 4 to 128 (multiples
            of 16 are fastest). Any strides with a contiguous last dimension: views of one fused projection are taken
            as they are.
        cu_seqlens: (num_sequences + 1,), int32: sequence i is rows ``cu_seqlens[i]:cu_seqlens[i + 1]``. Zero-length
            sequences are allowed. Rows from ``cu_seqlens[-1]`` on belong to no sequence.
        max_seqlen: the longest sequence, in tokens, or any bound above it. It chooses nothing and compiles nothing.
        softmax_scale: factor on the scores; ``headdim ** -0.5`` if None.
        window_size: (left, right): row i attends to rows j of its sequence with -left <= position j - position i <=
            right, -1 for no limit on that side.
        bias: (nheads, 2 * reach + 1), float32 or q's dtype, contiguous: added to the scaled score of rows i and j is
            ``bias[h, clamp(position j - position i, -reach, reach) + reach]``.
        layout: ``PackedLayout(cu_seqlens, max_seqlen, total_tokens)``, for callers that use one packing many times:
            what depends on the lengths alone is checked and computed once. A row's position is the layout's, if it has
            positions, else the row's place in its sequence.

    Returns:
        (total_tokens, nheads, headdim), contiguous, in q's dtype; zero in rows that belong to no sequence.

    Raises:
        TypeError: a dtype that does not fit, or a window that is not two ints.
        ValueError: a shape, stride, device, head size, window or length that does not fit. ``cu_seqlens`` is checked
            by value where it lies on the CPU; on a GPU that would stall the device, so there it is trusted.

    Accumulates and takes the softmax in float32. The signature is flash-attention's (Dao, 2023); on a CPU each run
    of neighbouring sequences of equal length is one call of `torch.nn.functional.scaled_dot_product_attention`.
    """
    shape = "(total_tokens, nheads, headdim)"
    check_tensor("q", q, shape)
    check_keys_values(q, k, v, shape)
    _check_window(window_size)
    if bias is not None:
        _check_bias(bias, q)
    layout = PackedLayout.of(q, cu_seqlens, max_seqlen, layout)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    if not runs_triton(q):
        return _attention_runs(q, k, v, layout, scale, window_size, bias)
    tile = _choose_tile(q, k, v, layout, window_size, biased=bias is not None)
    row_bounds = None if window_size == NO_WINDOW else layout.window_bounds(*window_size)
    positions = None if bias is None else layout.positions
    return _launch_attention(q, k, v, layout, scale, tile, row_bounds=row_bounds, bias=bias, positions=positions)


@traceable
def attention_padded(q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor, softmax_scale: float | None = None) -> Tensor:
    """Bidirectional attention over a padded batch whose real tokens come first in each row.

    Args:
        q, k, v: (batch, seqlen, nheads, headdim), dtypes, head sizes and strides as in `attention_varlen`. A copy is
            made where batch and seqlen cannot be seen as one dimension.
        seqlens: (batch,), int32 or int64: the real tokens in each row, from 0 to seqlen.
        softmax_scale: factor on the scores; ``headdim ** -0.5`` if None.

    Returns:
        (batch, seqlen, nheads, headdim), contiguous, in q's dtype; zero at the padding.

    Raises:
        TypeError, ValueError: as `attention_varlen`.
    """
    shape = "(batch, seqlen, nheads, headdim)"
    check_tensor("q", q, shape)
    check_keys_values(q, k, v, shape)
    batch, seqlen, _num_heads, head_dim = q.shape
    _check_seqlens(seqlens, q)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    # On a GPU the values are trusted, since reading them would stall it; but a row never reaches into the next one.
    seqlens = seqlens.clamp(0, seqlen)
    positions = torch.arange(seqlen, device=seqlens.device)
    real = positions[None, :] < seqlens[:, None]
    if not runs_triton(q) and is_batch_invariant():
        return _attention_rows(q, k, v, seqlens, scale)
    if not runs_triton(q):
        if not is_finite_all(q, k):
            return _attention_rows(q, k, v, seqlens, scale)
        # A row of nothing but padding would be a softmax over nothing: it attends everywhere, and is zeroed below.
        mask = (real | (seqlens[:, None] == 0))[:, None, None, :]
        # Padding may hold NaN, and a weight of zero times NaN is NaN.
        k, v = (tensor.masked_fill(~real[:, :, None, None], 0.0) for tensor in (k, v))
        queries, keys, values = (tensor.transpose(1, 2) for tensor in (q, k, v))
        attended = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale).transpose(1, 2)
        return attended.masked_fill(~real[:, :, None, None], 0.0).contiguous()
    rows = _PaddedRows(seqlens, seqlen)
    queries, keys, values = (tensor.flatten(0, 1) for tensor in (q, k, v))
    out = _launch_attention(queries, keys, values, rows, scale, _choose_tile(queries, keys, values, rows))
    # A sequence's last tile holds padding, too.
    return out.unflatten(0, (batch, seqlen)).masked_fill_(~real[:, :, None, None], 0.0)


def _attention_rows(q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor, scale: float) -> Tensor:
    out = q.new_zeros(q.shape)
    for row, length in enumerate(seqlens.tolist()):
        if length:
            queries, keys, values = (tensor[row, None, :length].transpose(1, 2) for tensor in (q, k, v))
            out[row, :length] = attend_batch(queries, keys, values, scale)[0].transpose(0, 1)
    return out


def attend_batch(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    bias: Tensor | None = None,
    *,
    is_finite: bool | None = None,
) -> Tensor:
    """Attention of (batch, nheads, rows, headdim) on a CPU; ``bias`` is added to the scores.

    ``is_finite`` says whether queries, keys and what the bias is made of are; None has the first two looked at, where
    that matters.
    """
    # Where nothing is NaN the fused attention may have few keys, too.
    few, dtype = bias is None and keys.shape[2] < FEW_KEYS and not is_finite, queries.dtype
    is_narrow = dtype.itemsize < 4
    if is_finite is None and not few and (is_narrow or bias is not None):
        is_finite = is_finite_all(queries, keys)
    # The exponential of the fused attention in 16 bits makes a number of inf - inf.
    if is_narrow and (few or not is_finite):
        queries, keys, values = (tensor.float() for tensor in (queries, keys, values))
    # With a mask it takes a row whose scores are all -inf for one that is left out.
    if not few and (bias is None or is_finite):
        return scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale).to(dtype)
    scores = queries @ keys.transpose(2, 3) * scale
    return ((scores if bias is None else scores + bias).softmax(-1) @ values).to(dtype)


def is_finite_all(*tensors: Tensor) -> bool:
    """Whether all their numbers are; a sum that overflows is taken for one that is not."""
    # A sum in its own dtype is the faster one, and bfloat16 overflows no earlier than float32.
    return math.isfinite(
        sum(float(each.sum(dtype=torch.float32 if each.dtype == torch.float16 else None)) for each in tensors)
    )


def _in_one_piece(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Queries and keys; with the values where all three are views of one projection, which is read twice as fast."""
    total_tokens, num_heads, head_dim = q.shape
    width, strides = num_heads * head_dim, (3 * num_heads * head_dim, head_dim, 1)
    steps = (k.data_ptr() - q.data_ptr(), v.data_ptr() - k.data_ptr())
    if any(each.stride() != strides for each in (q, k, v)) or steps != (width * q.element_size(),) * 2:
        return q, k
    return (q.as_strided((total_tokens, 3 * width), (3 * width, 1)),)


def check_keys_values(q: Tensor, k: Tensor, v: Tensor, shape: str) -> None:
    """Checks keys and values against checked queries of ``shape``; shared with `disentangled_attention`."""
    check_tensor("k", k, shape, like=q)
    check_tensor("v", v, shape, like=q)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape:
            raise ValueError(f"{name} must have q's shape {tuple(q.shape)}, got {tuple(tensor.shape)}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_last_dim_contiguous(name, tensor)
    check_head_dim("q", q.shape[-1])


def _check_window(window_size: tuple[int, int]) -> None:
    if (
        not isinstance(window_size, tuple)
        or len(window_size) != 2
        or not all(isinstance(limit, int) for limit in window_size)
    ):
        raise TypeError(f"window_size must be a tuple of two ints, got {window_size!r}")
    if min(window_size) < -1:
        raise ValueError(f"window_size must be at least -1, which is no limit, on both sides, got {window_size}")


def _check_bias(bias: Tensor, q: Tensor) -> None:
    if not isinstance(bias, Tensor) or bias.dtype not in (torch.float32, q.dtype):
        found = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"bias must be a tensor of torch.float32 or q's {q.dtype}, got {found}")
    num_heads = q.shape[1]
    if bias.ndim != 2 or bias.shape[0] != num_heads or bias.shape[1] % 2 == 0 or not bias.is_contiguous():
        raise ValueError(
            f"bias must be contiguous, of shape (nheads, 2 * reach + 1) = ({num_heads}, an odd number), "
            f"got shape {tuple(bias.shape)} with strides {bias.stride()}"
        )
    check_device("bias", bias, q)


def _check_seqlens(seqlens: Tensor, q: Tensor) -> None:
    if not isinstance(seqlens, Tensor) or seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"seqlens must be an int32 or int64 tensor, got {getattr(seqlens, 'dtype', type(seqlens))}")
    if seqlens.shape != q.shape[:1]:
        raise ValueError(f"seqlens must have shape (batch,) = ({q.shape[0]},), got {tuple(seqlens.shape)}")
    check_device("seqlens", seqlens, q)
    if not seqlens.is_cuda and seqlens.numel() and not 0 <= int(seqlens.min()) <= int(seqlens.max()) <= q.shape[1]:
        raise ValueError(
            f"seqlens must lie between 0 and seqlen = {q.shape[1]}, got {int(seqlens.min())} to {int(seqlens.max())}"
        )
