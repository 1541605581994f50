"""Operations that can be trained: forward passes that keep little, and their gradients, on packed tokens."""

from .attention import Heads, Scoring, Turning, attention, turned
from .cls_attention import cls_attention
from .dropout import Dropout
from .embedding import embedded
from .low_rank import adapted_linear, low_rank_inner
from .norms import add_norm, dropped
from .pooling import mean_pool
from .products import activated_linear, activation, linear

__all__ = [
    "Dropout",
    "Heads",
    "Scoring",
    "Turning",
    "activated_linear",
    "activation",
    "adapted_linear",
    "add_norm",
    "attention",
    "cls_attention",
    "dropped",
    "embedded",
    "linear",
    "low_rank_inner",
    "mean_pool",
    "turned",
]
