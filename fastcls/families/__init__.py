"""One file a family: from a transformers model to an `EncoderSpec` and the map of its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from ..spec import EncoderSpec, WeightMap
from . import bert


class Family(NamedTuple):
    """How models of one class are read."""

    model_class: str
    spec: Callable[[PreTrainedConfig], EncoderSpec]
    weights: Callable[[EncoderSpec], WeightMap]


FAMILIES = (Family("BertForSequenceClassification", bert.spec, bert.weights),)


def family_of(model: PreTrainedModel) -> Family:
    """The family of a transformers model.

    Raises:
        TypeError: the class is not supported, or is a subclass that computes something else in ``forward``.
    """
    for family in FAMILIES:
        base = getattr(transformers, family.model_class)
        if isinstance(model, base) and type(model).forward is base.forward:
            return family
    raise TypeError(_unsupported(f"{type(model).__module__}.{type(model).__qualname__}"))


def family_of_config(config: PreTrainedConfig) -> Family:
    """The family of the classifier that transformers would load for ``config``.

    Raises:
        TypeError: it is not supported.
    """
    model_class = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(config.model_type)
    for family in FAMILIES:
        if family.model_class == model_class:
            return family
    raise TypeError(_unsupported(model_class or f"{config.model_type} model without a classifier"))


def _unsupported(found: str) -> str:
    return f"model must be a transformers {', '.join(family.model_class for family in FAMILIES)}, got {found}"
