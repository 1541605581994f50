"""BERT (Devlin et al., 2018): learned absolute positions, token types, post-norm layers."""

from __future__ import annotations

from typing import Any

from ..engine.spec import EncoderSpec, HeadSpec
from .family import (
    Built,
    Family,
    HeadOf,
    Names,
    activation_built,
    activation_of,
    check_encoder,
    check_sizes,
    layer_modules,
    one_of_each,
    rows_of,
)

# RoBERTa's and ELECTRA's, too.
LAYER: Names = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "output_norm": "output.LayerNorm",
}
# A layer without its norms, which stand elsewhere in pre-norm encoders.
PRODUCTS: Names = {own: name for own, name in LAYER.items() if "norm" not in own}
EMBEDDINGS: Names = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
}
# RoBERTa's and ELECTRA's, too.
BUILT: Built = {
    "vocab_size": lambda encoder, _: rows_of(encoder.embeddings.word_embeddings),
    "max_position_embeddings": lambda encoder, _: rows_of(encoder.embeddings.position_embeddings),
    "type_vocab_size": lambda encoder, _: rows_of(encoder.embeddings.token_type_embeddings),
    "layer_norm_eps": lambda encoder, _: encoder.embeddings.LayerNorm.eps,
    "num_hidden_layers": lambda encoder, _: len(encoder.encoder.layer),
    "num_attention_heads": lambda encoder, _: encoder.encoder.layer[0].attention.self.num_attention_heads,
    "hidden_act": lambda encoder, config: activation_built(
        encoder.encoder.layer[0].intermediate.intermediate_act_fn, config.hidden_act
    ),
}


def spec(config: Any) -> EncoderSpec:
    """Reads a BertConfig, or the config of a related family."""
    check_encoder(config)
    check_sizes(config)
    return EncoderSpec(
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        position_rows=config.max_position_embeddings,
        token_types=getattr(config, "type_vocab_size", 0),
        embedding_size=config.hidden_size,
        hidden_size=config.hidden_size,
        layers=one_of_each(config.num_hidden_layers),
        num_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        layer_norm_eps=config.layer_norm_eps,
        activation=activation_of(config, "hidden_act"),
    )


def modules(config: Any) -> Names:
    """The names of BertModel's modules, or a related family's."""
    return {**EMBEDDINGS, **layer_modules((f"encoder.layer.{i}." for i in range(config.num_hidden_layers)), LAYER)}


def masked_lm(config: Any) -> HeadSpec:
    """BERT's head for masks, and that of its relatives."""
    names = {
        "dense": "cls.predictions.transform.dense",
        "norm": "cls.predictions.transform.LayerNorm",
        "out": "cls.predictions.decoder",
        "bias": "cls.predictions.bias",
    }
    activation = activation_of(config, "hidden_act")
    return HeadSpec("masked language modelling", names, activation=activation, eps=config.layer_norm_eps)


def heads(classes: str, encoder: str) -> dict[str, HeadOf]:
    """BERT's heads: for classes whose names begin so, and hold their encoder under a name."""
    pooler = f"{encoder}.pooler.dense"
    return {
        f"{classes}ForSequenceClassification": HeadSpec(
            "sequence classification", {"dense": pooler, "out": "classifier"}
        ),
        f"{classes}ForNextSentencePrediction": HeadSpec(
            "next sentence prediction", {"dense": pooler, "out": "cls.seq_relationship"}
        ),
        f"{classes}ForMultipleChoice": HeadSpec("multiple choice", {"dense": pooler, "out": "classifier"}),
        f"{classes}ForMaskedLM": masked_lm,
        f"{classes}ForTokenClassification": HeadSpec("token classification", {"out": "classifier"}),
        f"{classes}ForQuestionAnswering": HeadSpec("question answering", {"out": "qa_outputs"}),
        f"{classes}Model": HeadSpec("encoder", {"dense": "pooler.dense"}),
    }


FAMILY = Family(
    *("bert", "bert.", spec, modules, heads("Bert", "bert")), "BaseModelOutputWithPoolingAndCrossAttentions", BUILT
)
