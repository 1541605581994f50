"""Labels: their names from a config, in any of the forms in use, and their scores from logits."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .engine.batch import shortened

ScoreFunction = Literal["softmax", "sigmoid", "none"]

# Its sigmoid is 1 in float32, as that of all larger numbers, of which infinity has no softmax.
_CERTAIN = 88.0


def label_names(id2label: Any, num_labels: int) -> list[Any]:
    """A name for each label: LABEL_0 and so on if a config has no names, as in transformers.

    Args:
        id2label: a mapping from label ids (ints of any kind, or "0" and so on), or a list; None if there are no names.
            Names are returned as they are, whatever their type.
        num_labels: how many labels the model has.

    Raises:
        ValueError: ``id2label`` does not name each label once.
    """
    if id2label is None:
        return [f"LABEL_{index}" for index in range(num_labels)]
    found = id2label.tolist() if hasattr(id2label, "tolist") else id2label
    problem = f"id2label must name each label from 0 to {num_labels - 1}, got {shortened(id2label)}"
    if isinstance(found, (list, tuple)):
        found = dict(enumerate(found))
    if not isinstance(found, Mapping):
        raise ValueError(problem)
    names: dict[int | None, Any] = {}
    for key, name in found.items():
        index = _label_id(key)
        if index in names and index is not None:
            raise ValueError(f"{problem}, which names {index} twice")
        names[index] = name
    missing = [index for index in range(num_labels) if index not in names]
    if missing:
        raise ValueError(f"{problem}, which does not name {missing[0]}")
    return [names[index] for index in range(num_labels)]


def score_function(asked: Any, problem_type: str | None, num_labels: int) -> ScoreFunction:
    """What makes scores of logits: what was asked for, or else as the config's problem type and number of labels say.

    Raises:
        ValueError: something else was asked for.
    """
    if asked is not None:
        # The values of the pipeline's own enumeration have these names.
        name = str(getattr(asked, "value", asked)).lower()
        for known in get_args(ScoreFunction):
            if name == known and isinstance(asked, str):
                return known
        choices = ", ".join(get_args(ScoreFunction))
        raise ValueError(f"function_to_apply must be one of {choices} or None, got {asked!r}")
    if problem_type == "regression":
        return "none"
    if problem_type == "multi_label_classification" or num_labels == 1:
        return "sigmoid"
    return "softmax"


def scores_of(logits: Tensor, apply: ScoreFunction) -> Tensor:
    """(num_texts, num_labels) float32, of logits of any dtype."""
    logits = logits.float()
    if apply == "softmax":
        return logits.softmax(-1)
    return _sigmoid(logits) if apply == "sigmoid" else logits


def _sigmoid(logits: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) of each number, the same bits wherever it stands.

    torch.sigmoid computes the last numbers of a tensor on a CPU by another function than those before them (2.13), so
    that a score would depend on how many others there are. A softmax over x and 0 treats all rows alike.
    """
    pairs = torch.stack((logits.clamp(max=_CERTAIN), torch.zeros_like(logits)), -1)
    return pairs.softmax(-1)[..., 0]


def best_first(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's scores from the best one down, and the labels that they belong to."""
    # A stable sort, so that the first of equal scores comes first, as with argmax.
    values, labels = scores.sort(dim=1, descending=True, stable=True)
    return values, labels


def _label_id(key: object) -> int | None:
    """The label id that a key stands for, or None."""
    try:
        if isinstance(key, (str, float)):
            # A table with gaps turns integers into floats.
            return int(key) if isinstance(key, str) or key.is_integer() else None
        return operator.index(key)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
