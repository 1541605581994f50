"""Is the code that a model's modules run transformers' and torch's own? fastcls computes what that code would.

A patched class, a patched function of a module or of torch makes the model compute something else: the error names it.
Code counts as transformers', torch's or Python's own by its file, and if it stands under its own name.
"""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from collections.abc import Collection, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any, NoReturn

import torch
import transformers
from transformers import PreTrainedModel, masking_utils, modeling_utils
from transformers.activations import ACT2FN

from ..families import ACTIVATION_CLASSES, ACTIVATION_NAMES

# The name that `register_attention` registers with transformers.
OUR_ATTENTION = "fastcls"
# Parts of the names of methods that a subclass may replace, since `forward` does not reach them.
NOT_IN_FORWARD = (
    *("__new__", "pretrained", "hub", "init", "weights", "state_dict", "save", "load", "train", "eval", "parameters"),
    *("repr", "embeddings", "gradient_checkpointing", "generat", "subclass", "reduce", "setstate", "getstate", "card"),
)


@functools.cache
def folder_of(module: ModuleType) -> str:
    """The folder of a package's files."""
    assert module.__file__ is not None
    return _folder(os.path.dirname(module.__file__))


def _folder(path: str) -> str:
    return os.path.join(os.path.realpath(path), "")


TRANSFORMERS = folder_of(transformers)
TRUSTED = (TRANSFORMERS, folder_of(torch))
_STANDARD_LIBRARY = _folder(sysconfig.get_paths()["stdlib"])
# Methods that a module's call goes through, apart from its class's own functions.
_CALLS = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__")
# Methods of an object's class that run when the object is called.
_CALLED = ("__call__", "forward")
# Packages whose objects stand among the functions of transformers' modules.
_PACKAGES = frozenset({"torch", "transformers", "typing", "typing_extensions"})
# Functions that transformers' modules compute with, and where torch keeps those that are not written in Python.
_FUNCTIONS: tuple[tuple[Any, str, Any, tuple[str, ...]], ...] = (
    (
        *(torch.nn.functional, "torch.nn.functional", torch._C._nn),
        (
            "dropout",
            "embedding",
            "gelu",
            "layer_norm",
            "linear",
            "relu",
            "scaled_dot_product_attention",
            "silu",
            "softmax",
        ),
    ),
    (torch, "torch", torch._C._VariableFunctions, ("bmm", "matmul", "tanh")),
)
# Functions found to be transformers' own, and all that classes and modules held when they were checked.
_known: set[FunctionType] = set()
_before: dict[type | ModuleType, dict[str, Any]] = {}


def check_code(classes: Collection[type]) -> None:
    """Checks that the classes run transformers' and torch's own code: neither they nor their modules were patched.

    Raises:
        ValueError: they do not; it names what was found instead.
    """
    for each in classes:
        place = f"{each.__module__}.{each.__qualname__}"
        own = vars(each).get("forward")
        if own is not None and getattr(own, "__qualname__", None) != f"{each.__qualname__}.forward":
            _check_own(f"{place}.forward", own)
            _refuse(f"{place}.forward", own)
        _check_values(place, each)
    for above in {above for each in classes for above in each.__mro__[1:]}:
        for name in (*_CALLS, "forward"):
            if name in vars(above):
                _check_own(f"{above.__module__}.{above.__qualname__}.{name}", vars(above)[name])
    for module in {each.__module__ for each in classes}:
        if module.startswith("transformers.models."):
            _check_values(module, sys.modules[module])


def check_functions() -> None:
    """Checks that the functions, masks and activations that all models use are transformers' and torch's own.

    Raises:
        ValueError: as `check_code`.
    """
    _check_values(masking_utils.__name__, masking_utils)
    for place, called, builtins, names in _FUNCTIONS:
        for name in names:
            value = getattr(place, name)
            if type(value) is FunctionType:
                _check_value(called, name, value)
            elif value is not getattr(builtins, name, None):
                _refuse(f"{called}.{name}", value, "torch's")
    _check_activations()


def _check_values(place: str, holder: type | ModuleType) -> None:
    """Checks all that a class or a module holds; seeing that nothing has changed since takes a microsecond."""
    if _before.get(holder) == vars(holder):
        return
    for name, value in vars(holder).items():
        _check_value(place, name, value.__func__ if isinstance(value, (staticmethod, classmethod)) else value)
    _before[holder] = dict(vars(holder))


def _check_value(place: str, name: str, value: object) -> None:
    """Checks the value under a name of a class or a module."""
    if type(value) is FunctionType:
        _check_own(f"{place}.{name}", value)
        # Constructors may be wrapped without a name.
        if value.__name__ != name and not name.startswith("__"):
            _refuse(f"{place}.{name}", value)
    elif isinstance(value, property):
        for function in (value.fget, value.fset):
            _check_own(f"{place}.{name}", function)
    elif isinstance(value, functools.partialmethod) or (callable(value) and not isinstance(value, type)):
        _check_object(place, name, value)


def _check_object(place: str, own: str, value: object) -> None:
    """Checks the code that runs when an object in a function's place is called."""
    if own == "logger" or any(part in own for part in NOT_IN_FORWARD):
        # Tests mock the functions that load and save.
        return
    name = f"{place}.{own}"
    wrapped = getattr(value, "__wrapped__", None)
    if type(wrapped) is FunctionType and isinstance(value, functools._lru_cache_wrapper):
        _check_value(place, own, wrapped)
    elif type(value).__module__.partition(".")[0] not in _PACKAGES:
        _refuse(name, value)
    else:
        for each in _CALLED:
            _check_own(name, getattr(type(value), each, None))


