"""ESM C (EvolutionaryScale, 2024), proteins: pre-norm, queries and keys normalised, scaled residuals, gated SiLU."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ..engine.spec import EncoderSpec, HeadSpec
from . import eurobert
from .family import Built, Family, HeadOf, Names
from .rotary import frequencies, with_rotary

_LAYER: Names = {**eurobert.LAYER, "query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
# transformers builds its norms with this, whatever the config says, and its residuals are of models of 36 layers.
_EPS, _LAYERS = 1e-5, 36
_BUILT: Built = {**eurobert.BUILT, "num_hidden_layers": lambda encoder, _: len(encoder.layers)}


def _spec(config: Any) -> EncoderSpec:
    spec = replace(
        eurobert.spec(config, _EPS),
        rms=False,
        query_key_norm=True,
        residual_scale=math.sqrt(config.num_hidden_layers / _LAYERS),
    )
    return with_rotary(spec, config)


def _modules(config: Any) -> Names:
    return eurobert.modules(config, _LAYER)


_MASKED_LM = {"dense": "lm_head.dense", "norm": "lm_head.layer_norm", "out": "lm_head.decoder"}
_HEADS: dict[str, HeadOf] = {
    "EsmcForSequenceClassification": HeadSpec(
        "sequence classification", {"dense": "classifier.dense", "out": "classifier.out_proj"}
    ),
    "EsmcForMaskedLM": HeadSpec("masked language modelling", _MASKED_LM, activation="gelu", eps=_EPS),
    "EsmcForTokenClassification": HeadSpec("token classification", {"out": "score"}),
    "EsmcModel": HeadSpec("encoder", {}),
}

FAMILY = Family("esmc", "esmc.", _spec, _modules, _HEADS, "BaseModelOutput", _BUILT, frequencies)
