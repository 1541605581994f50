"""Whose weights are trained, and what may be done to them meanwhile: held, copied, moved, written to, saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import tiny_model
from test_training import gradients, inputs_of, quiet
from torch import Tensor, nn

import fastcls

CLASSIFIER = "BertForSequenceClassification"
# The given model, who holds it besides.
WAYS: dict[str, Callable[[Any], Any]] = {
    "held": lambda model: fastcls.optimize(model).train(),
    "released": lambda model: fastcls.optimize(model, release=True).train(),
    "copied": lambda model: copy.deepcopy(fastcls.optimize(model).train()),
    "moved": lambda model: fastcls.optimize(model).to(torch.float64).train(),
}
every_way = pytest.mark.parametrize("way", list(WAYS))


def made(way: str, model_class: str = CLASSIFIER, family: str = "bert") -> tuple[Any, Any]:
    """A model in float64 in training mode, and the fast one of the same weights."""
    model = quiet(model_class, family)
    reference = copy.deepcopy(model).double().train()
    return reference, WAYS[way](model if way == "moved" else model.double())


def losses(model: Any, inputs: dict[str, Tensor], step: Callable[[Any], None], steps: int = 4) -> list[float]:
    found = []
    for _ in range(steps):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        step(model)
        found.append(float(loss.detach()))
    return found


@every_way
@pytest.mark.parametrize("model_class", [CLASSIFIER, "BertForMaskedLM"])
def test_the_same_parameters_are_trained_whoever_holds_the_model(way: str, model_class: str) -> None:
    reference, fast = made(way, model_class)
    expected = {name: weight.shape for name, weight in reference.named_parameters()}
    assert {name: weight.shape for name, weight in fast.named_parameters()} == expected
    inputs = inputs_of(reference, model_class)
    wanted, found = (gradients(each, inputs)[1] for each in (reference, fast))
    for name, gradient in wanted.items():
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-8)


@every_way
@pytest.mark.parametrize("model_class", [CLASSIFIER, "BertModel"])
def test_two_passes_before_one_backward(way: str, model_class: str) -> None:
    reference, fast = made(way, model_class)
    inputs = inputs_of(reference, model_class)
    found = []
    for model in (reference, fast):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        totals = []
        for _ in range(3):
            optimizer.zero_grad()
            # An encoder's pooler is computed by a pass of its own.
            total = sum(model(**inputs)[-1].sin().sum() for _ in range(2))
            total.backward()
            optimizer.step()
            totals.append(float(total.detach()))
        found.append(totals)
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def descend(model: Any) -> None:
    for weight in model.parameters():
        if weight.grad is not None:
            weight.data -= 0.05 * weight.grad


@every_way
def test_what_is_written_without_a_count_is_trained_on(way: str) -> None:
    reference, fast = made(way)
    inputs = inputs_of(reference, CLASSIFIER)
    assert losses(fast, inputs, descend) == pytest.approx(losses(reference, inputs, descend), rel=1e-6)


def test_what_is_written_before_training_is_trained() -> None:
    model = quiet().double()
    fast = fastcls.optimize(model)
    model.bert.encoder.layer[0].attention.self.key.weight.data.normal_()
    inputs = inputs_of(model, CLASSIFIER)
    expected = copy.deepcopy(model).train()(**inputs).loss
    torch.testing.assert_close(fast.train()(**inputs).loss, expected)


def test_modules_take_the_mode() -> None:
    model = tiny_model(CLASSIFIER, "bert")
    fast = fastcls.optimize(model).train()
    assert all(module.training for module in fast.modules())
    fast.eval()
    assert not any(module.training for module in fast.modules())
    assert not model.bert.embeddings.training


def test_parts_in_eval_mode_and_other_rates_are_refused() -> None:
    model = tiny_model(CLASSIFIER, "bert")
    fast, inputs = fastcls.optimize(model).train(), inputs_of(model, CLASSIFIER)
    fast.bert.eval()
    with pytest.raises(RuntimeError, match=r"model.bert must be in training mode.*got eval mode"):
        fast(**inputs)
    fast.train()
    fast.bert.embeddings.dropout.p = 0.5
    with pytest.raises(RuntimeError, match=r"model.bert.embeddings.dropout must be .*got p = 0.5"):
        fast(**inputs)
    fast.bert.embeddings.dropout.p = model.config.hidden_dropout_prob
    fast(**inputs)


def test_parts_of_a_model_without_dropout_may_be_in_eval_mode() -> None:
    fast = fastcls.optimize(model := quiet()).train()
    fast.bert.eval()
    fast(**inputs_of(model, CLASSIFIER)).loss.backward()


def test_an_optimizer_of_a_model_that_is_trained_no_longer_is_refused() -> None:
    model = quiet()
    fast = fastcls.optimize(model).to(torch.float64).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fast(**inputs_of(model, CLASSIFIER)).loss.backward()
    with pytest.raises(RuntimeError, match="holds no parameter of the model in training"):
        optimizer.step()


def test_backward_hooks_are_refused() -> None:
    model = quiet()
    fast = fastcls.optimize(model).train()
    hook = model.bert.encoder.layer[0].register_full_backward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"model.bert.encoder.layer.0 must have no hooks"):
        fast(**inputs_of(model, CLASSIFIER))
    hook.remove()
    fast(**inputs_of(model, CLASSIFIER))


def test_what_is_moved_in_training_is_still_shared() -> None:
    fast = fastcls.optimize(quiet()).train().to(torch.float64)
    shown = {weight.data_ptr() for weight in fast.parameters()}
    shared = [weight.data_ptr() in shown for _, weight in fast.weights()]
    joined = sum("qkv" in name for name, _ in fast.weights())
    assert shared.count(False) == joined


def test_a_model_that_is_moved_behind_its_back_is_refused() -> None:
    model = quiet()
    fast = fastcls.optimize(model).train()
    model.to(torch.float64)
    with pytest.raises(RuntimeError, match=r"must be torch.float32 on cpu like the fast one, got torch.float64"):
        fast(**inputs_of(model, CLASSIFIER))


def test_a_loss_of_ones_own_reads_all_tokens_of_a_mask_filler() -> None:
    model = quiet("BertForMaskedLM")
    inputs = inputs_of(model, "BertForMaskedLM")
    inputs.pop("labels")
    expected = copy.deepcopy(model).train()(**inputs).logits
    fast = fastcls.optimize(model, mask_token_id=4).train()
    real = inputs["attention_mask"] == 1
    torch.testing.assert_close(fast(**inputs).logits[real], expected[real], rtol=1e-4, atol=1e-4)


def test_the_config_says_what_was_trained() -> None:
    model = quiet()
    fast, inputs = fastcls.optimize(model), inputs_of(model, CLASSIFIER)
    inputs["labels"] = torch.rand(4, model.config.num_labels)
    fast(**inputs)
    assert fast.config.problem_type is None
    fast.train()(**inputs)
    assert fast.config.problem_type == "multi_label_classification"


def test_everything_may_be_dropped() -> None:
    model = tiny_model(CLASSIFIER, "bert", hidden_dropout_prob=0.0, classifier_dropout=1.0).double()
    inputs = inputs_of(model, CLASSIFIER)
    expected = copy.deepcopy(model).train()(**inputs).loss
    torch.testing.assert_close(fastcls.optimize(model).train()(**inputs).loss, expected)


def test_autocast_leaves_float64_alone() -> None:
    model = quiet().double()
    inputs = inputs_of(model, CLASSIFIER)
    fast = fastcls.optimize(model).train()
    with torch.autocast("cpu", torch.bfloat16):
        narrow = fast(**inputs).logits
    torch.testing.assert_close(narrow, fast(**inputs).logits, rtol=0, atol=0)


def test_the_trainer_saves_tied_weights(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate, which is not installed")
    model = quiet("BertForMaskedLM")
    inputs = inputs_of(model, "BertForMaskedLM")
    rows = [{name: tensor[row] for name, tensor in inputs.items()} for row in range(4)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, report_to="none", disable_tqdm=True, use_cpu=True
    )
    fast = fastcls.optimize(model).train()
    transformers.Trainer(model=fast, args=arguments, train_dataset=rows).train()
    again = fastcls.optimize(quiet("BertForMaskedLM")).train()
    weights: Any = transformers.modeling_utils.load_state_dict(tmp_path / "checkpoint-1" / "model.safetensors")
    again.load_state_dict(weights)
    assert isinstance(again.cls.predictions.decoder, nn.Linear)
    torch.testing.assert_close(again.eval()(**inputs).logits, fast.eval()(**inputs).logits)


def test_weights_are_tied_once_more() -> None:
    fast = fastcls.optimize(tiny_model("BertForMaskedLM", "bert"))
    fast.tie_weights()
    with pytest.raises(RuntimeError, match=r"get_output_embeddings must be called after train\(\)"):
        fast.get_output_embeddings()
    decoder = fast.train().get_output_embeddings()
    assert decoder is fast.cls.predictions.decoder
    # As moving them to the device meta does.
    decoder.weight = nn.Parameter(decoder.weight.detach().clone())
    fast.tie_weights()
    assert decoder.weight is fast.get_input_embeddings().weight
    for is_trained in (False, True):
        classifier = fastcls.optimize(tiny_model(CLASSIFIER, "bert"))
        assert (classifier.train() if is_trained else classifier).get_output_embeddings() is None


def test_a_backward_pass_inside_autocast() -> None:
    model, fast = made("held")
    inputs = inputs_of(fast, CLASSIFIER)
    theirs = copy.deepcopy(model).train()
    for each in (theirs, fast):
        with torch.autocast("cpu", torch.bfloat16):
            each(**inputs).loss.backward()
    for (name, ours), (_, other) in zip(fast.named_parameters(), theirs.named_parameters(), strict=True):
        if other.grad is not None and "key.bias" not in name:
            torch.testing.assert_close(ours.grad, other.grad, atol=0.02, rtol=0.1, msg=name)
