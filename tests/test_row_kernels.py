"""Layer norm, embedding and matrix products against their definitions."""

# Arguments come by the list, which mypy cannot count.
# mypy: disable-error-code="arg-type,call-arg"

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import assert_as_exact_as, eager_runs, product_bound, random
from torch import Tensor

from fastcls_kernels import (
    add_layer_norm,
    embedding_layer_norm,
    linear,
    linear_add_layer_norm,
    linear_gelu,
    use_backend,
    uses_onednn,
)
from fastcls_kernels.reference import (
    add_layer_norm_reference,
    embedding_layer_norm_reference,
    linear_gelu_reference,
)
from fastcls_kernels.tuning import GeluTile, SplitTile, use_tile

EPS = 1e-12


def norm_inputs(rows: int, width: int, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    x, residual = (random(rows, width, dtype=dtype, device=device) for _ in range(2))
    bias, weight, norm_bias = (random(width, dtype=dtype, device=device) for _ in range(3))
    return x, bias, residual, weight, norm_bias


def check_norm(rows: int, width: int, dtype: torch.dtype, device: str, with_bias: bool) -> None:
    x, bias, residual, weight, norm_bias = norm_inputs(rows, width, dtype, device)
    arguments: list[Any] = [x, bias if with_bias else None, residual, weight, norm_bias]
    exact = add_layer_norm_reference(*[a if a is None else a.double() for a in arguments], EPS)
    assert_as_exact_as(add_layer_norm(*arguments, EPS), eager_runs(add_layer_norm_reference, *arguments, EPS), exact)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("rows", "width"), [(37, 768), (150, 48), (1, 1), (0, 64), (24, 1500)])
def test_norm_kernel(kernels: str, rows: int, width: int, dtype: torch.dtype, with_bias: bool) -> None:
    check_norm(rows, width, dtype, kernels, with_bias)


@pytest.mark.parametrize(("rows", "width"), [(37, 768), (90, 16), (0, 64)])
def test_norm_torch_path(torch_path: str, rows: int, width: int, dtype: torch.dtype) -> None:
    check_norm(rows, width, dtype, torch_path, True)


