"""A transformers model's parameters taken over, and given back under the checkpoint's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .families import Family
from .spec import EncoderSpec, HeadSpec, WeightMap


class Weighted(nn.Module):
    """A module whose parameters are handed to it; an optional one that is not there is None.

    Args:
        weights: the parameters by name.
        optional: names of those that may be missing.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], optional: Iterable[str] = ()) -> None:
        super().__init__()
        for name in optional:
            self.register_parameter(name, None)
        for name, weight in weights.items():
            self.register_parameter(name, weight)


def under(prefix: str, weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def weight_version(weight: Tensor) -> tuple[int, int]:
    """What changes when a weight is replaced or written to; writing through ``.data`` goes unseen."""
    # What was made in inference mode counts no changes.
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version


def take_over(
    model: PreTrainedModel, family: Family, spec: EncoderSpec, head: HeadSpec
) -> tuple[WeightMap, dict[str, nn.Parameter]]:
    """Parameters of ours over a model's memory. Of several that become one, the model's own become views.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: parameters that are not those of the model's class (adapters must be merged first), that do not fit
            its config, or that lie on several devices.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weight_map = family.weights(model.config, head, parameters.keys())
    owners = {id(parameters[name]): name for name in sorted(weight_map.checkpoint_names)}
    aliases = {
        name: owners[id(parameter)]
        for name, parameter in parameters.items()
        if name not in weight_map.checkpoint_names and id(parameter) in owners
    }
    weight_map = replace(weight_map, aliases=aliases)
    _check_parameters(parameters, weight_map)
    _check_tables(parameters, spec, weight_map)
    return weight_map, {own: _take(*map(parameters.__getitem__, names)) for own, names in weight_map.sources.items()}


def _check_parameters(parameters: Mapping[str, nn.Parameter], weight_map: WeightMap) -> None:
    differing = sorted(parameters.keys() - weight_map.checkpoint_names - weight_map.aliases.keys())
    if differing:
        raise ValueError(
            "model must have just the parameters of its class (merge or remove adapters first); "
            f"these differ: {', '.join(differing[:4])}{', ...' if len(differing) > 4 else ''}"
        )
    dtypes = {parameter.dtype for parameter in parameters.values()}
    allowed = {torch.float32, torch.float16, torch.bfloat16}
    if not any(parameter.is_cuda for parameter in parameters.values()):
        # To prove exactness with; no GPU kernel computes in it.
        allowed.add(torch.float64)
    if len(dtypes) != 1 or not dtypes <= allowed:
        raise TypeError(
            "model must have all its parameters in one of float32, float16 or bfloat16, "
            f"got {', '.join(sorted(map(str, dtypes)))}"
        )
    devices = {parameter.device for parameter in parameters.values()}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"model must have all its parameters on one device that holds data, got {found}")


def _check_tables(parameters: Mapping[str, nn.Parameter], spec: EncoderSpec, weight_map: WeightMap) -> None:
    """Ids are checked against the config's sizes, so the tables must have them."""
    for own, rows in (("word", spec.vocab_size), ("position", spec.position_rows), ("token_type", spec.token_types)):
        names = weight_map.sources.get(f"encoder.embeddings.{own}_weight", ())
        if bool(names) != bool(rows):
            raise ValueError(f"model must have {rows} {own} embeddings as its config says, got {list(names)}")
        for name in names:
            if parameters[name].shape != (rows, spec.embedding_size):
                raise ValueError(
                    f"{name} must have shape {(rows, spec.embedding_size)} as the config says, "
                    f"got {tuple(parameters[name].shape)}"
                )


def _take(*parameters: nn.Parameter) -> nn.Parameter:
    """A parameter over the same memory; several become one, and they its views."""
    if len(parameters) == 1:
        return nn.Parameter(parameters[0].data, requires_grad=False)
    first, rows = parameters[0].data, [parameter.shape[0] for parameter in parameters]
    starts = [first.data_ptr() + sum(rows[:index]) * first.stride(0) * first.itemsize for index in range(len(rows))]
    if [parameter.data_ptr() for parameter in parameters] == starts and _same_storage(parameters):
        # Optimized before: the views lie as they must, and whoever made them goes on sharing.
        fused = first.as_strided((sum(rows), *first.shape[1:]), first.stride())
    else:
        fused = torch.cat([parameter.data for parameter in parameters])
        for parameter, part in zip(parameters, fused.split(rows), strict=True):
            parameter.data = part
    return nn.Parameter(fused, requires_grad=False)


def _same_storage(parameters: Iterable[nn.Parameter]) -> bool:
    return len({parameter.untyped_storage().data_ptr() for parameter in parameters}) == 1


def to_checkpoint_names(weight_map: WeightMap, state_dict: dict[str, Any], prefix: str) -> None:
    """Renames our parameters in a state dict to the checkpoint's, in place."""
    for own, names in weight_map.sources.items():
        for name, part in zip(names, state_dict.pop(prefix + own).chunk(len(names)), strict=True):
            state_dict[prefix + name] = part
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
