"""Gradients of the public operations: by themselves, as operators, and in graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from support import assert_as_exact_as
from test_operators import CASES, LENGTHS, Calls, Inputs, results
from torch import Tensor
from torch.autograd import gradcheck

from fastcls_kernels import (
    apply_rotary_,
    attention_padded,
    batch_invariant,
    cls_attention_kv,
    linear,
    mean_pool,
    use_backend,
)

IN_PLACE = [case for case in CASES if case.startswith("apply_rotary_")]
every_case = pytest.mark.parametrize("case", [case for case in CASES if case not in IN_PLACE])


class Call(NamedTuple):
    """A case whose numbers require gradients."""

    operation: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, case: str, device: str, dtype: torch.dtype, *, exact: bool = False) -> Call:
        """``exact`` takes the same numbers in float64."""
        operation, args, kwargs = CASES[case](Inputs(LENGTHS, device, dtype))
        made: dict[int, Tensor] = {}

        def leaf(value: Any) -> Any:
            if isinstance(value, tuple):
                parts = [leaf(each) for each in value]
                return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return made.setdefault(id(value), (value.double() if exact else value).detach().requires_grad_())

        return cls(operation, leaf(args), {name: leaf(value) for name, value in kwargs.items()})

    def __call__(self) -> tuple[Tensor, ...]:
        return results(self.operation(*self.args, **self.kwargs))

    @property
    def leaves(self) -> list[Tensor]:
        found = numbers((*self.args, *self.kwargs.values()))
        return list({id(each): each for each in found}.values())

    def gradients(self, made: tuple[Tensor, ...] | None = None) -> list[Tensor]:
        """Of all results, weighed by numbers that are the same each time."""
        made = self() if made is None else made
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(each.shape, generator=generator).to(each) for each in made]
        return list(torch.autograd.grad(made, self.leaves, weights))


def numbers(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments that have gradients, those in tuples too."""
    found = []
    for value in values:
        if isinstance(value, tuple):
            found += numbers(value)
        elif isinstance(value, Tensor) and value.requires_grad:
            found.append(value)
    return found


@every_case
def test_gradients_are_those_of_differences(case: str) -> None:
    call = Call.of(case, "cpu", torch.float64)
    # gradcheck changes the leaves in place, which are what the call reads.
    assert gradcheck(lambda *_: call(), call.leaves, fast_mode=True)


@pytest.mark.parametrize("case", IN_PLACE)
def test_gradients_of_what_turns_in_place(case: str) -> None:
    operation, (heads, *others), kwargs = CASES[case](Inputs(LENGTHS, "cpu", torch.float64))
    assert gradcheck(lambda x: operation(x * 1, *others, **kwargs), heads.requires_grad_(), fast_mode=True)
    # A view into a projection, whose other parts stay as they are.
    joined = torch.randn(heads.shape[0], 2 * heads.shape[1], heads.shape[2], dtype=torch.float64, requires_grad=True)

    def turned(x: Tensor) -> Tensor:
        x = x * 1
        operation(x[:, : heads.shape[1]], *others, **kwargs)
        return x

    assert gradcheck(turned, joined, fast_mode=True)


@every_case
def test_the_kernels_gradients(case: str, dtype: torch.dtype, kernels: str) -> None:
    found = Call.of(case, kernels, dtype).gradients()
    with use_backend("torch"):
        eager = Call.of(case, "cpu", dtype).gradients()
        exact = Call.of(case, "cpu", dtype, exact=True).gradients()
    # Of few numbers, and a kernel rounds a sum's logarithm where PyTorch keeps the softmax: its own tests are stricter.
    for number, (ours, theirs, truth) in enumerate(zip(found, eager, exact, strict=True)):
        assert_as_exact_as(ours, [theirs], truth, f"gradient {number}", times=4, times_worst=6)


