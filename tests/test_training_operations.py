"""Operations with gradients on the torch path: each gradient against differences in float64, no second derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastcls_kernels import Activation, Buckets, PackedLayout
from fastcls_kernels.disentangled_attention.buckets import DistanceTables
from fastcls_kernels.training import (
    Dropout,
    Heads,
    Scoring,
    Turning,
    activated_linear,
    activation,
    add_norm,
    attention,
    cls_attention,
    dropped,
    embedded,
    linear,
    mean_pool,
    turned,
)
from fastcls_kernels.training.disentangled_attention import disentangled_attention

# Two lengths that share a group, an empty sequence, and two rows that belong to none.
LENGTHS = (1, 3, 4, 0, 5, 9)
REST = 2
ROWS = sum(LENGTHS) + REST
SIZE = 4

Case = tuple[Callable[..., Any], tuple[Any, ...]]


def layout(rest: int = REST, *, holes: bool = False) -> PackedLayout:
    ends = torch.tensor((0, *LENGTHS)).cumsum(0).int()
    rows = sum(LENGTHS) + rest
    positions = None
    if holes:
        # Every other token was left out.
        positions = torch.zeros(rows, dtype=torch.int32)
        for start, length in zip(ends.tolist(), LENGTHS, strict=False):
            positions[start : start + length] = 2 * torch.arange(length, dtype=torch.int32)
    return PackedLayout(ends, max(LENGTHS), rows, positions)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def turning() -> Turning:
    angles = torch.randn(10, SIZE // 2)
    return Turning(torch.arange(ROWS, dtype=torch.int32) % 10, angles.cos(), angles.sin(), False)


TURNING = turning()


def case_of_attention(heads: Heads, bias: Tensor | None, scoring: Scoring, **options: Any) -> Case:
    where = layout(holes=options.pop("holes", False))
    columns = (heads.queries + 2 * heads.keys) * heads.head_dim
    return (
        lambda qkv, terms: attention(qkv, terms, heads, where, scoring, **options),
        (numbers(ROWS, columns), bias),
    )


def case_of_cls(scoring: Scoring, *, with_keys: bool, with_bias: bool) -> Case:
    where, width = layout(), 6
    query = numbers(len(LENGTHS), 2, SIZE if with_keys else width)
    keys = numbers(ROWS, 2, SIZE) if with_keys else None
    bias = numbers(ROWS, 2) if with_bias else None
    return (
        lambda query, hidden, keys, bias: cls_attention(query, hidden, where, scoring, keys=keys, bias=bias),
        (query, numbers(ROWS, width), keys, bias),
    )


def case_of_distances(*, keys: bool, queries: bool, dropout: Dropout | None = None) -> Case:
    where, heads = layout(), Heads(2, 2, SIZE)
    rows = (0, 0, 1, 2, 3, 4, 4)
    buckets = Buckets(torch.tensor(rows, dtype=torch.int32), rows)
    return (
        lambda qkv, pos_key, pos_query: disentangled_attention(
            qkv, DistanceTables(pos_key, pos_query, buckets), heads, where, Scoring(0.5, dropout=dropout)
        ),
        (
            numbers(ROWS, 3 * 2 * SIZE),
            numbers(5, 2, SIZE) if keys else None,
            numbers(5, 2, SIZE) if queries else None,
        ),
    )


def case_of_norm(*, rms: bool, residual: bool, bias: bool, dropout: Dropout | None) -> Case:
    return (
        lambda rows, added, weight, norm_bias: add_norm(rows, added, weight, norm_bias, 1e-5, rms=rms, dropout=dropout),
        (numbers(5, 6), numbers(5, 6) if residual else None, numbers(6), numbers(6) if bias else None),
    )


def case_of_activation(name: Activation, gated: bool) -> Case:
    def both(up: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return activated_linear(up, weight, bias, name, gated=gated), activation(up, name, gated=gated)

    return both, (numbers(5, 8), numbers(3, 4 if gated else 8), numbers(3))


DROPS = Dropout(0.3, 3_000_000_000)
CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: (linear, (numbers(5, 4), numbers(3, 4), numbers(3))),
    "linear_without_bias": lambda: (lambda rows, weight: linear(rows, weight), (numbers(5, 4), numbers(3, 4))),
    "turned": lambda: (lambda heads: turned(heads, TURNING), (numbers(ROWS, 2, SIZE),)),
    "dropped": lambda: (lambda rows: dropped(rows, DROPS), (numbers(5, 6),)),
    "embedded": lambda: (lambda table: embedded(table, torch.tensor([1, 3, 1, 0])), (numbers(4, 3),)),
    "mean_pool": lambda: (lambda rows: mean_pool(rows, layout(0)), (numbers(ROWS - REST, 3),)),
    "attention": lambda: case_of_attention(Heads(4, 4, SIZE), None, Scoring(0.5)),
    "attention_in_windows": lambda: case_of_attention(Heads(2, 2, SIZE), None, Scoring(0.5, (2, 1))),
    "attention_with_holes": lambda: case_of_attention(Heads(2, 2, SIZE), None, Scoring(0.5, (2, 2)), holes=True),
    "attention_in_groups": lambda: case_of_attention(Heads(4, 2, SIZE), None, Scoring(0.5, dropout=DROPS)),
    "attention_with_bias": lambda: case_of_attention(Heads(2, 2, SIZE), numbers(2, 7), Scoring(0.5, (-1, 3), DROPS)),
    "attention_turned": lambda: case_of_attention(Heads(2, 2, SIZE), None, Scoring(0.5), turning=TURNING),
    "cls_absorbed": lambda: case_of_cls(Scoring(0.3), with_keys=False, with_bias=False),
    "cls_absorbed_with_bias": lambda: case_of_cls(Scoring(0.5, (2, 2), DROPS), with_keys=False, with_bias=True),
    "cls_over_keys": lambda: case_of_cls(Scoring(0.4, dropout=DROPS), with_keys=True, with_bias=False),
    "distances": lambda: case_of_distances(keys=True, queries=True, dropout=DROPS),
    "distances_to_keys": lambda: case_of_distances(keys=True, queries=False),
    "distances_to_queries": lambda: case_of_distances(keys=False, queries=True),
    "norm": lambda: case_of_norm(rms=False, residual=True, bias=True, dropout=DROPS),
    "norm_of_rows": lambda: case_of_norm(rms=False, residual=False, bias=False, dropout=None),
    "rms_norm": lambda: case_of_norm(rms=True, residual=True, bias=False, dropout=DROPS),
    "rms_norm_with_bias": lambda: case_of_norm(rms=True, residual=False, bias=True, dropout=None),
    **{
        f"{name}{'_gated' * gated}": functools.partial(case_of_activation, name, gated)
        for name in get_args(Activation)
        for gated in (False, True)
    },
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_differences(name: str) -> None:
    function, arguments = CASES[name]()
    assert gradcheck(function, arguments, fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_each_gradient_is_the_same_by_itself_and_nothing_given_is_written_to(name: str) -> None:
    function, arguments = CASES[name]()
    leaves = [each for each in arguments if each is not None]
    before = [each.detach().clone() for each in leaves]

    def results(wanted: list[Tensor]) -> tuple[Tensor, ...]:
        for each in leaves:
            each.requires_grad_(any(each is one for one in wanted))
        made = function(*arguments)
        return made if isinstance(made, tuple) else (made,)

    outs = results(leaves)
    flows = [torch.randn_like(each) for each in outs]
    kept = [each.clone() for each in flows]
    expected = torch.autograd.grad(outs, leaves, flows)
    for each, whole in zip(leaves, expected, strict=True):
        pairs = [(out, flow) for out, flow in zip(results([each]), flows, strict=True) if out.requires_grad]
        (found,) = torch.autograd.grad([out for out, _ in pairs], [each], [flow for _, flow in pairs])
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    for each, same in zip((*leaves, *flows), (*before, *kept), strict=True):
        assert torch.equal(each, same)


@pytest.mark.parametrize("name", ["linear", "attention", "cls_absorbed", "distances", "norm", "gelu", "embedded"])
def test_second_derivatives_are_refused(name: str) -> None:
    function, arguments = CASES[name]()
    with pytest.raises(RuntimeError, match="create_graph must be False"):
        gradgradcheck(function, arguments)


def test_a_row_of_padding_has_no_gradient() -> None:
    table = numbers(4, 3)
    embedded(table, torch.tensor([1, 2, 2, 3]), padding_id=2).sum().backward()
    assert table.grad is not None
    assert table.grad[:, 0].tolist() == [0, 1, 0, 1]


def test_rows_of_no_sequence_stay_apart() -> None:
    heads, where = Heads(2, 2, SIZE), layout()
    qkv = torch.randn(ROWS, 3 * 2 * SIZE)
    expected = attention(qkv, None, heads, where, Scoring(0.5))
    qkv[-REST:] = float("nan")
    qkv.requires_grad_()
    out = attention(qkv, None, heads, where, Scoring(0.5))
    assert torch.equal(out, expected)
    out.sum().backward()
    assert qkv.grad is not None
    assert bool(qkv.grad.isfinite().all())
    assert not bool(qkv.grad[-REST:].any())


@pytest.mark.parametrize("name", ["attention_in_groups", "distances"])
def test_nan_stays_in_its_sequence(name: str) -> None:
    function, (qkv, *others) = CASES[name]()
    starts = torch.tensor((0, *LENGTHS)).cumsum(0)
    with torch.no_grad():
        qkv[starts[2]] = float("nan")
    out = function(qkv, *others)
    out.sum().backward()
    own = slice(int(starts[2]), int(starts[3]))
    for rows in (out.detach(), qkv.grad):
        assert rows is not None
        assert bool(rows[own].isnan().any())
        rest = torch.cat((rows[: own.start], rows[own.stop :]))
        assert not bool(rest.isnan().any())
