"""A run's measurements as plain data: written to JSON and CSV, read back from JSON, with the figures that follow."""

from __future__ import annotations

import csv
import itertools
import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .stats import Interval, median_interval, noise_of, percentile, round_ratios
from .work import floor_seconds

FORMAT = 1
# The baseline is timed twice under two names: the difference between the two is noise.
AGAIN = " (again)"

Status = Literal["timed", "failed", "unavailable"]
Kind = Literal["model", "kernel"]


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
    """A model, or a single kernel, on one workload in one dtype.

    Attributes:
        subject: the model's or the kernel's name.
        workload: `Workload.name`, or the kernel's sizes.
        baseline: the provider that the others are compared with.
        batch_size: texts in a batch; 0 for a kernel.
        real_tokens, padded_tokens: of a batch, on average.
        flops, num_bytes: the least that a batch needs, on average.
        seconds: for each provider and the baseline again, for each complete round, for each call.
        threads: if they are not the run's own.
        judged_on: the texts on which labels were compared, if there is a provider of reduced precision.
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

    @property
    def key(self) -> tuple[str, str, str, str, int | None]:
        return self.kind, self.subject, self.workload, self.dtype, self.threads

    @property
    def name(self) -> str:
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.threads else ""
        return f"{self.subject}, {self.workload}, {self.dtype}{threads}"

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
        """Every call's time."""
        return list(itertools.chain.from_iterable(self.seconds.get(provider, [])))

    def typical_seconds(self, provider: str) -> float | None:
        """The median: of all calls for a latency, else of the rounds' means."""
        seconds = self.call_seconds(provider) if self.is_latency else self.round_seconds(provider)
        return statistics.median(seconds) if seconds else None

    def p99_seconds(self, provider: str) -> float | None:
        seconds = self.call_seconds(provider)
        return percentile(seconds, 99) if seconds else None

    def per_second(self, provider: str, amount: float) -> float | None:
        """How many units of a batch are done in a second, where a batch holds ``amount``."""
        seconds = self.round_seconds(provider)
        return amount / statistics.median(seconds) if seconds else None

    def ratios(self, provider: str, baseline: str = "") -> list[float]:
        """How many times faster than the baseline, round by round."""
        ours, theirs = self.round_seconds(provider), self.round_seconds(baseline or self.baseline)
        return round_ratios(theirs, ours) if ours and theirs else []

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
        """The shortest time that one call can take on this machine by the run's own number of threads."""
        if case.threads:
            return None
        products, copies = self.best_rate("product", case.dtype), self.best_rate("copy")
        if products is None or copies is None:
            return None
        return floor_seconds(case.flops, case.num_bytes, products, copies)

    def share_of_floor(self, case: Case, provider: str) -> float | None:
        """The floor over the provider's time: 1 is as fast as possible."""
        floor, seconds = self.floor_seconds(case), case.round_seconds(provider)
        return floor / statistics.median(seconds) if floor is not None and seconds else None

    def first_call(self, case: Case, provider: str) -> FirstCall | None:
        wanted = (case.subject, case.workload, case.dtype, provider)
        for each in self.first_calls:
            if (each.model, each.workload, each.dtype, each.provider) == wanted:
                return each
        return None

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

    def write_csv(self, path: Path) -> None:
        """Writes one line per call, each with its provenance."""
        facts = {
            # A case's own threads stand in a column of this name.
            **{name: self.provenance[name] for name in sorted(_PROVENANCE - {"versions", "threads"})},
            **self.provenance["versions"],
            "suite": self.suite,
        }
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*_SAMPLE_COLUMNS, *facts])
            for sample in self._samples():
                writer.writerow([*sample, *facts.values()])

    def _samples(self) -> Iterator[tuple[object, ...]]:
        for case in self.cases:
            *key, threads = case.key
            threads = threads or self.provenance["threads"]
            for provider, rounds in case.seconds.items():
                for number, calls in enumerate(rounds):
                    for call, seconds in enumerate(calls):
                        yield (*key, threads, case.batch_size, provider, number, call, seconds)


# The keys of provenance that every results file must have; a run writes more.
_PROVENANCE = {
    *("chip", "driver", "cuda", "cpu", "cores", "threads", "system", "python", "fastcls", "versions"),
    *("commit", "dirty", "source_digest", "date"),
}
_SAMPLE_COLUMNS = (
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
)
