"""Compiles launches of one chip ahead of time and prints what the compiler made of them, as JSON.

    python tests/aot_worker.py sm_90 < cases.json

The cases are a list of names, all there are where it is empty.

The package's own launchers run, on tensors without memory and with a driver that only names the chip. So triton
specialises each argument exactly as it would on a GPU, and the constants, tiles and options are those that ship.
A process of its own because triton's interpreter, where it is on, takes the place of its compiler.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from fastcls_kernels import AddNorm, Buckets, PackedLayout, batch_invariant
from fastcls_kernels.absorb_query import _launch_absorb_query
from fastcls_kernels.attention import kernel as attention
from fastcls_kernels.cls_attention import absorbed, key_value
from fastcls_kernels.cls_output import _launch_cls_output
from fastcls_kernels.disentangled_attention import kernel as disentangled_attention
from fastcls_kernels.disentangled_attention.buckets import DistanceTables
from fastcls_kernels.embedding import _launch_embedding_layer_norm
from fastcls_kernels.gated_activation import _launch_gated_activation
from fastcls_kernels.layer_norm import launch_sum_add_layer_norm
from fastcls_kernels.linear.kernel import launch_linear
from fastcls_kernels.linear.split import launch_split_linear
from fastcls_kernels.mean_pool import _launch_mean_pool
from fastcls_kernels.pooler_classifier import _launch_pooler_classifier
from fastcls_kernels.rotary import _launch_rotary
from fastcls_kernels.runtime import backend, tile_tables
from fastcls_kernels.runtime.activations import Activation
from fastcls_kernels.runtime.tile_tables import (
    disentangled_tile,
    invariant_linear_tile,
    linear_gelu_tile,
    linear_norm_tile,
    rows_tile,
    rules_of,
)
from fastcls_kernels.training import cls_kernel as cls_training
from fastcls_kernels.training import disentangled_kernel
from fastcls_kernels.training.activation_kernel import launch_activation, launch_activation_backward
from fastcls_kernels.training.attention_kernel import launch_attention_backward, launch_attention_forward
from fastcls_kernels.training.dropout import Dropout
from fastcls_kernels.training.embedding_kernel import launch_embedding_forward, launch_table_gradient
from fastcls_kernels.training.norm_kernel import launch_add_norm, launch_drop, launch_norm_backward


class Model(NamedTuple):
    """The shapes of one encoder."""

    hidden: int
    heads: int
    ffn: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


MODELS = {
    "bert_base": Model(hidden=768, heads=12, ffn=3072),
    "bert_large": Model(hidden=1024, heads=16, ffn=4096),
    "minilm": Model(hidden=384, heads=12, ffn=1536),
    "wide_heads": Model(hidden=2048, heads=16, ffn=8192),
}
# Not in every shape: of heads of 8.
TINY = Model(hidden=32, heads=4, ffn=128)
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SEQUENCES = 32
# Beyond every limit of a rule.
MANY_ROWS = 65536


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without memory, whose address counts as aligned like that of a real one."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def packing(total_tokens: int) -> PackedLayout:
    return PackedLayout(tensor(SEQUENCES + 1, dtype=torch.int32), max_seqlen=512, total_tokens=total_tokens)


def launch_attention(_arch: str, model: Model, dtype: torch.dtype, mean_seqlen: int, aligned: bool = True) -> None:
    layout = packing(SEQUENCES * mean_seqlen)
    # Queries, keys and values as views of one fused projection, or as the copy engine cannot take them.
    width = model.head_dim if aligned else model.head_dim + 1
    q, k, v = tensor(layout.total_tokens, 3, model.heads, width, dtype=dtype)[..., : model.head_dim].unbind(1)
    attention.launch_attention(q, k, v, layout, 0.125, attention.choose_tile(q, k, v, layout))


def launch_disentangled_attention(arch: str, model: Model, dtype: torch.dtype, terms: tuple[bool, bool]) -> None:
    layout, tile = packing(4096), disentangled_tile(arch, dtype, model.head_dim)
    q, k, v = tensor(4096, 3, model.heads, model.head_dim, dtype=dtype).unbind(1)
    table = tensor(512, model.heads, model.head_dim, dtype=dtype)
    pos_key, pos_query = (table if term else None for term in terms)
    tables = DistanceTables(pos_key, pos_query, Buckets(tensor(511, dtype=torch.int32), tuple(range(511))))
    disentangled_attention.launch_disentangled_attention(q, k, v, tables, layout, 0.07, tile)


def launch_trained_disentangled_attention(
    _arch: str, model: Model, dtype: torch.dtype, terms: tuple[bool, bool], dropout: Dropout | None = None
) -> None:
    layout = packing(4096)
    q, k, v = tensor(4096, 3, model.heads, model.head_dim, dtype=dtype).unbind(1)
    table = tensor(512, model.heads, model.head_dim, dtype=dtype)
    pos_key, pos_query = (table if term else None for term in terms)
    tables = DistanceTables(pos_key, pos_query, Buckets(tensor(511, dtype=torch.int32), tuple(range(511))))
    scoring = (tables, layout, 0.07, dropout)
    out, statistics = disentangled_kernel.launch_disentangled_forward(q, k, v, *scoring)
    grads = tensor(4096, 3, model.heads, model.head_dim, dtype=dtype)
    into = (grads[:, 0], grads[:, 1], grads[:, 2])
    disentangled_kernel.launch_disentangled_backward(out, q, k, v, out, statistics, *scoring, into=into)


def launch_attention_with_bias(
    _arch: str, model: Model, dtype: torch.dtype, mean_seqlen: int, has_positions: bool
) -> None:
    layout = packing(SEQUENCES * mean_seqlen)
    positions = tensor(layout.total_tokens, dtype=torch.int32) if has_positions else None
    q, k, v = tensor(layout.total_tokens, 3, model.heads, model.head_dim, dtype=dtype).unbind(1)
    bias = tensor(model.heads, 257, dtype=torch.float32)
    tile = attention.choose_tile(q, k, v, layout, biased=True)
    attention.launch_attention(q, k, v, layout, 0.125, tile, bias=bias, positions=positions)


def launch_attention_in_window(_arch: str, model: Model, dtype: torch.dtype, biased: bool) -> None:
    layout, window = packing(SEQUENCES * 512), (64, 64)
    q, k, v = tensor(layout.total_tokens, 3, model.heads, model.head_dim, dtype=dtype).unbind(1)
    bias = tensor(model.heads, 257, dtype=torch.float32) if biased else None
    tile = attention.choose_tile(q, k, v, layout, window, biased)
    attention.launch_attention(q, k, v, layout, 0.125, tile, row_bounds=layout.window_bounds(*window), bias=bias)


def launch_grouped_attention(_arch: str, model: Model, dtype: torch.dtype) -> None:
    """Four heads of queries for each of keys, as views of one fused projection."""
    layout, heads_k = packing(SEQUENCES * 512), model.heads // 4
    qkv = tensor(layout.total_tokens, model.heads + 2 * heads_k, model.head_dim, dtype=dtype)
    q, k, v = qkv.split([model.heads, heads_k, heads_k], 1)
    attention.launch_attention(q, k, v, layout, 0.125, attention.choose_tile(q, k, v, layout))


def launch_rotary(_arch: str, model: Model, dtype: torch.dtype, interleaved: bool) -> None:
    """The queries and keys of a fused projection."""
    x = tensor(4096, 3 * model.heads, model.head_dim, dtype=dtype)[:, : 2 * model.heads]
    table = tensor(8192, model.head_dim // 2, dtype=torch.float32)
    _launch_rotary(x, tensor(4096, dtype=torch.int32), table, table, interleaved)


def launch_cls_attention(_arch: str, model: Model, dtype: torch.dtype, num_splits: int) -> None:
    query = tensor(SEQUENCES, model.heads, model.hidden, dtype=torch.float32)
    layout = packing(4096)
    absorbed.launch_cls_attention(query, tensor(4096, model.hidden, dtype=dtype), layout, 0.125, num_splits, None)


def launch_cls_attention_with_norm(_arch: str, model: Model, dtype: torch.dtype) -> None:
    """The tile that a table may choose where it is found to be faster; none does unmeasured."""
    x, vector = tensor(4096, model.hidden, dtype=dtype), tensor(model.hidden, dtype=dtype)
    query = tensor(SEQUENCES, model.heads, model.hidden, dtype=torch.float32)
    tile = {"NORM": True, "BLOCK_H": 16, "BLOCK_N": 16, "MAX_BLOCK_W": 256, "num_warps": 8, "num_stages": 2}
    with tile_tables.use_tile("cls_attention", tile):
        absorbed.launch_cls_attention(query, x, packing(4096), 0.125, 1, AddNorm(vector, x, vector, vector, 1e-12))


def launch_cls_attention_kv(_arch: str, model: Model, dtype: torch.dtype, num_splits: int, group: int = 1) -> None:
    k, v = tensor(4096, 2, model.heads // group, model.head_dim, dtype=dtype).unbind(1)
    query = tensor(SEQUENCES, model.heads, model.head_dim, dtype=dtype)
    key_value.launch_cls_attention_kv(query, k, v, packing(4096), 0.125, num_splits)


def launch_cls_attention_with_keys(_arch: str, model: Model, dtype: torch.dtype, biased: bool, group: int = 1) -> None:
    """Keys as a view of one fused projection, and queries in more bits than they have."""
    keys = tensor(4096, 3, model.heads // group, model.head_dim, dtype=dtype).unbind(1)[1]
    query = tensor(SEQUENCES, model.heads, model.head_dim, dtype=torch.float32)
    bias = tensor(4096, model.heads, dtype=torch.float32) if biased else None
    x = tensor(4096, model.hidden, dtype=dtype)
    absorbed.launch_cls_attention(query, x, packing(4096), 0.125, 1, None, keys, bias, None)


def launch_cls_attention_with_bias(_arch: str, model: Model, dtype: torch.dtype) -> None:
    query = tensor(SEQUENCES, model.heads, model.hidden, dtype=torch.float32)
    x, bias = tensor(4096, model.hidden, dtype=dtype), tensor(4096, model.heads, dtype=torch.float32)
    absorbed.launch_cls_attention(query, x, packing(4096), 0.125, 1, None, None, bias, None)


def launch_cls_attention_kv_with_bias(_arch: str, model: Model, dtype: torch.dtype) -> None:
    k, v = tensor(4096, 2, model.heads, model.head_dim, dtype=dtype).unbind(1)
    query = tensor(SEQUENCES, model.heads, model.head_dim, dtype=dtype)
    key_value.launch_cls_attention_kv(
        query, k, v, packing(4096), 0.125, 1, tensor(4096, model.heads, dtype=torch.float32), None
    )


def launch_cls_training(
    _arch: str, model: Model, dtype: torch.dtype, has_keys: bool = False, biased: bool = False, dropped: bool = True
) -> None:
    """Forward and backward; keys as a view of one fused projection, and without them absorbed queries, in float32."""
    layout, x = packing(4096), tensor(4096, model.hidden, dtype=dtype)
    query = tensor(SEQUENCES, model.heads, model.hidden, dtype=torch.float32)
    keys = None
    if has_keys:
        query = tensor(SEQUENCES, model.heads, model.head_dim, dtype=dtype)
        keys = tensor(4096, 3, model.heads, model.head_dim, dtype=dtype).unbind(1)[1]
    bias = tensor(4096, model.heads, dtype=torch.float32) if biased else None
    options: Any = {"keys": keys, "bias": bias, "dropout": Dropout(0.1, 1) if dropped else None}
    kept = cls_training.launch_cls_forward(query, x, layout, 0.125, **options)
    cls_training.launch_cls_backward(*kept[:2], query, x, *kept, layout, 0.125, **options)


def launch_cls_training_of_many_heads(arch: str, model: Model, dtype: torch.dtype) -> None:
    """As many heads as it takes, and fewer that are more than one product's."""
    for heads in (32, 64):
        launch_cls_training(arch, model._replace(heads=heads), dtype)


