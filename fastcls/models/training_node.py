"""A pass in training mode as one node of a graph that ``torch.compile`` traces, and its gradients as another.

How a batch is packed follows from its values, and what is kept for the backward pass from how it is packed: no graph
can hold that. So the forward node keeps the pass with its graph in here, under a number that it gives beside the rows,
and the backward node takes it from here. Of each model the last two are kept, and let go by their backward pass; what
is here no longer is computed once more, from the same seeds.
"""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastcls_kernels._ops import recording

from ..engine.batch import PaddedBatch
from ..engine.spec import Rows
from ..engine.training import draw_seeds

# Forward passes of a model whose backward pass has not come yet.
_MOST_KEPT = 2


class _Kept(NamedTuple):
    """A pass, with what its gradients are asked of."""

    rows: Tensor
    leaves: list[Tensor]


class Trains(Protocol):
    """What a node asks of a model in training mode; see `TrainableModel`."""

    number: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""

    @property
    def training_dtype(self) -> torch.dtype:
        """What products are computed in."""

    def count_seeds(self) -> int:
        """How many seeds a pass takes."""

    def trained_parameters(self) -> list[Tensor]:
        """The parameters, each once, in their order."""

    def rows_over(
        self,
        leaves: Sequence[Tensor],
        seeds: Sequence[int],
        dtype: torch.dtype,
        batch: PaddedBatch,
        rows: Rows,
        fill: float,
        chosen: Tensor | None,
    ) -> Tensor:
        """The rows, whose graph leads to ``leaves``, one for each parameter."""


_numbers = itertools.count()
_models: weakref.WeakValueDictionary[int, Trains] = weakref.WeakValueDictionary()
_kept: weakref.WeakKeyDictionary[Trains, OrderedDict[int, _Kept]] = weakref.WeakKeyDictionary()


def number_of(model: Trains) -> int:
    """The number under which nodes find a model."""
    number = next(_numbers)
    _models[number] = model
    return number


def trained_rows(
    model: Trains,
    batch: PaddedBatch,
    rows: Rows,
    fill: float,
    chosen: Tensor | None,
    width: int,
    *,
    is_headless: bool,
) -> Tensor:
    """`TrainableModel.trained_rows`, dense, as a node of the graph that is being traced.

    Args:
        model: the model.
        batch, rows, fill, chosen: as `Engine.rows` takes them.
        width: how many numbers a row has.
        is_headless: whether rows are an encoder's.
    """
    seeds, dtype = draw_seeds(model.count_seeds()), model.training_dtype
    # An encoder's rows come from a norm, in the weights' dtype.
    made = model.dtype if is_headless else dtype
    parameters = model.trained_parameters()
    found, _ = _forward(parameters, seeds, model.number, width, made, dtype, rows, fill, chosen, *batch)
    return found


def _passed(
    parameters: Sequence[Tensor],
    seeds: Tensor,
    number: int,
    dtype: torch.dtype,
    rows: Any,
    fill: float,
    chosen: Tensor | None,
    given: Any,
) -> _Kept:
    """The pass over parameters of the graph's, with a graph of its own."""
    model = _models.get(number)
    if model is None:
        raise RuntimeError("the model that a compiled step trains is gone: compile the step of the new one")
    batch = PaddedBatch(*given)
    embeds = batch.inputs_embeds
    with recording():
        leaves = [
            each.detach().requires_grad_(like.requires_grad)
            for each, like in zip(parameters, model.trained_parameters(), strict=True)
        ]
        if embeds is not None:
            embeds = embeds.detach().requires_grad_()
        batch = batch._replace(inputs_embeds=embeds)
        made = model.rows_over(leaves, seeds.tolist(), dtype, batch, rows, fill, chosen)
    return _Kept(made, leaves if embeds is None else [*leaves, embeds])


