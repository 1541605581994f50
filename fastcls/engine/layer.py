"""One layer of an encoder over packed tokens: all rows, or in the last layer only the rows that are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcls_kernels import AddNorm, takes_norm
from fastcls_kernels.disentangled_attention.buckets import DistanceTables
from fastcls_kernels.packed import PANEL, PackedWeight
from fastcls_kernels.unchecked import (
    absorb_query,
    add_layer_norm,
    apply_rotary_,
    attention_varlen,
    cls_attention,
    cls_attention_kv,
    cls_output,
    disentangled_attention,
    gated_activation,
    layer_norm,
    linear,
    linear_activation,
    linear_add_layer_norm,
)

from .attention import ChosenRows, LayerAttention, TokenPositions
from .packed import PackedProducts
from .spec import EncoderSpec, LastLayer
from .weights import Weighted, checked_rows, is_intercepted


class HiddenStates(NamedTuple):
    """Rows between two layers, (num_rows, hidden_size) each.

    Attributes:
        normed: what the next projection reads.
        residual: what its result is added to: the same rows behind a norm that ends a layer, and in a pre-norm encoder
            the sum before the norm.
    """

    normed: Tensor
    residual: Tensor


class EncoderLayer(Weighted):
    """One layer. In a pre-norm encoder its second norm is the one that begins the next layer."""

    qkv_weight: Tensor
    qkv_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    attention_norm_weight: Tensor
    attention_norm_bias: Tensor | None
    up_weight: Tensor
    up_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None
    output_norm_weight: Tensor
    output_norm_bias: Tensor | None
    query_norm_weight: Tensor | None
    query_norm_bias: Tensor | None
    key_norm_weight: Tensor | None
    key_norm_bias: Tensor | None
    adapter_norm_weight: Tensor | None
    adapter_norm_bias: Tensor | None
    adapter_up_weight: Tensor | None
    adapter_up_bias: Tensor | None
    adapter_down_weight: Tensor | None
    adapter_down_bias: Tensor | None

    def __init__(self, spec: EncoderSpec, weights: Mapping[str, nn.Parameter]) -> None:
        biases = ("qkv_bias", "out_bias", "attention_norm_bias", "up_bias", "down_bias", "output_norm_bias")
        adapter = ("adapter_norm", "adapter_up", "adapter_down")
        modules = ("position_key", "position_query", "query_norm", "key_norm", *adapter)
        super().__init__(weights, (*biases, *(f"{name}_{kind}" for name in modules for kind in ("weight", "bias"))))
        self.spec = spec
        # The weights as the CPU's products read them: `PackedWeights` makes them, and keeps them up to the weights.
        self.packed: PackedProducts | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None}

    def _product(self, name: str) -> tuple[Tensor | PackedWeight, Tensor | None]:
        """A product's weight and bias, or both packed."""
        products = self._packed_products
        if products is not None:
            packed: PackedWeight = getattr(products, name)
            return packed, None
        return getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")

    @property
    def _packed_products(self) -> PackedProducts | None:
        """Packed weights that rows of the weights' dtype can be multiplied with, which takes float32."""
        # Read once, since another thread may forget it.
        packed = self.packed
        return None if packed is None or packed.qkv.packing == "bfloat16" else packed

    @property
    def _is_quantised(self) -> bool:
        packed = self.packed
        return packed is not None and packed.qkv.packing == "int8"

    def forward(self, states: HiddenStates, positions: TokenPositions, attention: LayerAttention) -> HiddenStates:
        """All rows: (total_tokens, hidden_size) to the same."""
        if is_intercepted(self):
            states = self.checked(states, positions)
        # No name holds the queries, keys and values when the feed-forward needs their memory.
        return self._feed_forward(
            self._add_attended(self._attend(states.normed, positions, attention), states.residual)
        )

    def checked(self, states: HiddenStates, positions: TokenPositions) -> HiddenStates:
        """All rows that a hook on the layer may have made.

        Raises:
            TypeError, ValueError: they are not those of a layer.
        """
        if not isinstance(states, tuple) or len(states) != 2:
            raise TypeError(f"hooks must leave a layer's rows a pair (normed, residual), got {type(states).__name__}")
        shape = (positions.layout.total_tokens, self.spec.hidden_size)
        return HiddenStates(
            *(checked_rows("a layer's rows", rows, shape, self.attention_norm_weight) for rows in states)
        )

    def before_norm(
        self, states: HiddenStates, positions: TokenPositions, attention: LayerAttention
    ) -> tuple[Tensor, AddNorm]:
        """All rows of the last product, and the layer norm that would end the layer, not yet taken."""
        attended = self._add_attended(self._attend(states.normed, positions, attention), states.residual).normed
        weight, bias = self._product("down")
        down = linear(self._up(attended), weight)
        assert self.output_norm_bias is not None
        norm = (self.output_norm_weight, self.output_norm_bias, self.spec.norm_eps)
        return down, AddNorm(bias, attended, *norm)

    def chosen(
        self,
        states: HiddenStates,
        positions: TokenPositions,
        attention: LayerAttention,
        chosen: ChosenRows,
        last_layer: LastLayer,
        norm: AddNorm | None = None,
    ) -> Tensor:
        """The chosen rows, computed alone: (total_tokens, hidden_size) to (num_rows, hidden_size).

        ``norm`` is a layer norm that is still to be taken of the states, where `takes_norm_inside` holds.
        """
        # An absorbed projection is multiplied in another order, by weights that are not quantised, one a head.
        can_absorb = attention.reads_rows(chosen) and not self._is_quantised and self.spec.num_kv_heads is None
        if last_layer == "absorbed" and can_absorb:
            return self._feed_forward(self._attend_absorbed(states, positions, attention, chosen, norm)).normed
        if attention.reads_rows(chosen):
            context = self._attend_rows(states.normed, positions, attention, chosen)
        else:
            context = self._attend(states.normed, positions, attention)[chosen.rows]
        return self._feed_forward(self._add_attended(context, states.residual[chosen.rows])).normed

    def takes_norm_inside(
        self, hidden_states: Tensor, attention: LayerAttention, chosen: ChosenRows, last_layer: LastLayer
    ) -> bool:
        """Whether this layer can take the norm that ends the layer before."""
        absorbed = last_layer == "absorbed" and attention.reads_rows(chosen) and not attention.needs_keys
        is_post_norm = not self.spec.pre_norm and self.spec.adapter is None
        return absorbed and chosen.bounds is None and is_post_norm and takes_norm(hidden_states)

    def _project(
        self, hidden_states: Tensor, positions: TokenPositions, attention: LayerAttention
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (total_tokens, num_heads, head_dim) each."""
        qkv = linear(hidden_states, *self._product("qkv"))
        head_dim = self.spec.head_dim
        if self.spec.query_key_norm:
            q, k, v = (part.unflatten(1, (-1, head_dim)) for part in qkv.split(self.spec.qkv_sizes, 1))
            q, k = self._normed_heads(q, "query"), self._normed_heads(k, "key")
            for each in (q, k):
                self._turn(each, positions.position_ids, attention)
            return q, k, v
        heads = qkv.unflatten(1, (-1, head_dim))
        num_queries, num_keys, _ = (size // head_dim for size in self.spec.qkv_sizes)
        self._turn(heads[:, : num_queries + num_keys], positions.position_ids, attention)
        q, k, v = heads.split((num_queries, num_keys, num_keys), 1)
        return q, k, v

    def _normed_heads(self, heads: Tensor, name: str) -> Tensor:
        """Queries or keys behind their norm over all heads, if they have one."""
        weight = getattr(self, f"{name}_norm_weight")
        if weight is None:
            return heads
        # Not the eps of scaled residuals: these rows are not scaled.
        norm = (weight, getattr(self, f"{name}_norm_bias"), self.spec.layer_norm_eps)
        return layer_norm(heads.flatten(1), *norm).view(heads.shape)

    def _turn(self, heads: Tensor, position_ids: Tensor, attention: LayerAttention) -> None:
        """Turns heads by their tokens' positions, in place, where positions are rotary."""
        if attention.rotary is not None:
            apply_rotary_(heads, position_ids, *attention.rotary, interleaved=self.spec.rotary_interleaved)

    def _attend(self, hidden_states: Tensor, positions: TokenPositions, attention: LayerAttention) -> Tensor:
        q, k, v = self._project(hidden_states, positions, attention)
        if attention.tables is not None:
            tables = DistanceTables(*attention.positions, attention.tables.buckets)
            return disentangled_attention(q, k, v, tables, positions.layout, attention.scale).flatten(1)
        scoring = (attention.scale, attention.window_size, positions.bias)
        return attention_varlen(q, k, v, positions.layout, *scoring).flatten(1)

    def _attend_rows(
        self, hidden_states: Tensor, positions: TokenPositions, attention: LayerAttention, chosen: ChosenRows
    ) -> Tensor:
        """The chosen rows' queries over the keys and values of every token."""
        query = self._query(hidden_states, positions, attention, chosen)
        kv = linear(hidden_states, *self._part_of_qkv(1, 2))
        k, v = kv.unflatten(1, (2, -1, self.spec.head_dim)).unbind(1)
        k = self._normed_heads(k, "key")
        self._turn(k, positions.position_ids, attention)
        context = cls_attention_kv(
            *(query, k, v, positions.layout, attention.scale),
            bias=attention.seen_from_first(query, k, positions),
            row_bounds=attention.bounds(chosen, positions.layout),
        )
        return context.flatten(1)

    def _part_of_qkv(self, first: int, count: int) -> tuple[Tensor | PackedWeight, Tensor | None]:
        """The product of some of queries, keys and values, which stand in this order."""
        sizes, packed = self.spec.qkv_sizes, self._packed_products
        start, size = sum(sizes[:first]), sum(sizes[first : first + count])
        # Where int8 is computed, queries fill whole panels, so this never falls back on the weights: they may be gone.
        if packed is not None and start % PANEL == 0:
            return packed.qkv.columns(start, size), None
        rows = slice(start, start + size)
        return self.qkv_weight[rows], None if self.qkv_bias is None else self.qkv_bias[rows]

    def _query(
        self, hidden_states: Tensor, positions: TokenPositions, attention: LayerAttention, chosen: ChosenRows
    ) -> Tensor:
        """(num_rows, num_heads, head_dim)."""
        query = linear(hidden_states[chosen.rows], *self._part_of_qkv(0, 1))
        query = self._normed_heads(query.unflatten(1, (self.spec.num_heads, self.spec.head_dim)), "query")
        self._turn(query, positions.position_ids[chosen.rows], attention)
        return query

    def _attend_absorbed(
        self,
        states: HiddenStates,
        positions: TokenPositions,
        attention: LayerAttention,
        chosen: ChosenRows,
        norm: AddNorm | None,
    ) -> HiddenStates:
        """Attention without values, which are projected after the sum, and without keys where the query absorbs them.

        The few rows that carry the answer are computed in at least float32, so that absorbing costs no accuracy.
        """
        query_weight, key_weight, value_weight = self.qkv_weight.chunk(3)
        query_bias, key_bias, value_bias = (None,) * 3 if self.qkv_bias is None else self.qkv_bias.chunk(3)
        source, residual = states
        rows: Tensor | None = chosen.rows
        keys = None
        if attention.needs_keys:
            query = self._query(source, positions, attention, chosen)
            keys = linear(source, key_weight, key_bias).unflatten(1, (self.spec.num_heads, self.spec.head_dim))
            keys = self._normed_heads(keys, "key")
            self._turn(keys, positions.position_ids, attention)
        else:
            normed = source
            if norm is not None:
                residual = normed = add_layer_norm(source, *norm, rows)[0]
                rows = None
            # Encoders without biases have rotary positions.
            assert query_bias is not None
            if key_bias is not None:
                # The key bias adds one number to all scores of a row, which changes no weight; but NaN must stay NaN.
                query_bias = torch.add(query_bias, key_bias, alpha=0)
            query = absorb_query(normed, rows, query_weight, query_bias, key_weight, self.spec.num_heads)
        summed = cls_attention(
            *(query, source, positions.layout, attention.scale),
            norm=norm,
            keys=keys,
            bias=attention.seen_from_first(query, keys, positions),
            row_bounds=attention.bounds(chosen, positions.layout),
        )
        projections = (value_weight, value_bias, self.out_weight, self.out_bias)
        norms = (self.attention_norm_weight, self.attention_norm_bias, self.spec.norm_eps)
        keep_sum, rms = self.spec.pre_norm, self.spec.rms
        return HiddenStates(*cls_output(summed, *projections, residual, rows, *norms, keep_sum=keep_sum, rms=rms))

    def _add_attended(self, context: Tensor, residual: Tensor) -> HiddenStates:
        norm = (self.attention_norm_weight, self.attention_norm_bias, self.spec.norm_eps)
        (weight, bias), keep_sum = self._product("out"), self.spec.pre_norm
        return HiddenStates(
            *linear_add_layer_norm(context, weight, bias, residual, *norm, keep_sum=keep_sum, rms=self.spec.rms)
        )

    def _feed_forward(self, attended: HiddenStates) -> HiddenStates:
        norm: tuple[Any, ...] = (self.output_norm_weight, self.output_norm_bias, self.spec.norm_eps)
        (weight, bias), residual = self._product("down"), attended.residual
        keep_sum, rms, adapter = self.spec.pre_norm, self.spec.rms, self.spec.adapter
        if adapter is not None:
            norm = (self.adapter_norm_weight, self.adapter_norm_bias, self.spec.norm_eps)
            keep_sum = adapter == "sum"
        # No name holds the widest rows of the layer, so that their memory is free once they are multiplied.
        states = HiddenStates(
            *linear_add_layer_norm(self._up(attended.normed), weight, bias, residual, *norm, keep_sum=keep_sum, rms=rms)
        )
        return states if adapter is None else self._adapted(states)

    def _adapted(self, states: HiddenStates) -> HiddenStates:
        """X-MOD's adapter of one language, and the norm that ends the layer."""
        norm = (self.output_norm_weight, self.output_norm_bias, self.spec.norm_eps)
        weight, bias, keep_sum = self.adapter_down_weight, self.adapter_down_bias, self.spec.pre_norm
        assert self.adapter_up_weight is not None
        assert weight is not None
        up = linear_activation(states.normed, self.adapter_up_weight, self.adapter_up_bias, self.spec.activation)
        return HiddenStates(*linear_add_layer_norm(up, weight, bias, states.residual, *norm, keep_sum=keep_sum))

    def _up(self, hidden_states: Tensor) -> Tensor:
        if self.spec.gated:
            return gated_activation(linear(hidden_states, *self._product("up")), self.spec.activation)
        return linear_activation(hidden_states, *self._product("up"), self.spec.activation)