def launch_linear_gelu(arch: str, model: Model, dtype: torch.dtype, rows: int) -> None:
    tile = linear_gelu_tile(arch, dtype, rows, model.hidden, model.ffn)
    if tile.BY == "triton":
        weight, bias = tensor(model.ffn, model.hidden, dtype=dtype), tensor(model.ffn, dtype=dtype)
        launch_linear(tensor(rows, model.hidden, dtype=dtype), weight, bias, "gelu", tile)


def launch_invariant_linear(arch: str, model: Model, dtype: torch.dtype) -> None:
    """Every product of a layer: with a bias or without, and an activation or none."""
    tile = invariant_linear_tile(arch, dtype)
    up, down = (tensor(*shape, dtype=dtype) for shape in ((model.ffn, model.hidden), (model.hidden, model.ffn)))
    rows = tensor(4096, model.hidden, dtype=dtype)
    for activation in (None, "gelu"):
        launch_linear(rows, up, tensor(model.ffn, dtype=dtype), activation, tile)
    launch_linear(tensor(4096, model.ffn, dtype=dtype), down, None, None, tile)


def launch_linear_add_layer_norm(arch: str, model: Model, dtype: torch.dtype, rows: int) -> None:
    """The products of both halves of a layer, where they are ours, and the layer norm behind them."""
    residual, vector = tensor(rows, model.hidden, dtype=dtype), tensor(model.hidden, dtype=dtype)
    for in_features in (model.hidden, model.ffn):
        tile = linear_norm_tile(arch, dtype, rows, in_features, model.hidden)
        if tile.BY == "triton":
            weight = tensor(model.hidden, in_features, dtype=dtype)
            parts = launch_split_linear(tensor(rows, in_features, dtype=dtype), weight, tile)
        else:
            parts = residual.unsqueeze(1)
        launch_sum_add_layer_norm(parts, vector, residual, None, vector, vector, 1e-12)


