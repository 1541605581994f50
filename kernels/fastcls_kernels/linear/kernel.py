"""A matrix product with bias and activation in one kernel: out = f(x weightᵀ + bias).

One program makes a BLOCK_M x BLOCK_N tile of the output, and adds the bias and applies the activation while the sums
are still in float32 registers. Programs walk the output in groups of rows, so that those that run together share their
weights in the second-level cache.
"""

from __future__ import annotations

from torch import Tensor

from ..runtime.activations import Activation, activated
from ..runtime.backend import device_guard
from ..runtime.tile_tables import GeluTile
from ..runtime.tma import descriptor, is_aligned
from ..runtime.triton import cdiv, jit, tl


@jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x_ptr,  # (num_rows, K)
    weight_ptr,  # (N, K)
    x_desc,  # (num_rows, K), blocks of BLOCK_M x BLOCK_K; None without TMA
    weight_desc,  # (N, K), blocks of BLOCK_N x BLOCK_K; None without TMA
    bias_ptr,  # (N,) or None
    out_ptr,  # (num_rows, N)
    num_rows,
    stride_xm,
    stride_wn,
    stride_om,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TMA: tl.constexpr,
):
    program = tl.program_id(0)
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    column_tiles = tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * column_tiles)
    group_rows = tl.minimum(row_tiles - group * GROUP_M, GROUP_M)
    in_group = program % (GROUP_M * column_tiles)
    first_row = (group * GROUP_M + in_group % group_rows) * BLOCK_M
    first_column = (in_group // group_rows) * BLOCK_N
    offs_m = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    offs_n = first_column.to(tl.int64) + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    in_rows = offs_m < num_rows
    in_columns = offs_n < N

    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]
    weight_ptrs = weight_ptr + offs_n[:, None] * stride_wn + offs_k[None, :]
    # [BLOCK_M, BLOCK_N]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if TMA:
            # The copy engine fills in zeros beyond the last row and column.
            x = x_desc.load([first_row, k])
            weight = weight_desc.load([first_column, k])
        else:
            in_k = offs_k < K - k
            # [BLOCK_M, BLOCK_K]
            x = tl.load(x_ptrs, mask=in_rows[:, None] & in_k[None, :], other=0.0)
            # [BLOCK_N, BLOCK_K]
            weight = tl.load(weight_ptrs, mask=in_columns[:, None] & in_k[None, :], other=0.0)
            x_ptrs += BLOCK_K
            weight_ptrs += BLOCK_K
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION is not None:
        acc = activated(acc, ACTIVATION)
    tl.store(
        out_ptr + offs_m[:, None] * stride_om + offs_n[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=in_rows[:, None] & in_columns[None, :],
    )


def launch_linear(
    hidden_states: Tensor,  # (num_rows, in_features)
    weight: Tensor,  # (out_features, in_features)
    bias: Tensor | None,  # (out_features,)
    activation: Activation | None,
    tile: GeluTile,
) -> Tensor:
    """(num_rows, out_features) in hidden_states' dtype."""
    num_rows, in_features = hidden_states.shape
    out_features = weight.shape[0]
    out = hidden_states.new_empty(num_rows, out_features)
    if out.numel() == 0:
        return out
    tma = tile.TMA and is_aligned(hidden_states) and is_aligned(weight)
    with device_guard(hidden_states):
        _linear_kernel[(cdiv(num_rows, tile.BLOCK_M) * cdiv(out_features, tile.BLOCK_N),)](
            x_ptr=hidden_states,
            weight_ptr=weight,
            x_desc=descriptor(hidden_states, in_features, tile.BLOCK_M, tile.BLOCK_K) if tma else None,
            weight_desc=descriptor(weight, in_features, tile.BLOCK_N, tile.BLOCK_K) if tma else None,
            bias_ptr=bias,
            out_ptr=out,
            num_rows=num_rows,
            stride_xm=hidden_states.stride(0),
            stride_wn=weight.stride(0),
            stride_om=out.stride(0),
            N=out_features,
            K=in_features,
            BLOCK_M=tile.BLOCK_M,
            BLOCK_N=tile.BLOCK_N,
            BLOCK_K=tile.BLOCK_K,
            GROUP_M=8,
            ACTIVATION=activation,
            TMA=tma,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
    return out
