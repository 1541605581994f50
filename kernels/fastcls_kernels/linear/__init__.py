"""Matrix products: f(x weightᵀ + bias), a product by head, and layer or RMS norm of x weightᵀ + bias + residual.

On a GPU a chip's table (runtime/tile_tables.py) says by shape whether our kernel (kernel.py), our partial products
(split.py) or cuBLAS is the fastest; with `batch_invariant` our kernel makes every product, in one tile. On a CPU cpu.py
chooses the library.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .._ops import operator
from ..layer_norm import check_norm, check_vector, cpu_norm, fake_norm_and_sum, launch_sum_add_layer_norm
from ..packed import PackedWeight, packed_linear_unchecked
from ..runtime.activations import Activation, activate_, check_activation
from ..runtime.backend import runs_triton
from ..runtime.checks import check_last_dim_contiguous, check_tensor
from ..runtime.gradients import differentiably
from ..runtime.invariance import choices
from ..runtime.tile_tables import arch_of, invariant_linear_tile, linear_gelu_tile, linear_norm_tile
from .cpu import cpu_product, cpu_product_per_head, product_per_head, uses_onednn
from .kernel import launch_linear
from .split import launch_split_linear

__all__ = [
    "linear",
    "linear_activation",
    "linear_activation_unchecked",
    "linear_add_layer_norm",
    "linear_add_layer_norm_unchecked",
    "linear_gelu",
    "linear_per_head",
    "linear_per_head_unchecked",
    "linear_unchecked",
    "uses_onednn",
]


def _fake_linear(hidden_states: Tensor, weight: Tensor, *_: object) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape[0], weight.shape[0])


def _check_linear(hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensor("hidden_states", hidden_states, "(num_tokens, in_features)")
    check_tensor("weight", weight, "(out_features, in_features)", like=hidden_states)
    if weight.shape[1] != hidden_states.shape[1]:
        raise ValueError(f"weight must have shape (out_features, {hidden_states.shape[1]}), got {tuple(weight.shape)}")
    if bias is not None:
        check_vector("bias", bias, weight.shape[0], hidden_states)
    check_last_dim_contiguous("hidden_states", hidden_states)
    check_last_dim_contiguous("weight", weight)


@operator("(Tensor hidden_states, Tensor weight, Tensor? bias=None) -> Tensor", fake=_fake_linear)
def linear(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``hidden_states @ weight.T + bias`` by the fastest library at hand: cuBLAS on a GPU, oneDNN or MKL on a CPU.

    Args:
        hidden_states: (num_tokens, in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.

    Returns:
        (num_tokens, out_features) in hidden_states' dtype.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape or device that does not fit.
    """
    _check_linear(hidden_states, weight, bias)
    return differentiably(linear_unchecked, hidden_states, weight, bias)


