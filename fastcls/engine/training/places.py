"""Where a model drops out: a rate and a seed for each place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastcls_kernels.training import Dropout


class DropoutRates(NamedTuple):
    """The probability that a number is dropped, for each kind of place; 0 where there is no dropout.

    Attributes:
        embeddings: behind the embeddings' norm, or behind their sum where they have no norm.
        attention: probabilities of attention.
        attended: what attention adds to its input.
        inner: the activation of the feed-forward.
        output: what the feed-forward adds to its input.
        adapter: what X-MOD's adapter adds to its input.
        positions: DeBERTa's table of distances, for each layer anew.
        convolution: DeBERTa's convolution.
        head_in: rows that the head reads.
        head_inner: between the head's dense layers.
        head_out: rows that the head's last product reads.
    """

    embeddings: float = 0.0
    attention: float = 0.0
    attended: float = 0.0
    inner: float = 0.0
    output: float = 0.0
    adapter: float = 0.0
    positions: float = 0.0
    convolution: float = 0.0
    head_in: float = 0.0
    head_inner: float = 0.0
    head_out: float = 0.0


# Places in a layer, and elsewhere: each has its seed.
_IN_LAYERS = ("attention", "attended", "inner", "output", "adapter", "positions")
_ELSEWHERE = ("embeddings", "convolution", "head_in", "head_inner", "head_out")


def num_seeds(rates: DropoutRates, num_layers: int) -> int:
    """How many seeds a pass takes; none where all rates are 0."""
    return num_layers * len(_IN_LAYERS) + len(_ELSEWHERE) if any(rates) else 0


def draw_seeds(count: int) -> Tensor:
    """Seeds of 32 bits, (count,) int64, from PyTorch's generator on the CPU, which none leave as it is."""
    if not count:
        return torch.zeros(0, dtype=torch.int64, device="cpu")
    return torch.randint(2**32, (count,), dtype=torch.int64, device="cpu")


class Seeds:
    """A seed for each place, drawn from PyTorch's generator on the CPU: `torch.manual_seed` makes them come again.

    Args:
        rates: nothing is drawn where all of them are 0.
        num_layers: how many layers the encoder has.
        drawn: as many as `num_seeds` says, or None to draw them.
    """

    def __init__(self, rates: DropoutRates, num_layers: int, drawn: Sequence[int] | None = None) -> None:
        self.rates = rates
        self._seeds: Sequence[int] = draw_seeds(num_seeds(rates, num_layers)).tolist() if drawn is None else drawn

    def at(self, place: str, layer: int | None = None) -> Dropout | None:
        """The dropout of a place, of a layer where layers have it; None where nothing is dropped."""
        rate: float = getattr(self.rates, place)
        if not rate:
            return None
        if layer is None:
            return Dropout(rate, self._seeds[_ELSEWHERE.index(place)])
        return Dropout(rate, self._seeds[len(_ELSEWHERE) + layer * len(_IN_LAYERS) + _IN_LAYERS.index(place)])
