"""What is computed of the [CLS] rows alone, and the products of few rows, against their definitions."""

# Arguments come by the list, which mypy cannot count.
# mypy: disable-error-code="arg-type,call-arg"

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_as_exact_as, eager_runs, random
from torch import Tensor

from fastcls_kernels import Activation, absorb_query, cls_output, pooler_classifier
from fastcls_kernels.reference import (
    absorb_query_reference,
    cls_output_reference,
    cls_output_sum_reference,
    pooler_classifier_reference,
)

# Large enough to be seen where it is lost, or stands elsewhere.
EPS = 0.02
# Rows, heads, head size.
SHAPES = [
    # Of one row, too, the RMS needs many numbers.
    pytest.param(1, 6, 40, id="1x6x40"),
    pytest.param(17, 2, 48, id="17x2x48"),
    pytest.param(33, 5, 26, id="33x5x26"),
    pytest.param(65, 3, 8, id="65x3x8"),
    pytest.param(0, 2, 32, id="none"),
]


def double(argument: Any) -> Any:
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def check(operation: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Any]) -> None:
    exact = reference(*map(double, inputs))
    eager = eager_runs(reference, *inputs)
    actual = operation(*inputs)
    # What comes in float32 of 16-bit inputs is held to what rounding it would leave.
    assert_as_exact_as(actual.to(eager[0].dtype), eager, exact)


def rows_of(num_rows: int, device: str) -> tuple[Tensor, int]:
    """The first rows of texts of 1, 3, 5, ... tokens, and all their tokens."""
    lengths = 2 * torch.arange(num_rows) + 1
    return (lengths.cumsum(0) - lengths).int().to(device), int(lengths.sum())


def projection(rows: int, columns: int, dtype: torch.dtype, device: str) -> Tensor:
    """One of three that lie in one matrix, as a model has them."""
    return random(3 * rows, columns, dtype=dtype, device=device, scale=columns**-0.5).chunk(3)[1]


def query_inputs(num_rows: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: str) -> list[Any]:
    rows, total = rows_of(num_rows, device)
    width = num_heads * head_dim
    hidden_states = random(total, width, dtype=dtype, device=device)
    query_weight, key_weight = (projection(width, width, dtype, device) for _ in range(2))
    return [hidden_states, rows, query_weight, random(width, dtype=dtype, device=device), key_weight, num_heads]


def output_inputs(num_rows: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: str) -> list[Any]:
    rows, total = rows_of(num_rows, device)
    width = num_heads * head_dim
    vectors = [random(width, dtype=dtype, device=device) for _ in range(4)]
    value_weight, out_weight = (projection(width, width, dtype, device) for _ in range(2))
    hidden_states = random(total, width, dtype=dtype, device=device)
    # As the pass gives them, head by head where it likes.
    summed = random(num_heads, num_rows, width, dtype=dtype, device=device).transpose(0, 1)
    return [summed, value_weight, vectors[0], out_weight, vectors[1], hidden_states, rows, *vectors[2:], EPS]


def pooler_inputs(num_rows: int, width: int, pooled: int, labels: int, dtype: torch.dtype, device: str) -> list[Any]:
    pooler, classifier = (
        random(rows, columns, dtype=dtype, device=device, scale=columns**-0.5)
        for rows, columns in ((pooled, width), (labels, pooled))
    )
    biases = [random(size, dtype=dtype, device=device) for size in (pooled, labels)]
    return [random(num_rows, width, dtype=dtype, device=device), pooler, biases[0], classifier, biases[1]]


