"""What transformers sees: signatures, outputs, losses, names of weights; one class for each task."""

from collections.abc import Mapping

from ..engine.spec import Task
from .base import FastModel
from .classification import FastClassifier, FastMultipleChoice, FastNextSentencePredictor, Labelled
from .embeddings import FastEncoder
from .masked_lm import FastMaskedLM, FastMaskedLMOutput
from .tokens import FastQuestionAnswerer, FastTokenClassifier

__all__ = [
    "TASKS",
    "FastClassifier",
    "FastEncoder",
    "FastMaskedLM",
    "FastMaskedLMOutput",
    "FastModel",
    "FastMultipleChoice",
    "FastNextSentencePredictor",
    "FastQuestionAnswerer",
    "FastTokenClassifier",
    "Labelled",
]

TASKS: Mapping[Task, type[FastModel]] = {
    "sequence classification": FastClassifier,
    "next sentence prediction": FastNextSentencePredictor,
    "multiple choice": FastMultipleChoice,
    "masked language modelling": FastMaskedLM,
    "token classification": FastTokenClassifier,
    "question answering": FastQuestionAnswerer,
    "encoder": FastEncoder,
}
