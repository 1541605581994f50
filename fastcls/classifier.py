"""Texts in, labels and scores out."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .conversion import optimize, remedy_for
from .engine.batch import BadText
from .engine.spec import LastLayer, Quantize, check_quantize
from .flow import Flow, LongTextPolicy, LongTexts
from .labels import ScoreFunction, best_first, label_names, score_function, scores_of
from .loading import load_model, load_tokenizer, parse_device, parse_dtype, sorted_options
from .models import FastClassifier
from .results import Results, Wanted
from .tables import Errors, Job, with_results
from .texts import Item, Text, TextError, Truncation, checked_texts, items_of, plain, read_count
from .tokenizing import (
    Cut,
    check_tokenizer,
    own_copy,
    read_cut,
    read_padding,
    read_truncation,
    token_lists,
)
from .underway import Underway

Label: TypeAlias = "dict[str, Any]"
TableLike = TypeVar("TableLike")

# A window (texts, characters) is tokenized, sorted and packed at once: large enough to fill the machine, small enough
# that results come steadily and memory stays bounded for any number and length of texts.
_WINDOW = {"cpu": (256, 32_768), "cuda": (4096, 2_097_152)}
# Where all results come at once, so many windows are one: texts of more equal lengths share a pass.
_WINDOWS_AT_ONCE = {"cpu": 4, "cuda": 1}
# While a GPU computes one window the CPU tokenizes the next.
_WINDOWS_UNDERWAY = {"cpu": 0, "cuda": 1}


class _Call(NamedTuple):
    """The options of one call, checked."""

    top_k: int | Literal["best"] | None
    apply: ScoreFunction
    cut: Cut
    names: list[Any]


class Classifier:
    """A tokenizer and a fast model: texts to labels.

    Several threads may call one classifier at once.

    Args:
        model: the result of `fastcls.optimize`, or a transformers classifier, which is then optimized.
        tokenizer: the tokenizer that belongs to it. The classifier keeps its own copy, ``classifier.tokenizer`` (25 ms
            to make for BERT's 30,000 words): a tokenizer keeps padding and truncation as its state, so padding with
            the same one in another thread would pad these texts, too.
        truncation: cut texts that are longer than ``tokenizer.model_max_length`` or the model's positions, to the
            smaller of both, as transformers' pipeline does; otherwise a text longer than the positions is an error.
            In a pair the longer text is cut ("longest_first"), or the one that "only_first" or "only_second" names.
        copy_tokenizer: False takes the tokenizer itself, which nothing else may then use.
        quantize: of a transformers classifier, see `FastModel`. A fast model keeps its own.

    Raises:
        TypeError: a model that does not classify, or no tokenizer of transformers'.
        ValueError: a config that does not name the model's labels, a tokenizer that cannot be copied, another
            truncation or quantize, or a quantize that does not fit the model.
    """

    def __init__(
        self,
        model: FastClassifier | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        truncation: Truncation = False,
        copy_tokenizer: bool = True,
        quantize: Quantize | None = None,
    ) -> None:
        check_tokenizer(tokenizer)
        read_truncation(truncation)
        check_quantize(quantize)
        self.model: FastClassifier = optimize(model, quantize=quantize) if isinstance(model, PreTrainedModel) else model
        if not isinstance(self.model, FastClassifier):
            raise TypeError(
                "model must be a sequence classifier of transformers' or a FastClassifier, "
                f"got {type(model).__name__}{remedy_for(model)}"
            )
        if self.model is model and quantize not in (None, self.model.quantize):
            raise ValueError(
                f"quantize must be left out for a fast model, got {quantize!r}: pass it to fastcls.optimize"
            )
        label_names(self.model.config.id2label, self.model.num_labels)
        self.tokenizer = own_copy(tokenizer) if copy_tokenizer else tokenizer
        self.truncation = truncation
        self._tokenizing = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # A copy, in another process for instance, gets its own lock.
        return {name: value for name, value in vars(self).items() if name != "_tokenizing"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _tokenizing=threading.Lock())

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        truncation: Truncation = False,
        last_layer: LastLayer = "absorbed",
        batch_invariant: bool = False,
        quantize: Quantize | None = None,
        **options: Any,
    ) -> Classifier:
        """Loads a fine-tuned checkpoint.

        Args:
            name_or_path: a folder, or a name on the hub.
            device: None is the GPU if there is one, else the CPU.
            dtype: "float32", "float16", "bfloat16" or a torch.dtype; None, or "auto", keeps the checkpoint's own.
            truncation: see `Classifier`.
            last_layer, batch_invariant: see `FastClassifier`.
            quantize: "int8" computes products in int8, on a CPU and in float32 alone: faster, with answers near the
                model's own. ``fastcls verify --quantize int8`` says how near on your texts. See `FastClassifier`.
            options: transformers' own: ``revision``, ``token``, ``cache_dir``,
                ``local_files_only`` and the like for all files; ``id2label``, ``label2id``, ``num_labels`` and
                ``problem_type`` for the config; ``model_max_length``, ``do_lower_case``, ``truncation_side`` and the
                like for the tokenizer.

        Raises:
            FileNotFoundError, OSError: the checkpoint cannot be found.
            ValueError: it is damaged, quantised or an adapter, has no trained classifier or a config that fastcls does
                not compute; an unknown device, dtype, last_layer or quantize; an option with a value that does not
                fit it.
            TypeError: its model class is not supported; an option that is not taken, or with a value of another type;
                ``name_or_path`` is neither a folder nor a name.
        """
        check_quantize(quantize)
        target, torch_dtype, given = parse_device(device), parse_dtype(dtype), sorted_options(options)
        tokenizer = load_tokenizer(name_or_path, **given.hub, **given.tokenizer)
        model = load_model(name_or_path, target, torch_dtype, config_options=given.config, **given.hub, **given.model)
        fast = optimize(model, last_layer=last_layer, batch_invariant=batch_invariant, quantize=quantize, release=True)
        return cls(fast, tokenizer, truncation=truncation, copy_tokenizer=False)

    # A mapping is one pair, though it is iterable, too.
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self,
        texts: Mapping[str, str],
        *,
        function_to_apply: ScoreFunction | None = None,
        truncation: Truncation | None = None,
        max_length: int | None = None,
        padding: bool | str | None = None,
        batch_size: int | None = None,
    ) -> Label: ...

    @overload
    def __call__(
        self,
        texts: Text | Iterable[Text],
        *,
        function_to_apply: ScoreFunction | None = None,
        truncation: Truncation | None = None,
        max_length: int | None = None,
        padding: bool | str | None = None,
        batch_size: int | None = None,
    ) -> list[Label]: ...

    @overload
    def __call__(
        self,
        texts: Text | Iterable[Text],
        *,
        top_k: int | None,
        function_to_apply: ScoreFunction | None = None,
        truncation: Truncation | None = None,
        max_length: int | None = None,
        padding: bool | str | None = None,
        batch_size: int | None = None,
    ) -> list[Any]: ...

    def __call__(
        self,
        texts: Text | Iterable[Text],
        *,
        top_k: int | Literal["best"] | None = "best",
        function_to_apply: ScoreFunction | None = None,
        truncation: Truncation | None = None,
        max_length: int | None = None,
        padding: bool | str | None = None,
        batch_size: int | None = None,
    ) -> list[Any] | Label:
        """Labels with their scores, in the order of the texts, as transformers' text-classification pipeline gives.

        Args:
            texts: one text, or a list (or any iterable) of texts. A text is a string, a pair of strings, or a mapping
                with "text" and "text_pair". Columns of pandas, polars, pyarrow and datasets are taken, tables are not.
                A pair with an empty second text is still a pair, with its own [SEP], as in the training batches of
                ``tokenizer(firsts, seconds)``. (The pipeline tokenizes one text at a time, and tokenizers in Rust then
                drop an empty second one: it answers for the first alone. For that answer leave "text_pair" out.)
            top_k: how many labels to give for each text, best first; None gives all. By default only the best one.
            function_to_apply: "softmax", "sigmoid" or "none"; by default as the config's problem type and number of
                labels say.
            truncation: for this call, see `Classifier`. None is the classifier's own, or True if ``max_length`` is
                given.
            max_length: the number of tokens to cut to, instead of ``tokenizer.model_max_length``.
            padding, batch_size: without effect, since nothing is padded and a batch holds as much as fits. They are
                taken so that code that calls a pipeline runs.

        Returns:
            A list of ``{"label": ..., "score": ...}``, one per text; with ``top_k`` given, a list of such lists. A
            single text outside a list gets what the pipeline gives: a string a list of its label, a mapping the label
            itself, and with ``top_k`` both the list of labels.

        Raises:
            TypeError: something that is not a text, before any of them is computed.
            ValueError: a text longer than the model's positions while ``truncation`` is off; one without tokens, or
                that the tokenizer does not take; an option with another value.
        """
        call = self._read_call(top_k, function_to_apply, truncation, max_length, padding, batch_size)
        given = plain(texts)
        single = isinstance(given, (str, Mapping))
        items = list(items_of([given] if single else checked_texts(given)))
        results = list(self._stream(items, call, _WINDOWS_AT_ONCE[self._place]))
        return results[0] if isinstance(given, Mapping) or (single and top_k != "best") else results

    def stream(
        self,
        texts: Iterable[Text],
        *,
        top_k: int | Literal["best"] | None = "best",
        function_to_apply: ScoreFunction | None = None,
        truncation: Truncation | None = None,
        max_length: int | None = None,
        padding: bool | str | None = None,
        batch_size: int | None = None,
    ) -> Iterator[Any]:
        """The same for any number of texts, one result at a time in their order, in bounded memory.

        Reads ahead by one window of texts (256 on a CPU, 4,096 on a GPU, fewer if they are long), on a GPU by two: the
        CPU tokenizes one while the GPU computes the other.

        Errors are those of a call. They are raised after the results of all texts before the named one; the same holds
        for errors of the iterable itself.
        """
        call = self._read_call(top_k, function_to_apply, truncation, max_length, padding, batch_size)
        return self._stream(items_of(checked_texts(texts)), call)

    def logits(
        self,
        texts: Iterable[Text],
        *,
        truncation: Truncation | None = None,
        max_length: int | None = None,
        padding: bool | str | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """(num_texts, num_labels), on the model's device. Arguments and errors are those of a call."""
        call = self._read_call(None, "none", truncation, max_length, padding, batch_size)
        items = items_of(checked_texts(texts))
        parts = []
        for first, window in self._windows(items, _WINDOWS_AT_ONCE[self._place]):
            logits, problem = self._window_logits(window, first, call.cut)
            if problem is not None:
                raise problem
            parts.append(logits)
        return torch.cat(parts) if parts else self.model.logits_of([])

    def map(
        self,
        table: TableLike,
        *,
        text_column: Hashable | None = None,
        pair_column: Hashable | None = None,
        top_k: int | None = None,
        all_scores: bool = False,
        logits: bool = False,
        threshold: float | None = None,
        prefix: str = "",
        function_to_apply: ScoreFunction | None = None,
        long_texts: LongTexts = "truncate",
        errors: Errors = "raise",
    ) -> TableLike:
        """A table with columns of labels added: of the kind that was given, which stays as it was.

        Args:
            table: a DataFrame of pandas or polars, a Table or RecordBatch of pyarrow, a Dataset of datasets, its
                DatasetDict, or its IterableDataset, whose rows are classified as somebody reads them.
            text_column: the column of texts; None is "text", or else the only column of strings.
            pair_column: the column of second texts, where texts are pairs.
            top_k, threshold: either of them adds "labels" instead of "label" and "score": lists of structs with a label
                and its score, best first; at most ``top_k``, and those whose score is at least ``threshold``.
            all_scores, logits: add "scores" and "logits", structs with a float32 for each label.
            prefix: stands before the name of each new column.
            function_to_apply: see a call.
            long_texts: what becomes of texts that are longer than the model takes: see `LongTextPolicy`.
            errors: "raise" for a text that is null, no string or cannot be classified, "null" for null results, or
                "column" for these and a column "error" that says why.

        Raises:
            TypeError: something that is no such table, a column that does not hold strings, a value that is no string.
            ValueError: a column that is not there, or a new one that is there already; a null, or a text that cannot be
                classified; an option with another value.
        """
        results = self.results(Wanted(top_k, all_scores, logits, threshold, prefix), function_to_apply)
        flow = self.flow(LongTextPolicy(long_texts), function_to_apply=function_to_apply)
        return with_results(table, Job(text_column, pair_column, results, flow, errors))

    def flow(
        self,
        policy: LongTextPolicy = LongTextPolicy(),  # noqa: B008 - a tuple of constants
        *,
        max_length: int | None = None,
        function_to_apply: ScoreFunction | None = None,
    ) -> Flow:
        """Windows of texts to logits and scores, for files and tables.

        Args:
            policy: what becomes of texts that are too long.
            max_length, function_to_apply: see a call.

        Raises:
            ValueError: an option with another value.
        """
        apply = self._score_function(function_to_apply)
        truncation = self.truncation if read_truncation(self.truncation) else True
        cut = read_cut(self.tokenizer, self.model.spec.max_positions, truncation, None, max_length)
        score = partial(scores_of, apply=apply)
        return Flow(self.model, self.tokenizer, self.model.logits_of, score, cut, policy, self._tokenizing)

    def results(self, wanted: Wanted, function_to_apply: ScoreFunction | None = None) -> Results:
        """What makes columns of a flow's logits and scores: see `Results`."""
        names = label_names(self.model.config.id2label, self.model.num_labels)
        return Results(wanted, names, self._score_function(function_to_apply))

    def _score_function(self, asked: ScoreFunction | None) -> ScoreFunction:
        return score_function(asked, self.model.config.problem_type, self.model.num_labels)

    def _read_call(
        self,
        top_k: int | Literal["best"] | None,
        function_to_apply: ScoreFunction | None,
        truncation: Truncation | None,
        max_length: int | None,
        padding: bool | str | None,
        batch_size: int | None,
    ) -> _Call:
        """Checks all options of a call before a text is read."""
        apply = self._score_function(function_to_apply)
        if top_k is not None and top_k != "best":
            top_k = read_count("top_k", top_k)
        read_padding(padding)
        if batch_size is not None:
            read_count("batch_size", batch_size)
        cut = read_cut(self.tokenizer, self.model.spec.max_positions, self.truncation, truncation, max_length)
        return _Call(top_k, apply, cut, label_names(self.model.config.id2label, self.model.num_labels))

    def _stream(self, items: Iterable[Item], call: _Call, at_once: int = 1) -> Iterator[Any]:
        underway: deque[Underway] = deque()
        try:
            for first, window in self._windows(items, at_once):
                logits, problem = self._window_logits(window, first, call.cut)
                underway.append(Underway.of(partial(torch.Tensor.detach, logits), logits.device))
                if problem is not None:
                    raise problem
                if len(underway) > _WINDOWS_UNDERWAY[self._place]:
                    yield from _labels(underway.popleft(), call)
        except Exception:
            # If a text cannot be classified or the source fails, the results before it are still given.
            for window_before in underway:
                yield from _labels(window_before, call)
            raise
        for last in underway:
            yield from _labels(last, call)

    @property
    def _place(self) -> Literal["cpu", "cuda"]:
        return "cuda" if self.model.device.type == "cuda" else "cpu"

    def _windows(self, items: Iterable[Item], at_once: int) -> Iterator[tuple[int, list[Item]]]:
        max_texts, max_characters = (at_once * most for most in _WINDOW[self._place])
        window: list[Item] = []
        first = characters = 0
        try:
            for index, item in enumerate(items):
                window.append(item)
                characters += item.characters
                if len(window) == max_texts or characters >= max_characters:
                    yield first, window
                    window, first, characters = [], index + 1, 0
        except Exception:
            # The source failed, or gave something that is no text.
            if window:
                yield first, window
            raise
        if window:
            yield first, window

    def _window_logits(self, window: list[Item], first: int, cut: Cut) -> tuple[Tensor, TextError | None]:
        """Logits of the texts before the first one that cannot be classified, and that one's error."""
        problem = None
        while window:
            try:
                return self._logits(window, first, cut), problem
            except TextError as error:
                # Texts are not checked in order: another bad one may come before this one.
                window, problem = window[: error.index - first], error
        return self.model.logits_of([]), problem

    def _logits(self, window: list[Item], first: int, cut: Cut) -> Tensor:
        # Other threads may call with other options, which are the tokenizer's state.
        with self._tokenizing:
            token_ids, types = token_lists(self.tokenizer, window, first, cut)
        limit = self.model.spec.max_positions
        for row, ids in enumerate(token_ids):
            if limit is not None and len(ids) > limit:
                problem = f"is {len(ids)} tokens long and the model has {limit} positions"
                raise TextError(first + row, problem, too_long=True)
        try:
            return self.model.logits_of(token_ids, types)
        except BadText as error:
            raise TextError(first + error.row, error.problem) from error


def _labels(underway: Underway, call: _Call) -> Iterator[Any]:
    scores = scores_of(underway.wait()[0], call.apply)
    count = 1 if call.top_k == "best" else min(call.top_k or scores.shape[1], scores.shape[1])
    values, indices = best_first(scores)
    for row_values, row_indices in zip(values[:, :count].tolist(), indices[:, :count].tolist(), strict=True):
        labels = [
            {"label": call.names[index], "score": value} for value, index in zip(row_values, row_indices, strict=True)
        ]
        yield labels[0] if call.top_k == "best" else labels
