"""The public operations in the form in which they are differentiated, made of those that can be trained.

Each takes the arguments of the unchecked operation, and gives its results. What an operation fuses for one pass over
memory is several steps here, each of which keeps what its own gradient needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..absorb_query import absorb_query_unchecked
from ..attention import attention_padded_unchecked, attention_varlen_unchecked
from ..attention.kernel import NO_WINDOW
from ..cls_attention import RowBounds, cls_attention_kv_unchecked, cls_attention_unchecked
from ..cls_output import cls_output_unchecked
from ..disentangled_attention import disentangled_attention_unchecked
from ..disentangled_attention.buckets import DistanceTables
from ..embedding import embedding_layer_norm_unchecked
from ..gated_activation import gated_activation_unchecked
from ..layer_norm import AddNorm, add_layer_norm_unchecked, layer_norm_unchecked
from ..layout import PackedLayout
from ..linear import (
    linear_activation_unchecked,
    linear_add_layer_norm_unchecked,
    linear_per_head_unchecked,
    linear_unchecked,
)
from ..linear.cpu import product_per_head
from ..mean_pool import mean_pool_unchecked
from ..pooler_classifier import pooler_classifier_unchecked
from ..rotary import apply_rotary_unchecked_
from ..runtime.activations import Activation
from ..runtime.gradients import differentiable_form_of
from .attention import Heads, Scoring, Turning, attention, turned_
from .cls_attention import cls_attention
from .disentangled_attention import disentangled_attention
from .embedding import embedded
from .norms import add_norm
from .pooling import mean_pool
from .products import activation as activated
from .products import linear


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@differentiable_form_of(linear_unchecked)
def _linear(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(hidden_states.contiguous(), weight, bias)


@differentiable_form_of(linear_activation_unchecked)
def _linear_activation(hidden_states: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    return activated(_linear(hidden_states, weight, bias), activation)


@differentiable_form_of(linear_add_layer_norm_unchecked)
def _linear_add_layer_norm(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    *,
    keep_sum: bool = False,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    rows = _linear(hidden_states, weight, bias)
    normed, summed = add_norm(rows, residual.contiguous(), norm_weight, norm_bias, eps, rms=rms)
    return normed, summed if keep_sum else normed


@differentiable_form_of(linear_per_head_unchecked)
def _linear_per_head(rows: Tensor, weight: Tensor) -> Tensor:
    return product_per_head(rows, weight).contiguous()


@differentiable_form_of(gated_activation_unchecked)
def _gated_activation(hidden_states: Tensor, activation: Activation) -> Tensor:
    return activated(hidden_states.contiguous(), activation, gated=True)


@differentiable_form_of(layer_norm_unchecked)
def _layer_norm(
    hidden_states: Tensor, weight: Tensor, norm_bias: Tensor | None, eps: float, *, rms: bool = False
) -> Tensor:
    return add_norm(hidden_states.contiguous(), None, weight, norm_bias, eps, rms=rms)[0]


@differentiable_form_of(add_layer_norm_unchecked)
def _add_layer_norm(
    hidden_states: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    rows: Tensor | None = None,
    *,
    keep_sum: bool = False,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    if rows is not None:
        hidden_states, residual = hidden_states[rows], residual[rows]
    if bias is not None:
        hidden_states = hidden_states + bias
    normed, summed = add_norm(hidden_states.contiguous(), residual.contiguous(), weight, norm_bias, eps, rms=rms)
    return normed, summed if keep_sum else normed


@differentiable_form_of(embedding_layer_norm_unchecked)
def _embedding_layer_norm(
    token_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word_table: Tensor,
    position_table: Tensor | None,
    token_type_table: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
) -> Tensor:
    summed = embedded(word_table, token_ids)
    if token_type_table is not None:
        types = token_type_table[0] if token_type_ids is None else embedded(token_type_table, token_type_ids)
        summed = summed + types
    if position_ids is not None and position_table is not None:
        summed = summed + embedded(position_table, position_ids)
    return summed if weight is None else add_norm(summed, None, weight, norm_bias, eps, rms=rms)[0]


differentiable_form_of(mean_pool_unchecked)(mean_pool)


@differentiable_form_of(apply_rotary_unchecked_)
def _apply_rotary_(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    return turned_(x, Turning(positions, cos, sin, interleaved))


@differentiable_form_of(attention_varlen_unchecked)
def _attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    scale: float,
    window_size: tuple[int, int] = NO_WINDOW,
    bias: Tensor | None = None,
) -> Tensor:
    bias = None if bias is None else bias.to(_wide(bias))
    out = attention(_joined(q, k, v), bias, _heads(q, k), layout, Scoring(scale, window_size))
    return out.view(q.shape)


@differentiable_form_of(attention_padded_unchecked)
def _attention_padded(q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor, scale: float) -> Tensor:
    seqlen = q.shape[1]
    seqlens = seqlens.clamp(0, seqlen)
    real = torch.arange(seqlen, device=q.device)[None, :] < seqlens[:, None]
    cu_seqlens = torch.nn.functional.pad(seqlens.cumsum(0), (1, 0)).to(torch.int32)
    # Waits for the device: how many rows are real, nothing but their values says.
    queries, keys, values = (tensor[real] for tensor in (q, k, v))
    layout = PackedLayout(cu_seqlens, seqlen, queries.shape[0])
    out = _attention_varlen(queries, keys, values, layout, scale)
    return q.new_zeros(q.shape).masked_scatter(real[:, :, None, None], out)


@differentiable_form_of(disentangled_attention_unchecked)
def _disentangled_attention(
    q: Tensor, k: Tensor, v: Tensor, tables: DistanceTables, layout: PackedLayout, scale: float
) -> Tensor:
    keys, queries = (None if table is None else table.contiguous() for table in (tables.keys, tables.queries))
    tables = DistanceTables(keys, queries, tables.buckets)
    return disentangled_attention(_joined(q, k, v), tables, _heads(q, k), layout, Scoring(scale)).view(q.shape)


def _joined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(total_tokens, all heads * headdim): one piece of memory, as the gradient is."""
    return torch.cat((q, k, v), 1).flatten(1)


