"""SetFit trains a fast body as it trains sentence-transformers' own, with either head."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import quiet
from transformers import PreTrainedTokenizerBase

import fastcls

setfit = pytest.importorskip("setfit", reason="setfit is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")
sentence_transformers = pytest.importorskip("sentence_transformers")
models = pytest.importorskip("sentence_transformers.models")

GOOD = ["a charming journey", "visually stunning", "told with care", "a fine and moving film"]
BAD = ["unflinchingly bleak", "it will not hold", "dull and desperate", "a tired and empty film"]
STEPS = 6


def _body(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Any:
    quiet("BertModel", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    encoder = models.Transformer(str(folder), max_seq_length=64)
    return sentence_transformers.SentenceTransformer(modules=[encoder, models.Pooling(64)], device="cpu")


def _trained(model: Any, folder: Path, *, end_to_end: bool) -> tuple[list[float], Any]:
    """Losses of the body's training, and probabilities of texts behind all of it."""
    rows = datasets.Dataset.from_dict({"text": GOOD + BAD, "label": [1] * len(GOOD) + [0] * len(BAD)})
    arguments = setfit.TrainingArguments(
        output_dir=str(folder),
        batch_size=4,
        num_epochs=1,
        max_steps=STEPS,
        report_to="none",
        seed=1,
        body_learning_rate=1e-4,
        head_learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        end_to_end=end_to_end,
        show_progress_bar=False,
    )
    random.seed(0)
    np.random.seed(0)  # SetFit draws from it.
    torch.manual_seed(0)
    trainer = setfit.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    history = trainer.st_trainer.state.log_history
    return [each["embedding_loss"] for each in history if "embedding_loss" in each], model.predict_proba(GOOD + BAD)


@pytest.mark.full
@pytest.mark.parametrize("head", ["logistic", "differentiable"])
def test_a_fast_body_is_trained_as_the_librarys_own(
    minilm_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, head: str
) -> None:
    made = _body(tmp_path / "given", minilm_tokenizer)
    results = []
    for is_fast in (False, True):
        torch.manual_seed(0)
        heads = {} if head == "logistic" else {"model_head": setfit.SetFitHead(in_features=64, out_features=2)}
        if head == "logistic":
            heads = {"model_head": pytest.importorskip("sklearn.linear_model").LogisticRegression()}
        model = setfit.SetFitModel(copy.deepcopy(made), **heads)
        if is_fast:
            model.model_body = fastcls.optimize(model.model_body).train()
        results.append(_trained(model, tmp_path / "trained", end_to_end=head != "logistic"))
    (expected, wanted), (losses, found) = results
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, rel=1e-5)
    # The head is fitted by iterations that stop where they may, and Adam's steps are not the losses'.
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(wanted), atol=1e-3, rtol=0)
    assert float(torch.as_tensor(wanted).std()) > 0.01
    model.save_pretrained(str(tmp_path / "saved"))
    again = setfit.SetFitModel.from_pretrained(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(
        torch.as_tensor(again.predict_proba(GOOD + BAD)), torch.as_tensor(found), atol=1e-4, rtol=0
    )


def test_a_body_that_was_not_set_to_training_is_refused(
    minilm_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = setfit.SetFitModel(fastcls.optimize(_body(tmp_path / "given", minilm_tokenizer)))
    with pytest.raises(RuntimeError, match=r"call train\(\) before the optimizer"):
        _trained(model, tmp_path / "trained", end_to_end=False)
