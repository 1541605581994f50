"""The shortest possible time on a GPU from packed token ids to logits, by workload; nothing runs.

python benchmarks/floors.py
python benchmarks/floors.py --tflops 395 --terabytes 2.0

`fastcls bench --suite floors` measures on a GPU how near fastcls and its peers come.
"""

from __future__ import annotations

import statistics
from typing import Annotated

import torch
import typer
from rich.console import Console

from fastcls_benchmarks.results import floor_seconds
from fastcls_benchmarks.roofline import ModelShape, useful_flops, weight_bytes
from fastcls_benchmarks.suites import suite
from fastcls_benchmarks.tables import duration, plain_table
from fastcls_benchmarks.workloads import real_tokens

NUM_BATCHES = 3


def main(
    tflops: Annotated[float, typer.Option(min=1, help="Matrix products.")] = 790,
    terabytes: Annotated[float, typer.Option(min=0.01, help="Copies, TB/s.")] = 4.3,
) -> None:
    """Floors of the useful work at two rates, beside the goals on one H200."""
    columns = ("model", "batch", "tokens", "GFLOP", "floor ms", "goal ms", "of floor")
    assumed = f"Rates assumed: {tflops:g} TFLOP/s, {terabytes:g} TB/s."
    table = plain_table("Packed ids on the GPU to logits on it, bfloat16", assumed, columns, left=2)
    for plan in suite("floors", torch.device("cuda")).plans:
        shape, batches = ModelShape.named(plan.subject), plan.workload.batches(NUM_BATCHES)
        flops = statistics.fmean(useful_flops(shape, batch) for batch in batches)
        tokens = statistics.fmean(map(real_tokens, batches))
        least = floor_seconds(flops, weight_bytes(shape, plan.dtype.itemsize), tflops * 1e12, terabytes * 1e12)
        aimed = f"{least / plan.goal:.0%}" if plan.goal else ""
        shown = (f"{tokens:,.0f}", f"{flops / 1e9:,.0f}", duration(least), duration(plan.goal) if plan.goal else "")
        table.add_row(plan.subject, plan.workload.name, *shown, aimed)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
