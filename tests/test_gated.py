"""gated_activation and the activations themselves against their definitions."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from support import assert_as_exact_as, random
from torch import Tensor

from fastcls_kernels import Activation, gated_activation
from fastcls_kernels.reference import gated_activation_reference

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
SHAPES = [(37, 1152), (1, 1700), (9, 128), (150, 33), (1025, 1), (0, 64), (5, 0)]


def check(x: Tensor, activation: Activation) -> None:
    exact = gated_activation_reference(x.double(), activation)
    if x.dtype == torch.float32:
        # Libraries' exponentials differ by less than a unit in the last place of the input makes.
        next_x = torch.nextafter(x, x.new_tensor(float("inf")))
        eager = [gated_activation_reference(inputs, activation) for inputs in (x, next_x)]
    else:
        # Rounded once, which eager PyTorch does twice.
        eager = [exact.to(x.dtype)]
    before = x.clone()
    assert_as_exact_as(gated_activation(x, activation), eager, exact)
    assert torch.equal(x, before), "the input must be left alone"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_kernel_matches_definition(
    kernels: str, rows: int, size: int, dtype: torch.dtype, activation: Activation
) -> None:
    check(random(rows, 2 * size, dtype=dtype, device=kernels), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_torch_path_matches_definition(
    torch_path: str, rows: int, size: int, dtype: torch.dtype, activation: Activation
) -> None:
    check(random(rows, 2 * size, dtype=dtype, device=torch_path), activation)


def test_kernel_takes_rows_of_a_wider_tensor(kernels: str, dtype: torch.dtype) -> None:
    check(random(50, 200, dtype=dtype, device=kernels)[::2, 7:151], "gelu")


def test_torch_path_takes_rows_of_a_wider_tensor(torch_path: str, dtype: torch.dtype) -> None:
    check(random(50, 200, dtype=dtype, device=torch_path)[::2, 7:151], "gelu")


# Too large for an exponential, or no number.
ENDS = [-1e30, -1e4, -100.0, -20.0, -0.0, 0.0, 20.0, 100.0, 1e4, 1e30, float("nan")]


def check_ends(values: list[float], activation: Activation, device: str) -> None:
    x = torch.tensor(values, device=device)[:, None]
    x = torch.cat((x, torch.ones_like(x)), 1)
    exact = gated_activation_reference(x.double(), activation)
    torch.testing.assert_close(gated_activation(x, activation), exact, equal_nan=True, check_dtype=False)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])
def test_kernel_keeps_the_ends(kernels: str, activation: Activation) -> None:
    check_ends([*ENDS, float("inf")], activation, kernels)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_torch_path_keeps_the_ends(torch_path: str, activation: Activation) -> None:
    # PyTorch's own GELU of infinity is NaN on some CPUs.
    check_ends(ENDS, activation, torch_path)


@pytest.mark.parametrize(
    ("x", "activation", "error", "message"),
    [
        pytest.param(torch.zeros(4, 7), "gelu", ValueError, r"even number of columns, got \(4, 7\)", id="odd"),
        pytest.param(torch.zeros(8), "gelu", ValueError, r"\(num_tokens, 2 \* size\), got \(8,\)", id="shape"),
        pytest.param(torch.zeros(4, 8).int(), "gelu", TypeError, "hidden_states must be one of .*int32", id="dtype"),
        pytest.param(torch.zeros(8, 4).T, "gelu", ValueError, "contiguous in its last dimension", id="strides"),
        pytest.param(torch.zeros(4, 8), "swish", ValueError, "one of gelu, .*, tanh, got 'swish'", id="activation"),
    ],
)
def test_bad_input_is_named(x: Tensor, activation: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gated_activation(x, activation)
