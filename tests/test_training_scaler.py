"""Steps in 16 bits with a GradScaler: as near to float32's as the transformers model's, and skipped where its are."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from support import tiny_model
from test_training import inputs_of, rates_of
from torch import Tensor

import fastcls

STEPS = 6


class Steps(NamedTuple):
    """What steps have made of a model."""

    weights: Tensor
    skipped: list[bool]
    scales: list[float]


def taken(model: Any, dtype: torch.dtype | None, scale: float, factor: float = 1.0) -> Steps:
    """Steps of SGD under autocast, of the loss times a factor; float32's where ``dtype`` is None."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=dtype is not None)

    def weights() -> Tensor:
        return torch.cat([weight.detach().flatten() for weight in model.parameters()])

    skipped, scales = [], []
    for step in range(STEPS):
        before = weights()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = model(**inputs_of(model, "ForSequenceClassification", seed=step)).loss * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        skipped.append(torch.equal(before, weights()))
        scales.append(scaler.get_scale())
    return Steps(weights(), skipped, scales)


@pytest.mark.parametrize(
    ("model_class", "family"),
    [("BertForSequenceClassification", "bert"), ("DebertaV2ForSequenceClassification", "deberta-v2")],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_steps_are_the_models_and_those_with_infinite_gradients_are_skipped(
    model_class: str, family: str, dtype: torch.dtype
) -> None:
    model = tiny_model(model_class, family, **dict.fromkeys(rates_of(family), 0.0))
    exact = taken(copy.deepcopy(model).train(), None, 1.0).weights
    theirs = taken(copy.deepcopy(model).train(), dtype, 1024.0)
    ours = taken(fastcls.optimize(copy.deepcopy(model)).train(), dtype, 1024.0)
    assert ours.skipped == theirs.skipped == [False] * STEPS
    assert float((ours.weights - exact).norm()) <= 2 * float((theirs.weights - exact).norm())
    # More than float16 can hold, and more than bfloat16 can.
    scale = 2.0**24 if dtype == torch.float16 else 2.0**127
    theirs = taken(copy.deepcopy(model).train(), dtype, scale, 64.0)
    ours = taken(fastcls.optimize(copy.deepcopy(model)).train(), dtype, scale, 64.0)
    assert ours.skipped[0]
    assert ours[1:] == theirs[1:]
