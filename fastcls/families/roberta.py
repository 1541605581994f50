"""RoBERTa (Liu et al., 2019), XLM-RoBERTa, CamemBERT and data2vec: BERT whose positions begin behind the padding's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..engine.spec import EncoderSpec, HeadSpec
from . import bert
from .family import Built, Family, HeadOf

BUILT: Built = {**bert.BUILT, "pad_token_id": lambda encoder, _: encoder.embeddings.padding_idx}


def spec(config: Any) -> EncoderSpec:
    """Reads a RobertaConfig, or a relative's."""
    read, first = bert.spec(config), config.pad_token_id + 1
    return replace(read, max_positions=read.position_rows - first, first_position=first, padding_id=config.pad_token_id)


def masked_lm(config: Any) -> HeadSpec:
    """RoBERTa's head for masks, and that of its relatives."""
    names = {"dense": "lm_head.dense", "norm": "lm_head.layer_norm", "out": "lm_head.decoder", "bias": "lm_head.bias"}
    return HeadSpec("masked language modelling", names, activation="gelu", eps=config.layer_norm_eps)


def heads(classes: str, encoder: str) -> dict[str, HeadOf]:
    """RoBERTa's heads: for classes whose names begin so, and hold their encoder under a name."""
    classifier = {"dense": "classifier.dense", "out": "classifier.out_proj"}
    choice = {"dense": f"{encoder}.pooler.dense", "out": "classifier"}
    return {
        f"{classes}ForSequenceClassification": HeadSpec("sequence classification", classifier),
        f"{classes}ForMultipleChoice": HeadSpec("multiple choice", choice),
        f"{classes}ForMaskedLM": masked_lm,
        f"{classes}ForTokenClassification": HeadSpec("token classification", {"out": "classifier"}),
        f"{classes}ForQuestionAnswering": HeadSpec("question answering", {"out": "qa_outputs"}),
        f"{classes}Model": HeadSpec("encoder", {"dense": "pooler.dense"}),
    }


def _family(model_type: str, classes: str, encoder: str = "roberta") -> Family:
    output = "BaseModelOutputWithPoolingAndCrossAttentions"
    return Family(model_type, f"{encoder}.", spec, bert.modules, heads(classes, encoder), output, BUILT)


FAMILIES = (
    _family("roberta", "Roberta"),
    _family("xlm-roberta", "XLMRoberta"),
    _family("camembert", "Camembert"),
    _family("data2vec-text", "Data2VecText", "data2vec_text"),
)
