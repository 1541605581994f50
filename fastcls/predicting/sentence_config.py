"""What a checkpoint of sentence-transformers says of itself beside its model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils.hub import cached_file

# The names of sentence-transformers.
_POOLINGS = {
    "cls": "first",
    "mean": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
}


class SentenceConfig(NamedTuple):
    """What stands in the files of sentence-transformers.

    Attributes:
        pooling: "first", "mean", "splade" or, of one that is not computed here, its own name; None without a
            layer that pools.
        further: the kinds of layers behind it that give other vectors.
        max_length: tokens that a text may have; None where nothing is said.
        prompts: what stands before texts, by name.
        default_prompt_name: the prompt of texts for which none is named.
        includes_prompt: whether the mean is over the prompt's tokens, too.
    """

    pooling: str | None
    further: tuple[str, ...]
    max_length: int | None
    prompts: dict[str, str]
    default_prompt_name: str | None
    includes_prompt: bool = True


def read_sentence_config(name: str, revision: str | None = None) -> SentenceConfig | None:
    """What a checkpoint says; None for one that is not of sentence-transformers.

    Args:
        name: a folder with a checkpoint, or a name on the hub.
        revision: of a name on the hub.
    """
    modules = _json_of(name, "modules.json", revision)
    if modules is None:
        return None
    pooling, further, max_length, includes_prompt = None, [], None, True
    for module in modules:
        kind = str(module["type"]).rpartition(".")[2]
        if kind == "Pooling":
            config = _json_of(name, f"{module['path']}/config.json", revision) or {}
            pooling, includes_prompt = _pooling_of(config), bool(config.get("include_prompt", True))
        elif kind == "SpladePooling":
            pooling = _splade_of(_json_of(name, f"{module['path']}/config.json", revision) or {})
        elif kind in ("Transformer", "MLMTransformer"):
            # The model lies in the folder itself.
            max_length = (_json_of(name, "sentence_bert_config.json", revision) or {}).get("max_seq_length")
        elif kind != "Normalize":
            further.append(kind)
    own = _json_of(name, "config_sentence_transformers.json", revision) or {}
    return SentenceConfig(
        pooling, tuple(further), max_length, own.get("prompts") or {}, own.get("default_prompt_name"), includes_prompt
    )


def _json_of(name: str, file: str, revision: str | None) -> Any:
    """A file of a checkpoint; None where it has none."""
    found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else json.loads(Path(found).read_text("utf-8"))


def _pooling_of(config: dict[str, Any]) -> str:
    """The pooling of a config of sentence-transformers, in our words where they have one."""
    asked = config.get("pooling_mode")
    if asked is None:
        asked = "+".join(mode for mode, is_on in config.items() if mode.startswith("pooling_mode_") and is_on)
    return _POOLINGS.get(asked, asked)


def _splade_of(config: dict[str, Any]) -> str:
    """The pooling of a layer of SPLADE: "splade" for the maximum over log(1 + relu(logits))."""
    strategy = config.get("pooling_strategy", "max")
    activation = config.get("activation_function", "relu")
    return "splade" if (strategy, activation) == ("max", "relu") else f"splade by {strategy} and {activation}"
