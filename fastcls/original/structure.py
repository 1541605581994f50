"""Is a model what its config builds? fastcls reads modules and config, and runs none of their ``forward``s.

So each module is compared with the one at its place in a twin: the model that transformers itself builds from the
config, without memory for weights. A module of another class, another value in one, a hook, a patched ``forward``: each
makes the model compute something else, and the error gives its path.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_calls
from transformers import PreTrainedConfig, PreTrainedModel

from ..engine.spec import HeadSpec
from ..families import Family, activation_in
from .adapters import check_around, copies, is_around
from .own_code import (
    NOT_IN_FORWARD,
    TRANSFORMERS,
    TRUSTED,
    advice_for,
    check_attention,
    check_code,
    check_functions,
    check_subclass,
    class_name,
    is_in,
    unwrapped,
)

# Attributes of modules that change nothing in eval mode.
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
        "vocab_size",
    }
)
# Without effect, too, except in embeddings, where it says at which position a text begins.
_PADDING = "padding_idx"
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
# Marks that transformers leaves on modules whose weights it has made or loaded.
_MARKS = frozenset({"_is_hf_initialized"})


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
    """The model's config with the values that its modules were built with, even if the config was edited since."""
    config: PreTrainedConfig = model.config
    built: dict[str, Any] = {}
    for name, read in family.built.items():
        try:
            value = read(encoder, config)
        except (AttributeError, IndexError, TypeError, ZeroDivisionError):
            # A module is not what it should be: `check_structure` says so, with its path.
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
        base: its class in transformers.
        config: the config from `config_as_built`.
        head: read from that config.

    Raises:
        ValueError: a module computes something else than the config says; it gives the path and what was found.
    """
    check_functions()
    key, expected = _expected(base, config)
    check_subclass(type(model), base, expected.children.keys())
    classes: set[type] = {base}
    out = head.names.get("out", "")
    # A stack, since recursion is slow in Python.
    stack: list[tuple[str, nn.Module, _Expected]] = [("", model, expected)]
    is_training = model.training
    shared = model.config
    while stack:
        path, module, wanted = stack.pop()
        found = type(module)
        state = module.__dict__
        if is_around(module):
            check_around(module, path)
            stack.extend((path, each, wanted) for each in copies(module))
            continue
        if found is not wanted.module_class and not (module is model and issubclass(found, base)):
            if _computes_the_same(module, wanted):
                _check_hooks(path, module)
                _check_shadows(path, module)
                classes.add(found)
                continue
            _refuse_class(path, module, wanted)
        # `check_subclass` has looked at whatever a subclass of the model adds.
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
                # The head's own weights say how many labels or words there are.
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
        # Reversed, so that the first child is popped first.
        for name, child in reversed([*wanted.children.items()]):
            own = children.get(name)
            if child is None or own is None:
                if child is not None and name in children and _is_missing_pooler(path, name, own, head):
                    continue
                if child is not own or name not in children:
                    _refuse(_join(path, name), _named(child), "nothing" if own is None else class_name(own))
                continue
            stack.append((_join(path, name), own, child))
    check_code(classes)
    check_attention(model)
    for hooks in (module_calls._global_forward_hooks, module_calls._global_forward_pre_hooks):
        if hooks:
            raise ValueError(
                "there must be no forward hooks on all modules (torch.nn.modules.module), got "
                f"{_names_of(hooks.values())}: fastcls would pass them by"
            )
    # Last, once all code is known to be transformers' own: a twin of a patched class must not be kept.
    _keep(key, expected)


def _refuse(path: str, needed: str, found: str) -> NoReturn:
    raise ValueError(
        f"model.{path} must be {needed}, as the model's config and class say, got {found}: "
        "fastcls would compute the former"
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _named(expected: _Expected | None) -> str:
    return "nothing" if expected is None else f"a {expected.module_class.__qualname__}"


def _refuse_class(path: str, module: nn.Module, wanted: _Expected) -> NoReturn:
    name = class_name(module)
    raise ValueError(
        f"model.{path} must be {_named(wanted)}, as transformers builds it, got a {name}: {advice_for(module)}"
    )


def _check_hooks(path: str, module: nn.Module) -> None:
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    # Gradient checkpointing, and a call that asks for hidden states, leave transformers' own hooks, which change no
    # answer.
    strangers = [hook for hook in hooks if not isinstance(hook, FunctionType) or not is_in(hook, TRANSFORMERS)]
    if strangers:
        raise ValueError(
            f"{f'model.{path}' if path else 'model'} must have no forward hooks, got {_names_of(strangers)}: fastcls "
            "would pass them by. Remove them (handle.remove()), or register them on what optimize returns"
        )


def _names_of(hooks: Iterable[object]) -> str:
    return ", ".join(getattr(hook, "__qualname__", type(hook).__qualname__) for hook in hooks)


def _check_shadows(path: str, module: nn.Module) -> None:
    """Refuses instance attributes that hide a method of the module's class: they change what it computes."""
    for name in module.__dict__.keys() - _OF_EVERY_MODULE:
        if any(part in name for part in NOT_IN_FORWARD):
            continue
        found = module.__dict__[name]
        if name == "_compiled_call_impl" and (
            found is None or (isinstance(found, FunctionType) and is_in(found, TRUSTED))
        ):
            # Set by `nn.Module.compile`: the compiled call computes the same as the module's own.
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
    """Checks that a module's own config agrees with the model's in all that the module reads from it."""
    for name, value in vars(shared).items():
        found = getattr(own, name, value)
        if (
            name not in _NOT_BUILT
            and name not in _NOT_COMPUTED
            and not name.startswith("_")
            and found is not value
            and repr(found) != repr(value)
        ):
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
    """The children, with None for the pooler of an encoder that was made without one."""
    differing = children.keys() ^ wanted.children.keys()
    if differing == {"pooler"} and "pooler" not in children and not path and head.task == "encoder":
        return {**children, "pooler": None}
    name = sorted(differing)[0]
    found = class_name(children[name]) if name in children else "nothing"
    _refuse(_join(path, name), _named(wanted.children.get(name)), f"{found} (adapters must be merged first)")


