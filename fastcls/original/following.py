"""Following the weights of the model that a fast one was made of.

The fast model reads most weights where they lie, and so sees at once what is written to them. Others (query, key and
value, joined to one matrix) are copies: they are made anew once their originals' counts of changes have moved, or an
optimizer has stepped, since fused optimizers write to weights without counting. Any tensor may also be replaced by
another. So all of them are looked at before each pass: some 20 microseconds for BERT-base.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..families.checkpoint import check_plain, is_distributed, made_of
from ..families.family import ByHead
from .adapters import sum_of
from .places import own_module, place_of, set_weight
from .snapshot import Slot, look
from .standing import Standing, States, refuse

_T = TypeVar("_T")


class _Lock:
    """Lets one thread change weights at a time; changes are rare. A forked process begins with a free lock."""

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
    """Is told which weights an optimizer has stepped."""

    def doubt_if(self, stepped: set[int]) -> None:
        """Takes its weights for changed if the id of one of them is among ``stepped``."""


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

    It holds no module, so that the original's memory is given back with the original: a module that nobody else holds
    is followed no longer.

    Args:
        model: the original.
        sources: maps each of our names to the original's: one name, or several that are joined.
        aliases: other names of the same weights in the original.
        layouts: how those of ours are made whose rows stand in another order.
    """

    def __init__(
        self,
        model: nn.Module,
        sources: Mapping[str, Sequence[str]],
        aliases: Mapping[str, str],
        layouts: Mapping[str, ByHead] | None = None,
    ) -> None:
        self._layouts = layouts or {}
        self._names = {own: tuple(names) for own, names in sources.items()}
        self.standing = Standing(model, self._names, aliases)
        found = self.standing.find(model)
        # What adapters added to ours when they were brought last.
        self._brought: States = {}
        self.is_doubted = False
        # Of modules that are gone.
        self._frozen: set[str] = set()
        self._failure: RuntimeError | None = None
        self._seen = look(found.slots)
        # Brings the fast model up to date once more before the original goes.
        self.settle: Callable[[], None] = lambda: None
        _followed.add(self)
        tell_of_steps(self)
        me = weakref.ref(self)
        self._references = [weakref.ref(model, _settles(me))]
        self._references += [weakref.ref(owner, _forgets(me, owner)) for owner in found.owners]

    def tensors(self) -> dict[str, list[Tensor]]:
        """The original's weights, by our names."""
        found: dict[str, list[Tensor]] = {}
        for slot, tensor in zip(self._seen.slots, self._seen.tensors, strict=True):
            assert tensor is not None
            found.setdefault(slot.own, []).append(tensor)
        return found

    @property
    def frozen(self) -> frozenset[str]:
        """The original's names of weights that ask for no gradients, as it is or was when it went."""
        return frozenset(self._frozen | self._frozen_among(range(len(self._seen.slots))))

    def _frozen_among(self, indices: Iterable[int]) -> set[str]:
        seen = self._seen
        pairs = ((seen.slots[index].name, seen.tensors[index]) for index in indices)
        return {name for name, tensor in pairs if tensor is not None and not tensor.requires_grad}

    @property
    def model(self) -> nn.Module | None:
        """The original, while somebody holds it."""
        return self._references[0]()

    def is_current(self, *, adds: bool = True) -> bool:
        """Whether nothing has changed since the last `update`, to which ``adds`` was given."""
        if self.is_doubted or self._failure is not None:
            return False
        try:
            return (
                self.standing.is_current()
                and self._seen.is_current()
                and self.standing.states(adds=adds) == self._brought
            )
        except (KeyError, TypeError, AttributeError, RuntimeError):
            # A weight is gone, or is no tensor with memory.
            return False

    def update(self, model: nn.Module, *, adds: bool = True, is_gathered: bool = False) -> bool:
        """Brings a fast model's weights up to the original's.

        Args:
            model: the fast model.
            adds: whether to add to them what adapters add; where it is trained that is computed apart.
            is_gathered: whether FSDP gathers the original's for each pass, in other memory each time.

        Returns:
            Whether one of its weights has moved in memory.

        Raises:
            RuntimeError: a weight or module of the original was replaced by one that is no longer the same model's.
        """
        with _updating:
            if self._failure is not None:
                raise self._failure
            self.find_again()
            states, added = self.standing.states(adds=adds), self.standing.added() if adds else {}
            seen, moved = self._seen, False
            # Reset before anything is copied, so that a write during the copy counts as another change.
            is_doubted, self.is_doubted = self.is_doubted, False
            try:
                for slot in seen.slots:
                    self._check(slot, slot.place.get(slot.key))
            except RuntimeError:
                # Weights that were doubted still are, once the error is mended.
                self.is_doubted = is_doubted
                raise
            fresh = look(seen.slots)
            counts = {id(tensor): count for tensor, count in zip(seen.counting, seen.versions, strict=True)}
            now: dict[str, list[Tensor]] = {}
            # For each of our weights: is a part of it another tensor than before, or was one written to?
            is_other: dict[str, bool] = {}
            is_written: dict[str, bool] = {}
            is_counted: dict[str, bool] = {}
            pointers: dict[str, int] = {}
            now_counts = {id(tensor): count for tensor, count in zip(fresh.counting, fresh.versions, strict=True)}
            for slot, tensor, pointer, found, place in zip(
                seen.slots, seen.tensors, seen.pointers, fresh.tensors, fresh.pointers, strict=True
            ):
                own = slot.own
                assert found is not None
                now.setdefault(own, []).append(found)
                pointers[own] = pointer
                other = found is not tensor or (place != pointer and not is_gathered)
                is_other[own] = is_other.get(own, False) or other
                counted = other or id(found) not in counts or now_counts.get(id(found)) != counts[id(found)]
                is_counted[own] = is_counted.get(own, False) or counted
                is_written[own] = is_counted[own] or is_doubted
            for own, parts in now.items():
                is_adapted_anew = states.get(own) != self._brought.get(own)
                is_written[own] |= is_adapted_anew
                # Originals that were moved to "meta", or are gone in part, leave ours as they are.
                is_whole = len(parts) == len(self._names[own]) and not any(part.is_meta for part in parts)
                if is_written[own] and not _is_ours(model, own):
                    # Another weight stands in for one call (`torch.func.functional_call`): ours is updated afterwards.
                    self.is_doubted = True
                elif is_written[own] and is_whole:
                    names = self._names[own]
                    parts = [sum_of(part, added.get(name, ())) for name, part in zip(names, parts, strict=True)]
                    layout = self._layouts.get(own)
                    moved |= _bring(
                        *(model, own, parts, layout, pointers[own]),
                        is_other=is_other[own],
                        counts=is_counted[own],
                        anew=is_adapted_anew,
                    )
            self._seen, self._brought = fresh, states
            return moved

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies at the address of one of the original's weights."""
        return tensor.data_ptr() in self._seen.pointers

    def doubt(self) -> None:
        """Takes every weight for changed: a change may leave no count."""
        self.is_doubted = True

    def doubt_if(self, stepped: set[int]) -> None:
        """Takes every weight for changed if the id of one of them is among ``stepped``."""
        if self.reads(stepped):
            self.doubt()

    def reads(self, tensors: set[int]) -> bool:
        """Whether the id of a weight is among ``tensors``."""
        return any(id(tensor) in tensors for tensor in self._seen.tensors) or self.standing.reads(tensors)

    @property
    def is_there(self) -> bool:
        """Whether any weight is left to follow."""
        return bool(self._seen.slots)

    def before_it_goes(self) -> None:
        """Brings the fast model up to date a last time: it keeps the weights that the original had when it went."""
        try:
            self.settle()
        except RuntimeError as error:
            # Raised by the fast model's next call.
            self._failure = error
        # The modules below live on if somebody else holds them; what adapters added to some of them stays.
        adapted = self.standing.forget_modules()
        self._keep([index for index, slot in enumerate(self._seen.slots) if slot.own not in adapted])
        self._brought = {}

    def find_again(self) -> None:
        """Looks whether modules stand otherwise; the weights that they hold are then other ones than before."""
        found = self.standing.look()
        if found is None:
            return
        there = {slot.name for slot in self._seen.slots}
        slots = [slot for slot in found.slots if slot.name in there]
        self._seen = self._seen._replace(
            slots=slots, places=[slot.place for slot in slots], keys=[slot.key for slot in slots]
        )
        me = weakref.ref(self)
        self._references += [weakref.ref(owner, _forgets(me, owner)) for owner in found.owners]

    def _check(self, slot: Slot, found: Tensor | None) -> None:
        if found is None:
            refuse(slot.name, "it is None")
        if is_distributed(found):
            raise RuntimeError(
                f"model.{slot.name} must be whole where it is read, got a DTensor, a part on each process: call "
                "fully_shard on the fast model, not on the one that it was made of, and then the fast model as a whole"
            )
        # Even if the tensor is the same: `torch.utils.swap_tensors` gives it another class.
        try:
            check_plain(f"model.{slot.name}", found)
        except ValueError as error:
            refuse(slot.name, str(error))
        if found.shape != slot.shape:
            refuse(slot.name, f"its shape was {tuple(slot.shape)} and is {tuple(found.shape)}")
        if not found.is_floating_point():
            refuse(slot.name, f"its dtype is {found.dtype}")

    def _forget(self, places: set[int]) -> None:
        """Drops the weights of a module that is gone."""
        seen = self._seen
        self._keep([index for index, slot in enumerate(seen.slots) if id(slot.place) not in places])

    def _keep(self, kept: list[int]) -> None:
        seen = self._seen
        if len(kept) < len(seen.slots):
            self._frozen |= self._frozen_among({*range(len(seen.slots))} - {*kept})
            self._seen = look([seen.slots[index] for index in kept], seen, kept)


