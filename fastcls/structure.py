"""Is a model what its config builds? fastcls reads modules and config, and runs none of their ``forward``s.

So each module is compared with the one at its place in a twin: what transformers itself builds of the config, without
memory for weights. A module of another class, another value in one, a hook, a patched ``forward``: each makes the model
compute something else, and is refused by its path.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules import module as module_calls
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils, modeling_utils

from .attention_interface import NAME as OUR_ATTENTION
from .families import Family
from .families._family import activation_in
from .spec import HeadSpec

# What a module holds without computing with it in eval mode, or computes the same with either way.
_WITHOUT_EFFECT = frozenset(
    {
        "attention_dropout",
        "attn_implementation",
        "chunk_size_feed_forward",
        "config",
        "deterministic_flash_attn",
        "dropout",
        "embedding_dim",
        "gradient_checkpointing",
        "in_features",
        "inplace",
        "layer_idx",
        "layer_types",
        "loss_type",
        "max_seq_len_cached",
        "n_layers",
        "name_or_path",
        "norm_type",
        "num_embeddings",
        "num_labels",
        "original_max_seq_len",
        "out_features",
        "p",
        "padding_idx",
        "scale_grad_by_freq",
        "seq_len_dim",
        "sparse",
        "sparse_pred_ignore_index",
    }
)
# The same, but for embeddings it says where positions begin.
_PADDING = "padding_idx"
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
# What transformers marks a module with whose weights were made or loaded.
_MARKS = frozenset({"_is_hf_initialized"})
# Methods that a subclass may replace: none of them is reached from `forward`.
_NOT_IN_FORWARD = (
    *("__new__", "pretrained", "hub", "init", "weights", "state_dict", "save", "load", "train", "eval", "parameters"),
    *("repr", "embeddings", "gradient_checkpointing", "generat", "subclass", "reduce", "setstate", "getstate", "card"),
)


def _folder(path: str) -> str:
    return os.path.join(os.path.realpath(path), "")


_TRANSFORMERS = _folder(os.path.dirname(transformers.__file__))
_TRUSTED = (_TRANSFORMERS, _folder(os.path.dirname(torch.__file__)))
_STANDARD_LIBRARY = _folder(sysconfig.get_paths()["stdlib"])
# What a module's call goes through besides its class's own functions.
_CALLS = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__")
# What of an object's class calling it runs.
_CALLED = ("__call__", "forward")
# What transformers' modules compute with.
_FUNCTIONS = ("dropout", "embedding", "gelu", "layer_norm", "linear", "scaled_dot_product_attention", "softmax", "silu")


@dataclass(frozen=True)
class _Expected:
    """A module of the twin."""

    module_class: type[nn.Module]
    attributes: frozenset[str]
    values: tuple[tuple[str, Any], ...]
    parameters: tuple[tuple[str, torch.Size | None], ...]
    buffers: tuple[str, ...]
    children: Mapping[str, _Expected | None]
    activation: str | None
    drops_out: bool


def config_as_built(model: PreTrainedModel, family: Family, encoder: nn.Module) -> PreTrainedConfig:
    """The model's config with the values that its modules were built with, whatever became of the config since."""
    config: PreTrainedConfig = model.config
    built: dict[str, Any] = {}
    for name, read in family.built.items():
        try:
            value = read(encoder, config)
        except (AttributeError, IndexError, TypeError, ZeroDivisionError):
            # A module is not what it should be, which the comparison says with its path.
            continue
        if value is not None and value != getattr(config, name, None):
            built[name] = value
    if not built:
        return config
    config = copy.deepcopy(config)
    for name, value in built.items():
        setattr(config, name, value)
    return config


