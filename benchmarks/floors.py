"""How fast BERT can be on a GPU, and how near fastcls comes: from packed token ids on the device to logits on it.

python benchmarks/floors.py
python benchmarks/floors.py --measure --out floors.json

Without --measure nothing runs: floors follow from the useful work and two given rates. With it the rates are measured
on this GPU, and fastcls and its peers are checked and then timed side by side.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import BertForSequenceClassification

import fastcls
from fastcls.engine.unpacking import unpack_rows
from fastcls_benchmarks import machine, provenance, timing
from fastcls_benchmarks.packed_torch import Packed, PackedTorchBert
from fastcls_benchmarks.provider import Forward, Model, Provider, own_copy
from fastcls_benchmarks.providers import FASTCLS, PACKED_COMPILED, SDPA
from fastcls_benchmarks.results import Case
from fastcls_benchmarks.tables import duration, plain_table
from fastcls_benchmarks.verify import Reference
from fastcls_benchmarks.work import ModelShape, floor_seconds, product_shapes, useful_flops, weight_bytes
from fastcls_benchmarks.workloads import Batch, Workload, build_model, lengths_of, real_tokens

DTYPE = torch.bfloat16
NUM_BATCHES = 3
# How often a batch runs before it is timed: a shape is compiled, then captured.
WARM_UP_CALLS = 3


@dataclass(frozen=True)
class Goal:
    """A workload, and the target time on one H200 in bfloat16."""

    model: str
    workload: Workload
    milliseconds: float | None = None


GOALS = (
    Goal("bert-base", Workload(1, "128"), 0.30),
    Goal("bert-base", Workload(32, "128"), 1.25),
    Goal("bert-base", Workload(128, "mixed-512"), 7.0),
    Goal("bert-base", Workload(128, "512"), 18.5),
    Goal("bert-base", Workload(32, "sst2")),
    Goal("bert-large", Workload(32, "squad"), 32 / 5000 * 1e3),
    Goal("minilm-l6", Workload(32, "sst2")),
)


class Rates(NamedTuple):
    """A chip's best rates."""

    flops_per_second: float
    bytes_per_second: float


class Floor(NamedTuple):
    """The work that a batch needs, on average, and the shortest possible time."""

    tokens: float
    flops: float
    seconds: float


def floor_of(goal: Goal, rates: Rates) -> Floor:
    """The useful work alone, as if computing and moving overlapped perfectly."""
    shape, batches = ModelShape.named(goal.model), goal.workload.batches(NUM_BATCHES)
    flops = sum(useful_flops(shape, batch) for batch in batches) / len(batches)
    tokens = sum(map(real_tokens, batches)) / len(batches)
    return Floor(tokens, flops, floor_seconds(flops, weight_bytes(shape, DTYPE.itemsize), *rates))


class Resident:
    """Makes providers' forwards over inputs that are on the GPU before the clock starts."""

    def __init__(self, model: Model, batches: Sequence[Batch]) -> None:
        self.model = model
        self.batches = batches

    def _over(self, inputs: list[Any], forward: Callable[[Any], Tensor]) -> Forward:
        prepared = {id(batch): each for batch, each in zip(self.batches, inputs, strict=True)}
        return lambda batch: forward(prepared[id(batch)])

    def fastcls(self) -> Forward:
        fast = fastcls.optimize(own_copy(self.model))
        packed = [fast.pack(_lists(batch)) for batch in self.batches]
        return self._over(packed, lambda parts: unpack_rows([(fast.forward_packed(part), part) for part in parts]))

    def packed_compiled(self) -> Forward:
        module = PackedTorchBert(cast(BertForSequenceClassification, own_copy(self.model)))
        inputs = [Packed.of(batch, self.model.device, module.varlen) for batch in self.batches]
        return self._over(inputs, torch.compile(module, dynamic=True))

    def sdpa(self) -> Forward:
        forward = SDPA.load(self.model).forward
        inputs = [{name: tensor.to(self.model.device) for name, tensor in batch.items()} for batch in self.batches]
        return self._over(inputs, forward)

    def forwards(self) -> dict[Provider, Callable[[], Forward]]:
        return {SDPA: self.sdpa, PACKED_COMPILED: self.packed_compiled, FASTCLS: self.fastcls}


def _lists(batch: Batch) -> list[list[int]]:
    lengths = lengths_of(batch).tolist()
    return [row[:length] for row, length in zip(batch["input_ids"].tolist(), lengths, strict=True)]


