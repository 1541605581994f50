"""sentence-transformers' models, with a fast model inside."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from ..engine.weights import has_hooks
from ..models import FastEncoder
from ..models.base import FastModel
from ..original.companion import Companion, weights_around
from ..original.own_code import folder_of, stranger_in

# An older version of the library may lack some of them.
_CLASSES = ("CrossEncoder", "SentenceTransformer", "SparseEncoder")
# The library's modules that may follow a pooling and read no token embeddings.
_AFTER_POOLING = ("Dense", "Dropout", "LayerNorm", "Normalize", "SparseAutoEncoder")
# The library's modules that read the values at padding, where fast models give zeros.
_READ_PADDING = ("CNN", "MultiVectorMask")


def is_sentence_model(model: object) -> bool:
    """Whether a model is one of sentence-transformers'. The library is not imported to find out."""
    library = sys.modules.get("sentence_transformers")
    return isinstance(model, tuple(getattr(library, name) for name in _CLASSES if hasattr(library, name)))


def optimize_sentence_model(
    model: Any, optimize: Callable[..., FastModel], select: Literal["all", "first"] | None
) -> Any:
    """A copy of a model of sentence-transformers that computes with fast models.

    Args:
        model: a model for which `is_sentence_model` is true.
        optimize: makes a transformers model fast.
        select: "all" computes every token's embedding even if [CLS] alone is pooled; None computes what is pooled.

    The fast models share what ``optimize`` shares. All else is the copy's own, as `copy.deepcopy` makes it: settings,
    configs, tokenizers, and all other modules' weights, hooks and patched forwards, which run in the copy, too. These
    weights follow the given model's, as the fast models' weights do. The copy is in evaluation mode; from its ``train``
    on it has the given model's own parameters, which are trained, in all its modules.

    Each call looks at the pooling, so that a pooling that is changed later is followed.

    Raises:
        TypeError: it holds no transformers model, or one of a class that is not supported.
        ValueError: an option that this model cannot have, or a module that reads the values at padding.
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
    _check_reads_no_padding(model)
    if select == "first" and ("forward" in vars(model) or not _pools_first(model, PreTrainedModel)):
        raise ValueError(
            "select must be 'all' or left out for a model that pools more than the first token of right-padded texts, "
            "got 'first'"
        )
    # The deep copy takes these objects over instead of copying them.
    memo: dict[int, Any] = {}
    for each in inner:
        fast_inner = optimize(each)
        # A copy, since the library writes its own settings into it.
        fast_inner.config = copy.deepcopy(each.config, memo)
        memo[id(each)] = fast_inner
    card = getattr(model, "model_card_data", None)
    for name in ("trainer", "code_carbon_callback"):
        if getattr(card, name, None) is not None:
            memo[id(getattr(card, name))] = getattr(card, name)
    # Tensors made in inference mode cannot be written to outside of it.
    with torch.inference_mode(False):
        fast = copy.deepcopy(model, memo).eval()
    for module in fast.modules():
        _adapt(module)
    if "forward" not in vars(fast):
        fast.forward = _Forward(fast, may_select=select != "all")
    fast_models = [module for module in fast.modules() if isinstance(module, FastModel)]
    if all(one.follows for one in fast_models) and (names := weights_around(model, inner)):
        companion = Companion(model, fast, names, stop=partial(_stop_following, fast_models))
        for one in fast_models:
            one.follow_along(companion)
    return fast


def check_computes_nothing_else(model: nn.Module) -> None:
    """Checks that only the transformers models in a model have weights, so that its bits are theirs.

    Raises:
        ValueError: another module has weights.
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
        elif not isinstance(child, FastModel):
            # In training a fast model shows the modules of the one that it was made of.
            yield from _transformers_models(child)


def _is_librarys_own(module: nn.Module, *names: str) -> bool:
    return type(module).__name__ in names and type(module).__module__.startswith("sentence_transformers.")


