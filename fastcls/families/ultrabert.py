"""UltraBERT (2026): EuroBERT's layers, two with a local window for each that sees all tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..engine.spec import EncoderSpec, HeadSpec
from . import eurobert, modernbert
from .family import Family, HeadOf
from .rotary import with_rotary


def _spec(config: Any) -> EncoderSpec:
    spec = with_rotary(eurobert.spec(config, config.rms_norm_eps), config, config.layer_types)
    return replace(spec, windows=modernbert.windows(config))


def _classifier(config: Any) -> HeadSpec:
    pooling = modernbert.POOLINGS[config.classifier_pooling]
    return HeadSpec("sequence classification", {"out": "classifier"}, pooling)


_MASKED_LM = {"dense": "head.linear1", "inner": "head.linear2", "out": "head.decoder"}
_HEADS: dict[str, HeadOf] = {
    "UltrabertForSequenceClassification": _classifier,
    "UltrabertForMaskedLM": HeadSpec("masked language modelling", _MASKED_LM, activation="gelu_tanh"),
    "UltrabertForTokenClassification": HeadSpec("token classification", {"out": "classifier"}),
    "UltrabertForQuestionAnswering": HeadSpec("question answering", {"out": "qa_outputs"}),
    "UltrabertModel": HeadSpec("encoder", {}),
}

FAMILY = Family(
    *("ultrabert", "model.", _spec, eurobert.modules, _HEADS),
    *("BaseModelOutput", eurobert.RMS_BUILT, modernbert.buffers),
    read_at_calls=modernbert.READ_AT_CALLS,
)
