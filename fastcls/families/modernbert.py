"""ModernBERT (Warner et al., 2024): pre-norm layers with rotary positions, local windows and gated feed-forwards."""

from __future__ import annotations

from typing import Any

from transformers import ModernBertConfig

from ..engine.spec import EncoderSpec, HeadSpec, Pooling, Task
from .family import (
    Built,
    Family,
    HeadOf,
    Names,
    activation_built,
    activation_of,
    check_options,
    check_sizes,
    layer_modules,
    one_of_each,
    pre_norm_modules,
    rows_of,
)
from .rotary import with_rotary

_LAYER: Names = {"qkv": "attn.Wqkv", "out": "attn.Wo", "attention_norm": "mlp_norm", "up": "mlp.Wi", "down": "mlp.Wo"}
POOLINGS: dict[str, Pooling] = {"cls": "first", "mean": "mean"}

# ModernBERT reads its windows from the config at each call, for the mask.
_BUILT: Built = {
    "vocab_size": lambda encoder, _: rows_of(encoder.embeddings.tok_embeddings),
    "norm_eps": lambda encoder, _: encoder.embeddings.norm.eps,
    "num_hidden_layers": lambda encoder, _: len(encoder.layers),
    "layer_types": lambda encoder, _: [layer.attention_type for layer in encoder.layers],
    "num_attention_heads": lambda encoder, config: config.hidden_size // encoder.layers[0].attn.head_dim,
    "hidden_activation": lambda encoder, config: activation_built(encoder.layers[0].mlp.act, config.hidden_activation),
}


def _spec(config: Any) -> EncoderSpec:
    check_sizes(config)
    spec = EncoderSpec(
        vocab_size=config.vocab_size,
        max_positions=None,
        position_rows=0,
        token_types=0,
        embedding_size=config.hidden_size,
        hidden_size=config.hidden_size,
        layers=one_of_each(config.num_hidden_layers),
        num_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        layer_norm_eps=config.norm_eps,
        activation=activation_of(config, "hidden_activation"),
        windows=windows(config),
        pre_norm=True,
        gated=True,
    )
    return with_rotary(spec, config, config.layer_types)


def windows(config: Any) -> tuple[int | None, ...]:
    """How many tokens each layer sees on either side. UltraBERT's, too."""
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types)


def _modules(config: ModernBertConfig) -> Names:
    layers = [f"layers.{i}." for i in range(config.num_hidden_layers)]
    return {
        "embeddings.word": "embeddings.tok_embeddings",
        "embeddings.norm": "embeddings.norm",
        # The first layer's has no weights: it is the embeddings'.
        **pre_norm_modules([f"{each}attn_norm" for each in layers], "final_norm"),
        **layer_modules(layers, _LAYER),
    }


def _head(task: Task, out: str = "classifier") -> HeadOf:
    def head(config: ModernBertConfig) -> HeadSpec:
        if task == "masked language modelling":
            check_options(config, (("sparse_prediction", False),))
        pooled = task in ("sequence classification", "multiple choice")
        return HeadSpec(
            task,
            {"dense": "head.dense", "norm": "head.norm", "out": out},
            pooling=POOLINGS[config.classifier_pooling] if pooled else "first",
            activation=activation_of(config, "classifier_activation"),
            eps=config.norm_eps,
        )

    return head


_HEADS: dict[str, HeadOf] = {
    "ModernBertForSequenceClassification": _head("sequence classification"),
    "ModernBertForMultipleChoice": _head("multiple choice"),
    "ModernBertForMaskedLM": _head("masked language modelling", out="decoder"),
    "ModernBertForTokenClassification": _head("token classification"),
    "ModernBertForQuestionAnswering": _head("question answering"),
    "ModernBertModel": HeadSpec("encoder", {}),
}


def buffers(config: Any) -> dict[str, str]:
    """The buffers of a model with frequencies for each kind of layers. UltraBERT's, too."""
    kinds = sorted(set(config.layer_types or ()))
    return {f"rotary.{kind}": f"rotary_emb.{kind}_inv_freq" for kind in kinds}


# UltraBERT's, too.
READ_AT_CALLS = ("layer_types", "local_attention", "sliding_window", "classifier_pooling")

FAMILY = Family(
    *("modernbert", "model.", _spec, _modules, _HEADS, "BaseModelOutput", _BUILT, buffers), read_at_calls=READ_AT_CALLS
)
