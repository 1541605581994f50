"""Every operation in the plainest PyTorch: the definition that the kernels and the CPU path are held to.

Run in float64 these functions are the truth; run in the tensors' own dtype they are the eager computation
whose error bounds everybody else's. They are written to be read, not to be fast.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_varlen_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, softmax_scale: float | None = None
) -> Tensor:
    """softmax(q kᵀ · scale) v inside each sequence; rows after the last sequence are zero. See `attention_varlen`."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        queries, keys, values = (tensor[start:end].transpose(0, 1) for tensor in (q, k, v))
        weights = torch.softmax(queries @ keys.transpose(1, 2) * scale, dim=-1)
        out[start:end] = (weights @ values).transpose(0, 1)
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


def cls_attention_reference(
    query: Tensor, hidden_states: Tensor, cu_seqlens: Tensor, max_seqlen: int, softmax_scale: float
) -> Tensor:
    """Σ_j softmax_j(query · x_j · scale) x_j for each sequence and head. See `cls_attention`."""
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    bounds = cu_seqlens.tolist()
    for sequence, (start, end) in enumerate(itertools.pairwise(bounds)):
        tokens = hidden_states[start:end].to(query.dtype)
        weights = torch.softmax(query[sequence] @ tokens.T * softmax_scale, dim=-1)
        out[sequence] = weights @ tokens
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
    value_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    hidden_states: Tensor,
    rows: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """LayerNorm(W_o (W_v s + b_v) + b_o + residual) with heads joined after W_v. See `cls_output`."""
    heads = value_weight.unflatten(0, (summed.shape[1], -1)).transpose(1, 2)
    context = (summed.transpose(0, 1) @ heads).transpose(0, 1).flatten(1) + value_bias
    attended = F.linear(context, out_weight, out_bias) + hidden_states[rows]
    return F.layer_norm(attended, (attended.shape[1],), norm_weight, norm_bias, eps)


def pooler_classifier_reference(
    cls_states: Tensor, pooler_weight: Tensor, pooler_bias: Tensor, classifier_weight: Tensor, classifier_bias: Tensor
) -> Tensor:
    """W_c tanh(W_p x + b_p) + b_c. See `pooler_classifier`."""
    return F.linear(torch.tanh(F.linear(cls_states, pooler_weight, pooler_bias)), classifier_weight, classifier_bias)


def cls_attention_kv_reference(
    query: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, softmax_scale: float | None = None
) -> Tensor:
    """softmax(query kᵀ · scale) v with one query row a sequence. See `cls_attention_kv`."""
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    bounds = cu_seqlens.tolist()
    for sequence, (start, end) in enumerate(itertools.pairwise(bounds)):
        keys, values = k[start:end].transpose(0, 1), v[start:end].transpose(0, 1)
        weights = torch.softmax(query[sequence, :, None] @ keys.transpose(1, 2) * scale, dim=-1)
        out[sequence] = (weights @ values)[:, 0]
    return out


def add_layer_norm_reference(
    hidden_states: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    """LayerNorm(hidden_states + bias + residual). See `add_layer_norm`."""
    summed = hidden_states if bias is None else hidden_states + bias
    return F.layer_norm(summed + residual, (weight.shape[0],), weight, norm_bias, eps)


def embedding_layer_norm_reference(
    token_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word_table: Tensor,
    position_table: Tensor,
    token_type_table: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """LayerNorm(word[id] + type[type_id] + position[position_id]). See `embedding_layer_norm`."""
    types = torch.zeros_like(token_ids) if token_type_ids is None else token_type_ids
    summed = F.embedding(token_ids, word_table) + F.embedding(types, token_type_table)
    summed = summed + F.embedding(position_ids, position_table)
    return F.layer_norm(summed, (weight.shape[0],), weight, norm_bias, eps)


def linear_gelu_reference(hidden_states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(hidden_states weightᵀ + bias), the exact (erf) GELU. See `linear_gelu`."""
    return F.gelu(F.linear(hidden_states, weight, bias))
