"""What the processes of one user share on a machine: files in a folder that nobody else can write to."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# What may be removed has such a name, whatever else lies in the folder.
_OURS = re.compile(r"(model|checkpoint)-[0-9a-f]{32}")
# Locks that this process keeps until it ends, by their file: what it uses nobody removes.
_in_use: dict[Path, int] = {}
_own = threading.Lock()


def folder_of_machine() -> Path:
    """The folder, made where it is missing: one of the user's own in FASTCLS_SHARED, or among the temporary files.

    Raises:
        ValueError: others can write to it, who could have this process run what they like; a system without users.
    """
    if os.name != "posix":
        raise ValueError(f"processes share files on Linux and macOS, got {os.name}: pass a name on the hub")
    folder = Path(os.environ.get("FASTCLS_SHARED") or tempfile.gettempdir()) / f"fastcls-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if folder.is_symlink() or found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(
            f"{folder} must belong to this user alone, and others can write to it: name another one in FASTCLS_SHARED"
        )
    return folder


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Keeps other processes away from a path while its file or folder is made, and afterwards from removing it."""
    import fcntl

    with _own:
        if path not in _in_use:
            _remove_unused(path.parent)
            # Two locks, because one that is changed from alone to shared is let go of in between.
            _in_use[path] = _locked(path.with_name(f"{path.name}.lock"), fcntl.LOCK_SH)
    descriptor = _locked(path.with_name(f"{path.name}.making"), fcntl.LOCK_EX)
    try:
        yield
    finally:
        # A process that was forked meanwhile has it open, too.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _locked(lock: Path, how: int) -> int:
    """Waits for a lock, alone or shared with others."""
    import fcntl

    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, how)
        if _is_at(descriptor, lock):
            return descriptor
        # Who held it before has removed it.
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _remove_unused(folder: Path) -> None:
    """Removes what no process uses, as all that did have ended."""
    import fcntl

    for lock in folder.glob("*.lock"):
        path = lock.with_suffix("")
        if _OURS.fullmatch(path.name) is None:
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(descriptor, lock):
                    # The lock last: whoever waits for it finds all or nothing.
                    for ending in ("", ".unfinished", ".making", ".lock"):
                        left = path.with_name(path.name + ending)
                        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
            finally:
                os.close(descriptor)


@atexit.register
def leave() -> None:
    """Removes what this process is the last one to use, and uses no more."""
    with _own:
        folders = {path.parent for path in _in_use}
        for descriptor in _in_use.values():
            os.close(descriptor)
        _in_use.clear()
    for folder in folders:
        with contextlib.suppress(OSError):
            _remove_unused(folder)


def write_mapped(value: Any, path: Path) -> None:
    """Writes a value so that `read_mapped` can map its tensors."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    torch.save(value, unfinished)
    os.replace(unfinished, path)


def read_mapped(path: Path) -> Any:
    """A value whose tensors are the file's own pages, which processes share as long as they only read."""
    # The file is from this user's own folder, and holds whole objects.
    return torch.load(path, mmap=True, weights_only=False)
