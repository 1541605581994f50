"""What dropout draws in a model that is trained: how much, and what is drawn anew."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support import tiny_model
from test_training import inputs_of, quiet, rates_of
from torch import Tensor

import fastcls
from fastcls.engine import engine
from fastcls.engine.training.places import DropoutRates, Seeds
from fastcls_kernels.training import Dropout, dropped

IN_LAYERS = ("attention", "attended", "inner", "output", "adapter", "positions")


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_numbers_that_are_kept_make_up_for_those_that_are_dropped(rate: float) -> None:
    ones = torch.ones(300, 400, dtype=torch.float64)
    found = dropped(ones, Dropout(rate, 987654321))
    values = found.unique()
    assert values.tolist() == pytest.approx([0.0, 1 / (1 - rate)])
    # Six standard errors of the mean.
    assert abs(float(found.mean()) - 1) < 6 * (rate / (1 - rate) / ones.numel()) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_few_bits_are_rounded_once(dtype: torch.dtype) -> None:
    rows = torch.randn(9, 40).to(dtype)
    assert torch.equal(dropped(rows, Dropout(0.1, 7)), dropped(rows.float(), Dropout(0.1, 7)).to(dtype))


def test_dropped_nan_is_zero() -> None:
    rows = torch.full((8, 40), float("nan"), requires_grad=True)
    out = dropped(rows, Dropout(0.5, 1))
    kept = dropped(torch.ones(8, 40), Dropout(0.5, 1)) != 0
    assert torch.equal(out.isnan(), kept)
    assert not bool(out[~kept].any())


def test_every_place_of_every_layer_has_a_seed_of_its_own() -> None:
    seeds = Seeds(DropoutRates(*[0.1] * len(DropoutRates._fields)), 3)
    found = [seeds.at(place, layer) for place, layer in itertools.product(IN_LAYERS, range(3))]
    found += [seeds.at(place) for place in DropoutRates._fields if place not in IN_LAYERS]
    assert all(each is not None for each in found)
    assert len({each.seed for each in found if each is not None}) == 3 * len(IN_LAYERS) + 5
    # The same ones as long as a pass is computed again.
    assert seeds.at("output", 2) == seeds.at("output", 2)


def only(family: str, model_class: str, option: str) -> Any:
    """A fast model, in training, that drops out at one place."""
    return fastcls.optimize(
        tiny_model(model_class, family, **{**dict.fromkeys(rates_of(family), 0.0), option: 0.5})
    ).train()


def logits(fast: Any, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = fast(**inputs).logits.detach()
    return found


@pytest.mark.parametrize("option", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"])
def test_every_call_and_every_text_drops_other_numbers(monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    # A batch of several parts, as far as a model in eval mode computes it.
    monkeypatch.setattr(engine, "CPU_TOKENS_PER_PASS", 16)
    fast = only("bert", "BertForSequenceClassification", option)
    ids = torch.randint(5, 60, (12,)).expand(6, 12)
    torch.manual_seed(1)
    first, second = logits(fast, {"input_ids": ids}), logits(fast, {"input_ids": ids})
    rows = torch.cat((first, second))
    assert rows.unique(dim=0).shape == rows.shape


def test_a_model_that_drops_nothing_draws_nothing() -> None:
    model = quiet()
    fast = fastcls.optimize(model).train()
    before = torch.get_rng_state()
    logits(fast, inputs_of(model, "BertForSequenceClassification"))
    assert torch.equal(torch.get_rng_state(), before)