@torch.library.custom_op("fastcls::trained", mutates_args=())
def _forward(
    parameters: Sequence[Tensor],
    seeds: Tensor,
    number: int,
    width: int,  # noqa: ARG001 - the fake result's
    made: torch.dtype,
    dtype: torch.dtype,
    rows: str,
    fill: float,
    chosen: Tensor | None,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
    found = _passed(parameters, seeds, number, dtype, rows, fill, chosen, given)
    handle = next(_numbers)
    waiting = _kept.setdefault(_models[number], OrderedDict())
    waiting[handle] = found
    while len(waiting) > _MOST_KEPT:
        waiting.popitem(last=False)
    # As the graph was told: a node whose numbers are of another dtype would be read as something else.
    return found.rows.detach().to(made, copy=True), torch.tensor(handle)


@_forward.register_fake
def _(
    parameters: Sequence[Tensor],
    _seeds: Tensor,
    _number: int,
    width: int,
    made: torch.dtype,
    _dtype: torch.dtype,
    rows: str,
    _fill: float,
    _chosen: Tensor | None,
    input_ids: Tensor | None,
    _attention_mask: Tensor | None,
    _token_type_ids: Tensor | None,
    _position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    given = input_ids if inputs_embeds is None else inputs_embeds
    assert given is not None
    shape = given.shape[:1] if rows in ("first", "mean") else given.shape[:2]
    return parameters[0].new_empty(*shape, width, dtype=made), torch.empty((), dtype=torch.int64)


@torch.library.custom_op("fastcls::trained_backward", mutates_args=())
def _backward(
    grad: Tensor,
    handle: Tensor,
    wanted: Sequence[int],
    parameters: Sequence[Tensor],
    seeds: Tensor,
    number: int,
    dtype: torch.dtype,
    rows: str,
    fill: float,
    chosen: Tensor | None,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> list[Tensor]:
    model = _models.get(number)
    waiting = None if model is None else _kept.get(model)
    found = None if waiting is None else waiting.pop(int(handle), None)
    if found is None:
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        found = _passed(parameters, seeds, number, dtype, rows, fill, chosen, given)
    asked = [found.leaves[index] for index in wanted]
    with recording():
        grads = torch.autograd.grad(found.rows, asked, grad, allow_unused=True)
    return [torch.zeros_like(leaf) if each is None else each.clone() for leaf, each in zip(asked, grads, strict=True)]


@_backward.register_fake
def _(
    _grad: Tensor,
    _handle: Tensor,
    wanted: Sequence[int],
    parameters: Sequence[Tensor],
    _seeds: Tensor,
    _number: int,
    _dtype: torch.dtype,
    _rows: str,
    _fill: float,
    _chosen: Tensor | None,
    _input_ids: Tensor | None,
    _attention_mask: Tensor | None,
    _token_type_ids: Tensor | None,
    _position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> list[Tensor]:
    leaves = [*parameters, *([] if inputs_embeds is None else [inputs_embeds])]
    return [torch.empty_like(leaves[index]) for index in wanted]


def _keep(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    parameters, seeds, number, _, _, dtype, rows, fill, chosen, *given = inputs
    ctx.form = (number, dtype, rows, fill)
    ctx.count = len(parameters)
    ctx.save_for_backward(output[1], seeds, chosen, *given, *parameters)


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> Any:
    handle, seeds, chosen, *rest = ctx.saved_tensors
    given, parameters = rest[:5], rest[5:]
    number, dtype, rows, fill = ctx.form
    wanted = [index for index, each in enumerate(_models[number].trained_parameters()) if each.requires_grad]
    asks_embeds = given[4] is not None and ctx.needs_input_grad[-1]
    asked = [*wanted, ctx.count] if asks_embeds else wanted
    found = _backward(grad, handle, asked, parameters, seeds, number, dtype, rows, fill, chosen, *given)
    grads: list[Tensor | None] = [None] * ctx.count
    for index, each in zip(wanted, found, strict=False):
        grads[index] = each
    return grads, *(None,) * 12, found[-1] if asks_embeds else None


_forward.register_autograd(_differentiate, setup_context=_keep)