def linear_unchecked(hidden_states: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`linear` of arguments that are known to fit; a packed weight holds its bias."""
    if isinstance(weight, PackedWeight):
        return packed_linear_unchecked(hidden_states, weight)
    if runs_triton(hidden_states):
        return _gpu_product(hidden_states, weight, bias, None)
    return cpu_product(hidden_states, weight, bias)


def _gpu_product(hidden_states: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
    """By cuBLAS, or with `batch_invariant` by the kernel: cuBLAS chooses by the number of rows."""
    if choices().library_products:
        product = F.linear(hidden_states, weight, bias)
        return product if activation is None else activate_(activation, product)
    tile = invariant_linear_tile(arch_of(hidden_states.device), hidden_states.dtype)
    return launch_linear(hidden_states, weight, bias, activation, tile)


@operator("(Tensor hidden_states, Tensor weight, Tensor bias) -> Tensor", fake=_fake_linear)
def linear_gelu(hidden_states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``gelu(hidden_states @ weight.T + bias)`` with the exact (erf) GELU.

    Args:
        hidden_states: (num_tokens, in_features), float32, float16 or bfloat16.
        weight: (out_features, in_features), contiguous last dimension.
        bias: (out_features,).

    Returns:
        (num_tokens, out_features) in hidden_states' dtype.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, stride or device that does not fit.
    """
    _check_linear(hidden_states, weight, bias)
    return differentiably(linear_activation_unchecked, hidden_states, weight, bias, "gelu")


@operator(
    "(Tensor hidden_states, Tensor weight, Tensor? bias, str activation) -> Tensor",
    fake=_fake_linear,
)
def linear_activation(hidden_states: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """``activation(hidden_states @ weight.T + bias)``.

    Args:
        hidden_states: (num_tokens, in_features), float32, float16 or bfloat16.
        weight: (out_features, in_features), contiguous last dimension.
        bias: (out_features,) or None.
        activation: "gelu" (the exact, erf form), "gelu_tanh", "relu", "silu" or "tanh".

    Returns:
        (num_tokens, out_features) in hidden_states' dtype.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, stride, device or activation that does not fit.
    """
    check_activation(activation)
    _check_linear(hidden_states, weight, bias)
    return differentiably(linear_activation_unchecked, hidden_states, weight, bias, activation)


def linear_activation_unchecked(
    hidden_states: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, activation: Activation
) -> Tensor:
    """`linear_activation` of arguments that are known to fit; a packed weight holds its bias."""
    if isinstance(weight, PackedWeight):
        return packed_linear_unchecked(hidden_states, weight, activation)
    if not runs_triton(hidden_states):
        return cpu_product(hidden_states, weight, bias, activation)
    if activation == "gelu" and bias is not None and choices().library_products:
        return _gpu_gelu(hidden_states, weight, bias)
    return _gpu_product(hidden_states, weight, bias, activation)


def _gpu_gelu(hidden_states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    arch, (rows, in_features) = arch_of(hidden_states.device), hidden_states.shape
    tile = linear_gelu_tile(arch, hidden_states.dtype, rows, in_features, weight.shape[0])
    if tile.BY == "triton":
        return launch_linear(hidden_states, weight, bias, "gelu", tile)
    if tile.BY == "cublaslt":
        return torch._addmm_activation(bias, hidden_states, weight.t(), use_gelu=True)
    return F.gelu(F.linear(hidden_states, weight, bias))


@operator(
    "(Tensor rows, Tensor weight) -> Tensor",
    fake=lambda rows, weight: rows.new_empty(*rows.shape[:2], weight.shape[2]),
)
def linear_per_head(rows: Tensor, weight: Tensor) -> Tensor:
    """The product of each head's part of a row with the head's own matrix.

    Args:
        rows: (num_rows, nheads, in_features), contiguous last dimension.
        weight: (nheads, in_features, out_features), in rows' dtype.

    Returns:
        (num_rows, nheads, out_features).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, stride or device that does not fit.
    """
    check_tensor("rows", rows, "(num_rows, nheads, in_features)")
    check_tensor("weight", weight, "(nheads, in_features, out_features)", like=rows)
    if weight.shape[:2] != rows.shape[1:]:
        raise ValueError(f"weight must have shape {(*rows.shape[1:], 'out_features')}, got {tuple(weight.shape)}")
    check_last_dim_contiguous("rows", rows)
    return differentiably(linear_per_head_unchecked, rows, weight)


def linear_per_head_unchecked(rows: Tensor, weight: Tensor) -> Tensor:
    """`linear_per_head` of arguments that are known to fit."""
    if not runs_triton(rows):
        return cpu_product_per_head(rows, weight)
    if choices().library_products:
        return product_per_head(rows, weight)
    heads = zip(rows.unbind(1), weight.transpose(1, 2).contiguous(), strict=True)
    return torch.stack([_gpu_product(head, matrix, None, None) for head, matrix in heads], 1)


@overload
def linear_add_layer_norm(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    *,
    keep_sum: Literal[False] = False,
    rms: bool = False,
) -> Tensor: ...


@overload
def linear_add_layer_norm(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    *,
    keep_sum: Literal[True],
    rms: bool = False,
) -> tuple[Tensor, Tensor]: ...


@operator(
    "(Tensor hidden_states, Tensor weight, Tensor? bias, Tensor residual, Tensor norm_weight, Tensor? norm_bias, "
    "float eps, bool keep_sum, bool rms=False) -> Tensor[]",
    fake=lambda _x, _weight, _bias, residual, _norm_weight, _norm_bias, _eps, keep_sum, *_: fake_norm_and_sum(
        residual, residual.shape[0], keep_sum
    ),
)
def linear_add_layer_norm(
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer or RMS norm of ``hidden_states @ weight.T + bias + residual``, the end of each half of a layer.

    Args:
        hidden_states: (num_tokens, in_features), float32, float16 or bfloat16.
        weight: (out_features, in_features).
        bias, norm_bias: (out_features,) or None.
        residual: (num_tokens, out_features).
        norm_weight: (out_features,).
        eps: added to the variance, or to the mean of squares.
        keep_sum: whether to return the sum as well, as a pre-norm encoder needs it.
        rms: whether to divide each row by its root mean square alone, without centring it.

    Returns:
        (num_tokens, out_features) in hidden_states' dtype; with keep_sum a pair of these, the norm and the sum before
        it.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, stride or device that does not fit.
    """
    _check_linear(hidden_states, weight, bias)
    check_tensor("residual", residual, "(num_tokens, out_features)", like=hidden_states)
    if residual.shape != (hidden_states.shape[0], weight.shape[0]):
        raise ValueError(
            f"residual must have shape ({hidden_states.shape[0]}, {weight.shape[0]}), got {tuple(residual.shape)}"
        )
    check_last_dim_contiguous("residual", residual)
    check_norm(norm_weight, norm_bias, weight.shape[0], hidden_states)
    normed, summed = differentiably(
        linear_add_layer_norm_unchecked,
        *(hidden_states, weight, bias, residual, norm_weight, norm_bias, eps),
        keep_sum=keep_sum,
        rms=rms,
    )
    return (normed, summed) if keep_sum else normed


def linear_add_layer_norm_unchecked(
    hidden_states: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    *,
    keep_sum: bool = False,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """`linear_add_layer_norm` of arguments that are known to fit: the normed rows, and what the next half adds to.

    That is the sum where it is kept, else the normed rows again. A packed weight holds its bias.
    """
    if isinstance(weight, PackedWeight) or not runs_triton(hidden_states):
        if isinstance(weight, PackedWeight):
            summed = packed_linear_unchecked(hidden_states, weight, residual=residual)
        else:
            summed = cpu_product(hidden_states, weight, bias, residual=residual)
        normed = cpu_norm(summed, norm_weight, norm_bias, eps, rms=rms)
        return normed, summed if keep_sum else normed
    arch, (rows, in_features) = arch_of(hidden_states.device), hidden_states.shape
    tile = linear_norm_tile(arch, hidden_states.dtype, rows, in_features, weight.shape[0])
    if tile.BY == "torch" or not choices().library_products:
        parts = _gpu_product(hidden_states, weight, None, None).unsqueeze(1)
    else:
        parts = launch_split_linear(hidden_states, weight, tile)
    # Frees the feed-forward's rows, four times as wide as the others, where the caller holds them no longer.
    del hidden_states
    return launch_sum_add_layer_norm(
        parts, bias, residual, None, norm_weight, norm_bias, eps, keep_sum=keep_sum, rms=rms
    )