def _heads(q: Tensor, k: Tensor) -> Heads:
    return Heads(q.shape[1], k.shape[1], q.shape[2])


@differentiable_form_of(absorb_query_unchecked)
def _absorb_query(
    hidden_states: Tensor,
    rows: Tensor | None,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    num_heads: int,
) -> Tensor:
    wide = _wide(hidden_states)
    x = hidden_states if rows is None else hidden_states[rows]
    query = _linear(x.to(wide), query_weight.to(wide), query_bias.to(wide))
    heads = (num_heads, query_weight.shape[0] // num_heads)
    return _linear_per_head(query.unflatten(1, heads), key_weight.to(wide).unflatten(0, heads))


@differentiable_form_of(cls_attention_unchecked)
def _cls_attention(
    query: Tensor,
    hidden_states: Tensor,
    layout: PackedLayout,
    scale: float,
    *,
    num_splits: int | None = None,
    norm: AddNorm | None = None,
    keys: Tensor | None = None,
    bias: Tensor | None = None,
    row_bounds: RowBounds | None = None,
) -> Tensor:
    del num_splits  # The form chooses for itself.
    if norm is not None:
        hidden_states = _add_layer_norm(hidden_states, *norm)[0]
    if keys is not None:
        keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)
    if row_bounds is not None:
        tokens, layout = _tokens_of(*row_bounds)
        hidden_states = hidden_states[tokens]
        keys = None if keys is None else keys[tokens]
        bias = None if bias is None else bias[tokens]
    summed, _ = cls_attention(
        query.to(_wide(query)).contiguous(), hidden_states.contiguous(), layout, Scoring(scale),
        keys=None if keys is None else keys.contiguous(), bias=bias,
    )  # fmt: skip
    return summed.to(query.dtype)


def _tokens_of(starts: Tensor, ends: Tensor) -> tuple[Tensor, PackedLayout]:
    """The rows of each range, one range after the other, and where each lies then. Waits for the device."""
    lengths = (ends - starts).long()
    last = lengths.cumsum(0)
    total, longest = (int(last[-1]), int(lengths.max())) if lengths.numel() else (0, 0)
    # What to add to a row's new place for its old one.
    moved = (starts - (last - lengths)).repeat_interleave(lengths, output_size=total)
    cu_seqlens = torch.nn.functional.pad(last, (1, 0)).to(torch.int32)
    return torch.arange(total, device=starts.device) + moved, PackedLayout(cu_seqlens, longest, total)


@differentiable_form_of(cls_attention_kv_unchecked)
def _cls_attention_kv(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    scale: float,
    *,
    num_splits: int | None = None,
    bias: Tensor | None = None,
    row_bounds: RowBounds | None = None,
) -> Tensor:
    """By PyTorch's own operators, over ranges padded to the longest: no layer that is trained takes this operation."""
    del num_splits  # There are no splits.
    starts, ends = row_bounds or (layout.cu_seqlens[:-1], layout.cu_seqlens[1:])
    longest = int((ends - starts).max()) if starts.numel() else 0
    if not longest:
        # Zeros that have a gradient, of zero.
        return query.masked_fill(query.new_ones((), dtype=torch.bool), 0.0)
    places = starts.long()[:, None] + torch.arange(longest, device=query.device)
    there = places < ends[:, None]
    places = places.clamp(max=k.shape[0] - 1)
    wide, shared = _wide(query), query.shape[1] // k.shape[1]
    # [num_rows, nheads, longest, headdim]
    keys, values = (each[places].repeat_interleave(shared, 2).transpose(1, 2).to(wide) for each in (k, v))
    scores = (query.to(wide)[:, :, None] @ keys.transpose(2, 3)).squeeze(2) * scale
    if bias is not None:
        scores = scores + bias[places].transpose(1, 2)
    # A range without rows attends everywhere, so that its softmax is finite, and is left out behind it.
    hidden = ~there & there.any(1, keepdim=True)
    probabilities = torch.softmax(scores.masked_fill(hidden[:, None], -torch.inf), 2) * there[:, None]
    return (probabilities[:, :, None] @ values).squeeze(2).to(query.dtype)


@differentiable_form_of(cls_output_unchecked)
def _cls_output(
    summed: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    hidden_states: Tensor,
    rows: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    *,
    keep_sum: bool = False,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    wide = _wide(hidden_states)
    by_head = value_weight.to(wide).unflatten(0, (summed.shape[1], -1)).transpose(1, 2)
    context = _linear_per_head(summed.to(wide), by_head).flatten(1)
    if value_bias is not None:
        context = context + value_bias.to(wide)
    residual = hidden_states if rows is None else hidden_states[rows]
    return _linear_add_layer_norm(
        *(context.to(hidden_states.dtype), out_weight, out_bias, residual, norm_weight, norm_bias, eps),
        keep_sum=keep_sum,
        rms=rms,
    )


@differentiable_form_of(pooler_classifier_unchecked)
def _pooler_classifier(
    cls_states: Tensor,
    pooler_weight: Tensor,
    pooler_bias: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    activation: Activation = "tanh",
) -> Tensor:
    return _linear(
        _linear_activation(cls_states, pooler_weight, pooler_bias, activation), classifier_weight, classifier_bias
    )
