"""The model whose parameters are trained: the given one, or where that is gone one over the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastcls_kernels.training.derivatives import first_only

from ..engine.weights import has_hooks
from ..families.family import WeightMap
from .following import Original


class Trained:
    """A model whose parameters are trained, and what is made of them for each pass.

    Args:
        model: the model.
        original: follows it.
        weight_map: where each of our weights comes from.
    """

    def __init__(self, model: PreTrainedModel, original: Original, weight_map: WeightMap) -> None:
        self.model = model
        self.original = original
        self.weight_map = weight_map

    def weights(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights by our names, with a graph where they are joined of several.

        Args:
            ours: a fast model's own, which are up to the model's.
        """
        found = {}
        for own, parts in self.original.tensors().items():
            is_one = own in self.weight_map.buffers or self.weight_map.is_one(own)
            found[own] = parts[0].contiguous() if is_one else _Joined.apply(ours[own], self.weight_map, own, *parts)
        return found

    def padding_ids(self) -> dict[str, int]:
        """For our names of tables the row whose gradient stays zero, as ``padding_idx`` of their modules says."""
        found = {}
        for own, names in self.weight_map.sources.items():
            module = self.model.get_submodule(names[0].rpartition(".")[0])
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                found[own] = module.padding_idx
        return found

    def check(self) -> None:
        """Refuses what a pass would pass by.

        Raises:
            RuntimeError: a module has hooks, or another ``forward``.
        """
        for name, module in self.model.named_modules():
            if name and has_hooks(module):
                raise RuntimeError(
                    f"model.{name} must have no forward hooks, and no other forward, in training, where they would not "
                    "run: remove them, or train the transformers model"
                )


def check_rates(model: PreTrainedModel) -> None:
    """Checks that a model's modules drop out as its config says, whose rates count.

    Raises:
        RuntimeError: one has another rate.
    """
    with torch.device("meta"):
        built = type(model)(model.config)
    expected = dict(built.named_modules())
    for name, module in model.named_modules():
        rate, wanted = getattr(module, "p", None), getattr(expected.get(name), "p", None)
        if "Dropout" in type(module).__name__ and rate != wanted:
            raise RuntimeError(
                f"model.{name}.p must be {wanted}, as the config says, to be trained, got {rate}: set the config's "
                "option, and make the model of it"
            )


def model_over(
    model_class: type[PreTrainedModel], config: Any, weights: Mapping[str, Tensor], weight_map: WeightMap
) -> PreTrainedModel:
    """A transformers model whose parameters are views of ours, for those that hold the given one no longer.

    It has no buffers, and so cannot be called itself.

    Args:
        model_class, config: the given model's.
        weights: ours, by our names.
        weight_map: where each of them comes from.
    """
    with torch.device("meta"):
        model = model_class(config)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    made = {
        name: nn.Parameter(part.detach(), requires_grad=name not in frozen)
        for own, names in weight_map.sources.items()
        for name, part in zip(names, weight_map.parts(own, weights[own].detach()), strict=True)
    }
    made |= {alias: made[name] for alias, name in weight_map.aliases.items()}
    buffers = {name: weights[own] for own, name in weight_map.buffers.items() if own in weights}
    for path, module in model.named_modules():
        for key in module._parameters:
            if module._parameters[key] is not None:
                module._parameters[key] = made[f"{path}.{key}" if path else key]
        for key in list(module._buffers):
            name = f"{path}.{key}" if path else key
            if name in buffers:
                module._buffers[key] = buffers[name]
            else:
                del module._buffers[key]
    return model


class _Joined(torch.autograd.Function):
    """Several weights as one of ours, which is a copy of them already: no other is made, or kept."""

    @staticmethod
    def forward(ctx: Any, ours: Tensor, weight_map: WeightMap, own: str, *parts: Tensor) -> Tensor:
        ctx.form = (weight_map, own, [part.shape for part in parts])
        return ours.detach()

    @staticmethod
    @first_only
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight_map, own, shapes = ctx.form
        parts = weight_map.parts(own, grad)
        return None, None, None, *(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
