"""The layers' weights packed once, on a CPU, and the pass over layers that the compiled kernels take whole.

Packed weights follow the layers' own: they are made anew before a pass where a weight has changed since.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcls_kernels import Activation
from fastcls_kernels.packed import PANEL, PackedTable, PackedWeight, Packing, pack_table, pack_weight, packs
from fastcls_kernels.packed_layer import PackedLayer, PackedStack

from .spec import Disentangled, EncoderSpec, Quantize

# Why something is refused that needs the weights.
LET_GO = (
    "the weights were let go when they were quantised, and what is left is int8. Optimize the model again, without "
    "release"
)

_VERSION = attrgetter("_version")
_PACKINGS: dict[torch.dtype, Packing] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# A table of words that a head multiplies by is not worth its memory a second time.
_LARGEST_OF_HEAD = 1 << 22
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


class PackedWeights:
    """The packed weights of all layers, and for int8 the table of words.

    Args:
        spec: the encoder's shape.
        embeddings: holds the table of words.
        layers: the sets of layer weights.

    Attributes:
        is_alone: the weights themselves are gone: see `let_go`.
    """

    def __init__(self, spec: EncoderSpec, embeddings: Any, layers: Sequence[Any]) -> None:
        self._spec = spec
        self._embeddings = embeddings
        self._layers = tuple(layers)
        self._head: Any = None
        self._made: tuple[PackedProducts, ...] = ()
        self._table: PackedTable | None = None
        self._stack: PackedStack | None = None
        self.is_alone = False
        self._made_of: tuple[Any, ...] = ()
        # The memory of the weights that are packed, and where in it they begin: held, so that no new weight gets an old
        # one's address and is taken for it.
        self._memory: list[tuple[torch.UntypedStorage, Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        # What can be made anew is left out.
        anew = {"_made": (), "_table": None, "_made_of": ()}
        return {**self.__dict__, "_stack": None, "_memory": [], **({} if self.is_alone else anew)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._made:
            self._hold(self._made, self._table)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeights:
        copied = PackedWeights(self._spec, copy.deepcopy(self._embeddings, memo), copy.deepcopy(self._layers, memo))
        copied._head = copy.deepcopy(self._head, memo)
        if self._made and self.is_current(self.packing):
            copied._hold(self._made, self._table)
            copied.is_alone = self.is_alone
        return copied

    def take_head(self, head: Any) -> None:
        """Packs the products of a head, too, in the dtype of its weights: few rows are multiplied there."""
        self._head = head

    @property
    def _reads_table(self) -> bool:
        """Whether the embeddings are those that read a packed table."""
        return self._embeddings.norm_weight is not None and self._spec.mask_token_id is None

    @property
    def nbytes(self) -> int:
        """The memory that packed weights take."""
        products = sum(each.nbytes for made in self._made for each in (made.qkv, made.out, made.up, made.down))
        head = () if self._head is None else self._head.packed
        products += sum(weight.nbytes for weight, _ in head)
        return products + (0 if self._table is None else self._table.nbytes)

    @property
    def packing(self) -> Packing | None:
        """How weights are packed at present."""
        return self._made[0].qkv.packing if self._made else None

    def is_current(self, packing: Packing | None) -> bool:
        """Whether the weights are packed so, and have not changed since.

        Raises:
            RuntimeError: they have, and cannot be packed anew.
        """
        state = self._state(packing) if packing else ()
        is_current = self._made_of == state
        if self.is_alone and not is_current:
            if self._has_only_moved(state):
                self._note(state)
                return True
            raise RuntimeError(f"weights and options must stay as they were: {LET_GO}")
        return is_current

    def let_go(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes out of the modules the weights that are packed, so that their memory is given back.

        Tensors on the device "meta" take their place. A weight that something else reads, too, stays.

        Args:
            weights: all of the model's, under all their names.
        """
        names: dict[int, int] = {}
        for _, weight in weights:
            names[weight.data_ptr()] = names.get(weight.data_ptr(), 0) + 1
        places = [(layer, f"{name}_weight") for layer in self._layers for name in _PRODUCTS]
        if self._table is not None:
            places.append((self._embeddings, "word_weight"))
        for module, name in places:
            weight = module._parameters[name]
            tables = isinstance(self._spec.relative, Disentangled) and self._spec.relative.shares_projections
            if names[weight.data_ptr()] == 1 and not (tables and name == "qkv_weight"):
                empty = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
                # As the last one, since many a library asks the first one for a model's device.
                del module._parameters[name]
                module._parameters[name] = empty
        self.is_alone = True
        self._note(self._state(self.packing))

    def refresh(self, packing: Packing | None) -> None:
        """Packs the weights.

        Args:
            packing: as what; None forgets what was packed.
        """
        if packing is None:
            self._forget()
            return
        made_of = self._state(packing)
        with torch.inference_mode(False), torch.no_grad():
            made = tuple(self._pack(index, packing) for index in range(len(self._layers)))
            table = pack_table(self._embeddings.word_weight) if packing == "int8" and self._reads_table else None
        self._hold(made, table)
        # As they were before: a write meanwhile counts as a change.
        self._note(made_of)

    def doubt(self) -> None:
        """Has `refresh` pack everything anew: weights may have changed without a count."""
        if not self.is_alone:
            self._made_of = ()

    def clear(self) -> None:
        """Forgets what was packed. Of int8 it is kept until `refresh`: a pass under way would go on in float32."""
        if self.packing == "int8":
            self.doubt()
        else:
            self._forget()

    def _forget(self) -> None:
        if self._made and not self.is_alone:
            self._made, self._table, self._stack, self._made_of, self._memory = (), None, None, (), []
            for layer in self._layers:
                layer.packed = None
            self._embeddings.is_packed, self._embeddings.packed_table = False, None
            if self._head is not None:
                self._head.packed = ()

    def _hold(self, made: tuple[PackedProducts, ...], table: PackedTable | None) -> None:
        self._made, self._table = made, table
        layers = [made[each].layer for each in self._spec.layers]
        whole = [layer for layer in layers if layer is not None]
        self._stack = PackedStack(whole) if len(whole) == len(layers) else None
        for layer, products in zip(self._layers, made, strict=True):
            layer.packed = products
        self._embeddings.is_packed, self._embeddings.packed_table = True, table
        if self._head is not None:
            self._head.packed = self._pack_head()
        self._note(self._state(self.packing))

    def _note(self, made_of: tuple[Any, ...]) -> None:
        """Notes what the packed weights are made of."""
        self._memory = [(each.untyped_storage(), each.storage_offset()) for each in self._weights()]
        self._made_of = made_of

    def _has_only_moved(self, state: tuple[Any, ...]) -> bool:
        """Whether all that is different is where in memory the weights lie, as after another process was given them."""
        before, now = self._made_of, self._weights()
        if len(state) != 3 or len(before) != 3 or state[::2] != before[::2] or len(now) != len(self._memory):
            return False
        places = ((each.untyped_storage()._cdata, each.storage_offset()) for each in now)
        return all(
            place == (memory._cdata, offset) for place, (memory, offset) in zip(places, self._memory, strict=True)
        )

    def _weights(self) -> list[Tensor]:
        """What packed weights are made of, and other weights beside them."""
        weights = [each for layer in self._layers for each in layer._parameters.values() if each is not None]
        weights.append(self._embeddings.word_weight)
        if self._head is not None:
            weights += [each for each in self._head._parameters.values() if each is not None]
        return weights

    def _pack_head(self) -> tuple[tuple[PackedWeight, Activation | None], ...]:
        products = tuple(self._head.products())
        packing: Packing | None = _PACKINGS.get(self._embeddings.word_weight.dtype)
        fits = all(
            packing is not None and packs(packing, weight.shape[1]) and weight.numel() <= _LARGEST_OF_HEAD
            for weight, _, _ in products
        )
        if packing is None or not fits:
            return ()
        with torch.inference_mode(False), torch.no_grad():
            return tuple((pack_weight(weight, bias, packing), activation) for weight, bias, activation in products)

    def _state(self, packing: Packing | None) -> tuple[Any, ...]:
        """What packed weights are made of: it changes when a weight is replaced or written to.

        Writing through ``.data`` goes unseen.
        """
        weights = self._weights()
        try:
            versions = list(map(_VERSION, weights))
        except RuntimeError:
            # What was made in inference mode counts no changes.
            versions = [-1 if each.is_inference() else each._version for each in weights]
        state = (packing, list(map(Tensor.data_ptr, weights)), versions)
        # A weight that a parametrization makes anew at each look shows no changes: it is packed anew for each pass.
        modules = [each for each in (*self._layers, self._embeddings, self._head) if each is not None]
        is_made_anew = any("parametrizations" in module._modules for module in modules)
        return (*state, object()) if is_made_anew else state

    @property
    def stack(self) -> PackedStack | None:
        """All layers in their order, where the compiled kernels compute them in one call."""
        return self._stack

    def _pack(self, index: int, packing: Packing) -> PackedProducts:
        layer = self._layers[index]
        qkv, out, up, down = (
            pack_weight(
                getattr(layer, f"{name}_weight"),
                getattr(layer, f"{name}_bias"),
                packing,
                name=f"encoder.layers.{index}.{name}_weight",
            )
            for name in _PRODUCTS
        )
        spec, whole = self._spec, None
        if is_plain(spec):
            norms = (
                (layer.attention_norm_weight, layer.attention_norm_bias),
                (layer.output_norm_weight, layer.output_norm_bias),
            )
            scale: float = spec.head_dim**-0.5
            whole = PackedLayer(
                *(qkv, out, up, down, *norms), spec.num_heads, scale, spec.layer_norm_eps, spec.activation
            )
        return PackedProducts(qkv, out, up, down, whole)


