"""Training whole models by the kernels, and in 16 bits: as exact as PyTorch's own operators."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import tiny_model
from test_training import CLASSES, LENGTHS, WINDOWED, gradients, inputs_of, quiet, rates_of
from torch import Tensor

import fastcls
from fastcls_kernels import use_backend
from fastcls_kernels.runtime.backend import Backend

ONE_OF_EACH = [
    *(each for each in CLASSES if each[1].endswith("ForSequenceClassification")),
    *(("bert", "BertForMaskedLM"), ("mpnet", "MPNetForTokenClassification"), ("esmc", "EsmcForMaskedLM")),
]


KERNELS = [
    ("BertForSequenceClassification", "bert"),
    ("MPNetForTokenClassification", "mpnet"),
    ("ModernBertForMaskedLM", "modernbert"),
    ("DebertaV2ForSequenceClassification", "deberta-v2"),
    ("EuroBertForSequenceClassification", "eurobert"),
]


@pytest.mark.parametrize(
    ("model_class", "family", "drops"),
    [
        *(
            pytest.param(*each, True, marks=[] if each[1] in ("bert", "deberta-v2") else pytest.mark.full)
            for each in KERNELS
        ),
        (*KERNELS[0], False),
        # What runs without dropout is less of what runs with it.
        *(pytest.param(*each, False, marks=pytest.mark.full) for each in KERNELS[1:]),
    ],
)
def test_the_kernels_give_the_gradients_of_the_torch_path(
    model_class: str, family: str, drops: bool, kernel_device: str
) -> None:
    rates = rates_of(family)
    # A layer for all rows, and the last one.
    options = rates if drops else dict.fromkeys(rates, 0.0)
    model = tiny_model(model_class, family, **options, num_hidden_layers=2)
    wide = fastcls.optimize(copy.deepcopy(model).double()).train()
    fast = fastcls.optimize(model).train()
    # In rising order, since the torch path sorts texts, and the kernels do not: a seed drops what lies in a row.
    inputs = inputs_of(model, model_class, lengths=tuple(sorted(LENGTHS)))
    found = []
    runs: tuple[tuple[Any, Backend, str], ...] = (
        *((wide, "torch", "cpu"), (fast, "torch", "cpu")),
        (fast, "triton", kernel_device),
    )
    for each, backend, device in runs:
        each.to(device).zero_grad()
        with use_backend(backend):
            torch.manual_seed(5)
            found.append(gradients(each, {name: tensor.to(device) for name, tensor in inputs.items()})[1])
    wanted, eager, kernels = found
    assert error(kernels, wanted) <= 1.5 * error(eager, wanted)


def error(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> float:
    """Of all gradients together, the norm of the difference."""
    pairs = ((gradient, wanted[name]) for name, gradient in found.items())
    squares = [float((a.double().cpu() - b).square().sum()) for a, b in pairs if a is not None and b is not None]
    return float(sum(squares) ** 0.5)


@pytest.mark.full
@pytest.mark.parametrize(("family", "model_class"), ONE_OF_EACH)
def test_gradients_in_bfloat16_are_as_exact_as_the_models(family: str, model_class: str, device: str) -> None:
    exact = quiet(model_class, family)
    model = copy.deepcopy(exact).to(device, torch.bfloat16)
    theirs, fast = copy.deepcopy(model).train(), fastcls.optimize(model).train()
    exact = exact.double().train()
    errors = []
    # Several, since the rounding of one batch's logits weighs on all its gradients.
    for seed in range(4):
        inputs = inputs_of(exact, model_class, seed, (max(LENGTHS),) * 4 if family in WINDOWED else LENGTHS)
        there = {name: tensor.to(device) for name, tensor in inputs.items()}
        for each in (exact, theirs, fast):
            each.zero_grad()
        wanted = gradients(exact, inputs)[1]
        errors.append([error(gradients(each, there)[1], wanted) ** 2 for each in (fast, theirs)])
    ours, eager = (sum(each) for each in zip(*errors, strict=True))
    assert ours**0.5 <= 1.5 * eager**0.5
