"""Each task's module: which rows it computes, where they come back, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import tiny_bert, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertModel
from transformers.modeling_outputs import (
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    NextSentencePredictorOutput,
    QuestionAnsweringModelOutput,
    TokenClassifierOutput,
)

import fastcls
from fastcls import FastEncoder, FastMaskedLM

MASK_ID = 4
MASK = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] + [0] * 8])
LEFT_PADDED = MASK.flip(1)


def batch(mask: Tensor = MASK) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"input_ids": torch.randint(5, 199, mask.shape), "attention_mask": mask}


def bert(model_class: str, **overrides: Any) -> Any:
    return tiny_model(f"Bert{model_class}", "bert", **overrides)


def close(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= 1e-5)


def assert_is(output: Any, expected: type) -> None:
    # A function of its own, so that the type checker goes on taking outputs as they come.
    assert isinstance(output, expected)


@torch.no_grad()
def run(model: Any, **inputs: Any) -> Any:
    return model(**inputs)


# Masked language modelling


def masked_batch() -> dict[str, Tensor]:
    inputs = batch()
    inputs["input_ids"][0, [2, 5, 8]] = MASK_ID
    inputs["input_ids"][1, 3] = MASK_ID
    # What stands under padding is not predicted.
    inputs["input_ids"][1, 6] = MASK_ID
    return inputs


MASKED_ROWS = [[0, 2], [0, 5], [0, 8], [1, 3]]


def test_masked_rows_alone_are_predicted() -> None:
    model = bert("ForMaskedLM")
    fast = fastcls.optimize(model, mask_token_id=MASK_ID, dense=False)
    assert isinstance(fast, FastMaskedLM)
    output = run(fast, **masked_batch())
    assert_is(output, MaskedLMOutput)
    assert output.rows.tolist() == MASKED_ROWS
    assert close(output.logits, run(model, **masked_batch()).logits[tuple(output.rows.T)])


def test_dense_logits_stand_at_their_places() -> None:
    model = bert("ForMaskedLM")
    fast = fastcls.optimize(model, mask_token_id=MASK_ID)
    output = run(fast, **masked_batch())
    places = tuple(output.rows.T)
    assert close(output.logits[places], run(model, **masked_batch()).logits[places])
    output.logits[places] = 0
    assert not bool(output.logits.any()), "what is not predicted is zero"


def test_without_a_mask_token_every_token_is_predicted() -> None:
    model = bert("ForMaskedLM")
    output = run(fastcls.optimize(model), **masked_batch())
    kept = MASK.bool()
    assert close(output.logits[kept], run(model, **masked_batch()).logits[kept])
    assert output.rows.tolist() == kept.nonzero().tolist()


@pytest.mark.parametrize("dense", [True, False])
def test_labels_say_what_is_predicted_and_give_the_loss(dense: bool) -> None:
    model = bert("ForMaskedLM")
    labels = torch.full_like(MASK, -100)
    labels[0, 1], labels[0, 7], labels[2, 0] = 11, 22, 33
    expected = run(model, **masked_batch(), labels=labels)
    # Even where masks stand elsewhere.
    output = run(fastcls.optimize(model, mask_token_id=MASK_ID, dense=dense), **masked_batch(), labels=labels)
    assert output.rows.tolist() == [[0, 1], [0, 7], [2, 0]]
    assert close(output.loss, expected.loss)
    places = tuple(output.rows.T)
    assert close(output.logits[places] if dense else output.logits, expected.logits[places])


@pytest.mark.parametrize("dense", [True, False])
def test_nothing_to_predict(dense: bool) -> None:
    fast = fastcls.optimize(bert("ForMaskedLM"), mask_token_id=MASK_ID, dense=dense)
    for inputs, shape in ((batch(), (3, 9)), ({"input_ids": torch.zeros(0, 9, dtype=torch.long)}, (0, 9))):
        output = run(fast, **inputs)
        assert output.logits.shape == ((*shape, 199) if dense else (0, 199))
        assert not bool(output.logits.any())
        assert output.rows.shape == (0, 2)


@pytest.mark.parametrize("last_layer", ["full", "selected", "absorbed"])
def test_many_masks_in_many_passes(last_layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcls.engine.engine.CPU_TOKENS_PER_PASS", 50)
    monkeypatch.setattr("fastcls.engine.engine.GPU_TOKENS_PER_PASS", 50)
    model = bert("ForMaskedLM")
    lengths = torch.randint(1, 30, (40,))
    inputs = batch((torch.arange(30) < lengths[:, None]).long())
    inputs["input_ids"] = inputs["input_ids"].masked_fill(torch.rand(40, 30) < 0.3, MASK_ID)
    fast = fastcls.optimize(model, mask_token_id=MASK_ID, dense=False, last_layer=last_layer)
    output = run(fast, **inputs)
    assert close(output.logits, run(model, **inputs).logits[tuple(output.rows.T)])


class CountVocabularyRows(TorchDispatchMode):
    """Counts the rows of products whose result has a column for each word."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(name in str(func) for name in ("linear", "mm")) and isinstance(out, Tensor) and out.shape[-1] == 199:
            self.rows += out.shape[0]
        return out