def launch_absorb_query(arch: str, model: Model, dtype: torch.dtype, rows: int) -> None:
    first = tensor(rows, dtype=torch.int32)
    weight, vector = tensor(model.hidden, model.hidden, dtype=dtype), tensor(model.hidden, dtype=dtype)
    tile = rows_tile(arch, "absorb_query", dtype, rows)
    _launch_absorb_query(tensor(4096, model.hidden, dtype=dtype), first, weight, vector, weight, model.heads, tile)


def launch_cls_output(arch: str, model: Model, dtype: torch.dtype, rows: int) -> None:
    summed, first = tensor(rows, model.heads, model.hidden, dtype=torch.float32), tensor(rows, dtype=torch.int32)
    weight, vector = tensor(model.hidden, model.hidden, dtype=dtype), tensor(model.hidden, dtype=dtype)
    parts = _launch_cls_output(summed, weight, vector, weight, rows_tile(arch, "cls_output", dtype, rows))
    launch_sum_add_layer_norm(parts, vector, tensor(4096, model.hidden, dtype=dtype), first, vector, vector, 1e-12)


def launch_pooler_classifier(
    arch: str, model: Model, dtype: torch.dtype, rows: int, activation: Activation = "tanh"
) -> None:
    x, weight = tensor(rows, model.hidden, dtype=dtype), tensor(model.hidden, model.hidden, dtype=dtype)
    vector, labels = tensor(model.hidden, dtype=dtype), tensor(2, dtype=dtype)
    tile = rows_tile(arch, "pooler_classifier", dtype, rows)
    _launch_pooler_classifier(x, weight, vector, tensor(2, model.hidden, dtype=dtype), labels, activation, tile)


