"""What a provider is (providers.toml), and what all of them share: `providers` lists them."""

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

from .workloads import Batch, data

# From a batch to logits; of a provider of texts, from a list of texts to scores.
Forward = Callable[[Any], Tensor]
Model = PreTrainedModel
# Why it cannot run on a device in a dtype; None if it can.
Available = Callable[[torch.device, torch.dtype], str | None]


class Loaded(NamedTuple):
    """A provider ready to run: the timed call, and remarks on how it was prepared.

    ``resident`` makes a call over one batch whose inputs lie on the device before the clock starts; by default
    ``forward`` over tensors that were moved there.
    """

    forward: Forward
    detail: str = ""
    resident: Callable[[Batch], Callable[[], Tensor]] | None = None


@dataclass(frozen=True)
class Provider:
    """One way to compute a model's logits, or from texts their scores; providers.toml says what its data mean.

    ``load`` makes the function that is timed, and leaves the given model as it was.
    """

    name: str
    description: str
    bound: float
    load: Callable[[Model], Loaded]
    available: Available = lambda _device, _dtype: None
    takes: Callable[[type[Model]], str | None] = lambda _model_class: None
    spins: bool = False
    preparing: float = 0.0

    @property
    def reduced(self) -> bool:
        """Whether its precision is less than float32's: its labels are checked, not a bound on each logit."""
        return self.bound == math.inf

    def missing(self, model_class: type[Model], device: torch.device, dtype: torch.dtype) -> str | None:
        """The reason why it cannot run models of a class on a device in a dtype, or None."""
        return self.available(device, dtype) or self.takes(model_class)


_DATA = data("providers.toml")


def described(name: str, load: Callable[[Model], Loaded], **conditions: Any) -> Provider:
    """A provider of providers.toml, with its ``available`` and ``takes``."""
    return Provider(name, load=load, **{"bound": 1e-5, **_DATA[name]}, **conditions)


def reason_of(error: Exception) -> str:
    """An error's first line: a compiler's message may be pages long."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def own_copy(model: Model, attention: str | None = None) -> Model:
    """A copy over the same weights, with that attention if named: changes to it do not show in ``model``."""
    shared: dict[int, Any] = {id(each): nn.Parameter(each.data, requires_grad=False) for each in model.parameters()}
    copied = copy.deepcopy(model, shared).eval()
    if attention is not None:
        copied.set_attn_implementation(attention)
    return copied


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the progress and the advice that converters and loaders print."""
    before, out = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.WARNING)
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
    usual = ("cpu", torch.float32)
    elsewhere = "measured in float32 on the CPU"
    return lambda device, dtype: not_installed(*packages) if (device.type, dtype) == usual else elsewhere


def bert_classifiers(model_class: type[Model]) -> str | None:
    """A `Provider.takes`."""
    return None if issubclass(model_class, BertForSequenceClassification) else "written for BERT classifiers alone"
