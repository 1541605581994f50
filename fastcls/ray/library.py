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


def machines_of(ray: ModuleType) -> list[dict[str, float]]:
    """What each machine of the cluster that this process is connected to has, as "CPU" and "GPU"."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
