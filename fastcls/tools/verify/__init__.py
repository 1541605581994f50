"""Is the optimized model the original? Both on texts of one's own: `fastcls verify`, or `verify` from Python."""

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
