"""EuroBERT (Boizard et al., 2025): pre-norm layers with RMS norms, rotary positions, grouped queries, gated SiLU."""

from __future__ import annotations

from typing import Any

from ..engine.spec import EncoderSpec, HeadSpec, Pooling
from .family import (
    Built,
    Family,
    HeadOf,
    Names,
    activation_built,
    activation_of,
    check_sizes,
    layer_modules,
    one_of_each,
    rows_of,
)
from .rotary import frequencies, with_rotary

LAYER: Names = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": "self_attn.o_proj",
    "attention_norm": "post_attention_layernorm",
    "up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": "mlp.down_proj",
}
# UltraBERT's, too, and ESM C's but for the norm. The number of layers is read from the config at each call.
BUILT: Built = {
    "vocab_size": lambda encoder, _: rows_of(encoder.embed_tokens),
    "num_attention_heads": lambda encoder, _: (
        encoder.layers[0].self_attn.q_proj.out_features // encoder.layers[0].self_attn.head_dim
    ),
    "num_key_value_heads": lambda encoder, config: (
        config.num_attention_heads // encoder.layers[0].self_attn.num_key_value_groups
    ),
    "hidden_act": lambda encoder, config: activation_built(encoder.layers[0].mlp.act_fn, config.hidden_act),
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
    """The names of EuroBertModel's modules, or a relative's: our layers end with the norm that begins the next."""
    last = config.num_hidden_layers - 1
    return {
        "embeddings.word": "embed_tokens",
        "embeddings.first_norm": "layers.0.input_layernorm",
        **{f"layers.{i}.output_norm": f"layers.{i + 1}.input_layernorm" for i in range(last)},
        f"layers.{last}.output_norm": "norm",
        **layer_modules((f"layers.{i}." for i in range(last + 1)), layer),
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
