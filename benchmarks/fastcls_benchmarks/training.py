"""Steps of fine-tuning: a forward pass, a backward pass, and fused AdamW over all parameters.

Before a way of training is timed, its loss and its gradients are compared with those of the transformers model in
float64 on the CPU, without dropout on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification

import fastcls

from .packed_torch import Packed, PackedTorchBert
from .provider import Loaded, Model, Provider
from .providers import COMPILED, EAGER, FASTCLS, PACKED, PACKED_COMPILED, SDPA
from .verify import Verdict
from .workloads import (
    MASK_ID,
    SEED,
    Batch,
    ModelInputs,
    Workload,
    build_model,
    class_of,
    config_of,
    data,
    fills_masks,
)

# Times the baseline's error: oneDNN adds the products of float32 up in longer chains than MKL.
ALLOWED = 2.0
# In the dtype's smallest steps, the least that a loss may be off: the baseline's may be float64's by chance.
_STEPS_OF_LOSS = 4
# Too small to change what a step computes.
_LEARNING_RATE = 1e-6
_CPU = torch.device("cpu")


@dataclass
class Way:
    """One way of training, over weights of its own; a call is a step.

    Attributes:
        module: what holds the parameters.
        loss: from a batch with labels, which lies on the CPU.
    """

    module: nn.Module
    loss: Callable[[Batch], Tensor]

    def __post_init__(self) -> None:
        self._optimizer = torch.optim.AdamW(self.module.parameters(), lr=_LEARNING_RATE, fused=True)

    # Timing runs in inference mode.
    @torch.inference_mode(False)
    def __call__(self, batch: Batch) -> Tensor:
        loss = self.loss(batch)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()

    def gradients(self, batch: Batch) -> tuple[float, dict[str, Tensor]]:
        """The loss, and the gradients by the transformers model's names, in float64 on the CPU."""
        loss = self.loss(batch)
        loss.backward()
        found: dict[str, Tensor] = {}
        for name, weight in self.module.named_parameters():
            if weight.grad is not None:
                names = _names_of(name)
                found |= zip(names, weight.grad.double().cpu().chunk(len(names)), strict=True)
        self._optimizer.zero_grad()
        return loss.item(), found

    def step_bytes(self, batch: Batch) -> int:
        """What a forward pass keeps for its backward pass; on a GPU the most that a step allocates."""
        device = next(self.module.parameters()).device
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            self(batch)
            return torch.cuda.max_memory_allocated(device) - before
        return sum(each.untyped_storage().nbytes() for each in kept_tensors(self.module, lambda: self.loss(batch)))


def kept_tensors(module: Any, forward: Callable[[], object]) -> list[Tensor]:
    """What a module's forward pass keeps for its backward pass: a tensor of each piece of memory but the weights'."""
    weights = [*module.parameters(), *(weight for _, weight in getattr(module, "weights", tuple)())]
    memory = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in memory:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return list(kept.values())


def _names_of(name: str) -> list[str]:
    """The transformers model's names of a parameter, of which `PackedTorchBert` makes one of three."""
    if name.startswith("fused."):
        _, layer, kind = name.split(".")
        return [f"bert.encoder.layer.{layer}.attention.self.{part}.{kind}" for part in ("query", "key", "value")]
    return [name.removeprefix("model.")]


