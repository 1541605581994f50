"""ESM-2 (Lin et al., 2022), proteins: pre-norm BERT with rotary positions, embeddings scaled for masked tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..engine.spec import EncoderSpec, HeadSpec
from . import bert, roberta
from .family import (
    Built,
    Family,
    HeadOf,
    Names,
    check_options,
    check_sizes,
    layer_modules,
    one_of_each,
    pre_norm_modules,
)

_LAYER: Names = {**bert.PRODUCTS, "attention_norm": "LayerNorm"}
_BUILT: Built = {
    **{name: bert.BUILT[name] for name in ("vocab_size", "num_hidden_layers", "num_attention_heads")},
    "layer_norm_eps": lambda encoder, _: encoder.encoder.layer[0].LayerNorm.eps,
    "position_embedding_type": lambda encoder, _: encoder.position_embedding_type,
    "token_dropout": lambda encoder, _: encoder.embeddings.token_dropout,
    "mask_token_id": lambda encoder, _: encoder.embeddings.mask_token_id,
    "pad_token_id": lambda encoder, _: encoder.embeddings.padding_idx,
}


def _spec(config: Any) -> EncoderSpec:
    check_options(config, (("is_decoder", False), ("add_cross_attention", False), ("is_folding_model", False)))
    check_sizes(config)
    if config.position_embedding_type not in ("rotary", "absolute"):
        kind = config.position_embedding_type
        raise ValueError(f"config.position_embedding_type must be 'rotary' or 'absolute', got {kind!r}")
    spec = EncoderSpec(
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        position_rows=0,
        token_types=0,
        embedding_size=config.hidden_size,
        hidden_size=config.hidden_size,
        layers=one_of_each(config.num_hidden_layers),
        num_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        layer_norm_eps=config.layer_norm_eps,
        # Whatever config.hidden_act says.
        activation="gelu",
        pre_norm=True,
        mask_token_id=config.mask_token_id if config.token_dropout else None,
        final_embeds=True,
    )
    if config.position_embedding_type == "rotary":
        return replace(spec, rotary=("default",) * config.num_hidden_layers, rotary_is_saved=True)
    if config.pad_token_id is None:
        raise ValueError("config.pad_token_id must be a token where positions are absolute, got None")
    rows, first = config.max_position_embeddings, config.pad_token_id + 1
    positions = {"position_rows": rows, "max_positions": rows - first, "first_position": first}
    return replace(spec, padding_id=config.pad_token_id, **positions)


def _modules(config: Any) -> Names:
    layers = [f"encoder.layer.{i}." for i in range(config.num_hidden_layers)]
    return {
        "embeddings.word": "embeddings.word_embeddings",
        "embeddings.position": "embeddings.position_embeddings",
        "embeddings.norm": "embeddings.layer_norm",
        **pre_norm_modules([f"{each}attention.LayerNorm" for each in layers], "encoder.emb_layer_norm_after"),
        "unread.contacts": "contact_head.regression",
        **layer_modules(layers, _LAYER),
    }


_CLASSIFIER = {"dense": "classifier.dense", "out": "classifier.out_proj"}
_HEADS: dict[str, HeadOf] = {
    "EsmForSequenceClassification": HeadSpec("sequence classification", _CLASSIFIER),
    "EsmForMaskedLM": roberta.masked_lm,
    "EsmForTokenClassification": HeadSpec("token classification", {"out": "classifier"}),
    "EsmModel": HeadSpec("encoder", {"dense": "pooler.dense"}),
}


def _buffers(config: Any) -> dict[str, str]:
    return {"rotary.default": "rotary_embeddings.inv_freq"} if config.position_embedding_type == "rotary" else {}


FAMILY = Family(
    *("esm", "esm.", _spec, _modules, _HEADS),
    *("BaseModelOutputWithPoolingAndCrossAttentions", _BUILT, _buffers),
)
