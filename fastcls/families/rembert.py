"""RemBERT (Chung et al., 2020): BERT with small embeddings that a projection widens, and wide ones for its masks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..engine.spec import EncoderSpec, HeadSpec
from . import bert
from .family import Family, HeadOf, Names, activation_of


def _spec(config: Any) -> EncoderSpec:
    return replace(bert.spec(config), embedding_size=config.input_embedding_size)


def _modules(config: Any) -> Names:
    return {**bert.modules(config), "embeddings.projection": "encoder.embedding_hidden_mapping_in"}


def _masked_lm(config: Any) -> HeadSpec:
    own = "cls.predictions"
    names = {"dense": f"{own}.dense", "norm": f"{own}.LayerNorm", "out": f"{own}.decoder"}
    activation = activation_of(config, "hidden_act")
    return HeadSpec("masked language modelling", names, activation=activation, eps=config.layer_norm_eps)


_HEADS: dict[str, HeadOf] = {**bert.heads("RemBert", "rembert"), "RemBertForMaskedLM": _masked_lm}
del _HEADS["RemBertForNextSentencePrediction"]

FAMILY = Family(
    *("rembert", "rembert.", _spec, _modules, _HEADS),
    *("BaseModelOutputWithPoolingAndCrossAttentions", bert.BUILT),
)
