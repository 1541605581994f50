"""Trains a tiny classifier in two processes, each on its half of every batch, and prints what they find as JSON.

    python tests/processes_worker.py '{"wrapper": "ddp"}' '{"wrapper": "ddp", "accumulated": 2}'

Each argument is a case of `Way`. The processes are forked for each of them, by a parent that has imported all and
started no threads.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import socket
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from support import tiny_model
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastcls

PROCESSES = 2
LENGTHS = (9, 1, 6, 14, 3, 17, 2, 8)


class Way(NamedTuple):
    """How a model is trained.

    Attributes:
        wrapper: what spreads it over the processes: "ddp", "fsdp", "accelerate" by that library's way to FSDP2 (and
            "accelerate_meta" with weights that are away meanwhile); "refused" for what fully_shard is refused.
        model_class, family: of transformers.
        accumulated: the batches of a step.
        frozen: the module that is not trained.
        parts: names of modules that are spread before the whole, or lists of names of those that are one group; of
            accelerate names of classes.
        steps: how many.
        adapted: whether PEFT's adapters alone are trained.
        device: where; each process has a GPU of its own.
        evaluated: after each of how many steps the loss of eval mode is taken, too; 0 for none.
    """

    wrapper: str = "none"
    model_class: str = "BertForSequenceClassification"
    family: str = "bert"
    accumulated: int = 1
    frozen: str = ""
    parts: Sequence[str | Sequence[str]] = ()
    steps: int = 50
    evaluated: int = 0
    adapted: bool = False
    device: str = "cpu"


def batch_of(step: int, model_class: str, device: str = "cpu") -> dict[str, Tensor]:
    """A padded batch with labels."""
    generator = torch.Generator().manual_seed(step)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(5, 60, mask.shape, generator=generator).where(mask == 1, 1)
    if "MaskedLM" in model_class:
        # As many in each half.
        labels = ids.where(torch.arange(ids.shape[1]) == 0, -100)
    else:
        labels = torch.randint(0, 3, (len(LENGTHS),), generator=generator)
    found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in found.items()}


def prepared(way: Way) -> Any:
    """The fast model that is trained, without dropout."""
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    quiet = dict.fromkeys(rates, 0.0) if way.family == "bert" else {}
    model: Any = tiny_model(way.model_class, way.family, **quiet).to(way.device)
    if way.adapted:
        peft: Any = importlib.import_module("peft")
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=3, init_lora_weights=False))
    fast: Any = fastcls.optimize(model).train()
    if way.frozen:
        fast.get_submodule(way.frozen).requires_grad_(False)
    return fast


def train(model: Any, way: Way, rank: int = 0, processes: int = 1) -> list[float]:
    """The losses of steps on each process's part of the batches, their mean over the processes."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    losses = []

    def loss_of(number: int) -> Tensor:
        batch = batch_of(number, way.model_class, way.device)
        loss: Tensor = model(**{name: tensor[rank::processes] for name, tensor in batch.items()}).loss
        return loss

    def take(loss: Tensor) -> None:
        if processes > 1:
            dist.all_reduce(loss)
        losses.append(float(loss) / processes)

    for step in range(way.steps):
        total = torch.zeros((), device=way.device)
        for part in range(way.accumulated):
            is_last = part + 1 == way.accumulated
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(is_last)
            waits = isinstance(model, DistributedDataParallel) and not is_last
            with model.no_sync() if waits else contextlib.nullcontext():
                loss = loss_of(step * way.accumulated + part) / way.accumulated
                loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        take(total)
        if way.evaluated and not step % way.evaluated:
            model.eval()
            with torch.no_grad():
                take(loss_of(step))
            model.train()
    return losses


def spread(fast: Any, parts: Sequence[str | Sequence[str]] = (), **options: Any) -> Any:
    """A fast model under fully_shard."""
    mesh = init_device_mesh(next(fast.parameters()).device.type, (PROCESSES,))
    for part in parts:
        modules = [fast.get_submodule(name) for name in ([part] if isinstance(part, str) else part)]
        fully_shard(modules[0] if len(modules) == 1 else modules, mesh=mesh, **options)
    fully_shard(fast, mesh=mesh, **options)
    return fast


