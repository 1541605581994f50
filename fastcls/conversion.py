"""From a transformers model to a fast one."""

from __future__ import annotations

import contextlib
import os
import warnings
from functools import partial
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from fastcls_kernels.packed import explain_compiled

from .engine.packed import check_quantizes
from .engine.spec import LastLayer, Quantize, check_last_layer, check_quantize
from .families import family_of, head_in, supported
from .families.checkpoint import made_of, map_weights
from .integrations.auto_classes import register_auto_classes
from .integrations.peft import is_peft_model, optimize_peft_model
from .integrations.sentence_transformers import check_computes_nothing_else, is_sentence_model, optimize_sentence_model
from .models import TASKS, FastEncoder, FastMaskedLM, FastModel, Labelled
from .original.adapters import has_adapters, named_parameters
from .original.following import Original, settle_all
from .original.own_code import advice_for
from .original.places import release as release_weights
from .original.structure import check_structure, config_as_built

register_auto_classes()


def optimize(
    model: PreTrainedModel | nn.Module,
    *,
    last_layer: LastLayer = "absorbed",
    cuda_graphs: bool = True,
    batch_invariant: bool = False,
    quantize: Quantize | None = None,
    pack_weights: bool = True,
    mask_token_id: int | None = None,
    dense: bool = True,
    select: Literal["all", "first"] | None = None,
    release: bool = False,
) -> Any:
    """A module with the same interface that gives the same results, faster, and can be trained (`FastModel.train`).

    The model stays as it was, bit for bit and storage for storage. Its weights are shared, except query, key and value,
    which are copied and joined to one matrix: a fifth of BERT-base's memory, 85 of 438 MB. On a CPU that runs the
    compiled kernels the layers' weights are packed as well, see ``pack_weights``. These copies, and all else that
    follows from weights, are made anew when an optimizer, ``load_state_dict`` or another tensor in their place changes
    them. So you can train the model further and evaluate it with this one. A change that no count shows, as
    ``weight.data.mul_(2)``, is seen after `FastModel.clear_caches`.

    Args:
        model: a transformers encoder of a supported family, with or without a head, in float32, float16 or bfloat16, on
            one device; or sentence-transformers' CrossEncoder, SentenceTransformer or SparseEncoder with one inside; or
            PEFT's model of one with adapters of LoRA.
        last_layer, cuda_graphs, batch_invariant, quantize, pack_weights: see `FastModel`.
        mask_token_id, dense: of a masked language model, see `FastMaskedLM`.
        select: for a model without a head, see `FastEncoder`; None is "all". For a SentenceTransformer, None computes
            what it pools, and "all" keeps every token's embedding even if it pools [CLS] alone.
        release: take the weights out of the model, so that only packed ones are there twice; the model is of no use
            afterwards. With ``quantize`` the packed ones are then all that is kept of the layers' products.
            Without it the model's own query, key and value go once nobody holds the model any more.

    Returns:
        A `FastModel` for the model's task: `FastClassifier`, `FastTokenClassifier`, `FastQuestionAnswerer`,
        `FastMaskedLM`, `FastMultipleChoice`, `FastNextSentencePredictor` or `FastEncoder`. For a model of
        sentence-transformers, a copy of the same class with such a model inside; the given one goes on as it was. For
        one of PEFT, a model of the same class around such a model, with the given one's own adapters.

    Raises:
        TypeError: the model's class is not supported, or its parameters' dtype is not.
        ValueError: its config asks for something that fastcls does not compute, or one of its modules is not what the
            config builds (replaced, hooked, patched, pruned, quantised, with an adapter other than LoRA), or its
            parameters are not plain tensors or lie on several devices; an option that is not the task's.
    """
    check_last_layer(last_layer)
    check_quantize(quantize)
    if select not in ("all", "first", None):
        raise ValueError(f"select must be 'all' or 'first', got {select!r}; pass a mask to forward")
    inner = partial(
        optimize,
        last_layer=last_layer,
        cuda_graphs=cuda_graphs,
        batch_invariant=batch_invariant,
        quantize=quantize,
        pack_weights=pack_weights,
        release=release,
    )
    if is_sentence_model(model):
        if mask_token_id is not None or not dense:
            raise ValueError("mask_token_id and dense must be left out for models of sentence-transformers")
        if batch_invariant:
            check_computes_nothing_else(model)
        return optimize_sentence_model(model, inner, select)
    if is_peft_model(model):
        return optimize_peft_model(model, partial(inner, mask_token_id=mask_token_id, dense=dense, select=select))
    if not isinstance(model, PreTrainedModel):
        name = f"{type(model).__module__}.{type(model).__qualname__}"
        raise TypeError(f"model must be {supported()}, got {name}: {advice_for(model)}{_own_head(model)}")
    try:
        family, model_class = family_of(model)
    except TypeError as error:
        raise TypeError(f"{error}{_own_head(model)}") from None
    base = getattr(transformers, model_class)
    encoder = getattr(model, family.prefix.rstrip("."), model)
    config = config_as_built(model, family, encoder)
    spec, head = family.spec(config), family.head(model_class, config)
    task = TASKS[head.task]
    if task is not FastMaskedLM and (mask_token_id is not None or not dense):
        raise ValueError(
            f"mask_token_id and dense must be left out for {head.task}: they are a masked language model's"
        )
    if task is not FastEncoder and select == "first":
        raise ValueError(f"select must be left out for {head.task}: it is for a model without a head")
    if mask_token_id is not None and not 0 <= mask_token_id < spec.vocab_size:
        raise ValueError(f"mask_token_id must lie from 0 to {spec.vocab_size - 1}, got {mask_token_id}")
    if quantize is not None:
        check_quantizes(spec, model.device, model.dtype)
        runs, reason = explain_compiled(quantize)
        if not runs:
            warnings.warn(
                f"quantize={quantize!r} is left out, and products stay in float32: the compiled kernels cannot compute "
                f"it, {reason}. Set quantize on the result to compute in int8 all the same, slower than in float32",
                RuntimeWarning,
                stacklevel=2,
            )
            quantize = None
    if release and has_adapters(model):
        raise ValueError("release must be False for a model with adapters, which go on to be its own")
    check_structure(model, base, config, head)
    weight_map = map_weights(named_parameters(model), family, config, head)
    sources = {**weight_map.sources, **{own: (name,) for own, name in weight_map.buffers.items()}}
    original = Original(model, sources, weight_map.aliases, weight_map.layouts)
    # A copy made in inference mode cannot be written to outside of it.
    with torch.inference_mode(False), torch.no_grad():
        made = {own: made_of(parts, weight_map.layouts.get(own)) for own, parts in original.tensors().items()}
        weights = {
            own: weight if own in weight_map.buffers else nn.Parameter(weight, requires_grad=False)
            for own, weight in made.items()
        }
        fast: FastModel = task(
            *(type(model), model.config, spec, head, weight_map, weights),
            *(last_layer, cuda_graphs, batch_invariant, quantize, pack_weights),
        )
    if release:
        fast.last_frozen = original.frozen
        settle_all(model)
        release_weights(model)
        if quantize is not None:
            fast.let_go()
    else:
        fast.follow(original)
    if isinstance(fast, Labelled):
        fast.loss_labels = getattr(model, "num_labels", None)
    if isinstance(fast, FastMaskedLM):
        fast.mask_token_id, fast.dense = mask_token_id, dense
    if isinstance(fast, FastEncoder):
        fast.select = select or "all"
    return fast


def _own_head(model: object) -> str:
    """Advice for a module of a user's own that holds an encoder, "" for all others."""
    if not isinstance(model, nn.Module):
        return ""
    for name, module in model.named_modules():
        if name and isinstance(module, PreTrainedModel):
            with contextlib.suppress(TypeError):
                if not head_in(family_of(module)[1]):
                    return f". fastcls.optimize_encoder makes the encoder inside it fast, {name}"
    return ""


def remedy_for(model: object) -> str:
    """Advice for a model that is no classifier."""
    if isinstance(model, (str, os.PathLike)):
        return ": to load it by name use Classifier.from_pretrained"
    if is_sentence_model(model):
        return ": pass it to fastcls.optimize, which gives a fast copy of the same class"
    is_wrapper = isinstance(model, nn.Module) and not isinstance(model, (FastModel, PreTrainedModel))
    return f": {advice_for(model)}" if is_wrapper else ""
