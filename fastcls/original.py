"""The model that a fast one was made of, whose weights it goes on following.

Most of its weights the fast model reads where they lie, so that what is written to them is seen at once. Others (query,
key and value, joined to one matrix) are copies, made anew once their originals' counts of changes have moved. And any
tensor may be replaced by another. So all of them are looked at before each pass: some 20 microseconds for BERT-base.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from .weights import check_plain, made_of

_version = attrgetter("_version")
# One change at a time; a change is rare.
_updating = threading.RLock()


class _Slot(NamedTuple):
    """A weight of the original, as it was when it was last looked at.

    Attributes:
        own: the name of the weight of ours that it belongs to.
        part: which of the weights it is that ours is made of.
        name: its name in the original.
        place: the ``_parameters`` or ``_buffers`` of its module.
        key: its key there.
        shape: its shape, which a tensor keeps no trace of when its data are replaced.
    """

    own: str
    part: int
    name: str
    place: dict[str, Tensor | None]
    key: str
    shape: torch.Size


class _Seen(NamedTuple):
    """All slots that are alive, in lists that are compared without a loop in Python."""

    slots: list[_Slot]
    places: list[dict[str, Tensor | None]]
    keys: list[str]
    tensors: list[Tensor | None]
    pointers: list[int]
    counting: list[Tensor]
    versions: list[int]

    def is_current(self) -> bool:
        now = list(map(dict.__getitem__, self.places, self.keys))
        return (
            all(map(is_, now, self.tensors))
            and list(map(Tensor.data_ptr, self.tensors)) == self.pointers  # type: ignore[arg-type]
            and list(map(_version, self.counting)) == self.versions
        )


class _Structure(NamedTuple):
    """Which modules stand at the places that weights are read from."""

    names: list[str]
    places: list[dict[str, nn.Module | None]]
    keys: list[str]
    modules: list[nn.Module | None]

    def is_current(self) -> bool:
        return all(map(is_, map(dict.get, self.places, self.keys), self.modules))


class Original:
    """The weights of a model, and whether they have changed.

    It holds no module, so that the original's memory is given back with the original: what nobody else holds is not
    followed any more.

    Args:
        model: the original.
        sources: our names to the original's, of which there are several where they are joined.
    """

    def __init__(self, model: nn.Module, sources: Mapping[str, Sequence[str]]) -> None:
        self._names = {own: tuple(names) for own, names in sources.items()}
        slots: list[_Slot] = []
        owners: dict[int, nn.Module] = {}
        structure = _Structure([], [], [], [])
        modules: dict[str, nn.Module] = {"": model}
        for own, names in self._names.items():
            for part, name in enumerate(names):
                path, _, key = name.rpartition(".")
                module = _module_at(path, modules, structure)
                place: Any = module._parameters if key in module._parameters else module._buffers
                slots.append(_Slot(own, part, name, place, key, place[key].shape))
                owners[id(module)] = module
        self._structure: _Structure | None = structure
        self._is_doubted = False
        self._seen = _look(slots)
        me = weakref.ref(self)
        self._references = [weakref.ref(model, _forgets_structure(me))]
        self._references += [weakref.ref(owner, _forgets(me, owner)) for owner in owners.values()]

    def tensors(self) -> dict[str, list[Tensor]]:
        """The original's weights, by our names."""
        found: dict[str, list[Tensor]] = {}
        for slot, tensor in zip(self._seen.slots, self._seen.tensors, strict=True):
            assert tensor is not None
            found.setdefault(slot.own, []).append(tensor)
        return found

    def is_current(self) -> bool:
        """Whether nothing has changed since the last `update`."""
        structure = self._structure
        if self._is_doubted:
            return False
        try:
            return (structure is None or structure.is_current()) and self._seen.is_current()
        except (KeyError, TypeError, AttributeError, RuntimeError):
            # A weight is not there any more, or is no tensor with memory.
            return False

    def update(self, model: nn.Module) -> bool:
        """Brings a fast model's weights up to the original's.

        Args:
            model: the fast model.

        Returns:
            Whether a weight of it lies elsewhere now.

        Raises:
            RuntimeError: a weight or module of the original was replaced by one that is no longer the same model's.
        """
        with _updating:
            self._check_structure()
            seen, moved = self._seen, False
            counts = {id(tensor): count for tensor, count in zip(seen.counting, seen.versions, strict=True)}
            now: dict[str, list[Tensor]] = {}
            # Of each weight of ours, whether one that it is made of is another tensor, or was written to.
            is_other: dict[str, bool] = {}
            is_written: dict[str, bool] = {}
            pointers: dict[str, int] = {}
            for slot, tensor, pointer in zip(seen.slots, seen.tensors, seen.pointers, strict=True):
                own, found = slot.own, slot.place.get(slot.key)
                self._check(slot, found, tensor)
                assert found is not None
                now.setdefault(own, []).append(found)
                pointers[own] = pointer
                other = found is not tensor or found.data_ptr() != pointer
                is_other[own] = is_other.get(own, False) or other
                written = self._is_doubted or id(found) not in counts or found._version != counts[id(found)]
                is_written[own] = is_written.get(own, False) or other or written
            for own, parts in now.items():
                # What was moved to where there are no numbers, or is gone in part, leaves ours as they are.
                is_whole = len(parts) == len(self._names[own]) and not any(part.is_meta for part in parts)
                if is_written[own] and is_whole:
                    moved |= _bring(model, own, parts, pointers[own], is_other=is_other[own])
            self._seen, self._is_doubted = _look(seen.slots), False
            return moved

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies where a weight of the original does."""
        return tensor.data_ptr() in self._seen.pointers

    def doubt(self) -> None:
        """Takes every weight for changed, as one may be without a count."""
        self._is_doubted = True

    def _check_structure(self) -> None:
        structure = self._structure
        if structure is None or structure.is_current():
            return
        for name, place, key, module in zip(*structure, strict=True):
            if place.get(key) is not module:
                _refuse(name, "another module stands there")

    def _check(self, slot: _Slot, found: Tensor | None, before: Tensor | None) -> None:
        assert before is not None
        if found is None:
            _refuse(slot.name, "it is None")
        if found is not before:
            try:
                check_plain(f"model.{slot.name}", found)
            except ValueError as error:
                _refuse(slot.name, str(error))
        if found.shape != slot.shape:
            _refuse(slot.name, f"its shape was {tuple(slot.shape)} and is {tuple(found.shape)}")
        if not found.is_floating_point():
            _refuse(slot.name, f"its dtype is {found.dtype}")

    def _forget(self, owner: int) -> None:
        """Lets go of the weights in a module that is gone."""
        seen = self._seen
        kept = [index for index, slot in enumerate(seen.slots) if id(slot.place) != owner]
        if len(kept) < len(seen.slots):
            self._seen = _look([seen.slots[index] for index in kept], seen, kept)


def _forgets(me: weakref.ref[Original], owner: nn.Module) -> Any:
    places = (id(owner._parameters), id(owner._buffers))

    def gone(_: object, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        original = me()
        # At the very end what this would call is gone, too.
        if original is not None and not is_finalizing():
            for place in places:
                original._forget(place)

    return gone


def _forgets_structure(me: weakref.ref[Original]) -> Any:
    def gone(_: object) -> None:
        original = me()
        if original is not None:
            # The modules below live on if somebody else holds them.
            original._structure = None

    return gone


def _module_at(path: str, modules: dict[str, nn.Module], structure: _Structure) -> nn.Module:
    if path not in modules:
        above, _, key = path.rpartition(".")
        parent = _module_at(above, modules, structure)
        module = parent._modules[key]
        assert module is not None
        modules[path] = module
        structure.names.append(path)
        structure.places.append(parent._modules)
        structure.keys.append(key)
        structure.modules.append(module)
    return modules[path]


def _look(slots: list[_Slot], before: _Seen | None = None, kept: Iterable[int] = ()) -> _Seen:
    """The slots as they are now, or of ``before`` those that are ``kept``."""
    if before is None:
        tensors = [slot.place.get(slot.key) for slot in slots]
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        versions = {id(tensor): tensor._version for tensor in tensors if tensor is not None and _counts(tensor)}
    else:
        tensors = [before.tensors[index] for index in kept]
        pointers = [before.pointers[index] for index in kept]
        versions = {id(tensor): count for tensor, count in zip(before.counting, before.versions, strict=True)}
    counting = [tensor for tensor in tensors if tensor is not None and id(tensor) in versions]
    return _Seen(
        slots,
        [slot.place for slot in slots],
        [slot.key for slot in slots],
        tensors,
        pointers,
        counting,
        [versions[id(tensor)] for tensor in counting],
    )


def _counts(tensor: Tensor) -> bool:
    # What was made in inference mode counts no changes.
    return not tensor.is_inference()


def _place_of(model: nn.Module, name: str) -> tuple[dict[str, Tensor], str]:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    place: Any = module._parameters if key in module._parameters else module._buffers
    return place, key


def set_weight(model: nn.Module, name: str, weight: Tensor) -> None:
    """Puts a tensor in the place of a parameter or buffer."""
    place, key = _place_of(model, name)
    place[key] = nn.Parameter(weight, requires_grad=False) if isinstance(place[key], nn.Parameter) else weight


def _bring(model: nn.Module, own: str, parts: list[Tensor], pointer: int, *, is_other: bool) -> bool:
    """Brings one weight of ours up to date; whether it lies elsewhere now."""
    place, key = _place_of(model, own)
    ours = place[key]
    is_alike = all(part.dtype == ours.dtype and part.device == ours.device for part in parts)
    with torch.inference_mode(False), torch.no_grad():
        if len(parts) == 1 and ours.data_ptr() == pointer:
            # Ours is read where the original's lies, or lay.
            if not is_other:
                return False
            fresh = made_of(parts) if is_alike else parts[0].detach().to(ours.device, ours.dtype, copy=True)
            set_weight(model, own, fresh)
            return True
        # In the same memory, which graphs may read.
        target = ours.detach()
        for rows, part in zip(target.split([part.shape[0] for part in parts]), parts, strict=True):
            rows.copy_(part.detach())
    return False


def _refuse(name: str, what: str) -> NoReturn:
    raise RuntimeError(
        f"{name} of the model that this one was made of was replaced since, {what}: optimize the model again, or call "
        "stop_following() on the fast one to go on with the weights that it has"
    )


def release(model: nn.Module) -> None:
    """Takes a model's weights out of it, so that their memory is given back, but for what others read.

    Tensors without memory, on the device "meta", take their place: the model raises an error where it is called.
    """
    empty: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in empty:
                    without = torch.empty_like(parameter.detach(), device="meta")
                    empty[id(parameter)] = nn.Parameter(without, parameter.requires_grad)
                module._parameters[name] = empty[id(parameter)]