def spread_by_accelerate(fast: Any, way: Way) -> Any:
    """A fast model as accelerate's `prepare` spreads it on GPUs; on a CPU that would give DistributedDataParallel."""
    accelerate: Any = importlib.import_module("accelerate")
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=list(way.parts),
        cpu_ram_efficient_loading=way.wrapper == "accelerate_meta",
    )
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = plugin
    return accelerate.utils.fsdp2_prepare_model(accelerator, fast)


def wrapped(way: Way) -> Any:
    """The model that is trained, spread over the processes."""
    fast = prepared(way)
    if way.wrapper == "ddp":
        return DistributedDataParallel(fast)
    return spread(fast, way.parts) if way.wrapper == "fsdp" else spread_by_accelerate(fast, way)


def trained(way: Way, rank: int) -> dict[str, Any]:
    """What one of the processes finds."""
    keys = list(prepared(way).state_dict())
    model = wrapped(way)
    losses = train(model, way, rank, PROCESSES)
    whole = StateDictOptions(full_state_dict=True)
    saved: dict[str, Any] = (
        {name.removeprefix("module."): weight for name, weight in model.state_dict().items()}
        if way.wrapper == "ddp"
        else get_model_state_dict(model, options=whole)
    )
    weights = torch.cat([weight.flatten() for weight in saved.values()])
    both = [torch.empty_like(weights) for _ in range(PROCESSES)]
    dist.all_gather(both, weights)
    fresh = prepared(way)
    fresh.load_state_dict(saved)
    loaded = [fresh]
    if way.wrapper != "ddp":
        loaded.append(wrapped(way))
        set_model_state_dict(loaded[1], {**saved}, options=whole)
    batch = {name: tensor for name, tensor in batch_of(0, way.model_class, way.device).items() if name != "labels"}
    expected = model.eval()(**batch).logits
    return {
        "losses": losses,
        "are_equal": torch.equal(*both),
        "has_keys": keys == list(saved),
        "is_loaded": all(torch.equal(each.eval()(**batch).logits, expected) for each in loaded),
    }


def refusals(way: Way) -> dict[str, str]:
    """What is said where fully_shard cannot be followed."""
    batch = batch_of(0, way.model_class)

    def call(fast: Any) -> None:
        fast(**batch)

    layers = [f"bert.encoder.layer.{index}" for index in range(2)]

    def parts_alone(mode: bool) -> None:
        fast = prepared(way)
        for layer in layers:
            spread(fast.get_submodule(layer))
        call(fast.train(mode))

    def hooked(mode: bool) -> None:
        fast = spread(prepared(way), layers)
        fast.get_submodule(layers[1]).register_forward_hook(lambda *_: None)
        call(fast.train(mode))

    def original() -> None:
        model = tiny_model(way.model_class, way.family)
        fast = fastcls.optimize(model).train()
        spread(model)
        call(fast)

    narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    narrow_outputs = MixedPrecisionPolicy(output_dtype=torch.bfloat16)
    tried = {
        "parts_alone": lambda: parts_alone(True),
        "parts_alone_in_eval_mode": lambda: parts_alone(False),
        "hooked": lambda: hooked(True),
        "hooked_in_eval_mode": lambda: hooked(False),
        "narrow_parts": lambda: call(spread(prepared(way), layers, mp_policy=narrow)),
        "narrow_outputs": lambda: call(spread(prepared(way), layers, mp_policy=narrow_outputs)),
        "original": original,
        "too_early": lambda: spread(fastcls.optimize(tiny_model(way.model_class, way.family))).train(),
        "narrow": lambda: call(spread(prepared(way), mp_policy=narrow)),
        "narrow_in_eval_mode": lambda: call(spread(prepared(way), mp_policy=narrow).eval()),
        "lists": lambda: spread(prepared(way)).eval().logits_of([[5]]),
        "saved": lambda: spread(prepared(way)).save_pretrained("nowhere"),
    }
    found = {}
    for name, function in tried.items():
        try:
            function()
            found[name] = "nothing was said"
        except RuntimeError as error:
            found[name] = str(error)
    return found


def _run(rank: int, port: int, way: Way, results: Any) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    if way.device == "cuda":
        torch.cuda.set_device(rank)
    backend = "gloo" if way.device == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=PROCESSES)
    try:
        found = {"refused": refusals(way)} if way.wrapper == "refused" else trained(way, rank)
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
        prepared(Way(**json.loads(given))._replace(device="cpu"))
    json.dump({given: in_processes(Way(**json.loads(given))) for given in sys.argv[1:]}, sys.stdout)
