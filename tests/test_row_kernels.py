"""Norms, embedding and matrix products against their definitions."""

# Arguments come by the list, which mypy cannot count.
# mypy: disable-error-code="arg-type,call-arg,call-overload"

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, get_args

import pytest
import torch
from support import assert_as_exact_as, eager_runs, product_bound, random
from torch import Tensor

from fastcls_kernels import (
    Activation,
    add_layer_norm,
    batch_invariant,
    embedding_layer_norm,
    layer_norm,
    linear,
    linear_activation,
    linear_add_layer_norm,
    linear_gelu,
    linear_per_head,
    use_backend,
    uses_onednn,
)
from fastcls_kernels.linear import cpu
from fastcls_kernels.reference import (
    activation_reference,
    add_layer_norm_reference,
    add_reference,
    embedding_layer_norm_reference,
    layer_norm_reference,
    linear_activation_reference,
    linear_gelu_reference,
)
from fastcls_kernels.runtime.tile_tables import GeluTile, SplitTile, linear_gelu_tile, use_tile

# Large enough to be seen where it is lost, or stands elsewhere.
EPS = 0.02


def norm_inputs(rows: int, width: int, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    x, residual = (random(rows, width, dtype=dtype, device=device) for _ in range(2))
    bias, weight, norm_bias = (random(width, dtype=dtype, device=device) for _ in range(3))
    return x, bias, residual, weight, norm_bias


def double(argument: Any) -> Any:
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def check(
    actual: Tensor, reference: Callable[..., Tensor], arguments: Sequence[Any], biases: tuple[int, ...] = ()
) -> None:
    """Checks ``actual`` against the reference; ``biases`` are the places of arguments that may be None."""
    # Eager sums in other orders take no None, and adding zeros errs by nothing.
    zeros = actual.new_zeros(actual.shape[1])
    given = [zeros if place in biases and argument is None else argument for place, argument in enumerate(arguments)]
    assert_as_exact_as(actual, eager_runs(reference, *given), reference(*map(double, arguments)))


BIASES = [
    pytest.param((True, True), id="biases"),
    pytest.param((False, True), id="no_bias"),
    pytest.param((True, False), id="no_norm_bias"),
    pytest.param((False, False), id="no_biases"),
]


NORMS = [pytest.param(False, id="layer_norm"), pytest.param(True, id="rms_norm")]


def check_norm(rows: int, width: int, dtype: torch.dtype, device: str, biases: tuple[bool, bool], *, rms: bool) -> None:
    x, bias, residual, weight, norm_bias = norm_inputs(rows, width, dtype, device)
    bias, norm_bias = (tensor if there else None for tensor, there in zip((bias, norm_bias), biases, strict=True))
    arguments = (x, bias, residual, weight, norm_bias, EPS)
    normed = add_layer_norm(*arguments, rms=rms)
    check(normed, functools.partial(add_layer_norm_reference, rms=rms), arguments, biases=(1, 4))
    again, summed = add_layer_norm(*arguments, keep_sum=True, rms=rms)
    assert torch.equal(again, normed)
    check(summed, add_reference, arguments[:3])


@pytest.mark.parametrize("rms", NORMS)
@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize(("rows", "width"), [(37, 768), (150, 48), (0, 64), (24, 1500)])
def test_norm_kernel(
    kernels: str, rows: int, width: int, dtype: torch.dtype, biases: tuple[bool, bool], rms: bool
) -> None:
    check_norm(rows, width, dtype, kernels, biases, rms=rms)


@pytest.mark.parametrize("rms", NORMS)
@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize(("rows", "width"), [(37, 768), (900, 16), (0, 64)])
def test_norm_torch_path(
    torch_path: str, rows: int, width: int, dtype: torch.dtype, biases: tuple[bool, bool], rms: bool
) -> None:
    check_norm(rows, width, dtype, torch_path, biases, rms=rms)


def check_chosen_rows(dtype: torch.dtype, device: str, rms: bool) -> None:
    x, bias, residual, weight, norm_bias = norm_inputs(40, 70, dtype, device)
    rows = torch.tensor([39, 0, 7, 7, 21], dtype=torch.int32, device=device)
    normed, summed = add_layer_norm(x, bias, residual, weight, norm_bias, EPS, rows=rows, keep_sum=True, rms=rms)
    everywhere = add_layer_norm(x, bias, residual, weight, norm_bias, EPS, keep_sum=True, rms=rms)
    assert torch.equal(normed, everywhere[0][rows])
    assert torch.equal(summed, everywhere[1][rows])


@pytest.mark.parametrize("rms", NORMS)
def test_norm_kernel_of_chosen_rows(kernels: str, dtype: torch.dtype, rms: bool) -> None:
    check_chosen_rows(dtype, kernels, rms)


@pytest.mark.parametrize("rms", NORMS)
def test_norm_torch_path_of_chosen_rows(torch_path: str, dtype: torch.dtype, rms: bool) -> None:
    check_chosen_rows(dtype, torch_path, rms)


def check_norm_alone(rows: int, width: int, dtype: torch.dtype, device: str, with_bias: bool, *, rms: bool) -> None:
    # Every other row of a wider tensor.
    x = random(2 * rows, width + 3, dtype=dtype, device=device)[::2, :width]
    weight, norm_bias = (random(width, dtype=dtype, device=device) for _ in range(2))
    arguments = (x, weight, norm_bias if with_bias else None, EPS)
    check(layer_norm(*arguments, rms=rms), functools.partial(layer_norm_reference, rms=rms), arguments, biases=(2,))


@pytest.mark.parametrize("rms", NORMS)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("rows", "width"), [(37, 768), (150, 48), (0, 64)])
def test_norm_alone_kernel(kernels: str, rows: int, width: int, dtype: torch.dtype, with_bias: bool, rms: bool) -> None:
    check_norm_alone(rows, width, dtype, kernels, with_bias, rms=rms)


