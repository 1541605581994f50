"""Weights that modules are handed, and what is made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks


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


def under(prefix: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Those whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def weight_version(weight: Tensor) -> tuple[int, int]:
    """What changes when a weight is replaced or written to; writing through ``.data`` goes unseen."""
    # What was made in inference mode counts no changes.
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version


def in_memory_of(old: Tensor | None, fresh: Tensor) -> Tensor:
    """``fresh``, written over ``old`` where it fits there, since CUDA graphs may read that memory."""
    if old is None or (old.shape, old.dtype, old.device) != (fresh.shape, fresh.dtype, fresh.device):
        return fresh
    return old.copy_(fresh)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call runs more than the class's ``forward``: hooks, or another ``forward`` set on the module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def gathers(module: nn.Module) -> bool:
    """Whether what runs around a module's calls gathers its weights, as `torch.distributed.fsdp.fully_shard` has it.

    Where somebody else's hooks are beside those, or another ``forward``, this is False.
    """
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    is_alone = "forward" not in vars(module) and all(map(_is_of_fsdp, hooks))
    return bool(hooks) and is_alone


def has_others_hooks(module: nn.Module) -> bool:
    """`has_hooks`, but for what gathers weights."""
    return has_hooks(module) and not gathers(module)


def given_class(module: object) -> type:
    """The class of a module, where `fully_shard` has put one of its own before it too."""
    classes = type(module).__mro__
    return classes[2] if len(classes) > 2 and _is_of_fsdp(classes[1]) else classes[0]


def _is_of_fsdp(thing: object) -> bool:
    return str(getattr(thing, "__module__", "")).startswith("torch.distributed.fsdp")


def is_intercepted(module: nn.Module) -> bool:
    """Whether somebody else's code may have a call of a module's rows: its hooks, or those for all modules."""
    return has_hooks(module) or bool(_global_forward_hooks or _global_forward_pre_hooks)


def checked_rows(name: str, rows: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    """Rows that hooks may have made, in one piece, as the kernels take them, which check nothing.

    Args:
        name: what the message calls them.
        rows: the rows.
        shape: the shape that they must have.
        like: a tensor whose dtype and device they must have.

    Raises:
        TypeError: they are no tensor, or of another dtype.
        ValueError: their shape or device is another.
    """
    if not isinstance(rows, Tensor) or rows.dtype != like.dtype:
        found = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"hooks must leave {name} a tensor of {like.dtype}, got {found}")
    if rows.shape != tuple(shape) or rows.device != like.device:
        raise ValueError(
            f"hooks must leave {name} of shape {tuple(shape)} on {like.device}, "
            f"got {tuple(rows.shape)} on {rows.device}"
        )
    return rows.contiguous()


def is_spread(module: nn.Module) -> bool:
    """Whether `torch.distributed.fsdp.fully_shard` has spread a module's weights over processes.

    It marks all modules below the one that it was given; each of their weights is whole while that one runs.
    """
    return bool(getattr(module, "_is_fsdp_managed_module", False))
