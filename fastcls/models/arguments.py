"""The arguments that transformers' models take: in their order, ignored where theirs ignore them, else refused."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from transformers import PreTrainedModel

# Arguments of transformers' models that change the answer. They ignore all others, and so does a fast model.
_CHANGING = frozenset(
    {
        *("encoder_hidden_states", "encoder_attention_mask", "past_key_values", "head_mask", "is_causal"),
        *("sliding_window", "softcap", "s_aux", "position_bias", "num_items_in_batch", "next_sentence_label"),
        *("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "max_seqlen", "max_length_q", "max_length_k", "indices"),
        *("task_type_ids", "sequence_id", "lang_ids"),
    }
)

# How alike two names must be for one to be a mistyped other, from 0 to 1.
_TYPING_ERROR = 0.85


@functools.lru_cache(maxsize=64)
def order_of(model_class: type[PreTrainedModel], fast_class: type[Any]) -> tuple[str, ...] | None:
    """The order in which a transformers class takes arguments without names; None where it is ours."""
    theirs, ours = (
        tuple(
            name
            for name, parameter in inspect.signature(each.forward).parameters.items()
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and name != "self"
        )
        for each in (model_class, fast_class)
    )
    return None if not theirs or theirs == ours[: len(theirs)] or ours == theirs[: len(ours)] else theirs


@functools.lru_cache(maxsize=64)
def takes_positions(model_class: type[PreTrainedModel]) -> bool:
    """Whether a transformers class takes positions of one's own; RoFormer's ignore them."""
    return "position_ids" in inspect.signature(model_class.forward).parameters


def check_extras(fast_class: type[Any], config: Any, extras: Mapping[str, Any], *, accepts_count: bool = False) -> None:
    """Checks the arguments that ``forward`` does not name.

    Args:
        fast_class: the model's class.
        config: its config, which may ask for outputs, too.
        extras: the arguments.
        accepts_count: whether the loss is divided by ``num_items_in_batch``, where that is given.

    Raises:
        TypeError: one that would change the answer, or that is a mistyped name.
        ValueError: attentions or hidden states are asked for.
    """
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, False) if extras.get(name) is None else extras[name]:
            raise ValueError(
                f"{name} must be False: fastcls does not compute what the answer does not need. "
                "Use the transformers model for it"
            )
    for name, value in extras.items():
        if value is None or value is False or (name == "num_items_in_batch" and accepts_count):
            continue
        if name in _CHANGING:
            raise TypeError(f"forward() takes no argument {name}: fastcls does not compute with it")
        if meant := _mistyped(cast("Any", fast_class), name):
            raise TypeError(f"forward() takes no argument {name}: is {meant} meant?")


@functools.lru_cache(maxsize=1024)
def _mistyped(fast_class: type[Any], name: str) -> str | None:
    """The argument that another name is all but the same as."""
    taken = inspect.signature(fast_class.forward).parameters
    return next(iter(difflib.get_close_matches(name, taken, 1, _TYPING_ERROR)), None)


@functools.lru_cache(maxsize=64)
def divides_by_count(model_class: type[PreTrainedModel]) -> bool:
    """Whether a transformers class for masks divides its loss by ``num_items_in_batch``, as ModernBERT's does.

    BERT's and most others take the argument and leave it: their loss is the mean over a batch's labels.
    """
    names = inspect.unwrap(model_class.forward).__code__.co_names
    return model_class.__name__.endswith("ForMaskedLM") and "loss_function" in names


def check_not_traced() -> None:
    """Refuses `torch.jit.trace`, whose result would hold the lengths of its example."""
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "torch.jit.trace, and torch.onnx.export with dynamo=False, must be left out: a trace would hold the "
            "lengths of its example for all texts. Use torch.export.export, or trace the transformers model"
        )
