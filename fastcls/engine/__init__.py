"""Specs, weights and tokens in, rows out. Imports torch and fastcls_kernels only.

Importing it registers ``torch.ops.fastcls``, all that a program needs which `torch.export` made of a fast model.
"""

from . import operator
from .engine import Engine, Options
from .outputs import register_stand_ins

__all__ = ["Engine", "Options", "operator"]

register_stand_ins()
