"""BERT (Devlin et al., 2018): learned absolute positions, token types, post-norm layers."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..spec import EncoderSpec, WeightMap

_LAYER = {
    "qkv_{}": ("attention.self.query.{}", "attention.self.key.{}", "attention.self.value.{}"),
    "out_{}": ("attention.output.dense.{}",),
    "attention_norm_{}": ("attention.output.LayerNorm.{}",),
    "up_{}": ("intermediate.dense.{}",),
    "down_{}": ("output.dense.{}",),
    "output_norm_{}": ("output.LayerNorm.{}",),
}


def spec(config: PreTrainedConfig) -> EncoderSpec:
    """Reads a BertConfig.

    Raises:
        ValueError: the config asks for something other than a bidirectional encoder with absolute positions and
            exact GELU, or for a head size that the kernels have no tile for.
    """
    # Absent from configs of transformers >= 5, which no longer has any other kind, but alive in old checkpoints.
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    for name, found, needed in (
        ("is_decoder", config.is_decoder, False),
        ("add_cross_attention", config.add_cross_attention, False),
        ("position_embedding_type", positions, "absolute"),
        ("hidden_act", config.hidden_act, "gelu"),
    ):
        if found != needed:
            raise ValueError(f"config.{name} must be {needed!r}, got {found!r}: fastcls does not compute that")
    head_dim, remainder = divmod(config.hidden_size, config.num_attention_heads)
    if remainder or not 16 <= head_dim <= 128 or config.hidden_size > 4096 or config.num_attention_heads > 64:
        raise ValueError(
            "config.hidden_size must be at most 4096 in at most 64 heads of 16 to 128, "
            f"got {config.hidden_size} / {config.num_attention_heads}"
        )
    if config.num_hidden_layers < 1:
        raise ValueError(f"config.num_hidden_layers must be at least 1, got {config.num_hidden_layers}")
    return EncoderSpec(
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        token_types=config.type_vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        layer_norm_eps=config.layer_norm_eps,
    )


def weights(spec: EncoderSpec) -> WeightMap:
    """The names of a BertForSequenceClassification checkpoint."""
    sources: dict[str, tuple[str, ...]] = {
        "embeddings.word_table": ("bert.embeddings.word_embeddings.weight",),
        "embeddings.position_table": ("bert.embeddings.position_embeddings.weight",),
        "embeddings.token_type_table": ("bert.embeddings.token_type_embeddings.weight",),
    }
    for kind in ("weight", "bias"):
        sources[f"embeddings.norm_{kind}"] = (f"bert.embeddings.LayerNorm.{kind}",)
        sources[f"head.pooler_{kind}"] = (f"bert.pooler.dense.{kind}",)
        sources[f"head.classifier_{kind}"] = (f"classifier.{kind}",)
        for layer in range(spec.num_layers):
            for own, theirs in _LAYER.items():
                sources[f"layers.{layer}.{own.format(kind)}"] = tuple(
                    f"bert.encoder.layer.{layer}.{name.format(kind)}" for name in theirs
                )
    return WeightMap(sources)
