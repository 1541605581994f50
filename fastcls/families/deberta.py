"""DeBERTa (He et al., 2020): BERT whose attention also multiplies content with an embedding of each distance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from transformers import DebertaConfig

from ..engine.spec import Disentangled, EncoderSpec, HeadSpec
from . import bert, deberta_v2
from .family import Built, ByHead, Family, HeadOf, Names, check_options, layer_modules

_LAYER: Names = {
    **{own: name for own, name in bert.LAYER.items() if own != "qkv"},
    "position_key": "attention.self.pos_proj",
    "position_query": "attention.self.pos_q_proj",
}
_BUILT: Built = {
    **deberta_v2.BUILT,
    "layer_norm_eps": lambda encoder, _: encoder.embeddings.LayerNorm.variance_epsilon,
}


def _spec(config: DebertaConfig) -> EncoderSpec:
    check_options(config, (("embedding_size", config.hidden_size), ("talking_head", False)))
    spec = replace(bert.spec(config), relative=_relative(config))
    return spec if config.position_biased_input else replace(spec, position_rows=0, max_positions=None)


def _relative(config: DebertaConfig) -> Disentangled | None:
    terms = config.pos_att_type or []
    # transformers divides scores by the number of terms that are named, computed or not.
    is_known = sorted(terms) in ([], ["c2p"], ["p2c"], ["c2p", "p2c"])
    if not is_known or config.relative_attention != bool(terms):
        raise ValueError(
            "config.pos_att_type must hold 'c2p', 'p2c' or both just where config.relative_attention is True, "
            f"got {config.pos_att_type!r} with {config.relative_attention}"
        )
    if not config.relative_attention:
        return None
    reach = config.max_position_embeddings if config.max_relative_positions < 1 else config.max_relative_positions
    return Disentangled(reach, 0, reach, "c2p" in terms, "p2c" in terms, shares_projections=False, normalised=False)


def _modules(config: DebertaConfig) -> Names:
    layers = (f"encoder.layer.{i}." for i in range(config.num_hidden_layers))
    return {**bert.EMBEDDINGS, "relative.table": "encoder.rel_embeddings", **layer_modules(layers, _LAYER)}


def _layouts(config: DebertaConfig) -> Mapping[str, tuple[tuple[str, ...], ByHead]]:
    weight, bias = (ByHead(config.num_attention_heads, kinds) for kinds in (((0, 3),), ((0, 1), (2, 3))))
    found: dict[str, tuple[tuple[str, ...], ByHead]] = {}
    for i in range(config.num_hidden_layers):
        own = f"encoder.layer.{i}.attention.self."
        found[f"layers.{i}.qkv_weight"] = (f"{own}in_proj.weight",), weight
        found[f"layers.{i}.qkv_bias"] = (f"{own}q_bias", f"{own}v_bias"), bias
    return found


_HEADS: dict[str, HeadOf] = {
    "DebertaForSequenceClassification": deberta_v2.pooled("sequence classification"),
    "DebertaForMaskedLM": deberta_v2.masked_lm,
    "DebertaForTokenClassification": HeadSpec("token classification", {"out": "classifier"}),
    "DebertaForQuestionAnswering": HeadSpec("question answering", {"out": "qa_outputs"}),
    "DebertaModel": HeadSpec("encoder", {}),
}

FAMILY = Family(
    *("deberta", "deberta.", _spec, _modules, _HEADS, "BaseModelOutput", _BUILT),
    layouts=_layouts,
    read_at_calls=("pooler_hidden_act",),
)