@pytest.mark.parametrize(("num_rows", "num_heads", "head_dim"), SHAPES)
def test_absorb_query_kernel(kernels: str, num_rows: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    inputs = query_inputs(num_rows, num_heads, head_dim, dtype, kernels)
    assert absorb_query(*inputs).dtype == torch.float32
    check(absorb_query, absorb_query_reference, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_absorbed_queries_keep_what_16_bits_would_lose(kernels: str, dtype: torch.dtype) -> None:
    inputs = query_inputs(17, 2, 48, dtype, kernels)
    exact = absorb_query_reference(*map(double, inputs))
    usual, actual = (
        float((result.double() - exact).square().mean().sqrt())
        for result in (absorb_query_reference(*inputs), absorb_query(*inputs))
    )
    # A query in 16 bits alone costs half of the usual error; a pair of them is some hundred times as exact.
    assert actual < usual / 30, f"RMS error {actual:.3e}, in 16 bits {usual:.3e}"


@pytest.mark.parametrize(("num_rows", "num_heads", "head_dim"), SHAPES)
def test_absorb_query_torch_path(
    torch_path: str, num_rows: int, num_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    check(absorb_query, absorb_query_reference, query_inputs(num_rows * 16, num_heads, head_dim, dtype, torch_path))


# Places among cls_output's arguments: of the values, of the output projection, of the layer norm.
BIASES = {"value_bias": 2, "out_bias": 4, "norm_bias": 8}
ABSENT = [
    *(pytest.param((name,), id=f"no_{name}") for name in BIASES),
    pytest.param(tuple(BIASES), id="no_biases"),
]


NORMS = [pytest.param(False, id="layer_norm"), pytest.param(True, id="rms_norm")]


def check_output(inputs: list[Any], absent: tuple[str, ...], *, rms: bool = False) -> None:
    # Eager sums in other orders take no None, and adding zeros errs by nothing.
    zeros = list(inputs)
    for name in absent:
        inputs[BIASES[name]], zeros[BIASES[name]] = None, torch.zeros_like(inputs[BIASES[name]])
    normed, summed = cls_output(*inputs, keep_sum=True, rms=rms)
    assert torch.equal(cls_output(*inputs, rms=rms), normed)
    definition = functools.partial(cls_output_reference, rms=rms)
    for actual, reference, count in ((normed, definition, 10), (summed, cls_output_sum_reference, 7)):
        exact = reference(*map(double, inputs[:count]))
        assert_as_exact_as(actual, eager_runs(reference, *zeros[:count]), exact)


@pytest.mark.parametrize(("num_rows", "num_heads", "head_dim"), SHAPES)
def test_cls_output_kernel(kernels: str, num_rows: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    check_output(output_inputs(num_rows, num_heads, head_dim, dtype, kernels), ())


@pytest.mark.parametrize(("num_rows", "num_heads", "head_dim"), SHAPES)
def test_cls_output_torch_path(
    torch_path: str, num_rows: int, num_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    check_output(output_inputs(num_rows * 16, num_heads, head_dim, dtype, torch_path), ())


@pytest.mark.parametrize("rms", NORMS)
@pytest.mark.parametrize("absent", ABSENT)
def test_cls_output_kernel_without_biases(kernels: str, dtype: torch.dtype, absent: tuple[str, ...], rms: bool) -> None:
    check_output(output_inputs(40, 2, 24, dtype, kernels), absent, rms=rms)


@pytest.mark.parametrize("rms", NORMS)
@pytest.mark.parametrize("absent", ABSENT)
def test_cls_output_torch_path_without_biases(
    torch_path: str, dtype: torch.dtype, absent: tuple[str, ...], rms: bool
) -> None:
    check_output(output_inputs(150, 2, 24, dtype, torch_path), absent, rms=rms)


# Rows, width, pooled width, labels: many rows where labels are few, for the RMS.
POOLERS = [(501, 48, 48, 2), (1087, 64, 80, 1), (145, 40, 130, 77), (0, 32, 32, 3)]


@pytest.mark.covering(alone=["num_rows", "width", "pooled", "labels", "dtype"])
@pytest.mark.parametrize(("num_rows", "width", "pooled", "labels"), POOLERS)
def test_pooler_classifier_kernel(
    kernels: str, num_rows: int, width: int, pooled: int, labels: int, dtype: torch.dtype
) -> None:
    inputs = pooler_inputs(num_rows, width, pooled, labels, dtype, kernels)
    check(pooler_classifier, pooler_classifier_reference, inputs)


@pytest.mark.parametrize(("num_rows", "width", "pooled", "labels"), POOLERS)
def test_pooler_classifier_torch_path(
    torch_path: str, num_rows: int, width: int, pooled: int, labels: int, dtype: torch.dtype
) -> None:
    inputs = pooler_inputs(num_rows, width, pooled, labels, dtype, torch_path)
    check(pooler_classifier, pooler_classifier_reference, inputs)


def check_pooler(inputs: list[Any], activation: Activation) -> None:
    def operation(*arguments: Tensor) -> Tensor:
        return pooler_classifier(*arguments, activation=activation)

    def reference(*arguments: Tensor) -> Tensor:
        return pooler_classifier_reference(*arguments, activation)

    check(operation, reference, inputs)


@pytest.mark.full
@pytest.mark.covering(alone=["activation", "dtype"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_pooler_classifier_kernel_with_another_activation(
    kernels: str, dtype: torch.dtype, activation: Activation
) -> None:
    check_pooler(pooler_inputs(500, 64, 80, 3, dtype, kernels), activation)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_pooler_classifier_torch_path_with_another_activation(
    torch_path: str, dtype: torch.dtype, activation: Activation
) -> None:
    check_pooler(pooler_inputs(500, 64, 80, 3, dtype, torch_path), activation)


def test_unknown_activation_of_a_pooler_is_named() -> None:
    with pytest.raises(ValueError, match=r"activation must be one of gelu, .*, got 'softmax'"):
        pooler_classifier(*pooler_inputs(2, 32, 32, 2, torch.float32, "cpu"), activation="softmax")


def test_tanh_keeps_its_ends(kernels: str) -> None:
    x = torch.tensor([-1e4, -20.0, -1.0, 0.0, 1.0, 20.0, 1e4], device=kernels)[:, None]
    x = x * torch.eye(16, device=kernels)[:1]
    one, zero = torch.eye(16, device=kernels), torch.zeros(16, device=kernels)
    actual = pooler_classifier(x, one, zero, one, zero)
    assert float((actual - torch.tanh(x)).abs().max()) < 1e-6


BAD: dict[str, tuple[Callable[..., Tensor], int, Any, type[Exception], str]] = {
    "row_past_the_end": (absorb_query, 1, torch.tensor([99]), ValueError, "rows must lie from 0 to 8, got 99 to 99"),
    "rows_of_floats": (absorb_query, 1, torch.zeros(3), TypeError, "rows must be an int32 or int64"),
    "heads_that_do_not_divide": (absorb_query, 5, 5, ValueError, "num_heads must divide query_weight's 48 rows, got 5"),
    "another_key_weight": (absorb_query, 4, torch.zeros(32, 48), ValueError, "key_weight must have shape"),
    "a_row_too_few": (cls_output, 0, torch.zeros(2, 3, 48), ValueError, r"summed must have shape \(3, nheads, 48\)"),
    "summed_in_half": (cls_output, 0, torch.zeros(3, 3, 48).half(), TypeError, "summed must be torch.float32"),
    "another_out_weight": (cls_output, 3, torch.zeros(48, 32), ValueError, r"out_weight must have shape \(48, 48\)"),
    "another_bias": (cls_output, 2, torch.zeros(47), ValueError, r"value_bias must have shape \(48,\), got \(47,\)"),
    "another_pooler": (pooler_classifier, 1, torch.zeros(9, 47), ValueError, r"pooler_weight must have shape .*48"),
    "another_classifier": (pooler_classifier, 3, torch.zeros(2, 9), ValueError, "classifier_weight must have shape"),
}


@pytest.mark.parametrize(("operation", "place", "value", "error", "message"), list(BAD.values()), ids=list(BAD))
def test_bad_input_is_named(
    operation: Callable[..., Tensor], place: int, value: Any, error: type[Exception], message: str
) -> None:
    arguments = {
        absorb_query: query_inputs(3, 3, 16, torch.float32, "cpu"),
        cls_output: output_inputs(3, 3, 16, torch.float32, "cpu"),
        pooler_classifier: pooler_inputs(3, 48, 48, 2, torch.float32, "cpu"),
    }[operation]
    arguments[place] = value
    with pytest.raises(error, match=message):
        operation(*arguments)