class Exact:
    """The loss and the gradients of one of `MODELS` without dropout, in float64, from weights of a dtype.

    The first way that is checked is the baseline. The gradients of the others may be `Provider.bound` times as far
    away, in the norm over all parameters, and so may their losses.
    """

    def __init__(self, name: str, dtype: torch.dtype, batch: Batch) -> None:
        self.batch = batch
        exact = _transformers(build_model(name, _CPU, dtype, **without_dropout(name)).double().train())
        self.loss, self.gradients = exact.gradients(batch)
        self._baseline: tuple[float, float] | None = None
        self._least = _STEPS_OF_LOSS * torch.finfo(dtype).eps * abs(self.loss)

    def check(self, provider: Provider, way: Way) -> Verdict:
        """Its ``difference`` is that of the gradients, as a part of their norm."""
        loss, gradients = way.gradients(self.batch)
        none = torch.zeros((), dtype=torch.float64)
        # A gradient that one of the two lacks is zero.
        pairs = [(gradients.get(key, none), self.gradients.get(key, none)) for key in {*gradients, *self.gradients}]
        squares = [float((ours - exact).square().sum()) for ours, exact in pairs]
        difference = math.sqrt(sum(squares) / sum(float(exact.square().sum()) for _, exact in pairs))
        off = abs(loss - self.loss)
        if not math.isfinite(difference + off):
            return Verdict(False, None, "the loss or the gradients are not finite")
        if self._baseline is None:
            self._baseline = max(off, self._least), difference
        most, farthest = (provider.bound * each for each in self._baseline)
        if off > most:
            return Verdict(False, difference, f"the loss is off by {off:.1e}, more than {most:.1e}")
        reason = f"gradients differ by {difference:.1e} of their norm, more than {farthest:.1e}"
        return Verdict(difference <= farthest, difference, reason if difference > farthest else "")


def without_dropout(name: str) -> dict[str, Any]:
    """The options of one of `MODELS`' configs for no dropout."""
    rates = config_of(name).to_dict().items()
    return {key: 0.0 for key, rate in rates if "dropout" in key and type(rate) in (int, float)}


def batches(name: str, workload: Workload, count: int) -> list[Batch]:
    """A workload's batches for one of `MODELS`, with random labels."""
    model_class, config = class_of(name), cast(Any, config_of(name))
    generator = torch.Generator().manual_seed(SEED)

    def labels(batch: Batch) -> Tensor:
        ids = batch["input_ids"]
        if fills_masks(model_class):
            return torch.randint(config.vocab_size, ids.shape, generator=generator).where(ids == MASK_ID, -100)
        if config.num_labels == 1:
            return torch.rand(len(ids), generator=generator)
        return torch.randint(config.num_labels, (len(ids),), generator=generator)

    return [{**each, "labels": labels(each)} for each in workload.batches(count, ModelInputs.of(model_class, config))]


def _transformers(model: Model, attention: str | None = None, compiled: bool = False) -> Way:
    if attention is not None:
        model.set_attn_implementation(attention)
    run: Any = torch.compile(model, dynamic=True) if compiled else model
    return Way(model, lambda batch: run(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss)


def _packed(model: Model, compiled: bool = False) -> Way:
    packed = PackedTorchBert(cast(BertForSequenceClassification, model)).requires_grad_()
    run: Any = torch.compile(packed, dynamic=True) if compiled else packed

    def loss(batch: Batch) -> Tensor:
        logits, labels = run(Packed.of(batch, model.device, packed.varlen)), batch["labels"].to(model.device)
        if labels.is_floating_point():
            return nn.functional.mse_loss(logits.squeeze(1), labels)
        return nn.functional.cross_entropy(logits, labels)

    return Way(packed, loss)


def _fastcls(model: Model) -> Way:
    fast: Any = fastcls.optimize(model).train()
    return Way(fast, lambda batch: fast(**batch).loss)


def _trained(like: Provider, way: Callable[[Model], Way]) -> Provider:
    """A provider whose ``forward`` is a `Way`, over the given model's own weights."""
    described = data("providers.toml")["training"][like.name]
    return replace(like, load=lambda model: Loaded(way(model.train())), bound=ALLOWED, **described)


# By the names of the providers of logits that compute alike.
TRAINING_PROVIDERS = {
    like.name: _trained(like, way)
    for like, way in (
        (EAGER, partial(_transformers, attention="eager")),
        (SDPA, partial(_transformers, attention="sdpa")),
        (COMPILED, partial(_transformers, compiled=True)),
        (PACKED, _packed),
        (PACKED_COMPILED, partial(_packed, compiled=True)),
        (FASTCLS, _fastcls),
    )
}
