"""The [CLS] pass that can be trained, by kernels and on a CPU, against autograd of its definition."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support import assert_as_exact_as, cu_seqlens_of, eager_runs, random
from test_tile_map import rising_positions
from torch import Tensor

from fastcls_kernels import PackedLayout
from fastcls_kernels.training import Scoring, cls_attention
from fastcls_kernels.training.cls_kernel import launch_cls_backward, launch_cls_forward
from fastcls_kernels.training.dropout import Dropout

# Of one token, of none, first and last, and around the tiles.
LENGTHS = [0, 1, 33, 0, 70, 7, 21, 0]
# Rows that belong to no sequence.
REST = 2
# Not the root of a size, which could be taken for granted.
SCALE = 0.7
DROPOUT = Dropout(rate=0.3, seed=0x9ABC_DEF0)


class Case(NamedTuple):
    """One kind of pass; with ``head_dim`` by keys, ``is_wide`` with queries in float32."""

    heads: int = 13
    width: int = 48
    head_dim: int | None = None
    is_wide: bool = True
    biased: bool = False
    window: tuple[int, int] = (-1, -1)
    dropout: Dropout | None = None
    has_positions: bool = False


CASES = {
    "plain": Case(),
    "queries_as_narrow_as_rows": Case(is_wide=False),
    "odd_width": Case(width=83, dropout=DROPOUT),
    "two_groups_of_heads": Case(heads=17, biased=True, dropout=DROPOUT),
    "window": Case(window=(5, 9)),
    "window_of_positions": Case(window=(5, 20), dropout=DROPOUT, has_positions=True),
    "keys": Case(heads=16, head_dim=16, is_wide=False),
    "wide_keys": Case(heads=6, head_dim=80, biased=True),
    "keys_of_heads_that_fill_no_block": Case(head_dim=20, is_wide=False, dropout=DROPOUT),
    "all_of_it": Case(heads=16, head_dim=8, biased=True, window=(0, 11), dropout=DROPOUT, has_positions=True),
}


class Given(NamedTuple):
    """Tensors that a pass starts from, gradients of both results, and the layout of the tokens."""

    query: Tensor
    hidden: Tensor
    keys: Tensor | None
    bias: Tensor | None
    grads: tuple[Tensor, Tensor | None]
    layout: PackedLayout


def given(case: Case, dtype: torch.dtype, device: str, lengths: list[int]) -> Given:
    """Random ones; keys are a view of a projection of keys and others."""
    total, num_rows = sum(lengths) + REST, len(lengths)
    keys = bias = None
    if case.head_dim is not None:
        keys = random(total, 3, case.heads, case.head_dim, dtype=dtype, device=device)[:, 1]
    if case.biased:
        bias = random(total, case.heads, dtype=torch.float32, device=device)
    columns = case.head_dim or case.width
    # Scores whose deviation is 1, which spreads weights over several tokens.
    query = random(
        *(num_rows, case.heads, columns),
        dtype=torch.float32 if case.is_wide else dtype,
        device=device,
        scale=columns**-0.5 / SCALE,
    )
    hidden = random(total, case.width, dtype=dtype, device=device)
    grads = [random(num_rows, case.heads, size, dtype=torch.float32, device=device) for size in (case.width, 1)]
    positions = rising_positions(lengths, REST).to(device) if case.has_positions else None
    layout = PackedLayout(cu_seqlens_of(lengths, device), max(lengths, default=0), total, positions)
    return Given(query, hidden, keys, bias, (grads[0], grads[1].squeeze(2)), layout)


def defined(
    case: Case, layout: PackedLayout, query: Tensor, hidden: Tensor, keys: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Σ_t drop(softmax(query · source · scale + bias))_t hidden_t of each sequence's first row, and Σ_t drop(...)_t."""
    summed, weights = [], []
    bounds = layout.cu_seqlens.tolist()
    for row, (start, end) in enumerate(itertools.pairwise(bounds)):
        tokens = hidden[start:end]
        if keys is None:
            scores = query[row] @ tokens.T * SCALE
        else:
            scores = (query[row, :, None] @ keys[start:end].permute(1, 2, 0))[:, 0] * SCALE
        if bias is not None:
            scores = scores + bias[start:end].T.to(scores.dtype)
        if case.window[1] >= 0:
            places = layout.token_positions[start:end]
            scores = scores.masked_fill(places - places[:1] > case.window[1], -float("inf"))
        probabilities = torch.softmax(scores, -1)
        if case.dropout is not None:
            heads = torch.arange(case.heads, dtype=torch.int32, device=hidden.device)[:, None]
            columns = torch.arange(end - start, dtype=torch.int32, device=hidden.device)
            kept = case.dropout.kept(row * case.heads + heads, columns)
            probabilities = probabilities * kept * case.dropout.factor
        summed.append(probabilities @ tokens)
        weights.append(probabilities.sum(1))
    return torch.stack(summed), torch.stack(weights)


