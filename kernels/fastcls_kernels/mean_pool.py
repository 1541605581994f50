"""Mean pooling over packed sequences: out_i = Σ_j x_j / n_i over the n_i tokens j of sequence i, zero where n_i = 0.

A program takes one sequence and BLOCK_W columns, and walks the tokens BLOCK_T at a time with sums in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._ops import operator
from .layout import PackedLayout
from .runtime.backend import device_guard, runs_triton
from .runtime.checks import check_last_dim_contiguous, check_tensor
from .runtime.gradients import differentiably
from .runtime.triton import cdiv, jit, tl

BLOCK_T = 32
BLOCK_W = 64


@jit()
def _mean_pool_kernel(
    x_ptr,  # (total_tokens, WIDTH)
    cu_seqlens_ptr,  # (num_sequences + 1,)
    out_ptr,  # (num_sequences, WIDTH)
    stride_xt,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    offs_t = tl.arange(0, BLOCK_T)
    offs_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    in_width = offs_w < WIDTH
    start = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    # [BLOCK_T, BLOCK_W]
    acc = tl.zeros([BLOCK_T, BLOCK_W], dtype=tl.float32)
    for first in tl.range(start, end, BLOCK_T):
        tokens = tl.cast(first, tl.int64) + offs_t
        acc += tl.load(
            x_ptr + tokens[:, None] * stride_xt + offs_w[None, :],
            mask=(tokens < end)[:, None] & in_width[None, :],
            other=0.0,
        ).to(tl.float32)
    # [BLOCK_W]
    mean = tl.div_rn(tl.sum(acc, 0), tl.maximum(end - start, 1).to(tl.float32))
    tl.store(out_ptr + sequence * WIDTH + offs_w, mean.to(out_ptr.dtype.element_ty), mask=in_width)


def _launch_mean_pool(
    hidden_states: Tensor,  # (total_tokens, width)
    layout: PackedLayout,
) -> Tensor:
    """(num_sequences, width) in hidden_states' dtype."""
    width = hidden_states.shape[1]
    out = hidden_states.new_empty(layout.num_sequences, width)
    if out.numel() == 0:
        return out
    with device_guard(hidden_states):
        _mean_pool_kernel[(layout.num_sequences, cdiv(width, BLOCK_W))](
            x_ptr=hidden_states,
            cu_seqlens_ptr=layout.cu_seqlens,
            out_ptr=out,
            stride_xt=hidden_states.stride(0),
            WIDTH=width,
            BLOCK_T=BLOCK_T,
            BLOCK_W=BLOCK_W,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


def _mean_pool_runs(hidden_states: Tensor, layout: PackedLayout) -> Tensor:
    out = hidden_states.new_zeros(layout.num_sequences, hidden_states.shape[1])
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    for run in layout.runs:
        run.sequences(out).copy_(run.batch(hidden_states).mean(1, dtype=dtype))
    return out


@operator(
    "(Tensor hidden_states, Tensor cu_seqlens, SymInt max_seqlen) -> Tensor",
    fake=lambda hidden_states, cu_seqlens, _: hidden_states.new_empty(cu_seqlens.shape[0] - 1, hidden_states.shape[1]),
    members=(PackedLayout.members("hidden_states"),),
)
def mean_pool(
    hidden_states: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, layout: PackedLayout | None = None
) -> Tensor:
    """The mean of each packed sequence's rows.

    Args:
        hidden_states: (total_tokens, width), float32, float16 or bfloat16, contiguous last dimension.
        cu_seqlens: (num_sequences + 1,), int32: sequence i is rows ``cu_seqlens[i]:cu_seqlens[i + 1]``. Rows from
            ``cu_seqlens[-1]`` on belong to no sequence.
        max_seqlen: the longest sequence, in tokens, or any bound above it. Nothing is chosen or compiled by it.
        layout: ``PackedLayout(cu_seqlens, max_seqlen, total_tokens)``, for callers that use one packing many times.

    Returns:
        (num_sequences, width), contiguous, in hidden_states' dtype; zero for sequences without tokens.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, stride, device or length that does not fit; ``cu_seqlens`` is checked as in
            `attention_varlen`.
    """
    check_tensor("hidden_states", hidden_states, "(total_tokens, width)")
    check_last_dim_contiguous("hidden_states", hidden_states)
    layout = PackedLayout.of(hidden_states, cu_seqlens, max_seqlen, layout)
    return differentiably(mean_pool_unchecked, hidden_states, layout)


def mean_pool_unchecked(hidden_states: Tensor, layout: PackedLayout) -> Tensor:
    """`mean_pool` of arguments that are known to fit."""
    if runs_triton(hidden_states):
        return _launch_mean_pool(hidden_states, layout)
    return _mean_pool_runs(hidden_states, layout)
