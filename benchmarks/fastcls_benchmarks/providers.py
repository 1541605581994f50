"""The providers that are measured: each makes of a transformers model a function from a batch to its logits.

A classifier gives one row of logits per text, a masked language model one row for each [MASK]. Every provider works on
a copy of the model over the same weights, in eval mode and without gradients, and takes batches as a tokenizer leaves
them: on the CPU.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import BertForSequenceClassification

import fastcls
from fastcls.engine.unpacking import unpack_rows

from . import peers
from .packed_torch import Packed, PackedTorchBert
from .provider import Loaded, Model, Provider, bert_classifiers, beside_float32, described, not_installed, own_copy
from .workloads import MASK_ID, Batch, fills_masks, lengths_of, masked_rows


def _forward_of(run: Callable[..., Any], model: Model) -> Callable[[Batch], Tensor]:
    """Moves inputs to the model's device; from a mask filler, the masked tokens' logits."""
    device, fills = model.device, fills_masks(type(model))

    @torch.inference_mode()
    def forward(batch: Batch) -> Tensor:
        logits: Tensor = run(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
        return logits[tuple(masked_rows(batch).T)] if fills else logits

    return forward


def _transformers(attention: str, model: Model) -> Loaded:
    no_sdpa = attention == "eager" and baseline_of(type(model)) is EAGER
    detail = "the baseline, because transformers has no sdpa for this model" if no_sdpa else ""
    return Loaded(_forward_of(own_copy(model, attention), model), detail)


def _compiled(tuned: bool, model: Model) -> Loaded:
    mode = "max-autotune" if tuned and model.device.type == "cuda" else None
    # On a CPU tuned products need weights that are constants.
    options: dict[str, Any] | None = {"max_autotune": True, "freezing": True} if tuned and mode is None else None
    attention = "eager" if baseline_of(type(model)) is EAGER else "sdpa"
    compiled = torch.compile(own_copy(model, attention), dynamic=True, mode=mode, options=options)
    return Loaded(_forward_of(compiled, model), f"dynamic shapes, {attention} attention")


def _packed(compiled: bool, model: Model) -> Loaded:
    packed = PackedTorchBert(cast(BertForSequenceClassification, own_copy(model)))
    run: Callable[[Packed], Tensor] = torch.compile(packed, dynamic=True) if compiled else packed

    def resident(batch: Batch) -> Callable[[], Tensor]:
        return partial(run, Packed.of(batch, model.device, packed.varlen))

    forward = torch.inference_mode()(lambda batch: resident(batch)())
    return Loaded(forward, f"attention: {'torch.nn.attention.varlen' if packed.varlen else 'padded sdpa'}", resident)


def _fastcls(model: Model, dtype: torch.dtype | None = None, **options: Any) -> Loaded:
    # A masked language model gives only the rows of its masks.
    options |= {"mask_token_id": MASK_ID, "dense": False} if fills_masks(type(model)) else {}
    copied: Any = own_copy(model)
    fast: Any = fastcls.optimize(copied if dtype is None else copied.to(dtype), **options)

    @torch.inference_mode()
    def forward(batch: Batch) -> Tensor:
        return cast(Tensor, fast(**batch).logits)

    def resident(batch: Batch) -> Callable[[], Tensor]:
        rows = zip(batch["input_ids"].tolist(), lengths_of(batch).tolist(), strict=True)
        parts = fast.pack([row[:length] for row, length in rows])
        return lambda: unpack_rows([(fast.forward_packed(part), part) for part in parts])

    return Loaded(forward, "", resident)


def compiler_missing(device: torch.device, _dtype: torch.dtype) -> str | None:
    """Why torch.compile cannot run there."""
    if device.type != "cpu" or shutil.which(os.environ.get("CXX", "g++")):
        return None
    return "no C++ compiler found: install g++ or set CXX"


def _flash_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" or dtype == torch.float32:
        return "flash-attention needs a GPU and 16 bits"
    return not_installed("flash_attn")


def _takes(attribute: str, lacking: str) -> Callable[[type[Model]], str | None]:
    return lambda model_class: None if getattr(model_class, attribute) else f"transformers has no {lacking}"


def _no_graphs(device: torch.device, _dtype: torch.dtype) -> str | None:
    return None if device.type == "cuda" else "CUDA graphs are a GPU's: elsewhere it is fastcls itself"


def baseline_of(model_class: type[Model]) -> Provider:
    """transformers as it comes: with sdpa, or with eager for models that have nothing else."""
    return SDPA if SDPA.takes(model_class) is None else EAGER


EAGER = described("transformers eager", partial(_transformers, "eager"))
_with_sdpa = _takes("_supports_sdpa", "sdpa for them: eager is the baseline")
SDPA = described("transformers sdpa", partial(_transformers, "sdpa"), takes=_with_sdpa)
_with_flash = partial(
    described, available=_flash_missing, takes=_takes("_supports_flash_attn", "flash-attention for them")
)
FLASH = _with_flash("transformers flash", partial(_transformers, "flash_attention_2"))
COMPILED = described("torch.compile", partial(_compiled, False), available=compiler_missing)
AUTOTUNED = described("torch.compile autotune", partial(_compiled, True), available=compiler_missing)
PACKED = described("torch packed", partial(_packed, False), takes=bert_classifiers)
_packed_compiled = partial(described, available=compiler_missing, takes=bert_classifiers)
PACKED_COMPILED = _packed_compiled("torch packed, compiled", partial(_packed, True))
# Without CUDA graphs, whose own step comes last.
_step = partial(partial, _fastcls, cuda_graphs=False)
FULL = described("fastcls packed only", _step(last_layer="full"))
SELECTED = described("fastcls + selected", _step(last_layer="selected"))
ABSORBED = described("fastcls + absorbed", _step(), available=_no_graphs)
FASTCLS = described("fastcls", _fastcls)
INVARIANT = described("fastcls, batch-invariant", partial(_fastcls, batch_invariant=True))
_reduced = partial(described, available=beside_float32())
BFLOAT16 = _reduced("fastcls bfloat16", partial(_fastcls, dtype=torch.bfloat16))
INT8 = _reduced("fastcls int8", partial(_fastcls, quantize="int8"))

_OURS = (FULL, SELECTED, ABSORBED, FASTCLS, INVARIANT, BFLOAT16, INT8)
# Our own providers, which are compared with peers.
OURS = frozenset(provider.name for provider in _OURS)
PROVIDERS = {
    provider.name: provider
    for provider in (
        *(EAGER, SDPA, FLASH, COMPILED, AUTOTUNED, PACKED, PACKED_COMPILED, peers.ONNXRUNTIME, peers.OPENVINO),
        *(peers.DISENTANGLED_FLASH, peers.FLASHDEBERTA, *_OURS),
        *(peers.ONNXRUNTIME_RESTING, peers.ONNXRUNTIME_INT8, peers.OPENVINO_DEFAULT, peers.OPENVINO_INT8),
    )
}
