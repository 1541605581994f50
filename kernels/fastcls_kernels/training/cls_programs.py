"""What programs of the [CLS] pass that is trained compute: see `cls_kernel`, whose names these are."""

from __future__ import annotations

from ..runtime.triton import jit, tl
from .dropout import kept_numbers

# Views of one tensor, whose addresses are aligned or not by the number of sequences.
_BOUNDS = ["start_ptr", "end_ptr"]


@jit()
def _load_row(ptr, offs_h, chunk, NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """A chunk of a row's columns by head, [BLOCK_H, BLOCK_W], in float32."""
    offs_w = chunk * BLOCK_W + tl.arange(0, BLOCK_W)
    return tl.load(
        ptr + offs_h[:, None] * WIDTH + offs_w[None, :],
        mask=(offs_h < NUM_HEADS)[:, None] & (offs_w < WIDTH)[None, :],
        other=0.0,
    ).to(tl.float32)


@jit()
def _load_tokens(x_ptr, offs_t, in_span, chunk, stride_xt, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """A chunk of tokens' columns, [BLOCK_N, BLOCK_W], in float32; zero beyond the span, whose rows may be NaN."""
    offs_w = chunk * BLOCK_W + tl.arange(0, BLOCK_W)
    return tl.load(
        x_ptr + offs_t.to(tl.int64)[:, None] * stride_xt + offs_w[None, :],
        mask=in_span[:, None] & (offs_w < WIDTH)[None, :],
        other=0.0,
    ).to(tl.float32)


@jit()
def _products(
    left_ptr,  # (nheads, width), of one row
    right_ptr,  # (nheads, width), of one row, or None
    x_ptr,  # (total_tokens, width)
    offs_h, offs_t, in_span, stride_xt, NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A row's products with tokens, of one or two tensors, [BLOCK_H, BLOCK_N] each: the tokens are read once."""
    left = tl.zeros([BLOCK_H, BLOCK_N], dtype=tl.float32)
    right = tl.zeros([BLOCK_H, BLOCK_N], dtype=tl.float32)
    for chunk in range((WIDTH + BLOCK_W - 1) // BLOCK_W):
        x = tl.trans(_load_tokens(x_ptr, offs_t, in_span, chunk, stride_xt, WIDTH, BLOCK_W))
        columns = _load_row(left_ptr, offs_h, chunk, NUM_HEADS, WIDTH, BLOCK_W)
        left = tl.dot(columns, x, left, input_precision=PRECISION)
        if right_ptr is not None:
            columns = _load_row(right_ptr, offs_h, chunk, NUM_HEADS, WIDTH, BLOCK_W)
            right = tl.dot(columns, x, right, input_precision=PRECISION)
    return left, right


@jit(do_not_specialize_on_alignment=_BOUNDS)
def cls_scores_kernel(
    q_ptr,  # (num_rows, nheads, width)
    x_ptr,  # (total_tokens, width)
    bias_ptr,  # (total_tokens, nheads), or None
    score_ptr,  # (total_tokens, nheads)
    start_ptr,  # (num_rows,)
    end_ptr,  # (num_rows,)
    scale_log2, stride_xt, NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of a row's tokens, times log2 e."""
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(end_ptr + row)
    first = tl.load(start_ptr + row) + tl.program_id(1) * BLOCK_N
    if first >= end:
        return
    offs_t = first + tl.arange(0, BLOCK_N)
    offs_h = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_span = offs_t < end
    scores, _ = _products(
        q_ptr + row * NUM_HEADS * WIDTH, None, x_ptr, offs_h, offs_t, in_span, stride_xt, NUM_HEADS, WIDTH,
        BLOCK_H, BLOCK_N, BLOCK_W, PRECISION,
    )  # fmt: skip
    # [BLOCK_H, BLOCK_N]
    offs = offs_t.to(tl.int64)[None, :] * NUM_HEADS + offs_h[:, None]
    mask = (offs_h < NUM_HEADS)[:, None] & in_span[None, :]
    scores *= scale_log2
    if bias_ptr is not None:
        scores += tl.load(bias_ptr + offs, mask=mask, other=0.0) * LOG2_E
    tl.store(score_ptr + offs, scores, mask=mask)


@jit(do_not_specialize_on_alignment=_BOUNDS)
def cls_key_scores_kernel(
    q_ptr,  # (num_rows, nheads, headdim)
    k_ptr,  # (total_tokens, nheads, headdim)
    bias_ptr,  # (total_tokens, nheads), or None
    score_ptr,  # (total_tokens, nheads)
    start_ptr,  # (num_rows,)
    end_ptr,  # (num_rows,)
    scale_log2, stride_kt, stride_kh, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of a row's tokens in one head, times log2 e, by that head's keys."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(2).to(tl.int64)
    end = tl.load(end_ptr + row)
    first = tl.load(start_ptr + row) + tl.program_id(1) * BLOCK_N
    if first >= end:
        return
    offs_d = tl.arange(0, BLOCK_D)
    in_head = offs_d < HEAD_DIM
    offs_t = first + tl.arange(0, BLOCK_N)
    in_span = offs_t < end
    offs_t = offs_t.to(tl.int64)
    # [BLOCK_D]
    query = tl.load(q_ptr + (row * NUM_HEADS + head) * HEAD_DIM + offs_d, mask=in_head, other=0.0).to(tl.float32)
    # [BLOCK_N, BLOCK_D]
    k = tl.load(
        k_ptr + offs_t[:, None] * stride_kt + head * stride_kh + offs_d[None, :],
        mask=in_span[:, None] & in_head[None, :],
        other=0.0,
    ).to(tl.float32)
    # [BLOCK_N]
    scores = tl.sum(k * query[None, :], 1) * scale_log2
    if bias_ptr is not None:
        scores += tl.load(bias_ptr + offs_t * NUM_HEADS + head, mask=in_span, other=0.0) * LOG2_E
    tl.store(score_ptr + offs_t * NUM_HEADS + head, scores, mask=in_span)


@jit(do_not_specialize=["seed", "threshold"], do_not_specialize_on_alignment=_BOUNDS)
def cls_sum_kernel(
    score_ptr,  # (total_tokens, nheads)
    x_ptr,  # (total_tokens, width)
    summed_ptr,  # (num_rows, nheads, width)
    weights_ptr,  # (num_rows, nheads)
    lse_ptr,  # (num_rows, nheads)
    start_ptr,  # (num_rows,)
    end_ptr,  # (num_rows,)
    seed, threshold, factor, stride_xt, NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """BLOCK_W columns of a row's sums; the first program of a row also has its log-sums and its weights' sums."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    start = tl.load(start_ptr + row)
    end = tl.load(end_ptr + row)
    offs_h = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_heads = offs_h < NUM_HEADS
    # [BLOCK_H]
    row_max = tl.full([BLOCK_H], -1e30, dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_H], dtype=tl.float32)
    kept_sum = tl.zeros([BLOCK_H], dtype=tl.float32)
    # [BLOCK_H, BLOCK_W]
    acc = tl.zeros([BLOCK_H, BLOCK_W], dtype=tl.float32)
    for first in range(start, end, BLOCK_N):
        offs_t = first + tl.arange(0, BLOCK_N)
        in_span = offs_t < end
        mask = in_heads[:, None] & in_span[None, :]
        # [BLOCK_H, BLOCK_N]
        offs = offs_t.to(tl.int64)[None, :] * NUM_HEADS + offs_h[:, None]
        scores = tl.load(score_ptr + offs, mask=mask, other=-1e30)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.where(in_span[None, :], tl.exp2(scores - new_max[:, None]), 0.0)
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        row_max = new_max
        if HAS_DROPOUT:
            counters = (row.to(tl.int32) * NUM_HEADS + offs_h)[:, None]
            kept = kept_numbers(seed, threshold, counters, (offs_t - start)[None, :])
            weights = tl.where(kept, weights, 0.0)
        kept_sum = kept_sum * rescale + tl.sum(weights, 1)
        x = _load_tokens(x_ptr, offs_t, in_span, chunk, stride_xt, WIDTH, BLOCK_W)
        acc = tl.dot(weights, x, acc * rescale[:, None], input_precision=PRECISION)
    divisor = tl.where(row_sum > 0.0, row_sum, 1.0)
    share = factor / divisor
    offs_w = chunk * BLOCK_W + tl.arange(0, BLOCK_W)
    tl.store(
        summed_ptr + row * NUM_HEADS * WIDTH + offs_h[:, None] * WIDTH + offs_w[None, :],
        acc * share[:, None],
        mask=in_heads[:, None] & (offs_w < WIDTH)[None, :],
    )
    if chunk == 0:
        tl.store(weights_ptr + row * NUM_HEADS + offs_h, kept_sum * share, mask=in_heads)
        tl.store(lse_ptr + row * NUM_HEADS + offs_h, row_max + tl.log2(divisor), mask=in_heads)


@jit(do_not_specialize_on_alignment=_BOUNDS)
def cls_flow_kernel(
    grad_ptr,  # (num_rows, nheads, width)
    grad_weights_ptr,  # (num_rows, nheads), or None
    q_ptr,  # (num_rows, nheads, width), or None where there are scores
    x_ptr,  # (total_tokens, width)
    bias_ptr,  # (total_tokens, nheads), or None where there is none or where there are scores
    score_ptr,  # (total_tokens, nheads), by keys, or None
    lse_ptr,  # (num_rows, nheads)
    probability_ptr,  # (total_tokens, nheads)
    flow_ptr,  # (total_tokens, nheads)
    start_ptr,  # (num_rows,)
    end_ptr,  # (num_rows,)
    scale_log2, stride_xt, NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    """Probabilities of a tile of a row's tokens, and the gradients of what dropout makes of them."""
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(end_ptr + row)
    first = tl.load(start_ptr + row) + tl.program_id(1) * BLOCK_N
    if first >= end:
        return
    offs_t = first + tl.arange(0, BLOCK_N)
    offs_h = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_span = offs_t < end
    in_heads = offs_h < NUM_HEADS
    row_start = row * NUM_HEADS * WIDTH
    # [BLOCK_H, BLOCK_N]
    flow, scores = _products(
        grad_ptr + row_start, None if q_ptr is None else q_ptr + row_start, x_ptr, offs_h, offs_t, in_span, stride_xt,
        NUM_HEADS, WIDTH, BLOCK_H, BLOCK_N, BLOCK_W, PRECISION,
    )  # fmt: skip
    offs = offs_t.to(tl.int64)[None, :] * NUM_HEADS + offs_h[:, None]
    mask = in_heads[:, None] & in_span[None, :]
    if score_ptr is not None:
        scores = tl.load(score_ptr + offs, mask=mask, other=0.0)
    else:
        scores *= scale_log2
        if bias_ptr is not None:
            scores += tl.load(bias_ptr + offs, mask=mask, other=0.0) * LOG2_E
    # [BLOCK_H]
    lse = tl.load(lse_ptr + row * NUM_HEADS + offs_h, mask=in_heads, other=0.0)
    if grad_weights_ptr is not None:
        flow += tl.load(grad_weights_ptr + row * NUM_HEADS + offs_h, mask=in_heads, other=0.0)[:, None]
    tl.store(probability_ptr + offs, tl.exp2(scores - lse[:, None]), mask=mask)
    tl.store(flow_ptr + offs, flow, mask=mask)


@jit()
def _load_step(
    probability_ptr, flow_ptr, row, start, end, first, offs_h, seed, threshold, factor,
    NUM_HEADS: tl.constexpr, BLOCK_N: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """Of a tile of tokens probabilities, these behind dropout, and their gradients; offsets and a mask of the tile."""
    offs_t = first + tl.arange(0, BLOCK_N)
    # [BLOCK_H, BLOCK_N]
    offs = offs_t.to(tl.int64)[None, :] * NUM_HEADS + offs_h[:, None]
    mask = (offs_h < NUM_HEADS)[:, None] & (offs_t < end)[None, :]
    probabilities = tl.load(probability_ptr + offs, mask=mask, other=0.0)
    flow = tl.load(flow_ptr + offs, mask=mask, other=0.0)
    dropped = probabilities
    if HAS_DROPOUT:
        counters = (row.to(tl.int32) * NUM_HEADS + offs_h)[:, None]
        kept = kept_numbers(seed, threshold, counters, (offs_t - start)[None, :])
        dropped = tl.where(kept, probabilities * factor, 0.0)
        flow = tl.where(kept, flow * factor, 0.0)
    return probabilities, dropped, flow, offs, mask


@jit(do_not_specialize=["seed", "threshold"], do_not_specialize_on_alignment=_BOUNDS)
def cls_score_gradient_kernel(
    probability_ptr,  # (total_tokens, nheads)
    flow_ptr,  # (total_tokens, nheads)
    dropped_ptr,  # (total_tokens, nheads): d
    grad_score_ptr,  # (total_tokens, nheads): f
    start_ptr,  # (num_rows,)
    end_ptr,  # (num_rows,)
    seed, threshold, factor, NUM_HEADS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """A row's probabilities behind dropout, and the gradients of its scores."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(start_ptr + row)
    end = tl.load(end_ptr + row)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    # [BLOCK_H, BLOCK_N] each
    total = tl.zeros([BLOCK_H, BLOCK_N], dtype=tl.float32)
    flows = tl.zeros([BLOCK_H, BLOCK_N], dtype=tl.float32)
    for first in range(start, end, BLOCK_N):
        probabilities, _, flow, _, _ = _load_step(
            probability_ptr, flow_ptr, row, start, end, first, offs_h, seed, threshold, factor, NUM_HEADS, BLOCK_N,
            HAS_DROPOUT,
        )  # fmt: skip
        total += probabilities
        flows += probabilities * flow
    # [BLOCK_H]
    divisor = tl.sum(total, 1)
    # Near 1: what rounding the log-sums took from the probabilities. 0 where all of a row's bias is -inf.
    divisor = tl.where(divisor > 0.0, divisor, 1.0)
    delta = tl.sum(flows, 1) / divisor
    for first in range(start, end, BLOCK_N):
        probabilities, dropped, flow, offs, mask = _load_step(
            probability_ptr, flow_ptr, row, start, end, first, offs_h, seed, threshold, factor, NUM_HEADS, BLOCK_N,
            HAS_DROPOUT,
        )  # fmt: skip
        tl.store(dropped_ptr + offs, dropped / divisor[:, None], mask=mask)
        tl.store(grad_score_ptr + offs, probabilities * (flow - delta[:, None]) / divisor[:, None], mask=mask)


@jit(do_not_specialize=["num_rows", "total_tokens"], do_not_specialize_on_alignment=_BOUNDS)
def cls_hidden_gradient_kernel(
    dropped_ptr,  # (total_tokens, nheads)
    grad_score_ptr,  # (total_tokens, nheads)
    grad_ptr,  # (num_rows, nheads, width)
    q_ptr,  # (num_rows, nheads, width), or None with keys
    x_ptr,  # (total_tokens, width)
    grad_x_ptr,  # (total_tokens, width)
    grad_q_ptr,  # (num_rows, nheads, width), or None with keys
    start_ptr,  # (num_rows,)
    end_ptr,  # (num_rows,)
    num_rows, total_tokens, scale, stride_xt, NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, HEAD_GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_W columns of the gradients of a row's tokens and of its query.

    The tokens after a row's span, up to the next row's, are read by none: zero.
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    start = tl.load(start_ptr + row)
    end = tl.load(end_ptr + row)
    is_last = row == num_rows - 1
    stop = tl.where(is_last, total_tokens, tl.load(start_ptr + tl.where(is_last, row, row + 1)))
    row_start = row * NUM_HEADS * WIDTH
    offs_w = chunk * BLOCK_W + tl.arange(0, BLOCK_W)
    in_width = offs_w < WIDTH
    # [BLOCK_H, BLOCK_W] each
    grads, queries, accs = [], [], []
    for group in tl.static_range(HEAD_GROUPS):
        offs_h = group * BLOCK_H + tl.arange(0, BLOCK_H)
        grads += [_load_row(grad_ptr + row_start, offs_h, chunk, NUM_HEADS, WIDTH, BLOCK_W)]
        if q_ptr is not None:
            queries += [_load_row(q_ptr + row_start, offs_h, chunk, NUM_HEADS, WIDTH, BLOCK_W) * scale]
            accs += [tl.zeros([BLOCK_H, BLOCK_W], dtype=tl.float32)]
    for first in range(start, stop, BLOCK_N):
        offs_t = first + tl.arange(0, BLOCK_N)
        in_span = offs_t < end
        # [BLOCK_N, BLOCK_W]
        grad_x = tl.zeros([BLOCK_N, BLOCK_W], dtype=tl.float32)
        if q_ptr is not None:
            x = _load_tokens(x_ptr, offs_t, in_span, chunk, stride_xt, WIDTH, BLOCK_W)
        updated = []
        for group in tl.static_range(HEAD_GROUPS):
            offs_h = group * BLOCK_H + tl.arange(0, BLOCK_H)
            # [BLOCK_H, BLOCK_N]
            offs = offs_t.to(tl.int64)[None, :] * NUM_HEADS + offs_h[:, None]
            mask = (offs_h < NUM_HEADS)[:, None] & in_span[None, :]
            dropped = tl.load(dropped_ptr + offs, mask=mask, other=0.0)
            grad_x = tl.dot(tl.trans(dropped), grads[group], grad_x, input_precision=PRECISION)
            if q_ptr is not None:
                grad_score = tl.load(grad_score_ptr + offs, mask=mask, other=0.0)
                grad_x = tl.dot(tl.trans(grad_score), queries[group], grad_x, input_precision=PRECISION)
                updated += [tl.dot(grad_score, x, accs[group], input_precision=PRECISION)]
        accs = updated
        # Zero times a NaN of this row is NaN.
        grad_x = tl.where(in_span[:, None], grad_x, 0.0)
        tl.store(
            grad_x_ptr + offs_t.to(tl.int64)[:, None] * WIDTH + offs_w[None, :],
            grad_x.to(grad_x_ptr.dtype.element_ty),
            mask=(offs_t < stop)[:, None] & in_width[None, :],
        )
    if q_ptr is not None:
        for group in tl.static_range(HEAD_GROUPS):
            offs_h = group * BLOCK_H + tl.arange(0, BLOCK_H)
            tl.store(
                grad_q_ptr + row_start + offs_h[:, None] * WIDTH + offs_w[None, :],
                (accs[group] * scale).to(grad_q_ptr.dtype.element_ty),
                mask=(offs_h < NUM_HEADS)[:, None] & in_width[None, :],
            )


@jit(do_not_specialize=["num_rows", "total_tokens"], do_not_specialize_on_alignment=_BOUNDS)
def cls_key_gradient_kernel(
    grad_score_ptr,  # (total_tokens, nheads)
    q_ptr,  # (num_rows, nheads, headdim)
    k_ptr,  # (total_tokens, nheads, headdim)
    grad_q_ptr,  # (num_rows, nheads, headdim)
    grad_k_ptr,  # (total_tokens, nheads, headdim)
    start_ptr,  # (num_rows,)
    end_ptr,  # (num_rows,)
    num_rows, total_tokens, scale, stride_kt, stride_kh, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of a row's keys and of its query in one head; zero for tokens between its span and the next."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    start = tl.load(start_ptr + row)
    end = tl.load(end_ptr + row)
    is_last = row == num_rows - 1
    stop = tl.where(is_last, total_tokens, tl.load(start_ptr + tl.where(is_last, row, row + 1)))
    offs_d = tl.arange(0, BLOCK_D)
    in_head = offs_d < HEAD_DIM
    offs_q = (row * NUM_HEADS + head) * HEAD_DIM + offs_d
    # [BLOCK_D]
    query = tl.load(q_ptr + offs_q, mask=in_head, other=0.0).to(tl.float32) * scale
    # [BLOCK_N, BLOCK_D]
    acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for first in range(start, stop, BLOCK_N):
        offs_t = first + tl.arange(0, BLOCK_N)
        in_span = offs_t < end
        is_written = offs_t < stop
        offs_t = offs_t.to(tl.int64)
        # [BLOCK_N]
        grad_score = tl.load(grad_score_ptr + offs_t * NUM_HEADS + head, mask=in_span, other=0.0)
        k = tl.load(
            k_ptr + offs_t[:, None] * stride_kt + head * stride_kh + offs_d[None, :],
            mask=in_span[:, None] & in_head[None, :],
            other=0.0,
        ).to(tl.float32)
        acc += grad_score[:, None] * k
        # Zero times a NaN of this row is NaN.
        grad_k = tl.where(in_span[:, None], grad_score[:, None] * query[None, :], 0.0)
        tl.store(
            grad_k_ptr + (offs_t[:, None] * NUM_HEADS + head) * HEAD_DIM + offs_d[None, :],
            grad_k.to(grad_k_ptr.dtype.element_ty),
            mask=is_written[:, None] & in_head[None, :],
        )
    grad_q = tl.sum(acc, 0) * scale
    tl.store(grad_q_ptr + offs_q, grad_q.to(grad_q_ptr.dtype.element_ty), mask=in_head)
