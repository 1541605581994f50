"""Single operations, and kernels: operations at BERT-base's shapes, each beside its usual alternatives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import fastcls_kernels as ours
from fastcls_kernels import AddNorm, PackedLayout, reference

from .provider import Available
from .providers import compiler_missing
from .workloads import SEED, VOCAB_SIZE, Workload, lengths_of

Arguments = tuple[Any, ...]
Random = Callable[..., Tensor]
Shape = tuple[int, int]

EPS = 1e-12
# BERT-base's.
HEADS, HEAD_DIM, WIDTH, INNER, LABELS, MAX_POSITIONS = 12, 64, 768, 3072, 2, 512


def random_numbers(device: torch.device | str, dtype: torch.dtype, seed: int = SEED) -> Random:
    """A function from sizes to normal random numbers, the same ones every time."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *sizes: torch.randn(*sizes, generator=generator, device=device, dtype=dtype)


def layout_of(lengths: Sequence[int], device: torch.device | str) -> PackedLayout:
    """The layout of texts given shortest first, as the model packs them."""
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    return PackedLayout(cu_seqlens, lengths[-1], sum(lengths))


def _arguments(name: str, random: Random, shape: Shape, layout: PackedLayout) -> Arguments:
    """Of one of `OPERATIONS`. What one kernel hands to the next in float32 is float32 here, too."""
    # Heads and the size of one, features before and after, or heads, labels or positions and the width.
    first, width = shape
    tokens, texts, starts = layout.total_tokens, layout.num_sequences, layout.cu_seqlens[:-1]

    def linear(out_features: int, in_features: int) -> Arguments:
        # Scaled as trained weights are, so that results lie around 1.
        return random(out_features, in_features) * in_features**-0.5, random(out_features)

    def norm() -> Arguments:
        return random(width), random(width), EPS

    match name:
        case "attention":
            return *random(tokens, 3, *shape).unbind(1), layout
        case "cls_attention":
            x, bias, residual = random(tokens, width), random(width), random(tokens, width)
            return random(texts, *shape).float(), x, layout, bias, residual, *norm()
        case "cls_pass":
            return random(texts, *shape), random(tokens, width), layout
        case "absorb_query":
            return random(tokens, width), starts, *linear(width, width), linear(width, width)[0], first
        case "cls_output":
            summed, products = random(texts, *shape).float(), (*linear(width, width), *linear(width, width))
            return summed, *products, random(tokens, width), starts, *norm()
        case "pooler_classifier":
            return random(texts, width), *linear(width, width), *linear(first, width)
        case "add_layer_norm":
            return random(tokens, width), random(width), random(tokens, width), *norm()
        case "embedding_layer_norm":
            generator = torch.Generator().manual_seed(SEED)
            ids = torch.randint(VOCAB_SIZE, (tokens,), generator=generator).to(starts.device)
            places = torch.arange(tokens, device=starts.device) - starts.repeat_interleave(layout.cu_seqlens.diff())
            tables = [random(rows, width) for rows in (VOCAB_SIZE, first, 2)]
            return ids, places, torch.zeros_like(ids), *tables, *norm()
        case "linear_gelu":
            return random(tokens, first), *linear(width, first)
        case "linear_add_layer_norm":
            return random(tokens, first), *linear(width, first), random(tokens, width), *norm()
    raise ValueError(f"no operation {name}")


class Operation(NamedTuple):
    """What makes an operation's arguments for texts in a layout, what users call, and the plainest torch."""

    make: Callable[[Random, Shape, PackedLayout], Arguments]
    run: Callable[..., Tensor]
    definition: Callable[..., Tensor]

    def define(self, arguments: Arguments, dtype: torch.dtype) -> Tensor:
        """The definition's result, computed in a dtype."""
        return self.definition(
            *(each.to(dtype) if isinstance(each, Tensor) and each.is_floating_point() else each for each in arguments)
        )


def _attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    return ours.attention_varlen(q, k, v, layout.cu_seqlens, layout.max_seqlen, layout=layout)


