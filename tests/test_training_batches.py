"""Training on unusual batches, and of models that nobody else holds: losses and gradients as the models' own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_training import ROUNDED, WINDOWED, assert_alike, gradients, inputs_of, quiet
from torch import Tensor

import fastcls

FAMILIES = [
    ("BertForSequenceClassification", "bert"),
    ("BertForTokenClassification", "bert"),
    ("MPNetForSequenceClassification", "mpnet"),
    ("MPNetForTokenClassification", "mpnet"),
    ("DebertaForSequenceClassification", "deberta"),
    ("DebertaV2ForSequenceClassification", "deberta-v2"),
    ("DebertaV2ForTokenClassification", "deberta-v2"),
    ("ModernBertForTokenClassification", "modernbert"),
]


def pair(model: Any) -> tuple[Any, Any]:
    """A model's copy and its fast one, both in training."""
    reference = copy.deepcopy(model).train()
    return reference, fastcls.optimize(model).train()


@pytest.mark.parametrize(("model_class", "family"), FAMILIES)
def test_masks_with_holes(model_class: str, family: str) -> None:
    model = quiet(model_class, family).double()
    model.set_attn_implementation("eager")
    inputs = inputs_of(model, model_class, lengths=(12,) * 4 if family in WINDOWED else (40, 31, 40, 36))
    # All texts have fewer tokens than those stand apart; in the short ones no more than a window takes.
    kept = torch.zeros_like(inputs["attention_mask"])
    kept[0, ::3] = kept[1, ::3] = kept[3, ::4] = 1
    kept[2, [0, 3, 5, 8]] = 1
    inputs["attention_mask"] *= kept
    mask = inputs["attention_mask"]
    if "labels" in inputs and inputs["labels"].shape == mask.shape:
        inputs["labels"][mask == 0] = -100
    reference, fast = pair(model)
    assert_alike(fast, reference, inputs, 1e-5 if family in ROUNDED else 1e-10)


@pytest.mark.parametrize(
    ("model_class", "family"),
    [
        ("BertForSequenceClassification", "bert"),
        ("RobertaForSequenceClassification", "roberta"),
        ("ModernBertForSequenceClassification", "modernbert"),
        ("DebertaV2ForSequenceClassification", "deberta-v2"),
    ],
)
def test_a_padding_token_inside_a_text_trains_no_embedding(model_class: str, family: str) -> None:
    model = quiet(model_class, family).double()
    model.set_attn_implementation("eager")
    padding = model.config.pad_token_id
    inputs = inputs_of(model, model_class, lengths=(9, 9, 9, 9))
    inputs["input_ids"][1, 3:5] = padding
    reference, fast = pair(model)
    assert_alike(fast, reference, inputs, 1e-5 if family in ROUNDED else 1e-10)
    table = fast.get_input_embeddings().weight
    assert not bool(table.grad[padding].any())
    assert bool(table.grad[inputs["input_ids"][0, 1]].any())


@pytest.mark.parametrize(("model_class", "family"), [FAMILIES[0], ("DistilBertForMaskedLM", "distilbert")])
def test_embeddings_that_a_caller_gives(model_class: str, family: str) -> None:
    model = quiet(model_class, family).double()
    reference, fast = pair(model)
    inputs = inputs_of(model, model_class)
    ids = inputs.pop("input_ids")
    if family == "bert":
        inputs["token_type_ids"] = (torch.arange(ids.shape[1]) > 4).long().expand_as(ids)
    found = []
    for each in (reference, fast):
        given = reference.get_input_embeddings()(ids).detach().requires_grad_()
        gradients(each, {**inputs, "inputs_embeds": given})
        assert given.grad is not None
        found.append(given.grad)
        assert not bool(given.grad[inputs["attention_mask"] == 0].any())
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    ("model_class", "family"),
    [("BertForMaskedLM", "bert"), ("ModernBertForMaskedLM", "modernbert"), ("DebertaV2ForMaskedLM", "deberta-v2")],
)
def test_a_batch_without_labels_has_gradients_of_zero(model_class: str, family: str) -> None:
    model = quiet(model_class, family)
    inputs = inputs_of(model, model_class, lengths=(9, 9, 9, 9))
    inputs["labels"].fill_(-100)
    # A mean over no token is NaN, in transformers too; the Trainer's share of a step's tokens is 0.
    options = {"num_items_in_batch": torch.tensor(7)} if family == "modernbert" else {}
    for each in pair(model):
        loss = each(**inputs, **options).loss
        assert bool(loss.detach() == 0) if options else bool(loss.isnan())
        loss.backward()
        assert all(weight.grad is not None and not bool(weight.grad.any()) for weight in each.parameters())


