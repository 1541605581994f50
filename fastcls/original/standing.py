"""Where the weights of a model stand: its modules, weights that are tied, and adapters around them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

from torch import nn

from .adapters import Adapted, Added, copies, inside, is_whole
from .places import tensors_of
from .snapshot import Slot, Structure, Tie, module_at, place_in

# What changes when what adapters add to our weights does, by our names; those to which none adds anything are left out.
States = dict[str, tuple[object, ...]]


class Found(NamedTuple):
    """The places of weights, and the modules that hold them; who keeps them keeps the weights."""

    slots: list[Slot]
    owners: list[nn.Module]


class Standing:
    """Where each weight of a model is, as it was found last.

    Args:
        model: the model. It is not held.
        names: for each of our names the model's, without adapters.
        aliases: other names of the same weights in the model.

    Attributes:
        changes: how often the modules were found to stand otherwise.
    """

    def __init__(self, model: nn.Module, names: Mapping[str, Sequence[str]], aliases: Mapping[str, str]) -> None:
        self._model = weakref.ref(model)
        self._names = names
        self._aliases = aliases
        # For each place the modules that may stand there.
        self._known: dict[str, weakref.WeakSet[nn.Module]] = {}
        self.changes = 0
        # Of a model that was not found yet.
        self._structure: Structure | None = None
        self._ties: list[Tie] = []
        self._adapted = Adapted(nn.Module())

    def find(self, model: nn.Module) -> Found:
        """Finds the weights, and notes which modules stand where.

        Raises:
            RuntimeError: a module was replaced by another since it was found first.
            ValueError: an adapter that fastcls does not compute.
        """
        slots: list[Slot] = []
        owners: dict[int, nn.Module] = {}
        structure = Structure([], [], [], [], [])
        modules: dict[str, nn.Module] = {"": model}
        for own, names in self._names.items():
            for name in names:
                path, _, key = name.rpartition(".")
                module = module_at(path, modules, structure)
                place = tensors_of(module, key)
                slots.append(Slot(own, name, place, key, place[key].shape))
                owners[id(module)] = module
        ties = [
            Tie(pair, *zip(*(place_in(modules, structure, name) for name in pair), strict=True))
            for pair in self._aliases.items()
        ]
        structure.sizes.extend(map(len, structure.places))
        before = self._structure or structure
        sizes = dict(zip(before.names, before.sizes, strict=True))
        wholes = tuple(
            f"{name}." for name, found in zip(structure.names, structure.modules, strict=True) if is_whole(found)
        )
        for name, found, size in zip(structure.names, structure.modules, structure.sizes, strict=True):
            known = self._known.get(name, ())
            # A copy that is trained whole has modules of its own inside.
            is_own = any(
                inside(found) is each or (name.startswith(wholes) and type(found) is type(each)) for each in known
            )
            if known and not is_own:
                refuse(name, "another module stands there")
            if sizes.get(name, size) != size:
                refuse(name, "it has more or fewer modules beside it")
        adapted = Adapted(model)
        weights = {name for names in self._names.values() for name in names}
        for path in adapted.paths:
            if f"{path}.weight" not in weights:
                what = "is tied to another" if f"{path}.weight" in self._aliases else "is not read"
                raise ValueError(f"model.{path} must have no adapter, since its weight {what}")
        for name, found in zip(structure.names, structure.modules, strict=True):
            self._known.setdefault(name, weakref.WeakSet()).update(copies(found))
        self._structure, self._ties, self._adapted = structure, ties, adapted
        return Found(slots, list(owners.values()))

    @property
    def _is_current(self) -> bool:
        return self._structure is None or (self._structure.is_current() and self._adapted.stands())

    def is_current(self) -> bool:
        """Whether the weights still are where they were found."""
        return self._is_current and all(tie.holds() for tie in self._ties)

    def look(self) -> Found | None:
        """Finds the weights again where modules stand otherwise: adapters were put around them, or others are used.

        Raises:
            RuntimeError: a module was replaced by another, or a weight is tied no longer.
            ValueError: an adapter that fastcls does not compute.
        """
        model, found = self._model(), None
        if not self._is_current and model is not None:
            assert self._structure is not None
            for name, place, key in zip(*self._structure[:3], strict=True):
                if place.get(key) is None:
                    refuse(name, "another module stands there")
            try:
                found = self.find(model)
            except KeyError as error:
                refuse(str(error.args[0]), "another module stands there")
            self.changes += 1
        for tie in self._ties:
            if not tie.holds():
                refuse(tie.names[0], f"it is tied to {tie.names[1]} no longer")
        return found

    def forget_modules(self) -> set[str]:
        """Looks at modules no longer, since the model is gone; gives our names of weights that adapters add to."""
        adapted = {f"{path}.weight" for path in self._adapted.paths}
        self._structure, self._ties, self._adapted = None, [], Adapted(nn.Module())
        return {own for own, names in self._names.items() if not adapted.isdisjoint(names)}

    @property
    def has_adapters(self) -> bool:
        """Whether layers have adapters, switched on or not."""
        return bool(self._adapted.paths)

    def reads(self, tensors: set[int]) -> bool:
        """Whether the id of an adapter's weight is among ``tensors``."""
        return self._adapted.reads(tensors)

    def added(self) -> dict[str, list[Added]]:
        """What adapters add to weights, by the model's names of those without adapters."""
        return self._adapted.added()

    def states(self, *, adds: bool) -> States:
        """The states of what adapters add; of nothing unless ``adds``."""
        if not adds or not self.has_adapters:
            return {}
        added = self.added()
        states = {
            own: tuple(each.state for name in names for each in added.get(name, ()))
            for own, names in self._names.items()
        }
        return {own: state for own, state in states.items() if state}


def refuse(name: str, what: str) -> NoReturn:
    """Refuses a model that is no longer the same."""
    raise RuntimeError(
        f"{name} of the model that this one was made of was replaced since, {what}: optimize the model again, or call "
        "stop_following() on the fast one to go on with the weights that it has"
    )
