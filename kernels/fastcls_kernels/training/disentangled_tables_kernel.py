"""The gradients by position of disentangled attention, from matrices with a column for each distance:

    grad_row_t = scale (given_t + Σ_c flow_tc table_c),    grad_table_b = scale Σ_{c of bucket b} Σ_t flow_tc row_t.

A program sums all of what it stores: of one head some rows, some columns, or one bucket. So every run gives the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..runtime.backend import device_guard
from ..runtime.tile_tables import arch_of, unsqueezed
from ..runtime.triton import cdiv, head_block, jit, tl
from .attention_tiles import Tile, load_tile, store_tile, strides_of


@jit(do_not_specialize=["total_tokens", "num_columns"])
def _row_gradient_kernel(
    given_ptr,  # (total_tokens, nheads, headdim)
    flow_ptr,  # (nheads, total_tokens, num_columns)
    table_ptr,  # (num_columns, nheads, headdim)
    grad_ptr,  # (total_tokens, nheads, headdim)
    total_tokens, num_columns, scale,
    stride_it, stride_ih, stride_tt, stride_th, stride_gt, stride_gh,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < total_tokens
    # [BLOCK_M, BLOCK_D]
    acc = load_tile(given_ptr + head * stride_ih, rows, in_rows, stride_it, HEAD_DIM, BLOCK_D)
    flow_ptr += head * total_tokens * num_columns
    table_ptr += head * stride_th
    for start in tl.range(0, num_columns, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        in_columns = columns < num_columns
        # [BLOCK_M, BLOCK_N]
        flow = tl.load(
            flow_ptr + (rows[:, None] * num_columns + columns[None, :]),
            mask=in_rows[:, None] & in_columns[None, :],
            other=0.0,
        )
        # [BLOCK_N, BLOCK_D]
        table = load_tile(table_ptr, columns, in_columns, stride_tt, HEAD_DIM, BLOCK_D)
        acc = tl.dot(flow, table, acc, input_precision="ieee")
    store_tile(grad_ptr + head * stride_gh, acc * scale, rows, in_rows, stride_gt, HEAD_DIM, BLOCK_D)


@jit(do_not_specialize=["total_tokens", "num_columns", "num_sequences"])
def _column_gradient_kernel(
    flow_ptr,  # (nheads, total_tokens, num_columns)
    rows_ptr,  # (total_tokens, nheads, headdim)
    grad_ptr,  # (num_columns, nheads, headdim)
    cu_seqlens_ptr,  # (num_sequences + 1,)
    total_tokens, num_columns, num_sequences, scale,
    stride_rt, stride_rh, stride_gt, stride_gh,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_columns = columns < num_columns
    flow_ptr += head * total_tokens * num_columns
    rows_ptr += head * stride_rh
    # [BLOCK_M, BLOCK_D]
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # Rows that belong to no sequence may hold NaN, which no zero takes away.
    last_row = tl.load(cu_seqlens_ptr + num_sequences)
    for start in tl.range(0, last_row, BLOCK_N):
        rows = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        in_rows = rows < last_row
        # [BLOCK_N, BLOCK_M]
        flow = tl.load(
            flow_ptr + (rows[:, None] * num_columns + columns[None, :]),
            mask=in_rows[:, None] & in_columns[None, :],
            other=0.0,
        )
        # [BLOCK_N, BLOCK_D]
        tile = load_tile(rows_ptr, rows, in_rows, stride_rt, HEAD_DIM, BLOCK_D)
        acc = tl.dot(tl.trans(flow), tile, acc, input_precision="ieee")
    store_tile(grad_ptr + head * stride_gh, acc * scale, columns, in_columns, stride_gt, HEAD_DIM, BLOCK_D)


@jit()
def _bucket_gradient_kernel(
    by_column_ptr,  # (num_columns, nheads, headdim)
    first_ptr,  # (num_buckets,): each bucket's first column
    last_ptr,  # (num_buckets,): the column after its last
    grad_ptr,  # (num_buckets, nheads, headdim)
    stride_ct, stride_ch, stride_gt, stride_gh,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    bucket, head = tl.program_id(0), tl.program_id(1)
    offs_d = tl.arange(0, BLOCK_D)
    in_head = offs_d < HEAD_DIM
    # [BLOCK_D]
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    for column in tl.range(tl.load(first_ptr + bucket), tl.load(last_ptr + bucket)):
        acc += tl.load(by_column_ptr + column * stride_ct + head * stride_ch + offs_d, mask=in_head, other=0.0)
    tl.store(grad_ptr + bucket * stride_gt + head * stride_gh + offs_d, acc, mask=in_head)


def position_tile(dtype: torch.dtype) -> Tile:
    """The tile of the products with matrices of distances: BLOCK_M rows of the result, BLOCK_N terms a step."""
    return Tile(32, 32, num_warps=4, num_stages=1 if dtype == torch.float32 else 2)


def launch_row_gradient(given: Tensor, flow: Tensor, table: Tensor, scale: float, grad: Tensor) -> None:
    """Stores the gradients of rows.

    Args:
        given: (total_tokens, nheads, headdim), float32: what does not come by positions.
        flow: (nheads, total_tokens, num_columns), contiguous, in the rows' dtype.
        table: (num_columns, nheads, headdim), in that dtype.
        scale: factor on the sum of both.
        grad: (total_tokens, nheads, headdim), in that dtype: where they are stored.
    """
    total_tokens, num_heads, head_dim = given.shape
    options = _options(grad.dtype, given)
    with device_guard(given):
        _row_gradient_kernel[(cdiv(total_tokens, options["BLOCK_M"]), num_heads)](
            given_ptr=given,
            flow_ptr=flow,
            table_ptr=table,
            grad_ptr=grad,
            total_tokens=total_tokens,
            num_columns=flow.shape[2],
            scale=scale,
            **strides_of(i=given, t=table, g=grad),
            HEAD_DIM=head_dim,
            **options,
        )


def launch_table_gradient(
    flow: Tensor, rows: Tensor, cu_seqlens: Tensor, columns: Tensor, scale: float, grad: Tensor
) -> None:
    """Stores the gradients of a table of distances.

    Args:
        flow: (nheads, total_tokens, num_columns), contiguous, in the rows' dtype.
        rows: (total_tokens, nheads, headdim), which the table was multiplied with.
        cu_seqlens: (num_sequences + 1,), int32.
        columns: (num_columns,): the bucket of each column, rising.
        scale: factor on all.
        grad: (num_buckets, nheads, headdim), float32, contiguous in the last dimension: where they are stored.
    """
    num_heads, total_tokens, num_columns = flow.shape
    by_column = flow.new_empty(num_columns, num_heads, rows.shape[2], dtype=torch.float32)
    buckets = torch.arange(grad.shape[0], dtype=columns.dtype, device=columns.device)
    options = _options(flow.dtype, rows)
    with device_guard(flow):
        _column_gradient_kernel[(cdiv(num_columns, options["BLOCK_M"]), num_heads)](
            flow_ptr=flow,
            rows_ptr=rows,
            grad_ptr=by_column,
            cu_seqlens_ptr=cu_seqlens,
            total_tokens=total_tokens,
            num_columns=num_columns,
            num_sequences=cu_seqlens.numel() - 1,
            scale=scale,
            **strides_of(r=rows, g=by_column),
            HEAD_DIM=rows.shape[2],
            **options,
        )
        _bucket_gradient_kernel[(grad.shape[0], num_heads)](
            by_column_ptr=by_column,
            first_ptr=torch.searchsorted(columns, buckets, out_int32=True),
            last_ptr=torch.searchsorted(columns, buckets, right=True, out_int32=True),
            grad_ptr=grad,
            **strides_of(c=by_column, g=grad),
            HEAD_DIM=rows.shape[2],
            BLOCK_D=options["BLOCK_D"],
            num_warps=1,
            enable_fp_fusion=True,
        )


def _options(dtype: torch.dtype, rows: Tensor) -> dict[str, Any]:
    arch, head_dim = arch_of(rows.device), rows.shape[2]
    tile = position_tile(dtype)
    return {
        "BLOCK_D": head_block(head_dim),
        **tile._asdict(),
        "enable_fp_fusion": True,
        **unsqueezed(arch),
    }
