"""What was asked, loaded: texts to numbers, and numbers to columns."""

from __future__ import annotations

import hashlib
import os
import sys
from typing import NamedTuple, cast

import numpy
import pyarrow
import tokenizers
import torch
import transformers

from .. import __version__
from ..classifier import Classifier
from ..flow import Flow
from ..labels import label_names, score_function
from ..loading import load_config, load_tokenizer, parse_device
from ..results import Answers, Results
from .checkpoint import Checkpoint, fingerprint
from .embedder import Embedder, Vectors
from .machine import folder_of_machine, held, read_mapped, write_mapped
from .mask_filler import Fills, MaskFiller
from .options import PredictOptions


class Loaded(NamedTuple):
    """A model, ready for texts.

    Attributes:
        flow: windows of texts to numbers.
        answers: columns of those numbers.
    """

    flow: Flow
    answers: Answers


def load(name: str, options: PredictOptions) -> Loaded:
    """Loads what was asked.

    Args:
        name: a folder with a checkpoint, or a name on the hub.
        options: what is computed.

    Raises:
        ValueError, TypeError, OSError: as `Classifier.from_pretrained`.
    """
    if options.embeddings is not None:
        embedder = Embedder(
            name, options.embeddings, normalize=options.normalize, prefix=options.prefix, **options.loading
        )
        return Loaded(embedder.flow(options.policy, options.max_length), embedder.answers)
    if options.fill_mask:
        filler = MaskFiller(name, options.top_k, prefix=options.prefix, **options.loading)
        return Loaded(filler.flow(options.policy, options.max_length), filler.answers)
    classifier = Classifier.from_pretrained(name, truncation=True, **options.loading)
    apply = options.function_to_apply
    flow = classifier.flow(options.policy, max_length=options.max_length, function_to_apply=apply)
    return Loaded(flow, classifier.results(options.wanted, apply))


def load_shared(checkpoint: Checkpoint, options: PredictOptions) -> Loaded:
    """Loads what was asked; on a CPU the processes of a machine have one copy of the weights between them.

    The first one writes the model as it is computed with, packed weights included, to a file of the user's own, and
    all map it. Once no process uses it, the next one that loads anything removes it.

    Raises:
        ValueError, TypeError, OSError: as `load`; a folder to share in that others can write to.
    """
    name = checkpoint if isinstance(checkpoint, str) else checkpoint()
    if parse_device(options.device).type != "cpu" or os.name != "posix":
        return load(name, options)
    # What was pickled is read by the same code alone, and packed weights suit one CPU.
    libraries = (__version__, *(each.__version__ for each in (torch, transformers, tokenizers, numpy, pyarrow)))
    parts = (fingerprint(name), options, *libraries, sys.version)
    key = hashlib.sha256(repr((*parts, torch.backends.cpu.get_cpu_capability())).encode()).hexdigest()[:32]
    path = folder_of_machine() / f"model-{key}"
    with held(path):
        if not path.exists():
            write_mapped(load(name, options), path)
        return cast(Loaded, read_mapped(path))


def answers_of(name: str, options: PredictOptions) -> Answers:
    """What makes the columns, by a checkpoint's config and tokenizer alone.

    Raises:
        ValueError, TypeError, OSError: as `load`, as far as these tell.
    """
    if options.fill_mask:
        return Fills(load_tokenizer(name), options.top_k, options.prefix)
    config, family = load_config(name, "encoder" if options.embeddings is not None else "sequence classification")
    if options.embeddings is not None:
        return Vectors(family.spec(config).hidden_size, options.prefix)
    count = len(config.id2label or {})
    names = label_names(config.id2label, count)
    return Results(options.wanted, names, score_function(options.function_to_apply, config.problem_type, count))
