"""Attention over packed rows that can be trained:

    p = softmax(q kᵀ scale + terms);    out = drop(p) v

Nothing of the size of p is kept: the backward pass makes it again from queries and keys. On a CPU it takes groups of
texts of like lengths, padded within the attention alone: so a batch is few calls, and a group's scores stay in cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention.kernel import NO_WINDOW
from ..layout import PackedLayout
from ..rotary import apply_rotary_unchecked_
from ..runtime.backend import runs_triton
from .attention_kernel import launch_attention_backward, launch_attention_forward
from .derivatives import first_only
from .dropout import Dropout
from .groups import Block, Group, blocks_of, groups_of


class Heads(NamedTuple):
    """How the columns of queries, keys and values lie side by side in one row.

    Attributes:
        queries, keys: how many heads of queries, and of keys and of values each.
        head_dim: columns of a head.
    """

    queries: int
    keys: int
    head_dim: int

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views (num_rows, heads, head_dim) of queries, keys and values."""
        heads = qkv.view(qkv.shape[0], -1, self.head_dim)
        q, k, v = heads.split((self.queries, self.keys, self.keys), 1)
        return q, k, v

    def turned(self, qkv: Tensor) -> Tensor:
        """A view (num_rows, heads, head_dim) of queries and keys, which rotary positions turn."""
        return qkv.view(qkv.shape[0], -1, self.head_dim)[:, : self.queries + self.keys]


