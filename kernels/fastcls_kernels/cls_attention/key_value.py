"""The pass of few query rows over keys and values, and its launcher:

    out_h = Σ_j softmax_j(q_h · k_jg · scale + bias_jh) v_jg,    g = h // GROUP.

A program takes one query row (or one split of its tokens) and one head.
"""

from __future__ import annotations

from torch import Tensor

from ..attention.kernel import LOG2_E
from ..layout import PackedLayout
from ..runtime.backend import device_guard
from ..runtime.tile_tables import arch_of, unsqueezed
from ..runtime.triton import jit, next_power_of_2, tl
from .splits import Partials, RowBounds, bounds_of, default_num_splits


@jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["start_ptr", "end_ptr"])
def _cls_attention_kv_kernel(
    q_ptr,  # (num_rows, nheads, headdim)
    k_ptr,  # (total_tokens, nheads_k, headdim)
    v_ptr,  # (total_tokens, nheads_k, headdim)
    score_bias_ptr,  # (total_tokens, nheads), or None
    out_ptr,  # (num_rows, num_splits, nheads, headdim)
    lse_ptr,  # (num_rows, num_splits, nheads)
    start_ptr,  # (num_rows,)
    end_ptr,  # (num_rows,)
    num_splits, scale_log2, stride_qb, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    k_ptr += head // GROUP * stride_kh
    v_ptr += head // GROUP * stride_vh

    start = tl.load(start_ptr + row)
    end = tl.load(end_ptr + row)
    tokens_per_split = tl.cdiv(tl.cdiv(end - start, num_splits), BLOCK_N) * BLOCK_N
    split_start = start + split * tokens_per_split
    split_end = tl.minimum(split_start + tokens_per_split, end)

    offs_d = tl.arange(0, BLOCK_D)
    in_head = offs_d < HEAD_DIM
    # [BLOCK_D]
    query = tl.load(q_ptr + row * stride_qb + head * stride_qh + offs_d, mask=in_head, other=0.0).to(tl.float32)
    query *= scale_log2
    # Each of the BLOCK_N lanes keeps a softmax of its own; they are merged after the loop.
    # [BLOCK_N]
    lane_max = tl.full([BLOCK_N], -1e30, dtype=tl.float32)
    lane_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    # [BLOCK_N, BLOCK_D]
    acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)

    for tile_start in range(split_start, split_end, BLOCK_N):
        offs_t = tile_start + tl.arange(0, BLOCK_N)
        in_split = offs_t < split_end
        mask = in_split[:, None] & in_head[None, :]
        offs_t = offs_t.to(tl.int64)
        # [BLOCK_N, BLOCK_D]
        k = tl.load(k_ptr + offs_t[:, None] * stride_kt + offs_d[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + offs_t[:, None] * stride_vt + offs_d[None, :], mask=mask, other=0.0)
        # [BLOCK_N]
        scores = tl.sum(k.to(tl.float32) * query[None, :], 1)
        if HAS_BIAS:
            scores += tl.load(score_bias_ptr + offs_t * NUM_HEADS + head, mask=in_split, other=0.0) * LOG2_E
        scores = tl.where(in_split, scores, -1e30)
        new_max = tl.maximum(lane_max, scores)
        weights = tl.where(in_split, tl.exp2(scores - new_max), 0.0)
        rescale = tl.exp2(lane_max - new_max)
        lane_sum = lane_sum * rescale + weights
        lane_max = new_max
        acc = acc * rescale[:, None] + weights[:, None] * v.to(tl.float32)

    row_max = tl.max(lane_max)
    lane_weight = tl.exp2(lane_max - row_max)
    row_sum = tl.sum(lane_sum * lane_weight)
    divisor = tl.where(row_sum > 0.0, row_sum, 1.0)
    # [BLOCK_D]
    out = tl.sum(acc * lane_weight[:, None], 0) / divisor
    out_row = (row * num_splits + split) * NUM_HEADS + head
    tl.store(out_ptr + out_row * HEAD_DIM + offs_d, out.to(out_ptr.dtype.element_ty), mask=in_head)
    tl.store(lse_ptr + out_row, row_max + tl.log2(divisor))


def launch_cls_attention_kv(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    scale: float,
    num_splits: int | None,
    bias: Tensor | None = None,
    row_bounds: RowBounds | None = None,
) -> Tensor:
    """The result, (num_rows, nheads, headdim), of arguments that `cls_attention_kv` has checked."""
    num_rows, num_heads, head_dim = query.shape
    out = query.new_empty(query.shape)
    if out.numel() == 0:
        return out
    if num_splits is None:
        num_splits = default_num_splits(query.device, num_rows * num_heads, layout.max_seqlen)
    starts, ends = bounds_of(layout, row_bounds)
    partials = Partials(out, num_splits)
    with device_guard(query):
        _cls_attention_kv_kernel[(num_rows, num_splits, num_heads)](
            q_ptr=query,
            k_ptr=k,
            v_ptr=v,
            score_bias_ptr=bias,
            out_ptr=partials.target,
            lse_ptr=partials.lse,
            start_ptr=starts,
            end_ptr=ends,
            num_splits=num_splits,
            scale_log2=scale * LOG2_E,
            stride_qb=query.stride(0),
            stride_qh=query.stride(1),
            stride_kt=k.stride(0),
            stride_kh=k.stride(1),
            stride_vt=v.stride(0),
            stride_vh=v.stride(1),
            NUM_HEADS=num_heads,
            GROUP=num_heads // k.shape[1],
            HEAD_DIM=head_dim,
            BLOCK_D=next_power_of_2(head_dim),
            BLOCK_N=32,
            HAS_BIAS=bias is not None,
            LOG2_E=LOG2_E,
            num_warps=4,
            enable_fp_fusion=True,
            **unsqueezed(arch_of(query.device)),
        )
        return partials.merge()