def names_of_frozen(model: torch.nn.Module) -> list[str]:
    return [name for name, weight in model.named_parameters() if not weight.requires_grad]


def released(model: Any) -> Any:
    return fastcls.optimize(model, release=True)


def in_another_dtype(model: Any) -> Any:
    return fastcls.optimize(model).double()


def frozen_behind_it(model: Any) -> Any:
    fast = fastcls.optimize(model.requires_grad_(True))
    freeze(model)
    return fast


def detached(model: Any) -> Any:
    fast = fastcls.optimize(model)
    fast.stop_following()
    return fast


def freeze(model: Any) -> None:
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[1].attention.self.key.requires_grad_(False)


@pytest.mark.parametrize(
    "made",
    [
        *(fastcls.optimize, released, in_another_dtype, frozen_behind_it, detached),
        lambda model: copy.deepcopy(fastcls.optimize(model)),
        lambda model: copy.deepcopy(fastcls.optimize(model).train()),
        lambda model: pickle.loads(pickle.dumps(fastcls.optimize(model))),
    ],
    ids=["given", "released", "dtype", "later", "detached", "copied", "copied_in_training", "pickled"],
)
def test_what_was_frozen_stays_frozen_where_nobody_holds_the_model(made: Callable[[Any], Any]) -> None:
    model = quiet()
    freeze(model)
    wanted = names_of_frozen(model)
    inputs = inputs_of(model, "BertForSequenceClassification")
    fast = made(model)
    del model
    fast.train()
    assert names_of_frozen(fast) == wanted
    fast(**inputs).loss.backward()
    assert [name for name, weight in fast.named_parameters() if weight.grad is None] == wanted


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    ("model_class", "family"), [("BertForMaskedLM", "bert"), ("XLMRobertaForMaskedLM", "xlm-roberta")]
)
def test_tied_weights_stay_one_where_nobody_holds_the_model(model_class: str, family: str, copied: bool) -> None:
    model = quiet(model_class, family).double()
    inputs = inputs_of(model, model_class)
    reference = copy.deepcopy(model).train()
    fast = fastcls.optimize(model)
    del model
    fast = copy.deepcopy(fast) if copied else fast
    assert_alike(fast.train(), reference, inputs, 1e-10)
    for each in (reference, fast):
        torch.optim.SGD(each.parameters(), lr=0.01).step()
        each.zero_grad()
    assert_alike(fast, reference, inputs, 1e-10)
    with torch.no_grad():
        expected = reference.eval()(**inputs).logits
    found = fast.eval()(**inputs)
    places = tuple(found.rows.T)
    torch.testing.assert_close(found.logits[places], expected[places], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("trains", [False, True])
def test_positions_that_are_computed_are_trained_where_the_model_trains_them(trains: bool) -> None:
    model = quiet("DistilBertForSequenceClassification", "distilbert", sinusoidal_pos_embds=True).double()
    model.distilbert.embeddings.position_embeddings.requires_grad_(trains)
    reference = copy.deepcopy(model).train()
    inputs = inputs_of(model, "DistilBertForSequenceClassification")
    fast = fastcls.optimize(model)
    del model
    assert_alike(fast.train(), reference, inputs, 1e-10)
    assert names_of_frozen(fast) == names_of_frozen(reference)
    assert bool(names_of_frozen(fast)) == (not trains)


def test_a_group_that_layers_share_gets_all_their_gradients() -> None:
    model = quiet("AlbertForSequenceClassification", "albert", num_hidden_groups=1, num_hidden_layers=4).double()
    reference, fast = pair(model)
    assert_alike(fast, reference, inputs_of(model, "AlbertForSequenceClassification"), 1e-10)


def test_gradients_add_up_over_batches_and_layers_computed_again() -> None:
    model = quiet().double()
    reference, fast = pair(model)
    fast.activation_checkpointing_enable()
    for seed in range(2):
        inputs = inputs_of(model, "BertForSequenceClassification", seed)
        for each in (reference, fast):
            (each(**inputs).loss / 2).backward()
    ours: dict[str, Tensor | None] = {name: weight.grad for name, weight in fast.named_parameters()}
    for name, weight in reference.named_parameters():
        torch.testing.assert_close(ours[name], weight.grad, rtol=1e-7, atol=1e-10)
