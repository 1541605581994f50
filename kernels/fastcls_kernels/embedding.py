"""The input of an encoder in one pass: out = LayerNorm(word[id] + type[type_id] + position[position_id]).

One program gathers the three rows of one token and normalises their sum in float32. Types are optional, and so are
positions, which some encoders leave to their attention. The norm may be RMS norm, or none.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._ops import operator
from .layer_norm import check_norm, check_width, cpu_norm, norm_warps, normalise_row
from .runtime.backend import device_guard, runs_triton
from .runtime.checks import check_device, check_integers, check_range, check_tensor
from .runtime.gradients import differentiably
from .runtime.triton import jit, next_power_of_2, tl


@jit()
def _embedding_layer_norm_kernel(
    token_ids_ptr,  # (num_tokens,)
    position_ids_ptr,  # (num_tokens,) or None
    token_type_ids_ptr,  # (num_tokens,) or None
    word_ptr,  # (vocab_size, WIDTH)
    position_ptr,  # (max_positions, WIDTH) or None
    token_type_ptr,  # (type_vocab_size, WIDTH) or None
    weight_ptr,  # (WIDTH,) or None
    norm_bias_ptr,  # (WIDTH,) or None
    out_ptr,  # (num_tokens, WIDTH)
    eps,
    HAS_POSITIONS: tl.constexpr,
    HAS_TYPES: tl.constexpr,
    HAS_TYPE_IDS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    RMS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    offs_w = tl.arange(0, BLOCK_W)
    in_width = offs_w < WIDTH
    token_id = tl.load(token_ids_ptr + token).to(tl.int64)
    if HAS_POSITIONS:
        position_id = tl.load(position_ids_ptr + token).to(tl.int64)
    # [BLOCK_W]
    row = tl.load(word_ptr + token_id * WIDTH + offs_w, mask=in_width, other=0.0).to(tl.float32)
    if HAS_TYPE_IDS:
        token_type_ptr += tl.load(token_type_ids_ptr + token).to(tl.int64) * WIDTH
    if HAS_TYPES:
        row += tl.load(token_type_ptr + offs_w, mask=in_width, other=0.0).to(tl.float32)
    if HAS_POSITIONS:
        row += tl.load(position_ptr + position_id * WIDTH + offs_w, mask=in_width, other=0.0).to(tl.float32)
    if HAS_NORM:
        row = normalise_row(row, weight_ptr, norm_bias_ptr, offs_w, in_width, eps, HAS_NORM_BIAS, RMS, WIDTH)
    tl.store(out_ptr + token * WIDTH + offs_w, row.to(out_ptr.dtype.element_ty), mask=in_width)


def _launch_embedding_layer_norm(
    token_ids: Tensor,  # (num_tokens,)
    position_ids: Tensor | None,  # (num_tokens,)
    token_type_ids: Tensor | None,  # (num_tokens,)
    word_table: Tensor,  # (vocab_size, width)
    position_table: Tensor | None,  # (max_positions, width)
    token_type_table: Tensor | None,  # (type_vocab_size, width)
    weight: Tensor | None,  # (width,)
    norm_bias: Tensor | None,  # (width,)
    eps: float,
    *,
    rms: bool = False,
) -> Tensor:
    """(num_tokens, width) in word_table's dtype."""
    num_tokens, width = token_ids.shape[0], word_table.shape[1]
    out = word_table.new_empty(num_tokens, width)
    if out.numel() == 0:
        return out
    with device_guard(out):
        _embedding_layer_norm_kernel[(num_tokens,)](
            token_ids_ptr=token_ids,
            position_ids_ptr=position_ids,
            token_type_ids_ptr=token_type_ids,
            word_ptr=word_table,
            position_ptr=position_table,
            token_type_ptr=token_type_table,
            weight_ptr=weight,
            norm_bias_ptr=norm_bias,
            out_ptr=out,
            eps=eps,
            HAS_POSITIONS=position_table is not None,
            HAS_TYPES=token_type_table is not None,
            HAS_TYPE_IDS=token_type_ids is not None,
            HAS_NORM=weight is not None,
            HAS_NORM_BIAS=norm_bias is not None,
            RMS=rms,
            WIDTH=width,
            BLOCK_W=next_power_of_2(width),
            num_warps=norm_warps(width),
            enable_fp_fusion=True,
        )
    return out


