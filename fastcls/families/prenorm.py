"""Megatron BERT (Shoeybi et al., 2019), RoBERTa-PreLayerNorm, XLM-RoBERTa-XL: norms before the halves of each layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..engine.spec import EncoderSpec
from . import bert, roberta
from .family import Built, Family, Names, layer_modules, pre_norm_modules


def _pre_norm(read: Callable[[Any], EncoderSpec]) -> Callable[[Any], EncoderSpec]:
    return lambda config: replace(read(config), pre_norm=True)


def _modules(first: str, second: str, last: str) -> Callable[[Any], Names]:
    """Names of modules, from those of the norms: each layer's two, and the encoder's last."""

    def modules(config: Any) -> Names:
        layers = [f"encoder.layer.{i}." for i in range(config.num_hidden_layers)]
        return {
            **bert.EMBEDDINGS,
            **pre_norm_modules([f"{each}{first}" for each in layers], last),
            **layer_modules(layers, {**bert.PRODUCTS, "attention_norm": second}),
        }

    return modules


def _eps(read: Callable[[Any], Any], built: Built) -> Built:
    return {**built, "layer_norm_eps": lambda encoder, _: read(encoder).eps}


_OUTPUT = "BaseModelOutputWithPoolingAndCrossAttentions"
FAMILIES = (
    Family(
        *("megatron-bert", "bert.", _pre_norm(bert.spec), _modules("attention.ln", "ln", "encoder.ln")),
        *(bert.heads("MegatronBert", "bert"), _OUTPUT, _eps(lambda encoder: encoder.encoder.ln, bert.BUILT)),
    ),
    Family(
        *("roberta-prelayernorm", "roberta_prelayernorm.", _pre_norm(roberta.spec)),
        _modules("attention.LayerNorm", "intermediate.LayerNorm", "LayerNorm"),
        *(roberta.heads("RobertaPreLayerNorm", "roberta_prelayernorm"), _OUTPUT, roberta.BUILT),
    ),
    Family(
        *("xlm-roberta-xl", "roberta.", _pre_norm(roberta.spec)),
        _modules("attention.self_attn_layer_norm", "LayerNorm", "encoder.LayerNorm"),
        *(roberta.heads("XLMRobertaXL", "roberta"), _OUTPUT),
        _eps(lambda encoder: encoder.encoder.LayerNorm, roberta.BUILT),
    ),
)
