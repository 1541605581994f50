"""The operations as operators of ``torch.library``, under ``torch.ops.fastcls_kernels``, with their fake results.

An operator runs the public function of its name: the same checks, kernels and choices. Its arguments are what a schema
can hold: for ``layout`` the layout's ``positions``, for ``window_size`` two numbers, for ``buckets`` its table and its
rows, for ``norm`` its members. The public functions call them while a graph is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from ._tracing import TRACED
from .attention import NO_WINDOW, attention_padded, attention_varlen
from .cls_attention import cls_attention, cls_attention_kv
from .disentangled_attention import Buckets, disentangled_attention
from .layer_norm import AddNorm
from .layout import PackedLayout


def _operator(fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function under its name without the leading underscore; ``fake`` makes what it gives, unfilled."""

    def register(function: Callable[..., Any]) -> Any:
        name = add_op_namespace_prefix(function.__name__.removeprefix("_"))
        registered = torch.library.custom_op(name, function, mutates_args=mutates)
        registered.register_fake(fake)
        if not mutates:
            registered.register_autograd(_refuse_gradients)
        return registered

    return register


def _refuse_gradients(_context: Any, *_: Any) -> Any:
    raise RuntimeError(
        "fastcls_kernels computes no gradients: detach what goes in, or call it inside torch.no_grad() or "
        "torch.inference_mode()"
    )


def _traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes ``function``, of a public function's name and arguments, what is traced in its place."""
    TRACED[function.__name__.removeprefix("_trace_")] = function
    return function


def _layout(cu_seqlens: Tensor, max_seqlen: int, tokens: Tensor, positions: Tensor | None) -> PackedLayout:
    return PackedLayout(cu_seqlens, max_seqlen, tokens.shape[0], positions)


def _positions(layout: PackedLayout | None) -> Tensor | None:
    return None if layout is None else layout.positions


def _check_together(**tensors: Tensor | None) -> None:
    given = [name for name, tensor in tensors.items() if tensor is not None]
    if given and len(given) < len(tensors):
        raise ValueError(f"{', '.join(tensors)} must all be given or none, got {', '.join(given)}")


def _row_bounds(row_starts: Tensor | None, row_ends: Tensor | None) -> tuple[Tensor, Tensor] | None:
    _check_together(row_starts=row_starts, row_ends=row_ends)
    return None if row_starts is None or row_ends is None else (row_starts, row_ends)


def _contiguous_like(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor.new_empty(tensor.shape)


@_operator(_contiguous_like)
def _attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float | None,
    window_left: int,
    window_right: int,
    bias: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    return attention_varlen(
        *(q, k, v, cu_seqlens, max_seqlen, softmax_scale),
        window_size=(window_left, window_right),
        bias=bias,
        layout=_layout(cu_seqlens, max_seqlen, q, positions),
    )


@_traced
def _trace_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float | None = None,
    *,
    window_size: tuple[int, int] = NO_WINDOW,
    bias: Tensor | None = None,
    layout: PackedLayout | None = None,
) -> Tensor:
    return _attention_varlen(q, k, v, cu_seqlens, max_seqlen, softmax_scale, *window_size, bias, _positions(layout))


@_operator(_contiguous_like)
def _attention_padded(q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor, softmax_scale: float | None = None) -> Tensor:
    return attention_padded(q, k, v, seqlens, softmax_scale)


def _fake_cls_attention(query: Tensor, hidden_states: Tensor, *_: Any) -> Tensor:
    return query.new_empty(*query.shape[:2], hidden_states.shape[1])


@_operator(_fake_cls_attention)
def _cls_attention(
    query: Tensor,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    num_splits: int | None,
    positions: Tensor | None,
    keys: Tensor | None,
    bias: Tensor | None,
    row_starts: Tensor | None,
    row_ends: Tensor | None,
    norm_input_bias: Tensor | None,
    norm_residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
) -> Tensor:
    norm = None
    _check_together(norm_residual=norm_residual, norm_weight=norm_weight, norm_bias=norm_bias)
    if norm_residual is not None and norm_weight is not None and norm_bias is not None:
        norm = AddNorm(norm_input_bias, norm_residual, norm_weight, norm_bias, norm_eps)
    return cls_attention(
        *(query, hidden_states, cu_seqlens, max_seqlen, softmax_scale),
        num_splits=num_splits,
        layout=_layout(cu_seqlens, max_seqlen, hidden_states, positions),
        norm=norm,
        keys=keys,
        bias=bias,
        row_bounds=_row_bounds(row_starts, row_ends),
    )


@_traced
def _trace_cls_attention(
    query: Tensor,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    *,
    num_splits: int | None = None,
    layout: PackedLayout | None = None,
    norm: AddNorm | None = None,
    keys: Tensor | None = None,
    bias: Tensor | None = None,
    row_bounds: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    return _cls_attention(
        *(query, hidden_states, cu_seqlens, max_seqlen, softmax_scale, num_splits, _positions(layout), keys, bias),
        *((None, None) if row_bounds is None else row_bounds),
        *((None, None, None, None, 0.0) if norm is None else norm),
    )


@_operator(_contiguous_like)
def _cls_attention_kv(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float | None,
    num_splits: int | None,
    positions: Tensor | None,
    bias: Tensor | None,
    row_starts: Tensor | None,
    row_ends: Tensor | None,
) -> Tensor:
    return cls_attention_kv(
        *(query, k, v, cu_seqlens, max_seqlen, softmax_scale),
        num_splits=num_splits,
        layout=_layout(cu_seqlens, max_seqlen, k, positions),
        bias=bias,
        row_bounds=_row_bounds(row_starts, row_ends),
    )


@_traced
def _trace_cls_attention_kv(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float | None = None,
    *,
    num_splits: int | None = None,
    layout: PackedLayout | None = None,
    bias: Tensor | None = None,
    row_bounds: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    return _cls_attention_kv(
        *(query, k, v, cu_seqlens, max_seqlen, softmax_scale, num_splits, _positions(layout), bias),
        *((None, None) if row_bounds is None else row_bounds),
    )


@_operator(_contiguous_like)
def _disentangled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    bucket_table: Tensor,
    bucket_rows: list[int],
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    positions: Tensor | None,
) -> Tensor:
    return disentangled_attention(
        *(q, k, v, pos_key, pos_query, Buckets(bucket_table, tuple(bucket_rows))),
        *(cu_seqlens, max_seqlen, softmax_scale),
        layout=_layout(cu_seqlens, max_seqlen, q, positions),
    )


@_traced
def _trace_disentangled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    buckets: Buckets,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    *,
    layout: PackedLayout | None = None,
) -> Tensor:
    return _disentangled_attention(
        *(q, k, v, pos_key, pos_query, buckets.table, list(buckets.rows)),
        *(cu_seqlens, max_seqlen, softmax_scale, _positions(layout)),
    )


# It takes the same arguments as its operator.
TRACED |= {"attention_padded": _attention_padded}