@operator(
    "(Tensor token_ids, Tensor? position_ids, Tensor? token_type_ids, Tensor word_table, Tensor? position_table, "
    "Tensor? token_type_table, Tensor? weight, Tensor? norm_bias, float eps, bool rms=False) -> Tensor",
    fake=lambda token_ids, _positions, _types, word_table, *_: word_table.new_empty(
        token_ids.shape[0], word_table.shape[1]
    ),
)
def embedding_layer_norm(
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
    """Layer norm of the sum of word, token type and position embeddings, or RMS norm, or the sum alone.

    Args:
        token_ids: (num_tokens,), int32 or int64.
        position_ids: the same; not read without a position_table, and may be None then.
        token_type_ids: the same, or None for type 0 everywhere.
        word_table: (vocab_size, width), float32, float16 or bfloat16, contiguous, width up to 16,384.
        position_table: (max_positions, width), in word_table's dtype, or None.
        token_type_table: (type_vocab_size, width), in word_table's dtype, or None.
        weight: (width,), the norm's own, or None for the sum alone, without a norm.
        norm_bias: (width,) or None, the norm's own; None where there is no norm.
        eps: added to the variance, or to the mean of squares; not read without a norm.
        rms: whether to divide each row by its root mean square alone, without centring it; False without a norm.

    Returns:
        (num_tokens, width) in word_table's dtype.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, stride or device that does not fit, ids without a table or a table without ids,
            norm_bias or rms without a weight, or, on the CPU, an id outside its table. On a GPU ids are trusted, since
            checking them would stall the device: check them before they are sent there.
    """
    check_tensor("word_table", word_table, "(vocab_size, width)")
    for name, table in (
        ("word_table", word_table),
        ("position_table", position_table),
        ("token_type_table", token_type_table),
    ):
        if table is not None:
            _check_table(name, table, word_table)
    _check_ids("token_ids", token_ids, token_ids, word_table)
    if position_table is not None:
        if position_ids is None:
            raise ValueError("position_ids must be given where there is a position_table, got None")
        _check_ids("position_ids", position_ids, token_ids, position_table)
    if token_type_ids is not None:
        if token_type_table is None:
            shape = tuple(token_type_ids.shape)
            raise ValueError(f"token_type_ids must be None where there is no token_type_table, got shape {shape}")
        _check_ids("token_type_ids", token_type_ids, token_ids, token_type_table)
    if weight is not None:
        check_norm(weight, norm_bias, word_table.shape[1], word_table)
    else:
        check_width(word_table.shape[1])
        if norm_bias is not None:
            raise ValueError(f"norm_bias must be None where weight is None, got shape {tuple(norm_bias.shape)}")
        if rms:
            raise ValueError("rms must be False where weight is None, got True")
    return differentiably(
        embedding_layer_norm_unchecked,
        *(token_ids, position_ids, token_type_ids, word_table, position_table, token_type_table),
        *(weight, norm_bias, eps),
        rms=rms,
    )


def embedding_layer_norm_unchecked(
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
    """`embedding_layer_norm` of arguments that are known to fit."""
    if runs_triton(word_table):
        return _launch_embedding_layer_norm(
            *(token_ids, position_ids, token_type_ids, word_table, position_table, token_type_table),
            *(weight, norm_bias, eps),
            rms=rms,
        )
    summed = F.embedding(token_ids, word_table)
    if token_type_table is not None:
        summed += token_type_table[0] if token_type_ids is None else F.embedding(token_type_ids, token_type_table)
    if position_ids is not None and position_table is not None:
        summed += F.embedding(position_ids, position_table)
    return summed if weight is None else cpu_norm(summed, weight, norm_bias, eps, rms=rms)


def _check_table(name: str, table: Tensor, word_table: Tensor) -> None:
    check_tensor(name, table, "(rows, width)", like=word_table)
    if table.shape[1] != word_table.shape[1] or not table.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, of shape (rows, {word_table.shape[1]}), "
            f"got shape {tuple(table.shape)} with strides {table.stride()}"
        )


def _check_ids(name: str, ids: Tensor, token_ids: Tensor, table: Tensor) -> None:
    check_integers(name, ids)
    if ids.ndim != 1 or ids.shape != token_ids.shape or not ids.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, of shape (num_tokens,), the same as token_ids, got {tuple(ids.shape)}"
        )
    check_device(name, ids, table)
    check_range(name, ids, table.shape[0])
