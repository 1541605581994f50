"""Rotary positions: how far queries and keys are turned at each place of a text."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .spec import EncoderSpec
from .weights import weight_version

# Cosines and sines of every position, (max_positions, head_dim // 2) float32 each.
RotaryTables = tuple[Tensor, Tensor]


class RotaryPositions(nn.Module):
    """The frequencies that a model turns by, and the tables that follow from them alone, which are kept.

    Args:
        spec: the encoder's shape.
        frequencies: for each kind of layer, (head_dim // 2,): the model's own, which its dtype may have rounded.
    """

    def __init__(self, spec: EncoderSpec, frequencies: Mapping[str, Tensor]) -> None:
        super().__init__()
        assert spec.max_positions is not None
        self.max_positions = spec.max_positions
        for kind, values in frequencies.items():
            self.register_buffer(kind, values, persistent=False)
        self._made: dict[str, tuple[object, RotaryTables]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_made": {}}

    def refresh(self) -> None:
        """Makes the tables anew where frequencies have changed since; in the same memory, which graphs may read."""
        for kind, frequencies in self.named_buffers(recurse=False):
            made_of = (*weight_version(frequencies), frequencies.device)
            old = self._made.get(kind)
            if old is not None and old[0] == made_of:
                continue
            # In float32 whatever the weights are in, as transformers has them.
            places = torch.arange(self.max_positions, dtype=torch.float, device=frequencies.device)
            angles = places[:, None] * frequencies.float()
            tables = (angles.cos(), angles.sin())
            if old is not None and old[1][0].device == frequencies.device:
                tables = (old[1][0].copy_(tables[0]), old[1][1].copy_(tables[1]))
            self._made[kind] = (made_of, tables)

    def doubt(self) -> None:
        """Has the tables made anew, in their place."""
        self._made = {kind: (None, tables) for kind, (_, tables) in self._made.items()}

    def clear(self) -> None:
        """Forgets the tables."""
        self._made.clear()

    def tables(self, kind: str) -> RotaryTables:
        """The tables of a kind of layers."""
        return self._made[kind][1]
