"""Jina Embeddings v3 (Sturua et al., 2024): XLM-RoBERTa with rotary positions; adapters must be merged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..engine.spec import EncoderSpec, HeadSpec
from . import bert, gte, roberta
from .family import Built, Family, HeadOf, Names, activation_built
from .rotary import frequencies, with_rotary

_LAYER: Names = {**gte.LAYER, "up": "mlp.fc1", "down": "mlp.fc2"}
_BUILT: Built = {
    **gte.BUILT,
    "type_vocab_size": bert.BUILT["type_vocab_size"],
    "hidden_act": lambda encoder, config: activation_built(encoder.layers[0].mlp.activation_fn, config.hidden_act),
}


def _spec(config: Any) -> EncoderSpec:
    return with_rotary(replace(bert.spec(config), position_rows=0), config)


def _modules(config: Any) -> Names:
    return gte.modules(config, _LAYER)


_CLASSIFIER = {"dense": "classifier.dense", "out": "classifier.out_proj"}
_HEADS: dict[str, HeadOf] = {
    "JinaEmbeddingsV3ForSequenceClassification": HeadSpec("sequence classification", _CLASSIFIER),
    "JinaEmbeddingsV3ForMaskedLM": roberta.masked_lm,
    "JinaEmbeddingsV3ForTokenClassification": HeadSpec("token classification", {"out": "classifier"}),
    "JinaEmbeddingsV3ForQuestionAnswering": HeadSpec("question answering", {"out": "qa_outputs"}),
    "JinaEmbeddingsV3Model": HeadSpec("encoder", {"dense": "pooler.dense"}),
}

FAMILY = Family(
    *("jina_embeddings_v3", "roberta.", _spec, _modules, _HEADS),
    "BaseModelOutputWithPooling",
    _BUILT,
    frequencies,
    read_at_calls=("num_hidden_layers",),
)
