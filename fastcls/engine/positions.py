"""Positions that enter attention: MPNet's and DeBERTa's distances between tokens, and rotary positions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastcls_kernels import Buckets, PackedLayout, is_batch_invariant
from fastcls_kernels.unchecked import layer_norm, linear, linear_per_head

from .spec import BucketBias, Disentangled, EncoderSpec
from .weights import Weighted, in_memory_of, weight_version

# One layer's keys and queries of positions, (rows, num_heads, head_dim) each, or None for a term that is left out.
PositionTables = tuple[Tensor | None, Tensor | None]


class BiasTable(Weighted):
    """A number that each head adds to a score, by the bucket of the distance."""

    table_weight: Tensor
    buckets: Tensor

    def __init__(self, spec: BucketBias, weights: Mapping[str, nn.Parameter]) -> None:
        super().__init__(weights)
        self.reach = spec.reach
        distances = torch.arange(-spec.reach, spec.reach + 1, device="cpu")
        buckets = _bias_buckets(distances, spec.num_buckets, spec.reach).to(self.table_weight.device)
        self.register_buffer("buckets", buckets, persistent=False)

    def forward(self) -> Tensor:
        """(num_heads, 2 * reach + 1), for each distance from the query to the key; at least float32."""
        table = self.table_weight[self.buckets].T
        return table.to(torch.promote_types(table.dtype, torch.float32)).contiguous()

    def seen_from_first(self, table: Tensor, layout: PackedLayout) -> Tensor:
        """(total_tokens, num_heads): what the first token of each text adds to the scores of its tokens."""
        return table.T[self.reach + layout.token_positions.clamp(max=self.reach)]


def _bias_buckets(distances: Tensor, num_buckets: int, reach: int) -> Tensor:
    """Near distances have a bucket each, far ones share logarithmic ones; keys behind the query take the second half.

    Source: T5 (Raffel et al., 2019).
    """
    half = num_buckets // 2
    exact = half // 2
    far = distances.abs().clamp(min=1).float() / exact
    steps = (torch.log(far) / math.log(reach / exact) * (half - exact)).long()
    bucket = torch.where(distances.abs() < exact, distances.abs(), (exact + steps).clamp(max=half - 1))
    return bucket + (distances > 0) * half


class DisentangledTables(Weighted):
    """Embeddings of distances, projected by each layer: kept, since they follow from weights alone."""

    table_weight: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    rows: Tensor

    def __init__(
        self, spec: EncoderSpec, relative: Disentangled, layers: Sequence[Weighted], weights: Mapping[str, nn.Parameter]
    ) -> None:
        super().__init__(weights, ("norm_weight", "norm_bias"))
        self.spec = spec
        self.relative = relative
        # Distances beyond share the last row.
        reach = max(relative.reach, spec.max_positions or 0)
        rows = _disentangled_rows(torch.arange(-reach, reach + 1, device="cpu"), relative)
        self.register_buffer("rows", rows.to(self.table_weight.device), persistent=False)
        self._rows = tuple(rows.tolist())
        # A tuple, so that they are not registered twice: the encoder owns them.
        self._layers = tuple(layers)
        # The tables, behind what they were made of.
        self._made: tuple[object, list[PositionTables]] | None = None
        self._buckets: Buckets | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_made": None, "_buckets": None}

    @property
    def buckets(self) -> Buckets:
        """The row of the table for each distance, on the tables' device."""
        buckets = self._buckets
        # Another thread may have forgotten them since.
        return Buckets(self.rows, self._rows) if buckets is None else buckets

    def refresh(self) -> None:
        """Makes the tables anew if weights have changed since, in the same memory, since CUDA graphs may read it."""
        buckets = self._buckets
        if buckets is None or buckets.table.device != self.rows.device:
            self._buckets = Buckets(self.rows, self._rows)
        made_of = (is_batch_invariant(), *(weight_version(weight) for weight in self._sources()))
        made = self._made
        if made is not None and made[0] == made_of:
            return
        fresh = [self._tables_of(layer) for layer in self._layers]
        before = [(None, None)] * len(fresh) if made is None else made[1]
        self._made = (made_of, [_in_memory_of(old, new) for old, new in zip(before, fresh, strict=True)])

    def doubt(self) -> None:
        """Makes `refresh` compute the tables again, in their place."""
        made = self._made
        self._made = None if made is None else (None, made[1])

    def clear(self) -> None:
        """Forgets the tables."""
        self._made = self._buckets = None

    def of_layer(self, layer: int) -> PositionTables:
        """The tables of a set of layer weights."""
        made = self._made
        # Another thread may have forgotten them since.
        return self._tables_of(self._layers[layer]) if made is None else made[1][layer]

    def _sources(self) -> Iterator[Tensor]:
        yield from (weight for weight in (self.table_weight, self.norm_weight, self.norm_bias) if weight is not None)
        shared = ("qkv_weight", "qkv_bias")
        own = ("position_key_weight", "position_key_bias", "position_query_weight", "position_query_bias")
        for layer in self._layers:
            for name in shared if self.relative.shares_projections else own:
                weight = getattr(layer, name)
                if weight is not None:
                    yield weight

    def _tables_of(self, layer: Weighted) -> PositionTables:
        table = self.table_weight
        if self.norm_weight is not None:
            table = layer_norm(table, self.norm_weight, self.norm_bias, self.spec.layer_norm_eps)
        size = self.spec.hidden_size

        def projected(name: str, part: int) -> Tensor:
            if self.relative.shares_projections:
                rows = slice(part * size, (part + 1) * size)
                weight, bias = layer.get_parameter("qkv_weight")[rows], layer.get_parameter("qkv_bias")[rows]
            else:
                weight, bias = layer.get_parameter(f"{name}_weight"), getattr(layer, f"{name}_bias")
            return linear(table, weight, bias).unflatten(1, (self.spec.num_heads, self.spec.head_dim))

        return (
            projected("position_key", 1) if self.relative.content_to_position else None,
            projected("position_query", 0) if self.relative.position_to_content else None,
        )

    def seen_from_first(
        self, tables: PositionTables, query: Tensor, keys: Tensor, layout: PackedLayout, scale: float
    ) -> Tensor:
        """(total_tokens, num_heads): what positions add to the scores of a text's tokens from its first one.

        Args:
            tables: the layer's.
            query: (num_sequences, num_heads, head_dim), of the first tokens.
            keys: (total_tokens, num_heads, head_dim).
            layout: where tokens lie.
            scale: factor on scores.
        """
        pos_key, pos_query = tables
        buckets, positions = self.buckets, layout.token_positions
        dtype = torch.promote_types(keys.dtype, torch.float32)
        bias = keys.new_zeros(keys.shape[:2], dtype=dtype)
        if pos_key is not None:
            # The first token stands at 0, so distances to it are 0, -1, -2, ...
            farthest = buckets.reach
            if layout.positions is None and not is_batch_invariant():
                farthest = min(layout.max_seqlen, farthest)
            rows = pos_key[buckets.of(-torch.arange(farthest + 1, device=keys.device))]
            # [num_sequences, num_heads, positions]
            scores = linear_per_head(query.to(dtype), rows.to(dtype).permute(1, 2, 0))
            rows_of_tokens = torch.arange(keys.shape[0], dtype=torch.int32, device=keys.device)
            sequences = torch.searchsorted(layout.cu_seqlens[1:], rows_of_tokens, right=True)
            bias += scores[sequences.clamp(max=query.shape[0] - 1), :, positions.clamp(max=farthest).long()]
        if pos_query is not None:
            products = (keys * pos_query[buckets.of(-positions)]).to(dtype)
            # A library chooses the order of its sum by the number of rows.
            bias += _folded(products) if is_batch_invariant() else products.sum(2)
        return bias.mul_(scale)