@pytest.mark.parametrize("rms", NORMS)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("rows", "width"), [(37, 768), (0, 64)])
def test_norm_alone_torch_path(
    torch_path: str, rows: int, width: int, dtype: torch.dtype, with_bias: bool, rms: bool
) -> None:
    check_norm_alone(rows, width, dtype, torch_path, with_bias, rms=rms)


def test_rms_norm_divides_by_the_root_mean_square_and_does_not_centre() -> None:
    x, weight, norm_bias = (torch.rand(*shape).double() for shape in ((5, 30), (30,), (30,)))
    expected = torch.stack([row / (row @ row / 30 + EPS).sqrt() for row in x]) * weight + norm_bias
    torch.testing.assert_close(layer_norm(x, weight, norm_bias, EPS, rms=True), expected, rtol=1e-14, atol=0)


def test_layer_norm_of_one_number_is_its_bias(kernels: str, dtype: torch.dtype) -> None:
    inputs = norm_inputs(1, 1, dtype, kernels)
    assert torch.equal(add_layer_norm(*inputs, EPS), inputs[4][None])


def check_norm_of_few_rows(dtype: torch.dtype, device: str, rms: bool) -> None:
    x, weight = random(40, 90, dtype=dtype, device=device), random(90, dtype=dtype, device=device)
    whole = layer_norm(x, weight, None, EPS, rms=rms)
    for rows in (slice(1), slice(39, 40), slice(3, 20)):
        assert torch.equal(layer_norm(x[rows], weight, None, EPS, rms=rms), whole[rows])


@pytest.mark.parametrize("rms", NORMS)
def test_norm_kernel_of_a_row_is_the_same_in_every_batch(kernels: str, dtype: torch.dtype, rms: bool) -> None:
    check_norm_of_few_rows(dtype, kernels, rms)


@pytest.mark.parametrize("rms", NORMS)
def test_norm_torch_path_of_a_row_is_the_same_in_every_batch(torch_path: str, dtype: torch.dtype, rms: bool) -> None:
    check_norm_of_few_rows(dtype, torch_path, rms)