def _forgets(me: weakref.ref[Original], owner: nn.Module) -> Any:
    places = {id(owner._parameters), id(owner._buffers)}

    def gone(_: object, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        original = me()
        # At interpreter exit, the functions that this would call are gone.
        if original is not None and not is_finalizing():
            # When a whole model is collected, its parts may go before it does.
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


def _bring(
    model: nn.Module,
    own: str,
    parts: list[Tensor],
    layout: ByHead | None,
    pointer: int,
    *,
    is_other: bool,
    counts: bool,
    anew: bool,
) -> bool:
    """Brings one of our weights up to date; returns whether it has moved in memory.

    ``counts`` says whether a write counts as a change. What is only doubted may hold the same numbers, and a graph that
    waits for its backward pass may have kept them. ``anew`` leaves the old memory as it is: such a graph may have kept
    the numbers that were there without adapters.
    """
    place, key = place_of(model, own)
    ours = place[key]
    is_alike = all(part.dtype == ours.dtype and part.device == ours.device for part in parts)
    with torch.inference_mode(False), torch.no_grad():
        if ours.is_meta:
            # accelerate moves a model there before it spreads it over processes, and gives it memory afterwards.
            set_weight(model, own, made_of(parts, layout))
            return True
        if anew:
            fresh = made_of(parts, layout)
            set_weight(model, own, fresh if is_alike else fresh.to(ours.device, ours.dtype, copy=True))
            return True
        if len(parts) == 1 and _is_one(ours, parts[0]):
            # FSDP has gathered it in other memory, which they share.
            return False
        if len(parts) == 1 and ours.data_ptr() == pointer:
            # Ours shares the original's memory, or shared it.
            if not is_other:
                return False
            fresh = made_of(parts) if is_alike else parts[0].detach().to(ours.device, ours.dtype, copy=True)
            set_weight(model, own, fresh)
            return True
        # In place, since CUDA graphs may read this memory.
        target = ours.detach() if counts else ours.data
        if layout is not None:
            all_rows = layout.views(target)
        else:
            # A single part may be a scalar, which cannot be split.
            all_rows = (target,) if len(parts) == 1 else target.split([part.shape[0] for part in parts])
        for rows, part in zip(all_rows, parts, strict=True):
            rows.copy_(part.detach().reshape(rows.shape))
    return False


def _is_one(ours: Tensor, part: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same memory."""
    found, expected = ((each.data_ptr(), each.shape, each.stride(), each.dtype) for each in (ours, part))
    return found == expected and ours.data_ptr() != 0


def _is_ours(model: nn.Module, name: str) -> bool:
    place, key = place_of(model, name)
    return isinstance(place[key], nn.Parameter) or key in own_module(model, name.rpartition(".")[0])._buffers


def settle_all(model: nn.Module) -> None:
    """Brings the fast models that follow a model's weights up to date, before these weights go."""
    going = {id(weight) for weight in model.parameters()}
    for original in list(_followed):
        if original.reads(going):
            original.before_it_goes()


@functools.cache
def _follow_optimizers() -> None:
    """Registers the hook on all optimizers' steps: once, and not before a model is followed."""
    register_optimizer_step_post_hook(_doubt_after_step)
