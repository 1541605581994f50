"""Weights around fast models, of sentence-transformers' other modules, that follow along with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from .following import Original, tell_of_steps, weakly
from .places import has_weights, place_of
from .snapshot import version_of


class Companion:
    """Brings weights of a module, around fast models, up to those of another one's, along with the fast models.

    A copy of the fast models does without it. What somebody else writes into the weights, by loading or training them,
    ends it, and the fast models' following, unless the other module has the same.

    Args:
        model: the module that is followed.
        fast: the one that follows.
        names: the weights, which both have.
        stop: ends the fast models' following.
    """

    def __init__(self, model: nn.Module, fast: nn.Module, names: Sequence[str], stop: Callable[[], None]) -> None:
        self._fast = fast
        self._names = names
        self._stop = stop
        self._original: Original | None = Original(model, {name: (name,) for name in names}, {})
        self._original.settle = weakly(self.bring)
        self._own = self._look()
        tell_of_steps(self)

    def bring(self) -> None:
        """Raises RuntimeError as `Original.update` does."""
        original = self._original
        if original is None:
            return
        if self._look() != self._own:
            theirs = {name: parts[0] for name, parts in original.tensors().items()}
            if len(theirs) < len(self._names) or not has_weights(self._fast, theirs):
                self.stop()
                return
        elif original.is_current():
            return
        original.update(self._fast)
        self._own = self._look()

    def doubt(self) -> None:
        """Takes every weight for changed, as one may be without a count."""
        if self._original is not None:
            self._original.doubt()

    def doubt_if(self, stepped: set[int]) -> None:
        """Takes ours for written to by somebody else where one of them is among tensors, by their ids."""
        if any(place in stepped for place, _ in self._own):
            self._own = []

    def stop(self) -> None:
        """Goes on with the weights as they are, and so do the fast models."""
        if self._original is not None:
            self._original = None
            self._stop()

    def _look(self) -> list[tuple[int, int]]:
        """Which tensors ours are, and how often they have changed."""
        places = (place_of(self._fast, name) for name in self._names)
        return [(id(place[key]), version_of(place[key])) for place, key in places]