@pytest.mark.usefixtures("torch_path")
def test_norm_leaves_its_inputs_alone() -> None:
    inputs = norm_inputs(4, 32, torch.float32, "cpu")
    before = [tensor.clone() for tensor in inputs]
    for rms in (False, True):
        add_layer_norm(*inputs, EPS, rms=rms)
        layer_norm(inputs[0], inputs[3], inputs[4], EPS, rms=rms)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def embedding_inputs(tokens: int, width: int, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    ids = [torch.randint(rows, (tokens,)).to(device) for rows in (50, 20, 2)]
    tables = [random(rows, width, dtype=dtype, device=device) for rows in (50, 20, 2)]
    return (*ids, *tables, *(random(width, dtype=dtype, device=device) for _ in range(2)))


# Which arguments an encoder does without.
ABSENT = [
    pytest.param((), id="types"),
    pytest.param(("token_type_ids",), id="no_types"),
    pytest.param(("token_type_ids", "token_type_table"), id="no_type_table"),
    pytest.param(("position_ids", "position_table"), id="no_position_table"),
    pytest.param(
        ("position_ids", "token_type_ids", "position_table", "token_type_table", "norm_bias"), id="words_alone"
    ),
    pytest.param(("weight", "norm_bias"), id="no_norm"),
    pytest.param(
        ("position_ids", "token_type_ids", "position_table", "token_type_table", "weight", "norm_bias"),
        id="words_alone_without_a_norm",
    ),
]
EMBEDDING = [
    *("token_ids", "position_ids", "token_type_ids"),
    *("word_table", "position_table", "token_type_table"),
    *("weight", "norm_bias"),
]


def check_embedding(
    tokens: int, width: int, dtype: torch.dtype, device: str, absent: tuple[str, ...], *, rms: bool = False
) -> None:
    inputs = zip(EMBEDDING, embedding_inputs(tokens, width, dtype, device), strict=True)
    arguments = [*(None if name in absent else value for name, value in inputs), EPS]
    reference = functools.partial(embedding_layer_norm_reference, rms=rms)
    # Without a norm no bias is read.
    biases = (7,) if "weight" not in absent else ()
    check(embedding_layer_norm(*arguments, rms=rms), reference, arguments, biases)


@pytest.mark.parametrize("absent", ABSENT)
@pytest.mark.parametrize(("tokens", "width"), [(37, 768), (150, 48), (0, 64)])
def test_embedding_kernel(kernels: str, tokens: int, width: int, dtype: torch.dtype, absent: tuple[str, ...]) -> None:
    check_embedding(tokens, width, dtype, kernels, absent)


@pytest.mark.parametrize("absent", ABSENT)
def test_embedding_torch_path(torch_path: str, dtype: torch.dtype, absent: tuple[str, ...]) -> None:
    check_embedding(37, 48, dtype, torch_path, absent)


@pytest.mark.parametrize("absent", [(), ("norm_bias",)], ids=["bias", "no_bias"])
def test_embedding_kernel_with_rms_norm(kernels: str, dtype: torch.dtype, absent: tuple[str, ...]) -> None:
    check_embedding(37, 70, dtype, kernels, absent, rms=True)


@pytest.mark.parametrize("absent", [(), ("norm_bias",)], ids=["bias", "no_bias"])
def test_embedding_torch_path_with_rms_norm(torch_path: str, dtype: torch.dtype, absent: tuple[str, ...]) -> None:
    check_embedding(37, 70, dtype, torch_path, absent, rms=True)


def test_embeddings_without_a_norm_leave_their_tables_alone() -> None:
    inputs = embedding_inputs(20, 32, torch.float32, "cpu")
    before = [tensor.clone() for tensor in inputs]
    embedding_layer_norm(*inputs[:6], None, None, EPS).zero_()
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.usefixtures("torch_path")
def test_positions_are_not_looked_at_where_there_is_no_table() -> None:
    inputs: list[Any] = [*embedding_inputs(9, 32, torch.float32, "cpu"), EPS]
    inputs[4] = None
    without = embedding_layer_norm(inputs[0], None, *inputs[2:])
    inputs[1] += 10**6
    assert torch.equal(embedding_layer_norm(*inputs), without)


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


def test_a_gelu_in_its_tanh_form_is_for_bfloat16_alone(dtype: torch.dtype) -> None:
    with use_tile("linear_gelu", {"BY": "cublaslt"}):
        chosen = linear_gelu_tile("sm_90", dtype, 64, 768, 3072)
    assert chosen == GeluTile("cublaslt" if dtype == torch.bfloat16 else "torch")


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


def pretend_capability(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    look_at_the_machine_again(monkeypatch)


def pretend_no_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    look_at_the_machine_again(monkeypatch)


def look_at_the_machine_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_machine", cpu._machine.__wrapped__)


ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
# The steepest that they get.
SLOPES = {"gelu": 1.13, "gelu_tanh": 1.13, "relu": 1.0, "silu": 1.1, "tanh": 1.0}


def check_linear_activation(
    rows: int, width: int, columns: int, dtype: torch.dtype, device: str, activation: Activation, with_bias: bool
) -> None:
    # As in test_linear_gelu_torch_path.
    x, weight, bias = linear_inputs(rows, width, columns, dtype, device)
    given = bias if with_bias else None
    actual = linear_activation(x, weight, given, activation)
    assert actual.dtype == dtype
    exact = linear_activation_reference(x.double(), weight.double(), double(given), activation)
    rounding = exact.abs() * torch.finfo(dtype).eps
    allowed = SLOPES[activation] * product_bound(x, weight, bias if with_bias else torch.zeros_like(bias)) + rounding
    assert bool(((actual.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_activation_kernel(kernels: str, dtype: torch.dtype, activation: Activation, with_bias: bool) -> None:
    check_linear_activation(70, 96, 130, dtype, kernels, activation, with_bias)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_batch_invariant_linear_activation_kernel(
    kernels: str, dtype: torch.dtype, activation: Activation, with_bias: bool
) -> None:
    with batch_invariant():
        check_linear_activation(70, 96, 130, dtype, kernels, activation, with_bias)


@pytest.mark.parametrize(("rows", "width", "columns"), SHAPES)
def test_batch_invariant_linear_kernel(kernels: str, rows: int, width: int, columns: int, dtype: torch.dtype) -> None:
    x, weight, bias = linear_inputs(rows, width, columns, dtype, kernels)
    with batch_invariant():
        actual = linear(x, weight)
    exact = x.double() @ weight.double().T
    rounding = exact.abs() * torch.finfo(dtype).eps
    assert bool(((actual.double() - exact).abs() <= product_bound(x, weight, torch.zeros_like(bias)) + rounding).all())


def check_linear_per_head(rows: int, dtype: torch.dtype, device: str) -> None:
    x, weight = random(rows, 3, 20, dtype=dtype, device=device), random(3, 20, 33, dtype=dtype, device=device)
    actual = linear_per_head(x, weight)
    assert actual.shape == (rows, 3, 33)
    for head, (each, matrix) in enumerate(zip(x.unbind(1), weight, strict=True)):
        exact = each.double() @ matrix.double()
        rounding = exact.abs() * torch.finfo(dtype).eps
        nothing = torch.zeros(33, dtype=dtype, device=device)
        assert bool(((actual[:, head] - exact).abs() <= product_bound(each, matrix.T, nothing) + rounding).all())


@pytest.mark.parametrize("invariant", [False, True], ids=["fastest", "invariant"])
def test_linear_per_head_kernel(kernels: str, dtype: torch.dtype, invariant: bool) -> None:
    with batch_invariant(invariant):
        check_linear_per_head(70, dtype, kernels)


@pytest.mark.parametrize("invariant", [False, True], ids=["fastest", "invariant"])
@pytest.mark.parametrize("rows", [0, 1, 90])
def test_linear_per_head_torch_path(torch_path: str, rows: int, dtype: torch.dtype, invariant: bool) -> None:
    with batch_invariant(invariant):
        check_linear_per_head(rows, dtype, torch_path)


def test_linear_per_head_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"weight must have shape \(3, 20, 'out_features'\), got \(3, 21, 5\)"):
        linear_per_head(torch.randn(4, 3, 20), torch.randn(3, 21, 5))
    with pytest.raises(TypeError, match=r"weight must be torch.float32 like the other inputs"):
        linear_per_head(torch.randn(4, 3, 20), torch.randn(3, 20, 5).half())


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [0, 300])
@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_linear_activation_torch_path(
    torch_path: str,
    monkeypatch: pytest.MonkeyPatch,
    capability: str,
    rows: int,
    dtype: torch.dtype,
    activation: Activation,
    with_bias: bool,
) -> None:
    pretend_capability(monkeypatch, capability)
    check_linear_activation(rows, 48, 50, dtype, torch_path, activation, with_bias)


@pytest.mark.usefixtures("torch_path")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_onednn", [True, False], ids=["onednn", "no_onednn"])
def test_an_activation_is_the_one_of_its_name(
    monkeypatch: pytest.MonkeyPatch, activation: Activation, with_onednn: bool
) -> None:
    if not with_onednn:
        pretend_no_onednn(monkeypatch)
    x = torch.linspace(-6, 6, 4001)[:, None]
    actual = linear_activation(x, torch.ones(1, 1), None, activation)
    # The two forms of GELU are nearest to each other.
    exact = {name: activation_reference(x.double(), name) for name in ACTIVATIONS}
    others = min(float((exact[name] - exact[activation]).abs().max()) for name in ACTIVATIONS if name != activation)
    assert float((actual - exact[activation]).abs().max()) < others / 100


def test_gelu_with_a_bias_keeps_its_table(kernels: str, dtype: torch.dtype) -> None:
    inputs = linear_inputs(40, 32, 48, dtype, kernels)
    with use_tile("linear_gelu", GELU_TILES["pointers"]._asdict()):
        assert torch.equal(linear_activation(*inputs, "gelu"), linear_gelu(*inputs))


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


def half_layer_sum(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """The usual computation, one operation after the other."""
    return add_reference(torch.nn.functional.linear(x, weight, bias), None, residual)


def half_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    *,
    rms: bool,
) -> Tensor:
    return layer_norm_reference(half_layer_sum(x, weight, bias, residual), norm_weight, norm_bias, EPS, rms=rms)


def check_half_layer(inputs: list[Any], biases: tuple[bool, bool], *, rms: bool) -> None:
    for place, there in zip((2, 5), biases, strict=True):
        inputs[place] = inputs[place] if there else None
    normed = linear_add_layer_norm(*inputs, EPS, rms=rms)
    check(normed, functools.partial(half_layer, rms=rms), inputs, biases=(2, 5))
    again, summed = linear_add_layer_norm(*inputs, EPS, keep_sum=True, rms=rms)
    assert torch.equal(again, normed)
    check(summed, half_layer_sum, inputs[:4], biases=(2,))


@pytest.mark.parametrize("rms", NORMS)
@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize("tile", list(SPLIT_TILES.values()), ids=list(SPLIT_TILES))
@pytest.mark.parametrize(("rows", "width", "columns"), [(40, 64, 96), (17, 100, 70), (0, 32, 64)])
def test_linear_add_layer_norm_kernel(
    kernels: str,
    rows: int,
    width: int,
    columns: int,
    dtype: torch.dtype,
    tile: SplitTile,
    biases: tuple[bool, bool],
    rms: bool,
) -> None:
    with use_tile("linear_add_layer_norm", tile._asdict()):
        check_half_layer(half_layer_inputs(rows, width, columns, dtype, kernels), biases, rms=rms)


def test_a_residual_that_lies_otherwise_is_refused(kernels: str) -> None:
    x, weight, bias, residual, *norm = half_layer_inputs(8, 64, 96, torch.float16, kernels)
    with pytest.raises(ValueError, match="residual must be contiguous in its last dimension"):
        linear_add_layer_norm(x, weight, bias, residual.T.contiguous().T, *norm, EPS)


@pytest.mark.parametrize("rms", NORMS)
@pytest.mark.parametrize("biases", BIASES)
def test_linear_add_layer_norm_torch_path(
    torch_path: str, dtype: torch.dtype, biases: tuple[bool, bool], rms: bool
) -> None:
    inputs = half_layer_inputs(40, 16, 96, dtype, torch_path)
    before = [tensor.clone() for tensor in inputs]
    check_half_layer(list(inputs), biases, rms=rms)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True)), "inputs must be left alone"
    with pytest.raises(ValueError, match=r"residual must have shape \(40, 96\), got \(39, 96\)"):
        linear_add_layer_norm(*inputs[:3], inputs[3][:39], *inputs[4:], EPS)


def test_products_without_onednn_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = linear_inputs(20, 32, 24, torch.float32, "cpu")
    with_onednn = linear_gelu(*inputs)
    pretend_no_onednn(monkeypatch)
    exact = linear_gelu_reference(*(tensor.double() for tensor in inputs))
    assert_as_exact_as(linear_gelu(*inputs), eager_runs(linear_gelu_reference, *inputs), exact)
    assert torch.allclose(linear_gelu(*inputs), with_onednn, atol=float(product_bound(*inputs).max()) * 2)


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("rows", [24, 300])
def test_products_agree_whichever_library_a_cpu_goes_to(
    monkeypatch: pytest.MonkeyPatch, capability: str, rows: int
) -> None:
    pretend_capability(monkeypatch, capability)
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
        pytest.param(1, None, ValueError, "position_ids must be given where there is a position_table", id="no_ids"),
        pytest.param(5, None, ValueError, r"token_type_ids must be None .* got shape \(1,\)", id="no_type_table"),
        pytest.param(7, torch.zeros(31), ValueError, r"norm_bias must have shape \(32,\)", id="norm_bias"),
        pytest.param(
            6, None, ValueError, r"norm_bias must be None where weight is None, got shape \(32,\)", id="no_norm"
        ),
    ],
)
def test_bad_embedding_input_is_named(place: int, value: Tensor, error: type[Exception], message: str) -> None:
    inputs: list[Any] = list(embedding_inputs(1, 32, torch.float32, "cpu"))
    inputs[place] = value
    with pytest.raises(error, match=message):
        embedding_layer_norm(*inputs, EPS)


