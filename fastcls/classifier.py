"""Texts in, labels and scores out."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .conversion import optimize
from .encoder import LastLayer
from .loading import load_model, load_tokenizer, parse_device, parse_dtype
from .tasks import FastClassifier

Text: TypeAlias = "str | Sequence[str] | Mapping[str, str]"
ScoreFunction = Literal["softmax", "sigmoid", "none"]
Label: TypeAlias = "dict[str, Any]"

# Texts are tokenized, sorted and packed by the window: large enough to fill the machine, small enough that results
# come steadily and memory stays bounded, however many texts there are and however long they are.
_WINDOW = {"cpu": (256, 32_768), "cuda": (4096, 2_097_152)}
# While a GPU computes one window the CPU tokenizes the next.
_WINDOWS_UNDERWAY = {"cpu": 0, "cuda": 1}


class _Item(NamedTuple):
    text: str
    pair: str | None


class _Underway(NamedTuple):
    """Logits on their way to the CPU; on a GPU they are there once the event has happened."""

    logits: Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, logits: Tensor) -> _Underway:
        if not logits.is_cuda:
            return cls(logits.cpu(), None)
        with torch.cuda.device(logits.device):
            host, arrived = logits.to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record()
        return cls(host, arrived)

    def wait(self) -> Tensor:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.logits


class Classifier:
    """A tokenizer and a fast model: texts to labels.

    Args:
        model: the result of `fastcls.optimize`, or a transformers classifier, which is then optimized.
        tokenizer: the tokenizer that belongs to it.
        truncation: cut texts that are longer than the model's positions; otherwise they are an error.
    """

    def __init__(
        self, model: FastClassifier | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, truncation: bool = False
    ) -> None:
        self.model: FastClassifier = optimize(model) if isinstance(model, PreTrainedModel) else model
        if not isinstance(self.model, FastClassifier):
            found = type(model).__name__
            raise TypeError(f"model must be a sequence classifier of transformers' or a FastClassifier, got {found}")
        self.tokenizer = tokenizer
        self.truncation = truncation

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        truncation: bool = False,
        last_layer: LastLayer = "absorbed",
        batch_invariant: bool = False,
        **hub_options: Any,
    ) -> Classifier:
        """Loads a fine-tuned checkpoint.

        Args:
            name_or_path: a folder, or a name on the hub.
            device: None is the GPU where there is one, else the CPU.
            dtype: "float32", "float16", "bfloat16" or a torch.dtype; None keeps the checkpoint's own.
            truncation: see `Classifier`.
            last_layer, batch_invariant: see `FastClassifier`.
            hub_options: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and the like, for transformers.

        Raises:
            FileNotFoundError, OSError: the checkpoint cannot be found.
            ValueError: it is damaged, has no trained classifier or a config that fastcls does not compute; an unknown
                device, dtype or last_layer.
            TypeError: its model class is not supported.
        """
        target, torch_dtype = parse_device(device), parse_dtype(dtype)
        tokenizer = load_tokenizer(name_or_path, **hub_options)
        model = load_model(name_or_path, target, torch_dtype, **hub_options)
        fast = optimize(model, last_layer=last_layer, batch_invariant=batch_invariant)
        return cls(fast, tokenizer, truncation=truncation)

    @overload
    def __call__(
        self, texts: Text | Iterable[Text], *, function_to_apply: ScoreFunction | None = None
    ) -> list[Label]: ...

    @overload
    def __call__(
        self, texts: Text | Iterable[Text], *, top_k: int | None, function_to_apply: ScoreFunction | None = None
    ) -> list[Any]: ...

    def __call__(
        self,
        texts: Text | Iterable[Text],
        *,
        top_k: int | Literal["best"] | None = "best",
        function_to_apply: ScoreFunction | None = None,
    ) -> list[Any]:
        """Labels with their scores, in the order of the texts, as transformers' text-classification pipeline gives.

        Args:
            texts: one text, or a list (or any iterable) of texts. A text is a string, a pair of strings, or a mapping
                with "text" and "text_pair".
            top_k: how many labels to give for each text, best first, None for all. By default the best one alone.
            function_to_apply: "softmax", "sigmoid" or "none"; by default as the config's problem type and number of
                labels say.

        Returns:
            A list of ``{"label": ..., "score": ...}``, one a text; with ``top_k`` given, a list of such lists. For one
            text that is not in a list, with ``top_k``, the list for it.

        Raises:
            TypeError: something that is not a text.
            ValueError: a text longer than the model's positions, where ``truncation`` is off.
        """
        single = isinstance(texts, (str, Mapping))
        items: Iterable[Text] = [texts] if isinstance(texts, (str, Mapping)) else texts
        if isinstance(items, Sequence):
            # All of a list is checked before any of it is computed.
            _check_sequence(items)
            for index, item in enumerate(items):
                _item(item, index)
        results = list(self.stream(items, top_k=top_k, function_to_apply=function_to_apply))
        return results[0] if single and top_k != "best" else results

    def stream(
        self,
        texts: Iterable[Text],
        *,
        top_k: int | Literal["best"] | None = "best",
        function_to_apply: ScoreFunction | None = None,
    ) -> Iterator[Any]:
        """The same for any number of texts, one result at a time in their order, in bounded memory.

        Reads ahead by one window of texts (256 on a CPU, 4,096 on a GPU, fewer where they are long), on a GPU by two:
        one is tokenized while the other is computed.
        """
        apply = self._score_function(function_to_apply)
        if top_k not in ("best", None) and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k must be a positive int or None, got {top_k!r}")
        return self._stream(texts, top_k, apply)

    def logits(self, texts: Iterable[Text]) -> Tensor:
        """(num_texts, num_labels), on the model's device."""
        parts = [self._window_logits(window, first) for first, window in self._windows(texts)]
        return torch.cat(parts) if parts else self.model.logits_of([])

    def _stream(
        self, texts: Iterable[Text], top_k: int | Literal["best"] | None, apply: ScoreFunction
    ) -> Iterator[Any]:
        underway: deque[_Underway] = deque()
        try:
            for first, window in self._windows(texts):
                underway.append(_Underway.of(self._window_logits(window, first)))
                if len(underway) > _WINDOWS_UNDERWAY[self._place]:
                    yield from self._labels(underway.popleft(), top_k, apply)
        except Exception:
            # A text that cannot be classified loses nothing of those before it.
            for window_before in underway:
                yield from self._labels(window_before, top_k, apply)
            raise
        for last in underway:
            yield from self._labels(last, top_k, apply)

    def _labels(self, underway: _Underway, top_k: int | Literal["best"] | None, apply: ScoreFunction) -> Iterator[Any]:
        names = self.model.config.id2label or {}
        scores = _scores(underway.wait(), apply)
        count = 1 if top_k == "best" else min(top_k or scores.shape[1], scores.shape[1])
        # A stable sort, so that of equal scores the first label comes first, as argmax would have it.
        values, indices = scores.sort(dim=1, descending=True, stable=True)
        for row_values, row_indices in zip(values[:, :count].tolist(), indices[:, :count].tolist(), strict=True):
            labels = [
                {"label": names.get(index, f"LABEL_{index}"), "score": value}
                for value, index in zip(row_values, row_indices, strict=True)
            ]
            yield labels[0] if top_k == "best" else labels

    @property
    def _place(self) -> Literal["cpu", "cuda"]:
        return "cuda" if self.model.device.type == "cuda" else "cpu"

    def _windows(self, texts: Iterable[Text]) -> Iterator[tuple[int, list[_Item]]]:
        max_texts, max_characters = _WINDOW[self._place]
        _check_sequence(texts)
        window: list[_Item] = []
        first = characters = 0
        for index, text in enumerate(texts):
            item = _item(text, index)
            window.append(item)
            characters += len(item.text) + len(item.pair or "")
            if len(window) == max_texts or characters >= max_characters:
                yield first, window
                window, first, characters = [], index + 1, 0
        if window:
            yield first, window

    def _window_logits(self, window: list[_Item], first: int) -> Tensor:
        token_ids: list[list[int]] = [[]] * len(window)
        types: list[list[int]] = [[]] * len(window)
        singles = [row for row, item in enumerate(window) if item.pair is None]
        pairs = [row for row, item in enumerate(window) if item.pair is not None]
        for rows in filter(None, (singles, pairs)):
            encoded = self.tokenizer(
                [window[row].text for row in rows],
                [window[row].pair or "" for row in rows] if rows is pairs else None,
                truncation=self.truncation,
                max_length=self.model.spec.max_positions if self.truncation else None,
                return_attention_mask=False,
                verbose=False,
            )
            # A tokenizer that gives no types means type 0, as it does to transformers' pipeline.
            kinds = encoded.get("token_type_ids") or [[0] * len(ids) for ids in encoded["input_ids"]]
            for row, ids, row_kinds in zip(rows, encoded["input_ids"], kinds, strict=True):
                token_ids[row], types[row] = ids, row_kinds
        limit = self.model.spec.max_positions
        for row, ids in enumerate(token_ids):
            if len(ids) > limit:
                raise ValueError(
                    f"texts[{first + row}] is {len(ids)} tokens long and the model has {limit} positions: "
                    "pass truncation=True to cut such texts"
                )
        return self.model.logits_of(token_ids, types)

    def _score_function(self, asked: ScoreFunction | None) -> ScoreFunction:
        if asked is not None:
            if asked not in get_args(ScoreFunction):
                choices = ", ".join(get_args(ScoreFunction))
                raise ValueError(f"function_to_apply must be one of {choices} or None, got {asked!r}")
            return asked
        config = self.model.config
        if config.problem_type == "regression":
            return "none"
        if config.problem_type == "multi_label_classification" or self.model.num_labels == 1:
            return "sigmoid"
        return "softmax"


