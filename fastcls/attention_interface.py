"""fastcls's attention in transformers models that are not converted: ``model.set_attn_implementation("fastcls")``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function

from fastcls_kernels import attention_padded, attention_varlen

NAME = "fastcls"
# What models hand on to their attention besides, and that changes its result.
_CHANGING = (
    "position_bias",
    "head_mask",
    "sliding_window",
    "softcap",
    "s_aux",
    "cache",
    "block_table",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "output_attentions",
)


def register_attention() -> None:
    """Makes ``"fastcls"`` an attention implementation of transformers, for any encoder that goes through its interface.

    ```python
    fastcls.register_attention()
    model.set_attn_implementation("fastcls")  # or from_pretrained(..., attn_implementation="fastcls")
    ```

    It is for models that `optimize` does not take. Attention alone is computed by fastcls, in inference, among all real
    tokens of a text: with padding on the right by `attention_padded`, with any other mask by `attention_varlen` on what
    the mask keeps. The results are those of sdpa at real tokens, and zeros go into the rest of the layer at padding.

    What it does not compute is refused with a ValueError when the model is called: causal attention, windows, masks
    that differ from query to query, position biases, cross-attention and caches, fewer heads of keys than of queries,
    dropout, attentions asked for, gradients.
    """
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _refuse(what: str, found: object) -> NoReturn:
    raise ValueError(
        f'attn_implementation "{NAME}" needs {what}, got {found}: '
        'use model.set_attn_implementation("sdpa") for this model or call'
    )


def _mask(*, mask_function: Callable[..., Any], attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """What the layers get: None where every token is real, (batch,) lengths where padding is on the right.

    Otherwise the mask itself, (batch, seqlen). It is looked at here, once for all layers.
    """
    if mask_function is not bidirectional_mask_function:
        found = getattr(mask_function, "__qualname__", mask_function)
        _refuse("a model in which every token attends to every other one", f"a mask by {found}")
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        _refuse("an attention_mask of shape (batch, seqlen)", tuple(attention_mask.shape))
    mask = attention_mask.bool()
    whole, on_the_right = torch.stack((mask.all(), (mask[:, :-1] >= mask[:, 1:]).all())).tolist()
    if whole:
        return None
    return mask.sum(1) if on_the_right else mask


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Queries, keys and values (batch, nheads, seqlen, headdim) to (batch, seqlen, nheads, headdim)."""
    if torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value)):
        _refuse("torch.no_grad() or torch.inference_mode()", "tensors that require gradients")
    if dropout:
        _refuse("attention without dropout (model.eval())", f"dropout = {dropout}")
    if key.shape != query.shape or value.shape != query.shape:
        shapes = ", ".join(str(tuple(each.shape)) for each in (query, key, value))
        _refuse("keys and values of the queries' own tokens and number of heads", f"q, k, v of shapes {shapes}")
    for name in _CHANGING:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            _refuse(f"{name} to be left out", type(kwargs[name]).__name__)
    batch, _, seqlen, _ = query.shape
    # As for sdpa: a mask says what is attended to, and only where there is none the module does.
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and seqlen > 1:
        _refuse("a model in which every token attends to every other one", f"a causal {type(module).__name__}")
    if attention_mask is not None and attention_mask.shape not in ((batch,), (batch, seqlen)):
        _refuse("an attention_mask of shape (batch, seqlen)", tuple(attention_mask.shape))
    q, k, v = (each.transpose(1, 2) for each in (query, key, value))
    if attention_mask is not None and attention_mask.ndim == 1:
        return attention_padded(q, k, v, attention_mask, scaling), None
    q, k, v = (each.flatten(0, 1) for each in (q, k, v))
    if attention_mask is None:
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * seqlen
        return attention_varlen(q, k, v, cu_seqlens, seqlen, scaling).unflatten(0, (batch, seqlen)), None
    kept = attention_mask.flatten().nonzero()[:, 0]
    cu_seqlens = nn.functional.pad(attention_mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    out = torch.zeros_like(q)
    out[kept] = attention_varlen(q[kept], k[kept], v[kept], cu_seqlens, seqlen, scaling)
    return out.unflatten(0, (batch, seqlen)), None
