"""ALBERT (Lan et al., 2019): BERT whose layers share weights, with small embeddings that a projection widens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import AlbertConfig

from ..engine.spec import EncoderSpec, HeadSpec
from . import bert
from .family import Built, Family, HeadOf, Names, activation_built, activation_of, layer_modules

_LAYER: Names = {
    "qkv": ("attention.query", "attention.key", "attention.value"),
    "out": "attention.dense",
    "attention_norm": "attention.LayerNorm",
    "up": "ffn",
    "down": "ffn_output",
    "output_norm": "full_layer_layer_norm",
}


def _layer(encoder: Any) -> Any:
    return encoder.encoder.albert_layer_groups[0].albert_layers[0]


# ALBERT reads the order and number of its layers from the config at each call.
_BUILT: Built = {
    **{name: read for name, read in bert.BUILT.items() if name != "num_hidden_layers"},
    "num_attention_heads": lambda encoder, _: _layer(encoder).attention.num_attention_heads,
    "hidden_act": lambda encoder, config: activation_built(_layer(encoder).activation, config.hidden_act),
}


def _spec(config: AlbertConfig) -> EncoderSpec:
    layers, groups, inner = config.num_hidden_layers, config.num_hidden_groups, config.inner_group_num
    if not 1 <= groups <= layers:
        raise ValueError(f"config.num_hidden_groups must be from 1 to num_hidden_layers = {layers}, got {groups}")
    # Wherever a group runs, its inner layers run one after the other.
    order = tuple(int(layer / (layers / groups)) * inner + each for layer in range(layers) for each in range(inner))
    return replace(bert.spec(config), embedding_size=config.embedding_size, layers=order)


def _modules(config: AlbertConfig) -> Names:
    prefixes = (
        f"encoder.albert_layer_groups.{group}.albert_layers.{each}."
        for group in range(config.num_hidden_groups)
        for each in range(config.inner_group_num)
    )
    projection = {"embeddings.projection": "encoder.embedding_hidden_mapping_in"}
    return {**bert.EMBEDDINGS, **projection, **layer_modules(prefixes, _LAYER)}


def _masked_lm(config: AlbertConfig) -> HeadSpec:
    own = "predictions"
    names = {"dense": f"{own}.dense", "norm": f"{own}.LayerNorm", "out": f"{own}.decoder", "bias": f"{own}.bias"}
    activation = activation_of(config, "hidden_act")
    return HeadSpec("masked language modelling", names, activation=activation, eps=config.layer_norm_eps)


_CLASSIFIER = {"dense": "albert.pooler", "out": "classifier"}
_HEADS: dict[str, HeadOf] = {
    "AlbertForSequenceClassification": HeadSpec("sequence classification", _CLASSIFIER),
    "AlbertForMultipleChoice": HeadSpec("multiple choice", _CLASSIFIER),
    "AlbertForMaskedLM": _masked_lm,
    "AlbertForTokenClassification": HeadSpec("token classification", {"out": "classifier"}),
    "AlbertForQuestionAnswering": HeadSpec("question answering", {"out": "qa_outputs"}),
    "AlbertModel": HeadSpec("encoder", {"dense": "pooler"}),
}

FAMILY = Family(
    *("albert", "albert.", _spec, _modules, _HEADS, "BaseModelOutputWithPooling", _BUILT),
    read_at_calls=("num_hidden_layers", "num_hidden_groups"),
)
