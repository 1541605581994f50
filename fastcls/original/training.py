"""The model whose parameters are trained: the given one, or where that is gone one over the same weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastcls_kernels.training.derivatives import first_only

from ..engine.training import LowRank
from ..engine.weights import gathers, has_others_hooks
from ..families.family import WeightMap, head_in
from .adapters import low_rank_layers, named_modules, named_parameters
from .following import Original

# Tasks whose heads no pre-trained checkpoint has.
_NEW_HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")


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
        self._look()

    def _look(self) -> None:
        """Notes the modules, and the rates at which they drop out."""
        self._changes = self.original.standing.changes
        self._hooked = [(name, module) for name, module in self.model.named_modules() if name]
        self._hooks = [
            hooks for _, module in self._hooked for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._states = [vars(module) for _, module in self._hooked]
        self._modules = [(name, module, _rate_of(module)) for name, module in named_modules(self.model)]
        self._padding_ids = self._find_padding_ids()
        self._warn_of_heads()

    def _look_again(self) -> None:
        self.original.find_again()
        if self.original.standing.changes != self._changes:
            self._look()

    def _warn_of_heads(self) -> None:
        """Says which layers of the head stay as they are beside adapters that are trained: PEFT saves none of them."""
        if head_in(type(self.model).__name__) not in _NEW_HEADS:
            return
        if not any(each.up.requires_grad for several in self.original.standing.added().values() for each in several):
            return
        prefix = f"{self.model.base_model_prefix}."
        adapted = {f"{path}.weight" for path in low_rank_layers(self.model)}
        weights = named_parameters(self.model)
        heads = {
            name.rpartition(".")[0]: None
            for own, names in self.weight_map.sources.items()
            for name in names
            if own.startswith("head.") and not name.startswith(prefix) and name not in adapted
            if not weights[name].requires_grad
        }
        if heads:
            found = ", ".join(f'"{name}"' for name in heads)
            warnings.warn(
                f"layers of the head are not trained, and PEFT does not save them: {found}. Unless they were trained "
                f"before, name them in LoraConfig(modules_to_save=[{found}])",
                UserWarning,
                stacklevel=2,
            )

    def adapters(self, ours: Mapping[str, Tensor]) -> dict[str, list[LowRank]]:
        """What adapters add to the products of our weights, by our names, with a graph.

        Args:
            ours: a fast model's own.
        """
        found: dict[str, list[LowRank]] = {}
        added = self.original.standing.added()
        for own, names in self.weight_map.sources.items():
            for index, name in enumerate(names):
                for each in added.get(name, ()):
                    up, first = self.weight_map.spread(own, index, each.up, len(ours[own]))
                    up = up if each.scale == 1 else up * each.scale
                    found.setdefault(own, []).append(LowRank(each.down, up, first, each.rate))
        return found

    def weights(self, ours: Mapping[str, Tensor], instead: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """The weights by our names, with a graph where they are joined of several.

        Args:
            ours: a fast model's own, which are up to the model's.
            instead: for ids of parameters tensors of the same numbers, which the graph leads to instead.
        """
        found = {}
        for own, tensors in self.original.tensors().items():
            parts = [instead.get(id(tensor), tensor) for tensor in tensors]
            is_one = own in self.weight_map.buffers or self.weight_map.is_one(own)
            found[own] = parts[0].contiguous() if is_one else _Joined.apply(ours[own], self.weight_map, own, *parts)
        return found

    @property
    def padding_ids(self) -> dict[str, int]:
        """For our names of tables the row whose gradient stays zero, as ``padding_idx`` of their modules says."""
        return self._padding_ids

    def _find_padding_ids(self) -> dict[str, int]:
        found, modules = {}, {name: module for name, module, _ in self._modules}
        for own, names in self.weight_map.sources.items():
            module = modules[names[0].rpartition(".")[0]]
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                found[own] = module.padding_idx
        return found

    def check(self) -> None:
        """Refuses what a pass would pass by.

        Raises:
            RuntimeError: a module has hooks, or another ``forward``.
        """
        self._look_again()
        for name, module in self._hooked:
            if has_others_hooks(module) or module._backward_hooks or module._backward_pre_hooks:
                raise RuntimeError(
                    f"model.{name} must have no hooks, and no other forward, in training, where they would not run: "
                    "remove them, or train the transformers model"
                )

    def check_unhooked(self) -> None:
        """Refuses what no call in eval mode would run: it computes by modules of its own.

        Raises:
            RuntimeError: a module below the model has forward hooks, or another ``forward``.
        """
        self._look_again()
        if not any(self._hooks) and not any("forward" in state for state in self._states):
            return
        for name, module in self._hooked:
            if has_others_hooks(module):
                raise RuntimeError(
                    f"model.{name} must have no forward hooks, and no other forward, which would not run: a fast model "
                    "calls none of the modules that it shows. Attributions to embeddings are those to inputs_embeds, "
                    "which get_input_embeddings() gives"
                )

    @property
    def is_spread_by_parts(self) -> bool:
        """Whether `fully_shard` was called on modules below the model."""
        return any(self._hooks) and any(gathers(module) for _, module in self._hooked)

    def gather(self) -> Callable[[Tensor], Tensor]:
        """Has weights whole, for a pass and its gradients, that `fully_shard` has spread by parts of the model.

        FSDP does so before the call of each part, and lets go behind it. Here all begin at once, as if each part were
        called inside the one before, and end at once.

        Returns:
            What ends the calls: it takes the rows that were computed, whose gradients gather the weights again, and
            gives these rows. It raises RuntimeError where FSDP would give them in another dtype.
        """
        parts = [module for _, module in self._hooked if gathers(module)]
        for module in parts:
            for begins in list(module._forward_pre_hooks.values()):
                begins(module, (), {})

        def leave(rows: Tensor) -> Tensor:
            dtype = rows.dtype
            for module in reversed(parts):
                for ends in list(module._forward_hooks.values()):
                    rows = ends(module, (), rows)
            if rows.dtype != dtype:
                raise RuntimeError(
                    f"mp_policy.output_dtype of fully_shard must be None on parts of a model, got {rows.dtype}: they "
                    "have no outputs of their own here"
                )
            return rows

        return leave

    def check_pass(self, device: torch.device, dtype: torch.dtype, *, drops: bool) -> None:
        """Refuses a model that was changed since `FastModel.train` in what a pass would pass by.

        Args:
            device, dtype: the fast model's.
            drops: whether it drops out anywhere.

        Raises:
            RuntimeError: the model lies elsewhere, or one of its modules has another mode or rate of dropout.
        """
        like = next(self.model.parameters())
        if (like.device, like.dtype) != (device, dtype):
            raise RuntimeError(
                f"the model that is trained must be {dtype} on {device} like the fast one, got {like.dtype} on "
                f"{like.device}: move the fast one, which shows its modules, and not that"
            )
        if not drops:
            return
        for name, module, rate in self._modules:
            if not module.training or _rate_of(module) != rate:
                found = "eval mode" if not module.training else f"p = {_rate_of(module)}"
                raise RuntimeError(
                    f"model.{name} must be in training mode, with the config's dropout, got {found}: fast.train() sets "
                    "the mode of all modules, and the config's options the rates, before the model is made"
                )


def _rate_of(module: nn.Module) -> float | None:
    """The rate of a module of dropout, None of others."""
    return getattr(module, "p", None) if "Dropout" in type(module).__name__ else None


def check_rates(model: PreTrainedModel) -> None:
    """Checks that a model's modules drop out as its config says, whose rates count.

    Raises:
        RuntimeError: one has another rate.
    """
    with torch.device("meta"):
        built = type(model)(model.config)
    expected = dict(built.named_modules())
    for name, module in named_modules(model):
        rate, wanted = _rate_of(module), getattr(expected.get(name), "p", None)
        if rate is not None and rate != wanted:
            raise RuntimeError(
                f"model.{name}.p must be {wanted}, as the config says, to be trained, got {rate}: set the config's "
                "option, and make the model of it"
            )


def model_over(
    model_class: type[PreTrainedModel],
    config: Any,
    weights: Mapping[str, Tensor],
    weight_map: WeightMap,
    frozen: Collection[str],
) -> PreTrainedModel:
    """A transformers model whose parameters are views of ours, for those that hold the given one no longer.

    It has no buffers, and so cannot be called itself.

    Args:
        model_class, config: the given model's.
        weights: ours, by our names.
        weight_map: where each of them comes from.
        frozen: the parameters that ask for no gradients, by the model's names.
    """
    with torch.device("meta"):
        model = model_class(config)
    made = {
        # What is joined has memory of its own: ours is written anew from it.
        name: nn.Parameter(part.detach() if weight_map.is_one(own) else part.clone(), requires_grad=name not in frozen)
        for own, names in weight_map.sources.items()
        for name, part in zip(names, weight_map.parts(own, weights[own].detach()), strict=True)
    }
    made |= {alias: made[name] for alias, name in weight_map.aliases.items()}
    for name, other in _ties(model):
        # Where the config ties them, and they are one: two parameters over one memory would both be stepped.
        if name in made and other in made and torch.equal(made[name], made[other]):
            made[other] = made[name]
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


def _ties(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Pairs of names of one parameter, the first name with each other one."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            yield first[id(parameter)], name


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