def _is_plain(module: nn.Module, *names: str) -> bool:
    """Whether a module is the library's own, without hooks and with the library's own ``forward``."""
    if not _is_librarys_own(module, *names) or has_hooks(module):
        return False
    folder = folder_of(sys.modules["sentence_transformers"])
    return stranger_in(type(module).forward, (folder,)) is None


def _adapt(module: Any) -> None:
    """Lets a module of the copy call a fast model, and ask it only for the outputs that are read."""
    if getattr(module, "can_flatten_inputs", False):
        # Padding is removed anyway, and texts joined for flash-attention could not be told apart.
        module.can_flatten_inputs = False
    if not _is_librarys_own(module, "Transformer"):
        return
    if module.model_forward_params is not None:
        # The library hands on only these arguments.
        module.model_forward_params = {*module.model_forward_params, "select"}
    if isinstance(module.auto_model, FastEncoder):
        # Before 5.4 the library always read last_hidden_state.
        read = [each["method_output_name"] or () for each in getattr(module, "modality_config", {}).values()]
        module.auto_model.gives_pooler_output = any("last_hidden_state" not in names for names in read)


def _pools_first(model: Any, kind: type[nn.Module]) -> bool:
    """Whether a model around a transformers model of ``kind`` reads only the first token of each text."""
    modules = list(model.children())
    if len(modules) < 2 or not type(model).forward.__module__.startswith("sentence_transformers."):
        return False
    transformer, pooling, *rest = modules
    if not (_is_plain(transformer, "Transformer") and _is_plain(pooling, "Pooling")):
        return False
    inner = transformer.auto_model
    if not isinstance(inner, kind) or has_hooks(inner):
        return False
    for module in rest:
        names = (getattr(module, f"module_{which}_name", None) for which in ("input", "output"))
        if not _is_plain(module, *_AFTER_POOLING) or "token_embeddings" in names:
            return False
    # Before 5.4 each mode was an attribute.
    mode = pooling.pooling_mode if hasattr(pooling, "pooling_mode") else pooling.get_pooling_mode_str()
    padding_side = getattr(transformer.tokenizer, "padding_side", None)
    return mode == "cls" and pooling.include_prompt and padding_side == "right"


def _check_reads_no_padding(model: nn.Module) -> None:
    """Checks that no module reads the values at padding.

    Raises:
        ValueError: one does.
    """
    for module in model.modules():
        if _is_librarys_own(module, *_READ_PADDING):
            raise ValueError(
                f"the modules must leave out {type(module).__name__}, which reads what a model computes at padding: "
                "fastcls computes nothing there"
            )


def _stop_following(models: list[FastModel]) -> None:
    for each in models:
        each.stop_following()


class _Forward:
    """A model's forward pass, which computes only first tokens while nothing else is read.

    Args:
        model: each call looks at its modules, since they may change at any time.
        may_select: False always computes every token.
    """

    def __init__(self, model: nn.Module, may_select: bool) -> None:
        self.model = model
        self.may_select = may_select

    # The argument's name is the library's.
    def __call__(self, input: dict[str, Any], **kwargs: Any) -> dict[str, Any]:  # noqa: A002
        _check_reads_no_padding(self.model)
        compute = partial(type(self.model).forward, self.model)
        if not (self.may_select and _pools_first(self.model, FastEncoder)):
            return compute(input, **kwargs)
        # The library hands this on to the model.
        input["select"] = "first"
        try:
            out = compute(input, **kwargs)
        finally:
            input.pop("select", None)
        out.pop("select", None)
        out["token_embeddings"] = _NotComputed()
        return out


class _NotComputed:
    """Stands in for token embeddings: reading it raises an error that says why they are not there."""

    _MESSAGE = (
        "token embeddings were not computed, since this model pools [CLS] alone: "
        'fastcls.optimize(model, select="all") computes them, too'
    )

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise ValueError(self._MESSAGE)

    # `__array__`, too: numpy would make an array that holds it as an object.
    __getitem__ = __iter__ = __len__ = __array__ = _refuse

    def __getattr__(self, name: str) -> NoReturn:
        # An AttributeError, so that code that checks for a tensor's attributes finds none.
        raise AttributeError(name if name.startswith("__") else self._MESSAGE)
