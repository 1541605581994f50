"""Loading checkpoints from disk or the hub, with errors that say what is wrong with them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging
from transformers.utils.peft_utils import find_adapter_config_file

from .engine.batch import shortened
from .engine.spec import Quantize, Task, check_quantize
from .families import FAMILIES, Family, class_for_task, supported
from .labels import label_names
from .texts import first_line, read_count

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# Options of transformers' from_pretrained, by the part that takes them.
_HUB_OPTIONS = frozenset(
    (
        "cache_dir",
        "force_download",
        "local_files_only",
        "proxies",
        "revision",
        "subfolder",
        "token",
        "trust_remote_code",
    )
)
# Types of the options that are more than true or false: with other types transformers would fail far from here.
_OPTION_TYPES: dict[str, tuple[type, ...]] = {
    "cache_dir": (str, os.PathLike),
    "proxies": (Mapping,),
    "revision": (str,),
    "subfolder": (str, os.PathLike),
    "token": (str, bool),
    "variant": (str,),
}
_CONFIG_OPTIONS = frozenset(("id2label", "label2id", "num_labels", "problem_type"))
_MODEL_OPTIONS = frozenset(("use_safetensors", "variant", "weights_only"))
_TOKENIZER_OPTIONS = frozenset(
    (
        "add_prefix_space",
        "additional_special_tokens",
        "bos_token",
        "clean_up_tokenization_spaces",
        "cls_token",
        "do_basic_tokenize",
        "do_lower_case",
        "eos_token",
        "extra_special_tokens",
        "fix_mistral_regex",
        "from_slow",
        "keep_accents",
        "mask_token",
        "model_input_names",
        "model_max_length",
        "never_split",
        "pad_token",
        "padding_side",
        "remove_space",
        "sep_token",
        "sp_model_kwargs",
        "split_special_tokens",
        "strip_accents",
        "tokenize_chinese_chars",
        "tokenizer_type",
        "trim_offsets",
        "truncation_side",
        "unk_token",
        "use_fast",
    )
)
# Advice for options that are not taken.
_ONE_DEVICE = "pass device=, since fastcls runs on one"
_OWN_DTYPES = "pass dtype=: fastcls computes in float32, float16 or bfloat16"
_OWN_INT8 = f'{_OWN_DTYPES}, and with quantize="int8" in int8'
_AT_EACH_CALL = "pass it to each call"
_INSTEAD = {
    "torch_dtype": "pass dtype=",
    "code_revision": "leave it out: fastcls runs transformers' own code alone",
    "device_map": _ONE_DEVICE,
    "max_memory": _ONE_DEVICE,
    "tp_plan": _ONE_DEVICE,
    "quantization_config": _OWN_INT8,
    "load_in_4bit": _OWN_DTYPES,
    "load_in_8bit": _OWN_INT8,
    "ignore_mismatched_sizes": "leave it out: answers from weights that are not the checkpoint's would mean nothing",
    "attn_implementation": "leave it out: fastcls has its own attention",
    "use_auth_token": "pass token=",
    "low_cpu_mem_usage": "leave it out: transformers does so by itself",
    "max_length": "pass model_max_length=, or max_length= to each call",
    "batch_size": _AT_EACH_CALL,
    "function_to_apply": _AT_EACH_CALL,
    "padding": _AT_EACH_CALL,
    "top_k": _AT_EACH_CALL,
}
_ELSE = "load the model with transformers' from_pretrained, which takes it, and pass it to fastcls.Classifier"


class LoadingOptions(NamedTuple):
    """Options for a checkpoint's files, by the part that takes them: those of the hub are for all."""

    hub: dict[str, Any]
    config: dict[str, Any]
    model: dict[str, Any]
    tokenizer: dict[str, Any]


