"""The pass that is trained: packed tokens to rows behind the head, with a graph for their gradients."""

from .places import DropoutRates, draw_seeds, num_seeds
from .products import LowRank
from .run import TrainingOptions, TrainingPass

__all__ = ["DropoutRates", "LowRank", "TrainingOptions", "TrainingPass", "draw_seeds", "num_seeds"]