def _in_memory_of(old: PositionTables, new: PositionTables) -> PositionTables:
    keys, queries = (None if fresh is None else in_memory_of(made, fresh) for made, fresh in zip(old, new, strict=True))
    return keys, queries


def _folded(numbers: Tensor) -> Tensor:
    """The sum over the last dimension, always in one order: halves are added to each other, again and again."""
    while (size := numbers.shape[-1]) > 1:
        half = (size + 1) // 2
        folded = numbers[..., :half].clone()
        folded[..., : size - half] += numbers[..., half:]
        numbers = folded
    return numbers[..., 0]


def _disentangled_rows(distances: Tensor, relative: Disentangled) -> Tensor:
    """The row of the table for each distance from the key to the query.

    Source: DeBERTa v2 (He et al., 2021): half of the buckets hold a distance each, the rest logarithmic ranges.
    """
    if relative.buckets:
        middle = relative.buckets // 2
        far = torch.where(distances.abs() < middle, middle - 1, distances.abs()).float()
        largest = torch.log(torch.tensor((relative.reach - 1) / middle, device=distances.device))
        steps = torch.ceil(torch.log(far / middle) / largest * (middle - 1)) + middle
        distances = torch.where(far <= middle, distances, (steps * distances.sign()).long())
    return (distances + relative.span).clamp(0, 2 * relative.span - 1).int()


