"""A run's measurements: plain data in JSON, and in long form the figures that follow, one row per provider and case."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    # Not needed to measure: importing it takes longer than some suites' first case.
    import pandas as pd

FORMAT = 1
# The baseline is timed twice under two names: the difference between the two is noise.
AGAIN = " (again)"

Status = Literal["timed", "failed", "unavailable"]
Kind = Literal["model", "kernel", "text"]


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

    For n normal samples with deviation s, the 20th and 80th percentiles lie about 0.84 s from the middle, and 95 % of
    medians within 1.96 * 1.25 s / sqrt(n). The factor is somewhat larger than the resulting 2.9, because percentiles of
    few samples lie too far in. It uses percentiles, because now and then a sample is far out.
    """
    low, median, high = (percentile(samples, percent) for percent in (20, 50, 80))
    error = 3.5 * (high - low) / 2 / math.sqrt(len(samples) - 1)
    return Interval(median - error, median, median + error)


def noise_of(ratios: Sequence[float]) -> float:
    """How far from 1 the median ratio of a provider to itself may lie: the method cannot resolve less."""
    low, _, high = median_interval(ratios)
    return max(abs(low - 1), abs(high - 1))


@dataclass
class Row:
    """One provider in one case.

    Attributes:
        difference: the largest from the reference, or None if it was not computed.
        detail: why it failed or cannot run; otherwise remarks on how it was prepared.
        convert_seconds: from the transformers model to a function, if this case was the provider's first.
        first_seconds: the first batch of this case, compiling included if the provider compiles.
        agreement, mean_error: see `verify.Kept`.
    """

    provider: str
    status: Status
    difference: float | None = None
    detail: str = ""
    convert_seconds: float | None = None
    first_seconds: float | None = None
    agreement: float | None = None
    mean_error: float | None = None


@dataclass
class Case:
    """A model, a single kernel, or a way from texts to scores, on one workload in one dtype.

    Attributes:
        subject: the model's or the kernel's name.
        workload: `Workload.name`, or the kernel's sizes.
        baseline: the provider that the others are compared with.
        batch_size: texts in a call; 0 for a kernel.
        real_tokens, padded_tokens: of a call, on average.
        flops, num_bytes: the least that a call needs, on average.
        seconds: for each provider and the baseline again, for each complete round, for each call.
        threads: if they are not the run's own.
        judged_on: the texts on which labels were compared, if there is a provider of reduced precision.
        about: of texts: which, and how many.
        published: texts a second that somebody else published for a model of this shape.
    """

    kind: Kind
    subject: str
    workload: str
    dtype: str
    baseline: str
    batch_size: int = 0
    real_tokens: float = 0.0
    padded_tokens: float = 0.0
    flops: float = 0.0
    num_bytes: float = 0.0
    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, list[list[float]]] = field(default_factory=dict)
    threads: int | None = None
    judged_on: str = ""
    about: str = ""
    published: float | None = None

    @property
    def key(self) -> tuple[str, str, str, str, int | None]:
        return self.kind, self.subject, self.workload, self.dtype, self.threads

    @property
    def name(self) -> str:
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.threads else ""
        return f"{self.subject}, {self.workload}, {self.dtype}{', from text' * (self.kind == 'text')}{threads}"

    @property
    def is_latency(self) -> bool:
        """Whether single calls matter, with their 99th percentile, and not their sum."""
        return self.kind == "model" and self.batch_size == 1

    def row(self, provider: str) -> Row | None:
        return next((row for row in self.rows if row.provider == provider), None)

    def round_seconds(self, provider: str) -> list[float]:
        """For each round the mean time of a call; empty if nothing was timed."""
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
        """The median of `ratios`."""
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


@dataclass
class Rate:
    """A rate that the machine reached: ``per_second`` is in FLOP/s for products, in bytes/s for copies."""

    kind: Literal["product", "copy"]
    what: str
    dtype: str
    per_second: float


@dataclass
class FirstCall:
    """One provider in its own process, from its start to the first batch's logits.

    Attributes:
        import_seconds: torch, transformers and the provider's library.
        load_seconds: building the transformers model, which stands for reading a checkpoint.
        convert_seconds: from there to a function.
        first_seconds: the first batch.
        peak_bytes: of one more forward on the largest batch, above the memory held before; None if unknown.
        detail: why something is missing.
    """

    model: str
    workload: str
    dtype: str
    provider: str
    import_seconds: float | None = None
    load_seconds: float | None = None
    convert_seconds: float | None = None
    first_seconds: float | None = None
    peak_bytes: int | None = None
    detail: str = ""


# The keys of provenance that every results file must have; a run writes more.
_PROVENANCE = frozenset(
    [
        "chip",
        "driver",
        "cuda",
        "cpu",
        "cores",
        "threads",
        "system",
        "python",
        "fastcls",
        "versions",
        "commit",
        "dirty",
        "source_digest",
        "date",
    ]
)


