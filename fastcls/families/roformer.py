"""RoFormer (Su et al., 2021): BERT whose queries and keys turn in pairs of neighbours, by a table in the checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..engine.spec import EncoderSpec, HeadSpec
from . import bert
from .family import Built, Family, HeadOf, Names, activation_of, check_options, rows_of

# Its head reads hidden_act from the config at each call, its layers when they are built: where these differ, the
# comparison of modules refuses the model.
_BUILT: Built = {
    **{name: read for name, read in bert.BUILT.items() if name != "hidden_act"},
    "max_position_embeddings": lambda encoder, _: rows_of(encoder.encoder.embed_positions),
    "rotary_value": lambda encoder, _: encoder.encoder.layer[0].attention.self.rotary_value,
}


def _spec(config: Any) -> EncoderSpec:
    check_options(config, (("rotary_value", False),))
    return replace(
        bert.spec(config),
        position_rows=0,
        embedding_size=config.embedding_size,
        rotary=("default",) * config.num_hidden_layers,
        rotary_interleaved=True,
    )


def _modules(config: Any) -> Names:
    positions = {"rotary.table": "encoder.embed_positions", "embeddings.projection": "embeddings_project"}
    return {**bert.modules(config), **positions}


def _classifier(config: Any) -> HeadSpec:
    names = {"dense": "classifier.dense", "out": "classifier.out_proj"}
    return HeadSpec("sequence classification", names, activation=activation_of(config, "hidden_act"))


def _multiple_choice(config: Any) -> HeadSpec:
    # The class reads the last column, padding or not, where the config does not say.
    kind = getattr(config, "summary_type", "last")
    if kind != "first":
        raise ValueError(
            f"config.summary_type must be 'first', got {kind!r}, which RoFormer takes where none is said: fastcls does "
            "not compute that"
        )
    check_options(config, (("summary_use_proj", False), ("summary_activation", None)))
    return HeadSpec("multiple choice", {"out": "classifier"})


_HEADS: dict[str, HeadOf] = {
    "RoFormerForSequenceClassification": _classifier,
    "RoFormerForMultipleChoice": _multiple_choice,
    "RoFormerForMaskedLM": bert.masked_lm,
    "RoFormerForTokenClassification": HeadSpec("token classification", {"out": "classifier"}),
    "RoFormerForQuestionAnswering": HeadSpec("question answering", {"out": "qa_outputs"}),
    "RoFormerModel": HeadSpec("encoder", {}),
}

FAMILY = Family(
    "roformer",
    "roformer.",
    _spec,
    _modules,
    _HEADS,
    "BaseModelOutputWithPastAndCrossAttentions",
    _BUILT,
    read_at_calls=("hidden_act",),
)
