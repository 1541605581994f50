"""The [CLS] pass that can be trained: the rows that carry the answer attend to hidden rows, which nobody projected.

    p[r, h, :] = softmax(scale query[r, h] · source + bias);    summed[r, h] = Σ_t drop(p)[r, h, t] hidden[t]

``source`` are the hidden rows themselves, which the query was multiplied for, or the keys of head h. The backward pass
reads the hidden rows once more and makes p again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import PackedLayout
from ..runtime.backend import runs_triton
from .attention import Scoring
from .cls_kernel import launch_cls_backward, launch_cls_forward
from .derivatives import first_only
from .groups import Group, groups_of


class _Tokens(NamedTuple):
    """What a group's sequences read, padded: hidden rows, keys and bias, or None."""

    hidden: Tensor  # (num_sequences, length, width)
    keys: Tensor | None  # (num_sequences * nheads, length, headdim)
    bias: Tensor | None  # (num_sequences, nheads, length)


class _ClsAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        hidden: Tensor,
        keys: Tensor | None,
        bias: Tensor | None,
        layout: PackedLayout,
        scoring: Scoring,
    ) -> tuple[Tensor, Tensor]:
        ctx.form = (layout, scoring)
        ctx.set_materialize_grads(False)
        if runs_triton(hidden):
            summed, weights, log_sums = launch_cls_forward(
                query, hidden, layout, scoring.scale, keys=keys, bias=bias, window=scoring.window,
                dropout=scoring.dropout,
            )  # fmt: skip
            ctx.save_for_backward(query, hidden, keys, bias, summed, weights, log_sums)
            return summed, weights
        ctx.save_for_backward(query, hidden, keys, bias)
        num_rows, num_heads = query.shape[:2]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        summed = hidden.new_zeros(num_rows, num_heads, hidden.shape[1], dtype=wide)
        weights = summed.new_zeros(num_rows, num_heads)
        for group, rows in _groups(layout, num_heads):
            tokens = _tokens(group, hidden, keys, bias)
            dropped = _kept(_probabilities(group, tokens, query[rows], scoring, layout), rows, group, scoring)
            summed[rows] = torch.bmm(dropped, tokens.hidden.to(wide))
            weights[rows] = dropped.sum(2)
        return summed, weights

    @staticmethod
    @first_only
    def backward(ctx: Any, grad_summed: Tensor | None, grad_weights: Tensor | None) -> Any:
        query, hidden, keys, bias, *kept = ctx.saved_tensors
        layout, scoring = ctx.form
        if grad_summed is None:
            grad_summed = query.new_zeros(
                *query.shape[:2], hidden.shape[1], dtype=torch.promote_types(hidden.dtype, torch.float32)
            )
        if runs_triton(hidden):
            summed, weights, log_sums = kept
            found = launch_cls_backward(
                *(grad_summed, grad_weights, query, hidden, summed, weights, log_sums, layout, scoring.scale),
                keys=keys, bias=bias, window=scoring.window, dropout=scoring.dropout,
            )  # fmt: skip
            return (*found, None, None)
        wide = grad_summed.dtype
        grad_query, grad_hidden = torch.zeros_like(query), torch.zeros_like(hidden)
        grad_keys = None if keys is None else torch.zeros_like(keys)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for group, rows in _groups(layout, query.shape[1]):
            tokens = _tokens(group, hidden, keys, bias)
            states, grads = tokens.hidden.to(wide), grad_summed[rows]
            probabilities = _probabilities(group, tokens, query[rows], scoring, layout)
            flow = torch.bmm(grads, states.transpose(1, 2))
            if grad_weights is not None:
                flow += grad_weights[rows][..., None]
            weights = _kept(probabilities, rows, group, scoring)
            flow = _kept(flow, rows, group, scoring)
            flow = torch._softmax_backward_data(flow, probabilities, -1, wide)
            if grad_bias is not None:
                _write(group, flow.transpose(1, 2), grad_bias)
            flow *= scoring.scale
            # [num_sequences, length, width]
            grad_tokens = torch.bmm(weights.transpose(1, 2), grads)
            if keys is None:
                grad_tokens = torch.baddbmm(grad_tokens, flow.transpose(1, 2), query[rows].to(wide))
                grad_query[rows] = torch.bmm(flow, states).to(query.dtype)
            else:
                assert tokens.keys is not None
                assert grad_keys is not None
                by_head, asked = flow.flatten(0, 1)[:, None], query[rows].to(wide).flatten(0, 1)[:, None]
                grad_query[rows] = torch.bmm(by_head, tokens.keys.to(wide)).view(query[rows].shape).to(query.dtype)
                group.scatter(torch.bmm(by_head.transpose(1, 2), asked), grad_keys)
            _write(group, grad_tokens, grad_hidden)
        return grad_query, grad_hidden, grad_keys, grad_bias, None, None


