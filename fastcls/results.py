"""Logits to columns of Arrow: labels and scores, vectorised, for tables and files."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .labels import ScoreFunction, best_first, scores_of
from .texts import read_count

if TYPE_CHECKING:
    import pyarrow

    from .flow import Scored


class Wanted(NamedTuple):
    """Which columns.

    Attributes:
        top_k: None gives "label" and "score"; a number gives "labels", so many of them, best first.
        all_scores: "scores", a struct with a field for each label.
        logits: "logits", likewise.
        threshold: gives "labels", those whose score is at least that, best first; with ``top_k`` at most so many.
        prefix: stands before each column's name.
    """

    top_k: int | None = None
    all_scores: bool = False
    logits: bool = False
    threshold: float | None = None
    prefix: str = ""


class Answers(Protocol):
    """Makes columns of what a flow gives.

    Attributes:
        prefix: what stands before each column's name.
    """

    prefix: str

    @property
    def schema(self) -> pyarrow.Schema: ...
    def columns_of(self, scored: Scored) -> pyarrow.RecordBatch: ...


class Results:
    """Makes columns of logits.

    The columns are "label" (string) and "score" (float32), or instead of them "labels" (a list of structs with these
    fields); then "scores" and "logits" (structs of float32, a field for each label). Names of other types than str
    are given as their str. A score that is NaN stays, and its label is null.

    Args:
        wanted: which columns.
        names: the labels' names, in the order of the logits.
        apply: what makes scores of logits.

    Attributes:
        schema: that of the columns.

    Raises:
        ValueError: an option of ``wanted`` that is out of range; two labels of one name where each has a field.
        TypeError: a ``prefix`` that is not a string.
    """

    def __init__(self, wanted: Wanted, names: list[Any], apply: ScoreFunction) -> None:
        import pyarrow

        self.wanted, self.apply = _checked(wanted), apply
        self.prefix = self.wanted.prefix
        texts = [str(name) for name in names]
        twice = sorted({name for name in texts if texts.count(name) > 1})
        if twice and (wanted.all_scores or wanted.logits):
            asked = "all_scores" if wanted.all_scores else "logits"
            raise ValueError(f"{asked} must be off where labels share a name, got two labels {twice[0]!r}")
        self._names = pyarrow.array(texts, pyarrow.string())
        number = pyarrow.float32()
        label_and_score = [pyarrow.field("label", pyarrow.string()), pyarrow.field("score", number)]
        self._by_label = [pyarrow.field(name, number) for name in texts]
        self._gives_lists = wanted.top_k is not None or wanted.threshold is not None
        fields = label_and_score
        if self._gives_lists:
            fields = [pyarrow.field("labels", pyarrow.list_(pyarrow.struct(label_and_score)))]
        if wanted.all_scores:
            fields = [*fields, pyarrow.field("scores", pyarrow.struct(self._by_label))]
        if wanted.logits:
            fields = [*fields, pyarrow.field("logits", pyarrow.struct(self._by_label))]
        self.schema = pyarrow.schema([field.with_name(wanted.prefix + field.name) for field in fields])

    def columns_of(self, scored: Scored) -> pyarrow.RecordBatch:
        """The columns of a flow's window. A row without a text, or with a problem, is null everywhere."""
        return self.columns(scored.numbers, scored.missing, scores=scored.scores)

    def columns(
        self, logits: Tensor, missing: Collection[int] = (), *, scores: Tensor | None = None
    ) -> pyarrow.RecordBatch:
        """The columns of some rows.

        Args:
            logits: (rows, num_labels), of any dtype and on any device.
            missing: rows that are null in every column.
            scores: the same shape, where they are known; None makes them of the logits.

        Raises:
            ValueError: logits of another shape.
        """
        import pyarrow

        if logits.ndim != 2 or logits.shape[1] != len(self._names):
            raise ValueError(
                f"logits must have the shape (rows, {len(self._names)}), for labels {self._names.to_pylist()}, "
                f"got {tuple(logits.shape)}"
            )
        logits = logits.detach().cpu().float()
        scores = scores_of(logits, self.apply) if scores is None else scores
        values, labels = best_first(scores)
        is_missing = torch.zeros(len(logits), dtype=torch.bool)
        is_missing[list(missing)] = True
        null = is_missing.numpy() if missing else None
        if self._gives_lists:
            columns = [self._lists(values, labels, is_missing)]
        else:
            columns = [
                self._named(labels[:, 0], is_missing | values[:, 0].isnan()),
                # Otherwise pyarrow may take NaN for null.
                pyarrow.array(values[:, 0].numpy(), pyarrow.float32(), mask=null, from_pandas=False),
            ]
        numbers = [scores] * self.wanted.all_scores + [logits] * self.wanted.logits
        for each in numbers:
            by_label = [pyarrow.array(column.numpy()) for column in each.T.contiguous()]
            mask = None if null is None else pyarrow.array(null)
            columns.append(pyarrow.StructArray.from_arrays(by_label, fields=self._by_label, mask=mask))
        return pyarrow.RecordBatch.from_arrays(columns, schema=self.schema)

    def _lists(self, values: Tensor, labels: Tensor, is_missing: Tensor) -> pyarrow.ListArray:
        """Of each row the labels that are asked for, in the order given."""
        import pyarrow

        values, labels = values[:, : self.wanted.top_k], labels[:, : self.wanted.top_k]
        kept = ~is_missing[:, None].expand_as(values)
        if self.wanted.threshold is not None:
            # NaN is not below it: a model that fails must not read as one that finds nothing.
            kept = kept & ~(values < self.wanted.threshold)
        ends = torch.cat([torch.zeros(1, dtype=torch.long), kept.sum(dim=1).cumsum(0)]).int()
        flat = values[kept]
        fields = [self._named(labels[kept], flat.isnan()), pyarrow.array(flat.numpy())]
        structs = pyarrow.StructArray.from_arrays(fields, names=["label", "score"])
        mask = pyarrow.array(is_missing.numpy()) if bool(is_missing.any()) else None
        return pyarrow.ListArray.from_arrays(pyarrow.array(ends.numpy()), structs, mask=mask)

    def _named(self, labels: Tensor, is_null: Tensor) -> pyarrow.StringArray:
        import pyarrow

        return self._names.take(pyarrow.array(labels.int().numpy(), mask=is_null.numpy()))


def _checked(wanted: Wanted) -> Wanted:
    """The options, once each is in range."""
    top_k = wanted.top_k if wanted.top_k is None else read_count("top_k", wanted.top_k)
    threshold = wanted.threshold
    if threshold is not None:
        try:
            number = math.nan if isinstance(threshold, (bool, str)) else float(threshold)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"threshold must be a finite number or None, got {threshold!r}")
        threshold = number
    if not isinstance(wanted.prefix, str):
        raise TypeError(f"prefix must be a str, got {wanted.prefix!r}")
    return wanted._replace(top_k=top_k, threshold=threshold)
