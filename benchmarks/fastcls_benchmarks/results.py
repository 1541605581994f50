"""A run's measurements: plain data in JSON, and in long form the figures that follow, one row per provider and case."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    # Not needed to measure: importing it takes longer than some suites' first case.
    import pandas as pd

FORMAT = 1
# More noise than this and a case should be measured again: its table says so.
MUCH_NOISE = 0.08
# The baseline is timed twice under two names: the difference between the two is noise.
AGAIN = " (again)"
# The keys of provenance that every results file must have; a run writes more.
_PROVENANCE = {"chip", "driver", "cuda", "cpu", "cores", "threads", "system", "python", "fastcls", "versions"}
_PROVENANCE |= {"commit", "dirty", "source_digest", "date"}
_KEY = ("kind", "subject", "workload", "dtype", "threads")
_DERIVED = ("seconds", "p20", "p80", "p99", "times", "low", "high", "texts", "tokens", "share")

Status = Literal["timed", "failed", "unavailable"]
Kind = Literal["model", "kernel", "text", "train"]


class Interval(NamedTuple):
    """A median and its interval of about 95 % confidence."""

    low: float
    median: float
    high: float


def percentile(samples: Sequence[float], percent: int) -> float:
    """The percentile of at least one sample, interpolated between neighbours."""
    if len(samples) == 1:
        return samples[0]
    return statistics.quantiles(samples, n=100, method="inclusive")[percent - 1]


def median_interval(samples: Sequence[float]) -> Interval:
    """The interval that follows from the spread of at least two samples.

    In n normal samples with deviation s the 20th and 80th percentiles, which now and then a sample far out does not
    move, lie 0.84 s from the middle, and 95 % of medians within 1.96 * 1.25 s / sqrt(n): that makes 2.9, and more for
    few samples, whose percentiles lie too far in: drawn at random, three need 6.3 and ten 3.5.
    """
    low, median, high = (percentile(samples, percent) for percent in (20, 50, 80))
    factor = 3.5 * (1 + 1.6 / (len(samples) - 1))
    error = factor * (high - low) / 2 / math.sqrt(len(samples) - 1)
    return Interval(median - error, median, median + error)


def floor_seconds(flops: float, num_bytes: float, flops_per_second: float, bytes_per_second: float) -> float:
    """The shortest possible time: the longer of computing and moving, as if the two overlapped perfectly."""
    return max(flops / flops_per_second, num_bytes / bytes_per_second)


def noise_of(ratios: Sequence[float]) -> float:
    """How far from 1 the median ratio of a provider to itself may lie: the method cannot resolve less."""
    low, _, high = median_interval(ratios)
    return max(abs(low - 1), abs(high - 1))


@dataclass
class Row:
    """One provider in one case."""

    provider: str
    status: Status
    # The largest from the reference, of training that of all gradients by their norm; None if it was not computed.
    difference: float | None = None
    detail: str = ""  # why it failed or cannot run; otherwise remarks on how it was prepared
    convert_seconds: float | None = None  # from the transformers model to a function, in the provider's first case
    first_seconds: float | None = None  # the first batch of this case, with the provider's compiling
    agreement: float | None = None  # this and the next: see `verify.Kept`
    mean_error: float | None = None
    step_bytes: int | None = None  # of training: see `training.Way.step_bytes`


@dataclass
class Case:
    """A model, a single kernel, a way from texts to scores, or steps of training, on one workload in one dtype."""

    kind: Kind
    subject: str  # the model's or the kernel's name
    workload: str  # `Workload.name`, or the kernel's sizes
    dtype: str
    baseline: str  # the provider that the others are compared with
    batch_size: int = 0  # texts in a call; 0 for a kernel
    real_tokens: float = 0.0  # this and the next three: of a call, on average
    padded_tokens: float = 0.0
    flops: float = 0.0  # the least that is needed, as the next
    num_bytes: float = 0.0
    rows: list[Row] = field(default_factory=list)
    # For each provider and the baseline again, for each complete round, for each call.
    seconds: dict[str, list[list[float]]] = field(default_factory=dict)
    threads: int | None = None  # if they are not the run's own
    judged_on: str = ""  # the texts on which labels were compared, if there is a provider of reduced precision
    about: str = ""  # of texts: which, and how many
    published: float | None = None  # texts a second, by somebody else, for a model of this shape

    @property
    def key(self) -> tuple[str, str, str, str, int | None]:
        return self.kind, self.subject, self.workload, self.dtype, self.threads

    @property
    def name(self) -> str:
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.threads else ""
        what = {"text": ", from text", "train": ", training"}.get(self.kind, "")
        return f"{self.subject}, {self.workload}, {self.dtype}{what}{threads}"

    @property
    def is_latency(self) -> bool:
        """Whether single calls matter, with their 99th percentile, and not their sum."""
        return self.kind == "model" and self.batch_size == 1

    def row(self, provider: str) -> Row | None:
        return next((row for row in self.rows if row.provider == provider), None)

    def round_seconds(self, provider: str) -> list[float]:
        """For each round the mean time of a call."""
        return [statistics.fmean(calls) for calls in self.seconds.get(provider, [])]

    def call_seconds(self, provider: str) -> list[float]:
        return [seconds for calls in self.seconds.get(provider, []) for seconds in calls]

    def typical_seconds(self, provider: str) -> float | None:
        """The median: of all calls for a latency, else of the rounds' means."""
        seconds = self.call_seconds(provider) if self.is_latency else self.round_seconds(provider)
        return statistics.median(seconds) if seconds else None

    def ratios(self, provider: str, baseline: str = "") -> list[float]:
        """How many times faster than the baseline, round by round: the slowness of a whole round cancels out."""
        ours, theirs = self.round_seconds(provider), self.round_seconds(baseline or self.baseline)
        return [b / a for a, b in zip(ours, theirs, strict=True)] if ours and theirs else []

    def times_faster(self, provider: str, baseline: str = "") -> float | None:
        ratios = self.ratios(provider, baseline)
        return statistics.median(ratios) if ratios else None

    def interval(self, provider: str, baseline: str = "") -> Interval | None:
        """The interval of about 95 % for `times_faster`, and no narrower than the noise of the case."""
        ratios = self.ratios(provider, baseline)
        if len(ratios) < 2:
            return None
        low, median, high = median_interval(ratios)
        noise = 1 + (self.noise or 0.0)
        return Interval(min(low, median / noise), median, max(high, median * noise))

    @property
    def noise(self) -> float | None:
        """The baseline's difference from itself, as a fraction; None if too few rounds were measured."""
        ratios = self.ratios(self.baseline + AGAIN)
        return noise_of(ratios) if len(ratios) > 2 else None

    @property
    def is_noisy(self) -> bool:
        """Whether the noise is more than `MUCH_NOISE`."""
        return (self.noise or 0.0) > MUCH_NOISE


