"""What one encoder is, as plain data: everything that the packed computation needs to know besides the weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EncoderSpec:
    """The shape of a post-norm encoder with absolute positions and exact GELU."""

    vocab_size: int
    max_positions: int
    token_types: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    layer_norm_eps: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class WeightMap:
    """Where each of our parameters comes from in a checkpoint.

    ``sources`` maps one of our names to the checkpoint's: one name, or several to be joined along the first
    dimension (query, key and value are one matrix here).
    """

    sources: dict[str, tuple[str, ...]]

    @property
    def checkpoint_names(self) -> set[str]:
        return {name for names in self.sources.values() for name in names}
