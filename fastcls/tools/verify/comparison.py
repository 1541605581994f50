"""Running statistics of two models' answers, in memory that does not grow with the number of texts."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .answers import Answers, Batch, States

# In rounding errors of the original: its own once, and fastcls's, which may be twice as large.
ALLOWANCE = 3
# An answer with the right label counts as far off if its numbers differ by more than this times what rounding explains.
FAR_OFF = 10
# Few numbers may all be nearly exact by chance. So where answers are judged as far off, rounding explains at least this
# many steps of the dtype at the answer's largest number.
_LEAST_STEPS = 8
# How many changed answers are kept to be shown, those with the largest margins.
KEPT = 20
# How many percent of the labels may change in a quantised model if nothing else is said.
MAX_CHANGED = 1.0
# Bins of differences: two per decade from 1e-20 to 1e6; the first and the last take all that lies beyond.
_BINS_A_DECADE, _LOWEST, _DECADES = 2, -20, 26


class Named(NamedTuple):
    """A label and its score."""

    label: str
    score: float

    def to_json(self) -> dict[str, Any]:
        """See `Verification.to_json`."""
        return {"label": self.label, "score": finite_or_none(self.score)}


class Changed(NamedTuple):
    """An answer that is not the original's.

    Attributes:
        line: its text's number, from 1.
        text: the text, or its parts.
        place: where in the text, if the answer is not about all of it.
        original, fastcls: the two labels with their scores; None where there are no labels.
        margin: by how many logits the original preferred its own label to the other one; without labels, the
            difference between the answers.
        explained: the largest margin that rounding explains.
        beyond_rounding: whether the margin is larger than that; always False if changes are not judged.
    """

    line: int
    text: str | Sequence[str]
    place: str | None
    original: Named | None
    fastcls: Named | None
    margin: float
    explained: float
    beyond_rounding: bool

    def to_json(self) -> dict[str, Any]:
        """See `Verification.to_json`."""
        return {
            "line": self.line,
            "text": self.text if isinstance(self.text, str) else list(self.text),
            "place": self.place,
            "original": self.original and self.original.to_json(),
            "fastcls": self.fastcls and self.fastcls.to_json(),
            "margin": finite_or_none(self.margin),
            "explained_up_to": finite_or_none(self.explained),
            "beyond_rounding": self.beyond_rounding,
        }


class Differences:
    """Statistics of the differences between two models' numbers.

    Attributes:
        count: how many numbers were compared.
        equal: how many do not differ at all.
        not_finite: how many are infinite or NaN in one of the two models or in both.
        largest, mean: of the differences between the others.
    """

    def __init__(self) -> None:
        self.count = self.equal = self.not_finite = 0
        self.largest = self._sum = 0.0
        self._bins = torch.zeros(_BINS_A_DECADE * _DECADES, dtype=torch.int64)

    @property
    def mean(self) -> float:
        return self._sum / max(1, self.count - self.not_finite)

    def add(self, differences: Tensor, lost: Tensor) -> None:
        """Adds differences from `differences_of`; ``lost`` says which are between numbers that are not finite."""
        finite = differences[~lost & differences.isfinite()]
        nonzero = finite[finite > 0].double()
        self.count += differences.numel()
        self.not_finite += differences.numel() - finite.numel()
        self.equal += finite.numel() - nonzero.numel()
        if nonzero.numel():
            self.largest = max(self.largest, float(nonzero.max()))
            self._sum += float(nonzero.sum())
            bins = ((nonzero.log10() - _LOWEST) * _BINS_A_DECADE).floor().long().clamp(0, len(self._bins) - 1)
            self._bins += bins.bincount(minlength=len(self._bins))

    def bins(self) -> Iterator[tuple[float, float, int]]:
        """(from, below, count) from the first bin that is not empty to the last."""
        filled = self._bins.nonzero()[:, 0].tolist()
        for index in range(filled[0], filled[-1] + 1) if filled else ():
            low, high = (10 ** (_LOWEST + edge / _BINS_A_DECADE) for edge in (index, index + 1))
            yield low, high, int(self._bins[index])


class Accuracy(NamedTuple):
    """How many texts get their true label.

    Attributes:
        texts: how many have a true label.
        original, compared: to how many the original and the compared model give it.
    """

    texts: int = 0
    original: int = 0
    compared: int = 0

    @property
    def percent(self) -> tuple[float, float]:
        """Of the original and of the compared model."""
        return 100 * self.original / self.texts, 100 * self.compared / self.texts

    def to_json(self) -> dict[str, Any]:
        """See `Verification.to_json`."""
        before, after = self.percent
        return {"texts": self.texts, "original": before, "compared": after, "difference": after - before}


class Comparison:
    """One model's answers against the original's.

    Attributes:
        name: of the model that is compared.
        dtype: that it computes in, "bfloat16"; "int8" if its products are.
        max_changed: how many percent of the labels may change; None if this share decides nothing.
        differences: between their numbers.
        decisions: how many labels were compared.
        changed: how many labels differ; without labels, how many answers differ by more than rounding explains.
        beyond_rounding: how many of these rounding does not explain.
        far_off: how many answers with labels have a number that is finite in only one of the two models, or that
            differs by more than `FAR_OFF` times what rounding explains.
        furthest: the line of the largest of these differences.
        not_finite: how many texts have a number that is infinite or NaN in one of the two models or both.
        other_than_original: in how many of these texts such numbers are not the same in both.
        first_not_finite: the line of the first of these texts.
        rounding: the largest rounding error of the original in ``dtype`` that was seen on the first texts; None if
            changes are counted but not judged by it.
        accuracy: of both models; None if no true labels are known.
        cosines: between an encoder's embeddings: their number, sum and lowest.
    """

    def __init__(
        self, name: str, dtype: str, answers: Answers, *, judged: bool, max_changed: float | None = None
    ) -> None:
        self.name = name
        self.dtype = dtype
        self.max_changed = max_changed
        self.answers = answers
        self.differences = Differences()
        self.decisions = self.changed = self.beyond_rounding = self.far_off = 0
        self.furthest: int | None = None
        self._furthest = 0.0
        self.not_finite = self.other_than_original = 0
        self.first_not_finite: int | None = None
        self.rounding: float | None = 0.0 if judged else None
        self.accuracy: Accuracy | None = None
        self.cosines = (0, 0.0, 1.0)
        self._kept: list[tuple[bool, float, int, Changed]] = []

    @property
    def kept(self) -> list[Changed]:
        """The changed answers that were kept, those beyond rounding first, then by margin."""
        return [entry[-1] for entry in sorted(self._kept, reverse=True)]

    @property
    def is_judged(self) -> bool:
        """Whether it can decide a verdict, by rounding or by a share."""
        return self.rounding is not None or self.max_changed is not None

    @property
    def changed_percent(self) -> float | None:
        """How many percent of the labels changed; None without labels."""
        return 100 * self.changed / self.decisions if self.decisions else None

    @property
    def beyond_share(self) -> bool:
        """Whether more labels changed than `max_changed` allows."""
        return self.max_changed is not None and (self.changed_percent or 0) > self.max_changed

    @property
    def mean_cosine(self) -> float | None:
        count, total, _ = self.cosines
        return total / count if count else None

    def learn(self, errors: Tensor) -> None:
        """Adds rounding errors of the original, from `rounding_errors`."""
        assert self.rounding is not None
        self.rounding = max(self.rounding, float(errors.max()))

    def suspects(self, batch: Batch, original: Tensor, rows: Tensor) -> list[int]:
        """The texts of a batch whose answers may have changed by more than rounding explains."""
        differences = differences_of(original, rows, self.answers.counted(batch))
        if self.answers.decides == "nothing":
            assert self.rounding is not None
            wrong = differences.amax(1) > ALLOWANCE * self.rounding
        else:
            assert self.rounding is not None
            allowed = torch.full((len(rows),), ALLOWANCE * self.rounding, dtype=torch.float64)
            wrong = self._choices(original, batch) != self._choices(rows, batch)
            wrong |= self._far_off(batch, original, differences, allowed)
        return sorted(set(self.answers.owners(batch)[wrong].tolist()))

    def add(
        self,
        batch: Batch,
        original: Tensor,
        rows: Tensor,
        errors: Tensor | None = None,
        true_labels: Tensor | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            batch: its texts.
            original, rows: the answers of the original and of the compared model, (num_rows, width).
            errors: (num_texts,) the original's rounding errors for these texts, if they are known; needed for judging.
            true_labels: (num_texts,) their indices, if they are known.
        """
        counted, owners = self.answers.counted(batch), self.answers.owners(batch)
        differences = differences_of(original, rows, counted)
        lost = ~(original.isfinite() & rows.isfinite())
        if counted is None:
            self.differences.add(differences, lost)
        else:
            self.differences.add(differences[counted], lost[counted])
            lost &= counted
        self._add_not_finite(batch, original, rows, lost)
        if isinstance(self.answers, States):
            self._add_cosines(self.answers.first(original, batch), self.answers.first(rows, batch))
        allowed = torch.full((len(rows),), math.inf, dtype=torch.float64)
        if self.rounding is not None:
            assert errors is not None
            allowed = ALLOWANCE * errors.clamp_min(self.rounding)[owners]
        if self.answers.decides == "nothing":
            margins = differences.amax(1).double()
            where = (margins > allowed).nonzero()[:, 0]
            self._keep(batch, where, margins[where], allowed[where], lambda _: (None, None))
            return
        self.decisions += len(rows)
        if self.rounding is not None:
            self._add_far_off(batch, original, differences, allowed)
        their_choices, our_choices = self._choices(original, batch), self._choices(rows, batch)
        if true_labels is not None:
            right = [int((choices == true_labels).sum()) for choices in (their_choices, our_choices)]
            before = self.accuracy or Accuracy()
            self.accuracy = Accuracy(
                before.texts + len(true_labels), before.original + right[0], before.compared + right[1]
            )
        where = (their_choices != our_choices).nonzero()[:, 0]
        original, rows = original[where].double(), rows[where].double()
        if counted is not None:
            original, rows = (each.masked_fill(~counted[where], -math.inf) for each in (original, rows))
        theirs, ours = self._best(original), self._best(rows)
        shares = self._shares(original, theirs), self._shares(rows, ours)

        def named(index: int) -> tuple[Named, Named]:
            their_label, our_label = (
                Named(self.answers.label(batch, int(where[index]), int(choices[index])), float(share[index]))
                for choices, share in zip((theirs, ours), shares, strict=True)
            )
            return their_label, our_label

        if self.answers.decides == "sign":
            self._keep(batch, where, original[:, 0].abs(), allowed[where], named)
            return
        # Two labels change places only if their two logits together move by the margin between them.
        margins = (original.gather(1, theirs[:, None]) - original.gather(1, ours[:, None]))[:, 0]
        self._keep(batch, where, margins, 2 * allowed[where], named)

    def _far_off(self, batch: Batch, original: Tensor, differences: Tensor, allowed: Tensor) -> Tensor:
        counted = self.answers.counted(batch)
        sizes = original.double().abs().nan_to_num(0, 0, 0)
        if counted is not None:
            sizes = sizes.masked_fill(~counted, 0)
        least = _LEAST_STEPS * torch.finfo(getattr(torch, self.dtype)).eps * sizes.amax(1)
        return differences.amax(1).double() > FAR_OFF * torch.maximum(allowed, least)

    def _add_far_off(self, batch: Batch, original: Tensor, differences: Tensor, allowed: Tensor) -> None:
        where = self._far_off(batch, original, differences, allowed).nonzero()[:, 0]
        if not len(where):
            return
        self.far_off += len(where)
        largest, index = differences.amax(1)[where].max(0)
        if float(largest) > self._furthest:
            self._furthest = float(largest)
            self.furthest = batch.texts[int(self.answers.owners(batch)[where[index]])].number + 1

    def _add_not_finite(self, batch: Batch, original: Tensor, rows: Tensor, lost: Tensor) -> None:
        owners = self.answers.owners(batch)
        texts = owners[lost.any(1)].unique().tolist()
        if not texts:
            return
        same = (original == rows) | (original.isnan() & rows.isnan())
        self.not_finite += len(texts)
        self.other_than_original += len(owners[(lost & ~same).any(1)].unique())
        # Batches need not come in the order of their lines.
        line = min(batch.texts[text].number for text in texts) + 1
        self.first_not_finite = min(line, self.first_not_finite or line)

    def _keep(
        self,
        batch: Batch,
        where: Tensor,
        margins: Tensor,
        allowed: Tensor,
        named: Callable[[int], tuple[Named | None, Named | None]],
    ) -> None:
        owners = self.answers.owners(batch)
        for index, row in enumerate(where.tolist()):
            # NaN sorts as the worst margin.
            margin, limit = float(margins[index].nan_to_num(nan=math.inf)), float(allowed[index])
            self.changed += 1
            beyond = self.rounding is not None and margin > limit
            self.beyond_rounding += beyond
            order = (beyond, margin, -self.changed)
            if len(self._kept) == KEPT and order < self._kept[0][:3]:
                continue
            text = batch.texts[int(owners[row])]
            place = self.answers.place(batch, row)
            entry = Changed(text.number + 1, text.text, place, *named(index), margin, limit, beyond)
            (heapq.heappush if len(self._kept) < KEPT else heapq.heappushpop)(self._kept, (*order, entry))

    def _choices(self, rows: Tensor, batch: Batch) -> Tensor:
        counted = self.answers.counted(batch)
        return self._best(rows if counted is None else rows.masked_fill(~counted, -math.inf))

    def _best(self, rows: Tensor) -> Tensor:
        return (rows[:, 0] > 0).long() if self.answers.decides == "sign" else rows.argmax(1)

    def _shares(self, rows: Tensor, choices: Tensor) -> Tensor:
        if self.answers.decides == "sign":
            return torch.where(choices.bool(), rows[:, 0], -rows[:, 0]).sigmoid()
        return rows.softmax(1).gather(1, choices[:, None])[:, 0]

    def _add_cosines(self, original: Tensor, rows: Tensor) -> None:
        found = torch.cosine_similarity(original.double(), rows.double(), dim=1)
        count, total, lowest = self.cosines
        # NaN stays the lowest, which Python's min would not ensure.
        lowest = float(torch.cat((found, found.new_tensor([lowest]))).min())
        self.cosines = (count + len(found), total + float(found.sum()), lowest)

    def to_json(self) -> dict[str, Any]:
        """See `Verification.to_json`."""
        differences = self.differences
        cosines = None
        if self.mean_cosine is not None:
            cosines = {"mean": finite_or_none(self.mean_cosine), "lowest": finite_or_none(self.cosines[2])}
        return {
            "name": self.name,
            "dtype": self.dtype,
            "labels": self.decisions,
            "changed": self.changed,
            "changed_percent": self.changed_percent,
            "max_changed": self.max_changed,
            "accuracy": self.accuracy and self.accuracy.to_json(),
            "beyond_rounding": None if self.rounding is None else self.beyond_rounding,
            "far_off": None if self.rounding is None else self.far_off,
            "furthest_line": self.furthest,
            "differences": {
                "count": differences.count,
                "equal": differences.equal,
                "not_finite": differences.not_finite,
                "largest": differences.largest,
                "mean": differences.mean,
                "histogram": [{"from": low, "below": high, "count": count} for low, high, count in differences.bins()],
            },
            "rounding_error_of_the_original": self.rounding,
            "embedding_cosine": cosines,
            "changed_labels": [changed.to_json() for changed in self.kept],
        }


def differences_of(original: Tensor, rows: Tensor, counted: Tensor | None) -> Tensor:
    """|original - rows|: 0 where both are the same, even if infinite or NaN, and where numbers do not count."""
    differences = (original - rows).abs()
    same = (original == rows) | (original.isnan() & rows.isnan())
    if counted is not None:
        same |= ~counted
    return differences.nan_to_num(nan=math.inf, posinf=math.inf).masked_fill_(same, 0)


def rounding_errors(original: Tensor, exact: Tensor, answers: Answers, batch: Batch) -> Tensor:
    """(num_texts,) float64: for each text the largest finite error of the original's numbers."""
    errors = differences_of(original.double(), exact.double(), answers.counted(batch))
    errors = errors.masked_fill(errors.isinf(), 0)
    found = torch.zeros(len(batch.texts), dtype=torch.float64)
    return found.scatter_reduce(0, answers.owners(batch), errors.amax(1), "amax")


def finite_or_none(number: float) -> float | None:
    """JSON has no word for infinity."""
    return number if math.isfinite(number) else None
