"""Packed tokens to hidden states: the embeddings, the layers, and the last layer for the [CLS] rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastcls_kernels import (
    AddNorm,
    PackedLayout,
    absorb_query,
    add_layer_norm,
    attention_varlen,
    cls_attention,
    cls_attention_kv,
    cls_output,
    embedding_layer_norm,
    linear,
    linear_add_layer_norm,
    linear_gelu,
    takes_norm,
)

from .packing import PackedTokens
from .spec import EncoderSpec

LastLayer = Literal["full", "selected", "absorbed"]


def check_last_layer(last_layer: str) -> None:
    """Raises ValueError where ``last_layer`` is no rung of the ladder."""
    if last_layer not in get_args(LastLayer):
        raise ValueError(f"last_layer must be one of {', '.join(get_args(LastLayer))}, got {last_layer!r}")


class Embeddings(nn.Module):
    """Word, token type and position embeddings, summed and normalised."""

    word_table: Tensor
    position_table: Tensor
    token_type_table: Tensor
    norm_weight: Tensor
    norm_bias: Tensor

    def __init__(self, spec: EncoderSpec, weights: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.eps = spec.layer_norm_eps
        for name, weight in weights.items():
            self.register_parameter(name, weight)

    def forward(self, packed: PackedTokens) -> Tensor:
        """(total_tokens, hidden_size)."""
        if packed.inputs_embeds is not None:
            # Embeddings that the caller made stand in for the word table: one row a token.
            token_ids = torch.arange(packed.inputs_embeds.shape[0], device=packed.inputs_embeds.device)
            word_table = packed.inputs_embeds
        else:
            assert packed.token_ids is not None
            token_ids, word_table = packed.token_ids, self.word_table
        return embedding_layer_norm(
            token_ids,
            packed.position_ids,
            packed.token_type_ids,
            word_table,
            self.position_table,
            self.token_type_table,
            self.norm_weight,
            self.norm_bias,
            self.eps,
        )


class EncoderLayer(nn.Module):
    """One post-norm layer over packed tokens, whole or for the [CLS] rows alone."""

    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    attention_norm_weight: Tensor
    attention_norm_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor
    output_norm_weight: Tensor
    output_norm_bias: Tensor

    def __init__(self, spec: EncoderSpec, weights: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.spec = spec
        self.scale = spec.head_dim**-0.5
        for name, weight in weights.items():
            self.register_parameter(name, weight)

    def forward(self, hidden_states: Tensor, layout: PackedLayout) -> Tensor:
        """Every row: (total_tokens, hidden_size) to the same."""
        return self._feed_forward(self._attention_block(self._attend(hidden_states, layout), hidden_states))

    def before_norm(self, hidden_states: Tensor, layout: PackedLayout) -> tuple[Tensor, AddNorm]:
        """Every row of the last product, and the layer norm that ends the layer, not taken yet."""
        attended = self._attention_block(self._attend(hidden_states, layout), hidden_states)
        down = linear(linear_gelu(attended, self.up_weight, self.up_bias), self.down_weight)
        eps = self.spec.layer_norm_eps
        return down, AddNorm(self.down_bias, attended, self.output_norm_weight, self.output_norm_bias, eps)

    def cls_rows(
        self, hidden_states: Tensor, layout: PackedLayout, last_layer: LastLayer, norm: AddNorm | None = None
    ) -> Tensor:
        """The [CLS] row of each sequence: (total_tokens, hidden_size) to (num_sequences, hidden_size).

        ``norm`` is a layer norm that hidden_states still have before them, for the "absorbed" rung alone.
        """
        # Selected by the kernels themselves, where they read them.
        rows = layout.cu_seqlens[:-1]
        if last_layer == "full":
            return self(hidden_states, layout)[rows]
        if last_layer == "selected":
            cls_states = hidden_states[rows]
            context = self._attend_selected(cls_states, hidden_states, layout)
            return self._feed_forward(self._attention_block(context, cls_states))
        return self._feed_forward(self._attend_absorbed(rows, hidden_states, layout, norm))

    def _attend(self, hidden_states: Tensor, layout: PackedLayout) -> Tensor:
        # A method of its own, so that queries, keys and values are gone before the feed-forward needs its memory.
        qkv = linear(hidden_states, self.qkv_weight, self.qkv_bias)
        q, k, v = qkv.unflatten(1, (3, self.spec.num_heads, self.spec.head_dim)).unbind(1)
        context = attention_varlen(q, k, v, layout.cu_seqlens, layout.max_seqlen, self.scale, layout=layout)
        return context.flatten(1)

    def _attend_selected(self, cls_states: Tensor, hidden_states: Tensor, layout: PackedLayout) -> Tensor:
        size = self.spec.hidden_size
        query = linear(cls_states, self.qkv_weight[:size], self.qkv_bias[:size])
        kv = linear(hidden_states, self.qkv_weight[size:], self.qkv_bias[size:])
        heads = (self.spec.num_heads, self.spec.head_dim)
        k, v = kv.unflatten(1, (2, *heads)).unbind(1)
        context = cls_attention_kv(
            query.unflatten(1, heads), k, v, layout.cu_seqlens, layout.max_seqlen, self.scale, layout=layout
        )
        return context.flatten(1)

    def _attend_absorbed(
        self, rows: Tensor | None, hidden_states: Tensor, layout: PackedLayout, norm: AddNorm | None
    ) -> Tensor:
        """No keys, no values: the key projection moves into the queries, the value projection after the sum.

        The few rows that carry the answer are computed in at least float32, so that absorbing costs no accuracy.
        """
        query_weight, key_weight, value_weight = self.qkv_weight.chunk(3)
        query_bias, _, value_bias = self.qkv_bias.chunk(3)
        source = hidden_states
        if norm is not None:
            source, rows = add_layer_norm(hidden_states, *norm, rows=rows), None
        query = absorb_query(source, rows, query_weight, query_bias, key_weight, self.spec.num_heads)
        summed = cls_attention(
            query, hidden_states, layout.cu_seqlens, layout.max_seqlen, self.scale, layout=layout, norm=norm
        )
        return cls_output(
            summed,
            value_weight,
            value_bias,
            self.out_weight,
            self.out_bias,
            source,
            rows,
            self.attention_norm_weight,
            self.attention_norm_bias,
            self.spec.layer_norm_eps,
        )

    def _attention_block(self, context: Tensor, residual: Tensor) -> Tensor:
        # A method of its own, so that the context is gone before the feed-forward needs its memory.
        return linear_add_layer_norm(
            context,
            self.out_weight,
            self.out_bias,
            residual,
            self.attention_norm_weight,
            self.attention_norm_bias,
            self.spec.layer_norm_eps,
        )

    def _feed_forward(self, attended: Tensor) -> Tensor:
        return linear_add_layer_norm(
            linear_gelu(attended, self.up_weight, self.up_bias),
            self.down_weight,
            self.down_bias,
            attended,
            self.output_norm_weight,
            self.output_norm_bias,
            self.spec.layer_norm_eps,
        )


def cls_states_of(
    layers: Sequence[EncoderLayer], hidden_states: Tensor, layout: PackedLayout, last_layer: LastLayer
) -> Tensor:
    """All layers, the last one for [CLS] alone: (total_tokens, hidden_size) to (num_sequences, hidden_size)."""
    *before, last = layers
    norm = None
    for layer in before:
        hooked = layer._forward_hooks or layer._forward_pre_hooks
        if layer is before[-1] and last_layer == "absorbed" and takes_norm(hidden_states) and not hooked:
            # Nobody but the last layer's pass over them reads these rows.
            hidden_states, norm = layer.before_norm(hidden_states, layout)
        else:
            hidden_states = layer(hidden_states, layout)
    return last.cls_rows(hidden_states, layout, last_layer, norm)