def sorted_options(options: Mapping[str, Any]) -> LoadingOptions:
    """Sorts the options that a caller gives to one function by the part that takes each.

    Raises:
        TypeError: an option that nothing takes, or a value of the wrong type.
    """
    found = LoadingOptions({}, {}, {}, {})
    known = (_HUB_OPTIONS, _CONFIG_OPTIONS, _MODEL_OPTIONS, _TOKENIZER_OPTIONS)
    for name, value in options.items():
        if value is None and name in _HUB_OPTIONS | _MODEL_OPTIONS:
            # For some of them None does not mean the default.
            continue
        types = _OPTION_TYPES.get(name, (object,))
        if not isinstance(value, types):
            wanted = " or ".join(each.__name__ for each in types)
            raise TypeError(f"{name} must be a {wanted}, got {type(value).__name__}: {shortened(value)}")
        takers = [taken for taken, names in zip(found, known, strict=True) if name in names]
        if takers:
            takers[0][name] = value
        elif not _asks_for_nothing(name, value):
            raise TypeError(f"from_pretrained takes no option {name}: {_INSTEAD.get(name, _ELSE)}")
    return found


def _asks_for_nothing(name: str, value: object) -> bool:
    if name == "attn_implementation":
        # Without effect: only the model's weights are used.
        return value in (None, "eager", "sdpa")
    return name in _INSTEAD and (value is None or value is False)


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """ "bfloat16" and the like as a torch.dtype; None, or "auto", is None.

    Raises:
        ValueError: anything else.
    """
    # A CPU may compute a model in float64, for proving exactness.
    if dtype in (*_DTYPES.values(), torch.float64):
        return dtype
    if dtype in (None, "auto"):
        return None
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        remedy = ': pass quantize="int8"' if dtype in ("int8", torch.int8) else ""
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}{remedy}")
    return _DTYPES[dtype]


def parse_quantize(quantize: str | None) -> Quantize | None:
    """ "int8", or None.

    Raises:
        ValueError: anything else.
    """
    check_quantize(quantize)
    return cast("Quantize | None", quantize)


