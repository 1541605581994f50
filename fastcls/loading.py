"""Checkpoints from disk or the hub, with errors that say what is wrong with them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .families import FAMILIES, Family, class_for_task, supported
from .spec import Task

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """ "bfloat16" and the like as a torch.dtype; None stays None.

    Raises:
        ValueError: any other name.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return _DTYPES[dtype]


def parse_device(device: str | torch.device | None) -> torch.device:
    """The device to run on; None is the GPU where there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed = torch.device(device)
        torch.empty(0, device=parsed)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device must be one that torch can use here, got {device!r}: {_first_line(error)}") from error
    return parsed


def load_model(
    name_or_path: str | os.PathLike[str],
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    task: Task | None = "sequence classification",
    **hub_options: Any,
) -> PreTrainedModel:
    """A transformers model in eval mode.

    Args:
        name_or_path: a folder with a checkpoint, or a name on the hub.
        device: where to put it.
        dtype: None keeps the checkpoint's own.
        task: what it must be for; None takes the class that its config names, whatever that is for.
        hub_options: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and the like, for transformers.

    Raises:
        FileNotFoundError: there is no such folder.
        TypeError: its model class is not supported.
        ValueError: the checkpoint is damaged, or its config asks for what fastcls does not compute, or it holds no
            trained head, so that its answers would be random, or its config names no class where it is asked.
        OSError: the hub has no such model, or cannot be reached.
    """
    _check_folder(name_or_path, hub_options.get("subfolder"))
    with quiet_transformers(), _readable_errors(name_or_path):
        config = AutoConfig.from_pretrained(name_or_path, **hub_options)
    # An unsupported model is refused before its weights are fetched and read.
    family, model_class = _class_in_config(name_or_path, config) if task is None else class_for_task(config, task)
    family.spec(config)
    found_task = family.head(model_class, config).task
    with quiet_transformers(), _readable_errors(name_or_path):
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
        raise ValueError(
            f"cannot load {name_or_path}, the checkpoint does not fit its config.json: "
            f"{name} is {tuple(found)}, the config asks for {tuple(needed)}"
        )
    missing = sorted(info["missing_keys"])
    if found_task == "encoder":
        # States do not come from the pooler, and many an embedder is saved without one.
        missing = [name for name in missing if not name.startswith("pooler.")]
    if missing:
        raise ValueError(
            f"{name_or_path} holds no weights for {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}: "
            f"it is not trained for {found_task}, and answers from random weights would mean nothing"
        )
    # nn.Module.to, because the wrapper that transformers puts around it hides its types.
    return cast(PreTrainedModel, nn.Module.to(model, device)).eval()


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


def load_tokenizer(name_or_path: str | os.PathLike[str], **hub_options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a checkpoint. Arguments and errors as in `load_model`."""
    _check_folder(name_or_path, hub_options.get("subfolder"))
    with quiet_transformers(), _readable_errors(name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **hub_options)
    # Without its files transformers makes a tokenizer that knows no words, and every text becomes the same.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(f"{name_or_path} holds no tokenizer: save it there with tokenizer.save_pretrained")
    return tokenizer


def _check_folder(name_or_path: str | os.PathLike[str], subfolder: str | None) -> None:
    path = Path(name_or_path)
    # Names on the hub are "model" or "owner/model"; anything else can only be a path.
    looks_like_path = path.is_absolute() or len(path.parts) > 2 or str(path).startswith((".", "~"))
    if looks_like_path and not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: there is no such folder")
    if path.exists() and not path.is_dir():
        raise ValueError(f"a checkpoint must be a folder with config.json and weights, got the file {path}")
    if path.is_dir() and not subfolder and not (path / "config.json").is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: the folder has no config.json")


@contextlib.contextmanager
def _readable_errors(name_or_path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        nowhere = "" if Path(name_or_path).exists() else " There is no folder of that name either."
        raise OSError(f"cannot load {name_or_path}: {_first_line(error)}{nowhere}") from error
    except Exception as error:
        # Damaged files surface as whatever their parser raises (JSON, safetensors, pickle, shape mismatches).
        raise ValueError(
            f"cannot load {name_or_path}, the checkpoint is damaged or incomplete: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Transformers' progress bars and load reports off: what matters in them is raised."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