def launch_norms_without_biases(arch: str, model: Model, dtype: torch.dtype) -> None:
    """A pre-norm encoder's: the sum is kept, too, of one part and of the heads' of a [CLS] layer; and one alone."""
    x, vector = tensor(4096, model.hidden, dtype=dtype), tensor(model.hidden, dtype=dtype)
    launch_sum_add_layer_norm(x.unsqueeze(1), None, x, None, vector, None, 1e-5, keep_sum=True)
    launch_sum_add_layer_norm(x.unsqueeze(1), None, None, None, vector, None, 1e-5)
    summed, first = tensor(64, model.heads, model.hidden, dtype=torch.float32), tensor(64, dtype=torch.int32)
    weight = tensor(model.hidden, model.hidden, dtype=dtype)
    parts = _launch_cls_output(summed, weight, None, weight, rows_tile(arch, "cls_output", dtype, 64))
    launch_sum_add_layer_norm(parts, None, x, first, vector, None, 1e-5, keep_sum=True)


def launch_rms_norms(_arch: str, model: Model, dtype: torch.dtype) -> None:
    """A pre-norm encoder's, as `launch_norms_without_biases`; and of embeddings."""
    x, vector = tensor(4096, model.hidden, dtype=dtype), tensor(model.hidden, dtype=dtype)
    launch_sum_add_layer_norm(x.unsqueeze(1), None, x, None, vector, None, 1e-5, keep_sum=True, rms=True)
    launch_sum_add_layer_norm(x.unsqueeze(1), None, None, None, vector, vector, 1e-5, rms=True)
    parts = tensor(64, model.heads, model.hidden, dtype=torch.float32)
    first = tensor(64, dtype=torch.int32)
    launch_sum_add_layer_norm(parts, None, x, first, vector, None, 1e-5, keep_sum=True, rms=True)
    ids, words = tensor(4096, dtype=torch.int32), tensor(30522, model.hidden, dtype=dtype)
    _launch_embedding_layer_norm(ids, None, None, words, None, None, vector, None, 1e-5, rms=True)


def launch_trained_norm(
    _arch: str, model: Model, dtype: torch.dtype, rms: bool = False, autocast: bool = False, is_embedding: bool = False
) -> None:
    """Forward and backward of a pre-norm encoder's, whose sum has a gradient of its own, or of embeddings."""
    x, dropout = tensor(4096, model.hidden, dtype=dtype), Dropout(0.1, 1)
    wide = x.float() if autocast else x
    vector = tensor(model.hidden, dtype=wide.dtype)
    residual = None if is_embedding else wide
    normed, summed, mean, rstd = launch_add_norm(x, residual, dropout, vector, vector, 1e-5, rms)
    launch_norm_backward(
        *(normed, residual, summed, mean, rstd, vector, dropout, rms), has_norm_bias=not rms, x_dtype=dtype
    )


