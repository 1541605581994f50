"""The operations without their checks, under their public names, for callers that made the arguments themselves.

Trusted are types, shapes, dtypes, devices and strides, and that rows, ids and positions lie within their tables; the
public functions say what must hold. An argument that does not fit gives a wrong answer, an error from elsewhere, or on
a GPU reads foreign memory. A `PackedLayout` stands for the lengths. Two tensors come back where the public function has
``keep_sum``: the normed rows, and the sum where it is kept, else the normed rows again. Nothing here is an operator of
a graph.
"""

from .absorb_query import absorb_query_unchecked as absorb_query
from .attention import attention_padded_unchecked as attention_padded
from .attention import attention_varlen_unchecked as attention_varlen
from .cls_attention import cls_attention_kv_unchecked as cls_attention_kv
from .cls_attention import cls_attention_unchecked as cls_attention
from .cls_output import cls_output_unchecked as cls_output
from .disentangled_attention import disentangled_attention_unchecked as disentangled_attention
from .embedding import embedding_layer_norm_unchecked as embedding_layer_norm
from .gated_activation import gated_activation_unchecked as gated_activation
from .layer_norm import add_layer_norm_unchecked as add_layer_norm
from .layer_norm import layer_norm_unchecked as layer_norm
from .linear import linear_activation_unchecked as linear_activation
from .linear import linear_add_layer_norm_unchecked as linear_add_layer_norm
from .linear import linear_per_head_unchecked as linear_per_head
from .linear import linear_unchecked as linear
from .mean_pool import mean_pool_unchecked as mean_pool
from .pooler_classifier import pooler_classifier_unchecked as pooler_classifier
from .rotary import apply_rotary_unchecked_ as apply_rotary_

__all__ = [
    "absorb_query",
    "add_layer_norm",
    "apply_rotary_",
    "attention_padded",
    "attention_varlen",
    "cls_attention",
    "cls_attention_kv",
    "cls_output",
    "disentangled_attention",
    "embedding_layer_norm",
    "gated_activation",
    "layer_norm",
    "linear",
    "linear_activation",
    "linear_add_layer_norm",
    "linear_per_head",
    "mean_pool",
    "pooler_classifier",
]
