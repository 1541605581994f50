"""Attention over packed rows in plain PyTorch: a run of neighbouring sequences of one length is one batch, a view."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..layout import PackedLayout, Run
from ..runtime.invariance import choices
from .kernel import NO_WINDOW

# Up to this many tokens, batched products in float32 are faster on a CPU than the fused attention, whose bookkeeping
# outweighs the scores that it does not store. In 16 bits they would round the scores.
SHORT = 64
# With fewer keys than a vector has lanes, the fused attention takes a row of NaN scores for one without keys, and gives
# zero. Unless all numbers are known to be finite, such rows are plain products, in float32 where they have 16 bits.
FEW_KEYS = 16
# Queries that a CPU takes at once. In a window few, so that few keys are read in vain; with a bias many, as far as the
# memory that the bias takes allows.
WINDOW_BLOCK = 64
BIAS_BLOCK = 512


class _ScoreTerms:
    """Makes what is added to scores on a CPU: the bias, and -inf outside the window."""

    def __init__(self, layout: PackedLayout, window: tuple[int, int], bias: Tensor | None, like: Tensor) -> None:
        self.layout = layout
        # In 64 bits, which a window's limits may need.
        self.positions = None if layout.positions is None else layout.positions.long()
        self.window = window
        # Float32 at least: the bias may be wider than q.
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.bias = like.new_zeros(1, 1, dtype=dtype) if bias is None else bias.to(dtype)
        self.longest = max((run.length for run in layout.runs), default=1)
        # [1 or nheads, 2 * longest - 1], by offset, for rows whose places are their positions.
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
        """The terms of some rows and keys of a run's sequences: (1 or num_sequences, 1 or nheads, rows, keys)."""
        if self.positions is not None and self.layout.has_gaps(run):
            positions = run.batch(self.positions)
            return self._of(positions[:, None, keys] - positions[:, rows, None]).transpose(0, 1)
        first, last = self.longest + keys.start - rows.stop, self.longest + keys.stop - rows.start - 1
        # The next row's offsets are one less: its terms are the same numbers, moved by one.
        return self.by_offset[:, first:last].unfold(1, keys.stop - keys.start, 1).flip(1).unsqueeze(0)


