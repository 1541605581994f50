"""A layer of a post-norm encoder over packed weights:

    attended = layer_norm(attention(x Wqkvᵀ) Woutᵀ + x)
    out = layer_norm(f(attended Wupᵀ) Wdownᵀ + attended)

One call computes it for all rows, or for the first row of each sequence: then keys and values are computed of all rows,
and the rest of the first ones alone.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention_varlen_unchecked
from .layout import PackedLayout
from .packed.library import Compiled, LayerStruct, Packing, library
from .packed.torch_path import torch_product
from .packed.weight import PackedWeight, function_number, packs
from .runtime.activations import Activation, check_activation
from .runtime.checks import check_no_gradient, check_tensor

LayerRows = Literal["all", "first"]

# What a multiply-add costs, beside float32's.
_COST: dict[Packing, float] = {"float32": 1.0, "bfloat16": 0.45, "int8": 0.25}
# Multiply-adds from which several threads share: of all layers, and of one. A core of 250 GFLOP/s takes 0.2 ms and
# 0.3 ms.
_MUCH_APART = 25_000_000
_MUCH_TOGETHER = 35_000_000


class Norm(NamedTuple):
    """A layer norm's parameters, (width,) float32 each."""

    weight: Tensor
    bias: Tensor | None


def _copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to(torch.float32, copy=True)


class PackedLayer:
    """The weights of a layer. It never changes, so copies and threads share it.

    Args:
        qkv: query, key and value joined, (3 * width, width); width is a multiple of 64.
        out: behind the attention, (width, width).
        up, down: the feed-forward, (inner, width) and (width, inner).
        attention_norm, output_norm: weight and bias of the layer norms, (width,) each; a bias may be None.
        num_heads: divides width into heads, each a multiple of 16.
        scale: factor on attention scores.
        eps: added to variances.
        activation: of the feed-forward.

    Raises:
        ValueError: shapes that do not fit, weights of several packings, or an unknown activation.
    """

    def __init__(
        self,
        qkv: PackedWeight,
        out: PackedWeight,
        up: PackedWeight,
        down: PackedWeight,
        attention_norm: tuple[Tensor, Tensor | None],
        output_norm: tuple[Tensor, Tensor | None],
        num_heads: int,
        scale: float,
        eps: float,
        activation: Activation,
    ) -> None:
        check_activation(activation)
        width, inner = qkv.in_features, up.out_features
        if width % 64:
            raise ValueError(f"qkv must read a multiple of 64 columns, got {width}")
        if num_heads < 1 or width % (16 * num_heads):
            raise ValueError(f"num_heads must divide width {width} into heads of a multiple of 16, got {num_heads}")
        shapes = {"qkv": (3 * width, width), "out": (width, width), "up": (inner, width), "down": (width, inner)}
        for (name, shape), packed in zip(shapes.items(), (qkv, out, up, down), strict=True):
            if (packed.out_features, packed.in_features) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {(packed.out_features, packed.in_features)}")
            if packed.packing != qkv.packing:
                raise ValueError(f"{name} must be packed as qkv is, {qkv.packing}, got {packed.packing}")
        norms: list[Norm] = []
        for name, norm in (("attention_norm", attention_norm), ("output_norm", output_norm)):
            for each in norm:
                if each is not None and each.shape != (width,):
                    raise ValueError(f"{name} must have shape ({width},), got {tuple(each.shape)}")
            # In memory of their own, as packed weights are.
            weight, bias = norm
            norms.append(Norm(_copy(weight), None if bias is None else _copy(bias)))
        self.qkv, self.out, self.up, self.down = qkv, out, up, down
        self.attention_norm, self.output_norm = norms
        self.width, self.inner, self.num_heads, self.head_dim = width, inner, num_heads, width // num_heads
        self.scale, self.eps, self.activation = scale, eps, activation
        self.struct = LayerStruct(width, num_heads, self.head_dim, inner, function_number(activation), scale, eps, 0)
        self._point()
        self._may_move = False

    def _point(self) -> None:
        struct, norms = self.struct, (*self.attention_norm, *self.output_norm)
        struct.qkv, struct.out = self.qkv.placed(), self.out.placed()
        struct.up, struct.down = self.up.placed(), self.down.placed()
        places = (None if each is None else each.data_ptr() for each in norms)
        struct.attention_norm, struct.attention_norm_bias, struct.output_norm, struct.output_norm_bias = places

    @property
    def may_move(self) -> bool:
        """Whether its tensors may no longer lie where ``struct`` says: see `PackedWeight`."""
        weights_may = self.qkv.may_move or self.out.may_move or self.up.may_move or self.down.may_move
        return self._may_move or weights_may

    def place(self) -> None:
        """Has ``struct`` say where its tensors lie, if they may have moved."""
        if self.may_move:
            self._point()

    def __deepcopy__(self, memo: dict[int, object]) -> PackedLayer:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        self._may_move = True
        weights = (self.qkv, self.out, self.up, self.down, self.attention_norm, self.output_norm)
        return PackedLayer, (*weights, self.num_heads, self.scale, self.eps, self.activation)

    @property
    def nbytes(self) -> int:
        """The memory of its weights."""
        norms = sum(each.nbytes for each in (*self.attention_norm, *self.output_norm) if each is not None)
        return norms + sum(each.nbytes for each in (self.qkv, self.out, self.up, self.down))

    @property
    def is_compiled(self) -> bool:
        """Whether the compiled kernels compute it on this machine."""
        return packs(self.qkv.packing, self.width) and packs(self.qkv.packing, self.inner)