def by_autograd(case: Case, given: Given, dtype: torch.dtype) -> list[list[Tensor]]:
    """Of each eager run of the definition in a dtype its results, and the gradients of all that it started from."""
    tensors = [tensor for tensor in given[:4] if tensor is not None]
    grads = [grad for grad in given.grads if grad is not None]
    leaves = [tensor.to(dtype).detach().requires_grad_() for tensor in tensors]

    def run() -> Tensor:
        named = iter(leaves)
        arguments = [None if tensor is None else next(named) for tensor in given[:4]]
        query, hidden, keys, bias = arguments
        assert query is not None
        assert hidden is not None
        results = defined(case, given.layout, query, hidden, keys, bias)
        found = torch.autograd.grad(results, leaves, [grad.to(dtype) for grad in grads])
        return torch.cat([each.detach().flatten() for each in (*results, *found)])

    shapes = [grad.shape for grad in grads] + [tensor.shape for tensor in tensors]
    sizes = [shape.numel() for shape in shapes]
    return [
        [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)] for flat in eager_runs(run)
    ]


def launched(case: Case, given: Given) -> list[Tensor]:
    """The same by the kernels."""
    options: Any = {"keys": given.keys, "bias": given.bias, "window": case.window, "dropout": case.dropout}
    arguments = (given.layout, SCALE)
    kept = launch_cls_forward(given.query, given.hidden, *arguments, **options)
    found = launch_cls_backward(*given.grads, given.query, given.hidden, *kept, *arguments, **options)
    return [*kept[:2], *(grad for grad in found if grad is not None)]


def on_cpu(case: Case, given: Given) -> list[Tensor]:
    """The same in plain PyTorch."""
    query, hidden, keys, bias = (None if each is None else each.detach().requires_grad_() for each in given[:4])
    assert query is not None
    assert hidden is not None
    scoring = Scoring(SCALE, case.window, case.dropout)
    results = cls_attention(query, hidden, given.layout, scoring, keys=keys, bias=bias)
    leaves = [each for each in (query, hidden, keys, bias) if each is not None]
    return [*(each.detach() for each in results), *torch.autograd.grad(results, leaves, given.grads)]


def check(
    case: Case,
    dtype: torch.dtype,
    device: str,
    lengths: list[int],
    compute: Callable[[Case, Given], list[Tensor]] = launched,
) -> None:
    tensors = given(case, dtype, device, lengths)
    (exact,) = by_autograd(case, tensors, torch.float64)
    # Sums in float32 of rows of 16 bits: where they are exact in those, float32 is not.
    eager = by_autograd(case, tensors, dtype)
    if dtype != torch.float32:
        eager += by_autograd(case, tensors, torch.float32)[:1]
    given_names = [
        name for name, tensor in zip(("query", "hidden", "keys", "bias"), tensors, strict=False) if tensor is not None
    ]
    names = ["summed", "weights", *(f"gradient of {name}" for name in given_names)]
    for place, (name, found) in enumerate(zip(names, compute(case, tensors), strict=True)):
        # Of results that are rows of 16 bits the first run alone, since more bits enter the others.
        runs = [run[place].to(found.dtype) for run in (eager if found.dtype == torch.float32 else eager[:1])]
        assert_as_exact_as(found, runs, exact[place], name)


