"""A checkpoint's folder, sent to machines that do not see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..predicting.checkpoint import Checkpoint, key_of, read_files, write_files
from .library import import_ray


class _Sent:
    """Gives the folder of a machine that holds a checkpoint's files, which come through Ray's object store."""

    def __init__(self, key: str, files: Any) -> None:
        self._key, self._files = key, files

    def __call__(self) -> str:
        ray = import_ray()
        return write_files(self._key, lambda: ray.get(self._files))


def sent(model: str) -> Checkpoint:
    """A checkpoint that any machine of the cluster can load; a name on the hub is one as it is.

    Raises:
        OSError: a file that cannot be read.
    """
    if not Path(model).is_dir():
        return model
    files = read_files(model)
    return _Sent(key_of(files), import_ray().put(files))
