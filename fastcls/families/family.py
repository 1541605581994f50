"""What a family's file says, and the checks and names that families share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

from fastcls_kernels import Activation

from ..engine.spec import EncoderSpec, HeadSpec

# One module's name in a checkpoint, or those of several that are joined.
Names = Mapping[str, str | tuple[str, ...]]

# For options of a config what reads their values from an encoder that was built of it.
Built = Mapping[str, Callable[[Any, Any], Any]]

# What stands on an encoder, where need be as a function of the model's config.
Head = HeadSpec | Callable[[Any], HeadSpec]

# Names in transformers of what the kernels compute.
ACTIVATION_NAMES: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}

# The modules that transformers makes of those names, in written form, since a name may be given to another one.
ACTIVATION_CLASSES: dict[str, Activation] = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "Tanh": "tanh",
}


@dataclass(frozen=True)
class WeightMap:
    """Where each of our parameters comes from in a checkpoint.

    Attributes:
        sources: maps one of our names to the checkpoint's: one name, or several to be joined along the first dimension
            (query, key and value are one matrix here).
        aliases: other names in the checkpoint of one and the same parameter: of tied weights.
        buffers: maps the names of our buffers that are the model's to the model's: no checkpoint holds them.
    """

    sources: Mapping[str, tuple[str, ...]]
    aliases: Mapping[str, str]
    buffers: Mapping[str, str]

    @property
    def checkpoint_names(self) -> set[str]:
        return {name for names in self.sources.values() for name in names}


def joined(parts: str | Iterable[str], kind: str) -> tuple[str, ...]:
    """The checkpoint's names of one kind, "weight" or "bias", of one or several modules."""
    return tuple(f"{part}.{kind}" for part in ((parts,) if isinstance(parts, str) else parts))


@dataclass(frozen=True)
class Family:
    """How the models of one architecture are read.

    Attributes:
        model_type: of their config.
        prefix: what the encoder's parameters begin with in a model for a task: "bert.".
        spec: reads a config. Raises ValueError, naming the option, where it asks for what is not computed.
        modules: from a config to the checkpoint's names of the encoder's modules, below the prefix: ours to theirs.
        heads: for each model class what stands on the encoder.
        output: the class in ``transformers.modeling_outputs`` that the model without a head gives.
        built: options of the config that the encoder's modules hold values of, each with what reads its value from
            encoder and config: they count, since a config can be edited after the model was built.
        buffers: from the config to the checkpoint's names of buffers that are computed with, ours to theirs.
    """

    model_type: str
    prefix: str
    spec: Callable[[Any], EncoderSpec]
    modules: Callable[[Any], Names]
    heads: Mapping[str, Head]
    output: str
    built: Built
    buffers: Callable[[Any], Mapping[str, str]] = lambda _: {}

    def head(self, model_class: str, config: PreTrainedConfig) -> HeadSpec:
        """What stands on the encoder in a model of a class. Raises ValueError as ``spec`` does."""
        head = self.heads[model_class]
        return head if isinstance(head, HeadSpec) else head(config)

    def weights(self, config: PreTrainedConfig, head: HeadSpec, present: Collection[str]) -> WeightMap:
        """The map of a model's parameters, of which ``present`` are there: biases and poolers may be left out."""
        prefix = "" if head.task == "encoder" else self.prefix
        modules = self.modules(config)
        sources: dict[str, tuple[str, ...]] = {}
        for kind in ("weight", "bias"):
            for own, parts in modules.items():
                sources[f"encoder.{own}_{kind}"] = tuple(prefix + name for name in joined(parts, kind))
            for own, name in head.names.items():
                if own != "bias":
                    sources[f"head.{own}_{kind}"] = joined(name, kind)
        if "bias" in head.names:
            sources["head.out_bias"] = (head.names["bias"],)
        there = {own: names for own, names in sources.items() if all(name in present for name in names)}
        buffers = {f"encoder.{own}": prefix + name for own, name in self.buffers(config).items()}
        return WeightMap(there, {}, buffers)


