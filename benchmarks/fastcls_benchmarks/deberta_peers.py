"""DeBERTa on a GPU by two other libraries, whose attention is Triton's, each over the given model's weights."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DebertaV2ForSequenceClassification

from .packed_torch import Packed
from .provider import Loaded, Model, ModelClass, Provider, not_installed, own_copy, quietly
from .workloads import Batch


def _missing(packages: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> str | None:
    fits = device.type == "cuda" and dtype != torch.float32
    return not_installed(*packages, "triton") if fits else "needs a GPU and 16 bits"


def _takes(model_class: ModelClass) -> str | None:
    return None if issubclass(model_class, DebertaV2ForSequenceClassification) else "written for DeBERTa v2 classifiers"


def _packed(model: Model) -> Loaded:
    with quietly():
        copied: Any = own_copy(model)
        library = import_module("disentangled_flash")
        encode = library.optimize_deberta(copied.deberta).encoder.forward_packed

    @torch.inference_mode()
    def forward(batch: Batch) -> Tensor:
        packed = Packed.of(batch, model.device, varlen=True)
        ids = [each[None] for each in (packed.token_ids, packed.token_type_ids, packed.position_ids)]
        info = library.validate_cu_seqlens(packed.cu_seqlens.cpu(), len(packed.token_ids))
        rows = encode(copied.deberta.embeddings(*ids)[0], packed.cu_seqlens, packed_info=info).last_hidden_state
        return cast(Tensor, copied.classifier(copied.pooler(rows[packed.first][:, None])))

    return Loaded(forward, "packed")


def _padded(model: Model) -> Loaded:
    with quietly(), torch.device(model.device):
        library = import_module("flashdeberta")
        flash: Any = library.FlashDebertaV2ForSequenceClassification(own_copy(model).config).eval()
        flash.load_state_dict(model.state_dict(), assign=True)

    @torch.inference_mode()
    def forward(batch: Batch) -> Tensor:
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        return cast(Tensor, flash(**inputs, return_dict=True).logits)

    return Loaded(forward, "padded")


_PACKED, _PADDED = partial(_missing, ("disentangled_flash",)), partial(_missing, ("flashdeberta", "einops"))
DISENTANGLED_FLASH = Provider("disentangled-flash", "its packed DeBERTa encoder", 1e-5, _packed, _PACKED, _takes)
FLASHDEBERTA = Provider("flashdeberta", "its DeBERTa model, padded", 1e-5, _padded, _PADDED, _takes)
