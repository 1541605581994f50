"""Single kernels, each beside its usual alternatives, at BERT-base's shapes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcls_kernels import (
    PackedLayout,
    absorb_query,
    add_layer_norm,
    attention_varlen,
    cls_attention,
    cls_output,
    embedding_layer_norm,
    linear_gelu,
    pooler_classifier,
    reference,
)

from .provider import Available
from .providers import compiler_missing
from .workloads import SEED, VOCAB_SIZE, Workload, lengths_of

NUM_HEADS, HEAD_DIM, WIDTH, INNER_WIDTH, MAX_POSITIONS = 12, 64, 768, 3072, 512
EPS = 1e-12


class Inputs(NamedTuple):
    """One set of inputs: the operation's arguments, in the order of its definition, and the layout of the texts."""

    arguments: tuple[Any, ...]
    layout: PackedLayout
    lengths: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


class Prepared(NamedTuple):
    """A provider on one set of inputs.

    Attributes:
        run: the timed call.
        result: brings the result of ``run`` to the shape of the definition's; None if it is no answer to check.
    """

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
    """An operation.

    Attributes:
        make: the arguments of one set, from a source of random numbers and the texts' lengths.
        definition: computes the result in the plainest torch.
        least: (floating point operations, bytes) that it needs, from the inputs and the size of an element.
        providers: the first is the baseline.
        rounding: an error that is always allowed, however small the definition's own happens to be.
    """

    name: str
    make: Callable[[Callable[..., Tensor], PackedLayout, list[int]], tuple[Any, ...]]
    definition: Callable[..., Tensor]
    least: Callable[[Inputs, int], tuple[float, float]]
    providers: tuple[KernelProvider, ...]
    rounding: Callable[[Inputs], float] = lambda _: 0.0

    def inputs(self, workload: Workload, device: torch.device, dtype: torch.dtype, sets: int) -> list[Inputs]:
        """``sets`` different sets of inputs."""
        generator = torch.Generator(device).manual_seed(SEED)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        made = []
        for batch in workload.batches(sets):
            # Shortest first, as the model packs them.
            lengths = sorted(lengths_of(batch).tolist())
            cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
            layout = PackedLayout(cu_seqlens, lengths[-1], sum(lengths))
            made.append(Inputs(self.make(random, layout, lengths), layout, lengths))
        return made

    def check(self, inputs: Inputs, found: Tensor) -> float:
        """The largest error against float64.

        Raises:
            ValueError: it is more than twice that of the definition in the inputs' own dtype, and more than rounding
                explains, or not a number.
        """
        exact = self.definition(*map(_double, inputs.arguments))
        if found.shape != exact.shape:
            raise ValueError(f"the result has shape {tuple(found.shape)} and not {tuple(exact.shape)}")
        error, plain = (
            float((each.double() - exact).abs().max()) for each in (found, self.definition(*inputs.arguments))
        )
        bound = max(2 * plain, self.rounding(inputs))
        if not error <= bound:
            raise ValueError(f"error {error:.1e}, more than {bound:.1e}")
        return error


def _double(argument: Any) -> Any:
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def _by(function: Callable[..., Tensor]) -> Callable[[Inputs], Prepared]:
    return lambda inputs: Prepared(functools.partial(function, *inputs.arguments))


