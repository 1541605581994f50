"""transformers' Trainer evaluates and predicts with a fast model as with its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from support import tiny_model
from torch.utils.data import Dataset
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, Trainer, TrainingArguments

import fastcls

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate, which is not installed")

LENGTHS = [3, 17, 40, 5, 9, 28, 2, 11, 33, 7]


class Rows(Dataset[dict[str, Any]]):
    """Texts of token ids with their labels."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def _rows(**labels: Any) -> Rows:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(5, 199, (length,), generator=generator).tolist()
        row = {"input_ids": ids, "attention_mask": [1] * length, "token_type_ids": [0] * length}
        rows.append(row | {name: make(length, generator) for name, make in labels.items()})
    return Rows(rows)


def _integer(high: int) -> Any:
    return lambda _length, generator: int(torch.randint(high, (1,), generator=generator))


def _integers(high: int) -> Any:
    return lambda length, generator: torch.randint(high, (length,), generator=generator).tolist()


def _metrics(prediction: Any) -> dict[str, float]:
    scores, labels = prediction.predictions, prediction.label_ids
    return {"right": float((scores.argmax(-1) == labels).mean()), "mean": float(scores.mean())}


class Case:
    """A task, what its texts have for labels, and how they become a batch."""

    def __init__(self, head: str, rows: Rows, collator: type = DataCollatorWithPadding, **config: Any) -> None:
        self.head, self.rows, self.collator, self.config = head, rows, collator, config


CASES = {
    "classification": Case("ForSequenceClassification", _rows(labels=_integer(3))),
    "regression": Case(
        "ForSequenceClassification", _rows(labels=lambda *_: 0.5), num_labels=1, problem_type="regression"
    ),
    "tokens": Case("ForTokenClassification", _rows(labels=_integers(3)), DataCollatorForTokenClassification),
}


def _trainer(model: Any, case: Case, tokenizer: Any, folder: Path, **options: Any) -> Trainer:
    arguments = {"per_device_eval_batch_size": 4, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return Trainer(
        model,
        TrainingArguments(str(folder), **{**arguments, **options}),
        data_collator=case.collator(tokenizer),
        compute_metrics=_metrics,
    )


@pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))
def test_metrics_and_predictions_are_the_models_own(case: Case, minilm_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model(f"Bert{case.head}", "bert", **case.config)
    theirs = _trainer(model, case, minilm_tokenizer, tmp_path)
    ours = _trainer(fastcls.optimize(model), case, minilm_tokenizer, tmp_path)
    found, expected = (cast("Any", trainer.predict(case.rows)) for trainer in (ours, theirs))
    assert np.array_equal(found.label_ids, expected.label_ids)
    kept = np.ones(found.predictions.shape, dtype=bool)
    if case.head == "ForTokenClassification":
        # For padding transformers computes numbers that mean nothing, fastcls gives zeros.
        kept &= (expected.label_ids != -100)[..., None]
    assert np.abs(np.where(kept, found.predictions - expected.predictions, 0)).max() <= 1e-5
    ours_measured, theirs_measured = ours.evaluate(case.rows), theirs.evaluate(case.rows)
    for name in ("eval_loss", "eval_right"):
        assert ours_measured[name] == pytest.approx(theirs_measured[name], abs=1e-5)


def test_question_answering(minilm_tokenizer: Any, tmp_path: Path) -> None:
    case = Case("ForQuestionAnswering", _rows(start_positions=_integer(2), end_positions=_integer(2)))
    model = tiny_model("BertForQuestionAnswering", "bert")
    # Of classes that have this in their name, Trainer knows what labels they take.
    options = {"label_names": ["start_positions", "end_positions"]}
    theirs, ours = (
        _trainer(each, case, minilm_tokenizer, tmp_path, **options) for each in (model, fastcls.optimize(model))
    )
    theirs.compute_metrics = ours.compute_metrics = None
    found, expected = (trainer.predict(case.rows) for trainer in (ours, theirs))
    for one, other, length in zip(found.predictions[0], expected.predictions[0], LENGTHS, strict=True):
        assert np.abs(one[:length] - other[:length]).max() <= 1e-5


def test_masked_language_modelling(minilm_tokenizer: Any, tmp_path: Path) -> None:
    rows = _rows(labels=_integers(199))
    case = Case("ForMaskedLM", rows, DataCollatorForTokenClassification)
    model = tiny_model("BertForMaskedLM", "bert")
    theirs, ours = (_trainer(each, case, minilm_tokenizer, tmp_path) for each in (model, fastcls.optimize(model)))
    theirs.compute_metrics = ours.compute_metrics = None
    # Which tokens were predicted comes beside the logits, and is no prediction.
    found = cast("Any", ours.predict(rows, ignore_keys=["rows"]))
    expected = cast("Any", theirs.predict(rows))
    wanted = expected.label_ids != -100
    assert np.abs(found.predictions[wanted] - expected.predictions[wanted]).max() <= 1e-5
    assert found.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], abs=1e-5)