def test_the_vocabulary_is_multiplied_with_masked_rows_alone() -> None:
    fast = fastcls.optimize(bert("ForMaskedLM"), mask_token_id=MASK_ID)
    with CountVocabularyRows() as counted:
        run(fast, **masked_batch())
    assert counted.rows == len(MASKED_ROWS)


# Every row


def test_token_classification() -> None:
    model = bert("ForTokenClassification")
    fast = fastcls.optimize(model)
    labels = torch.where(MASK.bool(), torch.arange(9) % 3, -100)
    expected, output = run(model, **batch(), labels=labels), run(fast, **batch(), labels=labels)
    assert_is(output, TokenClassifierOutput)
    assert close(output.loss, expected.loss)
    kept = MASK.bool()
    assert close(output.logits[kept], expected.logits[kept])
    assert not bool(output.logits[~kept].any())


def test_question_answering_finds_no_answer_in_padding() -> None:
    model = bert("ForQuestionAnswering")
    fast = fastcls.optimize(model)
    output, expected = run(fast, **batch()), run(model, **batch())
    assert_is(output, QuestionAnsweringModelOutput)
    kept = MASK.bool()
    assert close(output.start_logits[kept], expected.start_logits[kept])
    assert close(output.end_logits[kept], expected.end_logits[kept])
    assert bool((output.start_logits.softmax(1)[~kept] == 0).all())
    assert bool((output.end_logits.softmax(1)[~kept] == 0).all())


def test_question_answering_loss() -> None:
    model = bert("ForQuestionAnswering")
    inputs = batch(torch.ones_like(MASK))
    positions = {"start_positions": torch.tensor([1, 2, 99]), "end_positions": torch.tensor([[3], [2], [4]])}
    expected = run(model, **inputs, **positions)
    assert close(run(fastcls.optimize(model), **inputs, **positions).loss, expected.loss)


@pytest.mark.parametrize("model_class", ["ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM", "Model"])
def test_heads_that_read_every_row_take_any_mask(model_class: str) -> None:
    model = bert(model_class)
    fast = fastcls.optimize(model)
    kept = LEFT_PADDED.bool()
    for name, answer in run(fast, **batch(LEFT_PADDED)).items():
        if name not in ("rows", "pooler_output"):
            assert close(answer[kept], run(model, **batch(LEFT_PADDED))[name][kept])


# One row a text


def test_next_sentence_prediction() -> None:
    model = bert("ForNextSentencePrediction")
    labels = torch.tensor([0, 1, 1])
    inputs = {**batch(), "token_type_ids": (torch.arange(9) > 2).long().expand(3, 9)}
    expected = run(model, **inputs, labels=labels)
    output = run(fastcls.optimize(model), **inputs, labels=labels)
    assert_is(output, NextSentencePredictorOutput)
    assert close(output.logits, expected.logits)
    assert close(output.loss, expected.loss)


def test_multiple_choice() -> None:
    model = bert("ForMultipleChoice")
    inputs = {name: tensor.view(1, 3, 9).repeat(2, 1, 1) for name, tensor in batch().items()}
    inputs["input_ids"][1] += 1
    labels = torch.tensor([2, 0])
    expected = run(model, **inputs, labels=labels)
    output = run(fastcls.optimize(model), **inputs, labels=labels)
    assert_is(output, MultipleChoiceModelOutput)
    assert close(output.logits, expected.logits)
    assert close(output.loss, expected.loss)