def _scores(logits: Tensor, apply: ScoreFunction) -> Tensor:
    logits = logits.float()
    if apply == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if apply == "sigmoid" else logits


def _check_sequence(texts: object) -> None:
    if isinstance(texts, (str, Mapping)) or not isinstance(texts, Iterable):
        raise TypeError(f"texts must be an iterable of texts, got {type(texts).__name__}")
    if isinstance(texts, tuple) and len(texts) == 2 and all(isinstance(text, str) for text in texts):
        raise TypeError(
            "texts must be a list: [(text, text_pair)] for one pair, [text, text] for two texts; got a tuple"
        )


def _item(text: object, index: int) -> _Item:
    if isinstance(text, str):
        return _Item(text, None)
    if isinstance(text, Mapping) and isinstance(text.get("text"), str):
        pair = text.get("text_pair")
        if text.keys() <= {"text", "text_pair"} and (pair is None or isinstance(pair, str)):
            return _Item(text["text"], pair)
    if isinstance(text, (tuple, list)) and len(text) == 2 and all(isinstance(part, str) for part in text):
        return _Item(*text)
    raise TypeError(
        f"texts[{index}] must be a string, a pair of strings or a mapping with text and text_pair, "
        f"got {type(text).__name__}: {_shortened(text)}"
    )


def _shortened(value: object, limit: int = 60) -> str:
    shown = repr(value)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
