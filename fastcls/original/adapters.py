"""Adapters of PEFT in a model: the modules around transformers' own, what they add, and what they stand for.

    out = rows weightᵀ + bias + Σ_adapters scale (drop(rows) downᵀ) upᵀ

PEFT puts a layer of its own around each layer that it adapts (LoRA), and around a module that is trained whole, of
which it keeps a copy for each adapter (``modules_to_save``). Both are read here as the module inside, with what is
added. The library is not imported to find out: where nobody has, no model has adapters.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..engine.weights import given_class, has_others_hooks, weight_version
from .own_code import class_name, folder_of, stranger_in


class _Same:
    """Is equal where it holds the same tensor; it holds it, so that no other tensor gets its id meanwhile."""

    __slots__ = ("tensor",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.tensor is self.tensor


class Added(NamedTuple):
    """What one adapter adds to a weight: scale up down.

    Attributes:
        down: (rank, in_features), LoRA's A.
        up: (out_features, rank), LoRA's B.
        scale: factor.
        rate: of the dropout of what ``down`` reads, as the dropout's module is set.
    """

    down: Tensor
    up: Tensor
    scale: float
    rate: float

    @property
    def state(self) -> tuple[object, ...]:
        """What changes when the numbers that are added do, as far as a change leaves a trace."""
        return *((_Same(each), *weight_version(each)) for each in (self.down, self.up)), self.scale


def sum_of(weight: Tensor, added: Sequence[Added]) -> Tensor:
    """(out_features, in_features), a weight with what is added to it, rounded once; itself where nothing is."""
    if not added:
        return weight
    dtypes = (each.dtype for one in added for each in (one.up, one.down))
    dtype = functools.reduce(torch.promote_types, dtypes, torch.promote_types(weight.dtype, torch.float32))
    total = weight.detach().to(dtype, copy=True)
    for each in added:
        total.addmm_(each.up.detach().to(dtype), each.down.detach().to(dtype), alpha=each.scale)
    return total.to(weight.dtype)


def _class_of(module: str, name: str) -> tuple[type, ...]:
    found = getattr(sys.modules.get(module), name, None)
    return () if found is None else (found,)


def is_low_rank(module: object) -> bool:
    """Whether a module is LoRA's around a linear layer."""
    return given_class(module) in _class_of("peft.tuners.lora.layer", "Linear")


def is_whole(module: object) -> bool:
    """Whether a module keeps copies of the one inside that are trained whole, one for each adapter."""
    return given_class(module) in _class_of("peft.utils.other", "ModulesToSaveWrapper")


def is_around(module: object) -> bool:
    """Whether a module of PEFT's that is taken stands around one of the model's."""
    return is_low_rank(module) or is_whole(module)


def inside(module: Any) -> nn.Module:
    """The module of the model's that one of PEFT's stands around, any other itself."""
    while is_around(module):
        module = module._modules["base_layer" if is_low_rank(module) else "original_module"]
    return module


def copies(module: Any) -> list[nn.Module]:
    """All modules that may stand in a place for the one inside."""
    return [*module.modules_to_save.values(), module.original_module] if is_whole(module) else [inside(module)]


def current(module: Any) -> nn.Module:
    """The module whose weights count now."""
    if is_whole(module):
        active = module.active_adapters
        if not active or module.disable_adapters or any(name not in module._adapters for name in active):
            return inside(module)
        found: nn.Module = module.modules_to_save[active[0]]
        return found
    return inside(module)


def added_by(layer: Any, path: str) -> list[Added]:
    """What the active adapters of a LoRA layer add.

    Args:
        layer: for which `is_low_rank` is true.
        path: its name in the model.

    Raises:
        ValueError: one of them is of a kind that fastcls does not compute.
    """
    if layer.disable_adapters:
        if layer.merged:
            raise ValueError(
                f"model.{path} must not have its adapters merged while they are disabled: call unmerge_adapter() first"
            )
        return []
    if layer.merged:
        return []
    found = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        _check_kind(layer, name, path)
        dropout = layer.lora_dropout[name]
        rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        found.append(Added(layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]), rate))
    return found


