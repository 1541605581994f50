"""Each operation beside the torch that people would write instead, at BERT-base's shapes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcls_kernels import (
    PackedLayout,
    add_layer_norm,
    attention_varlen,
    cls_attention,
    embedding_layer_norm,
    linear_gelu,
    reference,
)

from .conftest import Timed
from .workloads import VOCAB_SIZE

# Tokens of the first 32 texts of SST-2's dev split, shortest first, as the model packs them.
LENGTHS = [7, 9, 10, 11, 13, 13, 14, 14, 15, 17, 17, 17, 17, 17, 18, 18, 19, 19, 21, 23, 24, 24, 25, 26, 28, 30, 30]
LENGTHS += [30, 31, 33, 34, 35]
TOTAL_TOKENS = sum(LENGTHS)
MAX_LENGTH = LENGTHS[-1]
NUM_HEADS, HEAD_DIM, WIDTH, INNER_WIDTH, MAX_POSITIONS = 12, 64, 768, 3072, 512
SCALE = HEAD_DIM**-0.5
EPS = 1e-12

Random = Callable[..., Tensor]


@pytest.fixture
def layout(device: torch.device) -> PackedLayout:
    cu_seqlens = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32, device=device)
    return PackedLayout(cu_seqlens, MAX_LENGTH, TOTAL_TOKENS)


def check(found: Tensor, definition: Callable[..., Tensor], *arguments: Tensor | float | None) -> None:
    """Holds ``found`` to the definition in float64: at most twice the error of the definition in its own dtype."""
    exact = definition(*(_double(argument) for argument in arguments))
    error, eager_error = ((each.double() - exact).abs().max() for each in (found, definition(*arguments)))
    assert error <= 2 * eager_error, f"error {error:.2e}, eager's own {eager_error:.2e}"


def _double(argument: Tensor | float | None) -> Tensor | float | None:
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


@pytest.mark.benchmark(group="attention: SST-2 lengths")
@pytest.mark.parametrize("provider", ["fastcls packed", "torch padded sdpa"])
def test_attention(provider: str, random: Random, layout: PackedLayout, timed: Timed) -> None:
    qkv = random(TOTAL_TOKENS, 3, NUM_HEADS, HEAD_DIM)
    q, k, v = qkv.unbind(1)
    if provider == "fastcls packed":

        def attend() -> Tensor:
            return attention_varlen(q, k, v, layout.cu_seqlens, MAX_LENGTH, SCALE, layout=layout)

        packed = attend()
    else:
        # [num_sequences, MAX_LENGTH], and the padded form of q, k and v as a model without packing has them.
        keep = torch.arange(MAX_LENGTH, device=q.device) < layout.cu_seqlens.diff()[:, None]
        padded = qkv.new_zeros(*keep.shape, 3, NUM_HEADS, HEAD_DIM)
        padded[keep] = qkv
        queries, keys, values = (each.transpose(1, 2) for each in padded.unbind(2))
        mask = keep[:, None, None, :]

        def attend() -> Tensor:
            return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=SCALE)

        packed = attend().transpose(1, 2)[keep]
    check(packed, reference.attention_varlen_reference, q, k, v, layout.cu_seqlens, MAX_LENGTH, SCALE)
    timed(attend)


@pytest.mark.benchmark(group="the [CLS] pass: SST-2 lengths")
@pytest.mark.parametrize("provider", ["fastcls", "torch reading the same bytes"])
def test_cls_attention(provider: str, random: Random, layout: PackedLayout, timed: Timed) -> None:
    query, hidden_states = random(len(LENGTHS), NUM_HEADS, WIDTH), random(TOTAL_TOKENS, WIDTH)
    # The scale is the head size's, for queries that are products over it; these are not.
    scale = WIDTH**-0.5
    if provider == "fastcls":

        def attend() -> Tensor:
            return cls_attention(query, hidden_states, layout.cu_seqlens, MAX_LENGTH, scale, layout=layout)

        arguments = (query, hidden_states, layout.cu_seqlens, MAX_LENGTH, scale)
        check(attend(), reference.cls_attention_reference, *arguments)
        timed(attend)
    else:
        timed(hidden_states.sum)


@pytest.mark.benchmark(group="add + layer norm")
@pytest.mark.parametrize("provider", ["fastcls", "torch"])
def test_add_layer_norm(provider: str, random: Random, timed: Timed) -> None:
    definition = reference.add_layer_norm_reference
    function = add_layer_norm if provider == "fastcls" else definition
    hidden_states, residual = random(TOTAL_TOKENS, WIDTH), random(TOTAL_TOKENS, WIDTH)
    arguments = (hidden_states, random(WIDTH), residual, random(WIDTH), random(WIDTH), EPS)
    check(function(*arguments), definition, *arguments)
    timed(lambda: function(*arguments))


@pytest.mark.benchmark(group="embedding + layer norm")
@pytest.mark.parametrize("provider", ["fastcls", "torch"])
def test_embedding_layer_norm(provider: str, random: Random, device: torch.device, timed: Timed) -> None:
    definition = reference.embedding_layer_norm_reference
    function = embedding_layer_norm if provider == "fastcls" else definition
    token_ids = torch.randint(VOCAB_SIZE, (TOTAL_TOKENS,), generator=torch.Generator().manual_seed(0)).to(device)
    position_ids = torch.cat([torch.arange(length) for length in LENGTHS]).to(device)
    tables = (random(VOCAB_SIZE, WIDTH), random(MAX_POSITIONS, WIDTH), random(2, WIDTH))
    arguments = (token_ids, position_ids, torch.zeros_like(token_ids), *tables, random(WIDTH), random(WIDTH), EPS)
    check(function(*arguments), definition, *arguments)
    timed(lambda: function(*arguments))


@pytest.mark.benchmark(group="product + GELU")
@pytest.mark.parametrize("provider", ["fastcls", "torch"])
def test_linear_gelu(provider: str, random: Random, timed: Timed) -> None:
    definition = reference.linear_gelu_reference
    function = linear_gelu if provider == "fastcls" else definition
    # Scaled as trained weights are, so that the GELU sees values around 1.
    arguments = (random(TOTAL_TOKENS, WIDTH), random(INNER_WIDTH, WIDTH) * WIDTH**-0.5, random(INNER_WIDTH))
    check(function(*arguments), definition, *arguments)
    timed(lambda: function(*arguments))
