"""Matrix products: f(x weightᵀ + bias) in one kernel, and what cuBLAS or oneDNN does best: the plain product, and
activations after it.

One program makes a BLOCK_M x BLOCK_N tile of the output, adds the bias and applies the activation while the sums are
still in float32 registers. Programs walk the output in groups of rows, so that those running at the same time share
their weights in the second-level cache. Whether that or a library's product is the faster one depends on the chip and
the shape, and stands in its table (tuning.py), measured with a GELU behind it. With `batch_invariant` the kernel makes
every product, in one tile.
"""

from __future__ import annotations

import functools
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .._tracing import traceable
from ..layer_norm import check_norm, check_vector, launch_sum_add_layer_norm
from ..runtime.activations import Activation, activate_, activated, check_activation
from ..runtime.backend import device_guard, runs_triton
from ..runtime.checks import check_last_dim_contiguous, check_tensor
from ..runtime.invariance import in_blocks, in_pieces_, is_batch_invariant
from ..runtime.tile_tables import GeluTile, arch_of, invariant_linear_tile, linear_gelu_tile, linear_norm_tile
from ..runtime.tma import descriptor, is_aligned
from ..runtime.triton import cdiv, jit, tl
from .split import launch_split_linear


@jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x_ptr,
    weight_ptr,
    x_desc,
    weight_desc,
    bias_ptr,
    out_ptr,
    num_rows,
    stride_xm,
    stride_wn,
    stride_om,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TMA: tl.constexpr,
):
    program = tl.program_id(0)
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    column_tiles = tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * column_tiles)
    group_rows = tl.minimum(row_tiles - group * GROUP_M, GROUP_M)
    in_group = program % (GROUP_M * column_tiles)
    first_row = (group * GROUP_M + in_group % group_rows) * BLOCK_M
    first_column = (in_group // group_rows) * BLOCK_N
    offs_m = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    offs_n = first_column.to(tl.int64) + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    in_rows = offs_m < num_rows
    in_columns = offs_n < N

    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]
    weight_ptrs = weight_ptr + offs_n[:, None] * stride_wn + offs_k[None, :]
    # [BLOCK_M, BLOCK_N]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if TMA:
            # Zero beyond the last row and column.
            x = x_desc.load([first_row, k])
            weight = weight_desc.load([first_column, k])
        else:
            in_k = offs_k < K - k
            # [BLOCK_M, BLOCK_K]
            x = tl.load(x_ptrs, mask=in_rows[:, None] & in_k[None, :], other=0.0)
            # [BLOCK_N, BLOCK_K]
            weight = tl.load(weight_ptrs, mask=in_columns[:, None] & in_k[None, :], other=0.0)
            x_ptrs += BLOCK_K
            weight_ptrs += BLOCK_K
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION is not None:
        acc = activated(acc, ACTIVATION)
    tl.store(
        out_ptr + offs_m[:, None] * stride_om + offs_n[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=in_rows[:, None] & in_columns[None, :],
    )


def _launch_linear(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None, tile: GeluTile
) -> Tensor:
    num_rows, in_features = hidden_states.shape
    out_features = weight.shape[0]
    out = hidden_states.new_empty(num_rows, out_features)
    if out.numel() == 0:
        return out
    tma = tile.TMA and is_aligned(hidden_states) and is_aligned(weight)
    with device_guard(hidden_states):
        _linear_kernel[(cdiv(num_rows, tile.BLOCK_M) * cdiv(out_features, tile.BLOCK_N),)](
            x_ptr=hidden_states,
            weight_ptr=weight,
            x_desc=descriptor(hidden_states, in_features, tile.BLOCK_M, tile.BLOCK_K) if tma else None,
            weight_desc=descriptor(weight, in_features, tile.BLOCK_N, tile.BLOCK_K) if tma else None,
            bias_ptr=bias,
            out_ptr=out,
            num_rows=num_rows,
            stride_xm=hidden_states.stride(0),
            stride_wn=weight.stride(0),
            stride_om=out.stride(0),
            N=out_features,
            K=in_features,
            BLOCK_M=tile.BLOCK_M,
            BLOCK_N=tile.BLOCK_N,
            BLOCK_K=tile.BLOCK_K,
            GROUP_M=8,
            ACTIVATION=activation,
            TMA=tma,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
    return out


# Where MKL overtakes oneDNN on a CPU with AVX2: between 256 and 512 rows at BERT-base's and MiniLM's widths.
_AVX2_ONEDNN_ROWS = 256


def _has_avx2_and_mkl() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX2" and torch.backends.mkl.is_available()


def uses_onednn(tensor: Tensor) -> bool:
    """Whether a CPU product over the rows of ``tensor``, (num_tokens, in_features), goes to oneDNN directly.

    PyTorch's own float32 ``linear`` goes to MKL or OpenBLAS. With AVX-512 oneDNN is faster, by a third on an AMD Zen 4,
    and its GELU is fused. With AVX2, on an AMD Zen 3, it is faster for few rows only, and its fused GELU takes longer
    than a pass of its own. The operator is the one that torch.compile emits.
    """
    if _has_avx2_and_mkl() and tensor.shape[0] > _AVX2_ONEDNN_ROWS:
        return False
    return bool(
        tensor.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (
            tensor.dtype == torch.float32
            or (tensor.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    )


# What oneDNN calls an activation, and which form of it; but for its ReLU, which gives 0 for NaN.
_ONEDNN_NAMES: dict[Activation | None, tuple[str, str]] = {
    None: ("none", "none"),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", "none"),
    "tanh": ("tanh", "none"),
}


def _onednn_linear(hidden_states: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
    if activation == "relu":
        return _onednn_linear(hidden_states, weight, bias, None).relu_()
    name, form = _ONEDNN_NAMES[activation]
    out: Tensor = torch.ops.mkldnn._linear_pointwise(hidden_states, weight, bias, name, [], form)
    return out


def _product(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None = None
) -> Tensor:
    """The product, and the activation after it."""
    if not is_batch_invariant():
        return _library_product(hidden_states, weight, bias, activation)
    if runs_triton(hidden_states):
        tile = invariant_linear_tile(arch_of(hidden_states.device), hidden_states.dtype)
        return _launch_linear(hidden_states, weight, bias, activation, tile)
    if uses_onednn(hidden_states[:1]):
        # Fused even where a pass of its own would be faster: that pass would need care of its own, too.
        return in_blocks(
            lambda rows, weight, bias: _onednn_linear(rows, weight, bias, activation),
            *(hidden_states, weight, bias),
            name=f"oneDNN product with activation {activation}",
        )
    made = in_blocks(F.linear, hidden_states, weight, bias, name="product")
    return made if activation is None else in_pieces_(functools.partial(activate_, activation), made)


def _library_product(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None
) -> Tensor:
    if uses_onednn(hidden_states) and hidden_states.shape[0] > 0:
        if activation is None or not _has_avx2_and_mkl():
            return _onednn_linear(hidden_states, weight, bias, activation)
        product = _onednn_linear(hidden_states, weight, bias, None)
    else:
        product = F.linear(hidden_states, weight, bias)
    # Nobody else holds the product.
    return product if activation is None else activate_(activation, product)


@traceable
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
    return _product(hidden_states, weight, bias)


@traceable
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
    if runs_triton(hidden_states) and not is_batch_invariant():
        arch, (rows, in_features) = arch_of(hidden_states.device), hidden_states.shape
        tile = linear_gelu_tile(arch, hidden_states.dtype, rows, in_features, weight.shape[0])
        return _gelu_by_tile(hidden_states, weight, bias, tile)
    return _product(hidden_states, weight, bias, "gelu")


def _gelu_by_tile(hidden_states: Tensor, weight: Tensor, bias: Tensor, tile: GeluTile) -> Tensor:
    if tile.BY == "triton":
        return _launch_linear(hidden_states, weight, bias, "gelu", tile)
    if tile.BY == "cublaslt":
        return torch._addmm_activation(bias, hidden_states, weight.t(), use_gelu=True)
    return F.gelu(F.linear(hidden_states, weight, bias))


@traceable
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
    if activation == "gelu" and bias is not None:
        return linear_gelu(hidden_states, weight, bias)
    _check_linear(hidden_states, weight, bias)
    return _product(hidden_states, weight, bias, activation)


@traceable
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
    if not is_batch_invariant():
        return _product_per_head(rows, weight)
    if runs_triton(rows):
        heads = zip(rows.unbind(1), weight.transpose(1, 2).contiguous(), strict=True)
        return torch.stack([_product(head, matrix, None) for head, matrix in heads], 1)
    return in_blocks(_product_per_head, rows, weight, name="product per head")


def _product_per_head(rows: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(rows.transpose(0, 1), weight).transpose(0, 1)


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
) -> tuple[Tensor, Tensor]: ...


@traceable
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
) -> Tensor | tuple[Tensor, Tensor]:
    """``layer_norm(hidden_states @ weight.T + bias + residual)``: what ends each half of a layer.

    Args:
        hidden_states: (num_tokens, in_features), float32, float16 or bfloat16.
        weight: (out_features, in_features).
        bias, norm_bias: (out_features,) or None.
        residual: (num_tokens, out_features).
        norm_weight: (out_features,).
        eps: added to the variance.
        keep_sum: whether the sum is wanted as well, as in a pre-norm encoder.

    Returns:
        (num_tokens, out_features) in hidden_states' dtype; with keep_sum a pair of these, the layer norm and the sum
        that it was taken of.

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
    if runs_triton(hidden_states):
        arch, (rows, in_features) = arch_of(hidden_states.device), hidden_states.shape
        tile = linear_norm_tile(arch, hidden_states.dtype, rows, in_features, weight.shape[0])
        if tile.BY == "torch" or is_batch_invariant():
            parts = _product(hidden_states, weight, None).unsqueeze(1)
        else:
            parts = launch_split_linear(hidden_states, weight, tile)
        # Four times as wide as the rest behind a GELU, and nobody else's there.
        del hidden_states
        normed, summed = launch_sum_add_layer_norm(
            parts, bias, residual, None, norm_weight, norm_bias, eps, keep_sum=keep_sum
        )
        return normed if summed is None else (normed, summed)
    if uses_onednn(hidden_states) and hidden_states.shape[0] > 0 and not is_batch_invariant():
        # While the product is still in registers.
        summed = torch.ops.mkldnn._linear_pointwise.binary(hidden_states, residual, weight, bias, "add")
    else:
        # Nobody else holds the product, so that the residual can be added to it in place.
        summed = _product(hidden_states, weight, bias).add_(residual)
    normed = F.layer_norm(summed, (weight.shape[0],), norm_weight, norm_bias, eps)
    return (normed, summed) if keep_sum else normed


def _check_linear(hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensor("hidden_states", hidden_states, "(num_tokens, in_features)")
    check_tensor("weight", weight, "(out_features, in_features)", like=hidden_states)
    if weight.shape[1] != hidden_states.shape[1]:
        raise ValueError(f"weight must have shape (out_features, {hidden_states.shape[1]}), got {tuple(weight.shape)}")
    if bias is not None:
        check_vector("bias", bias, weight.shape[0], hidden_states)
    check_last_dim_contiguous("hidden_states", hidden_states)
    check_last_dim_contiguous("weight", weight)
