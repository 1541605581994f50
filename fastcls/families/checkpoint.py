"""The checkpoint's names of our weights: taking weights over, and renaming state dicts both ways."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..engine.spec import HeadSpec
from .family import ByHead, Family, WeightMap


def map_weights(
    parameters: Mapping[str, nn.Parameter], family: Family, config: PreTrainedConfig, head: HeadSpec
) -> WeightMap:
    """Checks a model's weights, and maps each of ours to the model's.

    Args:
        parameters: by all their names.
        family, config, head: the model's.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: weights that are not those of the model's class (adapters must be merged first), are not plain
            tensors, hold no data, or lie on several devices.
    """
    weight_map = family.weights(config, head, parameters.keys())
    names = weight_map.checkpoint_names
    owners = {id(parameters[name]): name for name in sorted(names)}
    aliases = {
        name: owners[id(parameter)]
        for name, parameter in parameters.items()
        if name not in names and id(parameter) in owners
    }
    rows = {
        own: tuple(parameters[name].shape[0] for name in parts)
        for own, parts in weight_map.sources.items()
        if len(parts) > 1 and own not in weight_map.layouts
    }
    weight_map = replace(weight_map, aliases=aliases, rows=rows)
    differing = sorted(parameters.keys() - names - aliases.keys())
    if differing:
        raise ValueError(
            f"model.{differing[0]} must be tied to another weight, as transformers ties it: call model.tie_weights() "
            "(models whose config says tie_word_embeddings=False are not taken)"
        )
    for name, parameter in parameters.items():
        check_plain(f"model.{name}", parameter)
    for own, parts in weight_map.sources.items():
        # Every call reads a row of each.
        if own.startswith("encoder.embeddings.") and not len(parameters[parts[0]]):
            raise ValueError(
                f"model.{parts[0]} must have a row at least, got shape {tuple(parameters[parts[0]].shape)}: a size in "
                "the config, as type_vocab_size, is 0"
            )
    _check_together(parameters.values())
    return weight_map


_PLAIN = frozenset({nn.Parameter, Tensor, nn.Buffer})


def check_plain(name: str, weight: Tensor) -> None:
    """Raises ValueError if a weight's tensor class may compute in a way of its own."""
    # A parameter made of a tensor subclass has that subclass itself as its type.
    what = type(weight)
    if weight.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got one of layout {weight.layout}")
    if what not in _PLAIN:
        hint = "layers that were quantised are not taken: optimize the model as it was, in bfloat16 or float32"
        if is_distributed(weight):
            hint = "a model that is spread over processes is not taken: optimize a whole one"
        raise ValueError(f"{name} must be a plain tensor, got a {what.__module__}.{what.__qualname__}: {hint}")


def is_distributed(weight: Tensor) -> bool:
    """Whether a weight is spread over processes."""
    # By its name, since its module is imported by those alone who make one.
    return type(weight).__name__ == "DTensor"


def _check_together(parameters: Iterable[nn.Parameter]) -> None:
    parameters = list(parameters)
    dtypes = {parameter.dtype for parameter in parameters}
    allowed = {torch.float32, torch.float16, torch.bfloat16}
    if not any(parameter.is_cuda for parameter in parameters):
        # For proving exactness; no GPU kernel computes in it.
        allowed.add(torch.float64)
    if len(dtypes) != 1 or not dtypes <= allowed:
        raise TypeError(
            "model must have all its parameters in one of float32, float16 or bfloat16, "
            f"got {', '.join(sorted(map(str, dtypes)))}"
        )
    devices = {parameter.device for parameter in parameters}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"model must have all its parameters on one device that holds data, got {found}")


def made_of(parts: Sequence[Tensor], layout: ByHead | None = None) -> Tensor:
    """One of our weights: it shares the memory and count of changes of one of theirs, or has its own memory."""
    if layout is not None:
        return layout.made_of(parts)
    if len(parts) > 1:
        return torch.cat([part.detach() for part in parts])
    # Kernels read rows that lie one after the other.
    return parts[0].detach().contiguous()


def to_checkpoint_names(weight_map: WeightMap, state_dict: dict[str, Any], prefix: str) -> None:
    """Renames our parameters in a state dict to the checkpoint's, in place."""
    for own, names in weight_map.sources.items():
        for name, part in zip(names, weight_map.parts(own, state_dict.pop(prefix + own)), strict=True):
            # Each in its own memory: savers take views of one memory for one weight.
            state_dict[prefix + name] = part if weight_map.is_one(own) else part.clone()
    for alias, name in weight_map.aliases.items():
        state_dict[prefix + alias] = state_dict[prefix + name]
    for own, name in weight_map.buffers.items():
        # Most are in no checkpoint.
        if prefix + own in state_dict:
            state_dict[prefix + name] = state_dict.pop(prefix + own)


def from_checkpoint_names(
    weight_map: WeightMap,
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    missing_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Renames the checkpoint's parameters in a state dict to ours, in place; says what is missing or does not fit."""
    for own, name in weight_map.buffers.items():
        if prefix + name in state_dict:
            state_dict[prefix + own] = state_dict.pop(prefix + name)
    given: dict[str, Tensor] = {}
    for name in (*weight_map.checkpoint_names, *weight_map.aliases):
        if prefix + name in state_dict:
            given.setdefault(weight_map.aliases.get(name, name), state_dict.pop(prefix + name))
    for own, names in weight_map.sources.items():
        current = weight_map.parts(own, module.get_parameter(own).data)
        missing_keys.extend(prefix + name for name in names if name not in given)
        parts = [given.get(name, part) for name, part in zip(names, current, strict=True)]
        for name, part, kept in zip(names, parts, current, strict=True):
            if part.shape != kept.shape:
                error_msgs.append(
                    f"size mismatch for {prefix + name}: the checkpoint's is {tuple(part.shape)}, "
                    f"the model's {tuple(kept.shape)}"
                )
                parts = list(current)
                break
        is_one = weight_map.is_one(own)
        state_dict[prefix + own] = parts[0] if is_one else made_of(parts, weight_map.layouts.get(own))
