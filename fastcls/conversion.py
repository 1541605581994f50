"""From a transformers model to the fast one."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from .auto_classes import register_auto_classes
from .encoder import LastLayer, check_last_layer
from .families import family_of, supported
from .model import FastModel
from .sentence_models import check_computes_nothing_else, is_sentence_model, optimize_sentence_model
from .tasks import TASKS, FastEncoder, FastMaskedLM
from .weights import take_over

register_auto_classes()


def optimize(
    model: PreTrainedModel | nn.Module,
    *,
    last_layer: LastLayer = "absorbed",
    cuda_graphs: bool = True,
    batch_invariant: bool = False,
    mask_token_id: int | None = None,
    dense: bool = True,
    select: Literal["all", "first"] | None = None,
) -> Any:
    """A module with the same interface that gives the same results, faster. Inference only.

    It shares the model's weights: query, key and value become one matrix, of which the model's own parameters are
    views from then on, so that both go on working and no memory is doubled.

    Args:
        model: a transformers encoder of a supported family, with or without a head, in float32, float16 or bfloat16, on
            one device; or sentence-transformers' CrossEncoder, SentenceTransformer or SparseEncoder with one inside.
        last_layer, cuda_graphs, batch_invariant: see `FastModel`.
        mask_token_id, dense: of a masked language model, see `FastMaskedLM`.
        select: of a model without a head, see `FastEncoder`; None is "all". Of a SentenceTransformer None is what it
            pools, and "all" keeps every token's embedding where that is [CLS] alone.

    Returns:
        A `FastModel` for the model's task: `FastClassifier`, `FastTokenClassifier`, `FastQuestionAnswerer`,
        `FastMaskedLM`, `FastMultipleChoice`, `FastNextSentencePredictor` or `FastEncoder`. Of sentence-transformers'
        models a copy of the same class with such a model inside; the given one goes on as it was.

    Raises:
        TypeError: the model's class is not supported, or its parameters' dtype is not.
        ValueError: its config asks for what fastcls does not compute, or its parameters are not those of its class
            (adapters must be merged first), or lie on several devices; an option that is not the task's.
    """
    check_last_layer(last_layer)
    if select not in ("all", "first", None):
        raise ValueError(f"select must be 'all' or 'first', got {select!r}; pass a mask to forward")
    if is_sentence_model(model):
        if mask_token_id is not None or not dense:
            raise ValueError("mask_token_id and dense must be left out for models of sentence-transformers")
        if batch_invariant:
            check_computes_nothing_else(model)
        inner = partial(optimize, last_layer=last_layer, cuda_graphs=cuda_graphs, batch_invariant=batch_invariant)
        return optimize_sentence_model(model, inner, select)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be {supported()}, got {type(model).__module__}.{type(model).__qualname__}")
    family, model_class = family_of(model)
    spec, head = family.spec(model.config), family.head(model_class, model.config)
    task = TASKS[head.task]
    if task is not FastMaskedLM and (mask_token_id is not None or not dense):
        raise ValueError(
            f"mask_token_id and dense must be left out for {head.task}: they are a masked language model's"
        )
    if task is not FastEncoder and select == "first":
        raise ValueError(f"select must be left out for {head.task}: it is for a model without a head")
    if mask_token_id is not None and not 0 <= mask_token_id < spec.vocab_size:
        raise ValueError(f"mask_token_id must lie from 0 to {spec.vocab_size - 1}, got {mask_token_id}")
    weight_map, weights = take_over(model, family, spec, head)
    fast: FastModel = task(
        *(type(model), model.config, spec, head, weight_map, weights), last_layer, cuda_graphs, batch_invariant
    )
    if isinstance(fast, FastMaskedLM):
        fast.mask_token_id, fast.dense = mask_token_id, dense
    if isinstance(fast, FastEncoder):
        fast.select = select or "all"
    return fast
