"""What a run measured, as plain data: written to JSON, read back by `readme_table`, and what follows from it."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .providers import SDPA
from .stats import noise_of, round_ratios

# The baseline is timed twice under two names: what the two differ by is noise.
BASELINE = SDPA.name
BASELINE_AGAIN = f"{SDPA.name} (again)"

Status = Literal["timed", "failed", "unavailable"]


@dataclass
class Row:
    """One provider on one model and workload.

    Attributes:
        difference: the largest of a logit from the reference, or None where it was not computed.
        detail: why it failed or cannot run; otherwise what there is to say about how it was prepared.
        load_seconds: to prepare the model and answer the first batches, which check it.
        flops: the matrix work that it does for all batches together.
    """

    provider: str
    status: Status
    difference: float | None = None
    detail: str = ""
    load_seconds: float | None = None
    flops: int = 0


@dataclass
class Case:
    """One model on one workload.

    Attributes:
        flops: the useful matrix work in all batches together.
        ceilings: the names under which the ceiling (`work.Ceiling`) was timed, one a library.
        ceiling_flops: the matrix work that the ceiling does for all batches together.
        seconds: for each name (providers, the baseline again, ceilings), for each complete round, for each batch.
    """

    model: str
    workload: str
    dtype: str
    num_batches: int
    real_tokens: int
    padded_tokens: int
    flops: int
    ceilings: list[str]
    ceiling_flops: int = 0
    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, list[list[float]]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.model}, {self.workload}"

    def row(self, provider: str) -> Row | None:
        return next((row for row in self.rows if row.provider == provider), None)

    def batch_seconds(self, name: str) -> list[float]:
        """For each round the mean time of a batch; empty where nothing was timed."""
        return [statistics.fmean(batches) for batches in self.seconds.get(name, [])]

    def times_faster(self, name: str, baseline: str = BASELINE) -> float | None:
        """How many times faster than ``baseline``: the median of the rounds' ratios."""
        ours, theirs = self.batch_seconds(name), self.batch_seconds(baseline)
        return statistics.median(round_ratios(theirs, ours)) if ours and theirs else None

    @property
    def noise(self) -> float | None:
        """What the baseline differs from itself by, as a fraction."""
        first, again = self.batch_seconds(BASELINE), self.batch_seconds(BASELINE_AGAIN)
        return noise_of(round_ratios(first, again)) if first and again else None

    def product_rate(self, ceiling: str) -> float | None:
        """Matrix products a second, in FLOP/s, of one library at this model's shapes."""
        seconds = self.batch_seconds(ceiling)
        return self.ceiling_flops / self.num_batches / statistics.median(seconds) if seconds else None

    def share(self, name: str, flops: int) -> float | None:
        """The part of the machine's product rate, by its best library, that ``flops`` for all batches amount to."""
        best = max(self.ceilings, key=lambda ceiling: self.product_rate(ceiling) or 0.0)
        ratio = self.times_faster(name, best)
        return ratio * flops / self.ceiling_flops if ratio else None


@dataclass
class Memory:
    """Peak memory of one forward above what was held before it, in a process of its own."""

    model: str
    workload: str
    provider: str
    peak_bytes: int | None
    detail: str = ""


@dataclass
class Report:
    """One run. ``partial`` until it ended by itself."""

    provenance: dict[str, Any]
    arguments: dict[str, Any]
    partial: bool = True
    cases: list[Case] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Report:
        data = json.loads(path.read_text(encoding="utf-8"))
        cases = [Case(**{**case, "rows": [Row(**row) for row in case["rows"]]}) for case in data.pop("cases")]
        memory = [Memory(**each) for each in data.pop("memory")]
        return cls(**data, cases=cases, memory=memory)
