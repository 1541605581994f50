"""Trains a tiny classifier with accelerate, stops in the middle of an epoch and goes on from what it saved.

    torchrun --nproc_per_node 2 tests/accelerate_worker.py FOLDER bf16

Writes to FOLDER/found.json the losses of a run that goes on and of one that resumes, of the first process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import DataLoaderConfiguration, set_seed  # type: ignore[import-untyped]
from support import tiny_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fastcls

TEXTS = 64
# Of the batches of an epoch, which the processes share.
BATCH = 4
ACCUMULATED = 2


class Texts(Dataset[dict[str, Tensor]]):
    """Padded texts with labels."""

    def __len__(self) -> int:
        return TEXTS

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        ids = torch.randint(5, 60, (12,), generator=torch.Generator().manual_seed(number))
        ids[3 + number % 9 :] = 0
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids[0] % 3}


class Run:
    """A model of its own, optimizer, schedule and batches, all prepared.

    Args:
        accelerator: of this process.
        makes_fast: False for the transformers model.
        rates: of dropout, where they differ from the config's.
    """

    def __init__(self, accelerator: Accelerator, *, makes_fast: bool = True, **rates: float) -> None:
        self.accelerator = accelerator
        model: nn.Module = tiny_model("BertForSequenceClassification", "bert", **rates)
        if makes_fast:
            model = fastcls.optimize(model)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        # Of its own, since each iteration draws a number, which must not be one of dropout's.
        generator = torch.Generator().manual_seed(0)
        batches: DataLoader[Any] = DataLoader(Texts(), batch_size=BATCH, shuffle=True, generator=generator)
        self.model, self.optimizer, self.schedule, self.batches = accelerator.prepare(
            model, optimizer, schedule, batches
        )

    def epoch(
        self, epoch: int, skipped: int = 0, saved_after: int | None = None, folder: Path | None = None
    ) -> list[float]:
        """The losses of an epoch's batches behind ``skipped``."""
        losses: list[float] = []
        self.batches.set_epoch(epoch)
        batches = self.accelerator.skip_first_batches(self.batches, skipped) if skipped else self.batches
        for number, batch in enumerate(batches, skipped + 1):
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch).loss
                self.accelerator.backward(loss)
                self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            losses.append(float(self.accelerator.reduce(loss.detach().float(), "mean")))
            if number == saved_after:
                self.accelerator.save_state(str(folder))
        return losses


def accelerated(mixed_precision: str) -> Accelerator:
    """Of this process, on the CPU."""
    options: Any = {"cpu": True, "mixed_precision": mixed_precision, "gradient_accumulation_steps": ACCUMULATED}
    # Its order depends on the epoch alone.
    order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=3)
    return Accelerator(dataloader_config=order, **options)


def resumed(mixed_precision: str, folder: Path) -> dict[str, list[float]]:
    """The losses of a second epoch's end, of a run that goes on and of one that was resumed in its middle."""
    set_seed(1)
    accelerator = accelerated(mixed_precision)
    # Whole steps: what they have accumulated of gradients is not saved.
    half = TEXTS // BATCH // accelerator.num_processes // 2
    run = Run(accelerator)
    run.epoch(0)
    went_on = run.epoch(1, saved_after=half, folder=folder / "state")
    set_seed(2)
    accelerator = accelerated(mixed_precision)
    run = Run(accelerator)
    accelerator.load_state(str(folder / "state"))
    return {"went_on": went_on[half:], "resumed": run.epoch(1, skipped=half)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = resumed(sys.argv[2], Path(sys.argv[1]))
    if Accelerator().is_main_process:
        Path(sys.argv[1], "found.json").write_text(json.dumps(found))
