"""The form of a family's file, and the checks and names that families share."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fastcls_kernels import Activation

from ..engine.spec import EncoderSpec, HeadSpec

# For each of our modules its name in a checkpoint, or the names of several modules that are joined.
Names = Mapping[str, str | tuple[str, ...]]

# For options of a config, functions that read their values from the encoder that was built from it.
Built = Mapping[str, Callable[[Any, Any], Any]]

# The head on an encoder: a spec, or a function from the model's config to one.
HeadOf = HeadSpec | Callable[[Any], HeadSpec]

# transformers' names of the activations that the kernels compute.
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

# The modules that transformers makes for those names: written out, since a user may register another under a name.
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
class ByHead:
    """Queries, keys and values that a checkpoint keeps head by head: in ours, those of all heads stand together.

    Attributes:
        num_heads: how many heads there are.
        kinds: for each of the checkpoint's weights, the first of queries (0), keys (1) and values (2) that it holds,
            and the one behind its last. What no weight holds is zero.
    """

    num_heads: int
    kinds: tuple[tuple[int, int], ...]

    def views(self, weight: Tensor) -> tuple[Tensor, ...]:
        """For each of the checkpoint's weights the rows of ours that it fills, (num_heads, kinds, head_dim, ...)."""
        rows = weight.unflatten(0, (3, self.num_heads, -1))
        return tuple(rows[first:end].transpose(0, 1) for first, end in self.kinds)

    def made_of(self, parts: Sequence[Tensor]) -> Tensor:
        """Ours, from the checkpoint's weights."""
        first, end = self.kinds[0]
        ours = parts[0].new_zeros(3 * parts[0].shape[0] // (end - first), *parts[0].shape[1:])
        for rows, part in zip(self.views(ours), parts, strict=True):
            rows.copy_(part.detach().reshape(rows.shape))
        return ours


@dataclass(frozen=True)
class WeightMap:
    """Where each of our parameters comes from in a checkpoint.

    Attributes:
        sources: maps one of our names to the checkpoint's: one name, or several to be joined along the first dimension
            (query, key and value are one matrix here).
        aliases: maps the checkpoint's other names of tied weights to those in ``sources``.
        buffers: maps our names of the model's buffers to the model's names; few checkpoints hold them.
        rows: for each of our names how many rows each of the checkpoint's weights has that are joined.
        layouts: how those of ours are made whose rows stand in another order than the checkpoint's.
    """

    sources: Mapping[str, tuple[str, ...]]
    aliases: Mapping[str, str]
    buffers: Mapping[str, str]
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    layouts: Mapping[str, ByHead] = field(default_factory=dict)

    @property
    def checkpoint_names(self) -> set[str]:
        return {name for names in self.sources.values() for name in names}

    def is_one(self, own: str) -> bool:
        """Whether one of our weights is one of the checkpoint's, as it is."""
        return own not in self.layouts and len(self.sources[own]) == 1

    def numel(self, own: str, weight: Tensor) -> int:
        """How many numbers of one of our weights a checkpoint holds."""
        layout = self.layouts.get(own)
        return weight.numel() if layout is None else sum(rows.numel() for rows in layout.views(weight))

    def spread(self, own: str, index: int, part: Tensor, num_rows: int) -> tuple[Tensor, int]:
        """Rows of one of the checkpoint's weights as ours has them, and the row of ours at which they begin.

        Args:
            own: our weight's name.
            index: which of its parts it is.
            part: (rows of that part, any).
            num_rows: of ours. Where its rows stand in another order all are given, zero but for the part's.
        """
        if own not in self.layouts:
            return part, sum(self.rows[own][:index]) if own in self.rows else 0
        places = self.layouts[own].views(torch.arange(num_rows, device=part.device))[index].reshape(-1)
        return part.new_zeros(num_rows, part.shape[1]).index_copy(0, places, part), 0

    def parts(self, own: str, weight: Tensor) -> tuple[Tensor, ...]:
        """The checkpoint's weights that one of ours is made of: views of it where their rows stand in its order."""
        if own in self.layouts:
            return tuple(rows.reshape(-1, *weight.shape[1:]) for rows in self.layouts[own].views(weight))
        # A single part may be a scalar, which cannot be split.
        return (weight,) if len(self.sources[own]) == 1 else weight.split(self.rows[own])


def head_in(model_class: str) -> str:
    """What the name of a model class says of its head, "SequenceClassification" of a classifier; "" for an encoder."""
    # RoFormer's own name has a "For", too.
    found = re.search(r"For(?=[A-Z])", model_class)
    return model_class[found.end() :] if found else ""


def joined(parts: str | Iterable[str], kind: str) -> tuple[str, ...]:
    """The checkpoint's names of one kind, "weight" or "bias", of one or several modules."""
    return tuple(f"{part}.{kind}" for part in ((parts,) if isinstance(parts, str) else parts))


@dataclass(frozen=True)
class Family:
    """How the models of one architecture are read.

    Attributes:
        model_type: of their config.
        prefix: begins the names of the encoder's parameters in a model for a task: "bert.".
        spec: reads a config. Raises ValueError, naming the option, if it asks for something that is not computed.
        modules: from a config to a map from our names of the encoder's modules to the checkpoint's, without the prefix.
        heads: the head of each model class.
        output: the class in ``transformers.modeling_outputs`` that the model without a head returns.
        built: options whose values the encoder's modules hold, each with a function that reads its value from encoder
            and config. The modules' values count, since a config can be edited after the model was built.
        buffers: from the config to a map from our names of buffers to the model's.
        read_at_calls: options that transformers reads from the config at each call: once one has another value, a fast
            model that was made before does not run.
        layouts: from the config to a map from our names of parameters whose rows stand in another order to the model's
            names, and how ours are made of them.
    """

    model_type: str
    prefix: str
    spec: Callable[[Any], EncoderSpec]
    modules: Callable[[Any], Names]
    heads: Mapping[str, HeadOf]
    output: str
    built: Built
    buffers: Callable[[Any], Mapping[str, str]] = lambda _: {}
    layouts: Callable[[Any], Mapping[str, tuple[tuple[str, ...], ByHead]]] = lambda _: {}
    read_at_calls: tuple[str, ...] = ()

    def head(self, model_class: str, config: PreTrainedConfig) -> HeadSpec:
        """The head of a model class. Raises ValueError as ``spec`` does."""
        head = self.heads[model_class]
        return head if isinstance(head, HeadSpec) else head(config)

    def weights(self, config: PreTrainedConfig, head: HeadSpec, present: Collection[str]) -> WeightMap:
        """The map of a model's parameters; ``present`` names those it has, since biases and poolers may be left out."""
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
        layouts: dict[str, ByHead] = {}
        for own, (names, layout) in self.layouts(config).items():
            sources[f"encoder.{own}"] = tuple(prefix + name for name in names)
            layouts[f"encoder.{own}"] = layout
        there = {own: names for own, names in sources.items() if all(name in present for name in names)}
        buffers = {f"encoder.{own}": prefix + name for own, name in self.buffers(config).items()}
        return WeightMap(there, {}, buffers, layouts=layouts)


def check_options(config: PreTrainedConfig, needed: Iterable[tuple[str, object]]) -> None:
    """Raises ValueError if the config has an option with another value than the needed one."""
    for name, value in needed:
        found = getattr(config, name, value)
        if found != value:
            raise ValueError(f"config.{name} must be {value!r}, got {found!r}: fastcls does not compute that")


def check_encoder(config: PreTrainedConfig) -> None:
    """Raises ValueError if a config asks for a decoder, or for other than absolute positions."""
    check_options(config, (("is_decoder", False), ("add_cross_attention", False)))
    # Absent from configs of transformers >= 5, which has no other kind any more, but alive in old checkpoints.
    if getattr(config, "position_embedding_type", None):
        check_options(config, (("position_embedding_type", "absolute"),))


def check_sizes(
    config: PreTrainedConfig,
    hidden: str = "hidden_size",
    heads: str = "num_attention_heads",
    layers: str = "num_hidden_layers",
) -> None:
    """Raises ValueError if the kernels have no tile for a size; the arguments name the config's options."""
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
        ValueError: the kernels do not compute it.
    """
    found = getattr(config, name)
    if found not in ACTIVATION_NAMES:
        raise ValueError(f"config.{name} must be one of {', '.join(ACTIVATION_NAMES)}, got {found!r}")
    return ACTIVATION_NAMES[found]


def activation_in(module: nn.Module) -> Activation | None:
    """The activation that a module computes, or None if the kernels do not compute it."""
    name = type(module).__name__
    if not type(module).__module__.startswith(("torch.nn.", "transformers.")):
        return None
    # transformers' GELU calls the function in this attribute.
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
    """A config's name of a module's activation: ``current`` if that is one, None if there is none."""
    found = activation_in(module)
    if isinstance(current, str) and ACTIVATION_NAMES.get(current) == found:
        return current
    return next((name for name, activation in ACTIVATION_NAMES.items() if activation == found), None)


def rows_of(table: nn.Embedding) -> int:
    """The number of an embedding's rows, which its ``num_embeddings`` may not give."""
    return table.weight.shape[0]


def one_of_each(num_layers: int) -> tuple[int, ...]:
    """The order of layers that share no weights."""
    return tuple(range(num_layers))


def layer_modules(prefixes: Iterable[str], layer: Names) -> Names:
    """The modules of all layers: one set of weights for each prefix."""
    return {
        f"layers.{index}.{own}": prefix + parts if isinstance(parts, str) else tuple(prefix + part for part in parts)
        for index, prefix in enumerate(prefixes)
        for own, parts in layer.items()
    }


def pre_norm_modules(begins: Sequence[str], last: str) -> Names:
    """The norms that end our layers of a pre-norm encoder: each begins the model's next layer.

    Args:
        begins: for each layer the name of the norm that begins it.
        last: the name of the encoder's last norm.
    """
    ends = {f"layers.{i}.output_norm": name for i, name in enumerate((*begins[1:], last))}
    return {"embeddings.first_norm": begins[0], **ends}
