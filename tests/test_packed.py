"""Packed weights on a CPU: products, layers and embeddings by the compiled kernels and by PyTorch's operators."""

# Arguments come by the list, which mypy cannot count.
# mypy: disable-error-code="arg-type,call-arg"

from __future__ import annotations

import contextlib
import copy
import importlib
import itertools
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, get_args

import pytest
import torch
import torch.nn.functional as F
from conftest import poison_new_tensors
from support import assert_as_exact_as, cu_seqlens_of, eager_runs, product_bound
from torch import Tensor

from fastcls_kernels import Activation, PackedLayer, PackedLayout, batch_invariant, packed_layer, use_backend
from fastcls_kernels.packed import (
    PackedTable,
    PackedWeight,
    Packing,
    explain_compiled,
    pack_table,
    pack_weight,
    packed_embedding_unchecked,
    packed_linear,
    packs,
    packs_embedding,
)
from fastcls_kernels.reference import activation_reference, attention_varlen_reference, embedding_layer_norm_reference

# Modules that a function of the package shares its name with.
PRODUCTS, LIBRARY, LAYERS = (
    importlib.import_module(f"fastcls_kernels.{name}") for name in ("packed", "packed.library", "packed_layer")
)

# Blocks of 6 rows, chunks of 192.
ROWS = (0, 1, 5, 6, 7, 13, 191, 192, 193, 400)
# Panels of 64, read in pairs.
OUT_FEATURES = (1, 2, 63, 64, 65, 100, 384)
# Groups of 128, float32 in steps of 384.
IN_FEATURES = (16, 48, 128, 144, 384, 1536)
ACTIVATIONS = (None, *get_args(Activation))

every_packing = pytest.mark.parametrize("packing", get_args(Packing))


FORMS = get_args(LIBRARY.Form)


