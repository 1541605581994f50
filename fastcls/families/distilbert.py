"""DistilBERT (Sanh et al., 2019): BERT without token types and without a pooler, its classifier behind a ReLU."""

from __future__ import annotations

from transformers import DistilBertConfig

from ..engine.spec import EncoderSpec, HeadSpec
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

_EPS = 1e-12
_LAYER: Names = {
    "qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "out": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
    "output_norm": "output_layer_norm",
}
_BUILT: Built = {
    "vocab_size": lambda encoder, _: rows_of(encoder.embeddings.word_embeddings),
    "max_position_embeddings": lambda encoder, _: rows_of(encoder.embeddings.position_embeddings),
    "n_layers": lambda encoder, _: len(encoder.transformer.layer),
    "n_heads": lambda encoder, _: encoder.transformer.layer[0].attention.n_heads,
    "activation": lambda encoder, config: activation_built(
        encoder.transformer.layer[0].ffn.activation, config.activation
    ),
}


def _spec(config: DistilBertConfig) -> EncoderSpec:
    check_sizes(config, "dim", "n_heads", "n_layers")
    return EncoderSpec(
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        position_rows=config.max_position_embeddings,
        token_types=0,
        embedding_size=config.dim,
        hidden_size=config.dim,
        layers=one_of_each(config.n_layers),
        num_heads=config.n_heads,
        intermediate_size=config.hidden_dim,
        layer_norm_eps=_EPS,
        activation=activation_of(config, "activation"),
    )


def _modules(config: DistilBertConfig) -> Names:
    return {
        "embeddings.word": "embeddings.word_embeddings",
        "embeddings.position": "embeddings.position_embeddings",
        "embeddings.norm": "embeddings.LayerNorm",
        **layer_modules((f"transformer.layer.{i}." for i in range(config.n_layers)), _LAYER),
    }


def _masked_lm(config: DistilBertConfig) -> HeadSpec:
    names = {"dense": "vocab_transform", "norm": "vocab_layer_norm", "out": "vocab_projector"}
    return HeadSpec("masked language modelling", names, activation=activation_of(config, "activation"), eps=_EPS)


_CLASSIFIER = {"dense": "pre_classifier", "out": "classifier"}
_HEADS: dict[str, HeadOf] = {
    "DistilBertForSequenceClassification": HeadSpec("sequence classification", _CLASSIFIER, activation="relu"),
    "DistilBertForMultipleChoice": HeadSpec("multiple choice", _CLASSIFIER, activation="relu"),
    "DistilBertForMaskedLM": _masked_lm,
    "DistilBertForTokenClassification": HeadSpec("token classification", {"out": "classifier"}),
    "DistilBertForQuestionAnswering": HeadSpec("question answering", {"out": "qa_outputs"}),
    "DistilBertModel": HeadSpec("encoder", {}),
}

FAMILY = Family("distilbert", "distilbert.", _spec, _modules, _HEADS, "BaseModelOutput", _BUILT)
