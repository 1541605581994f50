"""The kernels of norms, dropout, activations, embeddings and rotary positions that can be trained.

All of them are held to autograd of their definitions.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import pytest
import torch
import torch.nn.functional as F
from support import assert_as_exact_as, eager_runs, random
from torch import Tensor

from fastcls_kernels import Activation, apply_rotary_
from fastcls_kernels.reference import activation_reference, apply_rotary_reference, gated_activation_reference
from fastcls_kernels.training import norm_kernel
from fastcls_kernels.training.activation_kernel import launch_activation, launch_activation_backward
from fastcls_kernels.training.dropout import Dropout, drop
from fastcls_kernels.training.embedding_kernel import (
    BLOCK_C,
    CHUNK,
    MAX_BLOCK_W,
    launch_embedding_forward,
    launch_table_gradient,
)
from fastcls_kernels.training.norm_kernel import launch_add_norm, launch_drop, launch_norm_backward

# Large enough to be seen where it is lost, or stands elsewhere.
EPS = 0.02
# Its factor, 1.25, has few bits.
DROPOUT = Dropout(rate=0.2, seed=0x9ABC_DEF0)
# Eager's errors that gradients may have, in RMS: it also sums in few orders, of all that there are.
TIMES = 1.5
FLOAT16 = pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
FLOAT32 = pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])


def doubled(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


def check_all(
    actual: Sequence[Tensor | None], reference: Callable[..., Sequence[Tensor | None]], *given: Tensor | None
) -> None:
    """Checks each result against the reference, which eager PyTorch also takes with its rows in other orders."""
    exact = reference(*doubled(*given))
    assert given[0] is not None
    orders = [torch.randperm(given[0].shape[0]).to(given[0].device) for _ in range(3)]
    assert len(actual) == len(exact)
    for place, (found, truth) in enumerate(zip(actual, exact, strict=True)):
        assert (found is None) == (truth is None), place
        if found is None or truth is None:
            continue
        dtype = found.dtype

        def one(*arguments: Tensor | None, place: int = place, dtype: torch.dtype = dtype) -> Tensor:
            result = reference(*arguments)[place]
            assert result is not None
            # Gradients of vectors are float32 here, and in eager PyTorch as its vectors are.
            return result.to(torch.promote_types(dtype, result.dtype))

        eager = eager_runs(one, *given)
        for order in orders:
            moved = one(*(each[order] if each is not None and each.ndim == 2 else each for each in given))
            eager.append(moved[order.argsort()] if moved.ndim == 2 else moved)
        assert_as_exact_as(found, eager, truth, f"result {place}", times=TIMES)


class Norm(NamedTuple):
    """What one norm has: `is_wide` is autocast, whose rows have 16 bits, and whose norms and sums have 32."""

    has_residual: bool = True
    has_dropout: bool = True
    has_norm_bias: bool = True
    rms: bool = False
    is_wide: bool = False
    flows: tuple[bool, bool] = (True, True)

    @property
    def dropout(self) -> Dropout | None:
        return DROPOUT if self.has_dropout else None

    def factors(self, x: Tensor) -> Tensor:
        """What each number of x is multiplied by."""
        return drop(torch.ones_like(x), self.dropout)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives each program of a norm's backward pass several rows of a small test."""
    monkeypatch.setattr(norm_kernel, "multiprocessor_count", lambda _device: 1)


NORMS = {
    "all_of_it": Norm(),
    "rms": Norm(rms=True),
    "rms_without_bias": Norm(rms=True, has_norm_bias=False, flows=(True, False)),
    "post_norm": Norm(flows=(True, False)),
    "no_dropout": Norm(has_dropout=False, flows=(True, False)),
    "embeddings": Norm(has_residual=False, flows=(True, False)),
    "norm_alone": Norm(has_residual=False, has_dropout=False),
    "sum_alone": Norm(flows=(False, True)),
    "sum_alone_no_dropout": Norm(has_dropout=False, flows=(False, True)),
}
AUTOCAST_NORMS = {
    "all_of_it": Norm(is_wide=True),
    "no_dropout": Norm(is_wide=True, has_dropout=False, rms=True),
    "sum_alone": Norm(is_wide=True, flows=(False, True)),
    "embeddings": Norm(is_wide=True, has_residual=False, flows=(True, False)),
}
# More rows than programs of a backward pass, or one, and widths that are no power of two.
NORM_SHAPES = [(17, 48), (13, 160), (1, 128), (0, 16)]