@every_case
def test_a_gradient_changes_no_result(case: str, device: str) -> None:
    call = Call.of(case, device, torch.float32)
    exact = [each.detach() for each in Call.of(case, "cpu", torch.float32, exact=True)()]
    with torch.no_grad():
        plain = call()
    for number, (made, without, truth) in enumerate(zip(call(), plain, exact, strict=True)):
        assert made.requires_grad
        assert not without.requires_grad
        assert_as_exact_as(made.detach(), [without], truth, f"result {number}", times=2.5, times_worst=4)


@pytest.mark.full
@every_case
def test_a_graph_gives_the_same_gradients(case: str, device: str) -> None:
    call = Call.of(case, device, torch.float32)
    torch._dynamo.reset()
    made = torch.compile(lambda: call(), fullgraph=True, backend="aot_eager")()
    for ours, theirs in zip(call.gradients(made), call.gradients(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.full
@every_case
def test_opcheck_of_gradients(monkeypatch: pytest.MonkeyPatch, case: str, device: str) -> None:
    call = Call.of(case, device, torch.float32)
    answers = iter([True])
    with Calls() as calls, monkeypatch.context() as traced:
        # As a graph is traced; the node itself runs outside of it.
        traced.setattr(torch.compiler, "is_compiling", lambda: next(answers, False))
        call()
    (operator, args, kwargs) = calls.made[0]
    leaves = [each.detach().requires_grad_() if numbers([each]) else each for each in args]
    torch.library.opcheck(operator, tuple(leaves), kwargs)


def test_second_derivatives_are_refused() -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4)
    with pytest.raises(RuntimeError, match="create_graph must be False"):
        torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    (grad,) = torch.autograd.grad(torch.ops.fastcls_kernels.linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"fastcls_kernels.linear_backward.* no autograd formula"):
        grad.sum().backward()


def test_what_has_no_gradient_is_refused() -> None:
    heads, angles = torch.randn(3, 2, 8), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match="cos must not require gradients"):
        apply_rotary_(heads, torch.arange(3), angles.clone().requires_grad_(), angles)


def test_batch_invariance_has_no_gradients() -> None:
    rows, weight = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4)
    with batch_invariant():
        with pytest.raises(RuntimeError, match="gradients must be asked for outside of batch_invariant"):
            linear(rows, weight)
        linear(rows.detach(), weight)


def test_arguments_are_checked_where_gradients_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"weight must have shape \(out_features, 4\)"):
        linear(torch.randn(3, 4, requires_grad=True), torch.randn(2, 5))


def test_padding_takes_no_part() -> None:
    q, k, v = (torch.randn(2, 5, 2, 8) for _ in range(3))
    for each in (q, k, v):
        each[1, 3:] = float("nan")
        each.requires_grad_()
    attention_padded(q, k, v, torch.tensor([5, 3])).sum().backward()
    for each in (q, k, v):
        assert each.grad is not None
        assert bool(each.grad.isfinite().all())
        assert not each.grad[1, 3:].any()


def test_rows_of_no_sequence_take_no_part() -> None:
    rows = torch.randn(6, 4, requires_grad=True)
    mean_pool(rows, torch.tensor([0, 2, 2, 5], dtype=torch.int32), 3).sum().backward()
    assert rows.grad is not None
    assert rows.grad[:, 0].tolist() == pytest.approx([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3, 0])


def test_queries_without_tokens_have_no_gradient() -> None:
    query, keys = torch.randn(2, 2, 8, requires_grad=True), torch.randn(3, 2, 8, requires_grad=True)
    values = torch.randn(3, 2, 8)
    for length in (3, 0):
        ends = torch.tensor([0, length, length], dtype=torch.int32)
        out = cls_attention_kv(query, keys[:length], values[:length], ends, length)
        (grad,) = torch.autograd.grad(out.sum(), query)
        assert not out[1].any()
        assert bool(grad.isfinite().all())
        assert not grad[1].any()
