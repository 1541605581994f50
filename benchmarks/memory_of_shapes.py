"""How much a process grows on a CPU while it gets calls of ever new sizes: fastcls beside transformers. On Linux.

python benchmarks/memory_of_shapes.py
python benchmarks/memory_of_shapes.py --model bert-base --calls 400

oneDNN keeps the code that it compiled for each shape of a product. Each model runs in its own process, on the same
calls of 1 to 3 texts and up to 400 tokens.
"""

from __future__ import annotations

import multiprocessing
import random
import resource
from pathlib import Path
from typing import Annotated

import torch
import typer

import fastcls
from fastcls_benchmarks.workloads import VOCAB_SIZE, build_model


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / (1 << 20)


def growth(model_name: str, provider: str, calls: int, threads: int) -> tuple[float, int]:
    """By how many MiB this process grows, and over how many different batch sizes."""
    torch.set_num_threads(threads)
    model = build_model(model_name, torch.device("cpu"), torch.float32)
    called = fastcls.optimize(model) if provider == "fastcls" else model
    chance, sizes, start = random.Random(0), set(), resident_mib()
    with torch.inference_mode():
        for _ in range(calls):
            tokens, texts = chance.randint(3, 400), chance.randint(1, 3)
            length = max(2, min(tokens // texts, 200))
            sizes.add(texts * length)
            called(torch.randint(VOCAB_SIZE, (texts, length)))
    return resident_mib() - start, len(sizes)


def main(
    model: Annotated[str, typer.Option(help="One of fastcls bench --list.")] = "minilm-l6",
    calls: Annotated[int, typer.Option(min=1)] = 4000,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    spawn = multiprocessing.get_context("spawn")
    for provider in ("transformers", "fastcls"):
        with spawn.Pool(1) as pool:
            grown, sizes = pool.apply(growth, (model, provider, calls, threads))
        print(f"{provider} grew by {grown:.0f} MiB in {calls} calls of {sizes} different numbers of tokens")


if __name__ == "__main__":
    typer.run(main)