def norm_given(norm: Norm, rows: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor | None]:
    """x, residual, weight, norm_bias, and gradients of the normed rows and of the sum."""
    wide = torch.float32 if norm.is_wide else dtype
    x = random(rows, width, dtype=dtype, device=device)
    residual = random(rows, width, dtype=wide, device=device) if norm.has_residual else None
    weight = random(width, dtype=wide, device=device)
    norm_bias = random(width, dtype=wide, device=device) if norm.has_norm_bias else None
    dtypes = (wide, wide if norm.has_residual else dtype)
    grads = [
        random(rows, width, dtype=each, device=device) if flow else None
        for flow, each in zip(norm.flows, dtypes, strict=True)
    ]
    return [x, residual, weight, norm_bias, *grads]


def norm_reference(
    norm: Norm, x: Tensor, factors: Tensor, residual: Tensor | None, weight: Tensor, norm_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    kept = x * factors
    summed = kept if residual is None else kept + residual
    wide = summed.to(weight.dtype)
    if norm.rms:
        normed = F.rms_norm(wide, weight.shape, weight=weight, eps=EPS)
        return normed if norm_bias is None else normed + norm_bias, summed
    bias = torch.zeros_like(weight) if norm_bias is None else norm_bias
    return F.layer_norm(wide, weight.shape, weight=weight, bias=bias, eps=EPS), summed


def norm_gradients(
    norm: Norm,
    x: Tensor,
    factors: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor | None,
    grad_normed: Tensor | None,
    grad_summed: Tensor | None,
) -> list[Tensor | None]:
    """Gradients of x, the residual, the weight and the bias by autograd."""
    given = [None if each is None else each.detach().requires_grad_() for each in (x, residual, weight, norm_bias)]
    assert given[0] is not None
    assert given[2] is not None
    results = norm_reference(norm, given[0], factors, given[1], given[2], given[3])
    pairs = [
        (result, grad) for result, grad in zip(results, (grad_normed, grad_summed), strict=True) if grad is not None
    ]
    leaves = [each for each in given if each is not None]
    outputs, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, leaves, grads, allow_unused=True))
    return [None if each is None else next(found) for each in given]


def norm_launches(
    norm: Norm,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor | None,
    grad_normed: Tensor | None,
    grad_summed: Tensor | None,
) -> tuple[tuple[Tensor, Tensor], list[Tensor | None]]:
    """The norm and the sum, and the gradients of x, the residual, the weight and the bias, by the kernels."""
    normed, summed, mean, rstd = launch_add_norm(x, residual, norm.dropout, weight, norm_bias, EPS, norm.rms)
    assert (mean is None) == norm.rms
    grad_residual, grad_x, *grads = launch_norm_backward(
        *(grad_normed, grad_summed, summed, mean, rstd, weight, norm.dropout, norm.rms),
        has_norm_bias=norm_bias is not None,
        x_dtype=x.dtype,
    )
    return (normed, summed), [grad_x, None if residual is None else grad_residual, *grads]


def check_norm(norm: Norm, results: Sequence[Tensor], gradients: Sequence[Tensor | None], given: Any) -> None:
    x, *others = given
    factors = norm.factors(x)
    check_all(results, functools.partial(norm_reference, norm), x, factors, *others[:3])
    check_all(gradients, functools.partial(norm_gradients, norm), x, factors, *others)


