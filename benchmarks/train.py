"""Steps of fine-tuning a second: fastcls beside transformers and a packed model in torch alone.

python benchmarks/train.py                                     # the cases of docs/training.md, some ten minutes
python benchmarks/train.py --model bert-base --on "32 x sst2"  # one case
python benchmarks/train.py --compiled --dtype bfloat16         # on a GPU, beside torch.compile, too

A step is a forward pass, a backward pass and fused AdamW over all parameters, on batches in turn. First the gradients
of each way are checked, without dropout, against transformers in float64. Memory is what a forward pass keeps for its
backward pass, weights left out; on a GPU the most that a step had allocated beyond weights and optimizer.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor, nn
from transformers import BertForSequenceClassification

import fastcls
from fastcls_benchmarks import provenance
from fastcls_benchmarks.packed_torch import Packed, PackedTorchBert
from fastcls_benchmarks.timing import seconds_of
from fastcls_benchmarks.workloads import (
    SEED,
    Batch,
    ModelInputs,
    Workload,
    build_model,
    class_of,
    config_of,
    padded_tokens,
    real_tokens,
)

CASES = (
    ("minilm-l6", "32 x sst2"),
    ("minilm-l6", "8 x mixed-512"),
    ("bert-base", "32 x sst2"),
    ("deberta-v3-base", "32 x sst2"),
)
BASELINE = "transformers sdpa"
# Times the baseline's error: oneDNN adds the products of float32 up in longer chains than MKL.
ALLOWED = 2.0
_RATES = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Way(NamedTuple):
    """One way of training.

    Attributes:
        model: what holds the parameters.
        loss: from a batch with labels.
    """

    model: nn.Module
    loss: Callable[[Batch], Tensor]


class Row(NamedTuple):
    """What one way of training took.

    Attributes:
        name: the way's.
        error: of the gradients, as a part of the baseline's own error against float64.
        seconds: of each timed step.
        kept_mib: of activations.
    """

    name: str
    error: float
    seconds: list[float]
    kept_mib: float


def ways(
    name: str, device: torch.device, dtype: torch.dtype, compiled: bool, **options: Any
) -> Iterator[tuple[str, Way]]:
    """All ways of training one of the models, each over weights of its own."""

    def built() -> Any:
        return build_model(name, device, dtype, **options)

    model = built().train()
    attention = model.config._attn_implementation
    yield (
        BASELINE if attention == "sdpa" else f"transformers {attention}",
        Way(model, lambda batch: model(**batch).loss),
    )
    if compiled:
        inner = built().train()
        made: Any = torch.compile(inner)
        yield "torch.compile", Way(inner, lambda batch: made(**batch).loss)
    if isinstance(model, BertForSequenceClassification):
        packed = PackedTorchBert(built().train())
        for weight in packed.parameters():
            weight.requires_grad_()

        def loss(batch: Batch) -> Tensor:
            logits = packed(Packed.of(batch, device, packed.varlen))
            return nn.functional.cross_entropy(logits, batch["labels"].to(device))

        yield "torch packed, no dropout", Way(packed, loss)
    fast = fastcls.optimize(built()).train()
    yield "fastcls", Way(fast, lambda batch: fast(**batch).loss)


def gradients(way: Way, batch: Batch) -> dict[str, Tensor]:
    """The gradients by the names of parameters, in float64 on the CPU."""
    way.model.zero_grad()
    way.loss(batch).backward()
    found = {name: weight.grad for name, weight in way.model.named_parameters()}
    return {name: grad.double().cpu() for name, grad in found.items() if grad is not None}


def errors(name: str, device: torch.device, dtype: torch.dtype, compiled: bool, batch: Batch) -> dict[str, float]:
    """Each way's error of the gradient's norm over all parameters, against float64, as a part of the baseline's."""
    exact = build_model(name, torch.device("cpu"), torch.float64, **_RATES).train()
    expected = gradients(Way(exact, lambda given: exact(**given).loss), batch)
    found: dict[str, float] = {}
    for way_name, way in ways(name, device, dtype, compiled, **_RATES):
        ours = {key.removeprefix("model."): grad for key, grad in gradients(way, batch).items()}
        # What another way joins to one weight has no counterpart.
        shared = [key for key in expected if key in ours]
        squares = sum(float((ours[key] - expected[key]).square().sum()) for key in shared)
        found[way_name] = squares**0.5
    baseline = next(iter(found.values()))
    return {key: error / baseline for key, error in found.items()}


