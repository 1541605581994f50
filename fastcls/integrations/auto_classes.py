"""Our classes in transformers' auto classes, so that its pipelines know each one's task."""

from __future__ import annotations

from typing import Any, cast

from transformers import (
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)

from ..models import (
    FastClassifier,
    FastMaskedLM,
    FastMultipleChoice,
    FastNextSentencePredictor,
    FastQuestionAnswerer,
    FastTokenClassifier,
)

_FAST = {
    AutoModelForSequenceClassification: FastClassifier,
    AutoModelForTokenClassification: FastTokenClassifier,
    AutoModelForQuestionAnswering: FastQuestionAnswerer,
    AutoModelForMaskedLM: FastMaskedLM,
    AutoModelForMultipleChoice: FastMultipleChoice,
    AutoModelForNextSentencePrediction: FastNextSentencePredictor,
}


class _FastConfig(PreTrainedConfig):
    """Our classes are registered under this config. No checkpoint has it, so that none is loaded as one of them."""

    model_type = "fastcls"


def register_auto_classes() -> None:
    """Registers our classes: a pipeline logs an error about a model whose class is not registered for its task."""
    for auto_class, fast_class in _FAST.items():
        cast("Any", auto_class).register(_FastConfig, fast_class, exist_ok=True)
