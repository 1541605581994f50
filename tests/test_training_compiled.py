"""torch.compile of a step: around the pass, which a graph does not hold, losses and gradients are what they were."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import tiny_model
from test_training import inputs_of
from torch import Tensor
from torch._dynamo.utils import counters

import fastcls

LENGTHS = ((9, 1, 6, 14), (3, 4, 5, 6), (20, 2, 1, 4), (8, 8, 8, 8), (2, 2, 2, 3), (30, 7, 6, 5))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def models(model_class: str, family: str) -> tuple[Any, Any]:
    """Two fast models of the same weights, with dropout."""
    model = tiny_model(model_class, family)
    one, other = (fastcls.optimize(copy.deepcopy(model)).train() for _ in range(2))
    return one, other


def step(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """A loss with something around it for the compiler to do."""
    loss: Tensor = model(**inputs).loss
    return loss * 2 + 1


@pytest.mark.parametrize(
    ("model_class", "family"), [("BertForSequenceClassification", "bert"), ("ModernBertForMaskedLM", "modernbert")]
)
def test_losses_and_gradients_are_those_of_a_step_that_is_not_compiled(model_class: str, family: str) -> None:
    compiled_model, model = models(model_class, family)
    # The graphs are inductor's, too; their code is not, which takes a minute to compile.
    compiled = torch.compile(step, backend="aot_eager")
    graphs = []
    for seed, lengths in enumerate(LENGTHS):
        inputs = inputs_of(model, model_class, seed=seed, lengths=lengths)
        losses = []
        for function, each in ((compiled, compiled_model), (step, model)):
            torch.manual_seed(seed)
            # Two passes before their backward passes, whose gradients add up over all batches.
            passes = [function(each, inputs) for _ in range(2)]
            sum(passes).backward()  # type: ignore[union-attr]
            losses.append(torch.stack(passes).detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    # The second shape makes sizes variable, and none after it brings anything new.
    assert graphs[2] == graphs[-1], graphs
    largest = max(float(weight.grad.abs().max()) for weight in model.parameters())
    for (name, found), weight in zip(compiled_model.named_parameters(), model.parameters(), strict=True):
        assert found.grad is not None
        assert float((found.grad - weight.grad).abs().max()) <= 1e-5 * largest, name


def test_a_graph_that_must_be_whole_is_refused_by_name() -> None:
    model, _ = models("BertForSequenceClassification", "bert")
    inputs = inputs_of(model, "BertForSequenceClassification")
    with pytest.raises(Exception, match="leave fullgraph=True out"):
        torch.compile(step, fullgraph=True)(model, inputs)