def _computes_the_same(module: nn.Module, wanted: _Expected) -> bool:
    """Whether a module of another class computes what the twin's does."""
    if wanted.module_class in (nn.Dropout, nn.Identity) and type(module) in (nn.Dropout, nn.Identity):
        # In eval mode neither does anything.
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

# Twins by their class and config, since building one takes some milliseconds.
_twins: dict[object, _Expected] = {}
_MAX_TWINS = 64
# Options that no module reads. The number of labels comes from the head's own weights.
_NOT_BUILT = frozenset(
    {
        *("architectures", "dtype", "finetuning_task", "id2label", "label2id", "model_name", "name_or_path"),
        *("problem_type", "task_specific_params", "tokenizer_class", "torch_dtype", "transformers_version"),
    }
)


# Options that a module reads from a config of its own when it is built or trained, but not in a pass in eval mode.
_NOT_COMPUTED = frozenset(
    {
        *("attention_dropout", "attention_probs_dropout_prob", "classifier_dropout", "classifier_dropout_prob"),
        *("cls_dropout", "dropout", "embedding_dropout", "hidden_dropout_prob", "mlp_dropout", "pooler_dropout"),
        *("qa_dropout", "seq_classif_dropout", "initializer_cutoff_factor", "initializer_range", "use_cache"),
        *("gradient_checkpointing",),
    }
)


def _expected(base: type[PreTrainedModel], config: PreTrainedConfig) -> tuple[object, _Expected]:
    """The twin that a class builds from a config, and its key in `_twins`."""
    key = (base, *((name, repr(value)) for name, value in vars(config).items() if name not in _NOT_BUILT))
    if key in _twins:
        return key, _twins[key]
    # A copy, since a model sets attributes of the config that it is given.
    own = copy.deepcopy(config)
    try:
        with torch.device("meta"):
            twin = base(own).eval()
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise ValueError(f"model.config must build a {base.__name__}, got {error}") from error
    return key, _expectation(twin)


def _keep(key: object, expected: _Expected) -> None:
    if key not in _twins and len(_twins) >= _MAX_TWINS:
        _twins.clear()
    _twins[key] = expected


def _expectation(module: nn.Module) -> _Expected:
    is_model = isinstance(module, PreTrainedModel)
    # In embeddings `padding_idx` says where positions begin.
    kept = {_PADDING} if hasattr(module, "position_embeddings") or hasattr(module, "word_embeddings") else set()
    values = tuple(
        (name, value)
        for name, value in module.__dict__.items()
        if name not in _OF_EVERY_MODULE
        and (name not in _WITHOUT_EFFECT or name in kept)
        and not name.startswith("_")
        and not (is_model and name == "all_tied_weights_keys")
        and not isinstance(value, (PreTrainedConfig, nn.Module))
        # A None may be the place of a module, which stands among the modules once it is there.
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
    """Whether a module computes something else in training mode, as dropout does."""
    return any("training" in function.__code__.co_names for function in unwrapped(module_class.forward))
