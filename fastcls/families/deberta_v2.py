"""DeBERTa v2 and v3 (He et al., 2021): BERT whose attention also multiplies content with embeddings of distances."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import DebertaV2Config

from ..engine.spec import Convolution, Disentangled, EncoderSpec, HeadSpec, Task
from . import bert
from .family import Built, Family, HeadOf, Names, activation_of, check_options, layer_modules

_LAYER: Names = {
    **bert.LAYER,
    "qkv": ("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
    "position_key": "attention.self.pos_key_proj",
    "position_query": "attention.self.pos_query_proj",
}


def _reach_built(encoder: Any, config: Any) -> int | None:
    reach: int | None = getattr(encoder.encoder, "max_relative_positions", None)
    is_left_open = getattr(config, "max_relative_positions", -1) < 1
    return None if is_left_open and reach == encoder.embeddings.position_ids.shape[-1] else reach


# DeBERTa's, too.
BUILT: Built = {
    **{name: read for name, read in bert.BUILT.items() if name != "type_vocab_size"},
    "type_vocab_size": lambda encoder, config: (
        bert.BUILT["type_vocab_size"](encoder, config) if encoder.embeddings.token_type_embeddings is not None else 0
    ),
    "max_position_embeddings": lambda encoder, _: encoder.embeddings.position_ids.shape[-1],
    "max_relative_positions": _reach_built,
}


def _spec(config: DebertaV2Config) -> EncoderSpec:
    size = config.hidden_size
    check_options(
        config,
        (("embedding_size", size), ("attention_head_size", size // config.num_attention_heads), ("conv_groups", 1)),
    )
    spec = replace(bert.spec(config), relative=_relative(config), convolution=_convolution(config))
    return spec if config.position_biased_input else replace(spec, position_rows=0, max_positions=None)


def _relative(config: DebertaV2Config) -> Disentangled | None:
    terms = config.pos_att_type or []
    if config.relative_attention != bool({"c2p", "p2c"} & {*terms}):
        raise ValueError(
            "config.pos_att_type must hold 'c2p' or 'p2c' just where config.relative_attention is True, "
            f"got {config.pos_att_type!r} with {config.relative_attention}"
        )
    if not config.relative_attention:
        return None
    reach = getattr(config, "max_relative_positions", -1)
    reach = config.max_position_embeddings if reach < 1 else reach
    buckets = max(getattr(config, "position_buckets", -1), 0)
    return Disentangled(
        span=buckets or reach,
        buckets=buckets,
        reach=reach,
        content_to_position="c2p" in terms,
        position_to_content="p2c" in terms,
        shares_projections=getattr(config, "share_att_key", False),
        normalised="layer_norm" in getattr(config, "norm_rel_ebd", "none").lower(),
    )


def _convolution(config: DebertaV2Config) -> Convolution | None:
    size = getattr(config, "conv_kernel_size", 0)
    if size <= 0:
        return None
    if size % 2 == 0 or config.num_hidden_layers < 2:
        raise ValueError(f"config.conv_kernel_size must be odd, with 2 layers at least, got {size}")
    return Convolution(size, activation_of(config, "conv_act") if hasattr(config, "conv_act") else "tanh")


def _modules(config: DebertaV2Config) -> Names:
    return {
        **bert.EMBEDDINGS,
        "relative.table": "encoder.rel_embeddings",
        "relative.norm": "encoder.LayerNorm",
        "convolution.kernel": "encoder.conv.conv",
        "convolution.norm": "encoder.conv.LayerNorm",
        **layer_modules((f"encoder.layer.{i}." for i in range(config.num_hidden_layers)), _LAYER),
    }


def masked_lm(config: Any) -> HeadSpec:
    """The head for masks, and DeBERTa's."""
    own = "cls.predictions"
    legacy = {"dense": f"{own}.transform.dense", "norm": f"{own}.transform.LayerNorm", "out": f"{own}.decoder"}
    own = own if config.legacy else "lm_predictions.lm_head"
    tied = {"dense": f"{own}.dense", "norm": f"{own}.LayerNorm", "out": "deberta.embeddings.word_embeddings"}
    names = {**(legacy if config.legacy else tied), "bias": f"{own}.bias"}
    activation = activation_of(config, "hidden_act")
    return HeadSpec("masked language modelling", names, activation=activation, eps=config.layer_norm_eps)


def pooled(task: Task) -> HeadOf:
    """A head behind a pooler of the first token, and DeBERTa's."""
    names = {"dense": "pooler.dense", "out": "classifier"}
    return lambda config: HeadSpec(task, names, activation=activation_of(config, "pooler_hidden_act"))


_HEADS: dict[str, HeadOf] = {
    "DebertaV2ForSequenceClassification": pooled("sequence classification"),
    "DebertaV2ForMultipleChoice": pooled("multiple choice"),
    "DebertaV2ForMaskedLM": masked_lm,
    "DebertaV2ForTokenClassification": HeadSpec("token classification", {"out": "classifier"}),
    "DebertaV2ForQuestionAnswering": HeadSpec("question answering", {"out": "qa_outputs"}),
    "DebertaV2Model": HeadSpec("encoder", {}),
}

FAMILY = Family(
    "deberta-v2", "deberta.", _spec, _modules, _HEADS, "BaseModelOutput", BUILT, read_at_calls=("pooler_hidden_act",)
)
