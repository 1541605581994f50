"""The layers' weights packed once, on a CPU, and the pass over layers that the compiled kernels take whole.

Packed weights follow the layers' own: they are made anew before a pass where a weight has changed since.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcls_kernels.packed import PackedLayer, PackedWeight, Packing, pack_weight, packs

from .spec import EncoderSpec

_VERSION = attrgetter("_version")
# The products of a layer, by the names of their weights.
_PRODUCTS = ("qkv", "out", "up", "down")


class PackedProducts(NamedTuple):
    """A layer's weights, each with its bias.

    Attributes:
        layer: all of them, where the compiled kernels compute the layer in one call.
    """

    qkv: PackedWeight
    out: PackedWeight
    up: PackedWeight
    down: PackedWeight
    layer: PackedLayer | None


class PackedLayers:
    """The packed weights of all layers.

    Args:
        spec: the encoder's shape.
        layers: the sets of layer weights.
    """

    def __init__(self, spec: EncoderSpec, layers: Sequence[Any]) -> None:
        self._spec = spec
        self._layers = tuple(layers)
        self._made: tuple[PackedProducts, ...] = ()
        self._made_of: tuple[Any, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": (), "_made_of": ()}

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLayers:
        copied = PackedLayers(self._spec, copy.deepcopy(self._layers, memo))
        if self._made and self._made_of == (self.packing, *_state_of(self._layers)):
            copied._hold(self._made)
        return copied

    @property
    def nbytes(self) -> int:
        """The memory that packed weights take."""
        return sum(weight.nbytes for made in self._made for weight in made[: len(_PRODUCTS)])

    @property
    def packing(self) -> Packing | None:
        """How weights are packed at present."""
        return self._made[0].qkv.packing if self._made else None

    def refresh(self, packing: Packing | None) -> None:
        """Packs the weights if that was not done, or if they have changed since.

        Args:
            packing: as what; None forgets what was packed.
        """
        if packing is None:
            self.clear()
            return
        made_of = (packing, *_state_of(self._layers))
        if made_of != self._made_of:
            with torch.inference_mode(False), torch.no_grad():
                made = tuple(self._pack(layer, packing) for layer in self._layers)
            self._hold(made)
            # As they were before: a write meanwhile counts as a change.
            self._made_of = made_of

    def doubt(self) -> None:
        """Has `refresh` pack everything anew: weights may have changed without a count."""
        self._made_of = ()

    def clear(self) -> None:
        """Forgets what was packed."""
        if self._made:
            self._made, self._made_of = (), ()
            for layer in self._layers:
                layer.packed = None

    def _hold(self, made: tuple[PackedProducts, ...]) -> None:
        self._made = made
        for layer, products in zip(self._layers, made, strict=True):
            layer.packed = products
        self._made_of = (self.packing, *_state_of(self._layers))

    def whole_layers(self) -> list[PackedLayer] | None:
        """All layers in their order, where the compiled kernels compute each in one call."""
        layers = [self._made[each].layer for each in self._spec.layers] if self._made else []
        whole = [layer for layer in layers if layer is not None]
        return whole if whole and len(whole) == len(layers) else None

    def _pack(self, layer: Any, packing: Packing) -> PackedProducts:
        weights = [pack_weight(*product, packing) for product in _products_of(layer)]
        return PackedProducts(*weights, self._whole(layer, weights))

    def _whole(self, layer: Any, weights: list[PackedWeight]) -> PackedLayer | None:
        spec = self._spec
        if not is_plain(spec):
            return None
        return PackedLayer(
            *weights,
            (layer.attention_norm_weight, layer.attention_norm_bias),
            (layer.output_norm_weight, layer.output_norm_bias),
            spec.num_heads,
            spec.head_dim**-0.5,
            spec.layer_norm_eps,
            spec.activation,
        )


def is_plain(spec: EncoderSpec) -> bool:
    """Whether `PackedLayer` describes the encoder's layers: BERT's, without relative or rotary positions."""
    special = spec.pre_norm or spec.gated or spec.needs_places or spec.rotary
    sizes = spec.hidden_size % 64 == 0 and spec.head_dim % 16 == 0 and spec.intermediate_size % 16 == 0
    return sizes and not special


def can_pack(spec: EncoderSpec, packing: Packing) -> bool:
    """Whether the compiled kernels multiply with the layers' weights on this machine."""
    return packs(packing, spec.hidden_size) and packs(packing, spec.intermediate_size)


def _products_of(layer: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
    for name in _PRODUCTS:
        yield getattr(layer, f"{name}_weight"), getattr(layer, f"{name}_bias")


def _state_of(layers: Sequence[nn.Module]) -> tuple[Any, ...]:
    """What changes when a weight is replaced or written to; writing through ``.data`` goes unseen."""
    weights = [each for layer in layers for each in layer._parameters.values() if each is not None]
    try:
        versions = list(map(_VERSION, weights))
    except RuntimeError:
        # What was made in inference mode counts no changes.
        versions = [-1 if each.is_inference() else each._version for each in weights]
    return list(map(Tensor.data_ptr, weights)), versions
