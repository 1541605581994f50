"""Training a fast model: losses and gradients as the transformers model's own, for every family and every class."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastcls
from fastcls.families import FAMILIES
from fastcls_kernels.training import Dropout
from tests.support import TINY_FAMILIES, tiny_model

CLASSES = [
    (family.model_type, model_class)
    for family in FAMILIES
    if family.model_type in TINY_FAMILIES
    for model_class in family.heads
    if hasattr(transformers, model_class)
]
# transformers computes their angles, or the scale of their scores, in float32 whatever the weights' dtype is.
ROUNDED = ("modernbert", "eurobert", "ultrabert", "esm", "deberta", "deberta-v2")
_LENGTHS = (9, 1, 6, 14)


def inputs_of(model: Any, model_class: str, seed: int = 0) -> dict[str, Tensor]:
    """A padded batch with labels, as the class takes them."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    texts = len(_LENGTHS)
    mask = (torch.arange(max(_LENGTHS)) < torch.tensor(_LENGTHS)[:, None]).long()
    ids = integers(5, min(model.config.vocab_size, 60), *mask.shape)
    found = {"input_ids": ids.where(mask == 1, 1), "attention_mask": mask}
    if "MultipleChoice" in model_class:
        return {
            **{name: tensor.view(2, 2, -1) for name, tensor in found.items()},
            "labels": integers(0, 2, 2),
        }
    if "TokenClassification" in model_class:
        return {**found, "labels": integers(0, model.config.num_labels, *mask.shape).where(mask == 1, -100)}
    if "MaskedLM" in model_class:
        chosen = (integers(0, 3, *mask.shape) == 0) & (mask == 1)
        chosen[0, 2] = True
        return {**found, "labels": ids.where(chosen, -100)}
    if "QuestionAnswering" in model_class:
        return {**found, "start_positions": torch.tensor([1, 0, 2, 5]), "end_positions": torch.tensor([3, 0, 2, 9])}
    if "NextSentence" in model_class:
        return {**found, "labels": integers(0, 2, texts)}
    if "SequenceClassification" in model_class:
        return {**found, "labels": integers(0, model.config.num_labels, texts)}
    return found


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """A number that all that the task reads of an output enters: some classes' own losses are in float32."""
    out = model(**inputs)
    total = torch.zeros((), dtype=torch.float64)
    mask = inputs["attention_mask"] == 1
    for name, found in out.items():
        if name == "loss":
            continue
        if found.shape[:2] == mask.shape:
            read = mask & (inputs["labels"] != -100) if "labels" in inputs and found.ndim == 3 else mask
            found = found[read]
        total = total + found.double().sin().sum()
    return total


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    loss = loss_of(model, inputs)
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}


def assert_alike(model: nn.Module, reference: nn.Module, inputs: dict[str, Tensor], bound: float) -> None:
    """Losses and gradients of two models in float64, up to a part of the largest."""
    expected, wanted = gradients(reference, inputs)
    loss, found = gradients(model, inputs)
    torch.testing.assert_close(loss, expected, rtol=bound, atol=bound)
    assert found.keys() == wanted.keys()
    largest = max(float(each.abs().max()) for each in wanted.values() if each is not None)
    for name, gradient in wanted.items():
        ours = found[name]
        if gradient is None or ours is None:
            # What no output depends on has a gradient of zero in one, and none in the other.
            for each in (gradient, ours):
                assert each is None or float(each.abs().max()) <= bound * largest, name
            continue
        assert float((ours - gradient).abs().max()) <= bound * largest, name


def scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of dropout every number is multiplied by 1 plus the rate: so the places and rates must be the same.

    To be called behind `fastcls.optimize`, which refuses a model whose functions were replaced.
    """

    def scaled(values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: ARG001
        return values * (1 + p) if training else values

    monkeypatch.setattr(torch.nn.functional, "dropout", scaled)
    monkeypatch.setattr(Dropout, "factor", property(lambda self: 1 + self.rate))
    monkeypatch.setattr(Dropout, "threshold", property(lambda _: -(2**31)))


def rates_of(model_type: str) -> dict[str, float]:
    """A different rate for each option of a config that is one."""
    config = transformers.AutoConfig.for_model(model_type).to_dict()
    options = sorted(
        name for name, value in config.items() if "dropout" in name and (value is None or isinstance(value, float))
    )
    return {name: 0.05 + 0.03 * index for index, name in enumerate(options)}


@pytest.mark.parametrize(("model_type", "model_class"), CLASSES)
@pytest.mark.parametrize("drops", [False, True])
def test_loss_and_gradients_are_the_models_own(
    monkeypatch: pytest.MonkeyPatch, model_type: str, model_class: str, drops: bool
) -> None:
    rates = rates_of(model_type)
    model = tiny_model(model_class, model_type, **(rates if drops else dict.fromkeys(rates, 0.0)))
    model.set_attn_implementation("eager")
    model = model.double()
    reference = copy.deepcopy(model).train()
    fast = fastcls.optimize(model).train()
    scale(monkeypatch)
    assert_alike(fast, reference, inputs_of(model, model_class), 1e-5 if model_type in ROUNDED else 1e-10)