def _check_kind(layer: Any, name: str, path: str) -> None:
    place = f"the adapter {name!r} of model.{path}"
    variant = getattr(layer, "lora_variant", {}).get(name)
    if variant is not None or layer.use_dora.get(name):
        kind = "DoRA" if variant is None else type(variant).__name__
        raise ValueError(f"{place} must be plain LoRA, got {kind}: merge it first, with merge_and_unload()")
    if layer.lora_B[name].bias is not None:
        raise ValueError(f"{place} must have lora_bias=False, got a bias: merge it first, with merge_and_unload()")
    linear: tuple[type, ...] = (nn.Linear,)
    for part, allowed in (("lora_A", linear), ("lora_B", linear), ("lora_dropout", (nn.Dropout, nn.Identity))):
        module = getattr(layer, part)[name]
        if given_class(module) not in allowed or has_others_hooks(module):
            hooked = " with hooks" if given_class(module) in allowed else ""
            raise ValueError(
                f"{part} of {place} must be PEFT's own {allowed[0].__name__}, got {class_name(module)}{hooked}: "
                "fastcls would pass it by"
            )


def check_around(module: nn.Module, path: str) -> None:
    """Checks a module for which `is_around` is true: fastcls runs none of its code.

    Raises:
        ValueError: it has hooks, its code is not PEFT's own, or it computes something that fastcls does not.
    """
    stranger = stranger_in(type(module).forward, (folder_of(sys.modules["peft"]),))
    if has_others_hooks(module) or stranger is not None:
        found = "hooks, or another forward" if stranger is None else stranger.__qualname__
        raise ValueError(f"model.{path} must be PEFT's own {class_name(module)}, got {found}: fastcls would pass it by")
    if is_low_rank(module):
        if getattr(module, "fan_in_fan_out", False):
            raise ValueError(f"model.{path} must have fan_in_fan_out=False, got True: transformers' layers are not so")
        added_by(module, path)


def named_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules whose weights count, by the names that they have without adapters."""
    yield prefix.removesuffix("."), model
    for key, child in model._modules.items():
        if child is not None:
            yield from named_modules(current(child), f"{prefix}{key}.")


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that count, but for the adapters', by the names that they have without those."""
    return {
        f"{path}.{key}" if path else key: weight
        for path, module in named_modules(model)
        for key, weight in module._parameters.items()
        if weight is not None
    }


def low_rank_layers(model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """The layers that LoRA adapts, by the names of the layers inside."""
    found = {}
    for key, child in model._modules.items():
        if child is None:
            continue
        if is_low_rank(child):
            found[f"{prefix}{key}"] = child
        found |= low_rank_layers(current(child), f"{prefix}{key}.")
    return found


def has_adapters(model: nn.Module) -> bool:
    """Whether a module of PEFT's stands around one of the model's."""
    return bool(_class_of("peft.tuners.lora.layer", "Linear")) and any(map(is_around, model.modules()))


class Adapted:
    """The adapters in a model, as they stood when this was made.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        has_any = has_adapters(model)
        self._layers = low_rank_layers(model) if has_any else {}
        self._wholes = [(each, current(each)) for each in model.modules() if is_whole(each)] if has_any else []

    @property
    def paths(self) -> list[str]:
        """The names of the layers that have some."""
        return list(self._layers)

    def reads(self, tensors: set[int]) -> bool:
        """Whether the id of an adapter's weight is among ``tensors``."""
        return any(id(weight) in tensors for layer in self._layers.values() for weight in layer.parameters())

    def stands(self) -> bool:
        """Whether the same copies are in use of modules that are trained whole."""
        return all(current(each) is one for each, one in self._wholes)

    def added(self) -> dict[str, list[Added]]:
        """What is added to each weight, by the names that weights have without adapters.

        Raises:
            ValueError: an adapter of a kind that fastcls does not compute.
        """
        found = {f"{path}.weight": added_by(layer, path) for path, layer in self._layers.items()}
        return {name: several for name, several in found.items() if several}
