"""A fast model that follows the weights of another, and has graphs take them from here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Engine, operator
from ..engine.weights import is_spread
from ..original.companion import Companion
from ..original.following import Original, weakly
from ..original.places import set_weight


class FollowingModel(Engine):
    """An engine whose weights are brought up to those of the model that it was made of."""

    # Says in one text how the model is made, for graphs.
    description: str
    _original: Original | None = None
    # `frozen` of the original that is followed no longer.
    last_frozen: frozenset[str] = frozenset()
    # The original, where it has adapters: these are its own, and would be lost with it.
    _kept: nn.Module | None = None
    # Follows the weights of the modules around this one.
    _companion: Companion | None = None

    def __getstate__(self) -> dict[str, Any]:
        self.catch_up()
        return {
            **super().__getstate__(),
            "last_frozen": self.frozen,
            "_original": None,
            "_companion": None,
            "_kept": None,
        }

    @property
    def frozen(self) -> frozenset[str]:
        """The original's names of weights that ask for no gradients."""
        return self.last_frozen if self._original is None else self._original.frozen

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters by our names: a model that is trained shows others, the given one's."""
        for name, weight in self.weights():
            if isinstance(weight, nn.Parameter):
                yield name, weight

    @property
    def _first_weight(self) -> Tensor:
        return next(weight for _, weight in self.weights())

    def clear_caches(self) -> None:
        """Forgets the CUDA graphs and all else that was made from the weights, and their memory.

        To be called after writing to weights in a way that counts no changes, ``weight.data.mul_(2)`` or weights made
        in inference mode: copies of them, and what was made of them, are made anew.
        """
        self.forget_made()
        if self._original is not None:
            self._original.doubt()
        if self._companion is not None:
            self._companion.doubt()

    def forget_made(self) -> None:
        """Forgets what was made from weights, here and in graphs."""
        super().forget_made()
        operator.forget(self._first_weight)

    def follow(self, original: Original) -> None:
        """Follows the weights of a model from now on, those that this one's were made of."""
        self._original = original
        original.settle = weakly(self.catch_up)
        self._keep_adapters()

    def _keep_adapters(self) -> None:
        # Past torch's own, which would make it a part of this module.
        original = self._original
        has_some = original is not None and original.standing.has_adapters
        self.__dict__["_kept"] = original.model if original is not None and has_some else None

    def follow_along(self, companion: Companion) -> None:
        """Has weights around this model follow whenever it does."""
        self._companion = companion

    @property
    def follows(self) -> bool:
        """Whether the weights of another model are followed."""
        return self._original is not None

    @property
    def follows_adapters(self) -> bool:
        """Whether the model whose weights are followed has adapters."""
        return self._kept is not None

    @property
    def follows_on(self) -> bool:
        """Whether the model whose weights are followed still holds some."""
        return self._original is not None and self._original.is_there

    def stop_following(self) -> None:
        """Goes on with the weights as they are, in memory of its own, whatever becomes of the original's."""
        companion, self._companion = self._companion, None
        if companion is not None:
            companion.stop()
        original = self._original
        if original is None:
            return
        with contextlib.suppress(RuntimeError):
            # An original that can no longer be followed leaves the weights that the fast model had last.
            self.catch_up()
        self.last_frozen, self._original = original.frozen, None
        self._keep_adapters()
        # By their place, so that tied weights stay one.
        own: dict[int, Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():
            for name, weight in [*self.weights()]:
                place = weight.data_ptr()
                if place not in own:
                    # ``data`` counts changes of its own: changes of ours are no longer the original's.
                    own[place] = weight.data.clone() if original.holds(weight) else weight.data
                set_weight(self, name, own[place])
        self.forget_made()

    def catch_up(self, *, adds: bool = True) -> None:
        """Brings the weights up to the original's, where those have changed.

        Args:
            adds: whether to add to them what adapters add.
        """
        if self._companion is not None:
            self._companion.bring()
        original = self._original
        if original is not None and is_spread(self):
            self._check_gathered()
            # Weights that are gathered anew keep their memory and their counts of changes.
            original.doubt()
        if original is None or original.is_current(adds=adds):
            return
        if original.update(self, adds=adds, is_gathered=is_spread(self)):
            # What was made from weights is made anew where it is needed: other threads may be reading it.
            self._graphs.clear()
            self._announce_weights()
        self._keep_adapters()
        # Inside an operator that a graph runs, torch counts no changes; and what is doubted leaves none.
        self.own_encoder.doubt()
        operator.forget(self._first_weight)

    def _check_gathered(self) -> None:
        """Refuses weights that FSDP gathers in another dtype than the one in which these were taken over."""
        if not is_spread(self):
            return
        found = next((weight.dtype for weight in self.parameters() if weight.dtype != self.dtype), None)
        if found is not None:
            raise RuntimeError(
                f"mp_policy.param_dtype of fully_shard must be None or {self.dtype}, the weights' own, got {found}: "
                "use torch.autocast, which computes products in it"
            )

    def _announce_weights(self) -> None:
        """Has graphs of this process take the weights from here, where they are up to the original's."""
        operator.take_weights_from(self._first_weight, self.description, weakly(self._current_weights))

    def _current_weights(self) -> list[Tensor]:
        if self.is_hooked():
            self._check_no_hooks_inside()
        self.catch_up()
        # The engine that a graph runs is built over these, whatever their shapes are.
        self.check_weights()
        return [weight for _, weight in self.weights()]

    def _check_no_hooks_inside(self) -> None:
        for name, _ in self.hooked_inside():
            raise RuntimeError(
                f"{name} must have no forward hooks, and no other forward, in a graph, which would pass them by: "
                "remove them, or call the model outside of what is compiled or exported"
            )
