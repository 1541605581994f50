"""A model's weights and modules as they were last seen, in lists that are compared without a loop in Python."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapters import current

# How often a tensor has been written to.
version_of = attrgetter("_version")


class Slot(NamedTuple):
    """A weight of the original, as it was last seen.

    Attributes:
        own: the name of our weight that it belongs to.
        name: its name in the original.
        place: the ``_parameters`` or ``_buffers`` of its module.
        key: its key there.
        shape: its shape, of which a tensor keeps no trace when its data are replaced.
    """

    own: str
    name: str
    place: dict[str, Tensor | None]
    key: str
    shape: torch.Size


class Seen(NamedTuple):
    """All slots that are alive, as lists: comparing them takes no loop in Python."""

    slots: list[Slot]
    places: list[dict[str, Tensor | None]]
    keys: list[str]
    tensors: list[Tensor | None]
    pointers: list[int]
    counting: list[Tensor]
    versions: list[int]
    # Held, so that no new tensor gets an old one's address and is taken for it.
    storages: list[torch.UntypedStorage]

    def is_current(self) -> bool:
        now = list(map(dict.__getitem__, self.places, self.keys))
        return (
            all(map(is_, now, self.tensors))
            and list(map(Tensor.data_ptr, self.tensors)) == self.pointers  # type: ignore[arg-type]
            and list(map(version_of, self.counting)) == self.versions
        )


class Structure(NamedTuple):
    """The modules that weights are read from, and their places."""

    names: list[str]
    places: list[dict[str, nn.Module | None]]
    keys: list[str]
    modules: list[nn.Module | None]
    sizes: list[int]

    def is_current(self) -> bool:
        return (
            all(map(is_, map(dict.get, self.places, self.keys), self.modules))
            and list(map(len, self.places)) == self.sizes
        )


class Tie(NamedTuple):
    """Two names of one weight, with the place of each."""

    names: tuple[str, str]
    places: tuple[dict[str, Tensor | None], dict[str, Tensor | None]]
    keys: tuple[str, str]

    def holds(self) -> bool:
        return self.places[0].get(self.keys[0]) is self.places[1].get(self.keys[1])


def place_in(modules: dict[str, nn.Module], structure: Structure, name: str) -> tuple[Any, str]:
    """The ``_parameters`` that a weight's name leads to, and its key there."""
    path, _, key = name.rpartition(".")
    return module_at(path, modules, structure)._parameters, key


def module_at(path: str, modules: dict[str, nn.Module], structure: Structure) -> nn.Module:
    if path not in modules:
        above, _, key = path.rpartition(".")
        parent = module_at(above, modules, structure)
        module = parent._modules[key]
        assert module is not None
        # Of PEFT's modules around one the structure notes those, and weights are read from the one inside.
        modules[path] = current(module)
        structure.names.append(path)
        structure.places.append(parent._modules)
        structure.keys.append(key)
        structure.modules.append(module)
    return modules[path]


def look(slots: list[Slot], before: Seen | None = None, kept: Iterable[int] = ()) -> Seen:
    """The slots as they are now; given ``before``, as they were then, at the indices ``kept``."""
    if before is None:
        tensors = [slot.place.get(slot.key) for slot in slots]
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        versions = {id(tensor): tensor._version for tensor in tensors if tensor is not None and counts_changes(tensor)}
    else:
        tensors = [before.tensors[index] for index in kept]
        pointers = [before.pointers[index] for index in kept]
        versions = {id(tensor): count for tensor, count in zip(before.counting, before.versions, strict=True)}
    counting = [tensor for tensor in tensors if tensor is not None and id(tensor) in versions]
    return Seen(
        slots,
        [slot.place for slot in slots],
        [slot.key for slot in slots],
        tensors,
        pointers,
        counting,
        [versions[id(tensor)] for tensor in counting],
        [tensor.untyped_storage() for tensor in tensors if tensor is not None],
    )


def counts_changes(tensor: Tensor) -> bool:
    # Tensors made in inference mode count no changes.
    return not tensor.is_inference()
