"""The providers that are measured: each makes of a transformers model a function from a batch to its logits.

A classifier gives one row of logits per text, a masked language model one row for each [MASK].

Every provider works on a copy of the model over the same weights, in eval mode and without gradients, and takes batches
as a tokenizer leaves them: on the CPU.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import BertForSequenceClassification

import fastcls
from fastcls.engine.spec import LastLayer

from .packed_torch import Packed, PackedTorchBert
from .peers import ONNXRUNTIME, ONNXRUNTIME_INT8, ONNXRUNTIME_RESTING, OPENVINO, OPENVINO_DEFAULT, OPENVINO_INT8
from .provider import (
    REDUCED,
    Forward,
    Loaded,
    Model,
    ModelClass,
    Provider,
    bert_classifiers,
    beside_float32,
    not_installed,
    own_copy,
    with_attention,
)
from .workloads import MASK_ID, Batch, fills_masks, masked_rows


def _forward_of(model: Callable[..., Any], device: torch.device, fills: bool) -> Forward:
    """For modules that need their inputs on their weights' device; from a mask filler, the masked tokens' logits."""

    @torch.inference_mode()
    def forward(batch: Batch) -> Tensor:
        logits: Tensor = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
        return logits[tuple(masked_rows(batch).T)] if fills else logits

    return forward


def _transformers_loader(attention: str) -> Callable[[Model], Loaded]:
    def load(model: Model) -> Loaded:
        no_sdpa = attention == "eager" and baseline_of(type(model)) is EAGER
        detail = "the baseline, because transformers has no sdpa for this model" if no_sdpa else ""
        return Loaded(_forward_of(with_attention(model, attention), model.device, fills_masks(type(model))), detail)

    return load


def _compiled_loader(tuned: bool) -> Callable[[Model], Loaded]:
    def load(model: Model) -> Loaded:
        mode = "max-autotune" if tuned and model.device.type == "cuda" else None
        # On a CPU tuned products need weights that are constants.
        options: dict[str, Any] | None = {"max_autotune": True, "freezing": True} if tuned and mode is None else None
        attention = "eager" if baseline_of(type(model)) is EAGER else "sdpa"
        compiled = torch.compile(with_attention(model, attention), dynamic=True, mode=mode, options=options)
        detail = f"dynamic shapes, {attention} attention"
        return Loaded(_forward_of(compiled, model.device, fills_masks(type(model))), detail)

    return load


def _packed_loader(compiled: bool) -> Callable[[Model], Loaded]:
    def load(model: Model) -> Loaded:
        packed = PackedTorchBert(cast(BertForSequenceClassification, own_copy(model)))
        forward_packed = torch.compile(packed, dynamic=True) if compiled else packed

        @torch.inference_mode()
        def forward(batch: Batch) -> Tensor:
            logits: Tensor = forward_packed(Packed.of(batch, model.device, packed.varlen))
            return logits

        return Loaded(forward, "attention: torch.nn.attention.varlen" if packed.varlen else "attention: padded sdpa")

    return load


def _classes_with_sdpa(model_class: ModelClass) -> str | None:
    return None if model_class._supports_sdpa else "transformers has no sdpa for them: eager is the baseline"


def _classes_with_flash(model_class: ModelClass) -> str | None:
    return None if model_class._supports_flash_attn else "transformers has no flash-attention for them"


def compiler_missing(device: torch.device, _dtype: torch.dtype) -> str | None:
    """Why torch.compile cannot run there."""
    if device.type != "cpu" or shutil.which(os.environ.get("CXX", "g++")):
        return None
    return "no C++ compiler found: install g++ or set CXX"


def _flash_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" or dtype == torch.float32:
        return "flash-attention needs a GPU and 16 bits"
    return not_installed("flash_attn")


def _no_graphs(device: torch.device, _dtype: torch.dtype) -> str | None:
    return None if device.type == "cuda" else "CUDA graphs are a GPU's: elsewhere it is fastcls itself"


def _fastcls_loader(
    last_layer: LastLayer = "absorbed", dtype: torch.dtype | None = None, cuda_graphs: bool = True, **chosen: Any
) -> Callable[[Model], Loaded]:
    def load(model: Model) -> Loaded:
        # A masked language model gives only the rows of its masks.
        options: dict[str, Any] = {"mask_token_id": MASK_ID, "dense": False} if fills_masks(type(model)) else {}
        options |= {"last_layer": last_layer, "cuda_graphs": cuda_graphs, **chosen}
        copied = own_copy(model)
        fast = fastcls.optimize(copied if dtype is None else copied.to(dtype), **options)  # type: ignore[arg-type]

        @torch.inference_mode()
        def forward(batch: Batch) -> Tensor:
            logits: Tensor = fast(**batch).logits
            return logits

        return Loaded(forward)

    return load


EAGER = Provider("transformers eager", "attention by plain products", 1e-5, _transformers_loader("eager"))
SDPA = Provider(
    "transformers sdpa",
    "transformers as it comes: the baseline, but for models that it computes by eager alone",
    1e-5,
    _transformers_loader("sdpa"),
    takes=_classes_with_sdpa,
)
FLASH = Provider(
    "transformers flash",
    "flash-attention 2, which leaves padding out of attention",
    1e-5,
    _transformers_loader("flash_attention_2"),
    _flash_missing,
    _classes_with_flash,
)
COMPILED = Provider("torch.compile", "the baseline, compiled", 1e-5, _compiled_loader(tuned=False), compiler_missing)
AUTOTUNED = Provider(
    "torch.compile autotune",
    "the baseline, compiled with max-autotune (CUDA graphs on a GPU, frozen weights on a CPU)",
    1e-5,
    _compiled_loader(tuned=True),
    compiler_missing,
)
PACKED = Provider(
    "torch packed",
    "the packed model in torch alone",
    1e-5,
    _packed_loader(compiled=False),
    takes=bert_classifiers,
)
PACKED_COMPILED = Provider(
    "torch packed, compiled",
    "the packed model in torch alone, compiled",
    1e-5,
    _packed_loader(compiled=True),
    compiler_missing,
    bert_classifiers,
)
FULL = Provider(
    "fastcls packed only", "fastcls without padding, nothing else", 1e-5, _fastcls_loader("full", cuda_graphs=False)
)
SELECTED = Provider(
    "fastcls + selected",
    "and the last layer for the rows that are read only",
    1e-5,
    _fastcls_loader("selected", cuda_graphs=False),
)
ABSORBED = Provider(
    "fastcls + absorbed",
    "and its values not made, nor its keys where no position is in them",
    1e-5,
    _fastcls_loader(cuda_graphs=False),
    _no_graphs,
)
FASTCLS = Provider(
    "fastcls",
    "all of it, on a GPU with CUDA graphs: as users get it",
    1e-5,
    _fastcls_loader(),
)
INVARIANT = Provider(
    "fastcls, batch-invariant",
    "all of it, with the same bits for a text whatever batch it comes in",
    1e-5,
    _fastcls_loader(batch_invariant=True),
)
BFLOAT16 = Provider(
    "fastcls bfloat16",
    "all of it, of the model in bfloat16",
    REDUCED,
    _fastcls_loader(dtype=torch.bfloat16),
    beside_float32(),
)
INT8 = Provider(
    "fastcls int8", 'all of it, with quantize="int8"', REDUCED, _fastcls_loader(quantize="int8"), beside_float32()
)

# Our own providers, which are compared with peers.
OURS = frozenset(provider.name for provider in (FULL, SELECTED, ABSORBED, FASTCLS, INVARIANT, BFLOAT16, INT8))


def baseline_of(model_class: ModelClass) -> Provider:
    """transformers as it comes: with sdpa, or with eager for models that have nothing else."""
    return SDPA if SDPA.takes(model_class) is None else EAGER


_ALL = (
    EAGER,
    SDPA,
    FLASH,
    COMPILED,
    AUTOTUNED,
    PACKED,
    PACKED_COMPILED,
    ONNXRUNTIME,
    OPENVINO,
    FULL,
    SELECTED,
    ABSORBED,
    FASTCLS,
    INVARIANT,
    BFLOAT16,
    INT8,
    ONNXRUNTIME_RESTING,
    ONNXRUNTIME_INT8,
    OPENVINO_DEFAULT,
    OPENVINO_INT8,
)
PROVIDERS = {provider.name: provider for provider in _ALL}