def parse_device(device: str | torch.device | None) -> torch.device:
    """The device to run on; None is the GPU if there is one, else the CPU.

    Raises:
        ValueError: torch cannot use the device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed = torch.device(device)
        torch.empty(0, device=parsed)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device must be one that torch can use here, got {device!r}: {first_line(error)}") from error
    return parsed


def load_model(
    name_or_path: str | os.PathLike[str],
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    task: Task | None = "sequence classification",
    config_options: Mapping[str, Any] | None = None,
    **hub_options: Any,
) -> PreTrainedModel:
    """A transformers model in eval mode.

    Args:
        name_or_path: a folder with a checkpoint, or a name on the hub.
        device: where to put it.
        dtype: None keeps the checkpoint's own.
        task: the task that it must be for; None takes the class that its config names, whatever its task.
        config_options: ``num_labels``, ``id2label``, ``label2id`` and ``problem_type``, instead of the config's own.
        hub_options: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and the like, for transformers.

    Raises:
        FileNotFoundError: the folder does not exist.
        TypeError: its model class is not supported, or ``name_or_path`` is neither a folder nor a name.
        ValueError: the checkpoint is damaged, quantised or an adapter, or its config asks for something that fastcls
            does not compute, or it holds no trained head, so that its answers would be random, or with ``task=None``
            its config names no class, or a config option does not fit it.
        OSError: the hub does not have the model, or cannot be reached.
    """
    config = read_config(name_or_path, hub_options)
    of_checkpoint = config.num_labels
    _set_options(config, config_options or {})
    # An unsupported model is refused before its weights are fetched and read.
    family, model_class = _class_in_config(name_or_path, config) if task is None else class_for_task(config, task)
    family.spec(config)
    found_task = family.head(model_class, config).task
    # The context overrides torch's default device, which may be "meta".
    with quiet_transformers(), _readable_errors(name_or_path, hub_options), torch.device("cpu"):
        model, info = getattr(transformers, model_class).from_pretrained(
            name_or_path,
            config=config,
            dtype=dtype or "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **hub_options,
        )
    if info["mismatched_keys"]:
        name, found, needed = sorted(info["mismatched_keys"])[0]
        if config.num_labels != of_checkpoint:
            asked = "num_labels" if (config_options or {}).get("num_labels") is not None else "id2label"
            raise ValueError(
                f"{asked} must fit {name_or_path}, got {config.num_labels} labels: its {name} is {tuple(found)}"
            )
        raise ValueError(
            f"cannot load {name_or_path}, the checkpoint does not fit its config.json: "
            f"{name} is {tuple(found)}, the config asks for {tuple(needed)}"
        )
    missing = sorted(info["missing_keys"])
    if found_task == "encoder":
        # States do not come from the pooler, and many embedders are saved without one.
        missing = [name for name in missing if not name.startswith("pooler.")]
    if missing:
        raise ValueError(
            f"{name_or_path} holds no weights for {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}: "
            f"it is not trained for {found_task}, and answers from random weights would mean nothing"
        )
    # nn.Module.to, because transformers' wrapper around it hides its types.
    return cast(PreTrainedModel, nn.Module.to(model, device)).eval()


def load_config(name: str, task: Task) -> tuple[PreTrainedConfig, Family]:
    """A checkpoint's config, and the family that computes it.

    Raises:
        FileNotFoundError, TypeError, ValueError, OSError: as `load_model`, as far as a config tells.
    """
    config = read_config(name, {})
    return config, class_for_task(config, task)[0]


def read_config(name_or_path: str | os.PathLike[str], hub_options: Mapping[str, Any]) -> PreTrainedConfig:
    """A checkpoint's config, as transformers reads it.

    Args:
        name_or_path, hub_options: see `load_model`.

    Raises:
        FileNotFoundError, TypeError, ValueError, OSError: as `load_model`, as far as a config tells.
    """
    check_place(name_or_path, hub_options.get("subfolder"))
    with quiet_transformers(), _readable_errors(name_or_path, hub_options):
        config = AutoConfig.from_pretrained(name_or_path, **hub_options)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{name_or_path} must be a checkpoint in bfloat16, float16 or float32, got a quantised one "
            "(quantization_config in its config.json), which is not taken: load the model as it was before"
        )
    return cast(PreTrainedConfig, config)


def _set_options(config: PreTrainedConfig, options: Mapping[str, Any]) -> None:
    id2label, label2id, count, problem_type = map(options.get, ("id2label", "label2id", "num_labels", "problem_type"))
    if problem_type is not None:
        if problem_type not in _PROBLEM_TYPES:
            raise ValueError(f"problem_type must be one of {', '.join(_PROBLEM_TYPES)}, got {problem_type!r}")
        config.problem_type = problem_type
    if count is not None:
        count = read_count("num_labels", count)
        if id2label is not None and hasattr(id2label, "__len__") and len(id2label) != count:
            raise ValueError(f"num_labels must be the number of names in id2label, {len(id2label)}, got {count}")
        config.num_labels = count
    if id2label is not None:
        # `label_names` refuses anything without a length.
        names = label_names(id2label, len(id2label) if hasattr(id2label, "__len__") else 1)
        config.id2label = dict(enumerate(names))
        with contextlib.suppress(TypeError):
            # Names of some types cannot be keys.
            config.label2id = {name: index for index, name in enumerate(names)}
    if label2id is not None:
        if not isinstance(label2id, Mapping):
            raise ValueError(f"label2id must be a mapping from names to ids, got {shortened(label2id)}")
        config.label2id = dict(label2id)


def _class_in_config(name_or_path: str | os.PathLike[str], config: PreTrainedConfig) -> tuple[Family, str]:
    names = getattr(config, "architectures", None) or []
    if not names:
        raise ValueError(
            f"cannot tell what {name_or_path} is for: its config.json must name a model class in architectures"
        )
    for family in FAMILIES:
        if family.model_type == config.model_type and names[0] in family.heads:
            return family, names[0]
    raise TypeError(f"model must be {supported()}, got {names[0]} with a config of {config.model_type!r}")


def load_tokenizer(name_or_path: str | os.PathLike[str], **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a checkpoint.

    Args:
        name_or_path: see `load_model`.
        options: those of the hub, and the tokenizer's own, ``model_max_length`` and the like.

    Raises:
        ValueError: there is no tokenizer, it is damaged, or it does not take an option's value.
        FileNotFoundError, OSError, TypeError: as `load_model`.
    """
    check_place(name_or_path, options.get("subfolder"))
    if options.get("model_max_length") is not None:
        options["model_max_length"] = read_count("model_max_length", options["model_max_length"])
    own = sorted(_TOKENIZER_OPTIONS.intersection(options))
    of_hub = {name: value for name, value in options.items() if name in _HUB_OPTIONS}
    with quiet_transformers(), _readable_errors(name_or_path, of_hub, own):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **options)
    # If its files are missing, transformers makes a tokenizer without words, and every text becomes the same.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(f"{name_or_path} holds no tokenizer: save it there with tokenizer.save_pretrained")
    return tokenizer