def test_rms_norm_without_a_weight_is_refused() -> None:
    words, ids = torch.randn(9, 32), torch.arange(9)
    with pytest.raises(ValueError, match="rms must be False where weight is None, got True"):
        embedding_layer_norm(ids, None, None, words, None, None, None, None, EPS, rms=True)


def test_bad_linear_input_is_named() -> None:
    x, weight, bias = linear_inputs(4, 32, 8, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"weight must have shape \(out_features, 32\), got \(8, 16\)"):
        linear_gelu(x, weight[:, :16], bias)
    with pytest.raises(ValueError, match=r"bias must have shape \(8,\)"):
        linear(x, weight, bias[:7])
    with pytest.raises(TypeError, match=r"weight must be torch.float32"):
        linear(x, weight.half(), None)
    with pytest.raises(ValueError, match="activation must be one of gelu, gelu_tanh, relu, silu, tanh, got 'gelu_new'"):
        linear_activation(x, weight, bias, "gelu_new")
    with pytest.raises(ValueError, match=r"bias must have shape \(8,\), got \(7,\)"):
        linear_activation(x, weight, bias[:7], "relu")


def test_bad_input_of_a_norm_alone_is_named() -> None:
    x, weight = torch.zeros(4, 32), torch.ones(32)
    with pytest.raises(ValueError, match=r"weight must have shape \(32,\), got \(31,\)"):
        layer_norm(x, weight[:31], None, EPS)
    with pytest.raises(TypeError, match=r"norm_bias must be torch\.float32"):
        layer_norm(x, weight, weight.half(), EPS)
    with pytest.raises(ValueError, match="hidden_states must be contiguous in its last dimension"):
        layer_norm(torch.zeros(32, 4).T, weight, None, EPS)


def test_backend_choice_is_checked() -> None:
    with pytest.raises(ValueError, match='backend must be "triton" or "torch"'), use_backend("cuda"):
        pass
