"""Checkpoints go through from_pretrained, optimize and save_pretrained and come back the same, head by head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import tiny_model
from torch import Tensor

import fastcls

HEADS = {
    "AutoModelForSequenceClassification": "BertForSequenceClassification",
    "AutoModelForTokenClassification": "BertForTokenClassification",
    "AutoModelForQuestionAnswering": "BertForQuestionAnswering",
    "AutoModelForMaskedLM": "BertForMaskedLM",
    "AutoModelForMultipleChoice": "BertForMultipleChoice",
    "AutoModelForNextSentencePrediction": "BertForNextSentencePrediction",
    "AutoModel": "BertModel",
}
IDS = torch.arange(36).view(4, 9) + 5


def _answers(model: Any) -> list[Tensor]:
    ids = IDS.view(2, 2, 9) if "MultipleChoice" in type(model).__name__ else IDS
    with torch.no_grad():
        return [each for each in model(ids).to_tuple() if each.is_floating_point()]


@pytest.mark.parametrize(("auto_class", "model_class"), list(HEADS.items()), ids=list(HEADS.values()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_checkpoint_comes_back_the_same(
    auto_class: str, model_class: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="transformers' device_map needs accelerate, which is not installed")
    auto = getattr(transformers, auto_class)
    tiny_model(model_class, "bert").save_pretrained(tmp_path / "first")
    loaded = auto.from_pretrained(tmp_path / "first", dtype=dtype, device_map="cpu")
    fast = fastcls.optimize(loaded)
    assert fast.dtype == dtype
    fast.save_pretrained(tmp_path / "second")
    again = auto.from_pretrained(tmp_path / "second")
    assert type(again).__name__ == model_class
    assert again.dtype == dtype
    assert again.state_dict().keys() == loaded.state_dict().keys()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    # The same weights in the same class: bit for bit the same answers.
    for one, other in zip(_answers(again), _answers(loaded), strict=True):
        assert torch.equal(one, other)
    if dtype == torch.float32:
        for one, other in zip(_answers(fast), _answers(loaded), strict=True):
            assert (one - other).abs().max() <= 1e-5
    for one, other in zip(_answers(fastcls.optimize(again)), _answers(fast), strict=True):
        assert torch.equal(one, other)


def test_labels_and_names_of_a_config_come_back(tmp_path: Path) -> None:
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    model = tiny_model("BertForSequenceClassification", "bert", **labels, num_labels=2)
    fastcls.optimize(model).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.id2label == labels["id2label"]
    assert config.architectures == ["BertForSequenceClassification"]
