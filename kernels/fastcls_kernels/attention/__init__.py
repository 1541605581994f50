"""Bidirectional attention over packed sequences and over padded batches: the public functions and their checks."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import Members, operator
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
from .cpu import attention_runs
from .kernel import NO_WINDOW, choose_tile, launch_attention
from .padded import attention_padded, attention_padded_unchecked

__all__ = ["attention_padded", "attention_padded_unchecked", "attention_varlen", "attention_varlen_unchecked"]

_WINDOW = Members(
    "window_size",
    split=lambda window: dict(zip(("window_left", "window_right"), window, strict=True)),
    join=lambda given: (given["window_left"], given["window_right"]),
)


@operator(
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, float? softmax_scale, SymInt window_left, "
    "SymInt window_right, Tensor? bias, Tensor? positions) -> Tensor",
    fake=lambda q, *_: q.new_empty(q.shape),
    members=(PackedLayout.members("q"), _WINDOW),
)
def attention_varlen(
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
    """Bidirectional attention inside each of many packed sequences.

    Args:
        q: (total_tokens, nheads, headdim), float32, float16 or bfloat16, head sizes from 4 to 128 (multiples of 16 are
            fastest). Any strides with a contiguous last dimension: views of one fused projection are taken as they are.
        k, v: (total_tokens, nheads_k, headdim), dtype and strides as q's. nheads is a multiple of nheads_k: head h of q
            reads head ``h // (nheads // nheads_k)`` of k and v.
        cu_seqlens: (num_sequences + 1,), int32: sequence i is rows ``cu_seqlens[i]:cu_seqlens[i + 1]``. Zero-length
            sequences are allowed. Rows from ``cu_seqlens[-1]`` on belong to no sequence.
        max_seqlen: the longest sequence, in tokens, or any bound above it. It chooses nothing and compiles nothing.
        softmax_scale: factor on the scores; ``headdim ** -0.5`` if None.
        window_size: (left, right): row i attends to rows j of its sequence with -left <= position j - position i <=
            right, -1 for no limit on that side.
        bias: (nheads, 2 * reach + 1), float32 or q's dtype, contiguous: added to the scaled score of rows i and j is
            ``bias[h, clamp(position j - position i, -reach, reach) + reach]``.
        layout: ``PackedLayout(cu_seqlens, max_seqlen, total_tokens)``, for callers that use one packing many times:
            what depends on the lengths alone is checked and computed once. A row's position is the layout's, if it has
            positions, else the row's place in its sequence.

    Returns:
        (total_tokens, nheads, headdim), contiguous, in q's dtype; zero in rows that belong to no sequence.

    Raises:
        TypeError: a dtype that does not fit, or a window that is not two ints.
        ValueError: a shape, stride, device, head size, window or length that does not fit. ``cu_seqlens`` is checked
            by value where it lies on the CPU; on a GPU that would stall the device, so there it is trusted.

    Sums and the softmax are float32. The signature is flash-attention's (Dao, 2023); on a CPU each run of neighbouring
    sequences of equal length is one call of `torch.nn.functional.scaled_dot_product_attention`.
    """
    _check_qkv(q, k, v)
    _check_window(window_size)
    if bias is not None:
        _check_bias(bias, q)
    layout = PackedLayout.of(q, cu_seqlens, max_seqlen, layout)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    return differentiably(attention_varlen_unchecked, q, k, v, layout, scale, window_size, bias)


def attention_varlen_unchecked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    scale: float,
    window_size: tuple[int, int] = NO_WINDOW,
    bias: Tensor | None = None,
) -> Tensor:
    """`attention_varlen` of arguments that are known to fit."""
    if not runs_triton(q):
        return attention_runs(q, k, v, layout, scale, window_size, bias)
    tile = choose_tile(q, k, v, layout, window_size, biased=bias is not None)
    row_bounds = None if window_size == NO_WINDOW else layout.window_bounds(*window_size)
    positions = None if bias is None else layout.positions
    return launch_attention(q, k, v, layout, scale, tile, row_bounds=row_bounds, bias=bias, positions=positions)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_tensor("q", q, "(total_tokens, nheads, headdim)")
    shape = "(total_tokens, nheads_k, headdim)"
    for name, tensor in (("k", k), ("v", v)):
        check_tensor(name, tensor, shape, like=q)
        check_key_heads(name, tensor, shape, q, q.shape[0])
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_last_dim_contiguous(name, tensor)
    check_head_dim("q", q.shape[2])


def _check_window(window_size: tuple[int, int]) -> None:
    if (
        not isinstance(window_size, tuple)
        or len(window_size) != 2
        or not all(isinstance(limit, int) for limit in window_size)
    ):
        raise TypeError(f"window_size must be a tuple of two ints, got {window_size!r}")
    if min(window_size) < -1:
        raise ValueError(f"window_size must be at least -1, which is no limit, on both sides, got {window_size}")


def _check_bias(bias: Tensor, q: Tensor) -> None:
    if not isinstance(bias, Tensor) or bias.dtype not in (torch.float32, q.dtype):
        found = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"bias must be a tensor of torch.float32 or q's {q.dtype}, got {found}")
    num_heads = q.shape[1]
    if bias.ndim != 2 or bias.shape[0] != num_heads or bias.shape[1] % 2 == 0 or not bias.is_contiguous():
        raise ValueError(
            f"bias must be contiguous, of shape (nheads, 2 * reach + 1) = ({num_heads}, an odd number), "
            f"got shape {tuple(bias.shape)} with strides {bias.stride()}"
        )
    check_device("bias", bias, q)