def kept_bytes(way: Way, batch: Batch) -> int:
    """The bytes that a forward pass keeps for its backward pass, weights left out."""
    owner: Any = way.model
    weights = (
        [*owner.parameters(), *(weight for _, weight in owner.weights())]
        if hasattr(owner, "weights")
        else [*owner.parameters()]
    )
    memory = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in memory:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = way.loss(batch)
        total = sum(kept.values())
    del loss
    return total


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most that a step had allocated on a GPU beyond what was there before."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def measured(
    name: str, workload: Workload, device: torch.device, dtype: torch.dtype, compiled: bool, rounds: int, count: int
) -> list[Row]:
    """The rows of one case.

    Raises:
        RuntimeError: a way's gradients are less exact than they may be.
    """
    inputs = ModelInputs.of(class_of(name), config_of(name))
    generator = torch.Generator().manual_seed(SEED)
    batches = [
        {**batch, "labels": torch.randint(0, 2, (workload.batch_size,), generator=generator)}
        for batch in workload.batches(count, inputs)
    ]
    found = errors(name, device, dtype, compiled, batches[0])
    wrong = {key: error for key, error in found.items() if error > ALLOWED}
    if wrong:
        raise RuntimeError(f"gradients are not exact, as parts of the baseline's own error: {wrong}")
    steps: dict[str, Callable[[int], None]] = {}
    kept: dict[str, float] = {}
    for way_name, way in ways(name, device, dtype, compiled):
        optimizer = torch.optim.AdamW(way.model.parameters(), lr=1e-6, fused=True)

        def step(index: int, way: Way = way, optimizer: torch.optim.Optimizer = optimizer) -> None:
            way.loss(batches[index % count]).backward()
            optimizer.step()
            optimizer.zero_grad()

        for index in range(count if compiled else 1):
            step(index)
        on_gpu = device.type == "cuda"
        kept[way_name] = (peak_bytes(lambda: step(0), device) if on_gpu else kept_bytes(way, batches[0])) / 2**20
        steps[way_name] = step
    seconds: dict[str, list[float]] = {key: [] for key in steps}
    order = random.Random(SEED)
    for index in range(rounds * count):
        for key in order.sample(list(steps), len(steps)):
            seconds[key].append(seconds_of(lambda key=key, index=index: steps[key](index), device))  # type: ignore[misc]
    tokens = statistics.fmean(map(real_tokens, batches))
    padded = statistics.fmean(map(padded_tokens, batches))
    print(f"\n{name}, {workload.name}: {tokens:.0f} tokens a batch, {padded:.0f} with padding")
    return [Row(key, found[key], seconds[key], kept[key]) for key in steps]


def show(rows: list[Row]) -> None:
    """Prints the rows, each beside the first."""
    baseline = rows[0]
    for row in rows:
        ratio = statistics.median(a / b for a, b in zip(baseline.seconds, row.seconds, strict=True))
        print(
            f"  {row.name:26}{statistics.median(row.seconds) * 1e3:9.1f} ms{ratio:7.2f} x"
            f"{row.kept_mib:9.1f} MiB ({row.kept_mib / baseline.kept_mib:.2f}), error {row.error:.2f}",
            flush=True,
        )


def main(
    model: Annotated[str | None, typer.Option(help="One of fastcls bench --list.")] = None,
    on: Annotated[str, typer.Option(help="Texts in a batch x lengths.")] = "32 x sst2",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="PyTorch's own number if left out.")] = None,
    compiled: Annotated[bool, typer.Option(help="Measure torch.compile, too.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="How often each batch is timed.")] = 3,
    batches: Annotated[int, typer.Option(min=1, help="How many batches there are.")] = 4,
    out: Annotated[Path | None, typer.Option(help="Write every step's time to this JSON file.")] = None,
) -> None:
    """Measures steps of fine-tuning."""
    if dtype not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"dtype must be float32 or bfloat16, got {dtype}")
    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = []
    for name, workload in CASES if model is None else ((model, on),):
        rows = measured(name, Workload.named(workload), device, getattr(torch, dtype), compiled, rounds, batches)
        show(rows)
        cases.append({"model": name, "workload": workload, "dtype": dtype, "rows": [row._asdict() for row in rows]})
        if out is not None:
            # After each case, so that an interrupted run leaves what it measured.
            out.write_text(
                json.dumps({"machine": provenance.collect(device), "cases": cases}, indent=1), encoding="utf-8"
            )


if __name__ == "__main__":
    typer.run(main)
