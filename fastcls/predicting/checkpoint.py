"""A checkpoint's identity, and its files where a machine does not see the folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from transformers.utils.hub import cached_file, extract_commit_hash

from ..loading import check_place
from .machine import folder_of_machine, held

# A name on the hub or a folder; or what gives the folder in the process that needs it.
Checkpoint: TypeAlias = "str | Callable[[], str]"

# Beside a checkpoint's files, those that are written.
_SIZES = ".sizes.json"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def fingerprint(name: str) -> str:
    """What tells a checkpoint from another of the same name: its commit on the hub, or a hash of its folder's files.

    Raises:
        OSError: a name that the hub does not have, a hub that cannot be reached, or no such folder.
        TypeError, ValueError: no name, or a folder that holds no checkpoint.
    """
    check_place(name)
    folder = Path(name)
    if not folder.is_dir():
        return f"{name} at commit {extract_commit_hash(cached_file(name, 'config.json'), None)}"
    digest = hashlib.sha256()
    for file in _files(folder):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as source:
            while block := source.read(1 << 20):
                digest.update(block)
    return f"sha256 {digest.hexdigest()}"


def read_files(folder: str) -> dict[str, bytes]:
    """The files of a checkpoint's folder, those in its folders too, by their paths in it."""
    root = Path(folder)
    found = (path for path in sorted(root.rglob("*")) if path.is_file())
    kept = (path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in kept}


def key_of(files: Mapping[str, bytes]) -> str:
    """What tells these files of a checkpoint from others, for `write_files`."""
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:32]


def write_files(key: str, files: Callable[[], Mapping[str, bytes]]) -> str:
    """The folder of this machine that holds a checkpoint's files, written by the first process that asks.

    Args:
        key: what tells the checkpoint from others, see `key_of`.
        files: gives the files, see `read_files`; called where they are not there yet.
    """
    target = folder_of_machine() / f"checkpoint-{key}"
    with held(target):
        if not _is_whole(target):
            shutil.rmtree(target, ignore_errors=True)
            unfinished = target.with_name(f"{target.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            sizes = {}
            for name, content in files().items():
                path = unfinished / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                sizes[name] = len(content)
            (unfinished / _SIZES).write_text(json.dumps(sizes), encoding="utf-8")
            os.replace(unfinished, target)
    return str(target)


def _is_whole(folder: Path) -> bool:
    """Whether all files are there, of which those that clean temporary folders may have removed some."""
    try:
        sizes = json.loads((folder / _SIZES).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except FileNotFoundError:
        return False