# Cosines and sines of every position, (max_positions, head_dim // 2) float32 each.
RotaryTables = tuple[Tensor, Tensor]


class RotaryPositions(nn.Module):
    """The frequencies that a model turns by, and their tables, which are kept since they follow from these alone.

    Args:
        spec: the encoder's shape.
        frequencies: for each kind of layer, (head_dim // 2,): the model's own, which its dtype may have rounded; or
            as "table_weight" a parameter, (max_positions, head_dim): RoFormer's sines and, behind them, cosines.
    """

    table_weight: Tensor | None

    def __init__(self, spec: EncoderSpec, frequencies: Mapping[str, Tensor]) -> None:
        super().__init__()
        assert spec.max_positions is not None
        self.max_positions = spec.max_positions
        self.scale = spec.rotary_scale
        self.register_parameter("table_weight", None)
        for kind, values in frequencies.items():
            if isinstance(values, nn.Parameter):
                self.register_parameter(kind, values)
            else:
                self.register_buffer(kind, values, persistent=spec.rotary_is_saved)
        self._made: dict[str, tuple[object, RotaryTables]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_made": {}}

    def refresh(self) -> None:
        """Makes the tables anew if frequencies have changed since, in the same memory: CUDA graphs may read it."""
        for kind, source in (*self.named_buffers(recurse=False), *self.named_parameters(recurse=False)):
            made_of = (*weight_version(source), source.device)
            old = self._made.get(kind)
            if old is not None and old[0] == made_of:
                continue
            tables = self._tables_of(source)
            if old is not None:
                tables = (in_memory_of(old[1][0], tables[0]), in_memory_of(old[1][1], tables[1]))
            self._made[kind] = (made_of, tables)

    def doubt(self) -> None:
        """Makes `refresh` compute the tables again, in their place."""
        self._made = {kind: (None, tables) for kind, (_, tables) in dict(self._made).items()}

    def clear(self) -> None:
        """Forgets the tables."""
        self._made.clear()

    def tables(self, kind: str) -> RotaryTables:
        """The tables of a kind of layers."""
        name = kind if self.table_weight is None else "table_weight"
        made = self._made.get(name)
        # Another thread may have forgotten them since.
        return self._tables_of(getattr(self, name)) if made is None else made[1]

    def _tables_of(self, source: Tensor) -> RotaryTables:
        if source.ndim > 1:
            wide = source.to(torch.promote_types(source.dtype, torch.float32))
            sines, cosines = wide.chunk(2, 1)
            return cosines.contiguous(), sines.contiguous()
        # In float32 whatever the weights' dtype is, as in transformers.
        places = torch.arange(self.max_positions, dtype=torch.float, device=source.device)
        angles = places[:, None] * source.float()
        return angles.cos() * self.scale, angles.sin() * self.scale
