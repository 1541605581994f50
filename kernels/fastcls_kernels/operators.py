"""The operations as operators of ``torch.library``, under ``torch.ops.fastcls_kernels``, with their fake results.

An operator runs the public function of its name: the same checks, kernels and choices. Its arguments are what a schema
can hold: for ``layout`` the layout's ``positions``, for ``window_size`` two numbers, for ``buckets`` its table and its
rows, for ``norm`` its members, and with ``keep_sum`` a list of two. The public functions call them while a graph is
traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from ._tracing import TRACED
from .absorb_query import absorb_query
from .cls_output import cls_output
from .embedding import embedding_layer_norm
from .gated_activation import gated_activation
from .layer_norm import add_layer_norm, layer_norm
from .linear import linear, linear_activation, linear_add_layer_norm, linear_gelu, linear_per_head
from .pooler_classifier import pooler_classifier
from .rotary import apply_rotary_
from .runtime.activations import Activation


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


def _contiguous_like(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor.new_empty(tensor.shape)


def _num_rows(tokens: Tensor, rows: Tensor | None) -> Any:
    return tokens.shape[0] if rows is None else rows.shape[0]


def _fake_absorb_query(
    hidden_states: Tensor,
    rows: Tensor | None,
    _query_weight: Tensor,
    _query_bias: Tensor,
    key_weight: Tensor,
    heads: int,
) -> Tensor:
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    return hidden_states.new_empty(_num_rows(hidden_states, rows), heads, key_weight.shape[1], dtype=dtype)


@_operator(_fake_absorb_query)
def _absorb_query(
    hidden_states: Tensor,
    rows: Tensor | None,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    num_heads: int,
) -> Tensor:
    # As a graph was told that it lies in memory.
    return absorb_query(hidden_states, rows, query_weight, query_bias, key_weight, num_heads).contiguous()


def _sums(made: Tensor | tuple[Tensor, Tensor]) -> list[Tensor]:
    return [made] if isinstance(made, Tensor) else list(made)


def _as_given(made: list[Tensor], keep_sum: bool) -> Tensor | tuple[Tensor, Tensor]:
    return (made[0], made[1]) if keep_sum else made[0]


def _fake_sums(like: Tensor, rows: Any, keep_sum: bool) -> list[Tensor]:
    return [like.new_empty(rows, like.shape[1]) for _ in range(1 + keep_sum)]


def _fake_cls_output(
    summed: Tensor,
    _value_weight: Tensor,
    _value_bias: Tensor | None,
    _out_weight: Tensor,
    _out_bias: Tensor | None,
    hidden_states: Tensor,
    _rows: Tensor | None,
    _norm_weight: Tensor,
    _norm_bias: Tensor | None,
    _eps: float,
    keep_sum: bool,
) -> list[Tensor]:
    return _fake_sums(hidden_states, summed.shape[0], keep_sum)


@_operator(_fake_cls_output)
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
    keep_sum: bool,
) -> list[Tensor]:
    made: Any = cls_output(
        *(summed, value_weight, value_bias, out_weight, out_bias, hidden_states, rows, norm_weight, norm_bias, eps),
        keep_sum=keep_sum,  # type: ignore[call-overload]
    )
    return _sums(made)


@_traced
def _trace_cls_output(*arguments: Any, keep_sum: bool = False, **named: Any) -> Tensor | tuple[Tensor, Tensor]:
    return _as_given(_cls_output(*arguments, keep_sum=keep_sum, **named), keep_sum)


@_operator(lambda *_: None, mutates=("x",))
def _apply_rotary_(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> None:
    apply_rotary_(x, positions, cos, sin)


@_traced
def _trace_apply_rotary_(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    _apply_rotary_(x, positions, cos, sin)
    return x


def _fake_embedding_layer_norm(token_ids: Tensor, _positions: Any, _types: Any, word_table: Tensor, *_: Any) -> Tensor:
    return word_table.new_empty(token_ids.shape[0], word_table.shape[1])


@_operator(_fake_embedding_layer_norm)
def _embedding_layer_norm(
    token_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word_table: Tensor,
    position_table: Tensor | None,
    token_type_table: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    return embedding_layer_norm(
        *(token_ids, position_ids, token_type_ids, word_table, position_table, token_type_table),
        *(weight, norm_bias, eps),
    )


def _fake_linear(hidden_states: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape[0], weight.shape[0])


@_operator(_fake_linear)
def _linear(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(hidden_states, weight, bias)


@_operator(_fake_linear)
def _linear_gelu(hidden_states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear_gelu(hidden_states, weight, bias)


@_operator(_fake_linear)
def _linear_activation(hidden_states: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return linear_activation(hidden_states, weight, bias, cast(Activation, activation))


def _fake_linear_per_head(rows: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty(*rows.shape[:2], weight.shape[2])


@_operator(_fake_linear_per_head)
def _linear_per_head(rows: Tensor, weight: Tensor) -> Tensor:
    return linear_per_head(rows, weight).contiguous()


def _fake_linear_add_layer_norm(
    _hidden_states: Tensor,
    _weight: Tensor,
    _bias: Tensor | None,
    residual: Tensor,
    _norm_weight: Tensor,
    _norm_bias: Tensor | None,
    _eps: float,
    keep_sum: bool,
) -> list[Tensor]:
    return _fake_sums(residual, residual.shape[0], keep_sum)


@_operator(_fake_linear_add_layer_norm)
def _linear_add_layer_norm(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    keep_sum: bool,
) -> list[Tensor]:
    made: Any = linear_add_layer_norm(
        *(hidden_states, weight, bias, residual, norm_weight, norm_bias, eps),
        keep_sum=keep_sum,  # type: ignore[call-overload]
    )
    return _sums(made)


@_traced
def _trace_linear_add_layer_norm(
    *arguments: Any, keep_sum: bool = False, **named: Any
) -> Tensor | tuple[Tensor, Tensor]:
    return _as_given(_linear_add_layer_norm(*arguments, keep_sum=keep_sum, **named), keep_sum)


def _fake_add_layer_norm(
    hidden_states: Tensor,
    _bias: Tensor | None,
    _residual: Tensor,
    _weight: Tensor,
    _norm_bias: Tensor | None,
    _eps: float,
    rows: Tensor | None,
    keep_sum: bool,
) -> list[Tensor]:
    return _fake_sums(hidden_states, _num_rows(hidden_states, rows), keep_sum)


@_operator(_fake_add_layer_norm)
def _add_layer_norm(
    hidden_states: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    rows: Tensor | None,
    keep_sum: bool,
) -> list[Tensor]:
    made: Any = add_layer_norm(
        *(hidden_states, bias, residual, weight, norm_bias, eps),
        rows=rows,
        keep_sum=keep_sum,  # type: ignore[call-overload]
    )
    return _sums(made)


@_traced
def _trace_add_layer_norm(
    *arguments: Any, rows: Tensor | None = None, keep_sum: bool = False, **named: Any
) -> Tensor | tuple[Tensor, Tensor]:
    return _as_given(_add_layer_norm(*arguments, rows=rows, keep_sum=keep_sum, **named), keep_sum)


@_operator(_contiguous_like)
def _layer_norm(hidden_states: Tensor, weight: Tensor, norm_bias: Tensor | None, eps: float) -> Tensor:
    return layer_norm(hidden_states, weight, norm_bias, eps)


def _fake_gated_activation(hidden_states: Tensor, *_: Any) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape[0], hidden_states.shape[1] // 2)


@_operator(_fake_gated_activation)
def _gated_activation(hidden_states: Tensor, activation: str = "gelu") -> Tensor:
    return gated_activation(hidden_states, cast(Activation, activation))


def _fake_pooler_classifier(
    cls_states: Tensor, _pooler_weight: Tensor, _pooler_bias: Tensor, classifier_weight: Tensor, *_: Any
) -> Tensor:
    return cls_states.new_empty(cls_states.shape[0], classifier_weight.shape[0])


@_operator(_fake_pooler_classifier)
def _pooler_classifier(
    cls_states: Tensor,
    pooler_weight: Tensor,
    pooler_bias: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    activation: str,
) -> Tensor:
    return pooler_classifier(
        *(cls_states, pooler_weight, pooler_bias, classifier_weight, classifier_bias),
        activation=cast(Activation, activation),
    )


@_traced
def _trace_pooler_classifier(*arguments: Any, activation: str = "tanh", **named: Any) -> Tensor:
    return _pooler_classifier(*arguments, activation=activation, **named)


# These take the same arguments as their operators.
TRACED |= {
    "absorb_query": _absorb_query,
    "embedding_layer_norm": _embedding_layer_norm,
    "gated_activation": _gated_activation,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "linear_activation": _linear_activation,
    "linear_gelu": _linear_gelu,
    "linear_per_head": _linear_per_head,
}