# Encoders


def test_an_encoder_stands_in_for_the_model() -> None:
    model = bert("Model")
    fast = fastcls.optimize(model)
    assert isinstance(fast, FastEncoder)
    output, expected = run(fast, **batch()), run(model, **batch())
    kept = MASK.bool()
    assert close(output.last_hidden_state[kept], expected.last_hidden_state[kept])
    assert not bool(output.last_hidden_state[~kept].any())
    assert close(output.pooler_output, expected.pooler_output)
    assert all(close(*each) for each in zip(run(fast, **batch(), return_dict=False), output.to_tuple(), strict=True))


@pytest.mark.parametrize("how", ["attribute", "argument"])
def test_first_tokens_alone(how: str) -> None:
    model = bert("Model")
    fast = fastcls.optimize(model, select="first" if how == "attribute" else "all")
    more = {} if how == "attribute" else {"select": "first"}
    output, expected = run(fast, **batch(), **more), run(model, **batch())
    assert close(output.last_hidden_state, expected.last_hidden_state[:, :1])
    assert close(output.pooler_output, expected.pooler_output)


def test_a_mask_of_tokens_alone() -> None:
    model = bert("Model")
    wanted = MASK.bool() & (torch.arange(9) % 2 == 1)
    output = run(fastcls.optimize(model), **batch(), select=wanted)
    assert close(output.last_hidden_state, run(model, **batch()).last_hidden_state[wanted])
    assert output.pooler_output is None
    nothing = run(fastcls.optimize(model), **batch(), select=torch.zeros_like(wanted))
    assert nothing.last_hidden_state.shape == (0, 64)


def test_a_model_without_a_pooler() -> None:
    model = BertModel(bert("Model").config, add_pooling_layer=False).eval()
    assert run(fastcls.optimize(model), **batch()).pooler_output is None


@pytest.mark.parametrize(
    "model", [("BertModel", "bert"), ("ModernBertModel", "modernbert")], ids=["bert", "modernbert"]
)
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_embeddings(model: tuple[str, str], pooling: Any) -> None:
    theirs = tiny_model(*model, attn_implementation="eager")
    fast = fastcls.optimize(theirs)
    states, mask = run(theirs, **batch()).last_hidden_state, MASK[..., None]
    expected = states[:, 0] if pooling == "first" else (states * mask).sum(1) / mask.sum(1)
    ids = [row[:length] for row, length in zip(batch()["input_ids"].tolist(), MASK.sum(1).tolist(), strict=True)]
    assert close(fast.embeddings_of(ids, pooling=pooling), expected)
    assert fast.embeddings_of([], pooling=pooling).shape == (0, 64)


def test_packed_tokens_give_what_the_task_gives() -> None:
    ids = [[5, 6, 7], [8] * 20, [9]]
    shapes = {
        "ForSequenceClassification": (3, 3),
        "ForTokenClassification": (24, 3),
        "ForMaskedLM": (24, 199),
        "Model": (24, 64),
    }
    for model_class, shape in shapes.items():
        fast = fastcls.optimize(bert(model_class))
        (packed,) = fast.pack(ids)
        assert fast.forward_packed(packed).shape == shape


def test_empty_batches() -> None:
    empty = torch.zeros(0, 5, dtype=torch.long)
    assert run(fastcls.optimize(bert("ForTokenClassification")), input_ids=empty).logits.shape == (0, 5, 3)
    assert run(fastcls.optimize(bert("ForQuestionAnswering")), input_ids=empty).start_logits.shape == (0, 5)
    assert run(fastcls.optimize(bert("ForMultipleChoice")), input_ids=empty[:, None]).logits.shape == (0, 1)
    output = run(fastcls.optimize(bert("Model")), input_ids=empty)
    assert output.last_hidden_state.shape == (0, 5, 64)
    assert output.pooler_output.shape == (0, 64)


# What is refused