def is_plain(spec: EncoderSpec) -> bool:
    """Whether `PackedLayer` describes the encoder's layers: BERT's, without relative or rotary positions."""
    special = (spec.pre_norm, spec.gated, spec.needs_places, spec.rotary, spec.rms, spec.num_kv_heads, spec.adapter)
    sizes = spec.hidden_size % 64 == 0 and spec.head_dim % 16 == 0 and spec.intermediate_size % 16 == 0
    return sizes and not any(special)


def check_quantizes(spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> None:
    """Checks that an encoder's products can be computed in int8.

    Raises:
        ValueError: another device or dtype, or widths that the panels of packed weights do not fit.
    """
    if device.type != "cpu" or dtype != torch.float32:
        raise ValueError(f"quantize must be None for a model in {dtype} on {device}: int8 is for float32 on a CPU")
    for name, width in (("hidden_size", spec.hidden_size), ("intermediate_size", spec.intermediate_size)):
        multiple = PANEL if name == "hidden_size" else 16
        if width % multiple:
            raise ValueError(f"quantize must be None where {name} is no multiple of {multiple}, got {width}")


def packing_of(spec: EncoderSpec, like: Tensor, quantize: Quantize | None, *, may_pack: bool) -> Packing | None:
    """As what weights are packed, or None.

    Args:
        spec: the encoder's shape.
        like: a weight, whose device and dtype count.
        quantize: see `Engine`.
        may_pack: whether weights in their own dtype may be packed.

    Raises:
        ValueError: ``quantize`` is asked for where it cannot be.
    """
    if quantize is not None:
        check_quantizes(spec, like.device, like.dtype)
        return quantize
    packing = _PACKINGS.get(like.dtype) if may_pack else None
    if packing is None or not can_pack(spec, packing):
        return None
    # Only whole layers keep the rows between products in float32.
    return packing if packing == "float32" or is_plain(spec) else None


def can_pack(spec: EncoderSpec, packing: Packing) -> bool:
    """Whether the compiled kernels multiply with the layers' weights on this machine."""
    return packs(packing, spec.hidden_size) and packs(packing, spec.intermediate_size)
