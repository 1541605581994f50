"""Every operation in the plainest PyTorch: the definition that the kernels and the CPU path are held to.

Run in float64 these functions are the truth; run in the tensors' own dtype they are the eager computation
whose error bounds everybody else's. They are written to be read, not to be fast.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from .runtime.activations import Activation


def _of_each_head(keys: Tensor, num_heads: int) -> Tensor:
    """Keys or values, (total_tokens, nheads_k, headdim), once for each query head that reads them."""
    return keys.repeat_interleave(num_heads // keys.shape[1], dim=1)


def attention_varlen_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    bias: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale + bias) v over the window of each row in its sequence. See `attention_varlen`.

    Rows after the last sequence are zero.
    """
    k, v = (_of_each_head(tensor, q.shape[1]) for tensor in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        queries, keys, values = (tensor[start:end].transpose(0, 1) for tensor in (q, k, v))
        scores = queries @ keys.transpose(1, 2) * scale
        position = torch.arange(end - start, device=q.device) if positions is None else positions[start:end].long()
        offset = position[None, :] - position[:, None]
        if bias is not None:
            reach = bias.shape[1] // 2
            scores += bias[:, offset.clamp(-reach, reach) + reach]
        left, right = window_size
        if left >= 0:
            scores = scores.masked_fill(offset < -left, -float("inf"))
        if right >= 0:
            scores = scores.masked_fill(offset > right, -float("inf"))
        out[start:end] = (torch.softmax(scores, dim=-1) @ values).transpose(0, 1)
    return out


def attention_padded_reference(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor, softmax_scale: float | None = None
) -> Tensor:
    """softmax(q kᵀ · scale) v inside each row's first ``seqlens`` tokens, zero after. See `attention_padded`."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for row, length in enumerate(seqlens.tolist()):
        queries, keys, values = (tensor[row, :length].transpose(0, 1) for tensor in (q, k, v))
        weights = torch.softmax(queries @ keys.transpose(1, 2) * scale, dim=-1)
        out[row, :length] = (weights @ values).transpose(0, 1)
    return out


def disentangled_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    buckets: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    softmax_scale: float,
) -> Tensor:
    """softmax((q kᵀ + q pos_keyᵀ + k pos_queryᵀ) · scale) v inside each sequence. See `disentangled_attention`.

    ``buckets`` is the table of `Buckets`; ``positions``, (total_tokens,), has one for each row.
    """
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    reach = buckets.shape[0] // 2
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        queries, keys, values = (tensor[start:end].transpose(0, 1) for tensor in (q, k, v))
        place = positions[start:end].long()
        # [length, length]
        rows = buckets[(place[:, None] - place[None, :]).clamp(-reach, reach) + reach].long()
        scores = queries @ keys.transpose(1, 2)
        if pos_key is not None:
            by_row = queries @ pos_key.permute(1, 2, 0)
            scores = scores + by_row.gather(2, rows.expand_as(scores))
        if pos_query is not None:
            by_row = keys @ pos_query.permute(1, 2, 0)
            scores = scores + by_row.gather(2, rows.T.expand_as(scores)).transpose(1, 2)
        weights = torch.softmax(scores * softmax_scale, dim=-1)
        out[start:end] = (weights @ values).transpose(0, 1)
    return out


def cls_attention_reference(
    query: Tensor,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    *,
    keys: Tensor | None = None,
    bias: Tensor | None = None,
    row_bounds: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Σ_j softmax_j(query · (x_j or key_j) · scale + bias_j) x_j for each row and head. See `cls_attention`."""
    out = query.new_zeros(*query.shape[:2], hidden_states.shape[1])
    starts, ends = (cu_seqlens[:-1], cu_seqlens[1:]) if row_bounds is None else row_bounds
    for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        tokens = hidden_states[start:end].to(query.dtype)
        if keys is None:
            scores = query[row] @ tokens.T * softmax_scale
        else:
            heads = _of_each_head(keys[start:end], query.shape[1]).to(query.dtype).transpose(0, 1)
            scores = (query[row, :, None] @ heads.transpose(1, 2))[:, 0] * softmax_scale
        if bias is not None:
            scores = scores + bias[start:end].T.to(query.dtype)
        out[row] = torch.softmax(scores, dim=-1) @ tokens
    return out


def absorb_query_reference(
    hidden_states: Tensor, rows: Tensor, query_weight: Tensor, query_bias: Tensor, key_weight: Tensor, num_heads: int
) -> Tensor:
    """W_kᵀ (W_q x + b_q) of each row and head. See `absorb_query`."""
    query = F.linear(hidden_states[rows], query_weight, query_bias).unflatten(1, (num_heads, -1))
    return (query.transpose(0, 1) @ key_weight.unflatten(0, (num_heads, -1))).transpose(0, 1)


def cls_output_reference(
    summed: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    hidden_states: Tensor,
    rows: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
) -> Tensor:
    """Norm(W_o (W_v s + b_v) + b_o + residual) with heads joined after W_v. See `cls_output`."""
    attended = cls_output_sum_reference(summed, value_weight, value_bias, out_weight, out_bias, hidden_states, rows)
    return layer_norm_reference(attended, norm_weight, norm_bias, eps, rms=rms)


def cls_output_sum_reference(
    summed: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    hidden_states: Tensor,
    rows: Tensor,
) -> Tensor:
    """W_o (W_v s + b_v) + b_o + residual: the sum that `cls_output` also returns with ``keep_sum``."""
    heads = value_weight.unflatten(0, (summed.shape[1], -1)).transpose(1, 2)
    context = (summed.transpose(0, 1) @ heads).transpose(0, 1).flatten(1)
    if value_bias is not None:
        context = context + value_bias
    return F.linear(context, out_weight, out_bias) + hidden_states[rows]


def pooler_classifier_reference(
    cls_states: Tensor,
    pooler_weight: Tensor,
    pooler_bias: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    activation: Activation = "tanh",
) -> Tensor:
    """W_c f(W_p x + b_p) + b_c. See `pooler_classifier`."""
    pooled = linear_activation_reference(cls_states, pooler_weight, pooler_bias, activation)
    return F.linear(pooled, classifier_weight, classifier_bias)


def cls_attention_kv_reference(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float | None = None,
    *,
    bias: Tensor | None = None,
    row_bounds: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """softmax(query kᵀ · scale + bias) v for each query row and head. See `cls_attention_kv`."""
    k, v = (_of_each_head(tensor, query.shape[1]) for tensor in (k, v))
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    starts, ends = (cu_seqlens[:-1], cu_seqlens[1:]) if row_bounds is None else row_bounds
    for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        keys, values = k[start:end].transpose(0, 1), v[start:end].transpose(0, 1)
        scores = query[row, :, None] @ keys.transpose(1, 2) * scale
        if bias is not None:
            scores = scores + bias[start:end].T[:, None].to(query.dtype)
        out[row] = (torch.softmax(scores, dim=-1) @ values)[:, 0]
    return out


def layer_norm_reference(
    hidden_states: Tensor, weight: Tensor, norm_bias: Tensor | None, eps: float, *, rms: bool = False
) -> Tensor:
    """LayerNorm(hidden_states), or hidden_states / sqrt(mean(hidden_states²) + eps) · weight + norm_bias.

    See `layer_norm`.
    """
    if not rms:
        return F.layer_norm(hidden_states, (weight.shape[0],), weight, norm_bias, eps)
    normed = F.rms_norm(hidden_states, (weight.shape[0],), weight, eps)
    return normed if norm_bias is None else normed + norm_bias


def add_reference(hidden_states: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """hidden_states + bias + residual: the sum that `add_layer_norm` also returns with ``keep_sum``."""
    return (hidden_states if bias is None else hidden_states + bias) + residual


def add_layer_norm_reference(
    hidden_states: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
) -> Tensor:
    """Norm(hidden_states + bias + residual). See `add_layer_norm`."""
    return layer_norm_reference(add_reference(hidden_states, bias, residual), weight, norm_bias, eps, rms=rms)


def embedding_layer_norm_reference(
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
    """Norm(word[id] + type[type_id] + position[position_id]), or the sum. See `embedding_layer_norm`."""
    summed = F.embedding(token_ids, word_table)
    if token_type_table is not None:
        types = torch.zeros_like(token_ids) if token_type_ids is None else token_type_ids
        summed = summed + F.embedding(types, token_type_table)
    if position_ids is not None and position_table is not None:
        summed = summed + F.embedding(position_ids, position_table)
    return summed if weight is None else layer_norm_reference(summed, weight, norm_bias, eps, rms=rms)


def linear_gelu_reference(hidden_states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(hidden_states weightᵀ + bias), the exact (erf) GELU. See `linear_gelu`."""
    return linear_activation_reference(hidden_states, weight, bias, "gelu")


def linear_activation_reference(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation
) -> Tensor:
    """activation(hidden_states weightᵀ + bias). See `linear_activation`."""
    return activation_reference(F.linear(hidden_states, weight, bias), activation)


def activation_reference(x: Tensor, activation: Activation) -> Tensor:
    """The activation by its name."""
    functions = {"gelu": F.gelu, "relu": torch.relu, "silu": F.silu, "tanh": torch.tanh}
    return F.gelu(x, approximate="tanh") if activation == "gelu_tanh" else functions[activation](x)


def gated_activation_reference(hidden_states: Tensor, activation: Activation = "gelu") -> Tensor:
    """activation(first half of the columns) · second half. See `gated_activation`."""
    x, gate = hidden_states.chunk(2, dim=1)
    return activation_reference(x, activation) * gate


def mean_pool_reference(hidden_states: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """The mean of each sequence's rows, zero where there are none. See `mean_pool`."""
    out = hidden_states.new_zeros(cu_seqlens.shape[0] - 1, hidden_states.shape[1])
    for sequence, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        if end > start:
            out[sequence] = hidden_states[start:end].mean(0)
    return out


def apply_rotary_reference(
    x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> Tensor:
    """(h1 cos - h2 sin, h2 cos + h1 sin) of each head's halves or neighbours, not in place. See `apply_rotary_`."""
    cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return joined.to(x.dtype)
