"""GTE (Zhang et al., 2024): gte-multilingual and gte-v1.5: post-norm layers, rotary positions, gated feed-forwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..engine.spec import EncoderSpec, HeadSpec
from . import bert
from .family import Built, Family, HeadOf, Names, activation_built, layer_modules
from .rotary import frequencies, with_rotary

# Nomic's and Jina's, too.
LAYER: Names = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": "self_attn.o_proj",
    "attention_norm": "post_attention_layernorm",
    "up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": "mlp.down_proj",
    "output_norm": "post_mlp_layernorm",
}
# The number of layers is read from the config at each call.
BUILT: Built = {
    "vocab_size": bert.BUILT["vocab_size"],
    "layer_norm_eps": bert.BUILT["layer_norm_eps"],
    "num_attention_heads": lambda encoder, _: (
        encoder.layers[0].self_attn.q_proj.out_features // encoder.layers[0].self_attn.head_dim
    ),
    "hidden_act": lambda encoder, config: activation_built(encoder.layers[0].mlp.act_fn, config.hidden_act),
}
_BUILT: Built = {
    **BUILT,
    "type_vocab_size": lambda encoder, _: (
        0 if encoder.embeddings.token_type_embeddings is None else bert.BUILT["type_vocab_size"](encoder, _)
    ),
}


def spec(config: Any) -> EncoderSpec:
    """Reads a GteConfig, or a related family's with gated feed-forwards."""
    return with_rotary(replace(bert.spec(config), position_rows=0, gated=True), config)


def modules(config: Any, layer: Names = LAYER) -> Names:
    """The names of GteModel's modules, or a related family's."""
    embeddings = {own: name for own, name in bert.EMBEDDINGS.items() if own != "embeddings.position"}
    return {**embeddings, **layer_modules((f"layers.{i}." for i in range(config.num_hidden_layers)), layer)}


def _masked_lm(config: Any) -> HeadSpec:
    names = {"dense": "lm_head.dense", "norm": "lm_head.layer_norm", "out": "lm_head.decoder"}
    return HeadSpec("masked language modelling", names, activation="gelu", eps=config.layer_norm_eps)


_CLASSIFIER = {"dense": "gte.pooler.dense", "out": "classifier"}
_HEADS: dict[str, HeadOf] = {
    "GteForSequenceClassification": HeadSpec("sequence classification", _CLASSIFIER),
    "GteForMaskedLM": _masked_lm,
    "GteForTokenClassification": HeadSpec("token classification", {"out": "classifier"}),
    "GteModel": HeadSpec("encoder", {"dense": "pooler.dense"}),
}

FAMILY = Family(
    *("gte", "gte.", spec, modules, _HEADS, "BaseModelOutputWithPooling", _BUILT, frequencies),
    read_at_calls=("num_hidden_layers",),
)