@dataclass
class Rate:
    """A rate that the machine reached: ``per_second`` is in FLOP/s for products, in bytes/s for copies."""

    kind: Literal["product", "copy"]
    what: str
    dtype: str
    per_second: float


@dataclass
class FirstCall:
    """One provider in its own process, from its start to the first batch's logits."""

    model: str
    workload: str
    dtype: str
    provider: str
    import_seconds: float | None = None  # torch, transformers and the provider's library
    load_seconds: float | None = None  # building the transformers model, which stands for reading a checkpoint
    convert_seconds: float | None = None  # from there to a function
    first_seconds: float | None = None
    peak_bytes: int | None = None  # of one more forward on the largest batch, above the memory held before
    detail: str = ""  # why something is missing


@dataclass
class Report:
    """One run; ``partial`` unless it ended by itself."""

    suite: str
    provenance: dict[str, Any]
    arguments: dict[str, Any]
    partial: bool = True
    seconds: float = 0.0
    rates: list[Rate] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)
    first_calls: list[FirstCall] = field(default_factory=list)

    def best_rate(self, kind: Literal["product", "copy"], dtype: str | None = None) -> float | None:
        found = [rate.per_second for rate in self.rates if rate.kind == kind and dtype in (None, rate.dtype)]
        return max(found, default=None)

    def floor_seconds(self, case: Case) -> float | None:
        """The shortest possible time of a call on this machine by the run's own threads, if its work is known."""
        products, copies = self.best_rate("product", case.dtype), self.best_rate("copy")
        if case.threads or not case.flops + case.num_bytes or products is None or copies is None:
            return None
        return floor_seconds(case.flops, case.num_bytes, products, copies)

    def figures(self) -> pd.DataFrame:
        """A row for each provider of each case, the baseline again left out; what is unknown is NaN.

        Beside what a `Case` and a `Row` say: ``seconds`` is typical, ``times`` faster than the baseline, from ``low``
        to ``high``; ``share`` is the ``floor`` over the time taken; ``texts`` and ``tokens`` are a second's.
        """
        import pandas as pd

        lines = []
        for case, row in ((each, row) for each in self.cases for row in each.rows):
            name, floor = row.provider, self.floor_seconds(case)
            line = {**vars(case), **vars(row), "case": case.name, "noise": case.noise, "floor": floor}
            line |= {"seconds": case.typical_seconds(name), "times": case.times_faster(name)}
            if rounds := case.round_seconds(name):
                middle, p99 = statistics.median(rounds), percentile(case.call_seconds(name), 99)
                line |= {"p20": percentile(rounds, 20), "p80": percentile(rounds, 80), "p99": p99}
                line |= {"texts": case.batch_size / middle, "tokens": case.real_tokens / middle}
                # A kernel's row without an error computes something else, so the floor does not apply.
                if floor and (case.kind != "kernel" or row.difference is not None):
                    line["share"] = floor / middle
            lines.append(line | (interval._asdict() if (interval := case.interval(name)) else {}))
        of_case = ("case", *_KEY, "baseline", "batch_size", "published", "noise", "floor")
        figures = pd.DataFrame(lines, columns=[*of_case, *(each.name for each in fields(Row)), *_DERIVED])
        # None, where nothing is known in any row, is no number.
        return figures.astype(dict.fromkeys((*_DERIVED, "difference", "agreement", "mean_error", "step_bytes"), float))

    def samples(self) -> pd.DataFrame:
        """A row for each timed call, with the run's provenance."""
        import pandas as pd

        facts = {name: self.provenance[name] for name in sorted(_PROVENANCE - {"versions", "threads"})}
        lines = [
            (*case.key[:4], case.threads or self.provenance["threads"], case.batch_size, provider, number, *call)
            for case in self.cases
            for provider, rounds in case.seconds.items()
            for number, calls in enumerate(rounds)
            for call in enumerate(calls)
        ]
        samples = pd.DataFrame(lines, columns=[*_KEY, "batch_size", "provider", "round", "call", "seconds"])
        return samples.assign(**facts, **self.provenance["versions"], suite=self.suite)

    def write(self, path: Path) -> None:
        """Writes JSON; a run that is stopped while writing leaves the former file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"format": FORMAT, **asdict(self)}) + "\n", encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def read(cls, path: Path) -> Report:
        """OSError if it cannot be read, ValueError if it is no results file of this version."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("format") != FORMAT:
                raise ValueError("of another version")
            if missing := _PROVENANCE - data["provenance"].keys():
                raise ValueError(f"its provenance lacks {', '.join(sorted(missing))}")
            if not isinstance(data["provenance"]["versions"], dict):
                raise ValueError("its versions are no mapping")
            data["cases"] = [Case(**{**case, "rows": [Row(**row) for row in case["rows"]]}) for case in data["cases"]]
            data["rates"] = [Rate(**rate) for rate in data["rates"]]
            data["first_calls"] = [FirstCall(**each) for each in data["first_calls"]]
            return cls(**data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} must be a results.json of fastcls bench, format {FORMAT}: {error}") from error