def _attention_reference(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    return reference.attention_varlen_reference(q, k, v, layout.cu_seqlens, layout.max_seqlen)


def _cls_attention(query: Tensor, x: Tensor, layout: PackedLayout, *norm: Any) -> Tensor:
    """With the layer norm before it, if there is one: a tile computes it inside or leaves it to a separate pass."""
    # Not the head size's scale, which is for queries that are products over it: these are random.
    before, scale = AddNorm(*norm) if norm else None, x.shape[1] ** -0.5
    return ours.cls_attention(query, x, layout.cu_seqlens, layout.max_seqlen, scale, layout=layout, norm=before)


def _cls_attention_reference(query: Tensor, x: Tensor, layout: PackedLayout, *norm: Any) -> Tensor:
    x = reference.add_layer_norm_reference(x, *norm) if norm else x
    return reference.cls_attention_reference(query, x, layout.cu_seqlens, layout.max_seqlen, x.shape[1] ** -0.5)


def _cls_output_reference(summed: Tensor, value_weight: Tensor, *others: Any) -> Tensor:
    return reference.cls_output_reference(summed.to(value_weight.dtype), value_weight, *others)


def _linear_add_layer_norm_reference(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return reference.add_layer_norm_reference(F.linear(x, weight), *others)


# By their names in the tables of tiles; the [CLS] pass is attention of the [CLS] rows without the norm before it.
_FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "attention": (_attention, _attention_reference),
    "cls_pass": (_cls_attention, _cls_attention_reference),
    "cls_attention": (_cls_attention, _cls_attention_reference),
    "absorb_query": (ours.absorb_query, reference.absorb_query_reference),
    "cls_output": (ours.cls_output, _cls_output_reference),
    "pooler_classifier": (ours.pooler_classifier, reference.pooler_classifier_reference),
    "add_layer_norm": (ours.add_layer_norm, reference.add_layer_norm_reference),
    "embedding_layer_norm": (ours.embedding_layer_norm, reference.embedding_layer_norm_reference),
    "linear_gelu": (ours.linear_gelu, reference.linear_gelu_reference),
    "linear_add_layer_norm": (ours.linear_add_layer_norm, _linear_add_layer_norm_reference),
}
OPERATIONS = {name: Operation(functools.partial(_arguments, name), *both) for name, both in _FUNCTIONS.items()}


class Inputs(NamedTuple):
    """One set of inputs: the operation's arguments, and the texts' lengths."""

    arguments: Arguments
    lengths: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


class Prepared(NamedTuple):
    """What is timed, and what brings its result to the shape of the definition's: None if it is no answer to check."""

    run: Callable[[], Tensor]
    result: Callable[[Tensor], Tensor] | None = lambda out: out


@dataclass(frozen=True)
class KernelProvider:
    """One way to do an operation."""

    name: str
    prepare: Callable[[Inputs], Prepared]
    available: Available = lambda _device, _dtype: None


@dataclass(frozen=True)
class Kernel:
    """One of `OPERATIONS` at one shape; by default the alternatives are its definition, and that compiled."""

    name: str
    operation: str
    shape: Shape
    alternatives: tuple[KernelProvider, ...] = ()

    @property
    def providers(self) -> tuple[KernelProvider, ...]:
        """The first is the baseline."""
        _, ours, definition = OPERATIONS[self.operation]
        by_torch = (
            KernelProvider("torch", _by(definition)),
            KernelProvider("torch.compile", lambda inputs: _by(compiled(definition))(inputs), compiler_missing),
        )
        return (*(self.alternatives or by_torch), KernelProvider("fastcls", _by(ours)))

    def inputs(self, workload: Workload, device: torch.device, dtype: torch.dtype, sets: int) -> list[Inputs]:
        """``sets`` different sets of inputs."""
        random, make = random_numbers(device, dtype), OPERATIONS[self.operation].make
        all_lengths = [sorted(lengths_of(batch).tolist()) for batch in workload.batches(sets)]
        return [Inputs(make(random, self.shape, layout_of(each, device)), each) for each in all_lengths]

    def least(self, inputs: Inputs, itemsize: int) -> tuple[float, float]:
        """(floating point operations, bytes) that it needs at least."""
        flops, elements, other_bytes = _needs(inputs)[self.operation]
        return float(flops), float(elements * itemsize + other_bytes)

    def check(self, inputs: Inputs, found: Tensor) -> float:
        """The largest error against float64.

        Raises:
            ValueError: it is more than twice the definition's in its own dtype, and than rounding explains, or NaN.
        """
        operation = OPERATIONS[self.operation]
        exact = operation.define(inputs.arguments, torch.float64)
        if found.shape != exact.shape:
            raise ValueError(f"the result has shape {tuple(found.shape)} and not {tuple(exact.shape)}")
        results = (found, operation.definition(*inputs.arguments))
        error, plain = (float((each.double() - exact).abs().max()) for each in results)
        # However small the definition's own error happens to be.
        bound = max(2 * plain, _rounding(self.operation, inputs.arguments))
        if not error <= bound:
            raise ValueError(f"error {error:.1e}, more than {bound:.1e}")
        return error


def _rounding(operation: str, arguments: Arguments) -> float:
    """The textbook bound on the error of a first product that is summed in float32 in any order (Higham, 3.5)."""
    if operation not in ("absorb_query", "cls_output", "pooler_classifier", "linear_gelu"):
        return 0.0
    if operation == "absorb_query":
        arguments = (arguments[0][arguments[1]], *arguments[2:])
    x, weight, bias = (each.double().abs() for each in arguments[:3])
    terms = (x.shape[-1] + 1) * torch.finfo(torch.float32).eps / 2
    return float((x @ weight.T + bias).max()) * terms / (1 - terms)


def _by(function: Callable[..., Tensor]) -> Callable[[Inputs], Prepared]:
    return lambda inputs: Prepared(functools.partial(function, *inputs.arguments))


@functools.cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One compiled function for all sets of inputs."""
    return torch.compile(function, dynamic=True)


def _padded(layout: PackedLayout, *packed: Tensor) -> tuple[Tensor, ...]:
    """A mask over the texts, (num_texts, max_seqlen), and tensors padded to it with zeros."""
    keep = torch.arange(layout.max_seqlen, device=layout.cu_seqlens.device) < layout.cu_seqlens.diff()[:, None]
    padded = [each.new_zeros(*keep.shape, *each.shape[1:]) for each in packed]
    for into, each in zip(padded, packed, strict=True):
        into[keep] = each
    return keep, *padded


def _padded_sdpa(inputs: Inputs) -> Prepared:
    """As in a model without packing: q, k and v padded, a mask over the keys."""
    *qkv, layout = inputs.arguments
    keep, *padded = _padded(layout, *qkv)
    q, k, v = (each.transpose(1, 2) for each in padded)
    attend = functools.partial(F.scaled_dot_product_attention, q, k, v)
    mask = None if bool(keep.all()) else keep[:, None, None, :]
    return Prepared(functools.partial(attend, attn_mask=mask), lambda out: out.transpose(1, 2)[keep])


def _varlen(inputs: Inputs) -> Prepared:
    from torch.nn.attention.varlen import varlen_attn

    *qkv, layout = inputs.arguments
    q, k, v = (each.contiguous() for each in qkv)
    bounds, longest = layout.cu_seqlens, layout.max_seqlen
    return Prepared(lambda: cast(Tensor, varlen_attn(q, k, v, bounds, bounds, longest, longest)))


def _flex(inputs: Inputs) -> Prepared:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    *qkv, layout = inputs.arguments
    # [1, HEADS, total_tokens, HEAD_DIM]
    q, k, v = (each.transpose(0, 1)[None].contiguous() for each in qkv)
    text = torch.arange(layout.num_sequences, device=q.device).repeat_interleave(layout.cu_seqlens.diff())
    sizes, device = (inputs.tokens, inputs.tokens), str(q.device)
    mask = create_block_mask(lambda _b, _h, query, key: text[query] == text[key], None, None, *sizes, device=device)
    attend = compiled(cast(Callable[..., Tensor], flex_attention))
    return Prepared(lambda: attend(q, k, v, block_mask=mask), lambda out: out[0].transpose(0, 1))


def _padded_cls_pass(inputs: Inputs) -> Prepared:
    """Two batched products over a padded batch, as torch alone would do it."""
    query, hidden_states, layout = inputs.arguments
    keep, padded = _padded(layout, hidden_states)
    # [num_texts, 1, max_seqlen]
    bias = torch.zeros(keep.shape, dtype=query.dtype, device=query.device).masked_fill_(~keep, -torch.inf)[:, None]
    return Prepared(lambda: torch.baddbmm(bias, query, padded.mT, alpha=WIDTH**-0.5).softmax(-1) @ padded)


def _copy_as_many_bytes(inputs: Inputs) -> Prepared:
    """Half of the bytes are read and half are written."""
    _, elements, _ = _needs(inputs)["cls_pass"]
    return Prepared(inputs.arguments[1].new_empty(elements // 2).normal_().clone, None)


def _needs(inputs: Inputs) -> dict[str, tuple[int, int, int]]:
    """The least that each operation needs: floating point operations, elements to read or write, and other bytes."""
    texts, tokens, pairs = len(inputs.lengths), inputs.tokens, sum(length**2 for length in inputs.lengths)
    # Each text has a row in the model's dtype, and one for each head in float32.
    cls_rows = (4 * texts * WIDTH**2, (2 * WIDTH + texts) * WIDTH, 4 * texts * HEADS * WIDTH)
    return {
        "attention": (4 * pairs * WIDTH, 4 * tokens * WIDTH, 0),
        # Every token is read once; each head of each text reads a query and writes a sum.
        "cls_pass": (4 * HEADS * WIDTH * tokens, (tokens + 2 * HEADS * texts) * WIDTH, 0),
        "absorb_query": cls_rows,
        "cls_output": cls_rows,
        "pooler_classifier": (2 * texts * WIDTH**2, (WIDTH + texts) * WIDTH, 0),
        "add_layer_norm": (0, 3 * tokens * WIDTH, 0),
        "embedding_layer_norm": (0, 2 * tokens * WIDTH, 0),
        "linear_gelu": (2 * tokens * WIDTH * INNER, (tokens + INNER) * WIDTH + tokens * INNER, 0),
    }


_ATTENTION = (
    KernelProvider("torch padded sdpa", _padded_sdpa),
    KernelProvider(
        "torch varlen_attn",
        _varlen,
        lambda device, dtype: None if device.type == "cuda" and dtype.itemsize == 2 else "needs a GPU and 16 bits",
    ),
    KernelProvider("FlexAttention", _flex, compiler_missing),
)
_CLS_PASS = (
    KernelProvider("copy of as many bytes", _copy_as_many_bytes),
    KernelProvider("torch padded", _padded_cls_pass),
)
KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("packed attention", "attention", (HEADS, HEAD_DIM), _ATTENTION),
        Kernel("[CLS] pass", "cls_pass", (HEADS, WIDTH), _CLS_PASS),
        Kernel("[CLS] queries", "absorb_query", (HEADS, WIDTH)),
        Kernel("[CLS] output + layer norm", "cls_output", (HEADS, WIDTH)),
        Kernel("pooler + classifier", "pooler_classifier", (LABELS, WIDTH)),
        Kernel("add + layer norm", "add_layer_norm", (1, WIDTH)),
        Kernel("embedding + layer norm", "embedding_layer_norm", (MAX_POSITIONS, WIDTH)),
        Kernel("product + GELU", "linear_gelu", (WIDTH, INNER)),
    )
}