@pytest.mark.usefixtures("torch_path")
def test_norm_leaves_its_inputs_alone() -> None:
    inputs = norm_inputs(4, 32, torch.float32, "cpu")
    before = [tensor.clone() for tensor in inputs]
    add_layer_norm(*inputs, EPS)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def embedding_inputs(tokens: int, width: int, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    ids = [torch.randint(rows, (tokens,)).to(device) for rows in (50, 20, 2)]
    tables = [random(rows, width, dtype=dtype, device=device) for rows in (50, 20, 2)]
    return (*ids, *tables, *(random(width, dtype=dtype, device=device) for _ in range(2)))


def check_embedding(tokens: int, width: int, dtype: torch.dtype, device: str, with_types: bool) -> None:
    floats: list[Any]
    ids, positions, types, *floats = embedding_inputs(tokens, width, dtype, device)
    kinds = types if with_types else None
    actual = embedding_layer_norm(ids, positions, kinds, *floats, EPS)
    exact = embedding_layer_norm_reference(ids, positions, kinds, *[tensor.double() for tensor in floats], EPS)
    assert_as_exact_as(actual, eager_runs(embedding_layer_norm_reference, ids, positions, kinds, *floats, EPS), exact)


@pytest.mark.parametrize("with_types", [True, False], ids=["types", "no_types"])
@pytest.mark.parametrize(("tokens", "width"), [(37, 768), (150, 48), (0, 64)])
def test_embedding_kernel(kernels: str, tokens: int, width: int, dtype: torch.dtype, with_types: bool) -> None:
    check_embedding(tokens, width, dtype, kernels, with_types)


@pytest.mark.parametrize("with_types", [True, False], ids=["types", "no_types"])
def test_embedding_torch_path(torch_path: str, dtype: torch.dtype, with_types: bool) -> None:
    check_embedding(37, 48, dtype, torch_path, with_types)


def linear_inputs(rows: int, width: int, columns: int, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    weight = random(columns, width, dtype=dtype, device=device, scale=width**-0.5)
    return random(rows, width, dtype=dtype, device=device), weight, random(columns, dtype=dtype, device=device)


def needs_copy_engine(device: str) -> None:
    if device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("the copy engine comes with compute capability 9.0")


GELU_TILES = {
    "pointers": GeluTile("triton", False, BLOCK_M=32, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=2),
    "tma": GeluTile("triton", True, BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, num_warps=4, num_stages=2),
    "few_rows": GeluTile("triton", False, BLOCK_M=16, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=2),
    "library": GeluTile("torch"),
}
SPLIT_TILES = {
    "library": SplitTile("torch"),
    "one_part": SplitTile("triton", 1, BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, num_warps=4, num_stages=2),
    "parts": SplitTile("triton", 3, BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, num_warps=4, num_stages=2),
}

SHAPES = [(70, 96, 130), (300, 48, 5), (1, 40, 1100), (0, 32, 8), (33, 40, 64), (513, 64, 72)]


@pytest.mark.parametrize("tile", list(GELU_TILES.values()), ids=list(GELU_TILES))
@pytest.mark.parametrize(("rows", "width", "columns"), SHAPES)
def test_linear_gelu_kernel(
    kernels: str,
    rows: int,
    width: int,
    columns: int,
    dtype: torch.dtype,
    tile: GeluTile,
) -> None:
    if tile.TMA:
        needs_copy_engine(kernels)
    inputs = linear_inputs(rows, width, columns, dtype, kernels)
    exact = linear_gelu_reference(*(tensor.double() for tensor in inputs))
    with use_tile("linear_gelu", tile._asdict()):
        actual = linear_gelu(*inputs)
    assert_as_exact_as(actual, eager_runs(linear_gelu_reference, *inputs), exact)


@pytest.mark.parametrize(("rows", "width", "columns"), SHAPES)
def test_linear_gelu_torch_path(torch_path: str, rows: int, width: int, columns: int, dtype: torch.dtype) -> None:
    # Libraries sum a product in orders of their own: what they owe is the textbook bound, and GELU's slope is 1.13.
    inputs = linear_inputs(rows, width, columns, dtype, torch_path)
    exact = linear_gelu_reference(*(tensor.double() for tensor in inputs))
    rounding = exact.abs() * torch.finfo(dtype).eps
    assert bool(((linear_gelu(*inputs).double() - exact).abs() <= 1.13 * product_bound(*inputs) + rounding).all())


@pytest.mark.parametrize(("rows", "width", "columns"), SHAPES)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_linear(rows: int, width: int, columns: int, dtype: torch.dtype, with_bias: bool) -> None:
    x, weight, bias = linear_inputs(rows, width, columns, dtype, "cpu")
    exact = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
    actual = linear(x, weight, bias if with_bias else None)
    assert actual.dtype == dtype
    rounding = exact.abs() * torch.finfo(dtype).eps
    assert bool(((actual.double() - exact).abs() <= product_bound(x, weight, bias) + rounding).all())


@pytest.mark.usefixtures("torch_path")
def test_gelu_is_the_exact_one() -> None:
    x = torch.linspace(-6, 6, 4001)[:, None]
    actual = linear_gelu(x, torch.ones(1, 1), torch.zeros(1))
    exact = torch.nn.functional.gelu(x.double())
    tanh_form = torch.nn.functional.gelu(x.double(), approximate="tanh")
    assert float((actual - exact).abs().max()) < float((tanh_form - exact).abs().max()) / 100


def half_layer_inputs(rows: int, width: int, columns: int, dtype: torch.dtype, device: str) -> list[Any]:
    x, weight, bias = linear_inputs(rows, width, columns, dtype, device)
    residual = random(rows, columns, dtype=dtype, device=device)
    return [x, weight, bias, residual, *(random(columns, dtype=dtype, device=device) for _ in range(2))]


def half_layer(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, *norm: Tensor) -> Tensor:
    """The usual computation, one operation after the other."""
    return add_layer_norm_reference(torch.nn.functional.linear(x, weight, bias), None, residual, *norm, EPS)


@pytest.mark.parametrize("tile", list(SPLIT_TILES.values()), ids=list(SPLIT_TILES))
@pytest.mark.parametrize(("rows", "width", "columns"), [(40, 64, 96), (17, 100, 70), (0, 32, 64)])
def test_linear_add_layer_norm_kernel(
    kernels: str,
    rows: int,
    width: int,
    columns: int,
    dtype: torch.dtype,
    tile: SplitTile,
) -> None:
    inputs = half_layer_inputs(rows, width, columns, dtype, kernels)
    exact = half_layer(*[tensor.double() for tensor in inputs])
    with use_tile("linear_add_layer_norm", tile._asdict()):
        actual = linear_add_layer_norm(*inputs, EPS)
    assert_as_exact_as(actual, eager_runs(half_layer, *inputs), exact)


def test_a_residual_that_lies_otherwise_is_refused(kernels: str) -> None:
    x, weight, bias, residual, *norm = half_layer_inputs(8, 64, 96, torch.float16, kernels)
    with pytest.raises(ValueError, match="residual must be contiguous in its last dimension"):
        linear_add_layer_norm(x, weight, bias, residual.T.contiguous().T, *norm, EPS)


def test_linear_add_layer_norm_torch_path(torch_path: str, dtype: torch.dtype) -> None:
    inputs = half_layer_inputs(40, 16, 96, dtype, torch_path)
    before = [tensor.clone() for tensor in inputs]
    exact = half_layer(*[tensor.double() for tensor in inputs])
    assert_as_exact_as(linear_add_layer_norm(*inputs, EPS), eager_runs(half_layer, *inputs), exact)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True)), "inputs must be left alone"
    with pytest.raises(ValueError, match=r"residual must have shape \(40, 96\), got \(39, 96\)"):
        linear_add_layer_norm(*inputs[:3], inputs[3][:39], *inputs[4:], EPS)


