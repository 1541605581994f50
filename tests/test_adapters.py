"""PEFT's adapters (LoRA) run in fast models: the same losses and gradients as PEFT over the transformers model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_model
from test_training import CLASSES, ROUNDED, assert_alike, inputs_of, rates_of, scale
from torch import Tensor, nn

import fastcls

peft = pytest.importorskip("peft", reason="adapters need peft, which is not installed")

CLASSIFIER = "BertForSequenceClassification"


def linear_layers(model: nn.Module) -> list[str]:
    """The names of all linear layers but those whose weight is tied to another."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for weight in module.parameters(recurse=False):
            names.setdefault(id(weight), []).append(name)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and len(set(names[id(module.weight)])) == 1
    ]


def config_of(model: Any, **options: Any) -> Any:
    """Adapters that say something, on all layers that may have some."""
    defaults = {"r": 3, "lora_alpha": 5, "target_modules": linear_layers(model), "init_lora_weights": False}
    return peft.LoraConfig(**{**defaults, **options})


def quiet(model_class: str = CLASSIFIER, family: str = "bert", **options: Any) -> Any:
    """A tiny model without dropout."""
    return tiny_model(model_class, family, **dict.fromkeys(rates_of(family), 0.0), **options)


def adapted(model: Any, config: Any, way: str) -> tuple[Any, Any]:
    """PEFT's model over a transformers model, and a fast one with the same adapters, which is in training mode."""
    torch.manual_seed(0)
    reference = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
    if way == "optimized":
        return reference.train(), fastcls.optimize(copy.deepcopy(reference)).train()
    torch.manual_seed(0)
    return reference.train(), peft.get_peft_model(fastcls.optimize(copy.deepcopy(model)).train(), copy.deepcopy(config))


@pytest.mark.parametrize(("model_type", "model_class"), CLASSES)
@pytest.mark.parametrize("way", ["optimized", "injected"])
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.filterwarnings("ignore:layers of the head are not trained")
def test_loss_and_gradients_are_pefts_own(
    monkeypatch: pytest.MonkeyPatch, model_type: str, model_class: str, way: str, drops: bool
) -> None:
    rates = rates_of(model_type)
    model = tiny_model(model_class, model_type, **(rates if drops else dict.fromkeys(rates, 0.0)))
    model.set_attn_implementation("eager")
    model = model.double()
    config = config_of(model, lora_dropout=0.3 if drops else 0.0)
    reference, fast = adapted(model, config, way)
    scale(monkeypatch)
    bound = 1e-5 if model_type in ROUNDED else 1e-10
    inputs = inputs_of(model, model_class, lengths=(9, 9, 9, 9) if model_type in ("modernbert", "ultrabert") else (9, 1, 6, 14))
    assert_alike(fast, reference, inputs, bound)
