"""The providers that are measured: each makes of a transformers model a function from a batch to its logits.

A classifier gives one row of logits per text, a masked language model one row for each [MASK].

Every provider works on a copy of the model over the same weights, in eval mode and without gradients, and takes batches
as a tokenizer leaves them: on the CPU.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import BertForSequenceClassification

import fastcls
from fastcls.engine.spec import LastLayer
from fastcls.engine.unpacking import unpack_rows

from . import deberta_peers, peers
from .packed_torch import Packed, PackedTorchBert
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
from .workloads import MASK_ID, Batch, fills_masks, lengths_of, masked_rows


def _forward_of(model: Callable[..., Any], device: torch.device, fills: bool) -> Forward:
    """For modules that need their inputs on their weights' device; from a mask filler, the masked tokens' logits."""

    @torch.inference_mode()
    def forward(batch: Batch) -> Tensor:
        logits: Tensor = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
        return logits[tuple(masked_rows(batch).T)] if fills else logits

    return forward


def _transformers(attention: str, model: Model) -> Loaded:
    no_sdpa = attention == "eager" and baseline_of(type(model)) is EAGER
    detail = "the baseline, because transformers has no sdpa for this model" if no_sdpa else ""
    return Loaded(_forward_of(with_attention(model, attention), model.device, fills_masks(type(model))), detail)


def _compiled(tuned: bool, model: Model) -> Loaded:
    mode = "max-autotune" if tuned and model.device.type == "cuda" else None
    # On a CPU tuned products need weights that are constants.
    options: dict[str, Any] | None = {"max_autotune": True, "freezing": True} if tuned and mode is None else None
    attention = "eager" if baseline_of(type(model)) is EAGER else "sdpa"
    compiled = torch.compile(with_attention(model, attention), dynamic=True, mode=mode, options=options)
    return Loaded(
        _forward_of(compiled, model.device, fills_masks(type(model))), f"dynamic shapes, {attention} attention"
    )


def _packed(compiled: bool, model: Model) -> Loaded:
    packed = PackedTorchBert(cast(BertForSequenceClassification, own_copy(model)))
    forward_packed = torch.compile(packed, dynamic=True) if compiled else packed

    @torch.inference_mode()
    def forward(batch: Batch) -> Tensor:
        logits: Tensor = forward_packed(Packed.of(batch, model.device, packed.varlen))
        return logits

    def resident(batch: Batch) -> Callable[[], Tensor]:
        inputs = Packed.of(batch, model.device, packed.varlen)
        return lambda: cast(Tensor, forward_packed(inputs))

    detail = "attention: torch.nn.attention.varlen" if packed.varlen else "attention: padded sdpa"
    return Loaded(forward, detail, resident)


def _fastcls(
    model: Model,
    last_layer: LastLayer = "absorbed",
    dtype: torch.dtype | None = None,
    cuda_graphs: bool = True,
    **chosen: Any,
) -> Loaded:
    # A masked language model gives only the rows of its masks.
    options: dict[str, Any] = {"mask_token_id": MASK_ID, "dense": False} if fills_masks(type(model)) else {}
    copied = own_copy(model)
    options |= {"last_layer": last_layer, "cuda_graphs": cuda_graphs, **chosen}
    fast: Any = fastcls.optimize(copied if dtype is None else copied.to(dtype), **options)  # type: ignore[arg-type]

    @torch.inference_mode()
    def forward(batch: Batch) -> Tensor:
        logits: Tensor = fast(**batch).logits
        return logits

    def resident(batch: Batch) -> Callable[[], Tensor]:
        rows = zip(batch["input_ids"].tolist(), lengths_of(batch).tolist(), strict=True)
        parts = fast.pack([row[:length] for row, length in rows])
        return lambda: unpack_rows([(fast.forward_packed(part), part) for part in parts])

    return Loaded(forward, "", resident)


def _without(missing: str, has: Callable[[Any], bool]) -> Callable[[ModelClass], str | None]:
    return lambda model_class: None if has(model_class) else missing


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


_with = functools.partial
_NO_SDPA = "transformers has no sdpa for them: eager is the baseline"
_NO_FLASH = "transformers has no flash-attention for them"
EAGER = Provider("transformers eager", "attention by plain products", 1e-5, _with(_transformers, "eager"))
SDPA = Provider(
    "transformers sdpa",
    "transformers as it comes: the baseline, but for models that it computes by eager alone",
    1e-5,
    _with(_transformers, "sdpa"),
    takes=_without(_NO_SDPA, lambda each: each._supports_sdpa),
)
FLASH = Provider(
    "transformers flash",
    "flash-attention 2, which leaves padding out of attention",
    1e-5,
    _with(_transformers, "flash_attention_2"),
    _flash_missing,
    _without(_NO_FLASH, lambda each: each._supports_flash_attn),
)
_compiles = functools.partial(Provider, bound=1e-5, available=compiler_missing)
COMPILED = _compiles("torch.compile", "the baseline, compiled", load=_with(_compiled, False), preparing=25)
AUTOTUNED = _compiles(
    "torch.compile autotune",
    "the baseline, compiled with max-autotune (CUDA graphs on a GPU, frozen weights on a CPU)",
    load=_with(_compiled, True),
    preparing=60,
)
PACKED = Provider(
    "torch packed", "the packed model in torch alone", 1e-5, _with(_packed, False), takes=bert_classifiers
)
PACKED_COMPILED = _compiles(
    "torch packed, compiled",
    "the packed model in torch alone, compiled",
    load=_with(_packed, True),
    takes=bert_classifiers,
    preparing=25,
)
_step = functools.partial(_with, _fastcls, cuda_graphs=False)
FULL = Provider("fastcls packed only", "fastcls without padding, nothing else", 1e-5, _step(last_layer="full"))
SELECTED = Provider(
    "fastcls + selected", "and the last layer for the rows that are read only", 1e-5, _step(last_layer="selected")
)
ABSORBED = Provider(
    "fastcls + absorbed",
    "and its values not made, nor its keys where no position is in them",
    1e-5,
    _step(),
    _no_graphs,
)
FASTCLS = Provider("fastcls", "all of it, on a GPU with CUDA graphs: as users get it", 1e-5, _fastcls)
INVARIANT = Provider(
    "fastcls, batch-invariant",
    "all of it, with the same bits for a text whatever batch it comes in",
    1e-5,
    _with(_fastcls, batch_invariant=True),
)
_reduced = functools.partial(Provider, bound=REDUCED, available=beside_float32())
BFLOAT16 = _reduced(
    "fastcls bfloat16", "all of it, of the model in bfloat16", load=_with(_fastcls, dtype=torch.bfloat16)
)
INT8 = _reduced("fastcls int8", 'all of it, with quantize="int8"', load=_with(_fastcls, quantize="int8"))

# Our own providers, which are compared with peers.
OURS = frozenset(provider.name for provider in (FULL, SELECTED, ABSORBED, FASTCLS, INVARIANT, BFLOAT16, INT8))


def baseline_of(model_class: ModelClass) -> Provider:
    """transformers as it comes: with sdpa, or with eager for models that have nothing else."""
    return SDPA if SDPA.takes(model_class) is None else EAGER


def _named(providers: Iterable[Provider]) -> dict[str, Provider]:
    return {provider.name: provider for provider in providers}


PROVIDERS = _named(
    [
        *(EAGER, SDPA, FLASH, COMPILED, AUTOTUNED, PACKED, PACKED_COMPILED, peers.ONNXRUNTIME, peers.OPENVINO),
        *(deberta_peers.DISENTANGLED_FLASH, deberta_peers.FLASHDEBERTA),
        *(FULL, SELECTED, ABSORBED, FASTCLS, INVARIANT, BFLOAT16, INT8),
        *(peers.ONNXRUNTIME_RESTING, peers.ONNXRUNTIME_INT8, peers.OPENVINO_DEFAULT, peers.OPENVINO_INT8),
    ]
)
