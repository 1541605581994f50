"""One layer that is trained: all rows, or of the last layer the rows that the answer needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcls_kernels import PackedLayout
from fastcls_kernels.training import (
    Dropout,
    Heads,
    Scoring,
    Turning,
    activation,
    add_norm,
    attention,
    cls_attention,
    dropped,
    turned,
)

from ..spec import EncoderSpec
from .distances import Distances
from .places import Seeds
from .products import Products


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
        products: with its weights, by `EncoderLayer`'s names; sums and norms are in the weights' own dtype.
        index: which of the encoder's layers it is.
        seeds: the dropout of each place.
    """

    def __init__(self, spec: EncoderSpec, products: Products, index: int, seeds: Seeds) -> None:
        self.spec = spec
        self.products = products
        self.weights = products.weights
        self.index = index
        self.seeds = seeds
        self.dtype = products.dtype
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

    def _scoring(self, seen: Seen) -> Scoring:
        return Scoring(seen.scale, seen.window, self._dropout("attention"))

    def _attend(self, normed: Tensor, seen: Seen) -> Tensor:
        qkv = self.products.linear("qkv", normed)
        if self.spec.query_key_norm:
            q, k, v = qkv.split(self.spec.qkv_sizes, 1)
            qkv = torch.cat((self._normed_heads(q, "query"), self._normed_heads(k, "key"), v), 1)
        if seen.distances is not None:
            return seen.distances.attention(
                qkv, self.heads, seen.layout, self._scoring(seen), self._dropout("positions"), self.products
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
        spec, products = self.spec, self.products
        wide = torch.promote_types(self.dtype, torch.float32)
        width = spec.num_heads * spec.head_dim
        of_query, of_key, of_value = (slice(begin, begin + width) for begin in (0, width, 2 * width))
        rows = normed[first]
        keys = terms = None
        by_head = (-1, spec.num_heads, spec.head_dim)
        if seen.turning is None and seen.distances is None:
            query = products.linear("qkv", rows, of_query).view(by_head).to(wide)
            # Keys and values read the same rows, and what adapters make of them.
            hidden, both = products.carrying("qkv", normed, slice(width, 3 * width))
            key_weight, value_weight = both.split(width)
            query = torch.bmm(query.transpose(0, 1), key_weight.view((*by_head[1:], -1)))
            query = query.transpose(0, 1).contiguous()
            if seen.bias is not None:
                reach = seen.bias.shape[1] // 2
                terms = seen.bias.T[reach + seen.layout.token_positions.clamp(max=reach).long()].contiguous()
        else:
            hidden, value_weight = products.carrying("qkv", normed, of_value)
            keys = self._normed_heads(products.linear("qkv", normed, of_key), "key").view(by_head)
            query = self._normed_heads(products.linear("qkv", rows, of_query), "query").view(by_head)
            if seen.turning is not None:
                at_first = seen.turning._replace(positions=seen.turning.positions[first])
                query, keys = turned(query, at_first), turned(keys, seen.turning)
            if seen.distances is not None:
                terms = seen.distances.seen_from_first(
                    *(query, keys, seen.layout, seen.scale), *(self._dropout("positions"), products)
                )
        summed, sums = cls_attention(query, hidden, seen.layout, self._scoring(seen), keys=keys, bias=terms)
        values = value_weight.view((*by_head[1:], -1)).transpose(1, 2)
        context = torch.bmm(summed.to(wide).transpose(0, 1), values).transpose(0, 1)
        bias = self.weights.get("qkv_bias")
        if bias is not None:
            # The weights' sum is 1 but for dropout.
            context = context + sums[..., None] * bias[of_value].to(wide).view(by_head[1:])
        return context.flatten(1).to(self.dtype)

    def _add_attended(self, context: Tensor, residual: Tensor) -> Rows:
        return self._add(self.products.linear("out", context), residual, "attention_norm", "attended")

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
        up = self.products.linear("up", attended.normed)
        inner = self._dropout("inner")
        if inner is None:
            down = self.products.activated("down", up, spec.activation, gated=spec.gated)
        else:
            down = self.products.linear("down", dropped(activation(up, spec.activation, gated=spec.gated), inner))
        if adapter is None:
            return self._add(down, attended.residual, "output_norm", "output")
        between = self._add(down, attended.residual, "adapter_norm", "output", keeps_sum=adapter == "sum")
        up = self.products.linear("adapter_up", between.normed)
        down = self.products.activated("adapter_down", up, spec.activation)
        return self._add(down, between.residual, "output_norm", "adapter")