BAD: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "labels_of_padding": (
        "ForTokenClassification",
        {"labels": torch.zeros(3, 9, dtype=torch.long)},
        ValueError,
        "labels must be -100 where attention_mask is 0",
    ),
    "labels_of_another_shape": (
        "ForMaskedLM",
        {"labels": torch.zeros(3, 8, dtype=torch.long)},
        ValueError,
        r"labels must have the batch's shape \(3, 9\), got \(3, 8\)",
    ),
    "starts_of_another_batch": (
        "ForQuestionAnswering",
        {"start_positions": torch.zeros(2), "end_positions": torch.zeros(3)},
        ValueError,
        r"start_positions must be one for each of the 3 texts, got \(2,\)",
    ),
    "pairs_of_another_batch": (
        "ForNextSentencePrediction",
        {"labels": torch.zeros(2, dtype=torch.long)},
        ValueError,
        r"labels must be one for each of the 3 pairs, got \(2,\)",
    ),
    "choices_without_a_dimension": (
        "ForMultipleChoice",
        {},
        ValueError,
        r"input_ids must have 3 dimensions, \(batch, num_choices, seqlen, ...\), got \(3, 9\)",
    ),
    "left_padding": ("ForNextSentencePrediction", {"attention_mask": LEFT_PADDED}, ValueError, "first column"),
    "unknown_select": ("Model", {"select": "last"}, ValueError, "select must be 'all', 'first' or a boolean mask"),
    "select_of_integers": ("Model", {"select": MASK}, TypeError, "select must be a boolean mask, got torch.int64"),
    "select_of_another_shape": (
        "Model",
        {"select": torch.ones(3, 8).bool()},
        ValueError,
        r"select must have the batch's shape \(3, 9\)",
    ),
    "select_of_padding": (
        "Model",
        {"select": torch.ones(3, 9).bool()},
        ValueError,
        "select must be False where attention_mask is 0",
    ),
    "hidden_states": ("Model", {"output_hidden_states": True}, ValueError, "output_hidden_states must be False"),
    "states_of_another_encoder": (
        "ForMaskedLM",
        {"encoder_hidden_states": torch.zeros(1)},
        TypeError,
        "no argument encoder_hidden_states: fastcls does not compute with it",
    ),
    "mistyped_argument": (
        "ForSequenceClassification",
        {"attention_masks": torch.ones(3, 9)},
        TypeError,
        "no argument attention_masks: is attention_mask meant?",
    ),
}


@pytest.mark.parametrize(("model_class", "more", "error", "message"), list(BAD.values()), ids=list(BAD))
def test_bad_input_is_named_before_anything_is_computed(
    model_class: str, more: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = fastcls.optimize(bert(model_class))
    monkeypatch.setattr(fast.encoder, "forward", lambda *_: pytest.fail("computed before it was checked"))
    with pytest.raises(error, match=message):
        fast(**{**batch(), **more})


def test_three_labels_are_no_answer() -> None:
    fast = fastcls.optimize(bert("ForQuestionAnswering", num_labels=3))
    with pytest.raises(ValueError, match=r"config\.num_labels must be 2 for question answering, got 3"):
        fast(**batch())


OPTIONS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "mask_token_of_a_classifier": (tiny_bert, {"mask_token_id": 4}, "must be left out for sequence classification"),
    "sparse_classifier": (tiny_bert, {"dense": False}, "must be left out for sequence classification"),
    "select_of_a_classifier": (tiny_bert, {"select": "first"}, "select must be left out for sequence classification"),
    "unknown_select": (lambda: bert("Model"), {"select": "last"}, "select must be 'all' or 'first', got 'last'"),
    "mask_token_outside": (
        lambda: bert("ForMaskedLM"),
        {"mask_token_id": 199},
        "mask_token_id must lie from 0 to 198, got 199",
    ),
}


@pytest.mark.parametrize(("make", "options", "message"), list(OPTIONS.values()), ids=list(OPTIONS))
def test_options_of_another_task_are_refused(make: Callable[[], Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastcls.optimize(make(), **options)


def test_unknown_pooling_is_named() -> None:
    with pytest.raises(ValueError, match="pooling must be one of first, mean, got 'max'"):
        fastcls.optimize(bert("Model")).embeddings_of([[1]], pooling="max")