def row_blocks(length: int, window: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Blocks of a sequence's rows, and the rows that hold all their keys: positions rise at least as fast as rows."""
    left, right = (length if limit < 0 else limit for limit in window)
    size = BIAS_BLOCK if min(window) < 0 else WINDOW_BLOCK
    for start in range(0, length, size):
        end = min(start + size, length)
        yield slice(start, end), slice(max(start - left, 0), min(end + right, length))


def attention_runs(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float, window: tuple[int, int], bias: Tensor | None
) -> Tensor:
    """Attention of q, (total_tokens, nheads, headdim), in that shape.

    k, v: (total_tokens, nheads_k, headdim); bias: (nheads, 2 * reach + 1).
    """
    out = q.new_empty(q.shape)
    if out.numel() == 0:
        return out
    end_token = 0
    terms = None if bias is None and window == NO_WINDOW else _ScoreTerms(layout, window, bias, q)
    unused = q.new_empty(1, 1, 1, dtype=torch.promote_types(q.dtype, torch.float32))
    # One look for all texts; where none may change another's bits, one for each run.
    is_finite = None
    if bias is not None and not is_finite_all(bias):
        is_finite = False
    elif (q.dtype.itemsize < 4 or terms is not None) and choices().joined_texts:
        is_finite = is_finite_all(*_in_one_piece(q, k, v))
    longest_short = SHORT if q.dtype.itemsize >= 4 else 0 if is_finite else FEW_KEYS - 1
    for run in layout.runs:
        if run.length <= longest_short and (terms is None or (bias is None and _all_in_window(run, window, layout))):
            _attend_short(q, k, v, out, run, scale, unused)
            end_token = run.end_token
            continue
        # [num_sequences, nheads or nheads_k, length, headdim]
        queries, keys, values, attended = (run.batch(tensor).transpose(1, 2) for tensor in (q, k, v, out))
        if terms is not None and (bias is not None or not _all_in_window(run, window, layout)):
            for rows, near in row_blocks(run.length, window):
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
    """Writes a run's rows of ``out``, in few calls: there are many runs, and each has little to compute."""
    count, start, length = run.num_sequences, run.start_token, run.length
    end, (_, num_heads, head_dim) = start + count * length, q.shape
    rows = (tensor[start:end].to(unused.dtype) for tensor in (q, k, v))
    # [num_sequences * (nheads or nheads_k), length, headdim]
    if count == 1:
        # A view, where several sequences are copied.
        queries, keys, values = (tensor.transpose(0, 1) for tensor in rows)
    else:
        queries, keys, values = (tensor.unflatten(0, (count, length)).transpose(1, 2).flatten(0, 1) for tensor in rows)
    # One product for the query heads that share keys: [num_sequences * nheads_k, nheads // nheads_k * length, headdim]
    queries = queries.reshape(keys.shape[0], -1, head_dim)
    scores = torch.baddbmm(unused, queries, keys.transpose(1, 2), beta=0, alpha=scale)
    attended = torch.bmm(scores.softmax(-1), values).view(count, num_heads, length, head_dim).transpose(1, 2)
    out[start:end].unflatten(0, (count, length)).copy_(attended)


def attend_batch(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    bias: Tensor | None = None,
    *,
    is_finite: bool | None = None,
) -> Tensor:
    """Attention of (batch, nheads, rows, headdim) on a CPU.

    Args:
        queries: (batch, nheads, rows, headdim).
        keys, values: (batch, nheads_k, keys, headdim), where nheads is a multiple of nheads_k.
        scale: factor on the scores.
        bias: added to the scores, in a shape that broadcasts to theirs, or None.
        is_finite: whether queries, keys and what the bias is made of are. None looks at queries and keys, where that
            matters.
    """
    # Where nothing is NaN, the fused attention may have few keys, too.
    few, dtype = bias is None and keys.shape[2] < FEW_KEYS and not is_finite, queries.dtype
    is_narrow = dtype.itemsize < 4
    if is_finite is None and not few and (is_narrow or bias is not None):
        is_finite = is_finite_all(queries, keys)
    # In 16 bits the fused attention's exponential makes a number of inf - inf.
    if is_narrow and (few or not is_finite):
        queries, keys, values = (tensor.float() for tensor in (queries, keys, values))
    # With a mask the fused attention takes a row whose scores are all -inf for one that is left out.
    if not few and (bias is None or is_finite):
        shares_keys = keys.shape[1] != queries.shape[1]
        return scaled_dot_product_attention(
            queries, keys, values, attn_mask=bias, scale=scale, enable_gqa=shares_keys
        ).to(dtype)
    by_head = queries.shape[:3]
    # [batch, nheads_k, nheads // nheads_k * rows, headdim or keys]
    queries = queries.reshape(*keys.shape[:2], -1, queries.shape[3])
    scores = queries @ keys.transpose(2, 3) * scale
    if bias is not None:
        scores = (scores.view(*by_head, -1) + bias).view(scores.shape)
    return (scores.softmax(-1) @ values).view(*by_head, -1).to(dtype)


def is_finite_all(*tensors: Tensor) -> bool:
    """Whether all numbers are finite. It says no where their sum overflows, too."""
    # A sum in the tensor's own dtype is faster, and bfloat16 overflows no earlier than float32.
    return math.isfinite(
        sum(float(each.sum(dtype=torch.float32 if each.dtype == torch.float16 else None)) for each in tensors)
    )


def _in_one_piece(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Queries and keys; or the one projection that q, k and v are views of, which is read twice as fast."""
    total_tokens, num_heads, head_dim = q.shape
    width, width_k = num_heads * head_dim, k.shape[1] * head_dim
    width_qkv, item_size = width + 2 * width_k, q.element_size()
    steps = (k.data_ptr() - q.data_ptr(), v.data_ptr() - k.data_ptr())
    is_fused = steps == (width * item_size, width_k * item_size)
    if not is_fused or any(each.stride() != (width_qkv, head_dim, 1) for each in (q, k, v)):
        return q, k
    return (q.as_strided((total_tokens, width_qkv), (width_qkv, 1)),)
