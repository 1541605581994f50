"""``fastcls verify`` in Python: is the fast model the original?"""

from .tools.verify import *  # noqa: F403
from .tools.verify import __all__ as __all__