def launch_trained_norm_without_dropout(_arch: str, model: Model, dtype: torch.dtype) -> None:
    x, vector = tensor(4096, model.hidden, dtype=dtype), tensor(model.hidden, dtype=dtype)
    for residual in (x, None):
        normed, summed, mean, rstd = launch_add_norm(x, residual, None, vector, None, 1e-5, False)
        launch_norm_backward(normed, None, summed, mean, rstd, vector, None, False, has_norm_bias=False, x_dtype=dtype)


def launch_trained_drop(_arch: str, model: Model, dtype: torch.dtype) -> None:
    launch_drop(tensor(4096, model.hidden, dtype=dtype), Dropout(0.1, 1))


def launch_trained_embedding(_arch: str, model: Model, dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
    ids = tensor(4096, dtype=ids_dtype)
    words, positions, types = (tensor(rows, model.hidden, dtype=dtype) for rows in (30522, 512, 2))
    summed = launch_embedding_forward(ids, ids, ids, words, positions, types)
    launch_table_gradient(ids, summed, 30522, 0)


def launch_trained_activation(_arch: str, model: Model, dtype: torch.dtype, activation: Activation) -> None:
    grad, up = tensor(4096, model.ffn, dtype=dtype), tensor(4096, 2 * model.ffn, dtype=dtype)
    launch_activation(grad, activation, False)
    launch_activation_backward(grad, grad, activation, False)
    launch_activation_backward(grad, up, activation, True)


def launch_gated_activation(_arch: str, model: Model, dtype: torch.dtype, activation: Activation) -> None:
    _launch_gated_activation(tensor(4096, 2 * model.ffn, dtype=dtype), activation)


def launch_mean_pool(_arch: str, model: Model, dtype: torch.dtype) -> None:
    _launch_mean_pool(tensor(4096, model.hidden, dtype=dtype), packing(4096))


def launch_embedding_of_words_alone(_arch: str, model: Model, dtype: torch.dtype) -> None:
    ids, vector = tensor(4096, dtype=torch.int32), tensor(model.hidden, dtype=dtype)
    words = tensor(30522, model.hidden, dtype=dtype)
    _launch_embedding_layer_norm(ids, None, None, words, None, None, vector, None, 1e-5)


def launch_embedding_without_a_norm(_arch: str, model: Model, dtype: torch.dtype) -> None:
    ids = tensor(4096, dtype=torch.int32)
    words, positions = (tensor(rows, model.hidden, dtype=dtype) for rows in (30522, 512))
    _launch_embedding_layer_norm(ids, ids, None, words, positions, None, None, None, 1e-5)


def launch_embedding_layer_norm(_arch: str, model: Model, dtype: torch.dtype, has_types: bool) -> None:
    ids, vector = tensor(4096, dtype=torch.int32), tensor(model.hidden, dtype=dtype)
    words, positions, types = (tensor(rows, model.hidden, dtype=dtype) for rows in (30522, 512, 2))
    type_ids = ids if has_types else None
    _launch_embedding_layer_norm(ids, ids, type_ids, words, positions, types, vector, vector, 1e-12)


def launch_trained_attention(
    _arch: str,
    model: Model,
    dtype: torch.dtype,
    *,
    window: tuple[int, int] = attention.NO_WINDOW,
    biased: bool = False,
    has_positions: bool = False,
    group: int = 1,
    dropped: bool = True,
) -> None:
    """Forward and backward passes, over views of one fused projection and into those of another."""
    layout = packing(SEQUENCES * 128)
    layout.positions = tensor(layout.total_tokens, dtype=torch.int32) if has_positions else None
    sizes = [model.heads, *([model.heads // group] * 2)]
    q, k, v = tensor(layout.total_tokens, sum(sizes), model.head_dim, dtype=dtype).split(sizes, 1)
    grads = tensor(layout.total_tokens, sum(sizes), model.head_dim, dtype=dtype).split(sizes, 1)
    bias = tensor(model.heads, 257, dtype=torch.float32) if biased else None
    scoring = (layout, 0.125, window, bias, Dropout(0.1, seed=1) if dropped else None)
    out, statistics = launch_attention_forward(q, k, v, *scoring)
    launch_attention_backward(out, q, k, v, out, statistics, *scoring, into=(grads[0], grads[1], grads[2]))


def launch_small_heads(arch: str, model: Model, dtype: torch.dtype) -> None:
    """Every kernel that multiplies heads, of fewer columns than NVIDIA's smallest product has."""
    launch_attention(arch, model, dtype, mean_seqlen=16)
    launch_trained_attention(arch, model, dtype, biased=True)
    launch_disentangled_attention(arch, model, dtype, terms=(True, True))
    launch_cls_attention_with_keys(arch, model, dtype, biased=False)
    launch_cls_attention_kv(arch, model, dtype, num_splits=1)
    launch_absorb_query(arch, model, dtype, rows=64)
    launch_cls_output(arch, model, dtype, rows=64)


def invariant(launch: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """A launch as `batch_invariant` makes it."""
    with batch_invariant():
        launch(*arguments, **options)


# Operations whose tile depends on a number, its name in the rules.
BY_NUMBER: dict[str, tuple[Callable[..., None], str]] = {
    "attention": (launch_attention, "mean_seqlen"),
    "linear_gelu": (launch_linear_gelu, "rows"),
    "linear_add_layer_norm": (launch_linear_add_layer_norm, "rows"),
    "absorb_query": (launch_absorb_query, "rows"),
    "cls_output": (launch_cls_output, "rows"),
    "pooler_classifier": (launch_pooler_classifier, "rows"),
}
OTHERS: dict[tuple[str, str], Callable[..., None]] = {
    ("attention", "unaligned"): functools.partial(launch_attention, mean_seqlen=512, aligned=False),
    # Of each schedule, and of each size of tiles.
    ("attention", "bias_token_tiles"): functools.partial(
        launch_attention_with_bias, mean_seqlen=16, has_positions=False
    ),
    ("attention", "bias_128"): functools.partial(launch_attention_with_bias, mean_seqlen=128, has_positions=False),
    ("attention", "bias_512"): functools.partial(launch_attention_with_bias, mean_seqlen=512, has_positions=False),
    ("attention", "bias_positions_token_tiles"): functools.partial(
        launch_attention_with_bias, mean_seqlen=16, has_positions=True
    ),
    ("attention", "bias_positions_128"): functools.partial(
        launch_attention_with_bias, mean_seqlen=128, has_positions=True
    ),
    ("attention", "bias_positions_512"): functools.partial(
        launch_attention_with_bias, mean_seqlen=512, has_positions=True
    ),
    ("attention", "window"): functools.partial(launch_attention_in_window, biased=False),
    ("attention", "window_and_bias"): functools.partial(launch_attention_in_window, biased=True),
    ("attention", "grouped"): launch_grouped_attention,
    ("attention", "invariant"): functools.partial(invariant, launch_attention, mean_seqlen=512),
    ("attention", "invariant_window"): functools.partial(invariant, launch_attention_in_window, biased=False),
    ("attention", "invariant_window_and_bias"): functools.partial(invariant, launch_attention_in_window, biased=True),
    ("disentangled_attention", "invariant"): functools.partial(
        invariant, launch_disentangled_attention, terms=(True, True)
    ),
    ("invariant_linear", "products"): functools.partial(invariant, launch_invariant_linear),
    ("rotary", "fused"): functools.partial(launch_rotary, interleaved=False),
    ("rotary", "interleaved"): functools.partial(launch_rotary, interleaved=True),
    ("cls_attention", "one_split"): functools.partial(launch_cls_attention, num_splits=1),
    ("cls_attention", "splits"): functools.partial(launch_cls_attention, num_splits=2),
    ("cls_attention", "with_norm"): launch_cls_attention_with_norm,
    ("cls_attention", "keys"): functools.partial(launch_cls_attention_with_keys, biased=False),
    ("cls_attention", "keys_and_bias"): functools.partial(launch_cls_attention_with_keys, biased=True),
    ("cls_attention", "grouped_keys"): functools.partial(launch_cls_attention_with_keys, biased=False, group=4),
    ("cls_attention", "bias"): launch_cls_attention_with_bias,
    ("cls_attention_kv", "bias"): launch_cls_attention_kv_with_bias,
    ("cls_attention_kv", "one_split"): functools.partial(launch_cls_attention_kv, num_splits=1),
    ("cls_attention_kv", "grouped"): functools.partial(launch_cls_attention_kv, num_splits=1, group=4),
    ("cls_attention_kv", "splits"): functools.partial(launch_cls_attention_kv, num_splits=2),
    ("cls_training", "absorbed"): launch_cls_training,
    ("cls_training", "no_dropout"): functools.partial(launch_cls_training, dropped=False),
    ("cls_training", "bias"): functools.partial(launch_cls_training, biased=True),
    ("cls_training", "keys"): functools.partial(launch_cls_training, has_keys=True),
    ("cls_training", "keys_and_bias"): functools.partial(launch_cls_training, has_keys=True, biased=True),
    ("cls_training", "many_heads"): launch_cls_training_of_many_heads,
    ("disentangled_attention", "both_terms"): functools.partial(launch_disentangled_attention, terms=(True, True)),
    ("disentangled_attention", "key_term"): functools.partial(launch_disentangled_attention, terms=(True, False)),
    ("disentangled_attention", "query_term"): functools.partial(launch_disentangled_attention, terms=(False, True)),
    ("trained_attention", "plain"): functools.partial(launch_trained_attention, dropped=False),
    ("trained_attention", "dropout"): launch_trained_attention,
    ("trained_attention", "bias"): functools.partial(launch_trained_attention, biased=True),
    ("trained_attention", "bias_positions"): functools.partial(
        launch_trained_attention, biased=True, has_positions=True
    ),
    ("trained_attention", "window"): functools.partial(launch_trained_attention, window=(64, 64)),
    ("trained_attention", "window_and_bias"): functools.partial(launch_trained_attention, window=(64, 64), biased=True),
    ("trained_attention", "grouped"): functools.partial(launch_trained_attention, group=4),
    ("trained_norm", "layer_norm"): launch_trained_norm,
    ("trained_norm", "rms"): functools.partial(launch_trained_norm, rms=True),
    ("trained_norm", "autocast"): functools.partial(launch_trained_norm, autocast=True),
    ("trained_norm", "embeddings"): functools.partial(launch_trained_norm, is_embedding=True),
    ("trained_norm", "no_dropout"): launch_trained_norm_without_dropout,
    ("trained_norm", "drop"): launch_trained_drop,
    ("trained_embedding", "int32"): functools.partial(launch_trained_embedding, ids_dtype=torch.int32),
    ("trained_embedding", "int64"): functools.partial(launch_trained_embedding, ids_dtype=torch.int64),
    ("trained_disentangled_attention", "both_terms"): functools.partial(
        launch_trained_disentangled_attention, terms=(True, True)
    ),
    ("trained_disentangled_attention", "dropout"): functools.partial(
        launch_trained_disentangled_attention, terms=(True, True), dropout=Dropout(0.1, 1)
    ),
    ("trained_disentangled_attention", "key_term"): functools.partial(
        launch_trained_disentangled_attention, terms=(True, False)
    ),
    ("trained_disentangled_attention", "query_term"): functools.partial(
        launch_trained_disentangled_attention, terms=(False, True)
    ),
    ("embedding_layer_norm", "types"): functools.partial(launch_embedding_layer_norm, has_types=True),
    ("embedding_layer_norm", "no_types"): functools.partial(launch_embedding_layer_norm, has_types=False),
    ("embedding_layer_norm", "words_alone"): launch_embedding_of_words_alone,
    ("embedding_layer_norm", "no_norm"): launch_embedding_without_a_norm,
    ("layer_norm", "no_biases"): launch_norms_without_biases,
    ("layer_norm", "rms"): launch_rms_norms,
    ("mean_pool", "columns"): launch_mean_pool,
    **{
        (operation, activation): functools.partial(launch, activation=activation)
        for operation, launch in (
            ("gated_activation", launch_gated_activation),
            ("trained_activation", launch_trained_activation),
            ("pooler_classifier", functools.partial(launch_pooler_classifier, rows=64)),
        )
        for activation in get_args(Activation)
    },
}


def launches(arch: str) -> dict[str, Callable[[], None]]:
    """Every launch of a chip by its name: for each rule of each operation a number that it is made for."""
    found: dict[str, Callable[[], None]] = {}
    for (name, model), (dtype_name, dtype) in itertools.product(MODELS.items(), DTYPES.items()):
        if dtype == torch.float32 and name != "bert_base":
            continue
        for operation, (launch, fact) in BY_NUMBER.items():
            if name == "wide_heads" and operation != "attention":
                continue
            limits = {rule.limits[fact] for rule in rules_of(arch, operation) if fact in rule.limits}
            # A multiple of 16 is compiled apart from other numbers where nothing keeps the compiler from it.
            for number in (*sorted(limits), MANY_ROWS // SEQUENCES if fact == "mean_seqlen" else MANY_ROWS):
                found[f"{operation}-{name}-{arch}-{dtype_name}-{number}"] = functools.partial(
                    launch, arch, model, dtype, number
                )
        for (operation, variant), launch in OTHERS.items():
            knows_wide_heads = variant == "invariant" or operation in (
                *("cls_attention", "disentangled_attention", "trained_disentangled_attention"),
                *("trained_norm", "trained_embedding", "trained_attention"),
            )
            if name == "wide_heads" and not knows_wide_heads:
                continue
            if variant in get_args(Activation) and name != "bert_base":
                # It knows nothing of the shape.
                continue
            if variant in ("key_term", "query_term") and name != "bert_base":
                # Each is part of both.
                continue
            if variant == "unaligned" and (dtype == torch.float32 or arch not in ("sm_90", "sm_100")):
                # It is as any other where the copy engine is not used.
                continue
            if variant == "with_norm" and (
                dtype == torch.float32 or model.hidden > 768 or arch not in ("sm_80", "sm_90", "sm_100")
            ):
                # Beyond that registers or shared memory do not suffice.
                continue
            found[f"{operation}-{name}-{arch}-{dtype_name}-{variant}"] = functools.partial(launch, arch, model, dtype)
    if not arch.startswith("gfx"):
        # AMD's products may have as few columns as they like.
        found[f"heads-tiny-{arch}-bf16-all"] = functools.partial(launch_small_heads, arch, TINY, torch.bfloat16)
    return found


class _NamesTheChip:
    """Stands in for triton's driver, which would ask a GPU."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def compile_only(arch: str) -> list[Any]:
    """From here on this process is on ``arch``, and a kernel launch adds its compiled kernel to the list returned."""
    # Not at the top: pytest reads this file's cases where triton is not installed, too.
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    triton.runtime.driver.set_active(_NamesTheChip(target))
    for name, module in sys.modules.items():
        if name.startswith("fastcls_kernels.") and hasattr(module, "arch_of"):
            vars(module)["arch_of"] = lambda _device: arch
    # Tensors without memory stand for a GPU's.
    backend._override.set("triton")
    compiled: list[Any] = []

    def launch(kernel: Any, grid: Any, **arguments: Any) -> None:
        found = kernel.warmup(grid=grid, **arguments)
        # Of the tile that products are made in.
        found.tile_rows = next((arguments[name] for name in ("BLOCK_M", "BLOCK_B", "BLOCK_H") if name in arguments), 0)
        compiled.append(found)

    triton.JITFunction.__getitem__ = lambda kernel, grid: functools.partial(launch, kernel, grid)
    return compiled


def resource_usage(cubin: bytes) -> str:
    """What a cubin takes of its chip, by the ``cuobjdump`` in triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def numbers(text: str, *names: str) -> list[int]:
    """The number after each name; a name that is missing is an error, never a zero."""
    found = {name: re.search(rf"(?<!\w){re.escape(name)}:\s*(\d+)", text) for name in names}
    missing = [name for name, match in found.items() if match is None]
    if missing:
        raise ValueError(f"no {', '.join(missing)} in:\n{text[-4000:]}")
    return [int(match.group(1)) for match in found.values() if match]


@functools.cache
def inspect(compiled: Any) -> dict[str, Any]:
    """What the compiler made of one kernel: registers, spills, memory and matrix instructions."""
    metadata, asm = compiled.metadata, compiled.asm
    if "cubin" in asm:
        # A spilled register lies on the stack: instructions need not be disassembled, which takes as long as compiling.
        registers, *spilled = numbers(resource_usage(asm["cubin"]), "REG", "STACK", "LOCAL")
        code = asm["ptx"]
    else:
        code = asm["amdgcn"]
        registers, *spilled = numbers(
            code, ".vgpr_count", ".vgpr_spill_count", ".sgpr_spill_count", ".private_segment_fixed_size"
        )
    return {
        "kernel": metadata.name,
        "num_warps": metadata.num_warps,
        "tile_rows": compiled.tile_rows,
        "num_stages": metadata.num_stages,
        "fp_fusion": metadata.enable_fp_fusion,
        "registers": registers,
        "spills": sum(spilled),
        "shared": metadata.shared,
        "tensor_memory": getattr(metadata, "tmem_size", None) or 0,
        "matrix_units": sorted(set(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)", code))),
    }


def report(arch: str, names: Sequence[str]) -> dict[str, Any]:
    """Each named case's kernels, or the error in their place; and the rules that they follow."""
    compiled = compile_only(arch)
    rules: list[Any] = []
    choose = tile_tables._first_fitting

    def recorded(arch: str, operation: str, facts: Mapping[str, int]) -> dict[str, Any]:
        tile = choose(arch, operation, facts)
        rules.append([operation, dict(tile)])
        return tile

    tile_tables._first_fitting = recorded
    cases: dict[str, Any] = {}
    every = launches(arch)
    for name in names or every:
        compiled.clear()
        try:
            every[name]()
            result: Any = [inspect(kernel) for kernel in compiled]
        except Exception:
            result = traceback.format_exc()
        cases[name] = result
    return {"cases": cases, "rules": rules}


def run_worker(script: str, *arguments: str, stdin: str = "") -> dict[str, Any]:
    """What a worker prints, run in a process of its own."""
    # Without the interpreter there is a compiler; and fusion that is off by default, as it will be from triton 3.10 on,
    # shows which launch forgot to ask for it.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_DEFAULT_FP_FUSION": "0"}
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    worker = subprocess.run(command, env=environment, input=stdin, capture_output=True, text=True)
    if worker.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{worker.stderr}")
    return dict(json.loads(worker.stdout))


if __name__ == "__main__":
    json.dump(report(sys.argv[1], json.loads(sys.stdin.read() or "[]")), sys.stdout)
