"""The model that a fast one was made of, whose weights it goes on following.

Most of its weights the fast model reads where they lie, so that what is written to them is seen at once. Others (query,
key and value, joined to one matrix) are copies, made anew once their originals' counts of changes have moved, or an
optimizer has stepped: fused ones write to weights without counting. And any tensor may be replaced by another. So all
of them are looked at before each pass: some 20 microseconds for BERT-base.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..families.checkpoint import check_plain, made_of
from .places import place_of, set_weight, tensors_of
from .snapshot import Slot, Structure, Tie, look, module_at, place_in

_T = TypeVar("_T")


class _Lock:
    """One change at a time; a change is rare. A process that is forked begins with one that nobody holds."""

    def __init__(self) -> None:
        self._new()
        os.register_at_fork(after_in_child=self._new)

    def _new(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


_updating = _Lock()


class Doubting(Protocol):
    """Hears of the weights that optimizers step."""

    def doubt_if(self, stepped: set[int]) -> None:
        """Takes weights for changed where one is among tensors, by their ids."""


# The originals that are followed.
_followed: weakref.WeakSet[Original] = weakref.WeakSet()
_told: weakref.WeakSet[Doubting] = weakref.WeakSet()


def tell_of_steps(follower: Doubting) -> None:
    """Tells a follower of each optimizer's steps, while it lives."""
    _follow_optimizers()
    _told.add(follower)


def _doubt_after_step(optimizer: Optimizer, *_: object) -> None:
    stepped = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    for follower in list(_told):
        follower.doubt_if(stepped)


