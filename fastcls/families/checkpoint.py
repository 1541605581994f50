"""Whose weight is whose: a checkpoint's names and ours, and weights taken from the one and given back to the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..engine.spec import HeadSpec
from .family import Family, WeightMap


def map_weights(model: PreTrainedModel, family: Family, config: PreTrainedConfig, head: HeadSpec) -> WeightMap:
    """Where each of our weights comes from in a model, whose weights are checked.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: weights that are not those of the model's class (adapters must be merged first), that are no plain
            tensors, that hold no data, or that lie on several devices.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weight_map = family.weights(config, head, parameters.keys())
    names = weight_map.checkpoint_names
    owners = {id(parameters[name]): name for name in sorted(names)}
    aliases = {
        name: owners[id(parameter)]
        for name, parameter in parameters.items()
        if name not in names and id(parameter) in owners
    }
    weight_map = replace(weight_map, aliases=aliases)
    differing = sorted(parameters.keys() - names - aliases.keys())
    if differing:
        raise ValueError(
            f"model.{differing[0]} must be tied to another weight, as transformers ties it: call model.tie_weights() "
            "(models whose config says tie_word_embeddings=False are not taken)"
        )
    for name, parameter in parameters.items():
        check_plain(f"model.{name}", parameter)
    _check_together(parameters.values())
    return weight_map


_PLAIN = frozenset({nn.Parameter, Tensor, nn.Buffer})


def check_plain(name: str, weight: Tensor) -> None:
    """Raises ValueError where a weight is of a class of tensors that computes in a way of its own."""
    # A parameter over a tensor of another class is of that class itself.
    what = type(weight)
    if weight.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got one of layout {weight.layout}")
    if what not in _PLAIN:
        hint = "layers that were quantised are not taken: optimize the model as it was, in bfloat16 or float32"
        if what.__name__ == "DTensor":
            hint = "a model that is spread over processes is not taken: optimize a whole one"
        raise ValueError(f"{name} must be a plain tensor, got a {what.__module__}.{what.__qualname__}: {hint}")


def _check_together(parameters: Iterable[nn.Parameter]) -> None:
    parameters = list(parameters)
    dtypes = {parameter.dtype for parameter in parameters}
    allowed = {torch.float32, torch.float16, torch.bfloat16}
    if not any(parameter.is_cuda for parameter in parameters):
        # To prove exactness with; no GPU kernel computes in it.
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


def made_of(parts: Sequence[Tensor]) -> Tensor:
    """One weight of ours: over the memory of one of theirs, with the same count of changes, or memory of its own."""
    if len(parts) > 1:
        return torch.cat([part.detach() for part in parts])
    # Kernels read rows that lie one behind the other.
    return parts[0].detach().contiguous()


def to_checkpoint_names(weight_map: WeightMap, state_dict: dict[str, Any], prefix: str) -> None:
    """Renames our parameters in a state dict to the checkpoint's, in place."""
    for own, names in weight_map.sources.items():
        for name, part in zip(names, state_dict.pop(prefix + own).chunk(len(names)), strict=True):
            # Each in memory of its own, since what saves them takes views of one memory for one and the same weight.
            state_dict[prefix + name] = part if len(names) == 1 else part.clone()
    for alias, name in weight_map.aliases.items():
        state_dict[prefix + alias] = state_dict[prefix + name]


def from_checkpoint_names(
    weight_map: WeightMap,
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    missing_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Renames the checkpoint's parameters in a state dict to ours, in place; says what is missing or does not fit."""
    given: dict[str, Tensor] = {}
    for name in (*weight_map.checkpoint_names, *weight_map.aliases):
        if prefix + name in state_dict:
            given.setdefault(weight_map.aliases.get(name, name), state_dict.pop(prefix + name))
    for own, names in weight_map.sources.items():
        current = module.get_parameter(own).data.chunk(len(names))
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
        state_dict[prefix + own] = parts[0] if len(parts) == 1 else torch.cat(parts)
