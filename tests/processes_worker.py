"""Trains a tiny classifier in two processes, each on its half of every batch, and prints losses and weights as JSON.

    python tests/processes_worker.py '{"wrapper": "ddp"}' '{"wrapper": "ddp", "accumulated": 2}'

Each argument is a case of `Way`. The processes are forked for each of them, by a parent that has imported all and
started no threads.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import socket
import sys
import traceback
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from support import tiny_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastcls

PROCESSES = 2
LENGTHS = (9, 1, 6, 14, 3, 17, 2, 8)


class Way(NamedTuple):
    """How a model is trained.

    Attributes:
        wrapper: what spreads it over the processes.
        model_class, family: of transformers.
        accumulated: the batches of a step.
        frozen: the module that is not trained.
        steps: how many.
    """

    wrapper: str = "none"
    model_class: str = "BertForSequenceClassification"
    family: str = "bert"
    accumulated: int = 1
    frozen: str = ""
    steps: int = 50


def batch_of(step: int, model_class: str) -> dict[str, Tensor]:
    """A padded batch with labels."""
    generator = torch.Generator().manual_seed(step)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(5, 60, mask.shape, generator=generator).where(mask == 1, 1)
    if "MaskedLM" in model_class:
        # As many in each half.
        labels = ids.where(torch.arange(ids.shape[1]) == 0, -100)
    else:
        labels = torch.randint(0, 3, (len(LENGTHS),), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def prepared(way: Way) -> Any:
    """The fast model that is trained, without dropout."""
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    quiet = dict.fromkeys(rates, 0.0) if way.family == "bert" else {}
    fast = fastcls.optimize(tiny_model(way.model_class, way.family, **quiet)).train()
    if way.frozen:
        fast.get_submodule(way.frozen).requires_grad_(False)
    return fast


def train(model: nn.Module, way: Way, rank: int = 0, processes: int = 1) -> list[float]:
    """The losses of steps on each process's part of the batches, their mean over the processes."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    losses = []
    for step in range(way.steps):
        total = torch.zeros(())
        for part in range(way.accumulated):
            batch = batch_of(step * way.accumulated + part, way.model_class)
            waits = isinstance(model, DistributedDataParallel) and part + 1 < way.accumulated
            with model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                loss = model(**{name: tensor[rank::processes] for name, tensor in batch.items()}).loss / way.accumulated
                loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        if processes > 1:
            dist.all_reduce(total)
        losses.append(float(total) / processes)
    return losses


def trained(way: Way, rank: int) -> dict[str, Any]:
    """What one of the processes finds."""
    fast = prepared(way)
    keys = list(fast.state_dict())
    model = DistributedDataParallel(fast)
    losses = train(model, way, rank, PROCESSES)
    weights = torch.cat([weight.detach().flatten() for weight in fast.parameters()])
    both = [torch.empty_like(weights) for _ in range(PROCESSES)]
    dist.all_gather(both, weights)
    wrapped = {name.removeprefix("module."): tensor for name, tensor in model.state_dict().items()}
    fresh = prepared(way)
    fresh.load_state_dict(wrapped)
    batch = {name: tensor for name, tensor in batch_of(0, way.model_class).items() if name != "labels"}
    return {
        "losses": losses,
        "are_equal": torch.equal(*both),
        "has_keys": keys == list(wrapped),
        "is_loaded": torch.equal(fresh.eval()(**batch).logits, fast.eval()(**batch).logits),
    }


def _run(rank: int, port: int, way: Way, results: Any) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=PROCESSES)
    try:
        found = trained(way, rank)
    except Exception:
        found = {"error": traceback.format_exc()}
    results.put((rank, found))
    # The other one may wait for a process that has failed.
    if "error" not in found:
        dist.destroy_process_group()


def in_processes(way: Way, seconds: float = 120) -> dict[str, Any]:
    """What the first of two processes finds, or the error of either."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    processes = [context.Process(target=_run, args=(rank, port, way, results)) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    found: dict[int, dict[str, Any]] = {}
    while len(found) < PROCESSES and not any("error" in each for each in found.values()):
        rank, one = results.get(timeout=seconds)
        found[rank] = one
    for process in processes:
        process.join(10)
        process.kill()
    return next((each for each in found.values() if "error" in each), found.get(0, {}))


if __name__ == "__main__":
    # Without threads, which no forked process would have.
    torch.set_num_threads(1)
    for given in sys.argv[1:]:
        # Modules that are imported late are imported once.
        prepared(Way(**json.loads(given)))
    json.dump({given: in_processes(Way(**json.loads(given))) for given in sys.argv[1:]}, sys.stdout)
