"""``fastcls verify`` in Python: is the fast model the original?"""

from .tools.verify import (
    Changed,
    Comparison,
    Differences,
    Timed,
    Verification,
    check_picture,
    draw,
    show,
    task_of,
    verify,
)

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