_DERIVED = ("p20", "p80", "p99", "times", "low", "high", "texts", "tokens", "share")


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
        """The best rate that was measured, in a dtype or in any."""
        found = [rate.per_second for rate in self.rates if rate.kind == kind and dtype in (None, rate.dtype)]
        return max(found, default=None)

    def floor_seconds(self, case: Case) -> float | None:
        """The shortest time of a call on this machine, by the run's own threads, if computing and moving overlap."""
        products, copies = self.best_rate("product", case.dtype), self.best_rate("copy")
        if case.threads or not case.flops + case.num_bytes or products is None or copies is None:
            return None
        return max(case.flops / products, case.num_bytes / copies)

    def figures(self) -> pd.DataFrame:
        """A row for each provider of each case, the baseline again left out; what is unknown is NaN.

        Columns: what a `Case` and a `Row` say; ``seconds`` (the typical time), ``p20``, ``p80``, ``p99``, ``times``
        (faster than the baseline), ``low`` and ``high`` (its interval), ``noise``, ``floor`` and ``share`` (the floor
        over the time taken), ``texts`` and ``tokens`` a second.
        """
        import pandas as pd

        lines = []
        for case in self.cases:
            of_case = {name: getattr(case, name) for name in ("kind", "subject", "workload", "dtype", "threads")}
            of_case |= {
                "case": case.name,
                "baseline": case.baseline,
                "noise": case.noise,
                "batch_size": case.batch_size,
            }
            of_case |= {"floor": self.floor_seconds(case), "published": case.published}
            for row in case.rows:
                rounds, calls = case.round_seconds(row.provider), case.call_seconds(row.provider)
                interval = case.interval(row.provider)
                line: dict[str, Any] = {**of_case, **dict.fromkeys(_DERIVED), **asdict(row)}
                line["seconds"] = case.typical_seconds(row.provider)
                if rounds:
                    middle = statistics.median(rounds)
                    line |= {"p20": percentile(rounds, 20), "p80": percentile(rounds, 80), "p99": percentile(calls, 99)}
                    line |= {"times": case.times_faster(row.provider), "texts": case.batch_size / middle}
                    line |= {"tokens": case.real_tokens / middle}
                    # A kernel's row without an error computes something else, so the floor does not apply.
                    if of_case["floor"] and (case.kind != "kernel" or row.difference is not None):
                        line["share"] = of_case["floor"] / middle
                if interval:
                    line |= {"low": interval.low, "high": interval.high}
                lines.append(line)
        figures = pd.DataFrame(lines, columns=None if lines else ["case", "provider", "seconds"])
        # None, where nothing is known in any row, is no number.
        numbers = [name for name in (*_DERIVED, "seconds", "difference", "agreement", "mean_error") if name in figures]
        return figures.astype(dict.fromkeys(numbers, float))

    def samples(self) -> pd.DataFrame:
        """A row for each timed call, with the run's provenance."""
        import pandas as pd

        lines = [
            (
                *case.key[:4],
                case.threads or self.provenance["threads"],
                case.batch_size,
                provider,
                number,
                call,
                seconds,
            )
            for case in self.cases
            for provider, rounds in case.seconds.items()
            for number, calls in enumerate(rounds)
            for call, seconds in enumerate(calls)
        ]
        columns = [
            "kind",
            "subject",
            "workload",
            "dtype",
            "threads",
            "batch_size",
            "provider",
            "round",
            "call",
            "seconds",
        ]
        facts = {name: self.provenance[name] for name in sorted(_PROVENANCE - {"versions", "threads"})}
        return pd.DataFrame(lines, columns=columns).assign(**facts, **self.provenance["versions"], suite=self.suite)

    def first_call(self, subject: str, workload: str, dtype: str, provider: str) -> FirstCall | None:
        wanted = (subject, workload, dtype, provider)
        found = (each for each in self.first_calls if (each.model, each.workload, each.dtype, each.provider) == wanted)
        return next(found, None)

    def write(self, path: Path) -> None:
        """Writes JSON; a run that is stopped while writing leaves the former file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=None) + "\n", encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def read(cls, path: Path) -> Report:
        """
        Raises:
            OSError: it cannot be read.
            ValueError: it is no results file of this version.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("format") != FORMAT:
                raise ValueError("of another version")
            missing = _PROVENANCE - data["provenance"].keys()
            if missing:
                raise ValueError(f"its provenance lacks {', '.join(sorted(missing))}")
            cases = [Case(**{**case, "rows": [Row(**row) for row in case["rows"]]}) for case in data.pop("cases")]
            rates = [Rate(**rate) for rate in data.pop("rates")]
            first_calls = [FirstCall(**each) for each in data.pop("first_calls")]
            return cls(**data, rates=rates, cases=cases, first_calls=first_calls)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} must be a results.json of fastcls bench, format {FORMAT}: {error}") from error
