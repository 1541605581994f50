"""ELECTRA (Clark et al., 2020): BERT with small embeddings that a projection widens, and heads of its own."""

from __future__ import annotations

from dataclasses import replace

from transformers import ElectraConfig

from ..engine.spec import EncoderSpec, HeadSpec
from . import bert
from .family import Family, HeadOf, Names, activation_of, check_options


def _spec(config: ElectraConfig) -> EncoderSpec:
    return replace(bert.spec(config), embedding_size=config.embedding_size)


def _modules(config: ElectraConfig) -> Names:
    return {**bert.modules(config), "embeddings.projection": "embeddings_project"}


def _multiple_choice(config: ElectraConfig) -> HeadSpec:
    check_options(config, (("summary_type", "first"), ("summary_use_proj", True), ("summary_proj_to_labels", False)))
    names = {"dense": "sequence_summary.summary", "out": "classifier"}
    return HeadSpec("multiple choice", names, activation=activation_of(config, "summary_activation"))


def _masked_lm(config: ElectraConfig) -> HeadSpec:
    own = "generator_predictions"
    names = {"dense": f"{own}.dense", "norm": f"{own}.LayerNorm", "out": "generator_lm_head"}
    return HeadSpec("masked language modelling", names, activation="gelu", eps=config.layer_norm_eps)


_CLASSIFIER = {"dense": "classifier.dense", "out": "classifier.out_proj"}
_HEADS: dict[str, HeadOf] = {
    "ElectraForSequenceClassification": HeadSpec("sequence classification", _CLASSIFIER, activation="gelu"),
    "ElectraForMultipleChoice": _multiple_choice,
    "ElectraForMaskedLM": _masked_lm,
    "ElectraForTokenClassification": HeadSpec("token classification", {"out": "classifier"}),
    "ElectraForQuestionAnswering": HeadSpec("question answering", {"out": "qa_outputs"}),
    "ElectraModel": HeadSpec("encoder", {}),
}

FAMILY = Family(
    *("electra", "electra.", _spec, _modules, _HEADS), "BaseModelOutputWithPastAndCrossAttentions", bert.BUILT
)
