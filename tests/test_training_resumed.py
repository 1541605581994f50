"""A run that was stopped in the middle of an epoch goes on as if it had not been, dropout included."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import tiny_model

import fastcls

pytest.importorskip("accelerate", reason="accelerate, by which transformers' Trainer trains, is not installed")

from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from accelerate.utils import set_seed  # type: ignore[import-untyped]
from accelerate_worker import Run, Texts, accelerated, resumed


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """accelerate keeps the precision that was asked for first in a process; and tiny products need no threads."""
    AcceleratorState._reset_state(reset_partial_state=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_trainer_resumes(tmp_path: Path) -> None:
    model = tiny_model("BertForSequenceClassification", "bert")

    def losses(folder: str, checkpoint: str | None = None) -> dict[float, float]:
        arguments = transformers.TrainingArguments(
            str(tmp_path / folder), num_train_epochs=2, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            logging_steps=1, save_steps=4, report_to="none", disable_tqdm=True, use_cpu=True, seed=1,
        )  # fmt: skip
        fast = fastcls.optimize(copy.deepcopy(model)).train()
        trainer = transformers.Trainer(model=fast, args=arguments, train_dataset=Texts())
        # Dropout of a process that has drawn other numbers before.
        torch.manual_seed(len(folder))
        trainer.train(resume_from_checkpoint=checkpoint)
        return {each["step"]: each["loss"] for each in trainer.state.log_history if "loss" in each}

    expected = losses("whole")
    # An epoch has eight steps; the history up to the checkpoint comes from it.
    assert losses("again", str(tmp_path / "whole" / "checkpoint-4")) == expected
    assert len(expected) == 16


@pytest.mark.full
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_resumes(precision: str, tmp_path: Path) -> None:
    found = resumed(precision, tmp_path)
    assert len(found["resumed"]) == 8
    assert found["resumed"] == found["went_on"]


def test_accelerate_trains_it_as_it_trains_the_model() -> None:
    found = []
    for makes_fast in (True, False):
        set_seed(1)
        run = Run(accelerated("no"), makes_fast=makes_fast, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        found.append(run.epoch(0))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_bfloat16_of_accelerate_is_autocasts() -> None:
    losses = []
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        set_seed(1)
        run = Run(accelerated(precision))
        losses.append(run.model(**next(iter(run.batches))).loss)
    assert losses[0].dtype == losses[1].dtype == torch.float32
    assert float(losses[0].detach()) != float(losses[1].detach())


# Two processes take as long to start as all else here; test_accelerate_resumes runs the same worker in one.
@pytest.mark.full
def test_two_launched_processes_resume(tmp_path: Path) -> None:
    # `accelerate launch --cpu --num_processes 2` starts one process.
    worker = Path(__file__).with_name("accelerate_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launched = subprocess.run([*command, str(tmp_path), "bf16"], env=environment, capture_output=True, text=True)
    assert launched.returncode == 0, launched.stderr
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    assert len(found["resumed"]) == 4
    assert found["resumed"] == found["went_on"]
