"""One file per family: from a transformers model to its specs and the map of its weights."""

from __future__ import annotations

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from . import (
    albert,
    bert,
    deberta,
    deberta_v2,
    distilbert,
    electra,
    ernie,
    esm,
    esmc,
    eurobert,
    gte,
    jina_embeddings_v3,
    modernbert,
    mpnet,
    nomic_bert,
    prenorm,
    rembert,
    roberta,
    roformer,
    ultrabert,
    xmod,
)
from .family import ACTIVATION_CLASSES, ACTIVATION_NAMES, Family, activation_in, head_in

__all__ = [
    "ACTIVATION_CLASSES",
    "ACTIVATION_NAMES",
    "FAMILIES",
    "Family",
    "activation_in",
    "class_for_task",
    "family_of",
    "family_of_class",
    "head_in",
    "supported",
]

_FAMILIES = (
    bert.FAMILY,
    *roberta.FAMILIES,
    distilbert.FAMILY,
    electra.FAMILY,
    albert.FAMILY,
    mpnet.FAMILY,
    modernbert.FAMILY,
    deberta.FAMILY,
    deberta_v2.FAMILY,
    gte.FAMILY,
    nomic_bert.FAMILY,
    jina_embeddings_v3.FAMILY,
    eurobert.FAMILY,
    ultrabert.FAMILY,
    esm.FAMILY,
    esmc.FAMILY,
    ernie.FAMILY,
    *prenorm.FAMILIES,
    rembert.FAMILY,
    roformer.FAMILY,
    xmod.FAMILY,
)
# Earlier releases of transformers lack some.
FAMILIES = tuple(family for family in _FAMILIES if family.model_type in CONFIG_MAPPING)


def family_of(model: PreTrainedModel) -> tuple[Family, str]:
    """The family of a transformers model, and the name of its class in transformers.

    Raises:
        TypeError: the class is not supported, or is a subclass that computes something else in ``forward``.
    """
    return family_of_class(type(model))


def family_of_class(model_class: type[PreTrainedModel]) -> tuple[Family, str]:
    """`family_of`, for the models of a class."""
    for family in FAMILIES:
        for name in family.heads:
            base = getattr(transformers, name)
            if issubclass(model_class, base) and model_class.forward is base.forward:
                return family, name
    raise TypeError(f"model must be {supported()}, got {model_class.__module__}.{model_class.__qualname__}")


def class_for_task(config: PreTrainedConfig, task: str) -> tuple[Family, str]:
    """The family of a config, and the name of its class for a task.

    Raises:
        TypeError: no supported family has one.
    """
    for family in FAMILIES:
        if family.model_type == config.model_type:
            for name in family.heads:
                if family.head(name, config).task == task:
                    return family, name
    raise TypeError(f"model must be {supported()}, got a config of {config.model_type!r} for {task}")


def supported() -> str:
    """The models that are supported, in words."""
    names = [name for family in FAMILIES for name in family.heads]
    heads = dict.fromkeys(f"For{head_in(name)}" for name in names if head_in(name))
    types = ", ".join(family.model_type for family in FAMILIES)
    return f"a transformers model of the family {types}, with one of the heads {', '.join(heads)} or without a head"
