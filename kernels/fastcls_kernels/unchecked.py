"""The operations without their checks, for callers that have made or checked the arguments themselves.

Shapes, dtypes, strides and devices are trusted, and so are values. In place of ``cu_seqlens`` and ``max_seqlen`` stands
a `PackedLayout`, and a scale is a number, never None.
"""

from .attention import attention_padded_unchecked as attention_padded
from .attention import attention_varlen_unchecked as attention_varlen
from .cls_attention import cls_attention_kv_unchecked as cls_attention_kv
from .cls_attention import cls_attention_unchecked as cls_attention
from .disentangled_attention import disentangled_attention_unchecked as disentangled_attention

__all__ = ["attention_padded", "attention_varlen", "cls_attention", "cls_attention_kv", "disentangled_attention"]
