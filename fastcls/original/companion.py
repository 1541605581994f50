"""Following the weights of the modules that stand around fast models: sentence-transformers', or a user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain

from torch import Tensor, nn

from .following import Original, tell_of_steps, weakly
from .places import has_weights, place_of
from .snapshot import version_of


class Companion:
    """Keeps weights that stand around fast models up to date with another module's, as the fast models' own are kept.

    A copy of the fast models has no companion. If somebody else writes into the weights, by loading or training them,
    following ends, for the fast models too, unless the other module has the same weights.

    Args:
        model: the module that is followed.
        fast: the module that follows it.
        names: names of the weights, which both modules have.
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
        """Takes every weight for changed: a change may leave no count."""
        if self._original is not None:
            self._original.doubt()

    def doubt_if(self, stepped: set[int]) -> None:
        """Takes our weights for written to by somebody else if the id of one of them is among ``stepped``."""
        if any(place in stepped for place, _ in self._own):
            self._own = []

    def hand_over(self) -> list[Tensor]:
        """Ends following by putting the other module's own weights into the fast one, where both train them.

        A weight of a module that is gone, or that lies elsewhere or has another dtype, stays our own, as a parameter
        that no optimizer holds yet.

        Returns:
            The tensors that were there.
        """
        original, self._original = self._original, None
        if original is None:
            return []
        theirs = {name: parts[0] for name, parts in original.tensors().items()} if original.model is not None else {}
        # By what they replace, so that tied weights stay one.
        fresh: dict[int, Tensor] = {}
        replaced: list[Tensor] = []
        for name in self._names:
            place, key = place_of(self._fast, name)
            ours, other = place[key], theirs.get(name)
            if other is not None and (other.device, other.dtype) == (ours.device, ours.dtype):
                place[key] = other
            elif isinstance(ours, nn.Parameter):
                own = nn.Parameter(ours.detach(), requires_grad=name not in original.frozen)
                place[key] = fresh.setdefault(id(ours), own)
            else:
                continue
            replaced.append(ours)
        return replaced

    def stop(self) -> None:
        """Keeps the weights as they are from now on, in the fast models too."""
        if self._original is not None:
            self._original = None
            self._stop()

    def _look(self) -> list[tuple[int, int]]:
        """The ids of our tensors, and how often each has changed."""
        places = (place_of(self._fast, name) for name in self._names)
        return [(id(place[key]), version_of(place[key])) for place, key in places]


def weights_around(model: nn.Module, inner: Iterable[nn.Module]) -> list[str]:
    """The names of a model's parameters and buffers outside the transformers models in it."""
    inside = {id(module) for each in inner for module in each.modules()}
    return [
        f"{path}.{key}" if path else key
        for path, module in model.named_modules()
        if id(module) not in inside
        for key, weight in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        if weight.is_floating_point()
    ]
