"""torch.compile of a step: the pass is a node of the graph, and losses and gradients are what they were."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import tiny_model
from test_training import inputs_of
from torch import Tensor
from torch._dynamo.utils import counters

import fastcls
from fastcls.models import training_node

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


@pytest.mark.full
@pytest.mark.parametrize(
    ("model_class", "family", "whole"),
    [
        ("BertForSequenceClassification", "bert", True),
        ("DebertaV2ForTokenClassification", "deberta-v2", True),
        pytest.param("ModernBertForMaskedLM", "modernbert", True, marks=pytest.mark.full),
    ],
)
def test_losses_and_gradients_are_those_of_a_step_that_is_not_compiled(
    model_class: str, family: str, whole: bool
) -> None:
    compiled_model, model = models(model_class, family)
    # The graphs are inductor's, too; their code is not, which takes a minute to compile.
    compiled = torch.compile(step, backend="aot_eager", fullgraph=whole)
    graphs = []
    for seed, lengths in enumerate(LENGTHS):
        inputs = inputs_of(model, model_class, seed=seed, lengths=lengths)
        losses = []
        for function, each in ((compiled, compiled_model), (step, model)):
            torch.manual_seed(seed)
            # More passes than are kept before their backward passes, whose gradients add up over all batches.
            passes = [function(each, inputs) for _ in range(3)]
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


@pytest.mark.full
def test_a_graph_that_must_be_whole_is_refused_by_name() -> None:
    peft = pytest.importorskip("peft", reason="adapters need peft, which is not installed")
    model = tiny_model("BertForSequenceClassification", "bert")
    inputs = inputs_of(model, "BertForSequenceClassification")
    around = peft.get_peft_model(model, peft.LoraConfig("SEQ_CLS", target_modules=["query"]))
    adapted = fastcls.optimize(around).train().base_model.model
    with pytest.raises(Exception, match="leave fullgraph=True out"):
        torch.compile(step, fullgraph=True)(adapted, inputs)
    torch.compiler.reset()
    torch.manual_seed(0)
    loss = torch.compile(step, backend="aot_eager")(adapted, inputs)
    torch.manual_seed(0)
    assert float(loss.detach()) == float(step(adapted, inputs).detach())


def test_frozen_parts_and_given_embeddings() -> None:
    compiled_model, model = models("BertForSequenceClassification", "bert")
    inputs = inputs_of(model, "BertForSequenceClassification")
    ids = inputs.pop("input_ids")
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    found = []
    for function, each in ((compiled, compiled_model), (step, model)):
        each.bert.encoder.layer[0].requires_grad_(False)
        embeds = each.get_input_embeddings()(ids).detach().requires_grad_()
        torch.manual_seed(1)
        function(each, {**inputs, "inputs_embeds": embeds}).backward()
        found.append({"embeds": embeds.grad, **{name: weight.grad for name, weight in each.named_parameters()}})
    for name, theirs in found[1].items():
        if theirs is None:
            # What no output depends on.
            assert found[0][name] is None or not bool(found[0][name].any()), name
        else:
            torch.testing.assert_close(found[0][name], theirs, msg=name)
    assert found[0]["embeds"] is not None


@pytest.mark.full
def test_autocast_inside_and_around_a_compiled_step() -> None:
    compiled_model, model = models("BertForSequenceClassification", "bert")
    inputs = inputs_of(model, "BertForSequenceClassification")

    def narrow(each: Any, given: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return step(each, given)

    for around in (False, True):
        losses = []
        for each in (compiled_model, model):
            function: Any = step if around else narrow
            if each is compiled_model:
                function = torch.compile(function, backend="aot_eager", fullgraph=True)
            torch.manual_seed(2)
            with torch.autocast("cpu", torch.bfloat16, enabled=around):
                loss = function(each, inputs)
            loss.backward()
            losses.append(float(loss.detach()))
        assert losses[0] == losses[1]
    for (name, ours), theirs in zip(compiled_model.named_parameters(), model.parameters(), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


@pytest.mark.full
def test_passes_without_a_backward_pass_are_let_go() -> None:
    model, _ = models("BertForSequenceClassification", "bert")
    inputs = inputs_of(model, "BertForSequenceClassification")
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for _ in range(5):
        compiled(model, inputs)
    assert len(training_node._kept[model]) == 2
    loss = compiled(model, inputs)
    loss.backward()
    assert len(training_node._kept[model]) == 1
    reference = weakref.ref(model)
    del model, compiled, loss
    torch.compiler.reset()
    gc.collect()
    assert reference() is None
    assert not training_node._kept
