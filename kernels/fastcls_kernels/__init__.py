"""Kernels for encoders that compute only what their answer needs.

Every operation takes packed tokens, runs as a Triton kernel on a GPU and in plain PyTorch elsewhere, and has its
definition in `fastcls_kernels.reference`. On a CPU with AVX-512 or AVX2, products and layers over packed weights run in
C. Importing this package needs torch alone.
"""

from .absorb_query import absorb_query
from .attention import attention_padded, attention_varlen
from .cls_attention import cls_attention, cls_attention_kv, takes_norm
from .cls_output import cls_output
from .disentangled_attention import Buckets, disentangled_attention
from .embedding import embedding_layer_norm
from .gated_activation import gated_activation
from .layer_norm import AddNorm, add_layer_norm, layer_norm
from .layout import PackedLayout
from .linear import linear, linear_activation, linear_add_layer_norm, linear_gelu, linear_per_head, uses_onednn
from .mean_pool import mean_pool
from .packed import PackedWeight, Packing, explain_compiled, pack_weight, packed_linear
from .packed_layer import PackedLayer, packed_layer
from .pooler_classifier import pooler_classifier
from .rotary import apply_rotary_
from .runtime.activations import Activation
from .runtime.backend import Backend, explain_backend, use_backend
from .runtime.invariance import batch_invariant, is_batch_invariant
from .runtime.triton import HAS_TRITON
from .training import forms as _forms  # noqa: F401 (gives the operations their differentiable forms)
from .warming import warming_shapes

__all__ = [
    "HAS_TRITON",
    "Activation",
    "AddNorm",
    "Backend",
    "Buckets",
    "PackedLayer",
    "PackedLayout",
    "PackedWeight",
    "Packing",
    "absorb_query",
    "add_layer_norm",
    "apply_rotary_",
    "attention_padded",
    "attention_varlen",
    "batch_invariant",
    "cls_attention",
    "cls_attention_kv",
    "cls_output",
    "disentangled_attention",
    "embedding_layer_norm",
    "explain_backend",
    "explain_compiled",
    "gated_activation",
    "is_batch_invariant",
    "layer_norm",
    "linear",
    "linear_activation",
    "linear_add_layer_norm",
    "linear_gelu",
    "linear_per_head",
    "mean_pool",
    "pack_weight",
    "packed_layer",
    "packed_linear",
    "pooler_classifier",
    "takes_norm",
    "use_backend",
    "uses_onednn",
    "warming_shapes",
]
