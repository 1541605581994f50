"""cls_attention and cls_attention_kv against their definitions, and the absorbed form against the usual one."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support import PACKINGS, assert_as_exact_as, cu_seqlens_of, eager_runs, random
from torch import Tensor

from fastcls_kernels import AddNorm, PackedLayout, add_layer_norm, cls_attention, cls_attention_kv, takes_norm
from fastcls_kernels.cls_attention import cpu
from fastcls_kernels.reference import (
    add_layer_norm_reference,
    cls_attention_kv_reference,
    cls_attention_reference,
)
from fastcls_kernels.runtime.tile_tables import use_tile

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


@pytest.mark.covering(alone=["width", "dtype"])
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


@pytest.mark.full
# Widths of one chunk, of three, and of three of which the last is not full.
@pytest.mark.covering(alone=["lengths"])
@pytest.mark.parametrize(("width", "num_splits"), [(32, 1), (96, 3), (130, 1)])
def test_a_layer_norm_before_the_pass_may_run_inside(
    kernels: str, lengths: list[int], dtype: torch.dtype, width: int, num_splits: int
) -> None:
    lengths = enough(lengths)
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


def test_a_layer_norm_is_taken_before_where_columns_take_several_programs(kernels: str, dtype: torch.dtype) -> None:
    x, residual = (random(30, 160, dtype=dtype, device=kernels) for _ in range(2))
    bias, weight, norm_bias = (random(160, dtype=dtype, device=kernels) for _ in range(3))
    query = random(2, 3, 160, dtype=torch.float32, device=kernels)
    norm = AddNorm(bias, residual, weight, norm_bias, 1e-12)
    # Four chunks of 32 columns are one program's; the mean of those 128 is not the row's.
    tile = {"NORM": True, "BLOCK_H": 16, "BLOCK_N": 16, "MAX_BLOCK_W": 32, "num_warps": 4, "num_stages": 1}
    arguments: tuple[Any, ...] = (cu_seqlens_of([10, 20], kernels), 20, SCALE)
    with use_tile("cls_attention", tile):
        assert not takes_norm(x)
        actual = cls_attention(query, x, *arguments, norm=norm)
        assert torch.equal(actual, cls_attention(query, add_layer_norm(x, *norm), *arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_parts_are_merged_before_they_are_rounded(kernels: str, dtype: torch.dtype) -> None:
    hidden_states = random(1000, 96, dtype=dtype, device=kernels)
    query = random(5, 6, 96, dtype=dtype, device=kernels, scale=8 * 96**-0.5)
    # Long enough that every split has tokens of its own.
    arguments: tuple[Any, ...] = (cu_seqlens_of([200] * 5, kernels), 200, SCALE)
    exact = cls_attention_reference(query.double(), hidden_states.double(), *arguments)
    whole, parts = (cls_attention(query, hidden_states, *arguments, num_splits=splits) for splits in (1, 3))
    assert_as_exact_as(parts, [whole], exact)


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


# Heads of queries, and of the keys that they share.
GROUPED = [
    pytest.param((3, 3), id="groups_of_1"),
    pytest.param((4, 2), id="groups_of_2"),
    pytest.param((6, 2), id="groups_of_3"),
    pytest.param((4, 1), id="groups_of_4"),
]


def check_kv(
    lengths: list[int],
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    num_splits: int | None,
    heads: tuple[int, int] = (3, 3),
) -> None:
    num_heads, num_heads_k = heads
    query = random(len(lengths), num_heads, head_dim, dtype=dtype, device=device)
    k, v = random(sum(lengths) + 2, 2, num_heads_k, head_dim, dtype=dtype, device=device).unbind(1)
    arguments: tuple[Any, ...] = (cu_seqlens_of(lengths, device), max(lengths, default=0))
    actual = cls_attention_kv(query, k, v, *arguments, num_splits=num_splits)
    eager = eager_runs(cls_attention_kv_reference, query, k, v, *arguments)
    exact = cls_attention_kv_reference(query.double(), k.double(), v.double(), *arguments)
    assert_as_exact_as(actual, eager, exact)


@pytest.mark.parametrize("num_splits", [None, 1, 3], ids=lambda splits: f"splits={splits}")
@pytest.mark.parametrize("head_dim", [8, 48])
def test_kv_kernel_matches_definition(
    kernels: str, lengths: list[int], head_dim: int, dtype: torch.dtype, num_splits: int | None
) -> None:
    check_kv(lengths, head_dim, dtype, kernels, num_splits)


def test_kv_torch_path_matches_definition(torch_path: str, lengths: list[int], dtype: torch.dtype) -> None:
    check_kv(lengths * MANY, 48, dtype, torch_path, None)


# In these all that is special about lengths is there; the interpreter takes long for each.
several_packings = pytest.mark.parametrize(
    "lengths",
    [PACKINGS[name] for name in ("around_a_tile", "with_empty_sequences", "nothing_at_all")],
    ids=["around_a_tile", "with_empty_sequences", "nothing_at_all"],
)


@pytest.mark.parametrize("num_splits", [None, 3], ids=lambda splits: f"splits={splits}")
@pytest.mark.parametrize("heads", GROUPED)
@several_packings
def test_kv_kernel_reads_the_keys_that_heads_share(
    kernels: str, lengths: list[int], heads: tuple[int, int], dtype: torch.dtype, num_splits: int | None
) -> None:
    check_kv(lengths, 16, dtype, kernels, num_splits, heads)


@pytest.mark.parametrize("heads", GROUPED)
@several_packings
def test_kv_torch_path_reads_the_keys_that_heads_share(
    torch_path: str, lengths: list[int], heads: tuple[int, int], dtype: torch.dtype
) -> None:
    check_kv(lengths * 2, 48, dtype, torch_path, None, heads)


# What a call may have beyond queries and tokens.
EXTRAS = {
    "keys": {"keys"},
    "bias": {"bias"},
    "rows": {"rows"},
    "keys_and_bias": {"keys", "bias"},
    "all": {"keys", "bias", "rows"},
}


def enough(lengths: list[int]) -> list[int]:
    """More of the same where they are few: the RMS of few numbers varies by more than the bound's tenth."""
    return lengths * max(1, 60 // sum(lengths)) if any(lengths) else lengths


def row_bounds_of(lengths: list[int], device: str) -> tuple[Tensor, Tensor]:
    """Per text none, one or several rows that read all of it, and others that read a part or nothing, in no order."""
    spans = []
    start = 0
    for number, length in enumerate(lengths):
        end = start + length
        spans += [(start, end)] * (number % 3)
        spans += [(start + length // 3, end), (start, end - length // 2), (start, start)]
        start = end
    starts, ends = torch.tensor(spans, dtype=torch.int32).reshape(-1, 2)[torch.randperm(len(spans))].unbind(1)
    return starts.contiguous().to(device), ends.contiguous().to(device)


def bias_of(cu_seqlens: Tensor, row_bounds: tuple[Tensor, Tensor] | None, total_tokens: int, num_heads: int) -> Tensor:
    """Every third number leaves its token out, but never a row's first token."""
    bias = torch.randn(total_tokens, num_heads) * 2
    firsts = torch.zeros(total_tokens, dtype=torch.bool)
    starts = cu_seqlens[:-1] if row_bounds is None else row_bounds[0]
    firsts[starts[starts < total_tokens].long().cpu()] = True
    left_out = (torch.arange(total_tokens * num_heads).reshape(bias.shape) % 3 == 0) & ~firsts[:, None]
    return bias.masked_fill(left_out, -float("inf")).to(cu_seqlens.device)


def check_extras(
    lengths: list[int],
    extras: set[str],
    num_heads: int,
    width: int,
    key_dim: int,
    dtype: torch.dtype,
    device: str,
    num_splits: int | None = None,
    num_heads_k: int | None = None,
) -> None:
    total = sum(lengths) + 2
    cu_seqlens = cu_seqlens_of(lengths, device)
    row_bounds = row_bounds_of(lengths, device) if "rows" in extras else None
    hidden_states = random(total, width, dtype=dtype, device=device)
    keys = None
    if "keys" in extras:
        # A view of one fused projection, as the model has it.
        keys = random(total, 3, num_heads_k or num_heads, key_dim, dtype=dtype, device=device).unbind(1)[1]
    bias = bias_of(cu_seqlens, row_bounds, total, num_heads) if "bias" in extras else None
    num_rows = len(lengths) if row_bounds is None else len(row_bounds[0])
    query_dim = width if keys is None else key_dim
    scale = 8 * query_dim**-0.5
    query = random(num_rows, num_heads, query_dim, dtype=torch.float32, device=device, scale=scale)
    arguments: tuple[Any, ...] = (cu_seqlens, max(lengths, default=0), SCALE)
    actual = cls_attention(
        query, hidden_states, *arguments, keys=keys, bias=bias, row_bounds=row_bounds, num_splits=num_splits
    )
    reference = functools.partial(cls_attention_reference, keys=keys, bias=bias, row_bounds=row_bounds)
    eager = [run.float() for run in eager_runs(reference, query.to(dtype), hidden_states, *arguments)]
    exact = reference(query.double(), hidden_states.double(), *arguments)
    assert_as_exact_as(actual, eager, exact)


# Each for itself in one piece, all of them shared out among splits.
@pytest.mark.parametrize(
    ("extras", "num_splits"),
    [*((extras, None) for extras in EXTRAS.values()), (EXTRAS["all"], 3)],
    ids=[*EXTRAS, "all-splits=3"],
)
@several_packings
@pytest.mark.covering(alone=["lengths", "dtype"])
def test_kernel_takes_keys_biases_and_any_rows(
    kernels: str, lengths: list[int], dtype: torch.dtype, extras: set[str], num_splits: int | None
) -> None:
    check_extras(enough(lengths), extras, 3, 48, 20, dtype, kernels, num_splits)


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=list(EXTRAS))
@several_packings
def test_torch_path_takes_keys_biases_and_any_rows(
    torch_path: str, lengths: list[int], dtype: torch.dtype, extras: set[str]
) -> None:
    check_extras(enough(lengths), extras, 12, 48, 20, dtype, torch_path)


# Keys of one chunk of columns and of many, a last one that is not full, heads in several groups, and an input whose
# columns are in several groups.
@pytest.mark.covering(alone=["num_heads", "key_dim", "width", "dtype"])
@pytest.mark.parametrize(
    ("num_heads", "key_dim", "width"),
    [
        (1, 16, 16),
        (12, 64, 768),
        (17, 24, 48),
        (5, 4, 20),
        pytest.param(40, 128, 48, marks=pytest.mark.full),
        (3, 32, 1040),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_kernel_takes_keys_of_every_shape(
    kernels: str, num_heads: int, key_dim: int, width: int, dtype: torch.dtype
) -> None:
    # The RMS of few numbers varies by more than the bound's tenth.
    lengths = [5, 40, 1, 23, 64, 9, 33, 50] * (8 if num_heads == 1 else 1)
    check_extras(lengths, {"keys", "bias"}, num_heads, width, key_dim, dtype, kernels)


# Heads in one group of the kernel's, in several, and in several of which one begins among heads that share their keys.
MANY_GROUPED = [*GROUPED, pytest.param((34, 17), id="17_groups_of_2"), pytest.param((21, 7), id="7_groups_of_3")]


@pytest.mark.covering(alone=["heads", "extras"])
@pytest.mark.parametrize("extras", [EXTRAS["keys"], EXTRAS["all"]], ids=["keys", "all"])
@pytest.mark.parametrize("heads", MANY_GROUPED)
@pytest.mark.parametrize("num_splits", [None, 3], ids=lambda splits: f"splits={splits}")
def test_kernel_reads_the_keys_that_heads_share(
    kernels: str, heads: tuple[int, int], extras: set[str], dtype: torch.dtype, num_splits: int | None
) -> None:
    lengths = [5, 40, 0, 1, 23, 64, 9, 33, 50, 17]
    check_extras(lengths, extras, heads[0], 48, 20, dtype, kernels, num_splits, heads[1])


@pytest.mark.parametrize("extras", [EXTRAS["keys"], EXTRAS["all"]], ids=["keys", "all"])
@pytest.mark.parametrize("heads", GROUPED)
@several_packings
def test_torch_path_reads_the_keys_that_heads_share(
    torch_path: str, lengths: list[int], heads: tuple[int, int], extras: set[str], dtype: torch.dtype
) -> None:
    check_extras(enough(lengths), extras, heads[0], 48, 20, dtype, torch_path, None, heads[1])


@pytest.mark.gpu
@pytest.mark.parametrize("extras", EXTRAS.values(), ids=list(EXTRAS))
@pytest.mark.parametrize(("num_heads", "width"), [(12, 384), (12, 768), (16, 1024), (16, 2048)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_kernel_takes_extras_on_long_sequences(
    kernels: str, extras: set[str], num_heads: int, width: int, dtype: torch.dtype
) -> None:
    check_extras([4096, 1, 511, 0, 2048], extras, num_heads, width, width // num_heads, dtype, kernels)


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_queries_in_float32_keep_their_bits_beside_keys(kernels: str, dtype: torch.dtype) -> None:
    hidden_states = random(60, 48, dtype=dtype, device=kernels)
    keys = random(60, 12, 64, dtype=dtype, device=kernels)
    # Scores in the tens, where the bits that a 16-bit query lacks change the weights.
    query = random(2, 12, 64, dtype=torch.float32, device=kernels, scale=16.0)
    arguments: tuple[Any, ...] = (cu_seqlens_of([20, 40], kernels), 40, SCALE)
    exact = cls_attention_reference(query.double(), hidden_states.double(), *arguments, keys=keys)
    actual = cls_attention(query, hidden_states, *arguments, keys=keys)
    # Nothing is lost but by the rounding of the result.
    assert_as_exact_as(actual, [exact.to(dtype).float()], exact)


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_keys_may_lie_head_by_head(kernels: str, dtype: torch.dtype) -> None:
    hidden_states = random(30, 48, dtype=dtype, device=kernels)
    query = random(3, 2, 16, dtype=torch.float32, device=kernels).transpose(0, 1)
    keys = random(3, 30, 16, dtype=dtype, device=kernels).transpose(0, 1)
    arguments: tuple[Any, ...] = (hidden_states, cu_seqlens_of([10, 20], kernels), 20, SCALE)
    expected = cls_attention(query.contiguous(), *arguments, keys=keys.contiguous())
    assert torch.equal(cls_attention(query, *arguments, keys=keys), expected)


def check_sequences_as_bounds(device: str, dtype: torch.dtype) -> None:
    lengths = [10, 0, 33, 33, 7]
    hidden_states = random(85, 48, dtype=dtype, device=device)
    cu_seqlens = cu_seqlens_of(lengths, device)
    row_bounds = (cu_seqlens[:-1].clone(), cu_seqlens[1:].clone())
    query = random(5, 3, 48, dtype=torch.float32, device=device)
    expected = cls_attention(query, hidden_states, cu_seqlens, 33, SCALE)
    assert torch.equal(cls_attention(query, hidden_states, cu_seqlens, 33, SCALE, row_bounds=row_bounds), expected)
    assert not expected[1].any()


def test_sequences_as_bounds_change_no_bit(kernels: str, dtype: torch.dtype) -> None:
    check_sequences_as_bounds(kernels, dtype)


def test_sequences_as_bounds_change_no_bit_on_the_torch_path(torch_path: str, dtype: torch.dtype) -> None:
    check_sequences_as_bounds(torch_path, dtype)


def check_neighbours(device: str, dtype: torch.dtype) -> None:
    """What rows do not read may be NaN: other texts, and what stale memory holds behind the last one."""
    hidden_states = random(36, 48, dtype=dtype, device=device)
    keys = random(36, 3, 16, dtype=dtype, device=device)
    bias = torch.randn(36, 3).to(device)
    query = random(2, 3, 16, dtype=torch.float32, device=device)
    row_bounds = (cu_seqlens_of([5, 2], device)[1:], cu_seqlens_of([9, 8], device)[1:])
    arguments: tuple[Any, ...] = (query, hidden_states, cu_seqlens_of([10, 20], device), 20, SCALE)
    extras: dict[str, Any] = {"keys": keys, "bias": bias, "row_bounds": row_bounds}
    clean = cls_attention(*arguments, **extras)
    clean_kv = cls_attention_kv(query.to(dtype), keys, keys, *arguments[2:], bias=bias, row_bounds=row_bounds)
    for tensor in (hidden_states, keys, bias):
        tensor[:5] = tensor[17:] = float("nan")
    assert torch.equal(cls_attention(*arguments, **extras), clean)
    spoilt_kv = cls_attention_kv(query.to(dtype), keys, keys, *arguments[2:], bias=bias, row_bounds=row_bounds)
    assert torch.equal(spoilt_kv, clean_kv)
    assert bool(torch.isfinite(clean).all())


def test_rows_read_nothing_beyond_their_bounds(kernels: str, dtype: torch.dtype) -> None:
    check_neighbours(kernels, dtype)


def test_rows_read_nothing_beyond_their_bounds_on_the_torch_path(torch_path: str, dtype: torch.dtype) -> None:
    check_neighbours(torch_path, dtype)


@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])
def test_a_split_that_the_bias_leaves_out_weighs_nothing(kernels: str, dtype: torch.dtype) -> None:
    texts = 24
    hidden_states = random(texts * 100, 48, dtype=dtype, device=kernels)
    bias = torch.randn(texts * 100, 3).to(kernels)
    left_out = (torch.arange(texts * 100) % 100 < 60).to(kernels)
    bias[left_out] = -float("inf")
    query = random(texts, 3, 48, dtype=dtype, device=kernels)
    arguments: tuple[Any, ...] = (cu_seqlens_of([100] * texts, kernels), 100, SCALE)
    rest: tuple[Any, ...] = (cu_seqlens_of([40] * texts, kernels), 40, SCALE)
    actual = cls_attention(query, hidden_states, *arguments, bias=bias, num_splits=3)
    kept, kept_bias = hidden_states[~left_out], bias[~left_out]
    reference = functools.partial(cls_attention_reference, bias=kept_bias)
    exact = reference(query.double(), kept.double(), *rest)
    assert_as_exact_as(actual, eager_runs(reference, query, kept, *rest), exact)
    query, k = query[..., :16], hidden_states.unflatten(1, (3, 16))
    actual = cls_attention_kv(query, k, k, *arguments, bias=bias, num_splits=3)
    kv_reference = functools.partial(cls_attention_kv_reference, bias=kept_bias)
    k = kept.unflatten(1, (3, 16))
    exact = kv_reference(query.double(), k.double(), k.double(), *rest)
    assert_as_exact_as(actual, eager_runs(kv_reference, query, k, k, *rest), exact)


def test_a_layer_norm_inside_knows_biases_and_rows(kernels: str, dtype: torch.dtype) -> None:
    x, residual = (random(60, 96, dtype=dtype, device=kernels) for _ in range(2))
    bias, weight, norm_bias = (random(96, dtype=dtype, device=kernels) for _ in range(3))
    norm = AddNorm(bias, residual, weight, norm_bias, 1e-12)
    lengths = [10, 20, 30]
    row_bounds = row_bounds_of(lengths, kernels)
    cu_seqlens = cu_seqlens_of(lengths, kernels)
    score_bias = bias_of(cu_seqlens, row_bounds, 60, 3)
    query = random(len(row_bounds[0]), 3, 96, dtype=torch.float32, device=kernels, scale=0.5)

    def usual(query: Tensor, x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, norm_bias: Tensor) -> Tensor:
        normalised = add_layer_norm_reference(x, bias, residual, weight, norm_bias, 1e-12)
        return cls_attention_reference(query, normalised, cu_seqlens, 30, SCALE, bias=score_bias, row_bounds=row_bounds)

    inputs = (query, x, bias, residual, weight, norm_bias)
    tile = {"NORM": True, "BLOCK_H": 16, "BLOCK_N": 32, "MAX_BLOCK_W": 32, "num_warps": 4, "num_stages": 1}
    with use_tile("cls_attention", tile):
        assert takes_norm(x)
        actual = cls_attention(
            query, x, cu_seqlens, 30, SCALE, norm=norm, bias=score_bias, row_bounds=row_bounds, num_splits=2
        )
    assert_as_exact_as(actual, eager_runs(usual, *inputs), usual(*(tensor.double() for tensor in inputs)))


def test_a_layer_norm_is_taken_before_where_there_are_keys(kernels: str, dtype: torch.dtype) -> None:
    x, residual = (random(30, 48, dtype=dtype, device=kernels) for _ in range(2))
    bias, weight, norm_bias = (random(48, dtype=dtype, device=kernels) for _ in range(3))
    norm = AddNorm(bias, residual, weight, norm_bias, 1e-12)
    query = random(2, 3, 16, dtype=torch.float32, device=kernels)
    keys = random(30, 3, 16, dtype=dtype, device=kernels)
    tile = {"NORM": True, "BLOCK_H": 16, "BLOCK_N": 16, "MAX_BLOCK_W": 64, "num_warps": 4, "num_stages": 1}
    arguments: tuple[Any, ...] = (cu_seqlens_of([10, 20], kernels), 20, SCALE)
    with use_tile("cls_attention", tile):
        actual = cls_attention(query, x, *arguments, norm=norm, keys=keys)
        assert torch.equal(actual, cls_attention(query, add_layer_norm(x, *norm), *arguments, keys=keys))


KV_EXTRAS = {name: extras for name, extras in EXTRAS.items() if "keys" not in extras} | {"both": {"bias", "rows"}}


def check_kv_extras(
    lengths: list[int],
    extras: set[str],
    dtype: torch.dtype,
    device: str,
    num_splits: int | None,
    heads: tuple[int, int] = (3, 3),
) -> None:
    total = sum(lengths) + 2
    num_heads, num_heads_k = heads
    cu_seqlens = cu_seqlens_of(lengths, device)
    row_bounds = row_bounds_of(lengths, device) if "rows" in extras else None
    bias = bias_of(cu_seqlens, row_bounds, total, num_heads) if "bias" in extras else None
    num_rows = len(lengths) if row_bounds is None else len(row_bounds[0])
    query = random(num_rows, num_heads, 48, dtype=dtype, device=device)
    k, v = random(total, 2, num_heads_k, 48, dtype=dtype, device=device).unbind(1)
    arguments: tuple[Any, ...] = (cu_seqlens, max(lengths, default=0))
    actual = cls_attention_kv(query, k, v, *arguments, bias=bias, row_bounds=row_bounds, num_splits=num_splits)
    reference = functools.partial(cls_attention_kv_reference, bias=bias, row_bounds=row_bounds)
    exact = reference(query.double(), k.double(), v.double(), *arguments)
    assert_as_exact_as(actual, eager_runs(reference, query, k, v, *arguments), exact)


@pytest.mark.parametrize(
    ("extras", "num_splits"),
    [*((extras, None) for extras in KV_EXTRAS.values()), (KV_EXTRAS["both"], 3)],
    ids=[*KV_EXTRAS, "both-splits=3"],
)
@several_packings
@pytest.mark.covering(alone=["lengths", "dtype"])
def test_kv_kernel_takes_biases_and_any_rows(
    kernels: str, lengths: list[int], dtype: torch.dtype, extras: set[str], num_splits: int | None
) -> None:
    check_kv_extras(enough(lengths), extras, dtype, kernels, num_splits)


@pytest.mark.parametrize("extras", KV_EXTRAS.values(), ids=list(KV_EXTRAS))
@several_packings
def test_kv_torch_path_takes_biases_and_any_rows(
    torch_path: str, lengths: list[int], dtype: torch.dtype, extras: set[str]
) -> None:
    check_kv_extras(4 * enough(lengths), extras, dtype, torch_path, None)


@pytest.mark.parametrize("num_splits", [None, 3], ids=lambda splits: f"splits={splits}")
def test_kv_kernel_adds_the_query_heads_biases(kernels: str, dtype: torch.dtype, num_splits: int | None) -> None:
    check_kv_extras([17, 40, 0, 5], KV_EXTRAS["both"], dtype, kernels, num_splits, (6, 2))


def test_kv_torch_path_adds_the_query_heads_biases(torch_path: str, dtype: torch.dtype) -> None:
    check_kv_extras(PACKINGS["around_a_tile"], KV_EXTRAS["both"], dtype, torch_path, None, (6, 2))


def windows_of(lengths: list[int], spans: list[tuple[int, int]]) -> list[cpu.Windows]:
    starts, ends = torch.tensor(spans, dtype=torch.int32).unbind(1)
    layout = PackedLayout(cu_seqlens_of(lengths), max(lengths), sum(lengths))
    return list(cpu.windows_of(layout, (starts, ends), 3, 48))


def test_texts_of_one_length_and_rows_of_one_text_are_one_product() -> None:
    texts = [(0, 9), (9, 18), (18, 27)]
    assert [windows.num_windows for windows in windows_of([9, 9, 9], texts)] == [3]
    # Wherever the rows stand.
    assert [windows.num_windows for windows in windows_of([9, 9, 9], texts + texts)] == [3]
    assert [windows.num_windows for windows in windows_of([9, 9, 9], [*texts, (18, 27)])] == [2, 1]
    assert windows_of([9, 9, 9], [(4, 4), (9, 9)]) == []


@pytest.mark.usefixtures("torch_path")
def test_memory_is_bounded_for_any_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 4000
    monkeypatch.setitem(cpu.windows_of.__globals__, "MAX_NUMBERS", most)
    lengths = [20] * 40 + [90]
    ends = torch.tensor(lengths).cumsum(0).repeat_interleave(torch.tensor([1] * 40 + [70]))
    starts = ends - torch.tensor([20] * 40 + [90] * 70)
    windows = windows_of(lengths, list(zip(starts.tolist(), ends.tolist(), strict=True)))
    seen = torch.cat([torch.arange(110)[each.rows] for each in windows])
    assert sorted(seen.tolist()) == list(range(110))
    for each in windows:
        rows = torch.arange(110)[each.rows].numel()
        assert each.num_windows == 1 or each.num_windows * each.length * 48 + rows * 3 * each.length <= most
        assert rows * 3 * each.length <= most
    # As few products as that leaves: one of three texts, and of fourteen rows of the long one.
    assert len(windows) == 14 + 5


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


def bounds(starts: list[int], ends: list[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(starts, dtype=torch.int32), torch.tensor(ends, dtype=torch.int32)


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
    "query_of_another_key_size": (
        {"keys": torch.zeros(12, 3, 16)},
        ValueError,
        r"keys must have shape .*= \(12, 3 or a divisor of it, 48\), got \(12, 3, 16\)",
    ),
    "keys_of_heads_that_do_not_divide": (
        {"query": torch.zeros(2, 3, 16), "keys": torch.zeros(12, 2, 16)},
        ValueError,
        r"keys must have shape .*3 or a divisor of it, 16\), got \(12, 2, 16\)",
    ),
    "keys_of_too_few_tokens": (
        {"query": torch.zeros(2, 3, 16), "keys": torch.zeros(11, 3, 16)},
        ValueError,
        r"keys must have shape .*= \(12, 3 or a divisor of it, 16\), got \(11, 3, 16\)",
    ),
    "keys_of_another_dtype": ({"keys": torch.zeros(12, 3, 48).half()}, TypeError, "keys must be torch.float32"),
    "keys_that_are_too_short": (
        {"query": torch.zeros(2, 3, 3), "keys": torch.zeros(12, 3, 3)},
        ValueError,
        "keys must have a head size from 4 to 128, got 3",
    ),
    "keys_column_by_column": (
        {"keys": torch.zeros(12, 48, 3).transpose(1, 2)},
        ValueError,
        "keys must be contiguous in its last dimension",
    ),
    "keys_without_heads": ({"keys": torch.zeros(12, 48)}, ValueError, r"keys must have shape \(total_tokens, nheads"),
    "bias_of_too_few_tokens": (
        {"bias": torch.zeros(11, 3)},
        ValueError,
        r"bias must be contiguous, of shape \(12, 3\), got shape \(11, 3\)",
    ),
    "bias_head_by_head": ({"bias": torch.zeros(3, 12).T}, ValueError, r"bias must be contiguous.*strides \(1, 12\)"),
    "bias_in_few_bits": ({"bias": torch.zeros(12, 3).half()}, TypeError, "bias must be torch.float32"),
    "bounds_as_one_tensor": (
        {"row_bounds": torch.zeros(2, 2, dtype=torch.int32)},
        TypeError,
        r"row_bounds must be a tuple \(starts, ends\), got Tensor",
    ),
    "bounds_without_ends": (
        {"row_bounds": (torch.zeros(2, dtype=torch.int32), None)},
        TypeError,
        "row_bounds' ends must be a torch.int32 tensor, got NoneType",
    ),
    "bounds_in_64_bits": (
        {"row_bounds": (torch.tensor([0, 4]), torch.tensor([4, 12]))},
        TypeError,
        "row_bounds' starts must be a torch.int32 tensor, got torch.int64",
    ),
    "bounds_of_too_few_rows": (
        {"row_bounds": bounds([0, 0], [4])},
        ValueError,
        r"row_bounds' ends must be contiguous, of shape \(num_rows,\) = \(2,\), got shape \(1,\)",
    ),
    "bounds_with_gaps": (
        {"row_bounds": (torch.zeros(4, dtype=torch.int32)[::2], bounds([4, 4], [])[0])},
        ValueError,
        r"row_bounds' starts must be contiguous.*strides \(2,\)",
    ),
    "bounds_before_the_first_token": ({"row_bounds": bounds([-1, 4], [4, 12])}, ValueError, "got rows from -1 to 12"),
    "bounds_behind_the_last_token": ({"row_bounds": bounds([0, 6], [4, 13])}, ValueError, "got rows from 0 to 13"),
    "bounds_that_end_before_they_start": (
        {"row_bounds": bounds([0, 6], [4, 5])},
        ValueError,
        "total_tokens = 12, got rows from 0 to 5, the shortest of -1",
    ),
    "bounds_beyond_the_longest": (
        {"row_bounds": bounds([0, 0], [4, 9])},
        ValueError,
        "max_seqlen must be at least the longest of row_bounds, 9, got 8",
    ),
    "no_splits": ({"num_splits": 0}, ValueError, "num_splits must be from 1 to 65535"),
    "wrong_dimensions": ({"hidden_states": torch.zeros(12, 3, 16)}, ValueError, r"hidden_states must have shape"),
}


@pytest.mark.parametrize(("change", "error", "message"), list(BAD.values()), ids=list(BAD))
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cls_attention(**{**valid(), **change})


def test_bad_kv_input_is_named() -> None:
    query, k = torch.zeros(2, 3, 16), torch.zeros(12, 3, 16)
    with pytest.raises(ValueError, match=r"v must have shape .*= \(12, 3 or a divisor of it, 16\), got \(11, 3, 16\)"):
        cls_attention_kv(query, k, k[:11], cu_seqlens_of([4, 8]), 8)
    with pytest.raises(ValueError, match=r"k must have shape .*3 or a divisor of it, 16\), got \(12, 2, 16\)"):
        cls_attention_kv(query, k[:, :2], k, cu_seqlens_of([4, 8]), 8)
    with pytest.raises(ValueError, match=r"v must have k's shape \(12, 3, 16\), got \(12, 1, 16\)"):
        cls_attention_kv(query, k, k[:, :1], cu_seqlens_of([4, 8]), 8)
    with pytest.raises(ValueError, match=r"bias must be contiguous, of shape \(12, 3\)"):
        cls_attention_kv(query, k, k, cu_seqlens_of([4, 8]), 8, bias=torch.zeros(12, 2))
    with pytest.raises(ValueError, match="got rows from 0 to 13"):
        cls_attention_kv(query, k, k, cu_seqlens_of([4, 8]), 8, row_bounds=bounds([0, 6], [4, 13]))