@functools.cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One compiled function for all sets of inputs."""
    return torch.compile(function, dynamic=True)


def _torch_and_ours(definition: Callable[..., Tensor], ours: Callable[..., Tensor]) -> tuple[KernelProvider, ...]:
    def by_compiling(inputs: Inputs) -> Prepared:
        return _by(compiled(definition))(inputs)

    return (
        KernelProvider("torch", _by(definition)),
        KernelProvider("torch.compile", by_compiling, compiler_missing),
        KernelProvider("fastcls", _by(ours)),
    )


# Attention


def _attention_arguments(random: Callable[..., Tensor], layout: PackedLayout, _: list[int]) -> tuple[Any, ...]:
    q, k, v = random(layout.total_tokens, 3, NUM_HEADS, HEAD_DIM).unbind(1)
    return q, k, v, layout.cu_seqlens, layout.max_seqlen, HEAD_DIM**-0.5


def _attention_least(inputs: Inputs, itemsize: int) -> tuple[float, float]:
    return 4.0 * WIDTH * sum(length**2 for length in inputs.lengths), 4.0 * inputs.tokens * WIDTH * itemsize


def _padded_sdpa(inputs: Inputs) -> Prepared:
    """As in a model without packing: q, k and v padded, a mask over the keys."""
    *qkv, cu_seqlens, max_seqlen, scale = inputs.arguments
    keep = torch.arange(max_seqlen, device=cu_seqlens.device) < cu_seqlens.diff()[:, None]

    def pad(packed: Tensor) -> Tensor:
        padded = packed.new_zeros(*keep.shape, NUM_HEADS, HEAD_DIM)
        padded[keep] = packed
        return padded.transpose(1, 2)

    q, k, v = map(pad, qkv)
    mask = None if bool(keep.all()) else keep[:, None, None, :]
    return Prepared(
        lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale),
        lambda out: out.transpose(1, 2)[keep],
    )


def _varlen_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" or dtype == torch.float32:
        return "torch.nn.attention.varlen needs a GPU and 16 bits"
    return None


def _varlen(inputs: Inputs) -> Prepared:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v, cu_seqlens, max_seqlen, _ = inputs.arguments
    q, k, v = (each.contiguous() for each in (q, k, v))
    return Prepared(lambda: cast(Tensor, varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)))


def _flex(inputs: Inputs) -> Prepared:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    *qkv, cu_seqlens, _, scale = inputs.arguments
    # [1, NUM_HEADS, total_tokens, HEAD_DIM]
    q, k, v = (each.transpose(0, 1)[None].contiguous() for each in qkv)
    text = torch.repeat_interleave(torch.arange(len(inputs.lengths), device=q.device), cu_seqlens.diff().long())

    def same_text(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return text[query] == text[key]

    mask = create_block_mask(same_text, None, None, inputs.tokens, inputs.tokens, device=str(q.device))
    attend = compiled(cast(Callable[..., Tensor], flex_attention))
    return Prepared(
        lambda: attend(q, k, v, block_mask=mask, scale=scale),
        lambda out: out[0].transpose(0, 1),
    )


def _our_attention(inputs: Inputs) -> Prepared:
    return Prepared(functools.partial(attention_varlen, *inputs.arguments, layout=inputs.layout))


# The [CLS] pass


def _cls_arguments(random: Callable[..., Tensor], layout: PackedLayout, lengths: list[int]) -> tuple[Any, ...]:
    # Not the head size's scale, which is for queries that are products over it: these are random.
    scale = WIDTH**-0.5
    query, hidden_states = random(len(lengths), NUM_HEADS, WIDTH), random(layout.total_tokens, WIDTH)
    return query, hidden_states, layout.cu_seqlens, layout.max_seqlen, scale


def _cls_least(inputs: Inputs, itemsize: int) -> tuple[float, float]:
    # Every token is read once; each head of each text reads a query and writes a sum.
    rows = inputs.tokens + 2 * NUM_HEADS * len(inputs.lengths)
    return 4.0 * NUM_HEADS * WIDTH * inputs.tokens, 1.0 * rows * WIDTH * itemsize


def _copy_as_many_bytes(inputs: Inputs) -> Prepared:
    """Half of the bytes are read and half are written."""
    hidden_states = inputs.arguments[1]
    _, num_bytes = _cls_least(inputs, hidden_states.itemsize)
    source = hidden_states.new_empty(int(num_bytes / hidden_states.itemsize / 2)).normal_()
    return Prepared(source.clone, None)


def _padded_cls_attention(inputs: Inputs) -> Prepared:
    """Two batched products over a padded batch, as torch alone would do it."""
    query, hidden_states, cu_seqlens, max_seqlen, scale = inputs.arguments
    keep = torch.arange(max_seqlen, device=query.device) < cu_seqlens.diff()[:, None]
    padded = hidden_states.new_zeros(*keep.shape, WIDTH)
    padded[keep] = hidden_states
    # [num_texts, 1, max_seqlen]
    bias = torch.zeros(keep.shape, dtype=query.dtype, device=query.device).masked_fill_(~keep, -torch.inf)[:, None]
    return Prepared(lambda: torch.baddbmm(bias, query, padded.mT, alpha=scale).softmax(-1) @ padded)


def _our_cls_attention(inputs: Inputs) -> Prepared:
    return Prepared(functools.partial(cls_attention, *inputs.arguments, layout=inputs.layout))


# The [CLS] rows before and after that pass


def _first_rows(random: Callable[..., Tensor], layout: PackedLayout) -> tuple[Tensor, Tensor]:
    """Hidden states, and where each text begins."""
    return random(layout.total_tokens, WIDTH), layout.cu_seqlens[:-1]


def _projection(random: Callable[..., Tensor], rows: int = WIDTH) -> Tensor:
    # Scaled as trained weights are.
    return random(rows, WIDTH) * WIDTH**-0.5


def _query_arguments(random: Callable[..., Tensor], layout: PackedLayout, _: list[int]) -> tuple[Any, ...]:
    return *_first_rows(random, layout), _projection(random), random(WIDTH), _projection(random), NUM_HEADS


def _query_least(inputs: Inputs, itemsize: int) -> tuple[float, float]:
    texts = len(inputs.lengths)
    return 4.0 * texts * WIDTH**2, (2.0 * WIDTH**2 + texts * WIDTH) * itemsize + 4.0 * texts * NUM_HEADS * WIDTH


def _output_arguments(random: Callable[..., Tensor], layout: PackedLayout, lengths: list[int]) -> tuple[Any, ...]:
    # In float32, as from the pass.
    summed = random(len(lengths), NUM_HEADS, WIDTH).float()
    value, out = _projection(random), _projection(random)
    value_bias, out_bias, *norm = (random(WIDTH) for _ in range(4))
    return summed, value, value_bias, out, out_bias, *_first_rows(random, layout), *norm, EPS


def _output_definition(summed: Tensor, value_weight: Tensor, *others: Any) -> Tensor:
    return reference.cls_output_reference(summed.to(value_weight.dtype), value_weight, *others)


def _classifier_arguments(random: Callable[..., Tensor], _: PackedLayout, lengths: list[int]) -> tuple[Any, ...]:
    return random(len(lengths), WIDTH), _projection(random), random(WIDTH), _projection(random, 2), random(2)


def _classifier_least(inputs: Inputs, itemsize: int) -> tuple[float, float]:
    texts = len(inputs.lengths)
    return 2.0 * texts * WIDTH**2, (WIDTH**2 + texts * WIDTH) * itemsize


# Operations row by row


def _norm_arguments(random: Callable[..., Tensor], layout: PackedLayout, _: list[int]) -> tuple[Any, ...]:
    hidden_states, residual = random(layout.total_tokens, WIDTH), random(layout.total_tokens, WIDTH)
    return hidden_states, random(WIDTH), residual, random(WIDTH), random(WIDTH), EPS


def _norm_least(inputs: Inputs, itemsize: int) -> tuple[float, float]:
    return 0.0, 3.0 * inputs.tokens * WIDTH * itemsize


def _embedding_arguments(random: Callable[..., Tensor], layout: PackedLayout, lengths: list[int]) -> tuple[Any, ...]:
    tables = (random(VOCAB_SIZE, WIDTH), random(MAX_POSITIONS, WIDTH), random(2, WIDTH))
    device = layout.cu_seqlens.device
    token_ids = torch.randint(VOCAB_SIZE, (layout.total_tokens,), generator=torch.Generator().manual_seed(SEED))
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    ids = (token_ids.to(device), position_ids.to(device), torch.zeros_like(token_ids).to(device))
    return *ids, *tables, random(WIDTH), random(WIDTH), EPS


def _embedding_least(inputs: Inputs, itemsize: int) -> tuple[float, float]:
    return 0.0, 2.0 * inputs.tokens * WIDTH * itemsize


def _gelu_arguments(random: Callable[..., Tensor], layout: PackedLayout, _: list[int]) -> tuple[Any, ...]:
    # Scaled as trained weights are, so that the GELU sees values around 1.
    return random(layout.total_tokens, WIDTH), random(INNER_WIDTH, WIDTH) * WIDTH**-0.5, random(INNER_WIDTH)


def _gelu_least(inputs: Inputs, itemsize: int) -> tuple[float, float]:
    tokens = inputs.tokens
    moved = (tokens + INNER_WIDTH) * WIDTH + tokens * INNER_WIDTH
    return 2.0 * tokens * WIDTH * INNER_WIDTH, 1.0 * moved * itemsize


def _product_rounding(inputs: Inputs) -> float:
    """The textbook bound on the error of the first product, summed in float32 in any order (Higham, 3.5)."""
    return _rounding_of(*inputs.arguments[:3])


def _query_rounding(inputs: Inputs) -> float:
    hidden_states, rows, query_weight, query_bias, *_ = inputs.arguments
    return _rounding_of(hidden_states[rows], query_weight, query_bias)


def _rounding_of(*product: Tensor) -> float:
    x, weight, bias = map(_double, product)
    terms = (x.shape[-1] + 1) * torch.finfo(torch.float32).eps / 2
    return float((x.abs() @ weight.abs().T + bias.abs()).max()) * terms / (1 - terms)


_ALL = (
    Kernel(
        "packed attention",
        _attention_arguments,
        reference.attention_varlen_reference,
        _attention_least,
        (
            KernelProvider("torch padded sdpa", _padded_sdpa),
            KernelProvider("torch varlen_attn", _varlen, _varlen_missing),
            KernelProvider("FlexAttention", _flex, compiler_missing),
            KernelProvider("fastcls", _our_attention),
        ),
    ),
    Kernel(
        "[CLS] pass",
        _cls_arguments,
        reference.cls_attention_reference,
        _cls_least,
        (
            KernelProvider("copy of as many bytes", _copy_as_many_bytes),
            KernelProvider("torch padded", _padded_cls_attention),
            KernelProvider("fastcls", _our_cls_attention),
        ),
    ),
    Kernel(
        "[CLS] queries",
        _query_arguments,
        reference.absorb_query_reference,
        _query_least,
        _torch_and_ours(reference.absorb_query_reference, absorb_query),
        _query_rounding,
    ),
    Kernel(
        "[CLS] output + layer norm",
        _output_arguments,
        _output_definition,
        _query_least,
        _torch_and_ours(_output_definition, cls_output),
        _product_rounding,
    ),
    Kernel(
        "pooler + classifier",
        _classifier_arguments,
        reference.pooler_classifier_reference,
        _classifier_least,
        _torch_and_ours(reference.pooler_classifier_reference, pooler_classifier),
        _product_rounding,
    ),
    Kernel(
        "add + layer norm",
        _norm_arguments,
        reference.add_layer_norm_reference,
        _norm_least,
        _torch_and_ours(reference.add_layer_norm_reference, add_layer_norm),
    ),
    Kernel(
        "embedding + layer norm",
        _embedding_arguments,
        reference.embedding_layer_norm_reference,
        _embedding_least,
        _torch_and_ours(reference.embedding_layer_norm_reference, embedding_layer_norm),
    ),
    Kernel(
        "product + GELU",
        _gelu_arguments,
        reference.linear_gelu_reference,
        _gelu_least,
        _torch_and_ours(reference.linear_gelu_reference, linear_gelu),
        _product_rounding,
    ),
)
KERNELS = {kernel.name: kernel for kernel in _ALL}
