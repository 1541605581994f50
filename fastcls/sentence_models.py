"""sentence-transformers' models with a fast model inside."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal, NoReturn

from torch import nn
from transformers import PreTrainedModel

from .model import FastModel

# What the library has of them depends on its version.
_CLASSES = ("CrossEncoder", "SentenceTransformer", "SparseEncoder")


def is_sentence_model(model: object) -> bool:
    """Whether a model is one of sentence-transformers', which is not imported for it."""
    library = sys.modules.get("sentence_transformers")
    return isinstance(model, tuple(getattr(library, name) for name in _CLASSES if hasattr(library, name)))


def optimize_sentence_model(
    model: Any, optimize: Callable[..., FastModel], select: Literal["all", "first"] | None
) -> Any:
    """A copy of sentence-transformers' model that computes with fast models, and shares all weights with the given one.

    Args:
        model: what `is_sentence_model`.
        optimize: what makes a transformers model fast, with ``select="first"`` one of which [CLS] alone is read.
        select: "all" computes every token's embedding even where [CLS] alone is pooled; None computes what is pooled.

    Raises:
        TypeError: there is no transformers model in it, or not of a supported class.
        ValueError: an option that this model cannot have.
    """
    inner = dict.fromkeys(_transformers_models(model))
    if not inner:
        raise TypeError(
            f"model must hold a transformers model, computed by torch, got a {type(model).__name__} with none: "
            f"{', '.join(type(module).__name__ for module in model.modules())}"
        )
    if getattr(model, "keep_in_fp32_modules", None):
        raise ValueError(
            f"model.keep_in_fp32_modules must be empty, got {model.keep_in_fp32_modules}: "
            "fastcls computes all of a model in one dtype"
        )
    pools_first = _pools_first(model)
    if select == "first" and not pools_first:
        raise ValueError(
            "select must be 'all' or left out for a model that pools more than the first token of right-padded texts, "
            "got 'first'"
        )
    only_first = pools_first and select != "all"
    chosen = {"select": "first"} if only_first else {}
    # What a deep copy finds here stands in the copy: the fast models, and the weights of all other modules.
    memo: dict[int, Any] = {id(each): optimize(each, **chosen) for each in inner}
    for parameter in model.parameters():
        # A parameter of its own over the same memory: moving or converting the copy leaves the given one as it is.
        memo[id(parameter)] = nn.Parameter(parameter.data, parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    card = getattr(model, "model_card_data", None)
    for name in ("trainer", "code_carbon_callback"):
        if getattr(card, name, None) is not None:
            memo[id(getattr(card, name))] = getattr(card, name)
    fast = copy.deepcopy(model, memo)
    for module in fast.modules():
        if getattr(module, "can_flatten_inputs", False):
            # Padding is removed anyway, and texts that were joined for flash-attention could not be told apart.
            module.unpad_inputs = False
    if only_first:
        list(fast.children())[1].register_forward_hook(_say_what_is_missing)
    return fast


def check_computes_nothing_else(model: nn.Module) -> None:
    """Checks that the transformers models in it are all that has weights, so that their bits are its own.

    Raises:
        ValueError: another module has some.
    """
    inside = {id(weight) for inner in _transformers_models(model) for weight in inner.parameters()}
    for name, module in model.named_modules():
        if any(id(weight) not in inside for weight in module.parameters(recurse=False)):
            raise ValueError(
                f"batch_invariant must be left off for this model: its {type(module).__name__} {name} is computed by a "
                "library that chooses by the number of rows"
            )


def _transformers_models(module: nn.Module) -> Iterator[PreTrainedModel]:
    for child in module.children():
        if isinstance(child, PreTrainedModel):
            yield child
        else:
            yield from _transformers_models(child)


def _pools_first(model: Any) -> bool:
    """Whether nothing is read of a text but its first token."""
    modules = list(model.children())
    if len(modules) < 2 or type(modules[1]).__name__ != "Pooling":
        return False
    transformer, pooling = modules[:2]
    if not isinstance(getattr(transformer, "auto_model", None), PreTrainedModel):
        return False
    # Before 5.4 each mode was an attribute.
    mode = pooling.pooling_mode if hasattr(pooling, "pooling_mode") else pooling.get_pooling_mode_str()
    tokenizer = transformer.tokenizer
    return mode == "cls" and pooling.include_prompt and getattr(tokenizer, "padding_side", None) == "right"


class _NotComputed:
    def __getitem__(self, _: object) -> NoReturn:
        raise ValueError(
            "token embeddings were not computed, since this model pools [CLS] alone: "
            'fastcls.optimize(model, select="all") computes them, too'
        )

    def __iter__(self) -> Iterator[Any]:
        return self[0]


def _say_what_is_missing(_module: nn.Module, _args: object, features: dict[str, Any]) -> None:
    features["token_embeddings"] = _NotComputed()
