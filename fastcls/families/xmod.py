"""X-MOD (Pfeiffer et al., 2022): RoBERTa whose layers end with a narrow feed-forward of one language, the default's.

A fast model computes the language that the config named when it was made, and refuses to run once that names another:
optimize a copy of the model for each language.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..engine.spec import Adapter, EncoderSpec
from . import bert, roberta
from .family import Built, Family, Names, layer_modules, pre_norm_modules

_BUILT: Built = {
    **roberta.BUILT,
    "pre_norm": lambda encoder, _: encoder.encoder.is_pre_norm,
    "languages": lambda encoder, config: type(config.languages)(encoder.encoder.layer[0].output.adapter_modules),
    "adapter_layer_norm": lambda encoder, _: encoder.encoder.layer[0].output.adapter_layer_norm is not None,
    "adapter_reuse_layer_norm": lambda encoder, _: encoder.encoder.layer[0].output.adapter_reuse_layer_norm,
    "ln_before_adapter": lambda encoder, _: encoder.encoder.layer[0].output.ln_before_adapter,
}


def _spec(config: Any) -> EncoderSpec:
    if config.default_language not in config.languages:
        raise ValueError(
            f"config.default_language must be one of {', '.join(config.languages)}, got {config.default_language!r}: "
            "call model.set_default_language, and optimize the model for each language that is wanted"
        )
    if not (config.adapter_layer_norm or config.adapter_reuse_layer_norm):
        raise ValueError(
            "config.adapter_reuse_layer_norm must be True where config.adapter_layer_norm is False, got False: fastcls "
            "computes no adapters without a norm before them"
        )
    adapter: Adapter = "normed" if config.ln_before_adapter else "sum"
    return replace(roberta.spec(config), pre_norm=config.pre_norm, adapter=adapter)


def _modules(config: Any) -> Names:
    layers = [f"encoder.layer.{i}." for i in range(config.num_hidden_layers)]
    first, second = bert.LAYER["attention_norm"], bert.LAYER["output_norm"]
    language, others = config.default_language, [each for each in config.languages if each != config.default_language]
    layer = {
        **bert.LAYER,
        "adapter_norm": "output.adapter_layer_norm" if config.adapter_layer_norm else second,
        "adapter_up": f"output.adapter_modules.{language}.dense1",
        "adapter_down": f"output.adapter_modules.{language}.dense2",
    }
    norms: Names = {}
    if config.pre_norm:
        layer["attention_norm"] = second
        norms = pre_norm_modules([f"{each}{first}" for each in layers], "encoder.LayerNorm")
    unread = {
        f"unread.{i}_{other}_{dense}": f"{each}output.adapter_modules.{other}.{dense}"
        for i, each in enumerate(layers)
        for other in others
        for dense in ("dense1", "dense2")
    }
    return {**bert.EMBEDDINGS, **layer_modules(layers, layer), **norms, **unread}


FAMILY = Family(
    *("xmod", "roberta.", _spec, _modules, roberta.heads("Xmod", "roberta")),
    *("BaseModelOutputWithPoolingAndCrossAttentions", _BUILT),
    read_at_calls=("default_language",),
)
