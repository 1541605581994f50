"""RoBERTa (Liu et al., 2019), XLM-RoBERTa and CamemBERT: BERT whose positions begin after the padding token's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..engine.spec import EncoderSpec, HeadSpec
from . import bert
from .family import Built, Family, HeadOf

_BUILT: Built = {**bert.BUILT, "pad_token_id": lambda encoder, _: encoder.embeddings.padding_idx}


def _spec(config: Any) -> EncoderSpec:
    spec, first = bert.spec(config), config.pad_token_id + 1
    return replace(spec, max_positions=spec.position_rows - first, first_position=first, padding_id=config.pad_token_id)


def _masked_lm(config: Any) -> HeadSpec:
    names = {"dense": "lm_head.dense", "norm": "lm_head.layer_norm", "out": "lm_head.decoder", "bias": "lm_head.bias"}
    return HeadSpec("masked language modelling", names, activation="gelu", eps=config.layer_norm_eps)


def _family(model_type: str, names: str) -> Family:
    classifier = {"dense": "classifier.dense", "out": "classifier.out_proj"}
    choice = {"dense": "roberta.pooler.dense", "out": "classifier"}
    heads: dict[str, HeadOf] = {
        f"{names}ForSequenceClassification": HeadSpec("sequence classification", classifier),
        f"{names}ForMultipleChoice": HeadSpec("multiple choice", choice),
        f"{names}ForMaskedLM": _masked_lm,
        f"{names}ForTokenClassification": HeadSpec("token classification", {"out": "classifier"}),
        f"{names}ForQuestionAnswering": HeadSpec("question answering", {"out": "qa_outputs"}),
        f"{names}Model": HeadSpec("encoder", {"dense": "pooler.dense"}),
    }
    output = "BaseModelOutputWithPoolingAndCrossAttentions"
    return Family(model_type, "roberta.", _spec, bert.modules, heads, output, _BUILT)


FAMILIES = (
    _family("roberta", "Roberta"),
    _family("xlm-roberta", "XLMRoberta"),
    _family("camembert", "Camembert"),
)