class Original:
    """The weights of a model, and whether they have changed.

    It holds no module, so that the original's memory is given back with the original: what nobody else holds is not
    followed any more.

    Args:
        model: the original.
        sources: our names to the original's, of which there are several where they are joined.
        aliases: other names in the original of the same weights.
    """

    def __init__(self, model: nn.Module, sources: Mapping[str, Sequence[str]], aliases: Mapping[str, str]) -> None:
        self._names = {own: tuple(names) for own, names in sources.items()}
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
        self._structure: Structure | None = structure
        self._ties = [
            Tie(pair, *zip(*(place_in(modules, structure, name) for name in pair), strict=True))
            for pair in aliases.items()
        ]
        structure.sizes.extend(map(len, structure.places))
        self.is_doubted = False
        self._failure: RuntimeError | None = None
        self._seen = look(slots)
        # The fast model that is brought up to date once more before the original goes.
        self.settle: Callable[[], None] = lambda: None
        _followed.add(self)
        tell_of_steps(self)
        me = weakref.ref(self)
        self._references = [weakref.ref(model, _settles(me))]
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
        if self.is_doubted or self._failure is not None:
            return False
        try:
            return (
                (structure is None or structure.is_current())
                and all(tie.holds() for tie in self._ties)
                and self._seen.is_current()
            )
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
            if self._failure is not None:
                raise self._failure
            self._check_structure()
            seen, moved = self._seen, False
            # Before anything is copied: what is written meanwhile is another change.
            is_doubted, self.is_doubted = self.is_doubted, False
            try:
                for slot in seen.slots:
                    self._check(slot, slot.place.get(slot.key))
            except RuntimeError:
                # What was doubted still is, once this is mended.
                self.is_doubted = is_doubted
                raise
            fresh = look(seen.slots)
            counts = {id(tensor): count for tensor, count in zip(seen.counting, seen.versions, strict=True)}
            now: dict[str, list[Tensor]] = {}
            # Of each weight of ours, whether one that it is made of is another tensor, or was written to.
            is_other: dict[str, bool] = {}
            is_written: dict[str, bool] = {}
            pointers: dict[str, int] = {}
            now_counts = {id(tensor): count for tensor, count in zip(fresh.counting, fresh.versions, strict=True)}
            for slot, tensor, pointer, found, place in zip(
                seen.slots, seen.tensors, seen.pointers, fresh.tensors, fresh.pointers, strict=True
            ):
                own = slot.own
                assert found is not None
                now.setdefault(own, []).append(found)
                pointers[own] = pointer
                other = found is not tensor or place != pointer
                is_other[own] = is_other.get(own, False) or other
                written = is_doubted or id(found) not in counts or now_counts.get(id(found)) != counts[id(found)]
                is_written[own] = is_written.get(own, False) or other or written
            for own, parts in now.items():
                # What was moved to where there are no numbers, or is gone in part, leaves ours as they are.
                is_whole = len(parts) == len(self._names[own]) and not any(part.is_meta for part in parts)
                if is_written[own] and not _is_ours(model, own):
                    # Another one stands there for one call (`torch.func.functional_call`): ours is seen to afterwards.
                    self.is_doubted = True
                elif is_written[own] and is_whole:
                    moved |= _bring(model, own, parts, pointers[own], is_other=is_other[own])
            self._seen = fresh
            return moved

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies where a weight of the original does."""
        return tensor.data_ptr() in self._seen.pointers

    def doubt(self) -> None:
        """Takes every weight for changed, as one may be without a count."""
        self.is_doubted = True

    def doubt_if(self, stepped: set[int]) -> None:
        """The same where one of them is among tensors, by their ids."""
        if self.reads(stepped):
            self.doubt()

    def reads(self, tensors: set[int]) -> bool:
        """Whether a weight is among tensors, by their ids."""
        return any(id(tensor) in tensors for tensor in self._seen.tensors)

    @property
    def is_there(self) -> bool:
        """Whether there is anything left to be followed."""
        return bool(self._seen.slots)

    def before_it_goes(self) -> None:
        """What the original was when it went is what the fast model goes on with."""
        try:
            self.settle()
        except RuntimeError as error:
            # Whoever calls the fast model next shall know.
            self._failure = error
        # The modules below live on if somebody else holds them.
        self._structure, self._ties = None, []

    def _check_structure(self) -> None:
        for tie in self._ties:
            if not tie.holds():
                _refuse(tie.names[0], f"it is tied to {tie.names[1]} no longer")
        structure = self._structure
        if structure is None or structure.is_current():
            return
        for name, place, key, module, size in zip(*structure, strict=True):
            if place.get(key) is not module:
                _refuse(name, "another module stands there")
            if len(place) != size:
                _refuse(name, "it has more or fewer modules beside it")

    def _check(self, slot: Slot, found: Tensor | None) -> None:
        if found is None:
            _refuse(slot.name, "it is None")
        # Of the same tensor, too: `torch.utils.swap_tensors` gives it another class.
        try:
            check_plain(f"model.{slot.name}", found)
        except ValueError as error:
            _refuse(slot.name, str(error))
        if found.shape != slot.shape:
            _refuse(slot.name, f"its shape was {tuple(slot.shape)} and is {tuple(found.shape)}")
        if not found.is_floating_point():
            _refuse(slot.name, f"its dtype is {found.dtype}")

    def _forget(self, places: set[int]) -> None:
        """Lets go of the weights in a module that is gone."""
        seen = self._seen
        kept = [index for index, slot in enumerate(seen.slots) if id(slot.place) not in places]
        if len(kept) < len(seen.slots):
            self._seen = look([seen.slots[index] for index in kept], seen, kept)


def _forgets(me: weakref.ref[Original], owner: nn.Module) -> Any:
    places = {id(owner._parameters), id(owner._buffers)}

    def gone(_: object, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        original = me()
        # At the very end what this would call is gone, too.
        if original is not None and not is_finalizing():
            # Parts of a model that is collected with all it holds may go before it does.
            with contextlib.suppress(RuntimeError):
                original.settle()
            original._forget(places)

    return gone


def _settles(me: weakref.ref[Original]) -> Any:
    def gone(_: object, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        original = me()
        if original is not None and not is_finalizing():
            original.before_it_goes()

    return gone


NO_LONGER_FOLLOWED = (
    "the fast model was loaded, as a part of another module, with other weights than those of the model that it was "
    "made of: it goes on with these, and follows that model no longer. To load both, let the module hold the model "
    "before the fast one"
)


def weakly(method: Callable[[], _T]) -> Callable[[], _T | None]:
    """Calls a method while its object lives, without keeping it alive; gives None afterwards."""
    found = weakref.WeakMethod(method)

    def call() -> _T | None:
        method = found()
        return None if method is None else method()

    return call


def _bring(model: nn.Module, own: str, parts: list[Tensor], pointer: int, *, is_other: bool) -> bool:
    """Brings one weight of ours up to date; whether it lies elsewhere now."""
    place, key = place_of(model, own)
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
        # One may be a number without dimensions.
        all_rows = [target] if len(parts) == 1 else target.split([part.shape[0] for part in parts])
        for rows, part in zip(all_rows, parts, strict=True):
            rows.copy_(part.detach())
    return False


def _is_ours(model: nn.Module, name: str) -> bool:
    place, key = place_of(model, name)
    return isinstance(place[key], nn.Parameter) or key in model.get_submodule(name.rpartition(".")[0])._buffers


def _refuse(name: str, what: str) -> NoReturn:
    raise RuntimeError(
        f"{name} of the model that this one was made of was replaced since, {what}: optimize the model again, or call "
        "stop_following() on the fast one to go on with the weights that it has"
    )


def settle_all(model: nn.Module) -> None:
    """Brings the fast models that follow a model's weights up to it, before these go."""
    going = {id(weight) for weight in model.parameters()}
    for original in list(_followed):
        if original.reads(going):
            original.before_it_goes()


@functools.cache
def _follow_optimizers() -> None:
    """Has all optimizers tell of their steps: once, and not before a model is followed."""
    register_optimizer_step_post_hook(_doubt_after_step)
