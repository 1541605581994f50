"""MPNet (Song et al., 2020): BERT without token types, whose attention adds a bias for each distance to its scores."""

from __future__ import annotations

from dataclasses import replace

from transformers import MPNetConfig

from ..engine.spec import BucketBias, EncoderSpec, HeadSpec
from . import bert, roberta
from .family import Built, Family, HeadOf, Names, check_options, layer_modules

# transformers computes with these, whatever the config says.
_PADDING_ID, _BUCKETS, _REACH = 1, 32, 128
_LAYER: Names = {
    "qkv": ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    "out": "attention.attn.o",
    "attention_norm": "attention.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "output_norm": "output.LayerNorm",
}
_BUILT: Built = {
    **{name: read for name, read in bert.BUILT.items() if name != "type_vocab_size"},
    "num_attention_heads": lambda encoder, _: encoder.encoder.layer[0].attention.attn.num_attention_heads,
}


def _spec(config: MPNetConfig) -> EncoderSpec:
    check_options(config, (("relative_attention_num_buckets", _BUCKETS),))
    spec = bert.spec(config)
    return replace(
        spec,
        max_positions=spec.position_rows - _PADDING_ID - 1,
        first_position=_PADDING_ID + 1,
        padding_id=_PADDING_ID,
        relative=BucketBias(_BUCKETS, _REACH),
    )


def _modules(config: MPNetConfig) -> Names:
    layers = layer_modules((f"encoder.layer.{i}." for i in range(config.num_hidden_layers)), _LAYER)
    return {**bert.EMBEDDINGS, "relative.table": "encoder.relative_attention_bias", **layers}


_CLASSIFIER = {"dense": "classifier.dense", "out": "classifier.out_proj"}
_HEADS: dict[str, HeadOf] = {
    "MPNetForSequenceClassification": HeadSpec("sequence classification", _CLASSIFIER),
    "MPNetForMultipleChoice": HeadSpec("multiple choice", {"dense": "mpnet.pooler.dense", "out": "classifier"}),
    "MPNetForMaskedLM": roberta.masked_lm,
    "MPNetForTokenClassification": HeadSpec("token classification", {"out": "classifier"}),
    "MPNetForQuestionAnswering": HeadSpec("question answering", {"out": "qa_outputs"}),
    "MPNetModel": HeadSpec("encoder", {"dense": "pooler.dense"}),
}

FAMILY = Family("mpnet", "mpnet.", _spec, _modules, _HEADS, "BaseModelOutputWithPooling", _BUILT)