def cls_attention(
    query: Tensor,
    hidden: Tensor,
    layout: PackedLayout,
    scoring: Scoring,
    *,
    keys: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """For each sequence's first row weighted sums of its hidden rows, and the sums of the weights, differentiable.

    Args:
        query: (num_sequences, nheads, width), each head's query times the head's projection of keys; with ``keys``
            (num_sequences, nheads, headdim).
        hidden: (total_tokens, width).
        layout: where each sequence lies.
        scoring: scale, window and dropout. A window is seen from the first row.
        keys: (total_tokens, nheads, headdim), or None where the query absorbed their projection.
        bias: (total_tokens, nheads), added to scores, or None.

    Returns:
        (num_sequences, nheads, width), and (num_sequences, nheads): 1 each without dropout; both in float32 at least,
        and zero where a sequence is empty.
    """
    summed, weights = _ClsAttention.apply(query, hidden, keys, bias, layout, scoring)
    return summed, weights


def _groups(layout: PackedLayout, num_heads: int) -> list[tuple[Group, Tensor]]:
    """Groups, and which sequences are in each: empty ones are in none."""
    there = (layout.cu_seqlens.diff() > 0).nonzero().squeeze(1)
    groups = groups_of(layout, num_heads)
    return list(zip(groups, there.split([group.num_sequences for group in groups]), strict=True))


def _tokens(group: Group, hidden: Tensor, keys: Tensor | None, bias: Tensor | None) -> _Tokens:
    return _Tokens(
        group.gather(hidden[:, None]),
        None if keys is None else group.gather(keys),
        None if bias is None else group.gather(bias[..., None]).view(group.num_sequences, -1, group.length),
    )


def _probabilities(group: Group, tokens: _Tokens, query: Tensor, scoring: Scoring, layout: PackedLayout) -> Tensor:
    """(num_sequences, nheads, length), in float32 at least."""
    wide = torch.promote_types(tokens.hidden.dtype, torch.float32)
    query = query.to(wide)
    if tokens.keys is None:
        scores = torch.bmm(query, tokens.hidden.to(wide).transpose(1, 2))
    else:
        by_head = torch.bmm(query.flatten(0, 1)[:, None], tokens.keys.to(wide).transpose(1, 2))
        scores = by_head.view(*query.shape[:2], -1)
    scores *= scoring.scale
    if tokens.bias is not None:
        scores += tokens.bias
    terms = group.terms_of_first(scoring.window, layout)
    return torch.softmax(scores if terms is None else scores + terms, -1)


def _kept(values: Tensor, sequences: Tensor, group: Group, scoring: Scoring) -> Tensor:
    """Values of (num_sequences, nheads, length) behind dropout."""
    dropout = scoring.dropout
    if dropout is None:
        return values
    heads = torch.arange(values.shape[1], dtype=torch.int32, device=values.device)
    rows = sequences.int()[:, None] * values.shape[1] + heads
    columns = torch.arange(group.length, dtype=torch.int32, device=values.device)
    return values * dropout.kept(rows[..., None], columns).to(values.dtype).mul_(dropout.factor)


def _write(group: Group, batch: Tensor, out: Tensor) -> None:
    """(num_sequences, length, width) to packed rows."""
    group.scatter(batch.to(out.dtype), out[:, None])
