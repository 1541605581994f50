"""The compiled kernels: C, built when the package is installed where GCC is found, called through ctypes.

They are written for x86-64, in AVX-512 and in AVX2. Threads are those of PyTorch's own OpenMP, which the library finds
in the process: it brings none of its own.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..runtime.backend import is_plain_torch

# Changes with the structures and functions in source/.
_INTERFACE = 4

Packing = Literal["float32", "bfloat16", "int8"]
Form = Literal["avx512", "avx2"]

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


class Compiled:
    """The compiled kernels in the form for this CPU.

    Args:
        library: what was built.
        form: "avx512" or "avx2".

    Attributes:
        lacking: the packings that it does not multiply on this CPU, each with the reason in one phrase.
        name: the instructions that it uses.
    """

    def __init__(self, library: ctypes.CDLL, form: Form) -> None:
        def function(name: str, result: Any = None) -> Callable[..., Any]:
            found = getattr(library, f"fastcls_{name}")
            found.restype = result
            return found

        self.product = function(f"product_{form}")
        self.embed = function(f"embed_{form}")
        self.layers_memory = function(f"layers_memory_{form}", ctypes.c_size_t)
        self.layers = function(f"layers_{form}")
        self.are_apart = function(f"are_apart_{form}", ctypes.c_int32)
        self.count_tokens = function("count_tokens", ctypes.c_int64)
        self.pack_ids = function("pack_ids", ctypes.c_int64)
        has_vnni = library.fastcls_has_avx512_vnni() if form == "avx512" else library.fastcls_has_avx_vnni()
        self.lacking: dict[Packing, str] = {}
        if not has_vnni:
            self.lacking["int8"] = "this CPU has no VNNI"
        if form == "avx2" or not library.fastcls_has_avx512_bf16():
            self.lacking["bfloat16"] = "this CPU has no AVX512_BF16"
        elif library.fastcls_has_amx_bf16():
            # Its tiles multiply several times as fast, and oneDNN uses them.
            self.lacking["bfloat16"] = "this CPU has AMX_BF16, which PyTorch's operators use"
        self.name = f"{'AVX-512' if form == 'avx512' else 'AVX2'}{' with VNNI' if has_vnni else ''}"


@functools.cache
def _open() -> tuple[ctypes.CDLL | None, str]:
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
    return library, ""


@functools.cache
def _load() -> tuple[Compiled | None, str]:
    """The kernels, or the reason why there are none."""
    library, reason = _open()
    if library is None:
        return None, reason
    # As PyTorch's own kernels do, they heed ATEN_CPU_CAPABILITY.
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and library.fastcls_has_avx512():
        return Compiled(library, "avx512"), ""
    if capability in ("AVX512", "AVX2") and library.fastcls_has_avx2():
        return Compiled(library, "avx2"), ""
    return None, f"PyTorch computes for a CPU with {capability} here, and they need AVX2"


def library() -> Compiled | None:
    """The compiled kernels, or None where they cannot run, or `use_backend` leaves them out: see `explain_compiled`."""
    return None if is_plain_torch() else _load()[0]


def explain_compiled(packing: Packing = "float32") -> tuple[bool, str]:
    """Whether the compiled kernels multiply with weights of a packing on this machine, and the reason in one phrase.

    Args:
        packing: "float32", "bfloat16" or "int8".

    Raises:
        ValueError: another packing.
    """
    if packing not in get_args(Packing):
        raise ValueError(f"packing must be one of {', '.join(get_args(Packing))}, got {packing!r}")
    if is_plain_torch():
        return False, 'left out by use_backend("torch")'
    found, reason = _load()
    if found is None:
        return False, reason
    if packing in found.lacking:
        return False, found.lacking[packing]
    return True, f"built for this CPU ({found.name})"
