"""cls_attention and cls_attention_kv against their definitions, and the absorbed form against the usual one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import assert_as_exact_as, cu_seqlens_of, eager_runs, random
from torch import Tensor

from fastcls_kernels import AddNorm, add_layer_norm, cls_attention, cls_attention_kv, takes_norm
from fastcls_kernels.reference import (
    add_layer_norm_reference,
    cls_attention_kv_reference,
    cls_attention_reference,
)
from fastcls_kernels.tuning import use_tile

SCALE = 0.125
# Few float32 numbers make an RMS that varies by more than the bound's tenth; the PyTorch path can afford many.
MANY = 8
# Widths with one to four chunks of columns, a last chunk that is not full, and more than one group of columns.
WIDTHS = [16, 48, 80, 312, 384, 768, 1040]


def check_stream(
    lengths: list[int], num_heads: int, width: int, dtype: torch.dtype, device: str, num_splits: int | None = None
) -> None:
    hidden_states = random(sum(lengths) + 2, width, dtype=dtype, device=device)
    # Queries in float32, as the model makes them; scores of a size that spreads the weights over several tokens.
    query = random(len(lengths), num_heads, width, dtype=torch.float32, device=device, scale=8 * width**-0.5)
    arguments: tuple[Any, ...] = (cu_seqlens_of(lengths, device), max(lengths, default=0), SCALE)
    actual = cls_attention(query, hidden_states, *arguments, num_splits=num_splits)
    assert actual.dtype == torch.float32
    # The usual computation would have 16-bit queries; what the pair of numbers buys must show in the bound.
    eager = [run.float() for run in eager_runs(cls_attention_reference, query.to(dtype), hidden_states, *arguments)]
    exact = cls_attention_reference(query.double(), hidden_states.double(), *arguments)
    assert_as_exact_as(actual, eager, exact)


@pytest.mark.parametrize("num_splits", [None, 1, 3], ids=lambda splits: f"splits={splits}")
def test_kernel_matches_definition(
    kernels: str, lengths: list[int], dtype: torch.dtype, num_splits: int | None
) -> None:
    check_stream(lengths, 12, 48, dtype, kernels, num_splits)


def test_torch_path_matches_definition(torch_path: str, lengths: list[int], dtype: torch.dtype) -> None:
    check_stream(lengths * MANY, 12, 48, dtype, torch_path)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_kernel_takes_every_width(kernels: str, width: int, dtype: torch.dtype) -> None:
    check_stream([5, 40, 1, 23, 64, 9, 33, 50], 12, width, dtype, kernels)


@pytest.mark.parametrize("num_heads", [1, 16, 17, 64])
@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_kernel_takes_every_head_count(kernels: str, num_heads: int, dtype: torch.dtype) -> None:
    check_stream([5, 40, 1], num_heads, 64, dtype, kernels)


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_queries_beyond_float16(kernels: str, dtype: torch.dtype) -> None:
    # What absorbing makes of large weights may pass 65,504, the end of float16, before it is scaled.
    query = torch.full((1, 1, 16), 7e4, device=kernels)
    hidden_states = random(20, 16, dtype=dtype, device=kernels, scale=1e-4)
    arguments: tuple[Any, ...] = (cu_seqlens_of([20], kernels), 20, SCALE)
    exact = cls_attention_reference(query.double(), hidden_states.double(), *arguments)
    actual = cls_attention(query, hidden_states, *arguments)
    eager = cls_attention_reference(query, hidden_states.float(), *arguments).to(dtype).float()
    assert_as_exact_as(actual, [eager], exact)


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_queries_may_lie_head_by_head(kernels: str, dtype: torch.dtype) -> None:
    # As the model's batched product leaves them: one head of all texts after the other.
    hidden_states = random(30, 48, dtype=dtype, device=kernels)
    query = random(3, 2, 48, dtype=torch.float32, device=kernels).transpose(0, 1)
    arguments: tuple[Any, ...] = (cu_seqlens_of([10, 20], kernels), 20, SCALE)
    expected = cls_attention(query.contiguous(), hidden_states, *arguments)
    assert torch.equal(cls_attention(query, hidden_states, *arguments), expected)


# Widths of one chunk, of three, and of three of which the last is not full.
@pytest.mark.parametrize(("width", "num_splits"), [(32, 1), (96, 3), (130, 1)])
def test_a_layer_norm_before_the_pass_may_run_inside(
    kernels: str, lengths: list[int], dtype: torch.dtype, width: int, num_splits: int
) -> None:
    # Few numbers make an RMS that varies by more than the bound's tenth.
    lengths = lengths * (4 if sum(lengths) < 60 else 1)
    total = sum(lengths)
    x, residual = (random(total, width, dtype=dtype, device=kernels) for _ in range(2))
    bias, weight, norm_bias = (random(width, dtype=dtype, device=kernels) for _ in range(3))
    # Features beside which all others are small, as trained encoders have them.
    x[:, 3] += 30.0
    norm = AddNorm(bias, residual, weight, norm_bias, 1e-12)
    query = random(len(lengths), 3, width, dtype=torch.float32, device=kernels)
    cu_seqlens, longest = cu_seqlens_of(lengths, kernels), max(lengths, default=0)

    def usual(query: Tensor, x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, norm_bias: Tensor) -> Tensor:
        normalised = add_layer_norm_reference(x, bias, residual, weight, norm_bias, 1e-12)
        return cls_attention_reference(query, normalised, cu_seqlens, longest, SCALE)

    inputs = (query, x, bias, residual, weight, norm_bias)
    exact = usual(*(tensor.double() for tensor in inputs))
    eager = eager_runs(usual, *inputs)
    tile = {"NORM": True, "BLOCK_H": 16, "BLOCK_N": 16, "MAX_BLOCK_W": 32, "num_warps": 4, "num_stages": 1}
    if width == 130:
        tile["MAX_BLOCK_W"] = 64
    with use_tile("cls_attention", tile):
        assert takes_norm(x)
        actual = cls_attention(query, x, cu_seqlens, longest, SCALE, norm=norm, num_splits=num_splits)
    assert_as_exact_as(actual, eager, exact)
    # And the same where it is taken before.
    with use_tile("cls_attention", {**tile, "NORM": False}):
        assert not takes_norm(x)
        before = cls_attention(query, x, cu_seqlens, longest, SCALE, norm=norm, num_splits=num_splits)
    assert_as_exact_as(before, eager, exact)


def test_a_layer_norm_without_a_bias_is_taken_before(kernels: str, dtype: torch.dtype) -> None:
    x, residual = (random(30, 48, dtype=dtype, device=kernels) for _ in range(2))
    weight, norm_bias = (random(48, dtype=dtype, device=kernels) for _ in range(2))
    query = random(2, 3, 48, dtype=torch.float32, device=kernels)
    norm = AddNorm(None, residual, weight, norm_bias, 1e-12)
    tile = {"NORM": True, "BLOCK_H": 16, "BLOCK_N": 16, "MAX_BLOCK_W": 64, "num_warps": 4, "num_stages": 1}
    arguments: tuple[Any, ...] = (cu_seqlens_of([10, 20], kernels), 20, SCALE)
    with use_tile("cls_attention", tile):
        actual = cls_attention(query, x, *arguments, norm=norm)
        assert torch.equal(actual, cls_attention(query, add_layer_norm(x, *norm), *arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [384, 768, 1024, 2048, 4096])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_kernel_on_long_sequences(kernels: str, width: int, dtype: torch.dtype) -> None:
    check_stream([8192, 1, 511, 0, 2048], 16, width, dtype, kernels)


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_a_neighbours_nan_stays_with_the_neighbour(kernels: str, dtype: torch.dtype) -> None:
    hidden_states = random(30, 48, dtype=dtype, device=kernels)
    query = random(2, 3, 48, dtype=torch.float32, device=kernels)
    clean = cls_attention(query, hidden_states, cu_seqlens_of([10, 20], kernels), 20, SCALE)
    hidden_states[10:] = float("nan")
    assert torch.equal(cls_attention(query, hidden_states, cu_seqlens_of([10, 20], kernels), 20, SCALE)[0], clean[0])


def check_kv(lengths: list[int], head_dim: int, dtype: torch.dtype, device: str, num_splits: int | None) -> None:
    query = random(len(lengths), 3, head_dim, dtype=dtype, device=device)
    k, v = random(sum(lengths) + 2, 2, 3, head_dim, dtype=dtype, device=device).unbind(1)
    arguments: tuple[Any, ...] = (cu_seqlens_of(lengths, device), max(lengths, default=0))
    actual = cls_attention_kv(query, k, v, *arguments, num_splits=num_splits)
    eager = eager_runs(cls_attention_kv_reference, query, k, v, *arguments)
    exact = cls_attention_kv_reference(query.double(), k.double(), v.double(), *arguments)
    assert_as_exact_as(actual, eager, exact)


@pytest.mark.parametrize("num_splits", [None, 1, 3], ids=lambda splits: f"splits={splits}")
@pytest.mark.parametrize("head_dim", [32, 48])
def test_kv_kernel_matches_definition(
    kernels: str, lengths: list[int], head_dim: int, dtype: torch.dtype, num_splits: int | None
) -> None:
    check_kv(lengths, head_dim, dtype, kernels, num_splits)


def test_kv_torch_path_matches_definition(torch_path: str, lengths: list[int], dtype: torch.dtype) -> None:
    check_kv(lengths * MANY, 48, dtype, torch_path, None)


@pytest.mark.usefixtures("torch_path")
def test_absorbed_form_is_the_usual_one_in_float64() -> None:
    # The identity that the last layer rests on: no keys, no values, the same answer to float64's own rounding.
    lengths, num_heads, head_dim = [1, 9, 33], 4, 16
    width = num_heads * head_dim
    x = torch.randn(sum(lengths), width, dtype=torch.float64)
    weights = torch.randn(3, num_heads, head_dim, width, dtype=torch.float64) * width**-0.5
    biases = torch.randn(3, num_heads, head_dim, dtype=torch.float64)
    cu_seqlens = cu_seqlens_of(lengths)
    q, k, v = (torch.einsum("td,hed->the", x, weights[i]) + biases[i] for i in range(3))
    query = q[cu_seqlens[:-1].long()]
    usual = cls_attention_kv(query, k, v, cu_seqlens, 33)
    absorbed = torch.einsum("bhe,hed->bhd", query, weights[1])
    summed = cls_attention(absorbed, x, cu_seqlens, 33, head_dim**-0.5)
    result = torch.einsum("bhd,hed->bhe", summed, weights[2]) + biases[2]
    assert float((result - usual).abs().max()) < 1000 * torch.finfo(torch.float64).eps


def valid() -> dict[str, Any]:
    return {
        "query": torch.zeros(2, 3, 48),
        "hidden_states": torch.zeros(12, 48),
        "cu_seqlens": cu_seqlens_of([4, 8]),
        "max_seqlen": 8,
        "softmax_scale": SCALE,
    }


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "query_of_another_width": ({"query": torch.zeros(2, 3, 64)}, ValueError, "hidden_states' width 48, got 64"),
    "narrow_width": (
        {"query": torch.zeros(2, 3, 8), "hidden_states": torch.zeros(12, 8)},
        ValueError,
        "a width from 16 to 4096, got 8",
    ),
    "too_many_heads": ({"query": torch.zeros(2, 65, 48)}, ValueError, "1 to 64 heads, got 65"),
    "a_row_too_few": ({"query": torch.zeros(1, 3, 48)}, ValueError, "each of the 2 sequences.*got 1"),
    "narrower_query": ({"query": torch.zeros(2, 3, 48).half()}, TypeError, "query must be torch.float32"),
    "no_splits": ({"num_splits": 0}, ValueError, "num_splits must be from 1 to 65535"),
    "wrong_dimensions": ({"hidden_states": torch.zeros(12, 3, 16)}, ValueError, r"hidden_states must have shape"),
}


@pytest.mark.parametrize(("change", "error", "message"), list(BAD.values()), ids=list(BAD))
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cls_attention(**{**valid(), **change})


def test_bad_kv_input_is_named() -> None:
    query, k = torch.zeros(2, 3, 16), torch.zeros(12, 3, 16)
    with pytest.raises(ValueError, match=r"v must have shape \(total_tokens, 3, 16\).*got \(11, 3, 16\)"):
        cls_attention_kv(query, k, k[:11], cu_seqlens_of([4, 8]), 8)
    with pytest.raises(ValueError, match=r"k must have shape \(total_tokens, 3, 16\)"):
        cls_attention_kv(query, k[:, :2], k, cu_seqlens_of([4, 8]), 8)
