"""Few query rows over many tokens: the attention of a last layer of which only some rows, such as [CLS], are read.

`cls_attention` is one pass over the layer's *input*. The key projection is absorbed into the query,
score_j = q̃_h · x_j, and the value projection is applied after the sum,

    out_h = Σ_j softmax_j(q̃_h · x_j · scale + bias_jh) x_j,

so that no keys or values are made, and x is read once for all heads (the derivation is in kernels/README.md). Keys that
depend on positions cannot be absorbed: they are made and read beside x, score_j = q_h · k_jh, and there are still no
values. Heads may share their keys: head h of nheads then reads head h // (nheads // nheads_k) of them.

`cls_attention_kv` attends to keys and values that exist already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._ops import Members, check_together, operator
from ..layer_norm import AddNorm, add_layer_norm_unchecked, check_add_norm
from ..layout import PackedLayout
from ..runtime.backend import runs_triton
from ..runtime.checks import (
    check_device,
    check_head_dim,
    check_key_heads,
    check_last_dim_contiguous,
    check_tensor,
)
from ..runtime.gradients import differentiably
from ..runtime.tile_tables import arch_of, cls_tile
from .absorbed import launch_cls_attention
from .cpu import cls_attention_kv_windows, cls_attention_windows
from .key_value import launch_cls_attention_kv
from .splits import RowBounds

__all__ = [
    "RowBounds",
    "cls_attention",
    "cls_attention_kv",
    "cls_attention_kv_unchecked",
    "cls_attention_unchecked",
    "takes_norm",
]


def _join_norm(given: Mapping[str, Any]) -> AddNorm | None:
    residual, weight, norm_bias = given["norm_residual"], given["norm_weight"], given["norm_bias"]
    if not check_together(norm_residual=residual, norm_weight=weight, norm_bias=norm_bias):
        return None
    return AddNorm(given["norm_input_bias"], residual, weight, norm_bias, given["norm_eps"])


def _join_row_bounds(given: Mapping[str, Any]) -> RowBounds | None:
    starts, ends = given["row_starts"], given["row_ends"]
    return (starts, ends) if check_together(row_starts=starts, row_ends=ends) else None


_NORM = Members(
    "norm",
    split=lambda norm: dict(
        zip(
            ("norm_input_bias", "norm_residual", "norm_weight", "norm_bias", "norm_eps"),
            (None, None, None, None, 0.0) if norm is None else norm,
            strict=True,
        )
    ),
    join=_join_norm,
)
_ROW_BOUNDS = Members(
    "row_bounds",
    split=lambda bounds: dict(zip(("row_starts", "row_ends"), (None, None) if bounds is None else bounds, strict=True)),
    join=_join_row_bounds,
)


@operator(
    "(Tensor query, Tensor hidden_states, Tensor cu_seqlens, SymInt max_seqlen, float softmax_scale, "
    "SymInt? num_splits, Tensor? positions, Tensor? keys, Tensor? bias, Tensor? row_starts, Tensor? row_ends, "
    "Tensor? norm_input_bias, Tensor? norm_residual, Tensor? norm_weight, Tensor? norm_bias, float norm_eps) -> Tensor",
    fake=lambda query, hidden_states, *_: query.new_empty(*query.shape[:2], hidden_states.shape[1]),
    members=(PackedLayout.members("hidden_states"), _NORM, _ROW_BOUNDS),
)
def cls_attention(
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
    row_bounds: RowBounds | None = None,
) -> Tensor:
    """Attention of few rows' queries over the layer's input, without values and, where absorbed, without keys.

    Args:
        query: (num_rows, nheads, width), 1 to 64 heads: the rows' queries times the key projection, in hidden_states'
            dtype, or in float32, which keeps the bits that rounding would lose. Row i is of sequence i, unless
            row_bounds says otherwise. With keys the queries themselves, (num_rows, nheads, key_dim).
        hidden_states: (total_tokens, width), float32, float16 or bfloat16, contiguous last dimension, a width from 16
            to 4,096 (multiples of 16 are fastest): the input of the layer.
        cu_seqlens: (num_sequences + 1,), int32: sequence i is rows ``cu_seqlens[i]:cu_seqlens[i + 1]``.
        max_seqlen: the longest sequence, in tokens, or any bound above it.
        softmax_scale: factor on the scores, usually ``headdim ** -0.5``: the width does not tell the head size.
        num_splits: programs that share one sequence on a GPU; None chooses by the chip and the batch.
        layout: ``PackedLayout(cu_seqlens, max_seqlen, total_tokens)``, for callers that use one packing many times.
        norm: a layer norm that hidden_states still lack, taken inside; see `takes_norm`. With keys it is taken before.
        keys: (total_tokens, nheads_k, key_dim) in hidden_states' dtype, for a layer whose keys depend on positions: any
            strides with a contiguous last dimension, head sizes from 4 to 128. Copied where heads are not neighbours.
            nheads is a multiple of nheads_k: head h reads keys' head ``h // (nheads // nheads_k)``.
        bias: (total_tokens, nheads), float32 (float64 beside such hidden_states), contiguous: added to the scaled
            score of each token and head. -inf leaves a token out; a row must read one token whose bias is finite.
        row_bounds: (starts, ends), two contiguous int32 tensors (num_rows,): row i reads rows ``starts[i]:ends[i]`` of
            hidden_states, at most max_seqlen. They may come in any order and overlap; neighbours that read the same
            tokens find them in the cache. Checked by value on the CPU alone, as cu_seqlens is.

    Returns:
        (num_rows, nheads, width) in query's dtype: the weighted sums of rows, before the value projection. Zero for a
        row that reads no token.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, stride, device, width, head count or length that does not fit.

    Queries and weights enter 16-bit products as pairs of numbers (high part and remainder), and sums are float32.
    """
    check_tensor("hidden_states", hidden_states, "(total_tokens, width)")
    check_last_dim_contiguous("hidden_states", hidden_states)
    wide = hidden_states if query.dtype == hidden_states.dtype else hidden_states.new_empty(0, dtype=torch.float32)
    check_tensor("query", query, f"(num_rows, nheads, {'width' if keys is None else 'key_dim'})", like=wide)
    check_last_dim_contiguous("query", query)
    num_heads, width = query.shape[1], hidden_states.shape[1]
    if keys is not None:
        _check_keys(keys, query, hidden_states)
    elif query.shape[2] != width:
        raise ValueError(f"query must have hidden_states' width {width}, got {query.shape[2]}")
    if not 16 <= width <= 4096:
        raise ValueError(f"hidden_states must have a width from 16 to 4096, got {width}")
    if not 1 <= num_heads <= 64:
        raise ValueError(f"query must have 1 to 64 heads, got {num_heads}")
    layout = PackedLayout.of(hidden_states, cu_seqlens, max_seqlen, layout)
    _check_rows(query, layout, num_splits, bias, row_bounds)
    if norm is not None:
        check_add_norm(hidden_states, *norm)
    return differentiably(
        cls_attention_unchecked,
        *(query, hidden_states, layout, softmax_scale),
        num_splits=num_splits,
        norm=norm,
        keys=keys,
        bias=bias,
        row_bounds=row_bounds,
    )


def cls_attention_unchecked(
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
    """`cls_attention` of arguments that are known to fit."""
    if norm is not None and (keys is not None or norm.bias is None or not takes_norm(hidden_states)):
        hidden_states, norm = add_layer_norm_unchecked(hidden_states, *norm)[0], None
    if not runs_triton(query):
        return cls_attention_windows(query, hidden_states, layout, scale, keys, bias, row_bounds)
    return launch_cls_attention(query, hidden_states, layout, scale, num_splits, norm, keys, bias, row_bounds)


def takes_norm(hidden_states: Tensor) -> bool:
    """Whether `cls_attention` takes a layer norm inside its own pass over memory, not in one before it.

    Args:
        hidden_states: (total_tokens, width), as `cls_attention` takes them.
    """
    if not runs_triton(hidden_states):
        return False
    width = hidden_states.shape[1]
    tile = cls_tile(arch_of(hidden_states.device), hidden_states.dtype, width)
    # A row's mean takes all of its columns.
    return tile.NORM and width <= tile.BLOCK_W * tile.CHUNKS


@operator(
    "(Tensor query, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, float? softmax_scale, "
    "SymInt? num_splits, Tensor? positions, Tensor? bias, Tensor? row_starts, Tensor? row_ends) -> Tensor",
    fake=lambda query, *_: query.new_empty(query.shape),
    members=(PackedLayout.members("k"), _ROW_BOUNDS),
)
def cls_attention_kv(
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
    row_bounds: RowBounds | None = None,
) -> Tensor:
    """Attention of few rows' queries over packed keys and values.

    Args:
        query: (num_rows, nheads, headdim), float32, float16 or bfloat16: row i is of sequence i, unless row_bounds
            says otherwise.
        k, v: (total_tokens, nheads_k, headdim) in query's dtype; any strides with a contiguous last dimension. nheads
            is a multiple of nheads_k: head h of query reads head ``h // (nheads // nheads_k)`` of k and v.
        cu_seqlens, max_seqlen, num_splits, layout, bias, row_bounds: as in `cls_attention`.
        softmax_scale: factor on the scores; ``headdim ** -0.5`` if None.

    Returns:
        (num_rows, nheads, headdim) in query's dtype; zero for a row that reads no token.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, stride, device, head size or length that does not fit.
    """
    check_tensor("query", query, "(num_rows, nheads, headdim)")
    for name, tensor in (("k", k), ("v", v)):
        check_tensor(name, tensor, "(total_tokens, nheads_k, headdim)", like=query)
        check_key_heads(name, tensor, "(total_tokens, nheads_k, headdim)", query, k.shape[0])
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    for name, tensor in (("query", query), ("k", k), ("v", v)):
        check_last_dim_contiguous(name, tensor)
    check_head_dim("query", query.shape[2])
    layout = PackedLayout.of(k, cu_seqlens, max_seqlen, layout)
    _check_rows(query, layout, num_splits, bias, row_bounds)
    scale = query.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    return differentiably(
        cls_attention_kv_unchecked, query, k, v, layout, scale, num_splits=num_splits, bias=bias, row_bounds=row_bounds
    )


def cls_attention_kv_unchecked(
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
    """`cls_attention_kv` of arguments that are known to fit."""
    if not runs_triton(query):
        return cls_attention_kv_windows(query, k, v, layout, scale, bias, row_bounds)
    return launch_cls_attention_kv(query, k, v, layout, scale, num_splits, bias, row_bounds)


def _check_keys(keys: Tensor, query: Tensor, hidden_states: Tensor) -> None:
    check_tensor("keys", keys, "(total_tokens, nheads_k, key_dim)", like=hidden_states)
    check_last_dim_contiguous("keys", keys)
    check_key_heads("keys", keys, "(total_tokens, nheads_k, key_dim)", query, hidden_states.shape[0])
    check_head_dim("keys", keys.shape[2])


def _check_rows(
    query: Tensor, layout: PackedLayout, num_splits: int | None, bias: Tensor | None, row_bounds: RowBounds | None
) -> None:
    if row_bounds is not None:
        _check_row_bounds(row_bounds, query, layout)
    elif query.shape[0] != layout.num_sequences:
        raise ValueError(
            f"query must have one row for each of the {layout.num_sequences} sequences of cu_seqlens, "
            f"got {query.shape[0]}"
        )
    if bias is not None:
        wide = torch.promote_types(query.dtype, torch.float32)
        check_tensor("bias", bias, "(total_tokens, nheads)", like=query.new_empty(0, dtype=wide))
        if bias.shape != (layout.total_tokens, query.shape[1]) or not bias.is_contiguous():
            raise ValueError(
                f"bias must be contiguous, of shape ({layout.total_tokens}, {query.shape[1]}), "
                f"got shape {tuple(bias.shape)} with strides {bias.stride()}"
            )
    if num_splits is not None and not 1 <= num_splits <= 65535:
        raise ValueError(f"num_splits must be from 1 to 65535 or None, got {num_splits}")


def _check_row_bounds(row_bounds: RowBounds, query: Tensor, layout: PackedLayout) -> None:
    if not isinstance(row_bounds, tuple) or len(row_bounds) != 2:
        raise TypeError(f"row_bounds must be a tuple (starts, ends), got {type(row_bounds).__name__}")
    for name, bound in zip(("starts", "ends"), row_bounds, strict=True):
        if not isinstance(bound, Tensor) or bound.dtype != torch.int32:
            found = getattr(bound, "dtype", type(bound).__name__)
            raise TypeError(f"row_bounds' {name} must be a torch.int32 tensor, got {found}")
        if bound.shape != query.shape[:1] or not bound.is_contiguous():
            raise ValueError(
                f"row_bounds' {name} must be contiguous, of shape (num_rows,) = ({query.shape[0]},), "
                f"got shape {tuple(bound.shape)} with strides {bound.stride()}"
            )
        check_device(f"row_bounds' {name}", bound, query)
    starts, ends = row_bounds
    # On a GPU their values are trusted: reading them would stall it.
    if starts.device.type != "cpu" or starts.numel() == 0:
        return
    shortest, longest = (int(bound) for bound in torch.aminmax(ends - starts))
    first, last = int(starts.min()), int(ends.max())
    if first < 0 or shortest < 0 or last > layout.total_tokens:
        raise ValueError(
            f"row_bounds must hold 0 <= start <= end <= total_tokens = {layout.total_tokens}, got rows from {first} "
            f"to {last}, the shortest of {shortest}"
        )
    if longest > layout.max_seqlen:
        raise ValueError(f"max_seqlen must be at least the longest of row_bounds, {longest}, got {layout.max_seqlen}")
