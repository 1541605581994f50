"""Kernels of embeddings that can be trained: the sum of the tables' rows, and the gradient of one table:

    grad_table[id] = Σ grad_rows[t] over the tokens t with ids[t] = id

Tokens are sorted by id, and a program walks over CHUNK of them in that order. A run of equal ids that lies within its
chunk is complete and goes into the table. Of others each chunk leaves its part, and a second kernel sums the parts of a
run where the run starts. So each sum has one order, no two programs write one row, and one id that all tokens share, as
a token type may be, still has many programs. No count of runs is read back from the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..embedding import _launch_embedding_layer_norm
from ..runtime.backend import device_guard
from ..runtime.triton import cdiv, jit, next_power_of_2, tl

CHUNK = 32
# Parts of one run that are summed at a time.
BLOCK_C = 32
MAX_BLOCK_W = 256


@jit(do_not_specialize=["num_tokens", "padding_id"])
def _table_gradient_kernel(
    ids_ptr,  # (num_tokens,), sorted
    order_ptr,  # (num_tokens,)
    grad_rows_ptr,  # (num_tokens, WIDTH)
    grad_table_ptr,  # (num_table_rows, WIDTH)
    heads_ptr,  # (num_chunks, WIDTH): of the run that an earlier chunk starts
    tails_ptr,  # (num_chunks, WIDTH): of the run that starts here and goes on in the next chunk
    num_tokens,
    padding_id,
    stride_gt,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    offs_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    in_width = offs_w < WIDTH
    start = chunk * CHUNK
    stop = tl.minimum(start + CHUNK, num_tokens)
    before = tl.load(ids_ptr + start - 1, mask=start > 0, other=-1).to(tl.int64)
    # [BLOCK_W]
    total = tl.zeros([BLOCK_W], tl.float32)
    for place in range(start, stop):
        token_id = tl.load(ids_ptr + place).to(tl.int64)
        token = tl.load(order_ptr + place).to(tl.int64)
        total += tl.load(grad_rows_ptr + token * stride_gt + offs_w, mask=in_width, other=0.0).to(tl.float32)
        # No id is -1, so the last run ends with the tokens.
        following = tl.load(ids_ptr + place + 1, mask=place + 1 < num_tokens, other=-1).to(tl.int64)
        if (following != token_id) | (place + 1 == stop):
            if token_id == before:
                tl.store(heads_ptr + chunk * WIDTH + offs_w, total, mask=in_width)
            elif following == token_id:
                tl.store(tails_ptr + chunk * WIDTH + offs_w, total, mask=in_width)
            elif token_id != padding_id:
                tl.store(grad_table_ptr + token_id * WIDTH + offs_w, total, mask=in_width)
            total = tl.zeros([BLOCK_W], tl.float32)


@jit(do_not_specialize=["num_chunks", "padding_id"])
def _table_gradient_runs_kernel(
    ids_ptr,  # (num_tokens,), sorted
    heads_ptr,  # (num_chunks, WIDTH)
    tails_ptr,  # (num_chunks, WIDTH)
    grad_table_ptr,  # (num_table_rows, WIDTH)
    num_chunks,
    padding_id,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    last = tl.load(ids_ptr + (chunk + 1) * CHUNK - 1).to(tl.int64)
    following = tl.load(ids_ptr + (chunk + 1) * CHUNK).to(tl.int64)
    before = tl.load(ids_ptr + chunk * CHUNK - 1, mask=chunk > 0, other=-1).to(tl.int64)
    # The chunk in which a run starts sums it.
    if (following != last) | (before == last) | (last == padding_id):
        return
    offs_c = tl.arange(0, BLOCK_C)
    offs_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    in_width = offs_w < WIDTH
    # [BLOCK_W]
    total = tl.load(tails_ptr + chunk * WIDTH + offs_w, mask=in_width, other=0.0)
    first = chunk + 1
    goes_on = True
    while goes_on:
        chunks = first + offs_c
        ids = tl.load(ids_ptr + chunks * CHUNK, mask=chunks < num_chunks, other=-1).to(tl.int64)
        in_run = ids == last
        # [BLOCK_C, BLOCK_W]
        parts_ptrs = heads_ptr + chunks[:, None] * WIDTH + offs_w[None, :]
        total += tl.sum(tl.load(parts_ptrs, mask=in_run[:, None] & in_width[None, :], other=0.0), 0)
        goes_on = tl.sum(in_run.to(tl.int32), 0) == BLOCK_C
        first += BLOCK_C
    tl.store(grad_table_ptr + last * WIDTH + offs_w, total, mask=in_width)


def launch_embedding_forward(
    token_ids: Tensor,  # (num_tokens,)
    position_ids: Tensor | None,  # (num_tokens,)
    token_type_ids: Tensor | None,  # (num_tokens,)
    word_table: Tensor,  # (vocab_size, width)
    position_table: Tensor | None,  # (max_positions, width)
    type_table: Tensor | None,  # (type_vocab_size, width)
) -> Tensor:
    """The sum of rows of each table there is: (num_tokens, width) in word_table's dtype."""
    return _launch_embedding_layer_norm(
        token_ids, position_ids, token_type_ids, word_table, position_table, type_table, None, None, 0.0
    )


def launch_table_gradient(
    ids: Tensor,  # (num_tokens,)
    grad_rows: Tensor,  # (num_tokens, width)
    num_table_rows: int,
    padding_id: int | None,
) -> Tensor:
    """(num_table_rows, width) float32, the same bit for bit each time; zeros in row ``padding_id``."""
    num_tokens, width = grad_rows.shape
    grad_table = grad_rows.new_zeros(num_table_rows, width, dtype=torch.float32)
    if grad_rows.numel() == 0:
        return grad_table
    sorted_ids, order = torch.sort(ids, stable=True)
    num_chunks = cdiv(num_tokens, CHUNK)
    block_w = min(next_power_of_2(width), MAX_BLOCK_W)
    heads, tails = grad_rows.new_empty(2, num_chunks, width, dtype=torch.float32)
    padding_id = -1 if padding_id is None else padding_id
    with device_guard(grad_rows):
        _table_gradient_kernel[(num_chunks, cdiv(width, block_w))](
            ids_ptr=sorted_ids,
            order_ptr=order,
            grad_rows_ptr=grad_rows,
            grad_table_ptr=grad_table,
            heads_ptr=heads,
            tails_ptr=tails,
            num_tokens=num_tokens,
            padding_id=padding_id,
            stride_gt=grad_rows.stride(0),
            WIDTH=width,
            CHUNK=CHUNK,
            BLOCK_W=block_w,
            num_warps=max(block_w // 128, 1),
            enable_fp_fusion=True,
        )
        if num_chunks > 1:
            _table_gradient_runs_kernel[(num_chunks - 1, cdiv(width, block_w))](
                ids_ptr=sorted_ids,
                heads_ptr=heads,
                tails_ptr=tails,
                grad_table_ptr=grad_table,
                num_chunks=num_chunks,
                padding_id=padding_id,
                WIDTH=width,
                CHUNK=CHUNK,
                BLOCK_C=BLOCK_C,
                BLOCK_W=block_w,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return grad_table