@pytest.mark.covering(alone=["case", "dtype"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_results_and_gradients_are_as_exact_as_eager_ones(kernels: str, case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, kernels, LENGTHS)


@pytest.mark.covering(alone=["case", "dtype"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_torch_path_is_as_exact_as_eager_runs(torch_path: str, case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, torch_path, LENGTHS, on_cpu)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [384, 768, 1024, 2048, 4096])
def test_long_sequences(kernels: str, dtype: torch.dtype, width: int) -> None:
    check(Case(heads=16, width=width, dropout=DROPOUT), dtype, kernels, [4096, 1, 511, 0, 2048])


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=["no_sequences", "empty_sequences"])
@pytest.mark.parametrize("case", [CASES["plain"], CASES["all_of_it"]], ids=["absorbed", "keys"])
def test_rows_that_no_sequence_has_get_zeros(kernels: str, case: Case, dtype: torch.dtype, lengths: list[int]) -> None:
    tensors = given(case, dtype, kernels, lengths)
    results = launched(case, tensors)
    likes = [tensor for tensor in (*tensors.grads, *tensors[:4]) if tensor is not None]
    for found, like in zip(results, likes, strict=True):
        assert torch.equal(found, torch.zeros_like(like))


@pytest.mark.parametrize("case", [CASES["odd_width"], CASES["all_of_it"]], ids=["absorbed", "keys"])
@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_a_neighbours_nan_stays_with_the_neighbour(kernels: str, case: Case, dtype: torch.dtype) -> None:
    lengths, own = [9, 40, 21], slice(9, 49)
    tensors = given(case, dtype, kernels, lengths)
    clean = launched(case, tensors)
    for tensor in tensors[:4]:
        if tensor is not None:
            is_by_row = tensor.shape[0] == len(lengths)
            kept = tensor[1 if is_by_row else own].clone()
            tensor.fill_(float("nan"))
            tensor[1 if is_by_row else own] = kept
    for grad in tensors.grads:
        assert grad is not None
        grad[0] = grad[2] = float("nan")
    for found, expected in zip(launched(case, tensors), clean, strict=True):
        part = 1 if found.shape[0] == len(lengths) else own
        assert torch.equal(found[part], expected[part])
        if found.shape[0] != len(lengths):
            assert not found[sum(lengths) :].any()


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_gradients_below_the_numbers_of_float16_reach_the_query(kernels: str, dtype: torch.dtype) -> None:
    # Without a scaler, as float16 is trained under some optimizers; their least number is 6e-8.
    tensors = given(Case(), dtype, kernels, LENGTHS)
    small = tensors._replace(grads=(tensors.grads[0] * 2.0**-40, None))
    query, expected = launched(Case(), small)[2], launched(Case(), tensors._replace(grads=(tensors.grads[0], None)))[2]
    assert torch.equal(query, expected * 2.0**-40)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_queries_beside_rows_of_16_bits_keep_their_bits(kernels: str, dtype: torch.dtype) -> None:
    tensors = given(Case(), dtype, kernels, LENGTHS)
    (exact,) = by_autograd(Case(), tensors, torch.float64)
    rounded = tensors._replace(query=tensors.query.to(dtype).float())
    errors = [
        [(found.double() - true).abs().max() for found, true in zip(launched(Case(), each), exact, strict=True)]
        for each in (tensors, rounded)
    ]
    # Sums and the query's gradient: 16 bits lose eight of theirs or more, of which products may lose the last ones.
    for place in (0, 2):
        assert errors[0][place] < errors[1][place] / 32


@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])
def test_a_bias_of_minus_infinity_leaves_tokens_out(kernels: str, dtype: torch.dtype) -> None:
    case, lengths = Case(biased=True), [40, 21]
    tensors = given(case, dtype, kernels, lengths)
    assert tensors.bias is not None
    # Of the first sequence a whole tile, of the second one all tokens.
    tensors.bias[:35] = tensors.bias[40:] = -float("inf")
    results = launched(case, tensors)
    grad_hidden, grad_bias = results[3:]
    assert all(bool(torch.isfinite(result).all()) for result in results)
    assert grad_hidden[35:40].any()
    for rows in (slice(0, 35), slice(40, None)):
        assert not grad_hidden[rows].any()
        assert not grad_bias[rows].any()


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_gradients_of_the_sums_of_weights_may_be_left_out(kernels: str, dtype: torch.dtype) -> None:
    case = CASES["all_of_it"]
    tensors = given(case, dtype, kernels, LENGTHS)
    grad, sums = tensors.grads
    assert sums is not None
    expected = launched(case, tensors._replace(grads=(grad, torch.zeros_like(sums))))
    # By head, as products behind the pass leave them.
    strided = grad.transpose(0, 1).contiguous().transpose(0, 1)
    found = launched(case, tensors._replace(grads=(strided, None)))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


REFUSED = {
    "rows_of_float64": ({"hidden": torch.zeros(9, 32, dtype=torch.float64)}, TypeError, "hidden must be one of"),
    "queries_of_another_dtype": (
        {"query": torch.zeros(1, 2, 32, dtype=torch.float64)},
        TypeError,
        "query must be torch.float32",
    ),
    "queries_of_another_width": ({"query": torch.zeros(1, 2, 31)}, ValueError, "query must have 32 columns"),
    "strided_queries": ({"query": torch.zeros(1, 32, 2).transpose(1, 2)}, ValueError, "query must be contig"),
    "too_many_heads": ({"query": torch.zeros(1, 65, 32)}, ValueError, "1 to 64 heads, got 65"),
    "keys_of_other_heads": (
        {"query": torch.zeros(1, 2, 8), "keys": torch.zeros(9, 3, 8)},
        ValueError,
        "query's 2 heads",
    ),
    "keys_of_another_dtype": (
        {"query": torch.zeros(1, 2, 8), "keys": torch.zeros(9, 2, 8).half()},
        TypeError,
        "keys must be torch.float32",
    ),
    "a_bias_of_another_shape": ({"bias": torch.zeros(9, 3)}, ValueError, r"bias must be contiguous, of shape \(9, 2\)"),
    "a_bias_of_another_dtype": ({"bias": torch.zeros(9, 2).half()}, TypeError, "bias must be torch.float32"),
}


@pytest.mark.parametrize(("changed", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_computed_is_refused(changed: dict[str, Tensor], error: type[Exception], message: str) -> None:
    tensors: Any = {"query": torch.zeros(1, 2, 32), "hidden": torch.zeros(9, 32), **changed}
    query, hidden = tensors.pop("query"), tensors.pop("hidden")
    layout = PackedLayout(cu_seqlens_of([9]), 9, 9)
    with pytest.raises(error, match=message):
        launch_cls_forward(query, hidden, layout, SCALE, **tensors)
    statistics = torch.zeros(1, 2)
    with pytest.raises(error, match=message):
        launch_cls_backward(
            *(torch.zeros(1, 2, 32), None, query, hidden, torch.zeros(1, 2, 32), statistics, statistics, layout, SCALE),
            **tensors,
        )