@pytest.mark.parametrize(("rows", "width"), NORM_SHAPES)
@pytest.mark.parametrize("norm", NORMS.values(), ids=list(NORMS))
def test_norm_and_its_gradients(kernels: str, norm: Norm, rows: int, width: int, dtype: torch.dtype) -> None:
    given: Any = norm_given(norm, rows, width, dtype, kernels)
    results, gradients = norm_launches(norm, *given)
    check_norm(norm, results, gradients, given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("norm", AUTOCAST_NORMS.values(), ids=list(AUTOCAST_NORMS))
def test_norm_of_few_bits_in_a_wider_sum(kernels: str, norm: Norm, dtype: torch.dtype) -> None:
    given: Any = norm_given(norm, 17, 48, dtype, kernels)
    results, gradients = norm_launches(norm, *given)
    check_norm(norm, results, gradients, given)


@FLOAT16
def test_norm_takes_rows_of_wider_tensors_and_gradients_of_any_strides(kernels: str, dtype: torch.dtype) -> None:
    norm = Norm()
    given: Any = norm_given(norm, 7, 50, dtype, kernels)
    wide = random(7, 90, dtype=dtype, device=kernels)
    given[0], given[1] = wide[:, 3:53], wide[:, 40:]
    given[4] = random(50, 7, dtype=dtype, device=kernels).T
    given[5] = random(1, 50, dtype=dtype, device=kernels).expand(7, 50)
    for kind in (norm, Norm(has_residual=False, has_dropout=False)):
        given[1] = wide[:, 40:] if kind.has_residual else None
        results, gradients = norm_launches(kind, *given)
        check_norm(kind, results, gradients, given)


@FLOAT16
def test_nothing_is_stored_twice_where_nothing_changes(kernels: str, dtype: torch.dtype) -> None:
    x, weight, grad = (random(*shape, dtype=dtype, device=kernels) for shape in ((5, 16), (16,), (5, 16)))
    _, summed, mean, rstd = launch_add_norm(x, None, None, weight, None, EPS, False)
    assert summed.data_ptr() == x.data_ptr()
    backward = functools.partial(launch_norm_backward, has_norm_bias=False)
    same = backward(grad, None, summed, mean, rstd, weight, None, False, x_dtype=dtype)
    assert same[1] is same[0]
    other = backward(grad, None, summed, mean, rstd, weight, None, False, x_dtype=torch.float32)
    assert (other[0].dtype, other[1].dtype) == (dtype, torch.float32)


@FLOAT32
def test_gradients_are_the_same_bit_for_bit(kernels: str, dtype: torch.dtype) -> None:
    given: Any = norm_given(Norm(), 17, 24, dtype, kernels)
    first, second = (norm_launches(Norm(), *given)[1] for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@FLOAT16
def test_the_norm_is_of_the_sum_as_it_is_stored(kernels: str, dtype: torch.dtype) -> None:
    x, residual, weight, *_ = norm_given(Norm(), 5, 24, dtype, kernels)
    assert x is not None
    assert weight is not None
    normed, summed, *statistics = launch_add_norm(x, residual, DROPOUT, weight, None, EPS, False)
    again, _, *others = launch_add_norm(summed, None, None, weight, None, EPS, False)
    for one, other in zip((normed, *statistics), (again, *others), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@FLOAT32
def test_nan_stays_in_its_row(kernels: str, dtype: torch.dtype) -> None:
    given: Any = norm_given(Norm(), 17, 24, dtype, kernels)
    clean = norm_launches(Norm(), *given)
    for place in (1, 4, 5):
        given[place][14, 3] = float("nan")
        results, gradients = norm_launches(Norm(), *given)
        others = torch.arange(17) != 14
        for one, other in zip((*results, *gradients[:2]), (*clean[0], *clean[1][:2]), strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one[others], other[others])
        given[place][14, 3] = 0.0
        clean = norm_launches(Norm(), *given)


def test_a_gradient_of_nothing_is_refused() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="grad_normed or grad_summed must be a tensor, got None for both"):
        launch_norm_backward(
            *(None, None, x, None, x[:, 0], x[0], None, True), has_norm_bias=False, x_dtype=torch.float32
        )


@pytest.mark.parametrize(("rows", "width"), [(37, 200), (9, 128), (1, 1), (0, 5)])
def test_dropout_is_its_definition(kernels: str, rows: int, width: int, dtype: torch.dtype) -> None:
    x = random(rows, 2 * width, dtype=dtype, device=kernels)
    for each in (x[:, :width], x[:, 1::2]):
        dropped = launch_drop(each, DROPOUT)
        expected = drop(each.float(), DROPOUT)
        assert torch.equal(dropped, expected.to(dtype))
        # Of a gradient it is the gradient.
        leaf = each.clone().requires_grad_()
        (expected,) = torch.autograd.grad(drop(leaf.float(), DROPOUT), leaf, each.float())
        assert torch.equal(dropped, expected)
        assert torch.equal(launch_drop(each, DROPOUT, torch.float32), drop(each.float(), DROPOUT))


@FLOAT32
def test_dropped_nan_is_zero(kernels: str, dtype: torch.dtype) -> None:
    x = random(8, 40, dtype=dtype, device=kernels).fill_(float("nan"))
    assert torch.equal(launch_drop(x, DROPOUT).isnan(), drop(torch.ones_like(x), DROPOUT) > 0)
    weight, residual = torch.ones_like(x[0]), torch.ones_like(x)
    _, summed, _, _ = launch_add_norm(x, residual, DROPOUT, weight, None, EPS, False)
    assert torch.equal(summed.isnan(), drop(torch.ones_like(x), DROPOUT) > 0)


def activation_gradient(up: Tensor, grad: Tensor, name: Activation, gated: bool) -> tuple[Tensor, Tensor]:
    """The activation and the gradient of ``up`` by autograd."""
    leaf = up.detach().requires_grad_()
    act = gated_activation_reference(leaf, name) if gated else activation_reference(leaf, name)
    return act.detach(), torch.autograd.grad(act, leaf, grad)[0]


def check_activation(up: Tensor, grad: Tensor, name: Activation, gated: bool) -> None:
    before = up.clone()
    act, grad_up = launch_activation_backward(grad, up, name, gated)
    assert torch.equal(act, launch_activation(up, name, gated)), "what enters the product must be the same"
    assert torch.equal(up, before), "the input must be left alone"
    exact = activation_gradient(up.double(), grad.double(), name, gated)
    if up.dtype == torch.float32:
        # Libraries' exponentials differ by less than a unit in the last place of the input makes, and of a tangent.
        next_up = torch.nextafter(up, up.new_tensor(float("inf")))
        eager = [activation_gradient(inputs, grad, name, gated) for inputs in (up, next_up)]
        eager += [(torch.nextafter(act, 2 * act), grad_up) for act, grad_up in eager if name == "tanh"]
    else:
        # Rounded once, which eager PyTorch does twice.
        eager = [(exact[0].to(up.dtype), exact[1].to(up.dtype))]
    for place, found in enumerate((act, grad_up)):
        assert_as_exact_as(found, [run[place] for run in eager], exact[place], ("act", "grad_up")[place], times=TIMES)


GATED = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@GATED
@pytest.mark.parametrize("name", get_args(Activation))
@pytest.mark.parametrize(("rows", "size"), [(37, 140), (9, 128), (1, 33), (0, 8), (3, 0)])
def test_activation_and_its_gradient(
    kernels: str, rows: int, size: int, dtype: torch.dtype, name: Activation, gated: bool
) -> None:
    # Beyond where slopes end, too.
    up = random(rows, (1 + gated) * size, dtype=dtype, device=kernels, scale=3.0)
    check_activation(up, random(rows, size, dtype=dtype, device=kernels), name, gated)


@GATED
@FLOAT16
def test_activation_takes_rows_of_wider_tensors(kernels: str, dtype: torch.dtype, gated: bool) -> None:
    size = 48
    up = random(20, 200, dtype=dtype, device=kernels)[::2, 7 : 7 + (1 + gated) * size]
    check_activation(up, random(10, 90, dtype=dtype, device=kernels)[:, 5 : 5 + size], "silu", gated)


# Too large for an exponential or a cube, or no number.
ENDS = [-1e30, -1e13, -1e4, -100.0, -20.0, -0.0, 0.0, 20.0, 100.0, 1e4, 1e13, 1e30, float("nan")]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("name", get_args(Activation))
@FLOAT32
def test_derivatives_keep_the_ends(kernels: str, dtype: torch.dtype, name: Activation) -> None:
    up = torch.tensor(ENDS, dtype=dtype, device=kernels)[:, None]
    grad = torch.ones_like(up)
    exact = activation_gradient(up.double(), grad.double(), name, False)
    for found, truth in zip(launch_activation_backward(grad, up, name, False), exact, strict=True):
        torch.testing.assert_close(found, truth, equal_nan=True, check_dtype=False)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("tables", ["words", "positions", "types", "type_zero", "all"])
def test_embedding_is_the_sum_of_rows(kernels: str, dtype: torch.dtype, tables: str, ids_dtype: torch.dtype) -> None:
    sizes = (50, 20, 3)
    words, positions, types = (random(size, 40, dtype=dtype, device=kernels) for size in sizes)
    ids = [torch.randint(size, (17,), dtype=ids_dtype, device=kernels) for size in sizes]
    has_positions, has_types = tables in ("positions", "all"), tables in ("types", "type_zero", "all")
    type_ids = ids[2] if tables in ("types", "all") else None
    found = launch_embedding_forward(
        *(ids[0], ids[1] if has_positions else None, type_ids),
        *(words, positions if has_positions else None, types if has_types else None),
    )

    def reference(words: Tensor, positions: Tensor, types: Tensor) -> Tensor:
        out = words[ids[0]]
        if has_types:
            out = out + types[torch.zeros_like(ids[2]) if type_ids is None else type_ids]
        return out + positions[ids[1]] if has_positions else out

    exact = reference(words.double(), positions.double(), types.double())
    assert_as_exact_as(found, [reference(words, positions, types)], exact)


def table_reference(ids: Tensor, grad_rows: Tensor, num_table_rows: int, padding_id: int | None) -> Tensor:
    table = grad_rows.new_zeros(num_table_rows, grad_rows.shape[1]).requires_grad_()
    rows = F.embedding(ids, table, padding_idx=padding_id)
    return torch.autograd.grad(rows, table, grad_rows)[0]


def check_table(ids: Tensor, grad_rows: Tensor, num_table_rows: int, padding_id: int | None) -> Tensor:
    found = launch_table_gradient(ids, grad_rows, num_table_rows, padding_id)
    orders = (torch.arange(ids.shape[0]), torch.arange(ids.shape[0]).flip(0), torch.randperm(ids.shape[0]))
    eager = [
        table_reference(ids[order], grad_rows[order].float(), num_table_rows, padding_id)
        for order in (order.to(ids.device) for order in orders)
    ]
    exact = table_reference(ids, grad_rows.double(), num_table_rows, padding_id)
    assert_as_exact_as(found, eager, exact, times=TIMES)
    return found


# Runs of equal ids: within a chunk, across chunks, over whole ones, up to their ends, and beyond one block of parts.
RUNS = {
    "no_tokens": [],
    "one_token": [1],
    "short": [3, 0, 1, 4, 1, 5, 9],
    "one_chunk": [CHUNK],
    "whole_chunks": [CHUNK, 2 * CHUNK, CHUNK],
    "across_chunks": [CHUNK - 1, 2, CHUNK + 3, 1, 3 * CHUNK, 5],
    "starts_before_an_end": [CHUNK - 1, 1, CHUNK - 1, CHUNK + 1, 0, 2],
    "one_run": [4 * CHUNK + 1],
    "one_block_of_parts": [3, (BLOCK_C + 1) * CHUNK - 3, 7],
    "more_parts_than_a_block": [5, (BLOCK_C + 2) * CHUNK, 9],
}


@pytest.mark.parametrize("padding_id", [None, 0, 2])
@pytest.mark.parametrize("runs", RUNS.values(), ids=list(RUNS))
def test_gradient_of_a_table(kernels: str, dtype: torch.dtype, runs: list[int], padding_id: int | None) -> None:
    ids = torch.repeat_interleave(torch.arange(len(runs)), torch.tensor(runs, dtype=torch.int64))
    ids = ids[torch.randperm(ids.shape[0])].to(kernels)
    # Columns in one block of programs' and a part of another.
    width = 40 if ids.shape[0] > 4 * CHUNK + 1 else MAX_BLOCK_W + 3
    grad_rows = random(ids.shape[0], width, dtype=dtype, device=kernels)
    check_table(ids, grad_rows, len(runs) + 3, padding_id)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@FLOAT16
def test_gradient_of_a_table_is_the_same_bit_for_bit(kernels: str, dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
    ids = torch.randint(4, (150,), dtype=ids_dtype, device=kernels)
    grad_rows = random(150, 60, dtype=dtype, device=kernels)[:, 3:50]
    found = check_table(ids, grad_rows, 9, None)
    assert torch.equal(found, launch_table_gradient(ids, grad_rows, 9, None))


@FLOAT32
def test_nan_stays_in_its_row_of_a_table(kernels: str, dtype: torch.dtype) -> None:
    ids = torch.arange(6, device=kernels).repeat_interleave(40)
    grad_rows = random(240, 5, dtype=dtype, device=kernels)
    grad_rows[100, 1] = float("nan")
    is_nan = launch_table_gradient(ids, grad_rows, 6, None).isnan()
    assert is_nan.nonzero().tolist() == [[2, 1]]
    assert not launch_table_gradient(ids, grad_rows, 6, 2).isnan().any()


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize(("total", "num_heads", "head_dim"), [(13, 3, 20), (1, 1, 4), (0, 2, 8)])
def test_rotary_by_negated_sines_is_its_gradient_in_place(
    kernels: str, dtype: torch.dtype, total: int, num_heads: int, head_dim: int, interleaved: bool
) -> None:
    angles = random(30, head_dim // 2, dtype=torch.float32, device=kernels, scale=3.0)
    cos, sin = angles.cos(), angles.sin()
    positions = torch.randint(30, (total,), dtype=torch.int32, device=kernels)
    qkv = random(total, 3 * num_heads, head_dim, dtype=dtype, device=kernels)
    before = qkv.clone()

    def gradient(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        leaf = torch.zeros_like(grad).requires_grad_()
        turned = apply_rotary_reference(leaf, positions, cos, sin, interleaved=interleaved)
        return torch.autograd.grad(turned, leaf, grad)[0]

    grad = qkv[:, : 2 * num_heads]
    assert apply_rotary_(grad, positions, cos, -sin, interleaved=interleaved) is grad
    given = before[:, : 2 * num_heads]
    assert_as_exact_as(grad, [gradient(given, cos, sin)], gradient(given.double(), cos.double(), sin.double()))
    assert torch.equal(qkv[:, 2 * num_heads :], before[:, 2 * num_heads :]), "the values' must stay as they are"


def test_dropout_keeps_the_same_numbers_in_both_passes() -> None:
    """What the other tests rest on: a row and a column decide, wherever they are asked for."""
    x = torch.ones(9, 31)
    kept = drop(x, DROPOUT) > 0
    for row, column in itertools.product((0, 8), (0, 30)):
        one = DROPOUT.kept(torch.tensor([row], dtype=torch.int32), torch.tensor([column], dtype=torch.int32))
        assert bool(one) == bool(kept[row, column])
