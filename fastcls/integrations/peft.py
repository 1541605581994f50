"""PEFT's models, with a fast model inside: LoRA, trained and switched as PEFT does."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from ..models.base import FastModel
from ..original.own_code import advice_for

_Module = TypeVar("_Module", bound=nn.Module)


def is_peft_model(model: object) -> bool:
    """Whether a model is one of PEFT's. The library is not imported to find out."""
    library = sys.modules.get("peft")
    return library is not None and isinstance(model, library.PeftModel)


def optimize_peft_model(model: Any, optimize: Callable[..., FastModel]) -> Any:
    """A model of PEFT's around a fast model, with the given one's adapters.

    Args:
        model: for which `is_peft_model` is true.
        optimize: makes a transformers model fast.

    The adapters and all weights are the given model's: what is trained, added or switched in one is so in the other.
    In eval mode the fast model computes with the adapters merged into weights of its own, in training mode apart.

    Raises:
        TypeError: the adapters are of another kind than LoRA.
        ValueError: one of them is of a kind of LoRA that fastcls does not compute, or ``optimize`` refuses the model.
    """
    tuner = model.base_model
    if type(tuner) is not getattr(sys.modules["peft"], "LoraModel", None):
        kinds = ", ".join(
            sorted({str(getattr(each.peft_type, "value", each.peft_type)) for each in model.peft_config.values()})
        )
        raise TypeError(
            f"model must have adapters of LoRA, got a {type(model).__name__} of {kinds}: {advice_for(model)}"
        )
    fast = optimize(tuner.model)
    fast.show_original()
    fast.peft_config = model.peft_config
    return _with(model, base_model=_with(tuner, model=fast))


def _with(module: _Module, **children: nn.Module) -> _Module:
    """A module in eval mode with the same attributes, hooks of its own, and other modules inside."""
    fresh = copy.copy(module)
    own = {name: copy.copy(module.__dict__[name]) for name in nn.Module().__dict__}
    fresh.__dict__ = {**module.__dict__, **own, "_modules": {**module._modules, **children}, "training": False}
    return fresh