def test_products_without_onednn_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = linear_inputs(20, 32, 24, torch.float32, "cpu")
    with_onednn = linear_gelu(*inputs)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    exact = linear_gelu_reference(*(tensor.double() for tensor in inputs))
    assert_as_exact_as(linear_gelu(*inputs), eager_runs(linear_gelu_reference, *inputs), exact)
    assert torch.allclose(linear_gelu(*inputs), with_onednn, atol=float(product_bound(*inputs).max()) * 2)


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("rows", [24, 300])
def test_products_agree_whichever_library_a_cpu_goes_to(
    monkeypatch: pytest.MonkeyPatch, capability: str, rows: int
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    inputs = linear_inputs(rows, 32, 24, torch.float32, "cpu")
    exact = linear_gelu_reference(*(tensor.double() for tensor in inputs))
    assert bool(((linear_gelu(*inputs).double() - exact).abs() <= 2 * product_bound(*inputs)).all())
    if capability == "AVX2" and rows > 256:
        assert not uses_onednn(inputs[0])


def norm_with(**change: Any) -> dict[str, Any]:
    x, bias, residual, weight, norm_bias = norm_inputs(4, 32, torch.float32, "cpu")
    named = {"hidden_states": x, "bias": bias, "residual": residual, "weight": weight, "norm_bias": norm_bias}
    return {**named, "eps": EPS, **change}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"residual": torch.zeros(3, 32)}, ValueError, r"residual must have .* \(4, 32\)", id="residual"),
        pytest.param({"bias": torch.zeros(31)}, ValueError, r"bias must have shape \(32,\), got \(31,\)", id="bias"),
        pytest.param({"weight": torch.zeros(32).half()}, TypeError, "weight must be torch.float32", id="weight"),
    ],
)
def test_bad_norm_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        add_layer_norm(**norm_with(**change))


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        pytest.param(0, torch.tensor([50]), ValueError, "token_ids must lie from 0 to 49, got 50 to 50", id="id"),
        pytest.param(1, torch.tensor([-1]), ValueError, "position_ids must lie from 0 to 19, got -1", id="position"),
        pytest.param(2, torch.tensor([2]), ValueError, "token_type_ids must lie from 0 to 1", id="type"),
        pytest.param(0, torch.tensor([1.0]), TypeError, "token_ids must be an int32 or int64", id="float_id"),
        pytest.param(1, torch.tensor([1, 2]), ValueError, "the same as token_ids, got", id="shape"),
        pytest.param(4, torch.zeros(20, 31), ValueError, r"position_table must be .*\(rows, 32\)", id="table"),
    ],
)
def test_bad_embedding_input_is_named(place: int, value: Tensor, error: type[Exception], message: str) -> None:
    inputs: list[Any] = list(embedding_inputs(1, 32, torch.float32, "cpu"))
    inputs[place] = value
    with pytest.raises(error, match=message):
        embedding_layer_norm(*inputs, EPS)


def test_bad_linear_input_is_named() -> None:
    x, weight, bias = linear_inputs(4, 32, 8, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"weight must have shape \(out_features, 32\), got \(8, 16\)"):
        linear_gelu(x, weight[:, :16], bias)
    with pytest.raises(ValueError, match=r"bias must have shape \(8,\)"):
        linear(x, weight, bias[:7])
    with pytest.raises(TypeError, match=r"weight must be torch.float32"):
        linear(x, weight.half(), None)


def test_backend_choice_is_checked() -> None:
    with pytest.raises(ValueError, match='backend must be "triton" or "torch"'), use_backend("cuda"):
        pass
