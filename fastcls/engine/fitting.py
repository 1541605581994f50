"""Whether weights that were put in place by hand fit: the kernels and some libraries trust them."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastcls_kernels.runtime.checks import has_contiguous_rows

from .encoder import Encoder
from .positions import BiasTable

# What a kernel is told of a weight, or trusts: nothing that counts changes.
_KIND = attrgetter("shape", "dtype", "device")


class Owner(Protocol):
    """An engine, as far as its weights go."""

    @property
    def own_encoder(self) -> Encoder: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def weights(self, *, all_names: bool = False) -> Iterator[tuple[str, Tensor]]: ...
    def own_modules(self) -> Iterator[tuple[str, nn.Module]]: ...


class WeightFit:
    """The shapes that an engine's weights had at first, which they must keep.

    Args:
        engine: the engine.
    """

    def __init__(self, engine: Owner) -> None:
        self._shapes: dict[str, torch.Size | None] = {
            name: weight.shape for name, weight in engine.weights(all_names=True)
        }
        for path, module in engine.own_modules():
            for key, weight in module._parameters.items():
                if weight is None:
                    # A bias, which has a weight beside it, may be put where there was none.
                    of = self._shapes.get(f"{path}.{key.removesuffix('bias')}weight")
                    self._shapes[f"{path}.{key}"] = None if of is None else of[:1]
        # Where weights are: walking over the modules at each call takes as long as the rest.
        self._places = [module._parameters for _, module in engine.own_modules()]
        # Facts of all weights, when they were last found to fit.
        self._fitting: list[list[Any]] = []

    def check(self, engine: Owner) -> None:
        """See `Engine.check_weights`."""
        weights: list[Tensor] = [each for place in self._places for each in place.values() if each is not None]
        if engine.own_encoder.rotary is not None:
            weights += engine.own_encoder.rotary.buffers()
        facts: list[list[Any]] = [list(map(_KIND, weights)), list(map(Tensor.stride, weights))]
        if facts == self._fitting:
            return
        for name, weight in engine.weights(all_names=True):
            # What has no shape here is a caller's module, or what a parametrization makes a weight of.
            if name in self._shapes:
                self._check(engine, name, weight)
        self._fitting = facts

    def _check(self, engine: Owner, name: str, weight: Tensor) -> None:
        shape = self._shapes[name]
        if shape is None:
            raise ValueError(f"{name} must be None, since this model has none, got shape {tuple(weight.shape)}")
        # PyTorch alone reads these frequencies, and MPNet's table.
        turns = name.startswith("encoder.rotary.")
        is_free = turns or (isinstance(engine.own_encoder.relative, BiasTable) and ".relative." in name)
        if weight.dtype != engine.dtype and not is_free:
            raise TypeError(f"{name} must be {engine.dtype} like the other weights, got {weight.dtype}")
        if "embeddings" in name:
            whole = weight.is_contiguous()
        else:
            whole = turns or weight.ndim > 2 or has_contiguous_rows(weight)
        if weight.is_meta and engine.own_encoder.packed.is_alone:
            return
        if (weight.shape, weight.device) != (shape, engine.device) or not whole:
            raise ValueError(
                f"{name} must be contiguous, of shape {tuple(shape)} on {engine.device}, got "
                f"{tuple(weight.shape)} with strides {weight.stride()} on {weight.device}"
            )