def _check_activations() -> None:
    """Checks that transformers' names of activations still mean the same activations."""
    for name, activation in ACTIVATION_NAMES.items():
        # The entry itself: looking it up by its name would build a new module.
        entry = dict.get(ACT2FN, name)
        if entry is None:
            continue
        found = entry[0] if isinstance(entry, tuple) else entry
        own = isinstance(found, type) and found.__module__.startswith(("torch.", "transformers."))
        if not own or ACTIVATION_CLASSES.get(found.__name__) != activation:
            _refuse(f"transformers.activations.ACT2FN[{name!r}]", found)


def _refuse(name: str, found: object, whose: str = "transformers'") -> NoReturn:
    shown = f"{found.__module__}.{found.__qualname__}" if isinstance(found, (type, FunctionType)) else repr(found)
    raise ValueError(f"{name} must be {whose} own, got {shown}: fastcls would pass it by")


def _check_own(name: str, function: object) -> None:
    """Refuses code that is not transformers', torch's or Python's own; a builtin has no Python code and passes."""
    if type(function) is not FunctionType or function in _known:
        return
    found = stranger_in(function)
    if found is not None:
        raise ValueError(
            f"{name} must be transformers' own, got {found.__qualname__} from {found.__code__.co_filename}: "
            "fastcls would pass it by"
        )
    _known.add(function)


def stranger_in(function: Any, folders: tuple[str, ...] = TRUSTED) -> FunctionType | None:
    """The function, or the one that it wraps, whose code is neither in ``folders`` nor Python's."""
    return next((each for each in unwrapped(function) if not is_in(each, folders) and not _is_pythons(each)), None)


def is_in(function: FunctionType, folders: str | tuple[str, ...]) -> bool:
    """Whether a function's code lies in a folder."""
    file = function.__code__.co_filename
    return file.startswith(folders) or os.path.realpath(file).startswith(folders)


def _is_pythons(function: FunctionType) -> bool:
    file = os.path.realpath(function.__code__.co_filename)
    return file.startswith(_STANDARD_LIBRARY) and "-packages" not in file


def unwrapped(function: Any) -> Iterator[FunctionType]:
    """A function, and those that it wraps."""
    while isinstance(function, FunctionType):
        yield function
        function = getattr(function, "__wrapped__", None)


def check_subclass(found: type[PreTrainedModel], base: type[PreTrainedModel], parts: Collection[str]) -> None:
    """Checks that a subclass only adds to the model, or replaces methods that ``forward`` does not reach.

    Args:
        found: the model's class.
        base: the transformers class that it derives from.
        parts: names of its modules, which a class attribute of the same name would hide.

    Raises:
        ValueError: it replaces something else.
    """
    if found is base:
        return
    for each in found.__mro__:
        if each in base.__mro__:
            continue
        for name, value in vars(each).items():
            theirs = getattr(base, name, None)
            is_method = callable(value) or isinstance(value, (property, classmethod, staticmethod))
            if name in parts or (
                theirs is not None
                and value is not theirs
                and is_method
                and not isinstance(value, type)
                and getattr(found, name, None) is not theirs
                and not any(part in name for part in NOT_IN_FORWARD)
            ):
                raise ValueError(
                    f"model must compute as {base.__name__} does, got {each.__qualname__} with a {name} of its own: "
                    f"{advice(each.__qualname__)}"
                )


def advice_for(module: object) -> str:
    """Advises what to do about a module, or a wrapper, that is not transformers' own."""
    adapters = getattr(module, "peft_config", None)
    if isinstance(adapters, Mapping) and any(getattr(each, "is_prompt_learning", False) for each in adapters.values()):
        return "prompts and prefixes that were learnt are not taken, and cannot be merged: stay with the PEFT model"
    return advice(class_name(module))


def class_name(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def advice(name: str) -> str:
    """The same, by the name of the module's class."""
    name = name.lower()
    if "peft" in name or "lora" in name or "adapter" in name:
        return "merge adapters into the weights first, with merge_and_unload() of the PEFT model"
    if any(word in name for word in ("quant", "bitsandbytes", "bnb", "8bit", "4bit", "int8", "gptq", "awq", "hqq")):
        return "layers that were quantised are not taken: optimize the model as it was, in bfloat16 or float32"
    if "fsdp" in name or "distributed" in name or "dataparallel" in name:
        return "give the model that it wraps, whole and on one device (often its attribute module)"
    if name.startswith("fastcls."):
        return "it is a fast model already: give the transformers model that it was made of"
    if "multivectorencoder" in name:
        return 'stay with it, and call fastcls.register_attention() and set_attn_implementation("fastcls") on its model'
    if "optimizedmodule" in name:
        return "give the model that was compiled (_orig_mod), and compile what optimize returns"
    return "fastcls does not compute what other code than transformers' own does"


def check_attention(model: PreTrainedModel) -> None:
    """Checks that the attention that a model's config names is one of transformers' own.

    Raises:
        ValueError: it is not.
    """
    name = model.config._attn_implementation
    if name in (None, OUR_ATTENTION):
        return
    functions = [
        registered.get(name)
        for registered in (modeling_utils.ALL_ATTENTION_FUNCTIONS, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS)
    ]
    # Eager attention is not registered: it is a function in the model's own file.
    is_missing = functions[0] is None and name != "eager"
    strangers = [
        each
        for each in functions
        if each is not None and (type(each) is not FunctionType or stranger_in(each) is not None)
    ]
    if is_missing or strangers:
        found = ", ".join(getattr(each, "__qualname__", str(each)) for each in strangers) or "nothing"
        raise ValueError(
            f"model.config._attn_implementation must be one of transformers' own, got {name!r} ({found}): "
            'fastcls would pass it by. Use model.set_attn_implementation("sdpa")'
        )
