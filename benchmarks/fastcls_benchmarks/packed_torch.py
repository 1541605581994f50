"""The strong baseline: the same packed model in torch alone, as a good engineer would write it without our kernels.

Padding is removed before the first layer and never comes back, except around attention where torch has no attention
over packed sequences (on a CPU, and in float32). The last layer is computed for every token.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from .workloads import Batch


class Packed(NamedTuple):
    """A batch without its padding; `rows`, `places` and `keep` are None if attention needs none either."""

    token_ids: Tensor  # [total_tokens], as are the next two
    position_ids: Tensor
    token_type_ids: Tensor
    cu_seqlens: Tensor  # [batch_size + 1] where each text starts and ends, int32
    first: Tensor  # [batch_size] the rows of the [CLS] tokens
    longest: int
    rows: Tensor | None  # [batch_size, longest] for each padded place its row, 0 where there is none
    places: Tensor | None  # [total_tokens] for each row its place among batch_size * longest
    keep: Tensor | None  # [batch_size, 1, 1, longest] whether a place holds a token

    @classmethod
    def of(cls, batch: Batch, device: torch.device, varlen: bool) -> Packed:
        keep = batch["attention_mask"].bool()
        cu_seqlens = F.pad(keep.sum(1).cumsum(0), (1, 0)).int()
        positions = torch.arange(keep.shape[1]).expand_as(keep)
        ids = (batch["input_ids"][keep], positions[keep], batch["token_type_ids"][keep])
        packed = [part.to(device, non_blocking=True) for part in (*ids, cu_seqlens, cu_seqlens[:-1].long())]
        if varlen:
            return cls._make([*packed, keep.shape[1], None, None, None])
        places = keep.flatten().nonzero().flatten()
        rows = torch.zeros_like(batch["input_ids"])
        rows[keep] = torch.arange(len(places))
        padding = [part.to(device, non_blocking=True) for part in (rows, places, keep[:, None, None, :])]
        return cls._make([*packed, keep.shape[1], *padding])


class PackedTorchBert(nn.Module):
    """Logits of a transformers BERT classifier over a `Packed` batch, with the transformers model's own modules."""

    def __init__(self, model: BertForSequenceClassification) -> None:
        super().__init__()
        self.model = model
        # Any, since torch does not type a module's attributes as one of tensor or module.
        layers: Any = model.bert.encoder.layer
        self.layers = layers
        self.fused = nn.ModuleList([_fused(layer.attention.self) for layer in layers])
        weight = model.bert.embeddings.word_embeddings.weight
        self.varlen = weight.is_cuda and weight.dtype in (torch.float16, torch.bfloat16)

    def forward(self, packed: Packed) -> Tensor:
        embeddings = self.model.bert.embeddings
        hidden_states = embeddings.LayerNorm(
            embeddings.word_embeddings(packed.token_ids)
            + embeddings.token_type_embeddings(packed.token_type_ids)
            + embeddings.position_embeddings(packed.position_ids)
        )
        for layer, fused in zip(cast(Any, self.layers), self.fused, strict=True):
            output = layer.attention.output
            attended = self._attend(fused(hidden_states), packed)
            hidden_states = output.LayerNorm(output.dense(attended) + hidden_states)
            inner = F.gelu(layer.intermediate.dense(hidden_states))
            hidden_states = layer.output.LayerNorm(layer.output.dense(inner) + hidden_states)
        pooled = cast(nn.Module, self.model.bert.pooler)(hidden_states[packed.first][:, None])
        return cast(Tensor, self.model.classifier(pooled))

    def _attend(self, qkv: Tensor, packed: Packed) -> Tensor:
        """(total_tokens, 3 * width) to (total_tokens, width)."""
        heads = self.model.config.num_attention_heads
        # [total_tokens, heads, head_dim] each
        q, k, v = qkv.unflatten(1, (3, heads, -1)).unbind(1)
        if packed.rows is None or packed.places is None:
            from torch.nn.attention.varlen import varlen_attn

            out = varlen_attn(q, k, v, packed.cu_seqlens, packed.cu_seqlens, packed.longest, packed.longest)
            return cast(Tensor, out).flatten(1)
        # [batch_size, heads, longest, head_dim]
        q, k, v = (each[packed.rows].transpose(1, 2) for each in (q, k, v))
        padded = F.scaled_dot_product_attention(q, k, v, attn_mask=packed.keep)
        return padded.transpose(1, 2).flatten(0, 1)[packed.places].flatten(1)


def _fused(attention: Any) -> nn.Linear:
    """Query, key and value as one product."""
    parts = (attention.query, attention.key, attention.value)
    weight = torch.cat([part.weight for part in parts])
    fused = nn.Linear(weight.shape[1], weight.shape[0], device="meta", dtype=weight.dtype)
    fused.weight = nn.Parameter(weight, requires_grad=False)
    fused.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
    return fused
