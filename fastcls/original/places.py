"""Where modules keep their tensors: finding, comparing, replacing and releasing them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def place_of(model: nn.Module, name: str) -> tuple[dict[str, Tensor], str]:
    path, _, key = name.rpartition(".")
    return tensors_of(own_module(model, path), key), key


def own_module(model: nn.Module, path: str) -> nn.Module:
    """A module by our name, where a fast model that is trained shows the given model's modules."""
    first, _, rest = path.partition(".")
    parts: Mapping[str, nn.Module] = getattr(model, "own_parts", None) or {}
    return parts[first].get_submodule(rest) if first in parts else model.get_submodule(path)


def tensors_of(module: nn.Module, key: str) -> Any:
    """The dictionary in which a module holds a tensor: its parameters or its buffers."""
    return module._parameters if key in module._parameters else module._buffers


def has_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Whether a model has these weights, bit for bit once they are in its dtype."""
    for name, weight in weights.items():
        place, key = place_of(model, name)
        ours = place[key]
        if weight.is_meta or ours.is_meta or not torch.equal(ours, weight.to(ours.device, ours.dtype)):
            return False
    return True


def set_weight(model: nn.Module, name: str, weight: Tensor) -> None:
    """Replaces a parameter or buffer by a tensor."""
    place, key = place_of(model, name)
    place[key] = nn.Parameter(weight, requires_grad=False) if isinstance(place[key], nn.Parameter) else weight


def release(model: nn.Module) -> None:
    """Takes a model's weights out of it, so that the memory that nobody else reads is given back.

    Tensors on the device "meta" take their place: they have no memory, and the model's outputs have no numbers.
    """
    empty: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in empty:
                    without = torch.empty_like(parameter.detach(), device="meta")
                    empty[id(parameter)] = nn.Parameter(without, parameter.requires_grad)
                module._parameters[name] = empty[id(parameter)]