def check_place(name_or_path: object, subfolder: str | os.PathLike[str] | None = None) -> None:
    """Checks that a checkpoint's name is one of the hub's, or a folder that holds one.

    Raises:
        TypeError: neither.
        FileNotFoundError: no such folder, or one without a config.
        ValueError: a file, or an adapter.
    """
    if not isinstance(name_or_path, (str, os.PathLike)) or not os.fspath(name_or_path):
        remedy = ""
        if isinstance(name_or_path, nn.Module):
            remedy = ": pass a model that is loaded already to fastcls.Classifier, with its tokenizer"
        found = "an empty name" if name_or_path == "" else type(name_or_path).__name__
        raise TypeError(f"name_or_path must be a folder or a name on the hub, got {found}{remedy}")
    path = Path(name_or_path)
    # Names on the hub are "model" or "owner/model"; anything else can only be a path.
    looks_like_path = path.is_absolute() or len(path.parts) > 2 or str(path).startswith((".", "~"))
    if looks_like_path and not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: there is no such folder")
    if path.exists() and not path.is_dir():
        raise ValueError(f"a checkpoint must be a folder with config.json and weights, got the file {path}")
    if not path.is_dir():
        return
    place = path / (subfolder or "")
    if not place.is_dir():
        raise FileNotFoundError(f"subfolder must be a folder in {path}, got {str(subfolder)!r}: there is none")
    if (place / "adapter_config.json").is_file():
        # Even beside a whole model: transformers would add the adapter to it, or without PEFT leave it out.
        raise _adapter(str(place))
    if not (place / "config.json").is_file():
        raise FileNotFoundError(f"no checkpoint at {place}: the folder has no config.json")


def _adapter(place: str) -> ValueError:
    return ValueError(
        f"{place} must hold a whole model, got an adapter of PEFT (adapter_config.json): load it with PEFT's "
        "AutoPeftModelForSequenceClassification, and save what merge_and_unload() gives, with save_pretrained, "
        "in another folder"
    )


@contextlib.contextmanager
def _readable_errors(
    name_or_path: str | os.PathLike[str], hub_options: Mapping[str, Any], options: Iterable[str] = ()
) -> Iterator[None]:
    """Turns errors into one line each. If ``options`` are given, they may be to blame instead of the checkpoint."""
    try:
        yield
    except Exception as error:
        is_folder = Path(name_or_path).exists()
        # `check_place` has looked into a folder.
        if not is_folder and _is_adapter_on_hub(name_or_path, hub_options, error):
            raise _adapter(str(name_or_path)) from error
        subfolder = hub_options.get("subfolder")
        place = f"{name_or_path} with subfolder={str(subfolder)!r}" if subfolder else str(name_or_path)
        if isinstance(error, OSError):
            nowhere = "" if is_folder else " There is no folder of that name either."
            raise OSError(f"cannot load {place}: {first_line(error)}{nowhere}") from error
        if names := ", ".join(options):
            raise ValueError(f"cannot load {place} with the options {names}: {first_line(error)}") from error
        # Damaged files surface as whatever their parser raises (JSON, safetensors, pickle, shape mismatches).
        raise ValueError(
            f"cannot load {place}, the checkpoint is damaged or incomplete: {first_line(error)}"
        ) from error


def _is_adapter_on_hub(name: str | os.PathLike[str], hub_options: Mapping[str, Any], error: Exception) -> bool:
    """Whether the checkpoint that failed to load with ``error`` is an adapter."""
    options = {option: value for option, value in hub_options.items() if option != "trust_remote_code"}
    if isinstance(error.__cause__, LocalEntryNotFoundError):
        # The hub was not reached, and another try would take half a minute.
        options["local_files_only"] = True
    with contextlib.suppress(Exception):
        # If the hub cannot be asked, ``error`` says why.
        return find_adapter_config_file(os.fspath(name), **options) is not None
    return False


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turns off transformers' progress bars and load reports: whatever matters in them is raised."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
