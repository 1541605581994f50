"""Triton's interpreter, half of whose time goes into what it has done before: each thing is done once."""

from __future__ import annotations

import importlib
from typing import Any


def quicken_the_interpreter() -> None:
    """Computes the same in half the time: only the interpreter's own bookkeeping is spared."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    language: Any = importlib.import_module("triton.language")
    # Other releases of Triton may take its functions away in another way, or not at all.
    if hasattr(interpreter, "_LangPatchScope"):
        _patch_once_a_launch(interpreter)
    _remember_numpys_types(interpreter, language)
    _remember_types_of_blocks(language)


def _patch_once_a_launch(interpreter: Any) -> None:
    """At each call of a function inside a kernel it puts its own functions in the place of all of Triton's anew."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        # Functions of one module see the same names.
        seen = id(function.__globals__)
        if seen in patched:
            return interpreter._LangPatchScope()
        patched.add(seen)
        return patch(function)

    def launch_anew(executor: Any, *arguments: Any, **options: Any) -> None:
        # The end of a launch takes them away again.
        patched.clear()
        launch(executor, *arguments, **options)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew


def _remember_numpys_types(interpreter: Any, language: Any) -> None:
    """NumPy's type for one of Triton's is looked up in a table that is made for each question."""
    look_up = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def numpys(dtype: Any) -> Any:
        scalar = dtype.scalar if type(dtype) is language.block_type else dtype
        if type(scalar) is not language.dtype:
            # A pointer.
            return look_up(dtype)
        if scalar.name not in known:
            known[scalar.name] = look_up(scalar)
        return known[scalar.name]

    interpreter._get_np_dtype = numpys


def _remember_types_of_blocks(language: Any) -> None:
    """Each result has a type of its own, which its numbers' type and its shape decide."""
    make = language.block_type.__init__
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def made(block: Any, element_ty: Any, shape: Any) -> None:
        if type(element_ty) is not language.dtype:
            make(block, element_ty, shape)
            return
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in known:
            make(block, element_ty, shape)
            known[key] = vars(block).copy()
        vars(block).update(known[key])

    language.block_type.__init__ = made
