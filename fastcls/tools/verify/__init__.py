"""Does a fast model give the original's answers on your own texts? `fastcls verify`, or `verify` from Python."""

from .answers import task_of
from .comparison import Changed, Comparison, Differences
from .report import check_picture, draw, show
from .run import Timed, Verification, verify

__all__ = [
    "Changed",
    "Comparison",
    "Differences",
    "Timed",
    "Verification",
    "check_picture",
    "draw",
    "show",
    "task_of",
    "verify",
]
