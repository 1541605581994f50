"""One layer that is trained: all rows, or of the last layer the rows that the answer needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastcls_kernels import PackedLayout
from fastcls_kernels.training import (
    Dropout,
    Heads,
    Scoring,
    Turning,
    activated_linear,
    activation,
    add_norm,
    attention,
    cls_attention,
    dropped,
    linear,
    turned,
)

from ..spec import EncoderSpec
from .distances import Distances
from .places import Seeds


class Rows(NamedTuple):
    """Rows between two layers, (num_rows, hidden_size) each: see `HiddenStates`."""

    normed: Tensor
    residual: Tensor

    def at(self, rows: Tensor) -> Rows:
        """Some of them."""
        normed = self.normed[rows]
        return Rows(normed, normed if self.residual is self.normed else self.residual[rows])


class Seen(NamedTuple):
    """How the tokens of one layer see each other.

    Attributes:
        layout: where each sequence lies.
        scale: factor on scores.
        window: how many tokens a token attends to on its left and right, -1 for all.
        turning: rotary positions, or None.
        bias: MPNet's positions, (num_heads, 2 * reach + 1), or None.
        distances: DeBERTa's positions, or None.
    """

    layout: PackedLayout
    scale: float
    window: tuple[int, int]
    turning: Turning | None
    bias: Tensor | None
    distances: Distances | None


class TrainedLayer:
    """One layer of an encoder over packed tokens, whose weights are trained.

    Args:
        spec: the encoder's shape.
        weights: by `EncoderLayer`'s names.
        index: which of the encoder's layers it is.
        seeds: the dropout of each place.
        dtype: what products are computed in; sums and norms are in the weights' own.
    """

    def __init__(
        self, spec: EncoderSpec, weights: Mapping[str, Tensor], index: int, seeds: Seeds, dtype: torch.dtype
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.index = index
        self.seeds = seeds
        self.dtype = dtype
        self.heads = Heads(spec.num_heads, spec.num_kv_heads or spec.num_heads, spec.head_dim)

    def all_rows(self, states: Rows, seen: Seen, chosen: Tensor | None = None) -> Rows:
        """All rows, or behind attention those that ``chosen`` names, an index."""
        context = self._attend(states.normed, seen)
        if chosen is not None:
            context, states = context[chosen], states.at(chosen)
        return self._feed_forward(self._add_attended(context, states.residual))

    def first_rows(self, states: Rows, seen: Seen) -> Rows:
        """Each sequence's first row, (num_sequences, hidden_size): of the others not even keys and values, if it can.

        A query that no positions turn takes the projection of keys into itself, and values are projected behind the
        sum.
        """
        first = seen.layout.cu_seqlens[:-1].long()
        if self.spec.num_kv_heads is not None:
            return self.all_rows(states, seen, first)
        context = self._attend_first(states.normed, first, seen)
        return self._feed_forward(self._add_attended(context, states.residual[first]))

    def _dropout(self, place: str) -> Dropout | None:
        return self.seeds.at(place, self.index)

    def _linear(self, name: str, rows: Tensor) -> Tensor:
        return linear(rows.to(self.dtype), self.weights[f"{name}_weight"], self.weights.get(f"{name}_bias"))

    def _scoring(self, seen: Seen) -> Scoring:
        return Scoring(seen.scale, seen.window, self._dropout("attention"))

    def _attend(self, normed: Tensor, seen: Seen) -> Tensor:
        qkv = self._linear("qkv", normed)
        if self.spec.query_key_norm:
            q, k, v = qkv.split(self.spec.qkv_sizes, 1)
            qkv = torch.cat((self._normed_heads(q, "query"), self._normed_heads(k, "key"), v), 1)
        if seen.distances is not None:
            return seen.distances.attention(
                qkv, self.heads, seen.layout, self._scoring(seen), self._dropout("positions"), self.weights, self.dtype
            )
        return attention(qkv, seen.bias, self.heads, seen.layout, self._scoring(seen), seen.turning)

    def _normed_heads(self, rows: Tensor, name: str) -> Tensor:
        """Queries or keys, (num_rows, width), behind their norm over all heads, if they have one."""
        weight = self.weights.get(f"{name}_norm_weight")
        if weight is None:
            return rows
        bias = self.weights.get(f"{name}_norm_bias")
        return add_norm(rows.contiguous(), None, weight, bias, self.spec.layer_norm_eps)[0].to(rows.dtype)

    def _attend_first(self, normed: Tensor, first: Tensor, seen: Seen) -> Tensor:
        """(num_sequences, hidden_size), what each sequence's first row attends to, projected."""
        spec, weight, bias = self.spec, self.weights["qkv_weight"], self.weights.get("qkv_bias")
        wide = torch.promote_types(self.dtype, torch.float32)
        query_weight, key_weight, value_weight = weight.split(spec.qkv_sizes)
        query_bias, key_bias, value_bias = (None,) * 3 if bias is None else bias.split(spec.qkv_sizes)
        rows = normed[first].to(self.dtype)
        keys = terms = None
        by_head = (-1, spec.num_heads, spec.head_dim)
        if seen.turning is None and seen.distances is None:
            query = linear(rows, query_weight, query_bias).view(by_head).to(wide)
            absorbed = key_weight.to(wide).view((*by_head[1:], -1))
            query = torch.bmm(query.transpose(0, 1), absorbed).transpose(0, 1).contiguous()
            if seen.bias is not None:
                reach = seen.bias.shape[1] // 2
                terms = seen.bias.T[reach + seen.layout.token_positions.clamp(max=reach).long()].contiguous()
        else:
            keys = self._normed_heads(linear(normed.to(self.dtype), key_weight, key_bias), "key").view(by_head)
            query = self._normed_heads(linear(rows, query_weight, query_bias), "query").view(by_head)
            if seen.turning is not None:
                at_first = seen.turning._replace(positions=seen.turning.positions[first])
                query, keys = turned(query, at_first), turned(keys, seen.turning)
            if seen.distances is not None:
                terms = seen.distances.seen_from_first(
                    *(query, keys, seen.layout, seen.scale),
                    *(self._dropout("positions"), self.weights, self.dtype),
                )
        summed, sums = cls_attention(
            query, normed.to(self.dtype), seen.layout, self._scoring(seen), keys=keys, bias=terms
        )
        values = value_weight.to(wide).view((*by_head[1:], -1)).transpose(1, 2)
        context = torch.bmm(summed.to(wide).transpose(0, 1), values).transpose(0, 1)
        if value_bias is not None:
            # The weights' sum is 1 but for dropout.
            context = context + sums[..., None] * value_bias.to(wide).view(by_head[1:])
        return context.flatten(1).to(self.dtype)

    def _add_attended(self, context: Tensor, residual: Tensor) -> Rows:
        return self._add(self._linear("out", context), residual, "attention_norm", "attended")

    def _add(self, rows: Tensor, residual: Tensor, norm: str, place: str, *, keeps_sum: bool | None = None) -> Rows:
        normed, summed = add_norm(
            rows,
            residual,
            self.weights[f"{norm}_weight"],
            self.weights.get(f"{norm}_bias"),
            self.spec.norm_eps,
            rms=self.spec.rms,
            dropout=self._dropout(place),
        )
        keeps = self.spec.pre_norm if keeps_sum is None else keeps_sum
        return Rows(normed, summed if keeps else normed)

    def _feed_forward(self, attended: Rows) -> Rows:
        spec, adapter = self.spec, self.spec.adapter
        up = self._linear("up", attended.normed)
        inner = self._dropout("inner")
        if inner is None:
            weight, bias = self.weights["down_weight"], self.weights.get("down_bias")
            down = activated_linear(up, weight, bias, spec.activation, gated=spec.gated)
        else:
            down = self._linear("down", dropped(activation(up, spec.activation, gated=spec.gated), inner))
        if adapter is None:
            return self._add(down, attended.residual, "output_norm", "output")
        between = self._add(down, attended.residual, "adapter_norm", "output", keeps_sum=adapter == "sum")
        up = self._linear("adapter_up", between.normed)
        weight, bias = self.weights["adapter_down_weight"], self.weights.get("adapter_down_bias")
        return self._add(
            activated_linear(up, weight, bias, spec.activation), between.residual, "output_norm", "adapter"
        )
