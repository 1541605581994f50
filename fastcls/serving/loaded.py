"""Checkpoints to models that are served: which kind each one is, by its config and its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file, extract_commit_hash

from ..conversion import optimize
from ..engine.spec import Task
from ..heads.several import optimize_heads
from ..labels import label_names, score_function
from ..loading import check_place, load_model, load_tokenizer, parse_device, parse_dtype, read_config
from ..models import FastClassifier, FastEncoder, FastMaskedLM, FastModel
from ..predicting.sentence_config import SentenceConfig, read_sentence_config
from ..tokenizing import length_limit, own_copy
from .heads import Heads
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
    for checkpoint in checkpoints:
        check_place(checkpoint)
    called = list(names) or [_name_of(each) for each in checkpoints]
    for name in called:
        if called.count(name) > 1:
            raise ValueError(f"served_model_name must tell the models apart, got {name!r} twice")
        if not name or name != name.strip("/ ") or not name.isprintable():
            raise ValueError(f"served_model_name must be printable, without / at its ends, got {name!r}")
    of_vectors = {name: getattr(options, name) for name in ("pooling", "default_prompt_name", "default_prompt")}
    given = {name: value for name, value in of_vectors.items() if value is not None}
    if given and all(_classifies(read_config(each, _of_hub(options))) for each in checkpoints):
        name, value = next(iter(given.items()))
        raise ValueError(f"{name} must be left out for sequence classifiers, got {value!r:.80}")
    if options.one_encoder:
        return _load_heads(dict(zip(called, checkpoints, strict=True)), options)
    return [load(each, name, options) for each, name in zip(checkpoints, called, strict=True)]


def load(checkpoint: str, name: str, options: LoadOptions) -> Served:
    """Loads one model: a classifier, a reranker (one label), an encoder, or a masked language model for SPLADE.

    Raises:
        ValueError, TypeError, OSError: as `Classifier.from_pretrained`; a model for another task, or one that gives its
            vectors otherwise; an encoder of which nobody says how it pools; a prompt that it has not.
    """
    of_hub = _of_hub(options)
    config = read_config(checkpoint, of_hub)
    device = parse_device(options.device)
    task, pooling, sentence = _task(checkpoint, config, options)
    if not sentence.includes_prompt and (sentence.prompts or options.default_prompt is not None):
        raise ValueError(f"{checkpoint} must pool over all tokens, got include_prompt false beside its prompts")
    prompt = _default_prompt(checkpoint, sentence, options)
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
    labels = _labels(config, fast.num_labels) if isinstance(fast, FastClassifier) else ()
    kind: Kind = "embedding" if isinstance(fast, FastEncoder) else "sparse"
    if isinstance(fast, FastMaskedLM):
        # A row of logits for each token, one after the other.
        fast.dense = False
    return Served(
        name,
        checkpoint,
        _commit(checkpoint, options.revision),
        _kind_of(labels) if labels else kind,
        fast,
        tokenizer,
        own_copy(tokenizer),
        _limit(tokenizer, fast, sentence.max_length, options),
        labels,
        score_function(None, config.problem_type, len(labels)),
        "mean" if pooling == "mean" else "first",
        sentence.prompts,
        prompt,
    )


def _load_heads(checkpoints: Mapping[str, str], options: LoadOptions) -> list[Served]:
    """Classifiers that were trained on one frozen encoder, and share it here."""
    if options.pooling is not None:
        raise ValueError(f"pooling must be left out with one_encoder, whose models classify, got {options.pooling}")
    of_hub = _of_hub(options)
    device, dtype = parse_device(options.device), parse_dtype(options.dtype)
    models = {
        f"models_{index}": load_model(each, device, dtype, **of_hub) for index, each in enumerate(checkpoints.values())
    }
    module = optimize_heads(models, quantize=options.quantize)
    module.stop_following()
    heads = Heads(module)
    for index, ((name, checkpoint), (key, model)) in enumerate(zip(checkpoints.items(), models.items(), strict=True)):
        tokenizer = load_tokenizer(checkpoint, **of_hub)
        labels = _labels(model.config, int(model.config.num_labels or 0))
        heads.served[key] = Served(
            name,
            checkpoint,
            _commit(checkpoint, options.revision),
            _kind_of(labels),
            module.encoder,
            tokenizer,
            own_copy(tokenizer),
            _limit(tokenizer, module.encoder, None, options),
            labels,
            score_function(None, model.config.problem_type, len(labels)),
            "first",
            {},
            "",
            heads,
            index,
        )
    return list(heads.served.values())


def _of_hub(options: LoadOptions) -> dict[str, Any]:
    return {} if options.revision is None else {"revision": options.revision}


def _labels(config: PreTrainedConfig, count: int) -> tuple[str, ...]:
    return tuple(map(str, label_names(config.id2label, count)))


def _kind_of(labels: tuple[str, ...]) -> Kind:
    return "classifier" if len(labels) > 1 else "reranker"


def _limit(tokenizer: PreTrainedTokenizerBase, fast: FastModel, of_sentences: int | None, options: LoadOptions) -> int:
    """How many tokens a text may have."""
    limit = options.max_input_length or of_sentences or length_limit(tokenizer, fast.spec.max_positions)
    if limit is None:
        # Models of relative places take texts of any length, which a request must not have.
        limit = int(fast.config.max_position_embeddings)
    most = fast.spec.max_positions
    return limit if most is None else min(limit, most)


def _task(checkpoint: str, config: PreTrainedConfig, options: LoadOptions) -> tuple[Task, str | None, SentenceConfig]:
    """What a checkpoint is for, how it pools, and what sentence-transformers says of it."""
    architecture = _architecture(config)
    if _classifies(config):
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


def _architecture(config: PreTrainedConfig) -> str:
    return next(iter(getattr(config, "architectures", None) or []), "")


def _classifies(config: PreTrainedConfig) -> bool:
    return _architecture(config).endswith("ForSequenceClassification")


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
