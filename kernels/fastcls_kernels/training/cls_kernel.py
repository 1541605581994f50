"""The kernels of the [CLS] pass that can be trained, and their launchers. For row r, head h and token t

    s_rht = scale query_rh · source_t + bias_th,    p_rh = softmax(s_rh),    d_rht = drop(p_rht),
    summed_rh = Σ_t d_rht x_t,                      weights_rh = Σ_t d_rht.

``source`` are the hidden rows x themselves, or the keys of head h. Rows read tokens of their own, so scores are a
number for a token and head, and small beside x: they lie in memory between a kernel that goes over the columns of x
and one whose programs take BLOCK_W of them each. What is kept for the backward pass is L_rh = log2 Σ_t 2^(s_rht log2 e)
alone. The backward pass makes p again, and takes

    e_rht = drop(grad_summed_rh · x_t + grad_weights_rh),    f_rht = p_rht (e_rht - Σ_t p_rht e_rht),
    grad_x_t = Σ_h d_rht grad_summed_rh + scale f_rht query_rh,    grad_query_rh = scale Σ_t f_rht x_t;

with keys the terms in scale are those of grad_keys_th = scale f_rht query_rh, and of the keys in place of x_t. f is the
gradient of the bias, too. Σ_t p e is summed_rh · grad_summed_rh + weights_rh grad_weights_rh as well, but only where it
is made of e do the errors of e cancel in f. No sum is shared by two programs, so results do not depend on their order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..attention.kernel import LOG2_E, NO_WINDOW
from ..layout import PackedLayout
from ..runtime.backend import device_guard
from ..runtime.checks import FLOAT_DTYPES, check_head_dim, check_last_dim_contiguous
from ..runtime.tile_tables import arch_of, unsqueezed
from ..runtime.triton import cdiv, head_block
from .cls_programs import (
    cls_flow_kernel,
    cls_hidden_gradient_kernel,
    cls_key_gradient_kernel,
    cls_key_scores_kernel,
    cls_score_gradient_kernel,
    cls_scores_kernel,
    cls_sum_kernel,
)
from .dropout import Dropout


class _Tile(NamedTuple):
    """BLOCK_H heads of a row by BLOCK_N tokens and BLOCK_W columns, and how its products are computed."""

    BLOCK_H: int
    BLOCK_N: int
    BLOCK_W: int
    PRECISION: str
    num_warps: int
    num_stages: int


def _tile_of(hidden: Tensor) -> _Tile:
    """The tile of a chip and dtype."""
    if hidden.dtype == torch.float32:
        return _Tile(16, 32, 32, "ieee", 4, 1)
    # One side of each product is float32: gradients may be smaller than float16's numbers. NVIDIA's matrix units take
    # it as three parts, AMD's as it is.
    precision = "ieee" if arch_of(hidden.device).startswith("gfx") else "tf32x3"
    return _Tile(16, 32, 64, precision, 4, 2)


class _Form(NamedTuple):
    """What a forward pass and its backward pass share.

    Attributes:
        starts, ends: (num_rows,) int32, each row's tokens.
        most_tokens: the most that a row may have.
        options: arguments of every kernel that takes hidden rows.
        random: arguments of every kernel that drops.
    """

    starts: Tensor
    ends: Tensor
    most_tokens: int
    tile: _Tile
    options: dict[str, object]
    random: dict[str, object]

    @property
    def num_rows(self) -> int:
        return self.starts.numel()

    def token_tiles(self, block_n: int) -> int:
        return cdiv(self.most_tokens, block_n)


def launch_cls_forward(
    query: Tensor,
    hidden: Tensor,
    layout: PackedLayout,
    scale: float,
    *,
    keys: Tensor | None = None,
    bias: Tensor | None = None,
    window: tuple[int, int] = NO_WINDOW,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The [CLS] pass of each sequence's first row, and what its backward pass needs.

    Args:
        query: (num_sequences, nheads, width), 1 to 64 heads, each times its head's projection of keys; with ``keys``
            (num_sequences, nheads, headdim). Float32 or hidden's dtype, contiguous.
        hidden: (total_tokens, width), float32, float16 or bfloat16, a contiguous last dimension.
        layout: where each sequence lies.
        scale: factor on products.
        keys: (total_tokens, nheads, headdim) in hidden's dtype, any strides with a contiguous last dimension, head
            sizes of 4 to 128; or None where the query absorbed their projection.
        bias: (total_tokens, nheads) float32, contiguous, added to scores, or None.
        window: how many positions the first row attends to on its left and right, -1 for all.
        dropout: what drops probabilities, or None.

    Returns:
        summed, (num_sequences, nheads, width); the sums of weights, 1 each without dropout, and log2 of the softmax's
        sums, (num_sequences, nheads): all float32, and the first two 0 where a sequence is empty.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, stride or number that does not fit.
    """
    _check(query, hidden, keys, bias)
    form = _form_of(query, hidden, layout, window, dropout)
    num_rows, num_heads, _ = query.shape
    width = hidden.shape[1]
    summed = query.new_empty(num_rows, num_heads, width, dtype=torch.float32)
    weights = query.new_empty(num_rows, num_heads, dtype=torch.float32)
    log_sums = query.new_empty(num_rows, num_heads, dtype=torch.float32)
    if summed.numel() == 0:
        return summed, weights, log_sums
    tile = form.tile
    with device_guard(hidden):
        scores = _launch_scores(query, hidden, keys, bias, scale, form)
        cls_sum_kernel[(num_rows, cdiv(width, tile.BLOCK_W), cdiv(num_heads, tile.BLOCK_H))](
            score_ptr=scores,
            x_ptr=hidden,
            summed_ptr=summed,
            weights_ptr=weights,
            lse_ptr=log_sums,
            start_ptr=form.starts,
            end_ptr=form.ends,
            **form.random,
            **form.options,
        )
    return summed, weights, log_sums


