"""fastcls's attention in transformers models that are not converted: ``model.set_attn_implementation("fastcls")``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function

from fastcls_kernels import attention_varlen, explain_backend, is_batch_invariant

from ..original.own_code import OUR_ATTENTION

# The attribute of a mask that holds its `_Groups`, which all layers share.
_GROUPS = "_fastcls_groups"
# Further arguments that models may hand on to their attention and that change its result.
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
    """Makes ``"fastcls"`` an attention implementation of transformers, for any encoder that uses its interface.

    ```python
    fastcls.register_attention()
    model.set_attn_implementation("fastcls")  # or from_pretrained(..., attn_implementation="fastcls")
    ```

    It is for models that `optimize` does not take. fastcls computes only the attention: every row, padding included,
    attends to the tokens of its text that the mask keeps. All rows have sdpa's results, so that code that reads
    padding, as ColBERT's query expansion does, reads there what sdpa gives; a text of which the mask keeps nothing has
    zeros, as in sdpa. On a CPU sdpa itself, which is fastest there, computes a batch with padding.

    Calling the model raises a ValueError for all that is not computed: causal attention, windows, masks that differ
    from query to query, position biases, cross-attention and caches, fewer heads of keys than of queries, dropout,
    attentions asked for.
    """
    AttentionInterface.register(OUR_ATTENTION, _attention)
    AttentionMaskInterface.register(OUR_ATTENTION, _mask)


def _refuse(what: str, found: object) -> NoReturn:
    raise ValueError(
        f'attn_implementation "{OUR_ATTENTION}" needs {what}, got {found}: '
        'use model.set_attn_implementation("sdpa") for this model or call'
    )


def _mask(*, mask_function: Callable[..., Any], attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """The mask that the layers get: None if every token is real, else which tokens are, (batch, seqlen) bool.

    The mask is looked at here, once for all layers.
    """
    if mask_function is not bidirectional_mask_function:
        found = getattr(mask_function, "__qualname__", mask_function)
        _refuse("a model in which every token attends to every other one", f"a mask by {found}")
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        _refuse("an attention_mask of shape (batch, seqlen)", tuple(attention_mask.shape))
    # A new tensor, since it gets an attribute.
    mask = attention_mask != 0
    if bool(mask.all()):
        return None
    if _takes_groups(mask.device):
        setattr(mask, _GROUPS, _Groups.of(mask))
    return mask


def _takes_groups(device: torch.device) -> bool:
    # sdpa on a CPU knows nothing of batch invariance.
    return explain_backend(device)[0] == "triton" or is_batch_invariant()


class _Groups(NamedTuple):
    """A batch's rows in groups: sequences of as many queries as keys, the keys being a text's kept tokens.

    A text's first group is its kept tokens, so that they have the bits of packed ones. Its other rows follow in groups
    of as many queries over the same keys; copies of the last row fill the last group up. That is at most twice the
    products of sdpa, and fewer than sdpa's if texts differ much in length.

    Attributes:
        queries, keys: (num_rows,), the row of the flat batch that each is.
        cu_seqlens: (num_groups + 1,) int32, where groups begin.
        places: (batch * seqlen,), for each row of the batch its index among the num_rows.
        empty: (batch,) bool, the texts of which nothing is kept; None if there are none.
    """

    queries: Tensor
    keys: Tensor
    cu_seqlens: Tensor
    places: Tensor
    empty: Tensor | None

    @classmethod
    def of(cls, mask: Tensor) -> _Groups:
        """Waits for the GPU once."""
        (batch, seqlen), device = mask.shape, mask.device
        lengths = mask.sum(1).cpu()
        has_tokens = lengths > 0
        groups = torch.where(has_tokens, (lengths + seqlen - 1) // lengths.clamp(min=1), 0)
        sizes = groups * lengths
        starts, num_rows = sizes.cumsum(0) - sizes, int(sizes.sum())
        cu_seqlens = nn.functional.pad(lengths.repeat_interleave(groups).cumsum(0), (1, 0)).to(torch.int32)
        text = torch.arange(batch, device="cpu").repeat_interleave(sizes)
        rank = torch.arange(num_rows, device="cpu") - starts[text]
        ranks = torch.stack((rank.clamp(max=seqlen - 1), rank % lengths[text])) + text * seqlen
        # Each text's kept tokens first, in their order.
        rows = torch.argsort(~mask, dim=1, stable=True) + torch.arange(batch, device=device)[:, None] * seqlen
        queries, keys = rows.flatten()[ranks.to(device)]
        # A row of a text without tokens needs some place, too; its result is overwritten with zeros.
        found = torch.where(has_tokens, starts, 0)[:, None] + torch.arange(seqlen, device="cpu") * has_tokens[:, None]
        places = torch.empty(batch * seqlen, dtype=torch.int64, device=device)
        places[rows.flatten()] = found.flatten().to(device)
        empty = None if bool(has_tokens.all()) else ~has_tokens.to(device)
        return cls(queries, keys, cu_seqlens.to(device), places, empty)


def _attend_in_groups(q: Tensor, k: Tensor, v: Tensor, groups: _Groups, scaling: float | None) -> Tensor:
    """(batch, seqlen, nheads, headdim) to the same shape: every row attends to its text's kept tokens."""
    shape = q.shape
    q, k, v = (each.flatten(0, 1) for each in (q, k, v))
    if not groups.queries.numel():
        return q.new_zeros(shape)
    out = attention_varlen(q[groups.queries], k[groups.keys], v[groups.keys], groups.cu_seqlens, shape[1], scaling)
    out = out[groups.places].view(shape)
    return out if groups.empty is None else out.masked_fill_(groups.empty[:, None, None, None], 0.0)


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
    if dropout:
        _refuse("attention without dropout (model.eval())", f"dropout = {dropout}")
    if key.shape != query.shape or value.shape != query.shape:
        shapes = ", ".join(str(tuple(each.shape)) for each in (query, key, value))
        _refuse("keys and values of the queries' own tokens and number of heads", f"q, k, v of shapes {shapes}")
    for name in _CHANGING:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            _refuse(f"{name} to be left out", type(kwargs[name]).__name__)
    batch, _, seqlen, _ = query.shape
    # As in sdpa: the module says whether attention is causal only if there is no mask.
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and seqlen > 1:
        _refuse("a model in which every token attends to every other one", f"a causal {type(module).__name__}")
    if attention_mask is not None and (attention_mask.shape != (batch, seqlen) or attention_mask.dtype != torch.bool):
        found = f"{attention_mask.dtype} of {tuple(attention_mask.shape)}"
        _refuse("a boolean attention_mask of shape (batch, seqlen)", found)
    if attention_mask is not None and not _takes_groups(query.device):
        kept = attention_mask[:, None, None, :]
        out = scaled_dot_product_attention(query, key, value, attn_mask=kept, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    q, k, v = (each.transpose(1, 2) for each in (query, key, value))
    if attention_mask is not None:
        # The attribute is lost if a model hands on something else than `_mask`'s tensor, as a copy on another device.
        groups = getattr(attention_mask, _GROUPS, None) or _Groups.of(attention_mask)
        return _attend_in_groups(q, k, v, groups, scaling), None
    q, k, v = (each.flatten(0, 1) for each in (q, k, v))
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * seqlen
    return attention_varlen(q, k, v, cu_seqlens, seqlen, scaling).unflatten(0, (batch, seqlen)), None
