"""EuroBERT (Boizard et al., 2025): pre-norm layers with RMS norms, rotary positions, grouped queries, gated SiLU."""

from __future__ import annotations

from typing import Any

from ..engine.spec import EncoderSpec, HeadSpec, Pooling
from . import gte
from .family import (
    Built,
    Family,
    HeadOf,
    Names,
    activation_of,
    check_sizes,
    layer_modules,
    one_of_each,
    pre_norm_modules,
    rows_of,
)
from .rotary import frequencies, with_rotary

LAYER: Names = {own: name for own, name in gte.LAYER.items() if own != "output_norm"}
# UltraBERT's, too, and ESM C's but for the norm. The number of layers is read from the config at each call.
BUILT: Built = {
    "vocab_size": lambda encoder, _: rows_of(encoder.embed_tokens),
    "num_attention_heads": gte.BUILT["num_attention_heads"],
    "num_key_value_heads": lambda encoder, config: (
        config.num_attention_heads // encoder.layers[0].self_attn.num_key_value_groups
    ),
    "hidden_act": gte.BUILT["hidden_act"],
}
RMS_BUILT: Built = {**BUILT, "rms_norm_eps": lambda encoder, _: encoder.norm.variance_epsilon}


def spec(config: Any, eps: float) -> EncoderSpec:
    """Reads an EuroBertConfig, or a related family's, without its positions; ``eps`` is the norms'."""
    check_sizes(config)
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % key_heads:
        raise ValueError(f"config.num_key_value_heads must divide num_attention_heads = {heads}, got {key_heads}")
    return EncoderSpec(
        vocab_size=config.vocab_size,
        max_positions=None,
        position_rows=0,
        token_types=0,
        embedding_size=config.hidden_size,
        hidden_size=config.hidden_size,
        layers=one_of_each(config.num_hidden_layers),
        num_heads=heads,
        intermediate_size=config.intermediate_size,
        layer_norm_eps=eps,
        activation=activation_of(config, "hidden_act"),
        pre_norm=True,
        gated=True,
        rms=True,
        num_kv_heads=None if key_heads == heads else key_heads,
    )


def modules(config: Any, layer: Names = LAYER) -> Names:
    """The names of EuroBertModel's modules, or a relative's."""
    layers = [f"layers.{i}." for i in range(config.num_hidden_layers)]
    return {
        "embeddings.word": "embed_tokens",
        **pre_norm_modules([f"{each}input_layernorm" for each in layers], "norm"),
        **layer_modules(layers, layer),
    }


def _classifier(config: Any) -> HeadSpec:
    pooling, names = config.classifier_pooling, {"dense": "dense", "out": "classifier"}
    if pooling not in ("bos", "mean", "late"):
        raise ValueError(f"config.classifier_pooling must be 'bos', 'mean' or 'late', got {pooling!r}")
    rows: Pooling = "first" if pooling == "bos" else "mean"
    return HeadSpec("sequence classification", names, rows, activation="gelu", is_late=pooling == "late")


_HEADS: dict[str, HeadOf] = {
    "EuroBertForSequenceClassification": _classifier,
    "EuroBertForMaskedLM": HeadSpec("masked language modelling", {"out": "lm_head"}),
    "EuroBertForTokenClassification": HeadSpec("token classification", {"out": "classifier"}),
    "EuroBertModel": HeadSpec("encoder", {}),
}

FAMILY = Family(
    *("eurobert", "model.", lambda config: with_rotary(spec(config, config.rms_norm_eps), config), modules, _HEADS),
    *("BaseModelOutput", RMS_BUILT, frequencies),
    read_at_calls=("num_hidden_layers",),
)
