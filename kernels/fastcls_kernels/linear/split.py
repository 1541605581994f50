"""x weightᵀ of few rows, in parts: the product over each range of input features by itself, in float32.

A handful of rows makes too few tiles of output to fill a chip, so the input features are shared out, too. The layer
norm that follows adds the parts in their order, which is the same in every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.backend import device_guard
from ..runtime.tile_tables import SplitTile
from ..runtime.triton import cdiv, jit, tl


@jit(do_not_specialize=["num_rows"])
def _split_linear_kernel(
    x_ptr,  # (num_rows, K)
    weight_ptr,  # (N, K)
    parts_ptr,  # (num_rows, SPLITS, N)
    num_rows,
    stride_xm,
    stride_wn,
    N: tl.constexpr,
    K: tl.constexpr,
    K_PER_SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    split = tl.program_id(2)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = offs_m < num_rows
    in_columns = offs_n < N
    # [BLOCK_M, BLOCK_N]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, K_PER_SPLIT, BLOCK_K):
        offs_k = split * K_PER_SPLIT + k + tl.arange(0, BLOCK_K)
        in_k = offs_k < K
        # [BLOCK_M, BLOCK_K]
        x = tl.load(
            x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :], mask=in_rows[:, None] & in_k[None, :], other=0.0
        )
        # [BLOCK_N, BLOCK_K]
        weight = tl.load(
            weight_ptr + offs_n[:, None] * stride_wn + offs_k[None, :],
            mask=in_columns[:, None] & in_k[None, :],
            other=0.0,
        )
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
    tl.store(
        parts_ptr + (offs_m[:, None] * SPLITS + split) * N + offs_n[None, :],
        acc,
        mask=in_rows[:, None] & in_columns[None, :],
    )


def launch_split_linear(
    hidden_states: Tensor,  # (num_rows, in_features)
    weight: Tensor,  # (out_features, in_features)
    tile: SplitTile,
) -> Tensor:
    """(num_rows, num_parts, out_features) float32; the sum over the parts is the product."""
    num_rows, in_features = hidden_states.shape
    out_features = weight.shape[0]
    per_split = cdiv(cdiv(in_features, tile.SPLITS), tile.BLOCK_K) * tile.BLOCK_K
    splits = cdiv(in_features, per_split)
    parts = hidden_states.new_empty(num_rows, splits, out_features, dtype=torch.float32)
    if parts.numel() == 0:
        return parts
    with device_guard(hidden_states):
        _split_linear_kernel[(cdiv(num_rows, tile.BLOCK_M), cdiv(out_features, tile.BLOCK_N), splits)](
            x_ptr=hidden_states,
            weight_ptr=weight,
            parts_ptr=parts,
            num_rows=num_rows,
            stride_xm=hidden_states.stride(0),
            stride_wn=weight.stride(0),
            N=out_features,
            K=in_features,
            K_PER_SPLIT=per_split,
            SPLITS=splits,
            BLOCK_M=tile.BLOCK_M,
            BLOCK_N=tile.BLOCK_N,
            BLOCK_K=tile.BLOCK_K,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
    return parts
