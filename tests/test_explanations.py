"""Explanations of a model by gradients of its embeddings, in eval mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import tiny_model
from test_training import LENGTHS, inputs_of, rates_of
from torch import Tensor, nn

import fastcls

CLASSES = [
    ("bert", "BertForSequenceClassification"),
    ("bert", "BertModel"),
    ("bert", "BertForMaskedLM"),
    ("distilbert", "DistilBertForTokenClassification"),
    ("modernbert", "ModernBertForSequenceClassification"),
    ("deberta-v2", "DebertaV2ForSequenceClassification"),
    ("eurobert", "EuroBertForSequenceClassification"),
    ("electra", "ElectraForQuestionAnswering"),
]


def _given(model: nn.Module, family: str) -> tuple[Tensor, Tensor]:
    """Embeddings of words and an attention mask; of one length where eager attention has windows."""
    lengths = (max(LENGTHS),) * 4 if family == "modernbert" else LENGTHS
    inputs = inputs_of(model, "", lengths=lengths)
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    return table(inputs["input_ids"]).detach(), inputs["attention_mask"]


def _gradient(model: Any, embedded: Tensor, mask: Tensor) -> Tensor:
    embedded = embedded.clone().requires_grad_()
    out = model(inputs_embeds=embedded, attention_mask=mask)
    total = torch.zeros((), dtype=torch.float64)
    for found in out.values():
        total = total + (found[mask == 1] if found.shape[:2] == mask.shape else found).double().sin().sum()
    return torch.autograd.grad(total, embedded)[0]


@pytest.mark.parametrize("trained", [False, True], ids=["never_trained", "trained_before"])
@pytest.mark.parametrize(("family", "model_class"), CLASSES)
def test_gradients_of_embeddings_are_the_models_own(family: str, model_class: str, trained: bool) -> None:
    # With dropout in the config, which eval mode leaves out.
    model = tiny_model(model_class, family, **rates_of(family))
    model.set_attn_implementation("eager")
    model = model.double()
    reference = copy.deepcopy(model).eval()
    fast = fastcls.optimize(model)
    if trained:
        fast.train().eval()
    embedded, mask = _given(reference, family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found, expected = (_gradient(each, embedded, mask) for each in (fast, reference))
    bound = 1e-5 if family in ("modernbert", "eurobert", "deberta-v2") else 1e-10
    assert float((found - expected).abs().max()) <= bound * float(expected.abs().max())
    assert torch.equal(found, _gradient(fast, embedded, mask))
    # Nothing but the answer has changed.
    assert not fast.training
    assert not model.training
    assert all(weight.grad is None for each in (fast, model) for weight in each.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_graph_is_kept_only_where_embeddings_ask_for_it() -> None:
    model = tiny_model("BertForSequenceClassification", "bert")
    fast = fastcls.optimize(model)
    embedded, mask = _given(model, "bert")
    assert not fast(inputs_embeds=embedded, attention_mask=mask).logits.requires_grad
    embedded.requires_grad_()
    with torch.no_grad():
        assert not fast(inputs_embeds=embedded, attention_mask=mask).logits.requires_grad
    logits = fast(inputs_embeds=embedded, attention_mask=mask).logits
    assert logits.requires_grad
    torch.testing.assert_close(logits, model(inputs_embeds=embedded, attention_mask=mask).logits, atol=1e-5, rtol=1e-5)


def test_gradients_follow_the_given_model() -> None:
    model = tiny_model("BertForSequenceClassification", "bert")
    fast = fastcls.optimize(model)
    embedded, mask = _given(model, "bert")
    old = _gradient(fast, embedded, mask)
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.query.weight.mul_(0.5)
    found = _gradient(fast, embedded, mask)
    assert float((found - old).abs().max()) > 1e-3
    torch.testing.assert_close(found, _gradient(model, embedded, mask), atol=1e-5, rtol=1e-5)


def test_what_a_pass_with_gradients_would_pass_by_is_refused() -> None:
    model = tiny_model("BertForSequenceClassification", "bert")
    fast = fastcls.optimize(model)
    embedded, mask = _given(model, "bert")
    fast.quantize = "int8"
    with pytest.raises(RuntimeError, match="quantize must be None in eval mode with gradients of inputs_embeds, got"):
        _gradient(fast, embedded, mask)
    fast.quantize = None
    handle = fast.encoder.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"encoder.layers.0 must have no forward hooks"):
        _gradient(fast, embedded, mask)
    handle.remove()
    handle = fast.train().eval().bert.embeddings.register_forward_hook(lambda *_: None)
    inputs = inputs_of(model, "BertForSequenceClassification")
    calls = (lambda: fast(**inputs), lambda: fast.logits_of([[5, 6]]), lambda: fast.forward_packed(fast.pack([[5, 6]])))
    for call in calls:
        with pytest.raises(RuntimeError, match=r"model.bert.embeddings must have no forward hooks.*inputs_embeds"):
            call()
    handle.remove()
    layer = fast.bert.encoder.layer[1].attention.self.query
    layer.forward = lambda rows: rows
    with pytest.raises(RuntimeError, match=r"model.bert.encoder.layer.1.attention.self.query must have .* no other fo"):
        fast(**inputs)
    del layer.forward
    assert not fast(**inputs).logits.requires_grad


@pytest.mark.parametrize("method", ["IntegratedGradients", "Saliency", "InputXGradient"])
def test_attributions_are_the_models_own(method: str) -> None:
    attr = pytest.importorskip("captum.attr", reason="captum is not installed")
    model = tiny_model("BertForSequenceClassification", "bert")
    fast = fastcls.optimize(model)
    embedded, mask = _given(model, "bert")
    options: dict[str, Any] = {"target": 1, "additional_forward_args": (mask,)}
    if method == "IntegratedGradients":
        options["baselines"] = torch.zeros_like(embedded)
    found = []
    for each in (model, fast):

        def forward(rows: Tensor, kept: Tensor, each: Any = each) -> Tensor:
            logits: Tensor = each(inputs_embeds=rows, attention_mask=kept).logits
            return logits

        found.append(getattr(attr, method)(forward).attribute(embedded.clone().requires_grad_(), **options).detach())
    kept = mask[..., None] == 1
    largest = float(found[0].abs().max())
    assert float(((found[1] - found[0]) * kept).abs().max()) <= 1e-5 * max(largest, 1.0)
    assert largest > 1e-3


def test_layer_attributions_to_shown_modules_are_refused() -> None:
    attr = pytest.importorskip("captum.attr", reason="captum is not installed")
    fast = fastcls.optimize(tiny_model("BertForSequenceClassification", "bert")).train().eval()
    inputs = inputs_of(fast, "BertForSequenceClassification", lengths=(9, 9))
    explained = attr.LayerIntegratedGradients(lambda ids: fast(ids).logits, fast.bert.embeddings)
    with pytest.raises(RuntimeError, match=r"model.bert.embeddings must have no forward hooks.*inputs_embeds"):
        explained.attribute(inputs["input_ids"], target=1)
