"""Stand-ins for the outputs of an exported program, in a process that has not imported transformers.

An exported program names the class of what it gives, and PyTorch loads it once a class is registered by that name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch.utils import _pytree

_NAMES = (
    *(
        f"transformers.modeling_outputs.{name}"
        for name in (
            "BaseModelOutput",
            "BaseModelOutputWithPooling",
            "BaseModelOutputWithPoolingAndCrossAttentions",
            "MultipleChoiceModelOutput",
            "NextSentencePredictorOutput",
            "QuestionAnsweringModelOutput",
            "SequenceClassifierOutput",
            "TokenClassifierOutput",
        )
    ),
    "fastcls.models.masked_lm.FastMaskedLMOutput",
    # What programs name that were exported before fastcls had an engine.
    "fastcls.tasks.FastMaskedLMOutput",
)


class Output(OrderedDict[str, Any]):
    """The items of an output that are there, as attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no {name}: it holds {', '.join(self)}") from None


def register_stand_ins() -> None:
    """Registers a class for each name that has none; transformers' own take their place when they are imported."""
    for name in _NAMES:
        if name not in _pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
            _register(name)


def _register(name: str) -> None:
    stand_in = type(name.rpartition(".")[2], (Output,), {"__doc__": f"Stands in for {name}."})

    def unflatten(values: Iterable[Any], keys: list[str]) -> Any:
        return stand_in(zip(keys, values, strict=True))

    _pytree.register_pytree_node(
        stand_in,
        lambda output: (list(output.values()), list(output)),
        unflatten,
        serialized_type_name=name,
    )