@pytest.fixture(params=[*FORMS, "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Who computes, on outputs and working memory that are NaN until written."""
    poison_new_tensors(monkeypatch)
    with computing_by(request.param, monkeypatch):
        yield request.param


@pytest.fixture(params=FORMS)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    poison_new_tensors(monkeypatch)
    with computing_by(request.param, monkeypatch):
        yield


@contextlib.contextmanager
def computing_by(path: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if path == "torch":
        with use_backend("torch"):
            yield
        return
    library, reason = LIBRARY._open()
    if library is None:
        pytest.skip(f"the compiled kernels cannot run: {reason}")
    if not getattr(library, f"fastcls_has_{path}")():
        pytest.skip(f"this CPU has no {path.upper()}")
    monkeypatch.setattr(LIBRARY, "_load", lambda: (LIBRARY.Compiled(library, path), ""))
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        # Bytes of all ones are NaN to whoever reads them as numbers.
        out = empty(*size, **options)
        if out.dtype == torch.uint8:
            return out.fill_(255)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)
    yield


def needs(path: str, packing: Packing) -> None:
    if path != "torch" and not explain_compiled(packing)[0]:
        pytest.skip(f"{path}: {explain_compiled(packing)[1]}")


def weight_and_bias(out_features: int, in_features: int, with_bias: bool = True) -> tuple[Tensor, Tensor | None]:
    weight = torch.randn(out_features, in_features) / in_features**0.5
    return weight, torch.randn(out_features) if with_bias else None


def strided(rows: int, columns: int, scale: float = 1.0) -> Tensor:
    """Every other row of a wider tensor."""
    return (torch.randn(2 * rows, columns + 3) * scale)[::2, :columns]


def whole(bias: Tensor | None, out_features: int) -> Tensor:
    return torch.zeros(out_features) if bias is None else bias


def product_reference(
    x: Tensor, weight: Tensor, bias: Tensor, activation: Activation | None, residual: Tensor | None
) -> Tensor:
    product = F.linear(x, weight, bias)
    if activation is not None:
        product = activation_reference(product, activation)
    return product if residual is None else product + residual


def double(arguments: Sequence[Any]) -> list[Any]:
    return [each.double() if isinstance(each, Tensor) and each.is_floating_point() else each for each in arguments]


# What a product reads, from the words of the docstring alone.


def rounded_rows(x: Tensor, packing: Packing) -> Tensor:
    """Float64 numbers of the rows as the product of this packing reads them."""
    if packing == "float32":
        return x.double()
    if packing == "bfloat16":
        return x.bfloat16().double()
    parts = []
    for part in x.double().split(128, 1):
        low, high = part.min(1, keepdim=True).values.clamp(max=0), part.max(1, keepdim=True).values.clamp(min=0)
        scale = (high - low) / 255
        scale[scale == 0] = 1
        zero_point = (-low / scale).round()
        parts.append(scale * (((part / scale).round() + zero_point).clamp(0, 255) - zero_point))
    return torch.cat(parts, 1)


def rounded_weight(weight: Tensor, packing: Packing) -> Tensor:
    if packing == "float32":
        return weight.double()
    if packing == "bfloat16":
        return weight.bfloat16().double()
    scale = weight.double().abs().max(1, keepdim=True).values / 127
    scale[scale == 0] = 1
    return scale * (weight.double() / scale).round()


def off_the_ties(values: Tensor, steps: int, lowest: int) -> Tensor:
    """Columns of numbers that nobody's rounding puts on another step: within 0.4 of one, and the outer ones on it.

    (rows, columns) of uniform numbers in [0, 1) become numbers whose steps, ``steps`` of them, differ by row and group.
    """
    parts = []
    for part in values.split(128, 1):
        count = part.shape[1]
        step = torch.rand(part.shape[0], 1) * 0.02 + 0.001
        levels = (part * steps).round() + lowest
        levels[:, 0], levels[:, count - 1] = lowest, lowest + steps
        fractions = torch.rand(part.shape) * 0.8 - 0.4
        fractions[:, 0] = fractions[:, count - 1] = 0
        # Nothing beyond the ends.
        fractions = torch.where((levels <= lowest) | (levels >= lowest + steps), 0, fractions)
        parts.append(step * (levels + fractions))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("out_features", OUT_FEATURES)
@pytest.mark.parametrize("in_features", IN_FEATURES)
@every_packing
def test_a_product_of_any_size_is_what_is_defined(
    path: str, packing: Packing, rows: int, out_features: int, in_features: int
) -> None:
    needs(path, packing)
    weight, bias = weight_and_bias(out_features, in_features)
    x, residual = strided(rows, in_features), strided(rows, out_features)
    if packing == "int8":
        x = off_the_ties(torch.rand(rows, in_features), 255, -100)
        # Of a weight a whole row shares its scale.
        weight = torch.randint(-127, 128, weight.shape) + torch.rand(weight.shape) * 0.8 - 0.4
        weight[:, 0] = 127
        weight = weight.clamp(-127, 127) * (torch.rand(out_features, 1) * 0.02 + 0.001)
    assert bias is not None
    found = packed_linear(x, pack_weight(weight, bias, packing), residual=residual)
    read, by = rounded_rows(x, packing), rounded_weight(weight, packing)
    exact = read @ by.T + bias.double() + residual.double()
    # A few roundings besides those of the sum: of scales, of the scaled sum, of the bias and of the residual.
    bound = 2 * product_bound(read.float(), by.float(), bias) + 8 * 2**-24 * (
        read.abs() @ by.abs().T + bias.abs() + residual.abs()
    )
    assert found.shape == (rows, out_features)
    assert found.dtype == torch.float32
    assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("in_features", IN_FEATURES)
@pytest.mark.parametrize("packing", ["float32", "bfloat16"])
def test_a_product_is_as_exact_as_eager(
    path: str, packing: Packing, in_features: int, activation: Activation | None, with_bias: bool, with_residual: bool
) -> None:
    needs(path, packing)
    weight, bias = weight_and_bias(100, in_features, with_bias)
    x = strided(193, in_features)
    residual = strided(193, 100) if with_residual else None
    found = packed_linear(x, pack_weight(weight, bias, packing), activation, residual)
    arguments = (x, weight, whole(bias, 100), activation, residual)
    exact = product_reference(*double(arguments))
    if packing == "float32":
        assert_as_exact_as(found, eager_runs(product_reference, *arguments), exact)
        return
    rounded = [each.bfloat16() if isinstance(each, Tensor) else each for each in arguments]
    assert_as_exact_as(found.bfloat16(), [product_reference(*rounded)], exact)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("in_features", IN_FEATURES)
def test_int8_is_the_same_from_the_compiled_kernels_and_from_pytorch(
    in_features: int, activation: Activation | None
) -> None:
    weight, bias = weight_and_bias(100, in_features)
    x, residual = strided(193, in_features, scale=3.0), strided(193, 100)
    # Zero is a step, also where all numbers lie on one side of it.
    x[:60], x[60:120] = x[:60].abs() + 1, -x[60:120].abs() - 1
    packed = pack_weight(weight, bias, "int8")
    with use_backend("torch"):
        expected = packed_linear(x, packed, activation, residual)
        values = packed_linear(x, packed)
    found = packed_linear(x, packed, activation, residual)
    assert bias is not None
    bound = 4 * product_bound(x.abs() + 0.1, packed.unpacked(), bias) + 2**-22 * residual.abs()
    if activation in ("gelu", "gelu_tanh"):
        # Of what is rounded coarser next, erf is off by 2.4e-5 at most.
        bound = bound + values.abs() * 1.3e-5
    assert bool(((found - expected).double().abs() <= 1.2 * bound).all())


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("in_features", [48, 384])
def test_int8_errs_by_its_steps(in_features: int) -> None:
    weight, _ = weight_and_bias(384, in_features)
    x = torch.randn(400, in_features)
    # Another range in each group, which one scale a row would round by the largest.
    x[:, :128] *= 20
    found = packed_linear(x, pack_weight(weight, None, "int8")).double()
    variance = torch.zeros(400, 384, dtype=torch.float64)
    weight_step = weight.double().abs().amax(1) / 127
    for columns, rows in zip(weight.double().split(128, 1), x.double().split(128, 1), strict=True):
        step = (rows.amax(1) - rows.amin(1)) / 255
        variance += (step.square() / 12)[:, None] * columns.square().sum(1)
        variance += (weight_step.square() / 12) * rows.square().sum(1, keepdim=True)
    error = found - x.double() @ weight.double().T
    assert 0.9 <= float((error.square() / variance).mean().sqrt()) <= 1.1


@pytest.mark.usefixtures("compiled")
@every_packing
@pytest.mark.parametrize("in_features", [16, 144, 1536])
@pytest.mark.parametrize("activation", [None, "gelu"], ids=str)
def test_a_rows_bits_are_its_own(
    monkeypatch: pytest.MonkeyPatch,
    packing: Packing,
    in_features: int,
    activation: Activation | None,
) -> None:
    needs("compiled", packing)
    weight, bias = weight_and_bias(384, in_features)
    x = torch.randn(400, in_features)
    packed = pack_weight(weight, bias, packing)
    together = packed_linear(x, packed, activation)
    for first, count in [(0, 1), (399, 1), (5, 1), (0, 7), (186, 13), (1, 191), (3, 193), (200, 200)]:
        assert torch.equal(packed_linear(x[first : first + count], packed, activation), together[first : first + count])
    # And so are a column's.
    for columns in OUT_FEATURES:
        some = pack_weight(weight[:columns], None if bias is None else bias[:columns], packing)
        assert torch.equal(packed_linear(x, some, activation), together[:, :columns])
    monkeypatch.setattr(PRODUCTS, "_FEW_PRODUCTS", 0)
    for threads in (1, 2):
        with threads_of_torch(threads):
            assert torch.equal(packed_linear(x, packed, activation), together)
            assert torch.equal(packed_linear(x[7:20], packed, activation), together[7:20])


@every_packing
def test_by_pytorch_a_rows_bits_are_its_own_where_that_is_asked_for(packing: Packing) -> None:
    shape = SHAPES[0]
    weight, bias = weight_and_bias(100, 144)
    packed, layer = pack_weight(weight, bias, packing), packed_of(layer_weights(shape), shape, packing)
    x, lengths = torch.randn(200, 144), [3, 17, 0, 1, 65]
    texts = [torch.randn(length, shape.width) for length in lengths]
    with use_backend("torch"), batch_invariant():
        together = packed_linear(x, packed, "gelu")
        for first, count in ((0, 1), (7, 13), (100, 100)):
            assert torch.equal(packed_linear(x[first : first + count], packed, "gelu"), together[first : first + count])
        for rows in ("all", "first"):
            alone = [run_layer(text, [len(text)], layer, rows) for text in texts]
            assert torch.equal(run_layer(torch.cat(texts), lengths, layer, rows), torch.cat(alone))


@contextlib.contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@every_packing
def test_what_is_not_finite_stays_in_its_row(
    path: str, packing: Packing, activation: Activation | None, value: float
) -> None:
    needs(path, packing)
    weight, bias = weight_and_bias(100, 144)
    assert bias is not None
    x = torch.randn(13, 144)
    packed = pack_weight(weight, bias, packing)
    before = packed_linear(x, packed, activation)
    for row, column in ((0, 0), (4, 143), (12, 100)):
        odd = x.clone()
        odd[row, column] = value
        found = packed_linear(odd, packed, activation)
        others = torch.arange(13) != row
        assert torch.equal(found[others], before[others]) or path == "torch"
        torch.testing.assert_close(found[others], before[others])
        exact = product_reference(*double((odd, weight, bias, activation, None)))[row]
        # Of int8 all of the row becomes NaN.
        lost = exact.isnan() | (packing == "int8")
        assert bool(found[row][lost].isnan().all())
        if activation is None:
            assert not bool(found[row].isfinite().any())


@pytest.mark.parametrize("number", [0.0, 1e-40, -1e-40], ids=str)
@every_packing
def test_rows_of_nothing_give_the_bias(path: str, packing: Packing, number: float) -> None:
    needs(path, packing)
    weight, bias = weight_and_bias(65, 144)
    assert bias is not None
    x = torch.randn(8, 144)
    x[3] = number
    assert torch.equal(packed_linear(x, pack_weight(weight, bias, packing))[3], bias)
    # As do columns of nothing.
    weight[7] = number
    found = packed_linear(x, pack_weight(weight, bias, packing))[:, 7]
    assert torch.equal(found, bias[7].expand(8))


@every_packing
def test_huge_rows_stay_right(path: str, packing: Packing) -> None:
    needs(path, packing)
    weight, _ = weight_and_bias(65, 144)
    packed, x = pack_weight(weight, None, packing), torch.randn(7, 144)
    factor = 2.0**100
    # A power of two scales every number on the way, and changes no bit besides.
    assert torch.equal(packed_linear(x * factor, packed), packed_linear(x, packed) * factor)
    assert torch.equal(packed_linear(x / factor**0.5, packed), packed_linear(x, packed) / factor**0.5)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("activation", get_args(Activation))
def test_an_activation_is_right_far_from_zero(activation: Activation) -> None:
    # Half of 3e38 is the most that eager GELU can double.
    numbers = torch.tensor(
        [-1e38, -1e30, -1e4, -120.0, -90.0, -20.0, -6.0, 0.0, 6.0, 20.0, 90.0, 120.0, 1e4, 1e30, 1e38]
    )
    x = torch.zeros(15, 16)
    x[:, 0] = numbers
    found = packed_linear(x, pack_weight(torch.eye(1, 16), None, "float32"), activation)[:, 0].double()
    exact = activation_reference(numbers.double(), activation)
    assert bool(((found - exact).abs() <= 2**-21 * exact.abs() + 1e-7).all())


# A layer


class Shape(NamedTuple):
    width: int
    heads: int
    inner: int


SHAPES = [Shape(64, 4, 112), Shape(128, 2, 256), Shape(192, 4, 208), Shape(320, 4, 272)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
LENGTHS = {
    "around_tiles": [1, 15, 16, 17, 63, 64, 65, 129],
    "long": [513, 1, 64],
    "empty_ones": [0, 0, 3, 0, 17, 0, 0, 1, 65, 0],
    "one_token": [1],
    "hundreds": [1 + each % 5 for each in range(300)],
    "hundreds_of_empty_ones": [0] * 150 + [7, 0, 0] * 12 + [0] * 150,
}


class Weights(NamedTuple):
    """Of a layer, each product's weight and bias, and its norms' ones."""

    qkv: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    attention_norm: tuple[Tensor, Tensor]
    output_norm: tuple[Tensor, Tensor]


def layer_weights(shape: Shape) -> Weights:
    width, inner = shape.width, shape.inner
    sizes = ((3 * width, width), (width, width), (inner, width), (width, inner))
    products = [(torch.randn(size) * 1.5 / size[1] ** 0.5, torch.randn(size[0]) * 0.2) for size in sizes]
    norms = [(1 + 0.2 * torch.randn(width), 0.2 * torch.randn(width)) for _ in range(2)]
    return Weights(*products, *norms)


def packed_of(weights: Weights, shape: Shape, packing: Packing, activation: Activation = "gelu") -> PackedLayer:
    products = [pack_weight(*each, packing) for each in weights[:4]]
    scale = (shape.width // shape.heads) ** -0.5
    return PackedLayer(*products, *weights[4:], shape.heads, scale, 1e-12, activation)


def layer_reference(
    x: Tensor, *parameters: Any, lengths: Sequence[int], heads: int, activation: Activation, rows: str
) -> Tensor:
    """A layer, from the formula of its docstring."""
    qkv, qkv_bias, out, out_bias, up, up_bias, down, down_bias, *norms = parameters
    cu_seqlens = cu_seqlens_of(lengths)
    q, k, v = F.linear(x, qkv, qkv_bias).unflatten(1, (3, heads, -1)).unbind(1)
    attended = attention_varlen_reference(q, k, v, cu_seqlens, max(lengths, default=0)).flatten(1)
    if rows == "first":
        starts = cu_seqlens[:-1][torch.tensor(lengths) > 0].long()
        attended, x = attended[starts], x[starts]
    width = (x.shape[1],)
    attended = F.layer_norm(F.linear(attended, out, out_bias) + x, width, norms[0], norms[1], 1e-12)
    inner = activation_reference(F.linear(attended, up, up_bias), activation)
    return F.layer_norm(F.linear(inner, down, down_bias) + attended, width, norms[2], norms[3], 1e-12)


def run_layer(x: Tensor, lengths: Sequence[int], layer: PackedLayer, rows: str) -> Tensor:
    """What a layer makes of rows, but for those of no sequence."""
    found = packed_layer(x, cu_seqlens_of(lengths), max(lengths, default=0), layer, rows)
    if rows == "all":
        return found[: sum(lengths)]
    assert found.shape[0] == len(lengths)
    return found[torch.tensor(lengths, dtype=torch.long) > 0]


@pytest.mark.covering(alone=["activation"])
@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("rows", ["all", "first"])
@pytest.mark.parametrize("packing", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [*LENGTHS, *SHAPES[1:]], ids=lambda each: str(getattr(each, "width", each)))
def test_a_layer_is_as_exact_as_eager(
    path: str, packing: Packing, lengths: str | Shape, rows: str, activation: Activation
) -> None:
    needs(path, packing)
    # Of wide layers sums in many orders take long.
    shape, of = (SHAPES[0], LENGTHS[lengths]) if isinstance(lengths, str) else (lengths, [0, 17, 0, 1, 33, 0])
    weights = layer_weights(shape)
    # Few rows make an RMS that varies by more than the bound's tenth.
    made = sum(of) if rows == "all" else sum(length > 0 for length in of)
    of = of * (12 if made < 20 else 1)
    x = torch.randn(sum(of), shape.width)
    found = run_layer(x, of, packed_of(weights, shape, packing, activation), rows)
    arguments = (x, *itertools.chain.from_iterable(weights))
    options = {"lengths": of, "heads": shape.heads, "activation": activation, "rows": rows}

    def reference(*tensors: Tensor) -> Tensor:
        return layer_reference(*tensors, **options)

    exact = reference(*double(arguments))
    if packing == "float32":
        assert_as_exact_as(found, eager_runs(reference, *arguments), exact)
        return
    assert_as_exact_as(found.bfloat16(), [reference(*(each.bfloat16() for each in arguments))], exact)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("rows", ["all", "first"])
@every_shape
def test_a_layer_in_int_8_is_the_same_from_the_compiled_kernels_and_from_pytorch(shape: Shape, rows: str) -> None:
    weights, lengths = layer_weights(shape), LENGTHS["around_tiles"] * 2
    x = torch.randn(sum(lengths), shape.width)
    layer = packed_of(weights, shape, "int8")
    found = run_layer(x, lengths, layer, rows).double()
    with use_backend("torch"):
        expected = run_layer(x, lengths, layer, rows).double()
    arguments = (x, *itertools.chain.from_iterable(weights))
    exact = layer_reference(*double(arguments), lengths=lengths, heads=shape.heads, activation="gelu", rows=rows)
    error = float((expected - exact).square().mean().sqrt())
    # Where a rounding before a step falls the other way, the step does, too: rarely.
    assert float((found - expected).square().mean().sqrt()) <= 0.25 * error
    assert float((found - exact).square().mean().sqrt()) <= 1.1 * error
    assert error <= 0.1


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("rows", ["all", "first"])
@every_packing
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids=str)
def test_a_sequences_bits_are_its_own(
    monkeypatch: pytest.MonkeyPatch, packing: Packing, shape: Shape, rows: str
) -> None:
    needs("compiled", packing)
    layer = packed_of(layer_weights(shape), shape, packing)
    lengths = [0, 1, 15, 0, 16, 17, 63, 64, 0, 0, 65, 129, 513, 1, 2, 3, 0]
    texts = [torch.randn(length, shape.width) for length in lengths]
    # By one thread each, since there is little to do.
    alone = [run_layer(text, [len(text)], layer, rows) for text in texts]
    for much in ("_MUCH_APART", "_MUCH_TOGETHER"):
        monkeypatch.setattr(LAYERS, much, 0)
    orders = [
        list(range(len(texts))),
        list(reversed(range(len(texts)))),
        [3, 12, 0],
        [1, 2, 1, 0, 4, 5] * 40,
        [12, 12],
        # Much to do in any case.
        list(range(len(texts))) * 14,
    ]
    for threads, order in itertools.product((1, 2), orders):
        chosen = [texts[each] for each in order]
        with threads_of_torch(threads):
            found = run_layer(torch.cat(chosen), [len(text) for text in chosen], layer, rows)
        assert torch.equal(found, torch.cat([alone[each] for each in order])), (threads, order)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("rows", ["all", "first"])
def test_a_longest_sequence_that_is_only_a_bound_changes_nothing(rows: str) -> None:
    shape = SHAPES[0]
    layer, lengths = packed_of(layer_weights(shape), shape, "float32"), [5, 0, 33, 70]
    x, cu_seqlens = torch.randn(110, shape.width), cu_seqlens_of(lengths)
    exact = packed_layer(x, cu_seqlens, 70, layer, rows)
    chosen = [0, 2, 3] if rows == "first" else slice(108)
    for bound in (71, 500, 100_000, 2**31, 2**32):
        found = packed_layer(x, cu_seqlens, bound, layer, rows, PackedLayout(cu_seqlens, bound, 110))
        assert torch.equal(found[chosen], exact[chosen])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("rows", ["all", "first"])
@every_packing
def test_what_is_not_finite_stays_in_its_sequence(path: str, packing: Packing, rows: str, value: float) -> None:
    needs(path, packing)
    shape, lengths = SHAPES[0], [3, 17, 0, 1, 40]
    layer = packed_of(layer_weights(shape), shape, packing)
    x = torch.randn(sum(lengths), shape.width)
    before = run_layer(x, lengths, layer, rows)
    owner = torch.arange(5).repeat_interleave(torch.tensor(lengths)) if rows == "all" else torch.tensor([0, 1, 3, 4])
    for sequence, token in ((0, 2), (1, 3), (3, 20), (4, 60)):
        odd = x.clone()
        odd[token, 7] = value
        found = run_layer(odd, lengths, layer, rows)
        assert bool(found[owner == sequence].isnan().all())
        torch.testing.assert_close(found[owner != sequence], before[owner != sequence])
        assert path == "torch" or torch.equal(found[owner != sequence], before[owner != sequence])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("rows", ["all", "first"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
def test_a_layer_of_nothing(rows: str, lengths: list[int]) -> None:
    shape = SHAPES[0]
    layer = packed_of(layer_weights(shape), shape, "int8")
    found = packed_layer(torch.randn(0, shape.width), cu_seqlens_of(lengths), 0, layer, rows)
    assert found.shape == (len(lengths) if rows == "first" else 0, shape.width)


@pytest.mark.usefixtures("path")
def test_rows_of_zeros_are_a_sequence_as_any() -> None:
    shape = SHAPES[0]
    weights = layer_weights(shape)
    for packing in ("float32", "int8"):
        found = run_layer(torch.zeros(9, shape.width), [9], packed_of(weights, shape, packing), "all")
        assert bool(found.isfinite().all())
        torch.testing.assert_close(found, found[:1].expand(9, -1))


@pytest.mark.usefixtures("path")
def test_a_layer_leaves_its_inputs_alone() -> None:
    shape = SHAPES[0]
    layer, x = packed_of(layer_weights(shape), shape, "float32"), torch.randn(20, shape.width)
    before = x.clone()
    for rows in ("all", "first"):
        run_layer(x, [20], layer, rows)
        assert torch.equal(x, before)


@pytest.mark.usefixtures("path")
def test_norms_without_biases() -> None:
    shape = SHAPES[0]
    weights = layer_weights(shape)
    x = torch.randn(20, shape.width)
    zeros = torch.zeros(shape.width)
    without, with_zeros = (
        packed_of(
            weights._replace(
                attention_norm=(weights.attention_norm[0], bias), output_norm=(weights.output_norm[0], bias)
            ),
            shape,
            "float32",
        )
        for bias in (None, zeros)
    )
    assert torch.equal(run_layer(x, [20], without, "all"), run_layer(x, [20], with_zeros, "all"))


# Embeddings


class Tables(NamedTuple):
    words: Tensor
    positions: Tensor | None
    types: Tensor | None
    weight: Tensor
    bias: Tensor | None


def tables_of(width: int, kind: str) -> Tables:
    words, positions, types = (torch.randn(rows, width) for rows in (50, 33, 2))
    weight, bias = 1 + 0.2 * torch.randn(width), torch.randn(width)
    return {
        "all": Tables(words, positions, types, weight, bias),
        "words_alone": Tables(words, None, None, weight, None),
        "no_types": Tables(words, positions, None, weight, bias),
        "no_positions": Tables(words, None, types, weight, None),
    }[kind]


@pytest.mark.parametrize("kind", ["all", "words_alone", "no_types", "no_positions"])
@pytest.mark.parametrize(
    "table",
    [pytest.param((s, w), id=f"{s}-{w}") for s in ("float32", "bfloat16", "int8") for w in (16, 48, 128, 144, 384)],
)
def test_embeddings_are_as_exact_as_eager(path: str, table: tuple[str, int], kind: str) -> None:
    # As one, so that each is met on each path.
    stored, width = table
    tables = tables_of(width, kind)
    if stored == "bfloat16":
        tables = Tables(*(None if each is None else each.bfloat16() for each in tables))
    ids = torch.randint(50, (333,), dtype=torch.int32)
    positions = torch.randint(33, (333,), dtype=torch.int32)
    types = None if kind == "no_positions" else torch.randint(2, (333,), dtype=torch.int32)
    words = pack_table(tables.words) if stored == "int8" else tables.words
    position_ids = None if tables.positions is None else positions
    found = packed_embedding_unchecked(ids, position_ids, types, words, *tables[1:], 1e-12)
    # The numbers that the tables hold, in float32.
    held = words.rows(torch.arange(50)) if isinstance(words, PackedTable) else words
    bias = torch.zeros(width) if tables.bias is None else tables.bias
    wide = [None if each is None else each.float() for each in (held, *tables[1:4], bias)]
    arguments = (ids, position_ids, types, *wide, 1e-12)
    exact = embedding_layer_norm_reference(*double(arguments))
    if stored == "bfloat16" and path == "torch":
        # PyTorch's operators sum the tables in their own dtype.
        eager = embedding_layer_norm_reference(ids, position_ids, types, *tables[:4], bias.bfloat16(), 1e-12)
        assert_as_exact_as(found.bfloat16(), [eager], exact)
        return
    assert_as_exact_as(found, eager_runs(embedding_layer_norm_reference, *arguments), exact)


@pytest.mark.usefixtures("compiled")
def test_an_embeddings_bits_are_its_own() -> None:
    tables = tables_of(384, "all")
    ids, positions = (torch.randint(each, (900,), dtype=torch.int32) for each in (50, 33))
    for words in (tables.words, pack_table(tables.words)):
        with threads_of_torch(1):
            expected = packed_embedding_unchecked(ids, positions, None, words, *tables[1:], 1e-12)
        with threads_of_torch(2):
            together = packed_embedding_unchecked(ids, positions, None, words, *tables[1:], 1e-12)
        alone = packed_embedding_unchecked(ids[7:8], positions[7:8], None, words, *tables[1:], 1e-12)
        assert torch.equal(together, expected)
        assert torch.equal(alone, expected[7:8])


@pytest.mark.usefixtures("path")
def test_an_embedding_that_is_not_finite_stays_alone() -> None:
    tables = tables_of(48, "all")
    tables.words[3, 47] = float("nan")
    assert tables.positions is not None
    tables.positions[5, 0] = float("inf")
    ids, positions = torch.tensor([1, 3, 2, 4], dtype=torch.int32), torch.tensor([0, 1, 5, 2], dtype=torch.int32)
    found = packed_embedding_unchecked(ids, positions, None, *tables, 1e-12)
    assert found.isnan().all(1).tolist() == [False, True, True, False]
    assert bool(found[[0, 3]].isfinite().all())


@pytest.mark.usefixtures("path")
def test_embeddings_of_no_tokens() -> None:
    tables, none = tables_of(48, "all"), torch.empty(0, dtype=torch.int32)
    assert packed_embedding_unchecked(none, none, none, *tables, 1e-12).shape == (0, 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [16, 128, 144, 300])
def test_a_packed_table_is_off_by_half_a_step(width: int, dtype: torch.dtype) -> None:
    table = torch.randn(37, width, dtype=dtype)
    table[:, :128] *= 20
    table[5] = 0
    packed = pack_table(table)
    rows = packed.rows(torch.arange(37))
    assert not bool(rows[5].any())
    for found, part in zip(rows.split(128, 1), table.float().split(128, 1), strict=True):
        step = part.abs().amax(1, keepdim=True) / 127
        assert bool(((found - part).abs() <= step * 0.5001).all())
    assert packed.nbytes == 37 * width + 37 * 4 * -(-width // 128)
    assert packs_embedding(packed.values) == (explain_compiled()[0] and width % 16 == 0)


# The weights


@every_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out_features", [1, 64, 100])
def test_unpacked_is_what_was_packed(packing: Packing, dtype: torch.dtype, out_features: int) -> None:
    # Every other row, and not in order.
    weight = torch.randn(2 * out_features, 144).to(dtype)[::2].t().contiguous().t().requires_grad_()
    packed = pack_weight(weight, None, packing)
    found, given = packed.unpacked(), weight.detach().float()
    if packing == "int8":
        step = given.abs().amax(1, keepdim=True) / 127
        assert bool(((found - given).abs() <= step * 0.5001).all())
    else:
        assert torch.equal(found, given if packing == "float32" else given.bfloat16().float())
    assert (packed.packing, packed.out_features, packed.in_features) == (packing, out_features, 144)
    assert not packed.panels.requires_grad


@every_packing
@pytest.mark.parametrize("out_features", [64, 100])
def test_packed_weights_never_change(path: str, packing: Packing, out_features: int) -> None:
    needs(path, packing)
    weight, bias = weight_and_bias(out_features, 48)
    assert bias is not None
    x, packed = torch.randn(7, 48), pack_weight(weight, bias, packing)
    before = packed_linear(x, packed)
    weight.zero_()
    bias.fill_(7)
    assert torch.equal(packed_linear(x, packed), before)


@pytest.mark.usefixtures("path")
def test_a_packed_layer_never_changes() -> None:
    shape = SHAPES[0]
    weights, x = layer_weights(shape), torch.randn(9, shape.width)
    layer = packed_of(weights, shape, "float32")
    before = run_layer(x, [9], layer, "all")
    for tensor in itertools.chain.from_iterable(weights):
        tensor.zero_()
    assert torch.equal(run_layer(x, [9], layer, "all"), before)


def test_a_packed_table_never_changes() -> None:
    table = torch.randn(9, 48)
    packed = pack_table(table)
    before = packed.rows(torch.arange(9))
    table.zero_()
    assert torch.equal(packed.rows(torch.arange(9)), before)


@every_packing
def test_copies_share_and_pickles_compute_the_same(path: str, packing: Packing) -> None:
    needs(path, packing)
    shape = SHAPES[0]
    weight, bias = weight_and_bias(100, 48)
    packed, layer = pack_weight(weight, bias, packing), packed_of(layer_weights(shape), shape, packing)
    table = pack_table(torch.randn(9, 48))
    assert all(copy.deepcopy(each) is each for each in (packed, layer, table))
    assert copy.deepcopy([packed, packed])[1] is packed
    x, ids = torch.randn(7, 48), torch.arange(9)
    again, layer_again, table_again = pickle.loads(pickle.dumps((packed, layer, table)))
    assert again.panels.data_ptr() != packed.panels.data_ptr()
    assert again.nbytes == packed.nbytes
    assert layer_again.nbytes == layer.nbytes
    assert torch.equal(packed_linear(x, again), packed_linear(x, packed))
    assert torch.equal(table_again.rows(ids), table.rows(ids))
    rows = torch.randn(9, shape.width)
    assert torch.equal(run_layer(rows, [9], layer_again, "all"), run_layer(rows, [9], layer, "all"))


@pytest.mark.usefixtures("path")
def test_what_was_handed_to_another_process_computes_as_before() -> None:
    shape = SHAPES[0]
    weight, bias = weight_and_bias(100, shape.width)
    packed, x = pack_weight(weight, bias), torch.randn(7, shape.width)
    layer = packed_of(layer_weights(shape), shape, "float32")

    def results(packed: PackedWeight, layer: PackedLayer) -> list[Tensor]:
        return [packed_linear(x, packed), run_layer(x, [7], layer, "all")]

    expected = results(packed, layer)
    # This pickler moves tensors to shared memory.
    there = pickle.loads(ForkingPickler.dumps((packed, layer)))
    for each in ((packed, layer), there):
        for found, before in zip(results(*each), expected, strict=True):
            assert torch.equal(found, before)


@every_packing
def test_columns_of_a_weight_lie_in_its_memory(path: str, packing: Packing) -> None:
    needs(path, packing)
    weight, bias = weight_and_bias(300, 144)
    x, packed = torch.randn(13, 144), pack_weight(weight, bias, packing)
    whole_product = packed_linear(x, packed)
    for first, count in ((0, 100), (64, 64), (128, 172), (256, 44)):
        part = packed.columns(first, count)
        found = packed_linear(x, part)
        torch.testing.assert_close(found, whole_product[:, first : first + count])
        assert path == "torch" or torch.equal(found, whole_product[:, first : first + count])
        assert packed.panels.data_ptr() <= part.panels.data_ptr() < packed.panels.data_ptr() + packed.panels.nbytes


def test_sizes_in_memory() -> None:
    weight, bias = weight_and_bias(100, 144)
    # Filled up to 128 columns.
    assert pack_weight(weight, bias).nbytes == 128 * (144 + 1) * 4
    assert pack_weight(weight, bias, "bfloat16").nbytes == 128 * (144 * 2 + 4)
    assert pack_weight(weight, bias, "int8").nbytes == 128 * (144 + 4 + 4 + 2 * 4)


def test_weights_packed_in_inference_mode_are_of_use_outside() -> None:
    weight, bias = weight_and_bias(64, 48)
    with torch.inference_mode():
        packed = pack_weight(weight, bias, "int8")
    assert not packed.panels.is_inference()
    assert packed_linear(torch.randn(3, 48), packed).shape == (3, 64)


def test_who_cannot_run_the_compiled_kernels_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with use_backend("torch"):
        assert explain_compiled() == (False, 'left out by use_backend("torch")')
        assert not packs("float32", 64)
        assert not packs("bfloat16", 64)
    monkeypatch.setattr(LIBRARY, "_load", lambda: (None, "it is made up"))
    assert explain_compiled() == (False, "it is made up")
    assert not packs("int8", 64)
    assert not packs_embedding(torch.zeros(3, 16))
    weight, bias = weight_and_bias(100, 48)
    assert bias is not None
    x = torch.randn(7, 48)
    torch.testing.assert_close(packed_linear(x, pack_weight(weight, bias)), F.linear(x, weight, bias))


def test_a_library_of_another_version_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    if LIBRARY._open()[0] is None:
        pytest.skip("the compiled kernels were not built")
    monkeypatch.setattr(LIBRARY, "_INTERFACE", 99)
    found, reason = LIBRARY._open.__wrapped__()
    assert found is None
    assert "they were built of another version" in reason


class MadeUpLibrary:
    """A library that says what a CPU has."""

    def __init__(self, *has: str) -> None:
        self.has = has

    def __getattr__(self, name: str) -> Any:
        return lambda: name.removeprefix("fastcls_has_") in self.has


CPUS: dict[str, tuple[tuple[str, ...], str, str, dict[str, bool | str]]] = {
    "zen 4": (
        ("avx2", "avx512", "avx512_vnni", "avx512_bf16"),
        "AVX512",
        "AVX-512 with VNNI",
        {"float32": True, "int8": True, "bfloat16": True},
    ),
    "sapphire rapids": (
        ("avx2", "avx512", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16"),
        "AVX512",
        "AVX-512 with VNNI",
        {"int8": True, "bfloat16": "AMX_BF16"},
    ),
    "skylake": (("avx2", "avx512"), "AVX512", "AVX-512", {"float32": True, "int8": "VNNI", "bfloat16": "AVX512_BF16"}),
    "alder lake": (("avx2", "avx_vnni"), "AVX2", "AVX2 with VNNI", {"int8": True, "bfloat16": "AVX512_BF16"}),
    "zen 3": (("avx2",), "AVX2", "AVX2", {"float32": True, "int8": "VNNI", "bfloat16": "AVX512_BF16"}),
    "zen 4 told to take avx2": (
        ("avx2", "avx512", "avx512_vnni", "avx512_bf16"),
        "AVX2",
        "AVX2",
        {"float32": True, "int8": "VNNI", "bfloat16": "AVX512_BF16"},
    ),
}


@pytest.mark.parametrize(("has", "capability", "name", "told"), list(CPUS.values()), ids=list(CPUS))
def test_a_cpu_gets_the_kernels_for_its_instructions(
    has: tuple[str, ...],
    capability: str,
    name: str,
    told: dict[Packing, bool | str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(LIBRARY, "_open", lambda: (MadeUpLibrary(*has), ""))
    monkeypatch.setattr(LIBRARY, "_load", LIBRARY._load.__wrapped__)
    for packing, expected in told.items():
        runs, reason = explain_compiled(packing)
        assert (runs, packs(packing, 64)) == (expected is True, expected is True)
        assert (f"({name})" if runs else str(expected)) in reason


def test_another_packing_is_refused() -> None:
    with pytest.raises(ValueError, match="packing must be one of float32, bfloat16, int8, got 'int4'"):
        explain_compiled("int4")


def test_a_cpu_without_vectors_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(LIBRARY, "_open", lambda: (MadeUpLibrary("avx2", "avx512"), ""))
    monkeypatch.setattr(LIBRARY, "_load", LIBRARY._load.__wrapped__)
    assert explain_compiled() == (False, "PyTorch computes for a CPU with DEFAULT here, and they need AVX2")


# Refusals

WEIGHT = torch.zeros(8, 16)
PACKED = pack_weight(WEIGHT)
SHAPE = Shape(64, 4, 112)


def changed_layer(**changed: Any) -> Callable[[], Any]:
    def make() -> PackedLayer:
        parts: dict[str, Any] = {
            "qkv": PackedWeight("float32", 64, 192, *[torch.zeros(1)] * 2, None, None),
            "out": PackedWeight("float32", 64, 64, *[torch.zeros(1)] * 2, None, None),
            "up": PackedWeight("float32", 64, 112, *[torch.zeros(1)] * 2, None, None),
            "down": PackedWeight("float32", 112, 64, *[torch.zeros(1)] * 2, None, None),
            "attention_norm": (torch.ones(64), None),
            "output_norm": (torch.ones(64), torch.zeros(64)),
            "num_heads": 4,
            "scale": 0.25,
            "eps": 1e-12,
            "activation": "gelu",
        }
        return PackedLayer(**{**parts, **changed})

    return make


def run(hidden_states: Any = None, cu_seqlens: Any = None, longest: int = 9, rows: str = "all") -> Callable[[], Any]:
    def call() -> Tensor:
        layer = packed_of(layer_weights(SHAPE), SHAPE, "float32")
        x = torch.zeros(9, 64) if hidden_states is None else hidden_states
        return packed_layer(x, cu_seqlens_of([9]) if cu_seqlens is None else cu_seqlens, longest, layer, rows)

    return call


NOT_FINITE = torch.full((8, 16), float("nan"))
REFUSED: Mapping[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "packing": (
        lambda: pack_weight(WEIGHT, None, "int4"),
        ValueError,
        "packing must be one of float32, bfloat16, int8, got 'int4'",
    ),
    "no_tensor": (lambda: pack_weight([[1.0]]), TypeError, "weight must be a floating point tensor, got list"),
    "integers": (
        lambda: pack_weight(WEIGHT.int()),
        TypeError,
        "weight must be a floating point tensor, got torch.int32",
    ),
    "in_features": (
        lambda: pack_weight(torch.zeros(8, 17)),
        ValueError,
        r"weight must have shape \(out_features, a multiple of 16\) on the CPU, got \(8, 17\) on cpu",
    ),
    "one_dimension": (lambda: pack_weight(torch.zeros(16)), ValueError, r"weight must have shape .* got \(16,\)"),
    "no_rows": (lambda: pack_weight(torch.zeros(0, 16)), ValueError, r"weight must have shape .* got \(0, 16\)"),
    "weight_on_meta": (lambda: pack_weight(WEIGHT.to("meta")), ValueError, "on the CPU, got .* on meta"),
    "bias_shape": (
        lambda: pack_weight(WEIGHT, torch.zeros(9)),
        ValueError,
        r"bias must have shape \(8,\), got \(9,\)",
    ),
    "nan_for_int8": (
        lambda: pack_weight(NOT_FINITE, None, "int8"),
        ValueError,
        "weight must be finite for packing int8, got NaN or infinity",
    ),
    "infinity_for_int8": (
        lambda: pack_weight(WEIGHT.clone().index_fill_(0, torch.tensor(3), float("inf")), None, "int8"),
        ValueError,
        "weight must be finite for packing int8",
    ),
    "table_integers": (
        lambda: pack_table(WEIGHT.int()),
        TypeError,
        "table must be a floating point tensor, got torch.int32",
    ),
    "table_shape": (
        lambda: pack_table(torch.zeros(3)),
        ValueError,
        r"table must have shape \(rows, width\) on the CPU",
    ),
    "table_on_meta": (lambda: pack_table(WEIGHT.to("meta")), ValueError, "table must have shape .* on meta"),
    "table_not_finite": (lambda: pack_table(NOT_FINITE), ValueError, "table must be finite to be packed as int8"),
    "rows_dtype": (
        lambda: packed_linear(torch.zeros(2, 16, dtype=torch.bfloat16), PACKED),
        TypeError,
        "hidden_states must be torch.float32, got torch.bfloat16",
    ),
    "rows_width": (
        lambda: packed_linear(torch.zeros(2, 17), PACKED),
        ValueError,
        r"hidden_states must have shape \(2, 16\) on the CPU, got \(2, 17\)",
    ),
    "rows_on_meta": (lambda: packed_linear(torch.zeros(2, 16, device="meta"), PACKED), ValueError, "got .* on meta"),
    "rows_of_one_dimension": (
        lambda: packed_linear(torch.zeros(16), PACKED),
        ValueError,
        "hidden_states must have shape",
    ),
    "rows_that_skip": (
        lambda: packed_linear(torch.zeros(2, 32)[:, ::2], PACKED),
        ValueError,
        "hidden_states must be contiguous in its last dimension",
    ),
    "rows_that_ask_for_gradients": (
        lambda: packed_linear(torch.zeros(2, 16, requires_grad=True), PACKED),
        RuntimeError,
        "hidden_states must not require gradients",
    ),
    "residual_shape": (
        lambda: packed_linear(torch.zeros(2, 16), PACKED, None, torch.zeros(3, 8)),
        ValueError,
        r"residual must have shape \(2, 8\) on the CPU, got \(3, 8\)",
    ),
    "residual_dtype": (
        lambda: packed_linear(torch.zeros(2, 16), PACKED, None, torch.zeros(2, 8, dtype=torch.float64)),
        TypeError,
        "residual must be torch.float32, got torch.float64",
    ),
    "residual_on_meta": (
        lambda: packed_linear(torch.zeros(2, 16), PACKED, None, torch.zeros(2, 8, device="meta")),
        ValueError,
        "residual must have shape .* on meta",
    ),
    "residual_that_skips": (
        lambda: packed_linear(torch.zeros(2, 16), PACKED, None, torch.zeros(2, 16)[:, ::2]),
        ValueError,
        "residual must be contiguous in its last dimension",
    ),
    "activation": (
        lambda: packed_linear(torch.zeros(2, 16), PACKED, "mish"),
        ValueError,
        "activation must be one of gelu, gelu_tanh, relu, silu, tanh, got 'mish'",
    ),
    "layer_width": (
        changed_layer(qkv=PackedWeight("float32", 48, 144, *[torch.zeros(1)] * 2, None, None)),
        ValueError,
        "qkv must read a multiple of 64 columns, got 48",
    ),
    "layer_heads": (
        changed_layer(num_heads=3),
        ValueError,
        "num_heads must divide width 64 into heads of a multiple of 16, got 3",
    ),
    "layer_small_heads": (changed_layer(num_heads=8), ValueError, "heads of a multiple of 16, got 8"),
    "layer_no_heads": (changed_layer(num_heads=0), ValueError, "heads of a multiple of 16, got 0"),
    "layer_down": (
        changed_layer(down=PackedWeight("float32", 128, 64, *[torch.zeros(1)] * 2, None, None)),
        ValueError,
        r"down must have shape \(64, 112\), got \(64, 128\)",
    ),
    "layer_packings": (
        changed_layer(up=PackedWeight("int8", 64, 112, *[torch.zeros(1)] * 2, None, None)),
        ValueError,
        "up must be packed as qkv is, float32, got int8",
    ),
    "layer_norm": (
        changed_layer(output_norm=(torch.ones(64), torch.zeros(63))),
        ValueError,
        r"output_norm must have shape \(64,\), got \(63,\)",
    ),
    "layer_activation": (changed_layer(activation="mish"), ValueError, "activation must be one of .* got 'mish'"),
    "layer_rows_word": (run(rows="mean"), ValueError, "rows must be one of all, first, got 'mean'"),
    "layer_dtype": (
        run(torch.zeros(9, 64).double()),
        TypeError,
        "hidden_states must be torch.float32, got torch.float64",
    ),
    "layer_columns": (
        run(torch.zeros(9, 128)),
        ValueError,
        r"hidden_states must have shape \(total_tokens, 64\) on the CPU",
    ),
    "layer_on_meta": (run(torch.zeros(9, 64, device="meta")), ValueError, "hidden_states must have shape .* on meta"),
    "layer_cu_seqlens": (run(cu_seqlens=torch.tensor([0, 10], dtype=torch.int32)), ValueError, "cu_seqlens"),
    "layer_cu_seqlens_dtype": (run(cu_seqlens=torch.tensor([0, 9])), TypeError, "cu_seqlens"),
    "layer_longest": (run(longest=8), ValueError, "max_seqlen"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_does_not_fit_is_named(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