def check_structure(
    model: PreTrainedModel, base: type[PreTrainedModel], config: PreTrainedConfig, head: HeadSpec
) -> None:
    """Compares a model with what its config builds.

    Args:
        model: the model.
        base: the class in transformers that it is of.
        config: what `config_as_built` gives.
        head: what was read from it.

    Raises:
        ValueError: a module computes something else than the config says, with its path and what was found.
    """
    expected = _expected(base, config)
    _check_subclass(type(model), base)
    classes: set[type] = {base}
    out = head.names.get("out", "")
    # A stack and no recursion, which Python is slow at.
    stack: list[tuple[str, nn.Module, _Expected]] = [("", model, expected)]
    is_training = model.training
    shared = model.config
    while stack:
        path, module, wanted = stack.pop()
        found = type(module)
        state = module.__dict__
        if found is not wanted.module_class and not (module is model and issubclass(found, base)):
            if _computes_the_same(module, wanted):
                _check_hooks(path, module)
                _check_shadows(path, module)
                classes.add(found)
                continue
            _refuse_class(path, module, wanted)
        # What a subclass of the model has besides was looked at above.
        classes.add(wanted.module_class)
        if state["_forward_hooks"] or state["_forward_pre_hooks"]:
            _check_hooks(path, module)
        if state["training"] and not is_training and wanted.drops_out and getattr(module, "p", 1.0):
            raise ValueError(
                f"model.{path} must be in eval mode as the model is, got it in training mode: fastcls drops nothing "
                "out, and so gives no samples for Monte-Carlo dropout. Call model.eval()"
            )
        for name, value in wanted.values:
            own = state.get(name, _NOTHING)
            if own is not value and own != value and not _same(own, value):
                _refuse(_join(path, name), repr(value), repr(own))
        if not state.keys() <= wanted.attributes:
            _check_shadows(path, module)
        if state.get("config", shared) is not shared:
            _check_config(path, state["config"], shared)
        parameters = state["_parameters"]
        if len(parameters) != len(wanted.parameters):
            _refuse_parameters(path, parameters, wanted)
        for name, shape in wanted.parameters:
            parameter = parameters.get(name)
            if (None if parameter is None else parameter.shape) != shape:
                # How many labels or words there are is the head's own affair.
                if path == out and parameter is not None and shape is not None and parameter.shape[1:] == shape[1:]:
                    continue
                _refuse_parameters(path, parameters, wanted)
        if state["_buffers"] or wanted.buffers:
            _check_buffers(path, state["_buffers"], wanted)
        children = state["_modules"]
        if len(children) != len(wanted.children):
            children = _without_pooler(path, children, wanted, head)
        elif found is nn.ModuleList and list(children) != list(wanted.children):
            _refuse(path, f"in the order {', '.join(wanted.children)}", f"in the order {', '.join(children)}")
        # The first child is looked at first.
        for name, child in reversed([*wanted.children.items()]):
            own = children.get(name)
            if child is None or own is None:
                if child is not None and name in children and _is_missing_pooler(path, name, own, head):
                    continue
                if child is not own or name not in children:
                    _refuse(_join(path, name), _named(child), "nothing" if own is None else _class_name(own))
                continue
            stack.append((_join(path, name), own, child))
    _check_code(classes)
    _check_attention(model)
    for hooks in (module_calls._global_forward_hooks, module_calls._global_forward_pre_hooks):
        if hooks:
            raise ValueError(
                "there must be no forward hooks on all modules (torch.nn.modules.module), got "
                f"{_names_of(hooks.values())}: fastcls would pass them by"
            )


