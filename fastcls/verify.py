"""``fastcls verify`` in Python: is the fast model the original?"""

from .tools.verify import Timed, Verification, verify

__all__ = ["Timed", "Verification", "verify"]