def measure(goal: Goal, model: Model, seconds: float, console: Console) -> tuple[Case, dict[str, str]]:
    """Times all providers with correct logits, in turn; returns the reasons why others failed."""
    batches = goal.workload.batches(NUM_BATCHES)
    reference = Reference(model, batches)
    case = Case("model", goal.model, goal.workload.name, str(DTYPE), SDPA.name, goal.workload.batch_size)
    timed: dict[str, timing.Function] = {}
    failed: dict[str, str] = {}
    with torch.inference_mode():
        for provider, load in Resident(model, batches).forwards().items():
            console.print(f"{case.name}: preparing and checking {provider.name}")
            try:
                forward = load()
                verdict = reference.check(provider, forward)
                if not verdict.passed:
                    failed[provider.name] = verdict.reason
                    continue
                for batch in batches * WARM_UP_CALLS:
                    forward(batch)
            except Exception as error:  # a provider that breaks is a line below the table, not the end of the run
                failed[provider.name] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            timed[provider.name] = lambda index, forward=forward: forward(batches[index % len(batches)])  # type: ignore[misc]
    if timed:
        case.baseline = next(iter(timed))
    effort = timing.Effort(seconds, max_calls=100)
    timing.time_rounds(case, timed, effort, model.device)
    return case, failed


def rates_of(device: torch.device) -> Rates:
    """This GPU's rates, measured at square shapes and the models' own."""
    shapes = [shape for name in ("bert-base", "bert-large") for shape in product_shapes(ModelShape.named(name))]
    rates = machine.measure(device, DTYPE, shapes, seconds=2.0)
    return Rates(*(max(rate.per_second for rate in rates if rate.kind == kind) for kind in ("product", "copy")))


def table_of(rates: Rates, source: str, cases: dict[Goal, Case]) -> Table:
    """A row for each workload."""
    table = plain_table(
        "Packed ids on the GPU to logits on it, bfloat16",
        f"Rates {source}: {rates.flops_per_second / 1e12:.0f} TFLOP/s, {rates.bytes_per_second / 1e12:.2f} TB/s.",
    )
    for heading in ("model", "batch", "tokens", "GFLOP", "floor ms", "goal ms", "of floor"):
        table.add_column(heading, justify="left" if heading in ("model", "batch") else "right")
    if cases:
        for heading in ("fastcls ms", "of floor", "vs packed", "vs sdpa"):
            table.add_column(heading, justify="right")
    for goal in GOALS:
        floor = floor_of(goal, rates)
        aimed = goal.milliseconds
        row = [
            goal.model,
            goal.workload.name,
            f"{floor.tokens:,.0f}",
            f"{floor.flops / 1e9:,.0f}",
            duration(floor.seconds),
            "" if aimed is None else f"{aimed:.2f}",
            "" if aimed is None else f"{floor.seconds * 1e3 / aimed:.0%}",
        ]
        if cases:
            row += _measured_cells(cases.get(goal), floor)
        table.add_row(*row)
    return table


def _measured_cells(case: Case | None, floor: Floor) -> list[str]:
    ours = None if case is None else case.typical_seconds(FASTCLS.name)
    if case is None or ours is None:
        return ["failed", "", "", ""]
    ratios = [case.times_faster(FASTCLS.name, name) for name in (PACKED_COMPILED.name, SDPA.name)]
    return [duration(ours), f"{floor.seconds / ours:.0%}", *("" if each is None else f"{each:.2f}" for each in ratios)]


def main(
    measure_here: Annotated[bool, typer.Option("--measure", help="Time it on this machine's GPU.")] = False,
    tflops: Annotated[float, typer.Option(min=1, help="Matrix products: what to assume without --measure.")] = 790,
    terabytes: Annotated[float, typer.Option(min=0.01, help="Copies, TB/s: likewise.")] = 4.3,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each workload is timed.")] = 6,
    out: Annotated[Path | None, typer.Option(help="Keep all samples in this JSON file.")] = None,
) -> None:
    """Floors of the time from packed token ids to logits, and with --measure how near to them fastcls comes."""
    console, progress = Console(), Console(stderr=True)
    if not measure_here:
        if out is not None:
            raise typer.BadParameter(
                "nothing is measured, so there is nothing to keep: add --measure", param_hint="--out"
            )
        console.print(table_of(Rates(tflops * 1e12, terabytes * 1e12), "assumed", {}))
        return
    if not torch.cuda.is_available():
        raise typer.BadParameter("needs a GPU that torch can use, and there is none", param_hint="--measure")
    device = torch.device("cuda")
    rates = rates_of(device)
    cases: dict[Goal, Case] = {}
    failures: dict[str, dict[str, str]] = {}
    try:
        for name in dict.fromkeys(goal.model for goal in GOALS):
            model = build_model(name, device, DTYPE)
            for goal in (each for each in GOALS if each.model == name):
                try:
                    cases[goal], failed = measure(goal, model, seconds, progress)
                except torch.OutOfMemoryError as error:
                    failures[f"{name}, {goal.workload.name}"] = {"all": str(error).splitlines()[0]}
                    continue
                if failed:
                    failures[cases[goal].name] = failed
    except KeyboardInterrupt:
        progress.print("Interrupted: what was complete is kept.")
    console.print(table_of(rates, "measured here", cases))
    for name, failed in failures.items():
        for provider, reason in failed.items():
            console.print(f"{name}: {provider} failed: {reason}")
    if out is not None:
        kept = {
            "provenance": provenance.collect(device),
            "rates": rates._asdict(),
            "cases": [asdict(case) for case in cases.values()],
            "failures": failures,
        }
        out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
