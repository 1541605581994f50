"""What a provider is, and what all of them share: `providers` lists them."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification, PreTrainedModel

from .workloads import Batch

# From a batch to logits; of a provider of texts, from a list of texts to scores.
Forward = Callable[[Any], Tensor]
Model = PreTrainedModel
ModelClass = type[PreTrainedModel]


class Loaded(NamedTuple):
    """A provider ready to run.

    Attributes:
        forward: the timed call.
        detail: remarks on how it was prepared.
        resident: makes a call over one batch whose inputs lie on the device before the clock starts; by default
            ``forward`` over tensors that were moved there.
    """

    forward: Forward
    detail: str = ""
    resident: Callable[[Batch], Callable[[], Tensor]] | None = None


Available = Callable[[torch.device, torch.dtype], str | None]


def _always(_device: torch.device, _dtype: torch.dtype) -> str | None:
    return None


def _any_model(_model_class: ModelClass) -> str | None:
    return None


# The bound of a provider of reduced precision, whose labels count.
REDUCED = math.inf


@dataclass(frozen=True)
class Provider:
    """One way to compute a model's logits, or from texts their scores.

    Attributes:
        name: as tables show it.
        description: what it is, in a line.
        bound: the largest difference from the float32 reference, for a float32 model; or `REDUCED`.
        load: makes the function that is timed, and leaves the given model as it was.
        available: the reason why it cannot run on a device in a dtype, or None.
        takes: the reason why it cannot run models of a class, or None.
        spins: whether its threads stay busy for a while after a run.
        preparing: about how long loading and the first run take on two CPU cores, in seconds per six layers.
    """

    name: str
    description: str
    bound: float
    load: Callable[[Model], Loaded]
    available: Available = _always
    takes: Callable[[ModelClass], str | None] = _any_model
    spins: bool = False
    preparing: float = 0.0

    @property
    def reduced(self) -> bool:
        """Whether its precision is less than float32's: its labels are checked, not a bound on each logit."""
        return self.bound == REDUCED

    def missing(self, model_class: ModelClass, device: torch.device, dtype: torch.dtype) -> str | None:
        """The reason why it cannot run models of a class on a device in a dtype, or None."""
        return self.available(device, dtype) or self.takes(model_class)


def reason_of(error: Exception) -> str:
    """An error's first line: a compiler's message may be pages long."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def own_copy(model: Model) -> Model:
    """A copy over the same weights: changes to it do not show in ``model``."""
    shared: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.data, requires_grad=False) for parameter in model.parameters()
    }
    return copy.deepcopy(model, shared).eval()


def with_attention(model: Model, attention: str) -> Model:
    """A copy over the same weights with transformers' attention of that name."""
    copied = own_copy(model)
    copied.set_attn_implementation(attention)
    return copied


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the progress and the advice that converters and loaders print."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    out = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def not_installed(*packages: str) -> str | None:
    """Says which of the packages are missing, or gives None."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def beside_float32(*packages: str) -> Available:
    """Available on a CPU in tables of float32 models, if the packages are installed."""

    def missing(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu" or dtype != torch.float32:
            return "measured in float32 on the CPU"
        return not_installed(*packages)

    return missing


def bert_classifiers(model_class: ModelClass) -> str | None:
    """A `Provider.takes`."""
    return None if issubclass(model_class, BertForSequenceClassification) else "written for BERT classifiers alone"
