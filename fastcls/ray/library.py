"""Ray itself, an optional dependency."""

from __future__ import annotations

from types import ModuleType


def import_ray() -> ModuleType:
    """Ray, with its data library.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f'Ray must be installed: pip install "fastcls[ray]" ({error})') from error
    return ray
