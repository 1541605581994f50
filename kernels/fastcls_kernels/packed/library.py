"""The compiled kernels: C, built when the package is installed where a C compiler is found, called through ctypes.

They are written for x86-64 with AVX-512 and VNNI. Threads are those of PyTorch's own OpenMP, which the library finds in
the process: it brings none of its own.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from pathlib import Path

import torch

from ..runtime.backend import is_plain_torch

# Changes with the structures and functions in source/.
_INTERFACE = 2

_FOLDER = Path(__file__).parent / "source"


class WeightStruct(ctypes.Structure):
    """``weight_t`` of source/products.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("in_features", ctypes.c_int32),
        ("out_features", ctypes.c_int32),
        ("sums_stride", ctypes.c_int32),
        ("packed", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
    )


class BatchStruct(ctypes.Structure):
    """``batch_t`` of source/ids.c."""

    _fields_ = (
        ("ids", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("types", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("num_ids", ctypes.c_int64),
        ("num_types", ctypes.c_int64),
        ("longest", ctypes.c_int64),
        ("padding_id", ctypes.c_int64),
        ("first_position", ctypes.c_int64),
    )


class TableStruct(ctypes.Structure):
    """``table_t`` of source/embedding.c."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
    )


class LayerStruct(ctypes.Structure):
    """``layer_t`` of source/layer.h."""

    _fields_ = (
        ("width", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("inner", ctypes.c_int32),
        ("function", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("padding", ctypes.c_int32),
        ("qkv", WeightStruct),
        ("out", WeightStruct),
        ("up", WeightStruct),
        ("down", WeightStruct),
        ("attention_norm", ctypes.c_void_p),
        ("attention_norm_bias", ctypes.c_void_p),
        ("output_norm", ctypes.c_void_p),
        ("output_norm_bias", ctypes.c_void_p),
    )


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or the reason why there is none."""
    paths = [_FOLDER / f"_library{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return None, "they were not built: install fastcls where GCC is found, on x86-64"
    # PyTorch's OpenMP, in whose threads the library runs, is in the process by now.
    torch.get_num_threads()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"they cannot be loaded: {error}"
    found = library.fastcls_interface()
    if found != _INTERFACE:
        return None, f"they were built of another version ({found}, not {_INTERFACE}): install fastcls again"
    if not library.fastcls_runs_here():
        return None, "this CPU has no AVX-512 with VNNI"
    library.fastcls_layers_memory.restype = ctypes.c_size_t
    library.fastcls_count_tokens.restype = library.fastcls_pack_ids.restype = ctypes.c_int64
    return library, ""


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot run, or `use_backend` leaves them out: see `explain_compiled`."""
    return None if is_plain_torch() else _load()[0]


def explain_compiled() -> tuple[bool, str]:
    """Whether the compiled kernels run on this machine, and the reason in one phrase."""
    if is_plain_torch():
        return False, 'left out by use_backend("torch")'
    found, reason = _load()
    return found is not None, reason or "built for this CPU (AVX-512 with VNNI)"


def has_bfloat16() -> bool:
    """Whether the compiled kernels multiply bfloat16 here (AVX512_BF16)."""
    found = library()
    return found is not None and bool(found.fastcls_has_bfloat16())
