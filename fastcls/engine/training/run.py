"""Packed tokens to rows behind the head, with a graph: embeddings, layers, the last layer's wanted rows, the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastcls_kernels.training import (
    Turning,
    activation,
    add_norm,
    dropped,
    embedded,
    linear,
    mean_pool,
)

from ..convolution import neighbours
from ..encoder import Encoder
from ..packing import PackedTokens
from ..positions import BiasTable, DisentangledTables
from ..spec import Disentangled, EncoderSpec, HeadSpec
from ..spec import Rows as WantedRows
from ..weights import under
from .distances import Distances
from .layer import Rows, Seen, TrainedLayer
from .places import DropoutRates, Seeds
from .products import Adapters, Products, seeded


class TrainingOptions(NamedTuple):
    """What a model that is trained has beside its weights.

    Attributes:
        rates: of dropout.
        padding_ids: for names of tables of embeddings the row whose gradient stays zero.
        checkpointed_layers: n where the activations inside each n-th layer are computed again in the backward pass, and
            not kept; 0 where all are kept.
    """

    rates: DropoutRates
    padding_ids: Mapping[str, int]
    checkpointed_layers: int = 0


class TrainingPass:
    """One forward pass that is trained.

    Args:
        spec, head: the shapes of encoder and head.
        encoder: an encoder of that shape, for what no weight is: tables of angles and of buckets.
        weights: by our names, with a graph where they are joined.
        adapters: by our names of weights what is added to their products.
        options: dropout and the rest.
        dtype: what products are computed in; the weights' own, or autocast's.
        seeds: of dropout, but for that of adapters; None draws them.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        head: HeadSpec,
        encoder: Encoder,
        weights: Mapping[str, Tensor],
        adapters: Adapters,
        options: TrainingOptions,
        dtype: torch.dtype,
        seeds: Sequence[int] | None = None,
    ) -> None:
        self.spec = spec
        self.head_spec = head
        self.encoder = encoder
        self.weights = weights
        self.adapters = seeded(adapters)
        self.options = options
        self.dtype = dtype
        self.seeds = Seeds(options.rates, spec.num_layers, seeds)

    def _products(self, prefix: str, weights: Mapping[str, Tensor], use: int = 0) -> Products:
        return Products(weights, under(prefix, self.adapters), self.dtype, use)

    def rows(self, packed: PackedTokens, rows: WantedRows) -> Tensor:
        """Packed tokens to rows behind the head, in packed order; of an encoder without one to rows of its last layer.

        Args:
            packed: the tokens, without rows or sequences that fill a shape up.
            rows: which are wanted.
        """
        states = self._encoded(packed, rows)
        if self.head_spec.task == "encoder":
            return mean_pool(states, packed.layout) if rows == "mean" else states
        if self.head_spec.is_late:
            return mean_pool(self.head(states), packed.layout)
        return self.head(mean_pool(states, packed.layout) if rows == "mean" else states)

    def head(self, rows: Tensor) -> Tensor:
        """(num_rows, hidden_size) behind the head."""
        weights, spec = under("head.", self.weights), self.head_spec
        products = self._products("head.", weights)
        rows = dropped(rows, self.seeds.at("head_in"))
        if "dense_weight" in weights:
            rows = activation(products.linear("dense", rows), spec.activation)
        if "inner_weight" in weights:
            rows = dropped(rows, self.seeds.at("head_inner"))
            rows = activation(products.linear("inner", rows), spec.activation)
        if "norm_weight" in weights:
            wide = rows.to(weights["norm_weight"].dtype)
            rows = add_norm(wide, None, weights["norm_weight"], weights.get("norm_bias"), spec.eps)[0]
        if "out_weight" not in weights:
            return rows
        return products.linear("out", dropped(rows, self.seeds.at("head_out")))

    def _encoded(self, packed: PackedTokens, rows: WantedRows) -> Tensor:
        embeddings = self._embedded(packed)
        states = self._first_norm(embeddings)
        bias, distances = self._relative(packed)
        by_layer = [under(f"encoder.layers.{index}.", self.weights) for index in range(self.spec.num_layer_weights)]
        last = self.spec.num_layers - 1
        for index, own in enumerate(self.spec.layers):
            products = self._products(f"encoder.layers.{own}.", by_layer[own], index)
            layer = TrainedLayer(self.spec, products, index, self.seeds)
            seen = self._seen(index, packed, bias, distances)
            if index == last and rows == "first":
                states = self._computed(index, layer.first_rows, states, seen)
            else:
                chosen = None if packed.rows is None or index < last else packed.rows.long()
                states = self._computed(index, layer.all_rows, states, seen, chosen)
            if index == 0 and self.spec.convolution is not None and last:
                convolved = self._convolved(embeddings, states.normed, packed)
                states = Rows(convolved, convolved)
        return states.normed

    def _computed(self, index: int, function: Callable[..., Rows], *arguments: Any) -> Rows:
        every = self.options.checkpointed_layers
        if not every or index % every or not torch.is_grad_enabled():
            return function(*arguments)
        # Seeds are drawn before, so no generator need be set back.
        found: Rows = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return found

    def _seen(self, index: int, packed: PackedTokens, bias: Tensor | None, distances: Distances | None) -> Seen:
        spec = self.spec
        terms = spec.relative.num_terms if isinstance(spec.relative, Disentangled) else 1
        window = spec.windows[index] if spec.windows else None
        turning = None
        if self.encoder.rotary is not None:
            tables = self.encoder.rotary.tables(spec.rotary[index])
            turning = Turning(packed.position_ids, *tables, spec.rotary_interleaved)
        size = (-1, -1) if window is None else (window, window)
        return Seen(packed.layout, (spec.head_dim * terms) ** -0.5, size, turning, bias, distances)

    def _relative(self, packed: PackedTokens) -> tuple[Tensor | None, Distances | None]:
        relative, weights = self.encoder.relative, under("encoder.relative.", self.weights)
        if isinstance(relative, BiasTable):
            table = weights["table_weight"]
            wide = table.to(torch.promote_types(table.dtype, torch.float32))
            return embedded(wide, relative.buckets).T.contiguous(), None
        if not isinstance(relative, DisentangledTables):
            return None, None
        norm = (weights["norm_weight"], weights["norm_bias"]) if "norm_weight" in weights else None
        layout = packed.layout
        return None, Distances(
            *(self.spec, relative.relative, weights["table_weight"], norm, relative.buckets, layout.max_seqlen),
            has_places=layout.positions is not None,
        )

    def _embedded(self, packed: PackedTokens) -> Tensor:
        spec, weights = self.spec, under("encoder.embeddings.", self.weights)
        if packed.inputs_embeds is not None and spec.final_embeds:
            return packed.inputs_embeds
        rows = packed.inputs_embeds
        if rows is None:
            assert packed.token_ids is not None
            rows = self._lookup("word", packed.token_ids, weights)
            if spec.mask_token_id is not None:
                rows = self.encoder.embeddings.without_masks(rows, packed)
        if "token_type_weight" in weights:
            table = weights["token_type_weight"]
            types = torch.zeros_like(packed.position_ids) if packed.token_type_ids is None else packed.token_type_ids
            rows = rows + embedded(table, types, self.options.padding_ids.get("encoder.embeddings.token_type_weight"))
        if "task_weight" in weights:
            # ERNIE's first kind of task.
            rows = rows + weights["task_weight"][0]
        if "position_weight" in weights:
            rows = rows + self._lookup("position", packed.position_ids, weights)
        if "norm_weight" in weights:
            norm = (weights["norm_weight"], weights.get("norm_bias"), spec.layer_norm_eps)
            rows = add_norm(rows.contiguous(), None, *norm)[0]
        rows = dropped(rows, self.seeds.at("embeddings"))
        if "projection_weight" in weights:
            projected = self._products("encoder.embeddings.", weights).linear("projection", rows)
            rows = projected.to(weights["projection_weight"].dtype)
        return rows if spec.residual_scale == 1 else rows * spec.residual_scale

    def _lookup(self, name: str, ids: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        padding_id = self.options.padding_ids.get(f"encoder.embeddings.{name}_weight")
        return embedded(weights[f"{name}_weight"], ids, padding_id)

    def _first_norm(self, embeddings: Tensor) -> Rows:
        weights, spec = under("encoder.embeddings.", self.weights), self.spec
        if "first_norm_weight" not in weights:
            return Rows(embeddings, embeddings)
        norm = (weights["first_norm_weight"], weights.get("first_norm_bias"), spec.norm_eps)
        return Rows(*add_norm(embeddings.contiguous(), None, *norm, rms=spec.rms))

    def _convolved(self, embeddings: Tensor, states: Tensor, packed: PackedTokens) -> Tensor:
        assert self.spec.convolution is not None
        weights, size = under("encoder.convolution.", self.weights), self.spec.convolution.kernel_size
        taps = [neighbours(embeddings, packed.layout, offset) for offset in range(-(size // 2), size // 2 + 1)]
        # [out, in, taps] to [out, taps * in]: neighbours stand side by side in a row.
        matrix = weights["kernel_weight"].transpose(1, 2).flatten(1)
        product = linear(torch.cat(taps, 1).to(self.dtype), matrix, weights["kernel_bias"])
        # DeBERTa drops what the convolution gives before its activation.
        rows = activation(dropped(product, self.seeds.at("convolution")), self.spec.convolution.activation)
        norm = (weights["norm_weight"], weights["norm_bias"], self.spec.layer_norm_eps)
        return add_norm(rows, states, *norm)[0]