def _refuse(path: str, needed: str, found: str) -> NoReturn:
    raise ValueError(
        f"model.{path} must be {needed}, as the model's config and class say, got {found}: "
        "fastcls would compute the former"
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _class_name(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _named(expected: _Expected | None) -> str:
    return "nothing" if expected is None else f"a {expected.module_class.__qualname__}"


def _refuse_class(path: str, module: nn.Module, wanted: _Expected) -> NoReturn:
    name = _class_name(module)
    raise ValueError(
        f"model.{path} must be {_named(wanted)}, as transformers builds it, got a {name}: {advice_for(module)}"
    )


def advice_for(module: object) -> str:
    """What to do about a module, or a wrapper, that is not transformers' own."""
    return _advice(_class_name(module))


def _advice(name: str) -> str:
    name = name.lower()
    if "peft" in name or "lora" in name or "adapter" in name:
        return "merge adapters into the weights first, with merge_and_unload() of the PEFT model"
    if any(word in name for word in ("quant", "bitsandbytes", "bnb", "8bit", "4bit", "int8", "gptq", "awq", "hqq")):
        return "layers that were quantised are not taken: optimize the model as it was, in bfloat16 or float32"
    if "fsdp" in name or "distributed" in name or "dataparallel" in name:
        return "give the model that it wraps, whole and on one device (often its attribute module)"
    if "optimizedmodule" in name:
        return "give the model that was compiled (_orig_mod), and compile what optimize returns"
    return "fastcls does not compute what other code than transformers' own does"


def _check_hooks(path: str, module: nn.Module) -> None:
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    # A call that asks for hidden states, and gradient checkpointing, leave hooks of transformers' own, which change no
    # answer.
    strangers = [hook for hook in hooks if not isinstance(hook, FunctionType) or not _is_in(hook, _TRANSFORMERS)]
    if strangers:
        raise ValueError(
            f"{f'model.{path}' if path else 'model'} must have no forward hooks, got {_names_of(strangers)}: fastcls "
            "would pass them by. Remove them (handle.remove()), or register them on what optimize returns"
        )


def _names_of(hooks: Iterable[object]) -> str:
    return ", ".join(getattr(hook, "__qualname__", type(hook).__qualname__) for hook in hooks)


def _check_shadows(path: str, module: nn.Module) -> None:
    """Attributes that a module has besides: those that stand before a method of its class change what it computes."""
    for name in module.__dict__.keys() - _OF_EVERY_MODULE:
        if any(part in name for part in _NOT_IN_FORWARD):
            continue
        found = module.__dict__[name]
        if name == "_compiled_call_impl" and (
            found is None or (isinstance(found, FunctionType) and _is_in(found, _TRUSTED))
        ):
            # `nn.Module.compile` keeps the compiled call beside the module's own, which computes the same.
            continue
        of_class = getattr(type(module), name, None)
        if name in ("_loss_function", "_compiled_call_impl") or (callable(of_class) and not isinstance(of_class, type)):
            hint = ""
            if hasattr(module, "_hf_hook"):
                hint = " (accelerate's hook: load the model on one device, without device_map)"
            elif hasattr(module, "_original_forward"):
                hint = " (accelerate's: give accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
            raise ValueError(
                f"model.{_join(path, name)} must be its class's own, got one set on the instance, "
                f"{getattr(found, '__qualname__', found)!s}{hint}: fastcls would pass it by"
            )


def _check_config(path: str, own: PreTrainedConfig, shared: PreTrainedConfig) -> None:
    """What a module reads from a config of its own is what the model's says."""
    for name, value in vars(shared).items():
        found = getattr(own, name, None)
        if name not in _LABELS and not name.startswith("_") and found is not value and repr(found) != repr(value):
            _refuse(_join(path, f"config.{name}"), repr(value), repr(found))
    if own._attn_implementation != shared._attn_implementation:
        _refuse(_join(path, "config"), f"for {shared._attn_implementation}", own._attn_implementation)


def _refuse_parameters(path: str, parameters: Mapping[str, Any], wanted: _Expected) -> NoReturn:
    expected = {name: None if shape is None else tuple(shape) for name, shape in wanted.parameters}
    found = {name: None if each is None else tuple(each.shape) for name, each in parameters.items()}
    for name in dict.fromkeys((*expected, *found)):
        if expected.get(name, "nothing") != found.get(name, "nothing"):
            break
    raise ValueError(
        f"model.{_join(path, name)} must have shape {expected.get(name)}, as the model's config says, got "
        f"{found.get(name)}: fastcls would compute something else (heads that were pruned are not taken, "
        "adapters must be merged first)"
    )


def _check_buffers(path: str, buffers: Mapping[str, Tensor | None], wanted: _Expected) -> None:
    if set(buffers) != set(wanted.buffers):
        _refuse(path, f"with the buffers {', '.join(wanted.buffers) or 'none'}", f"{', '.join(buffers) or 'none'}")
    for name, values in buffers.items():
        if values is None or values.is_meta:
            continue
        if name == "position_ids":
            if not torch.equal(values, torch.arange(values.shape[-1], device=values.device).expand_as(values)):
                _refuse(_join(path, name), "0, 1, 2, ...", "other numbers")
        elif name == "token_type_ids" and bool(values.any()):
            _refuse(_join(path, name), "zeros", "other numbers")


def _is_missing_pooler(path: str, name: str, own: object, head: HeadSpec) -> bool:
    return own is None and head.task == "encoder" and _join(path, name) == "pooler"


def _without_pooler(
    path: str, children: Mapping[str, nn.Module | None], wanted: _Expected, head: HeadSpec
) -> Mapping[str, nn.Module | None]:
    """The children, of an encoder that was made without its pooler with None for it."""
    differing = children.keys() ^ wanted.children.keys()
    if differing == {"pooler"} and "pooler" not in children and not path and head.task == "encoder":
        return {**children, "pooler": None}
    name = sorted(differing)[0]
    found = _class_name(children[name]) if name in children else "nothing"
    _refuse(_join(path, name), _named(wanted.children.get(name)), f"{found} (adapters must be merged first)")


def _computes_the_same(module: nn.Module, wanted: _Expected) -> bool:
    """Whether a module of another class computes what the twin's does."""
    if wanted.module_class in (nn.Dropout, nn.Identity) and type(module) in (nn.Dropout, nn.Identity):
        # Neither does anything in eval mode.
        return not module.training or isinstance(module, nn.Identity) or not module.p
    return wanted.activation is not None and activation_in(module) == wanted.activation


def _same(found: Any, value: Any) -> bool:
    if isinstance(value, (bool, int, float, str, type(None), torch.dtype)):
        return type(found) in (type(value), int, float) and bool(found == value)
    if isinstance(value, (tuple, list)):
        return isinstance(found, (tuple, list)) and len(found) == len(value) and all(map(_same, found, value))
    if isinstance(value, Mapping):
        return isinstance(found, Mapping) and found == value
    if isinstance(value, functools.partial):
        is_partial = isinstance(found, functools.partial) and found.func is value.func
        return is_partial and (found.args, found.keywords) == (value.args, value.keywords)
    if callable(value):
        return getattr(found, "__func__", found) is getattr(value, "__func__", value)
    return type(found) is type(value)


class _Nothing:
    def __repr__(self) -> str:
        return "nothing"


_NOTHING = _Nothing()

# What transformers builds, by the class and its config: some milliseconds each.
_twins: dict[object, _Expected] = {}
_MAX_TWINS = 64
# How many labels there are the head's own weights say.
_LABELS = frozenset({"id2label", "label2id"})


def _expected(base: type[PreTrainedModel], config: PreTrainedConfig) -> _Expected:
    key = (base, *((name, repr(value)) for name, value in vars(config).items() if name not in _LABELS))
    if key not in _twins:
        if len(_twins) >= _MAX_TWINS:
            _twins.clear()
        # A model sets attributes of the config that it is given.
        own = copy.deepcopy(config)
        try:
            with torch.device("meta"):
                twin = base(own).eval()
        except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
            raise ValueError(f"model.config must build a {base.__name__}, got {error}") from error
        _twins[key] = _expectation(twin)
    return _twins[key]


def _expectation(module: nn.Module) -> _Expected:
    is_model = isinstance(module, PreTrainedModel)
    # Where positions begin.
    kept = {_PADDING} if hasattr(module, "position_embeddings") or hasattr(module, "word_embeddings") else set()
    values = tuple(
        (name, value)
        for name, value in module.__dict__.items()
        if name not in _OF_EVERY_MODULE
        and (name not in _WITHOUT_EFFECT or name in kept)
        and not name.startswith("_")
        and not (is_model and name == "all_tied_weights_keys")
        and not isinstance(value, (PreTrainedConfig, nn.Module))
        # Those that are set to None stand among the modules once they are there.
        and not (value is None and is_model)
    )
    return _Expected(
        type(module),
        frozenset(module.__dict__) | _MARKS,
        values,
        tuple((name, None if each is None else each.shape) for name, each in module._parameters.items()),
        tuple(module._buffers),
        {name: None if child is None else _expectation(child) for name, child in module._modules.items()},
        activation_in(module),
        _reads_training(type(module)),
    )


def _reads_training(module_class: type[nn.Module]) -> bool:
    """Whether a module computes something else in training mode, as one that drops out does."""
    return any("training" in function.__code__.co_names for function in _unwrapped(module_class.forward))


def _check_subclass(found: type[PreTrainedModel], base: type[PreTrainedModel]) -> None:
    """A subclass may add to the model, and replace what ``forward`` does not reach."""
    if found is base:
        return
    for each in found.__mro__:
        if each in base.__mro__:
            continue
        for name, value in vars(each).items():
            theirs = getattr(base, name, None)
            is_method = callable(value) or isinstance(value, (property, classmethod, staticmethod))
            if (
                theirs is not None
                and value is not theirs
                and is_method
                and not isinstance(value, type)
                and getattr(found, name, None) is not theirs
                and not any(part in name for part in _NOT_IN_FORWARD)
            ):
                raise ValueError(
                    f"model must compute as {base.__name__} does, got {each.__qualname__} with a {name} of its own: "
                    f"{_advice(each.__qualname__)}"
                )


# Functions that were found to be transformers' own.
_known: set[FunctionType] = set()


def _check_object(name: str, value: object) -> None:
    """The same of an object that may stand in a function's place: what calling it runs."""
    if isinstance(value, type) or not callable(value):
        return
    # Of a method, its function.
    for function in (getattr(value, "__func__", None), *(getattr(type(value), each, None) for each in _CALLED)):
        if type(function) is FunctionType and function not in _known:
            _check_own(name, function)


def _check_code(classes: set[type]) -> None:
    """The code that the classes run is transformers' and torch's own: neither they nor their modules were patched."""
    modules = set()
    for each in classes:
        place = f"{each.__module__}.{each.__qualname__}"
        for name, value in vars(each).items():
            function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
            if type(function) is FunctionType:
                if function not in _known:
                    _check_own(f"{place}.{name}", function)
            elif name == "forward":
                raise ValueError(f"{place}.forward must be transformers' own, got {value!r}: fastcls would pass it by")
            else:
                _check_object(f"{place}.{name}", function)
        for above in each.__mro__[1:]:
            for name in (*_CALLS, "forward"):
                function = vars(above).get(name)
                if type(function) is FunctionType and function not in _known:
                    _check_own(f"{above.__module__}.{above.__qualname__}.{name}", function)
        modules.add(each.__module__)
    for module in modules:
        if module.startswith("transformers.models."):
            for name, value in vars(sys.modules[module]).items():
                if type(value) is FunctionType:
                    if value not in _known:
                        _check_own(f"{module}.{name}", value)
                elif isinstance(value, functools.partial):
                    raise ValueError(f"{module}.{name} must be transformers' own, got {value!r}")
                else:
                    _check_object(f"{module}.{name}", value)
    for name in _FUNCTIONS:
        value = getattr(torch.nn.functional, name)
        if type(value) is FunctionType:
            if value not in _known:
                _check_own(f"torch.nn.functional.{name}", value)
        elif value is not getattr(torch._C._nn, name, None):
            raise ValueError(f"torch.nn.functional.{name} must be torch's own, got {value!r}: fastcls would pass it by")


def _check_own(name: str, function: FunctionType) -> None:
    stranger = _stranger(function)
    if stranger is not None:
        raise ValueError(
            f"{name} must be transformers' own, got {stranger.__qualname__} from {stranger.__code__.co_filename}: "
            "fastcls would pass it by"
        )
    _known.add(function)


def _stranger(function: Any) -> FunctionType | None:
    """The function, or the one that it wraps, whose code is neither transformers', torch's nor Python's."""
    return next((each for each in _unwrapped(function) if not _is_in(each, _TRUSTED) and not _is_pythons(each)), None)


def _is_in(function: FunctionType, folders: str | tuple[str, ...]) -> bool:
    file = function.__code__.co_filename
    return file.startswith(folders) or os.path.realpath(file).startswith(folders)


def _is_pythons(function: FunctionType) -> bool:
    file = os.path.realpath(function.__code__.co_filename)
    return file.startswith(_STANDARD_LIBRARY) and "-packages" not in file


def _unwrapped(function: Any) -> Iterator[FunctionType]:
    while isinstance(function, FunctionType):
        yield function
        function = getattr(function, "__wrapped__", None)


def _check_attention(model: PreTrainedModel) -> None:
    name = model.config._attn_implementation
    if name in (None, OUR_ATTENTION):
        return
    functions = [
        registered.get(name)
        for registered in (modeling_utils.ALL_ATTENTION_FUNCTIONS, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS)
    ]
    # The eager one is a function of the model's own module.
    is_missing = functions[0] is None and name != "eager"
    strangers = [
        each
        for each in functions
        if each is not None and (type(each) is not FunctionType or _stranger(each) is not None)
    ]
    if is_missing or strangers:
        found = ", ".join(getattr(each, "__qualname__", str(each)) for each in strangers) or "nothing"
        raise ValueError(
            f"model.config._attn_implementation must be one of transformers' own, got {name!r} ({found}): "
            'fastcls would pass it by. Use model.set_attn_implementation("sdpa")'
        )
