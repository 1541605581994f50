"""How the tokens of one layer see each other: scale, window, and the positions that enter their scores."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastcls_kernels import PackedLayout

from .positions import BiasTable, DisentangledTables, PositionTables, RotaryTables


class TokenPositions(NamedTuple):
    """Where the tokens of a pass stand: the same for all its layers.

    Attributes:
        layout: where each sequence lies.
        position_ids: (total_tokens,), for rotary positions.
        bias: (num_heads, 2 * reach + 1), for MPNet's positions, or None.
    """

    layout: PackedLayout
    position_ids: Tensor
    bias: Tensor | None


class ChosenRows(NamedTuple):
    """The rows of the last layer that are computed, at least one.

    Attributes:
        rows: (num_rows,) int32, rows of the packed tokens.
        bounds: start and end of the tokens that each row attends to, two int32 tensors; None where row i is the first
            one of sequence i.
    """

    rows: Tensor
    bounds: tuple[Tensor, Tensor] | None


class LayerAttention(NamedTuple):
    """The attention of one layer.

    Attributes:
        scale: factor on scores.
        window_size: how many tokens a token attends to on its left and right, -1 for all.
        rotary: cosines and sines, (max_positions, head_dim // 2) each, or None.
        bias: MPNet's positions, or None.
        tables: DeBERTa's positions, or None.
        layer: the set of layer weights, for which ``tables`` has its own.
    """

    scale: float
    window_size: tuple[int, int]
    rotary: RotaryTables | None
    bias: BiasTable | None
    tables: DisentangledTables | None
    layer: int

    @property
    def positions(self) -> PositionTables:
        """The layer's tables of distances."""
        assert self.tables is not None
        return self.tables.of_layer(self.layer)

    @property
    def needs_keys(self) -> bool:
        """Whether keys depend on positions, so that the query cannot absorb their projection."""
        return self.rotary is not None or self.tables is not None

    def reads_rows(self, chosen: ChosenRows) -> bool:
        """Whether the chosen rows can be computed alone: relative positions are known as a first token sees them."""
        return chosen.bounds is None or (self.bias is None and self.tables is None)

    def bounds(self, chosen: ChosenRows, layout: PackedLayout) -> tuple[Tensor, Tensor] | None:
        """The tokens that each chosen row attends to; None where row i attends to all of sequence i."""
        if self.window_size == (-1, -1):
            return chosen.bounds
        starts, ends = layout.window_bounds(*self.window_size)
        return starts[chosen.rows], ends[chosen.rows]

    def seen_from_first(self, query: Tensor, keys: Tensor | None, positions: TokenPositions) -> Tensor | None:
        """(total_tokens, num_heads): what relative positions add to tokens' scores, or None."""
        if self.bias is not None:
            assert positions.bias is not None
            return self.bias.seen_from_first(positions.bias, positions.layout)
        if self.tables is not None:
            assert keys is not None
            return self.tables.seen_from_first(self.positions, query, keys, positions.layout, self.scale)
        return None