def packed_layer(
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    layer: PackedLayer,
    rows: LayerRows = "all",
    layout: PackedLayout | None = None,
) -> Tensor:
    """A layer of a post-norm encoder, for packed sequences on a CPU.

    Args:
        hidden_states: (total_tokens, width) float32.
        cu_seqlens: (num_sequences + 1,) int32: sequence i is rows ``cu_seqlens[i]:cu_seqlens[i + 1]``.
        max_seqlen: the longest sequence, or any bound above it.
        layer: its weights.
        rows: "all", or "first" for the first row of each sequence.
        layout: made of cu_seqlens and max_seqlen, to make it once for many calls.

    Returns:
        (total_tokens, width), in which rows of no sequence mean nothing, or (num_sequences, width), in which those of
        empty sequences mean nothing; float32. By the compiled kernels a row depends on its own
        sequence alone, bit for bit, whatever else is computed and by how many threads.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape or device that does not fit, or another word for ``rows``.
    """
    check_tensor("hidden_states", hidden_states, "(total_tokens, width)")
    check_no_gradient("hidden_states", hidden_states)
    if hidden_states.dtype != torch.float32:
        raise TypeError(f"hidden_states must be torch.float32, got {hidden_states.dtype}")
    if hidden_states.shape[1] != layer.width or not hidden_states.is_cpu:
        raise ValueError(
            f"hidden_states must have shape (total_tokens, {layer.width}) on the CPU, got "
            f"{tuple(hidden_states.shape)} on {hidden_states.device}"
        )
    if rows not in get_args(LayerRows):
        raise ValueError(f"rows must be one of {', '.join(get_args(LayerRows))}, got {rows!r}")
    layout = PackedLayout.of(hidden_states, cu_seqlens, max_seqlen, layout)
    own = hidden_states.detach().clone(memory_format=torch.contiguous_format)
    return PackedStack([layer])(own, layout, rows)


class PackedStack:
    """Layers of one shape, one after the other: at least one. A layer may stand in it several times.

    Args:
        layers: the layers.
    """

    def __init__(self, layers: Sequence[PackedLayer]) -> None:
        self.layers = tuple(layers)
        addresses = [ctypes.addressof(layer.struct) for layer in layers]
        self.pointers = (ctypes.c_void_p * len(addresses))(*addresses)

    @functools.cached_property
    def but_last(self) -> PackedStack | None:
        """All of them but the last one, or None where there is one alone."""
        return PackedStack(self.layers[:-1]) if len(self.layers) > 1 else None

    def __call__(self, x: Tensor, layout: PackedLayout, rows: LayerRows) -> Tensor:
        """The layers over arguments that are known to fit.

        Args:
            x: (total_tokens, width) float32, contiguous; the layers write over it.
            layout: where each sequence lies.
            rows: "all", or "first" for the first row of each sequence.

        Returns:
            As `packed_layer` does, of the last one; for all rows ``x`` itself, where the compiled kernels run.
        """
        first, compiled = self.layers[0], library()
        if compiled is None or not first.is_compiled:
            for layer in self.layers[:-1]:
                x = torch_layer(x, layout, layer, "all")
            return torch_layer(x, layout, self.layers[-1], rows)
        starts, sequences = layout.cu_seqlens, layout.num_sequences
        tokens = int(starts[-1])
        # A bound may be any number, and memory is taken for it.
        longest = min(layout.max_seqlen, tokens)
        threads = self._threads(compiled, tokens, longest)
        for layer in self.layers:
            layer.place()
        out = x.new_empty(sequences, first.width) if rows == "first" else None
        size = compiled.layers_memory(ctypes.byref(first.struct), tokens, longest, threads)
        memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        compiled.layers(
            self.pointers,
            len(self.layers),
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(starts.data_ptr()),
            sequences,
            longest,
            None if out is None else ctypes.c_void_p(out.data_ptr()),
            ctypes.c_void_p(memory.data_ptr()),
            threads,
        )
        return x if out is None else out

    def _threads(self, compiled: Compiled, tokens: int, longest: int) -> int:
        """How many threads share the work.

        Where each has sequences of its own, none waits before the end, and sharing pays early. Else all wait in each
        layer for the slowest, which on a busy machine may be a time slice late.
        """
        threads = torch.get_num_threads()
        if threads == 1:
            return 1
        layer = self.layers[0]
        products = tokens * layer.width * (4 * layer.width + 2 * layer.inner) * _COST[layer.qkv.packing]
        apart = compiled.are_apart(tokens, longest, threads)
        is_much = products * len(self.layers) > _MUCH_APART if apart else products > _MUCH_TOGETHER
        return threads if is_much else 1


def torch_layer(hidden_states: Tensor, layout: PackedLayout, layer: PackedLayer, rows: LayerRows) -> Tensor:
    """A layer by PyTorch's operators, of arguments that are known to fit."""
    heads = (layer.num_heads, layer.head_dim)
    q, k, v = torch_product(hidden_states, layer.qkv).unflatten(1, (3, *heads)).unbind(1)
    context = attention_varlen_unchecked(q, k, v, layout, layer.scale).flatten(1)
    residual = hidden_states
    if rows == "first":
        if not layout.total_tokens:
            return hidden_states.new_zeros(layout.num_sequences, layer.width)
        # Behind the last row stand empty sequences.
        first = layout.cu_seqlens[:-1].clamp(max=layout.total_tokens - 1)
        context, residual = context[first], hidden_states[first]
    width = (layer.width,)
    attended = torch_product(context, layer.out, residual=residual)
    attended = F.layer_norm(attended, width, *layer.attention_norm, layer.eps)
    inner = torch_product(attended, layer.up, layer.activation)
    return F.layer_norm(torch_product(inner, layer.down, residual=attended), width, *layer.output_norm, layer.eps)
