"""A fast model's state dict, which has the checkpoint's names."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ..families.checkpoint import from_checkpoint_names, is_distributed, to_checkpoint_names
from ..original.following import NO_LONGER_FOLLOWED
from ..original.places import has_weights


def register_hooks(model: nn.Module) -> None:
    """Has a `FastModel` give and take state dicts with the checkpoint's names."""
    model.register_state_dict_pre_hook(_follow_first)
    model.register_state_dict_post_hook(_to_checkpoint_names)
    model.register_load_state_dict_pre_hook(_from_checkpoint_names)
    model.register_load_state_dict_post_hook(_forget_caches)


def _follow_first(module: Any, _prefix: str, _keep_vars: bool) -> None:
    if module.trained is None:
        module.check_not_let_go("state_dict")
        module.catch_up()


def _to_checkpoint_names(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if module.trained is None:
        to_checkpoint_names(module.weight_map, state_dict, prefix)
        return
    # Tied weights are copies here: safetensors, by which transformers' Trainer saves, refuses shared memory.
    seen: set[int] = set()
    for name, tensor in state_dict.items():
        # What is spread over processes has no memory to be shared.
        if name.startswith(prefix) and not tensor.requires_grad and not is_distributed(tensor):
            place = tensor.data_ptr()
            state_dict[name] = tensor.clone() if place in seen else tensor
            seen.add(place)


def _from_checkpoint_names(
    module: Any,
    state_dict: dict[str, Any],
    prefix: str,
    _local_metadata: dict[str, Any],
    _strict: bool,
    missing_keys: list[str],
    _unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    if module.trained is not None:
        # The modules are the given model's, and so are the names.
        return
    module.check_not_let_go("load_state_dict")
    try:
        module.catch_up()
    except RuntimeError:
        # The loaded weights replace those that cannot be followed any more.
        module.stop_following()
    from_checkpoint_names(module.weight_map, module, state_dict, prefix, missing_keys, error_msgs)
    names = module.weight_map.sources
    if prefix and has_weights(module, {name: state_dict[prefix + name] for name in names}):
        # A larger module holds the original, too, and has loaded it before: a trainer's that goes on where it was.
        for name in names:
            state_dict[prefix + name] = module.get_parameter(name)
        return
    # The loaded weights are this model's own: the original keeps its weights.
    if prefix and module.follows_on:
        warnings.warn(NO_LONGER_FOLLOWED, RuntimeWarning, stacklevel=2)
    module.stop_following()


def _forget_caches(module: Any, _incompatible_keys: object) -> None:
    module.clear_caches()