def launch_cls_backward(
    grad_summed: Tensor,
    grad_weights: Tensor | None,
    query: Tensor,
    hidden: Tensor,
    summed: Tensor,  # noqa: ARG001 (as every backward pass, this takes what its forward pass gave)
    weights: Tensor,  # noqa: ARG001
    log_sums: Tensor,
    layout: PackedLayout,
    scale: float,
    *,
    keys: Tensor | None = None,
    bias: Tensor | None = None,
    window: tuple[int, int] = NO_WINDOW,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of `launch_cls_forward`'s query, hidden, keys and bias, of the same arguments.

    Args:
        grad_summed: (num_sequences, nheads, width) float32.
        grad_weights: (num_sequences, nheads) float32, or None for zeros.
        summed, weights, log_sums: what the forward pass gave; the first two are not read.

    Returns:
        Each in the shape and dtype of its tensor, contiguous, and None where that is None; zero for tokens that no row
        reads.

    Raises:
        TypeError, ValueError: as in the forward pass.
    """
    _check(query, hidden, keys, bias)
    form = _form_of(query, hidden, layout, window, dropout)
    num_rows, num_heads, _ = query.shape
    width = hidden.shape[1]
    grad_query = query.new_empty(query.shape)
    grad_hidden = hidden.new_empty(hidden.shape)
    grad_keys = None if keys is None else keys.new_empty(keys.shape)
    grad_bias = None if bias is None else bias.new_zeros(bias.shape)
    if num_rows == 0 or hidden.numel() == 0:
        for empty in (grad_query, grad_hidden, grad_keys):
            if empty is not None:
                empty.zero_()
        return grad_query, grad_hidden, grad_keys, grad_bias
    grad_summed = grad_summed.contiguous()
    if grad_weights is not None:
        grad_weights = grad_weights.contiguous()
    probabilities, flow, dropped = (hidden.new_empty(hidden.shape[0], num_heads, dtype=torch.float32) for _ in range(3))
    # The gradients of scores are the bias's, and zero where there are no scores.
    grad_scores = torch.empty_like(flow) if grad_bias is None else grad_bias
    tile, common = form.tile, {"start_ptr": form.starts, "end_ptr": form.ends}
    head_groups = cdiv(num_heads, tile.BLOCK_H)
    # All heads' columns stay in registers.
    narrow = {} if head_groups == 1 else {"BLOCK_N": 16, "BLOCK_W": max(16, 64 // head_groups), "num_warps": 8}
    block_w = narrow.get("BLOCK_W", tile.BLOCK_W)
    unspilled = unsqueezed(arch_of(hidden.device))
    with device_guard(hidden):
        scores = None if keys is None else _launch_scores(query, hidden, keys, bias, scale, form)
        cls_flow_kernel[(num_rows, form.token_tiles(tile.BLOCK_N), head_groups)](
            grad_ptr=grad_summed,
            grad_weights_ptr=grad_weights,
            q_ptr=query if keys is None else None,
            x_ptr=hidden,
            bias_ptr=bias if keys is None else None,
            score_ptr=scores,
            lse_ptr=log_sums,
            probability_ptr=probabilities,
            flow_ptr=flow,
            **common,
            scale_log2=scale * LOG2_E,
            LOG2_E=LOG2_E,
            **form.options,
            **unspilled,
        )
        cls_score_gradient_kernel[(num_rows, head_groups)](
            probability_ptr=probabilities,
            flow_ptr=flow,
            dropped_ptr=dropped,
            grad_score_ptr=grad_scores,
            **common,
            **form.random,
            NUM_HEADS=num_heads,
            BLOCK_H=tile.BLOCK_H,
            BLOCK_N=64,
            num_warps=4,
            enable_fp_fusion=True,
        )
        cls_hidden_gradient_kernel[(num_rows, cdiv(width, block_w))](
            dropped_ptr=dropped,
            grad_score_ptr=grad_scores,
            grad_ptr=grad_summed,
            q_ptr=query if keys is None else None,
            x_ptr=hidden,
            grad_x_ptr=grad_hidden,
            grad_q_ptr=grad_query if keys is None else None,
            **common,
            num_rows=num_rows,
            total_tokens=hidden.shape[0],
            scale=scale,
            HEAD_GROUPS=head_groups,
            **{**form.options, **narrow},
            **unspilled,
        )
        if keys is not None:
            cls_key_gradient_kernel[(num_rows, num_heads)](
                grad_score_ptr=grad_scores,
                q_ptr=query,
                k_ptr=keys,
                grad_q_ptr=grad_query,
                grad_k_ptr=grad_keys,
                **common,
                num_rows=num_rows,
                total_tokens=hidden.shape[0],
                scale=scale,
                **_key_options(keys),
                **unspilled,
            )
    return grad_query, grad_hidden, grad_keys, grad_bias


def _launch_scores(
    query: Tensor, hidden: Tensor, keys: Tensor | None, bias: Tensor | None, scale: float, form: _Form
) -> Tensor:
    """Scores times log2 e, (total_tokens, nheads) float32, of tokens that a row reads; others are not written."""
    num_heads = query.shape[1]
    scores = hidden.new_empty(hidden.shape[0], num_heads, dtype=torch.float32)
    given = {
        "bias_ptr": bias,
        "score_ptr": scores,
        "start_ptr": form.starts,
        "end_ptr": form.ends,
        "scale_log2": scale * LOG2_E,
        "LOG2_E": LOG2_E,
    }
    if keys is None:
        tile = form.tile
        grid = (form.num_rows, form.token_tiles(tile.BLOCK_N), cdiv(num_heads, tile.BLOCK_H))
        cls_scores_kernel[grid](q_ptr=query, x_ptr=hidden, **given, **form.options)
    else:
        options = _key_options(keys)
        grid = (form.num_rows, form.token_tiles(options["BLOCK_N"]), num_heads)
        cls_key_scores_kernel[grid](q_ptr=query, k_ptr=keys, **given, **options)
    return scores


def _key_options(keys: Tensor) -> dict[str, int]:
    """Arguments of every kernel that takes keys."""
    _, num_heads, head_dim = keys.shape
    return {
        "stride_kt": keys.stride(0),
        "stride_kh": keys.stride(1),
        "NUM_HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_N": 64,
        "BLOCK_D": head_block(head_dim),
        "num_warps": 4,
        "num_stages": 2,
        "enable_fp_fusion": True,
    }


def _form_of(
    query: Tensor, hidden: Tensor, layout: PackedLayout, window: tuple[int, int], dropout: Dropout | None
) -> _Form:
    tile = _tile_of(hidden)
    starts, ends = layout.cu_seqlens[:-1], layout.cu_seqlens[1:]
    if window[1] >= 0 and layout.total_tokens:
        # An empty sequence's start is the next one's first row, which ends later, or none's.
        seen = layout.window_bounds(*window)[1][starts.clamp(max=layout.total_tokens - 1).long()]
        ends = torch.minimum(ends, seen)
    options = {
        "stride_xt": hidden.stride(0),
        "NUM_HEADS": query.shape[1],
        "WIDTH": hidden.shape[1],
        **tile._asdict(),
        "enable_fp_fusion": True,
    }
    random: dict[str, object] = {
        "seed": 0 if dropout is None else dropout.signed_seed,
        "threshold": 0 if dropout is None else dropout.threshold,
        "factor": 1.0 if dropout is None else dropout.factor,
        "HAS_DROPOUT": dropout is not None,
    }
    return _Form(starts, ends, layout.max_seqlen, tile, options, random)


def _check(query: Tensor, hidden: Tensor, keys: Tensor | None, bias: Tensor | None) -> None:
    if hidden.dtype not in FLOAT_DTYPES:
        raise TypeError(f"hidden must be one of {', '.join(map(str, FLOAT_DTYPES))}, got {hidden.dtype}")
    if query.dtype not in (hidden.dtype, torch.float32):
        raise TypeError(f"query must be {hidden.dtype} or torch.float32, got {query.dtype}")
    source = hidden if keys is None else keys
    if keys is not None:
        if keys.dtype != hidden.dtype:
            raise TypeError(f"keys must be {hidden.dtype} like hidden, got {keys.dtype}")
        check_head_dim("keys", keys.shape[2])
        if keys.shape[:2] != (hidden.shape[0], query.shape[1]):
            raise ValueError(
                f"keys must be of {hidden.shape[0]} tokens and query's {query.shape[1]} heads, "
                f"got shape {tuple(keys.shape)}"
            )
        check_last_dim_contiguous("keys", keys)
    check_last_dim_contiguous("hidden", hidden)
    if query.shape[2] != source.shape[-1]:
        raise ValueError(f"query must have {source.shape[-1]} columns, got shape {tuple(query.shape)}")
    if not 1 <= query.shape[1] <= 64:
        raise ValueError(f"query must have 1 to 64 heads, got {query.shape[1]}")
    if not query.is_contiguous():
        raise ValueError(f"query must be contiguous, got strides {query.stride()}")
    if bias is None:
        return
    if bias.dtype != torch.float32:
        raise TypeError(f"bias must be torch.float32, got {bias.dtype}")
    if bias.shape != (hidden.shape[0], query.shape[1]) or not bias.is_contiguous():
        raise ValueError(
            f"bias must be contiguous, of shape ({hidden.shape[0]}, {query.shape[1]}), "
            f"got shape {tuple(bias.shape)} with strides {bias.stride()}"
        )