class Turning(NamedTuple):
    """Rotary positions: see `apply_rotary_`.

    Attributes:
        positions: (total_tokens,) int32.
        cos, sin: (max_positions, head_dim // 2) float32.
        interleaved: whether pairs are neighbours.
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor
    interleaved: bool

    def turn_(self, heads: Tensor, *, back: bool = False) -> Tensor:
        """Turns (total_tokens, heads, head_dim) in place, or back: the transposed rotation, which gradients take."""
        sin = -self.sin if back else self.sin
        return apply_rotary_unchecked_(heads, self.positions, self.cos, sin, interleaved=self.interleaved)


class Scoring(NamedTuple):
    """What enters scores beside queries and keys.

    Attributes:
        scale: factor on products.
        window: how many positions a token attends to on its left and right, -1 for all.
        dropout: what drops probabilities, or None.
    """

    scale: float
    window: tuple[int, int] = NO_WINDOW
    dropout: Dropout | None = None


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, turning: Turning) -> Tensor:
        ctx.turning = turning
        return turning.turn_(heads.clone(memory_format=torch.contiguous_format))

    @staticmethod
    @first_only
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.turning.turn_(grad.clone(memory_format=torch.contiguous_format), back=True), None


class _TurnInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, turning: Turning) -> Tensor:
        ctx.turning = turning
        ctx.mark_dirty(heads)
        return turning.turn_(heads)

    backward = _Turn.backward


def turned_(heads: Tensor, turning: Turning) -> Tensor:
    """Heads (num_rows, heads, head_dim) turned in place, differentiable."""
    out: Tensor = _TurnInPlace.apply(heads, turning)
    return out


def turned(heads: Tensor, turning: Turning | None) -> Tensor:
    """Heads (num_rows, heads, head_dim) behind rotary positions, differentiable; None leaves them out."""
    if turning is None:
        return heads
    out: Tensor = _Turn.apply(heads, turning)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        bias: Tensor | None,
        heads: Heads,
        layout: PackedLayout,
        scoring: Scoring,
        turning: Turning | None,
    ) -> Tensor:
        ctx.form = (heads, layout, scoring, turning)
        if turning is not None:
            qkv = qkv.clone()
            turning.turn_(heads.turned(qkv))
        q, k, v = heads.split(qkv)
        if runs_triton(qkv):
            out, log_sums = launch_attention_forward(
                q, k, v, layout, scoring.scale, scoring.window, bias, scoring.dropout
            )
            ctx.save_for_backward(qkv, bias, out, log_sums)
            return out.flatten(1)
        ctx.save_for_backward(qkv, bias)
        out = q.new_zeros(q.shape)
        for group in groups_of(layout, heads.queries):
            _forward_group(group, q, k, v, bias, out, scoring, layout)
        return out.flatten(1)

    @staticmethod
    @first_only
    def backward(ctx: Any, grad: Tensor) -> Any:
        qkv, bias, *kept = ctx.saved_tensors
        heads, layout, scoring, turning = ctx.form
        q, k, v = heads.split(qkv)
        grad = grad.contiguous().view(q.shape)
        grads = torch.zeros_like(qkv)
        into = heads.split(grads)
        if runs_triton(qkv):
            out, log_sums = kept
            grad_bias = launch_attention_backward(
                *(grad, q, k, v, out, log_sums, layout, scoring.scale, scoring.window, bias, scoring.dropout),
                into=into,
            )[3]
        else:
            needs_bias = bias is not None and ctx.needs_input_grad[1]
            grad_bias = torch.zeros_like(bias) if needs_bias else None
            for group in groups_of(layout, heads.queries):
                _backward_group(group, grad, (q, k, v), bias, into, grad_bias, scoring, layout)
        if turning is not None:
            turning.turn_(heads.turned(grads), back=True)
        return grads, grad_bias, None, None, None, None


def attention(
    qkv: Tensor,
    bias: Tensor | None,
    heads: Heads,
    layout: PackedLayout,
    scoring: Scoring,
    turning: Turning | None = None,
) -> Tensor:
    """Attention within each packed sequence, differentiable.

    Args:
        qkv: (total_tokens, (queries + 2 * keys) * head_dim), contiguous: all queries, then keys, then values.
        bias: (queries, 2 * reach + 1) by relative position, float32 or wider, or None: see `attention_varlen`.
        heads: how many there are.
        layout: where each sequence lies.
        scoring: scale, window and dropout.
        turning: rotary positions, or None.

    Returns:
        (total_tokens, queries * head_dim), zeros in rows that belong to no sequence.
    """
    out: Tensor = _Attention.apply(qkv, bias, heads, layout, scoring, turning)
    return out


def _forward_group(
    group: Group,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    scoring: Scoring,
    layout: PackedLayout,
) -> None:
    queries, keys, values = group.gather(q), group.gather(k, q.shape[1]), group.gather(v, q.shape[1])
    attended = torch.empty_like(queries)
    for block in blocks_of(group, scoring.window):
        probabilities = _probabilities(group, block, queries, keys, bias, scoring, layout)
        weights = _dropped(probabilities, group, block, scoring.dropout, q.shape[1])
        attended[:, block.rows] = torch.bmm(weights, values[:, block.keys])
    group.scatter(attended, out)


def _backward_group(
    group: Group,
    grad: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    into: tuple[Tensor, Tensor, Tensor],
    grad_bias: Tensor | None,
    scoring: Scoring,
    layout: PackedLayout,
) -> None:
    q, k, v = qkv
    num_heads = q.shape[1]
    queries, keys, values = group.gather(q), group.gather(k, num_heads), group.gather(v, num_heads)
    grad_out = group.gather(grad, empties=True)
    grad_q = torch.empty_like(queries)
    blocks = list(blocks_of(group, scoring.window))
    is_whole = len(blocks) == 1
    wide = torch.promote_types(q.dtype, torch.float32)
    # Blocks are added up in float32 at least, and rounded once.
    grad_k, grad_v = (
        torch.empty_like(each) if is_whole else torch.zeros_like(each, dtype=wide) for each in (keys, values)
    )
    for block in blocks:
        probabilities = _probabilities(group, block, queries, keys, bias, scoring, layout)
        grads = grad_out[:, block.rows]
        flow = torch.bmm(grads, values[:, block.keys].transpose(1, 2))
        weights = probabilities
        if scoring.dropout is not None:
            factors = _factors(group, block, scoring.dropout, num_heads, flow.dtype)
            weights = probabilities * factors
            flow *= factors
        _add(grad_v[:, block.keys], weights.transpose(1, 2), grads, is_whole=is_whole)
        flow = torch._softmax_backward_data(flow, probabilities, -1, flow.dtype)
        if grad_bias is not None:
            _add_bias_gradient(grad_bias, flow, group, block, layout)
        flow *= scoring.scale
        torch.bmm(flow, keys[:, block.keys], out=grad_q[:, block.rows]) if is_whole else grad_q[:, block.rows].copy_(
            torch.bmm(flow, keys[:, block.keys])
        )
        _add(grad_k[:, block.keys], flow.transpose(1, 2), queries[:, block.rows], is_whole=is_whole)
    for gradient, target in zip((grad_q, grad_k, grad_v), into, strict=True):
        group.scatter(gradient, target)


def _add(target: Tensor, left: Tensor, right: Tensor, *, is_whole: bool) -> None:
    """Writes a product, or adds it where other blocks have parts of it."""
    if is_whole:
        torch.bmm(left, right, out=target)
    else:
        target += torch.bmm(left, right)


def _probabilities(
    group: Group,
    block: Block,
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    scoring: Scoring,
    layout: PackedLayout,
) -> Tensor:
    """(num_sequences * nheads, rows, keys), in the dtype of the rows, and computed in float32 at least."""
    left, right = queries[:, block.rows], keys[:, block.keys].transpose(1, 2)
    terms = group.terms(block, bias, scoring.window, layout)
    wide = torch.promote_types(queries.dtype, torch.float32)
    if queries.dtype != wide:
        scores = torch.bmm(left.float(), right.float()).mul_(scoring.scale)
    else:
        # The first argument is not read.
        scores = torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=scoring.scale)
    if terms is not None:
        by_head = scores.view(group.num_sequences, -1, *scores.shape[1:])
        by_head += terms
    return torch.softmax(scores, -1).to(queries.dtype)


def _factors(group: Group, block: Block, dropout: Dropout, num_heads: int, dtype: torch.dtype) -> Tensor:
    """0 for a probability that is dropped and the dropout's factor for others, as scores are shaped."""
    rows = group.first_rows[:, None, None] + torch.arange(
        block.rows.start, block.rows.stop, dtype=torch.int32, device=group.first_rows.device
    )
    heads = torch.arange(num_heads, dtype=torch.int32, device=rows.device)[:, None]
    columns = torch.arange(block.keys.start, block.keys.stop, dtype=torch.int32, device=rows.device)
    kept = dropout.kept((rows * num_heads + heads)[..., None], columns)
    return kept.flatten(0, 1).to(dtype).mul_(dropout.factor)


def _dropped(probabilities: Tensor, group: Group, block: Block, dropout: Dropout | None, num_heads: int) -> Tensor:
    if dropout is None:
        return probabilities
    return probabilities * _factors(group, block, dropout, num_heads, probabilities.dtype)


def _add_bias_gradient(grad_bias: Tensor, flow: Tensor, group: Group, block: Block, layout: PackedLayout) -> None:
    """Sums gradients of scores by the relative position that their bias belongs to."""
    reach = grad_bias.shape[1] // 2
    columns = group.offsets(block, layout).clamp(-reach, reach) + reach
    by_head = flow.view(group.num_sequences, -1, *flow.shape[1:]).to(grad_bias.dtype)
    if columns.shape[0] == 1:
        by_head = by_head.sum(0, keepdim=True)
    for places, flows in zip(columns, by_head, strict=True):
        # A sum of its own for each text: one over all of them would round more.
        grad_bias += torch.zeros_like(grad_bias).index_add_(1, places.flatten(), flows.flatten(1))
