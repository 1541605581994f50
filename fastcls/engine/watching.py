"""An engine's weights and modules, and what others may have done to them: hooks, another ``forward``, other weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .convolution import EmbeddingConvolution
from .encoder import Encoder
from .fitting import WeightFit
from .head import Head
from .positions import BiasTable
from .spec import EncoderSpec, LastLayer, Rows
from .weights import has_hooks


class WatchedModule(nn.Module):
    """An encoder and a head, whose modules and weights are looked at before each call."""

    spec: EncoderSpec
    # The modules that compute, where others are shown in their places.
    own_parts: dict[str, Any] | None = None

    @property
    def own_encoder(self) -> Encoder:
        """The encoder that computes; ``encoder`` may be the given model's, once that is shown."""
        parts: dict[str, Any] = self.own_parts or self._modules
        encoder: Encoder = parts["encoder"]
        return encoder

    @property
    def own_head(self) -> Head:
        """The head that computes."""
        parts: dict[str, Any] = self.own_parts or self._modules
        head: Head = parts["head"]
        return head

    @property
    def last_layer(self) -> LastLayer:
        """How the last layer is computed."""
        raise NotImplementedError

    @property
    def _like(self) -> Tensor:
        """A weight that is always there: it tells all weights' device and dtype."""
        return self.own_encoder.like

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._like.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and of the computation."""
        return self._like.dtype

    def weights(self, *, all_names: bool = False) -> Iterator[tuple[str, Tensor]]:
        """All weights by our names: parameters, and the rotary frequencies, which no state dict holds.

        Args:
            all_names: give each under all its names, or under its first alone.
        """
        seen: set[int] = set()
        for path, module in self.own_modules():
            for key, weight in module._parameters.items():
                if weight is not None and (all_names or id(weight) not in seen):
                    seen.add(id(weight))
                    yield f"{path}.{key}", weight
        yield from self.named_rotary()

    def named_rotary(self) -> Iterator[tuple[str, Tensor]]:
        """The rotary frequencies by our names."""
        if self.own_encoder.rotary is not None:
            yield from self.own_encoder.rotary.named_buffers("encoder.rotary")

    def own_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules of encoder and head, by our names: a model that is trained shows others, the given one's."""
        yield from self.own_encoder.named_modules(prefix="encoder")
        yield from self.own_head.named_modules(prefix="head")

    def check_weights(self) -> None:
        """Checks weights that were put in place by hand, since the kernels and some libraries trust them.

        To be called before anything is made of the weights. A graph reads them where they were when it was captured.

        Raises:
            TypeError: one has another dtype than the others.
            ValueError: another shape or device, or strides that the kernels do not take.
        """
        self._fit.check(self)

    def _watch_modules(self) -> None:
        """Notes where modules keep hooks and attributes, and their weights' shapes: each call looks there."""
        modules = [self, *(module for _, module in self.own_modules())]
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._states = [vars(module) for module in modules[1:]]
        self._fit = WeightFit(self)

    def is_hooked(self) -> bool:
        """Whether a module has hooks, or one inside has another ``forward`` set on it."""
        return any(self._hooks) or any("forward" in state for state in self._states)

    def hooked_inside(self) -> list[tuple[str, nn.Module]]:
        """The modules below this one that have forward hooks, or another ``forward``, by their names."""
        return [(name, module) for name, module in self.own_modules() if has_hooks(module)]

    def _check_hooks(self, rows: Rows) -> None:
        """Refuses hooks on modules that a pass does not call as a whole."""
        for name, module in self.hooked_inside():
            reason = self.never_called(name, module, rows)
            if reason is not None:
                raise RuntimeError(
                    f"{name} must have no forward hooks, and no other forward, which would not run: {reason}"
                )

    def never_called(self, name: str, module: nn.Module, rows: Rows) -> str | None:
        """Why a pass does not call a module as a whole, or None where it does."""
        last = f"encoder.layers.{self.spec.layers[-1]}"
        if name == last and rows in ("first", "chosen") and self.last_layer != "full":
            return f'only some rows of it are computed. Set last_layer = "full", got {self.last_layer!r}'
        if name not in ("encoder", "head") and not name.startswith(("encoder.layers.", "encoder.embeddings")):
            called = isinstance(module, (BiasTable, EmbeddingConvolution))
            return None if called else "it holds tables that others read"
        return None
