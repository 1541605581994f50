"""Checkpoints to models that are served: which kind each one is, by its config and its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file, extract_commit_hash

from ..conversion import optimize
from ..engine.spec import Task
from ..labels import label_names, score_function
from ..loading import load_model, load_tokenizer, parse_device, parse_dtype, read_config
from ..models import FastClassifier, FastEncoder, FastMaskedLM
from ..predicting.sentence_config import SentenceConfig, read_sentence_config
from ..tokenizing import length_limit
from .options import LoadOptions, PoolingName
from .served import Kind, Served

_POOLINGS: dict[PoolingName, str] = {"cls": "first", "mean": "mean", "splade": "splade"}
_NO_SENTENCES = SentenceConfig(None, (), None, {}, None)


def load_all(checkpoints: Sequence[str], options: LoadOptions, names: Sequence[str] = ()) -> list[Served]:
    """Loads what is served.

    Args:
        checkpoints: a folder each, or a name on the hub.
        options: how they are loaded.
        names: what clients call them, in their order; by default a folder's own name, or the name on the hub.

    Raises:
        ValueError, TypeError, OSError: as `load`; names that do not fit.
    """
    if names and len(names) != len(checkpoints):
        count = len(checkpoints)
        raise ValueError(f"served_model_name must be given once for each of {count} models, got {len(names)}")
    called = list(names) or [_name_of(each) for each in checkpoints]
    for name in called:
        if called.count(name) > 1:
            raise ValueError(f"served_model_name must tell the models apart, got {name!r} twice")
        if not name or name != name.strip("/ ") or not name.isprintable():
            raise ValueError(f"served_model_name must be printable, without / at its ends, got {name!r}")
    return [load(each, name, options) for each, name in zip(checkpoints, called, strict=True)]


def load(checkpoint: str, name: str, options: LoadOptions) -> Served:
    """Loads one model: a classifier, a reranker (one label), an encoder, or a masked language model for SPLADE.

    Raises:
        ValueError, TypeError, OSError: as `Classifier.from_pretrained`; a model for another task, or one that gives its
            vectors otherwise; an encoder of which nobody says how it pools; a prompt that it has not.
    """
    of_hub: dict[str, Any] = {} if options.revision is None else {"revision": options.revision}
    config = read_config(checkpoint, of_hub)
    device = parse_device(options.device)
    task, pooling, sentence = _task(checkpoint, config, options)
    tokenizer = load_tokenizer(checkpoint, **of_hub)
    model = load_model(checkpoint, device, parse_dtype(options.dtype), task=task, **of_hub)
    fast = optimize(
        model,
        batch_invariant=options.batch_invariant,
        quantize=options.quantize,
        select="first" if task == "encoder" else None,
        release=True,
    )
    assert isinstance(fast, (FastClassifier, FastEncoder, FastMaskedLM))
    kind: Kind = "embedding" if isinstance(fast, FastEncoder) else "sparse"
    if isinstance(fast, FastMaskedLM):
        # A row of logits for each token, one after the other.
        fast.dense = False
    labels: tuple[str, ...] = ()
    if isinstance(fast, FastClassifier):
        labels = tuple(map(str, label_names(config.id2label, fast.num_labels)))
        kind = "classifier" if len(labels) > 1 else "reranker"
    limit = sentence.max_length or length_limit(tokenizer, fast.spec.max_positions)
    # Models of relative places take texts of any length, which a request must not have.
    limit = options.max_input_length or limit or int(config.max_position_embeddings)
    if fast.spec.max_positions is not None:
        limit = min(limit, fast.spec.max_positions)
    return Served(
        name,
        checkpoint,
        _commit(checkpoint, options.revision),
        kind,
        fast,
        tokenizer,
        limit,
        labels,
        score_function(None, config.problem_type, len(labels)),
        "mean" if pooling == "mean" else "first",
        sentence.prompts,
        _default_prompt(checkpoint, sentence, options),
    )


def _task(checkpoint: str, config: PreTrainedConfig, options: LoadOptions) -> tuple[Task, str | None, SentenceConfig]:
    """What a checkpoint is for, how it pools, and what sentence-transformers says of it."""
    architecture = next(iter(getattr(config, "architectures", None) or []), "")
    if architecture.endswith("ForSequenceClassification"):
        if options.pooling is not None:
            raise ValueError(f"pooling must be left out for {checkpoint}, which is a sequence classifier")
        return "sequence classification", None, _NO_SENTENCES
    sentence = read_sentence_config(checkpoint, options.revision) or _NO_SENTENCES
    if sentence.further:
        further = sentence.further[0]
        raise ValueError(f"{checkpoint} must give its vectors by pooling alone, got a further layer, {further}")
    asked = None if options.pooling is None else _POOLINGS[options.pooling]
    if None not in (asked, sentence.pooling) and asked != sentence.pooling:
        raise ValueError(f"pooling must be {sentence.pooling} for {checkpoint}, which pools so, got {options.pooling}")
    pooling = asked or sentence.pooling
    if pooling is None and architecture.endswith("ForMaskedLM"):
        pooling = "splade"
    if pooling == "splade":
        return "masked language modelling", pooling, sentence
    if pooling not in ("first", "mean"):
        found = "nothing says how" if pooling is None else f"it pools by {pooling}"
        raise ValueError(
            f"{checkpoint} must be a sequence classifier, or a model that pools by cls, mean or splade, got "
            f"{architecture or 'a model of no class'}, and {found}: for an encoder, pass pooling"
        )
    return "encoder", pooling, sentence


def _default_prompt(checkpoint: str, sentence: SentenceConfig, options: LoadOptions) -> str:
    if options.default_prompt is not None:
        return options.default_prompt
    name = options.default_prompt_name or sentence.default_prompt_name
    if name is None:
        return ""
    if name not in sentence.prompts:
        known = ", ".join(sorted(sentence.prompts)) or "none"
        raise ValueError(f"default_prompt_name must be one of the prompts of {checkpoint} ({known}), got {name!r}")
    return sentence.prompts[name]


def _name_of(checkpoint: str) -> str:
    return Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint


def _commit(checkpoint: str, revision: str | None) -> str | None:
    if Path(checkpoint).is_dir():
        return None
    found: str | None = extract_commit_hash(cached_file(checkpoint, "config.json", revision=revision), None)
    return found