def check_options(config: PreTrainedConfig, needed: Iterable[tuple[str, object]]) -> None:
    """Raises ValueError where an option is there and is not as needed."""
    for name, value in needed:
        found = getattr(config, name, value)
        if found != value:
            raise ValueError(f"config.{name} must be {value!r}, got {found!r}: fastcls does not compute that")


def check_encoder(config: PreTrainedConfig) -> None:
    """Raises ValueError where a config asks for a decoder, or for other than absolute positions."""
    check_options(config, (("is_decoder", False), ("add_cross_attention", False)))
    # Absent from configs of transformers >= 5, which no longer has any other kind, but alive in old checkpoints.
    if getattr(config, "position_embedding_type", None):
        check_options(config, (("position_embedding_type", "absolute"),))


def check_sizes(
    config: PreTrainedConfig,
    hidden: str = "hidden_size",
    heads: str = "num_attention_heads",
    layers: str = "num_hidden_layers",
) -> None:
    """Raises ValueError where the kernels have no tile for a size; the names are those of the config's options."""
    hidden_size, num_heads = getattr(config, hidden), getattr(config, heads)
    head_dim, remainder = divmod(hidden_size, num_heads)
    if remainder or not 4 <= head_dim <= 128 or not 16 <= hidden_size <= 4096 or num_heads > 64:
        raise ValueError(
            f"config.{hidden} must be from 16 to 4096 in at most 64 heads of 4 to 128, got {hidden_size} / {num_heads}"
        )
    if getattr(config, layers) < 1:
        raise ValueError(f"config.{layers} must be at least 1, got {getattr(config, layers)}")


def activation_of(config: PreTrainedConfig, name: str) -> Activation:
    """The activation that ``config.name`` names.

    Raises:
        ValueError: it is none that is computed.
    """
    found = getattr(config, name)
    if found not in ACTIVATION_NAMES:
        raise ValueError(f"config.{name} must be one of {', '.join(ACTIVATION_NAMES)}, got {found!r}")
    return ACTIVATION_NAMES[found]


def activation_in(module: nn.Module) -> Activation | None:
    """Which of the activations that are computed a module is, or None."""
    name = type(module).__name__
    if not type(module).__module__.startswith(("torch.nn.", "transformers.")):
        return None
    # transformers' GELU calls what stands in this attribute.
    act = getattr(module, "act", F.gelu)
    if (
        name == "GELUActivation"
        and act is not F.gelu
        and getattr(act, "__func__", None) is not getattr(type(module), "_gelu_python", None)
    ):
        return None
    if name == "GELU":
        return "gelu" if getattr(module, "approximate", None) == "none" else "gelu_tanh"
    return ACTIVATION_CLASSES.get(name)


def activation_built(module: nn.Module, current: object) -> str | None:
    """What a config calls a module's activation: ``current`` where that is it, None where it has no name."""
    found = activation_in(module)
    if isinstance(current, str) and ACTIVATION_NAMES.get(current) == found:
        return current
    return next((name for name, activation in ACTIVATION_NAMES.items() if activation == found), None)


def rows_of(table: nn.Embedding) -> int:
    """How many rows an embedding has, which its ``num_embeddings`` need not say."""
    return table.weight.shape[0]


def one_of_each(num_layers: int) -> tuple[int, ...]:
    """Layers of which each has weights of its own."""
    return tuple(range(num_layers))


def layer_modules(prefixes: Iterable[str], layer: Names) -> Names:
    """The modules of all sets of layers' weights, whose names begin with ``prefixes``."""
    return {
        f"layers.{index}.{own}": prefix + parts if isinstance(parts, str) else tuple(prefix + part for part in parts)
        for index, prefix in enumerate(prefixes)
        for own, parts in layer.items()
    }
