"""Nomic BERT (Nussbaum et al., 2024): post-norm layers without biases, rotary positions, SiLU-gated feed-forwards."""

from __future__ import annotations

from typing import Any

from ..engine.spec import HeadSpec
from . import bert, gte
from .family import Built, Family, HeadOf, activation_of
from .rotary import frequencies

_BUILT: Built = {**gte.BUILT, "type_vocab_size": bert.BUILT["type_vocab_size"]}


def _masked_lm(config: Any) -> HeadSpec:
    own = "cls.predictions"
    names = {
        "dense": f"{own}.transform.dense",
        "norm": f"{own}.transform.layer_norm",
        "out": f"{own}.decoder",
        "bias": f"{own}.bias",
    }
    activation = activation_of(config, "hidden_act")
    return HeadSpec("masked language modelling", names, activation=activation, eps=config.layer_norm_eps)


_CLASSIFIER = {"dense": "nomic_bert.pooler.dense", "out": "classifier"}
_HEADS: dict[str, HeadOf] = {
    "NomicBertForSequenceClassification": HeadSpec("sequence classification", _CLASSIFIER),
    "NomicBertForMaskedLM": _masked_lm,
    "NomicBertForTokenClassification": HeadSpec("token classification", {"out": "classifier"}),
    "NomicBertModel": HeadSpec("encoder", {"dense": "pooler.dense"}),
}

FAMILY = Family(
    *("nomic_bert", "nomic_bert.", gte.spec, gte.modules, _HEADS),
    "BaseModelOutputWithPooling",
    _BUILT,
    frequencies,
    read_at_calls=("num_hidden_layers",),
)
