"""Texts, and their true labels if they are known, as batches."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ...engine.batch import shortened
from ...texts import found_text, plain
from ...tokenizing import Cut, tokenizer_problem
from .answers import Answers, Batch, Encoded, Text


class TextEncoder:
    """Texts to batches of token ids."""

    def __init__(self, answers: Answers, cut: Cut, source: str | None) -> None:
        self.answers = answers
        self.cut = cut
        self.source = source

    def batches(self, texts: Iterator[Text], batch_size: int) -> Iterator[Batch]:
        """Batches of successive texts with equal keys."""
        waiting: dict[Hashable, list[Encoded]] = {}
        first = 0
        while chunk := list(islice(texts, batch_size)):
            for text in self._encoded(chunk, first):
                batch = waiting.setdefault(text.key, [])
                batch.append(text)
                if len(batch) == batch_size:
                    yield self.answers.batch(waiting.pop(text.key))
            first += len(chunk)
        for batch in waiting.values():
            yield self.answers.batch(batch)

    def _encoded(self, texts: list[Text], first: int) -> Iterator[Encoded]:
        answers = self.answers
        for index, given in enumerate(texts, start=first):
            text: Any = plain(given)
            parts = (text,) if isinstance(text, str) else text
            if not isinstance(parts, (tuple, list)) or not all(isinstance(part, str) for part in parts):
                raise TypeError(f"texts[{index}] must be a string or a pair of strings, got {found_text(text)}")
            try:
                pieces = answers.pieces(text)
            except ValueError as error:
                raise ValueError(f"{self._named(index)} {error}, got {text!r}") from None
            encoded = [self._tokenized((piece,) if isinstance(piece, str) else piece, index) for piece in pieces]
            ids = [each["input_ids"] for each in encoded]
            # A tokenizer that gives no types means type 0.
            types = [each.get("token_type_ids") or [0] * len(each["input_ids"]) for each in encoded]
            self._check(index, ids, types)
            yield Encoded(index, text, ids, types, answers.key(ids))

    def _tokenized(self, piece: Sequence[str], index: int) -> Any:
        try:
            return self.answers.tokenizer(*piece, **self.cut.options(), return_attention_mask=False, verbose=False)
        except Exception as error:
            raise ValueError(f"{self._named(index)} {tokenizer_problem(piece, error)}") from error

    def _check(self, index: int, ids: list[list[int]], types: list[list[int]]) -> None:
        answers, longest = self.answers, max(map(len, ids))
        if self.cut.strategy and self.cut.length is not None and longest > self.cut.length:
            raise ValueError(f"{self._named(index)} is {longest} tokens long and cannot be cut to {self.cut.length}")
        if answers.max_positions is not None and longest > answers.max_positions:
            raise ValueError(
                f"{self._named(index)} is {longest} tokens long and the model has {answers.max_positions} positions: "
                f"{'pass truncation=True' if self.source is None else 'add --truncate'} to cut such texts"
            )
        if not min(map(len, ids)):
            raise ValueError(f"{self._named(index)} holds no token, and there is nothing to compare")
        for name, found, size in (("ids", ids, answers.vocab_size), ("types", types, answers.token_types or math.inf)):
            if max(map(max, found)) >= size:
                raise ValueError(
                    f"the tokenizer does not fit the model: {self._named(index)} has token {name} up to "
                    f"{max(map(max, found))}, the model knows them below {size}"
                )

    def _named(self, index: int) -> str:
        return f"texts[{index}]" if self.source is None else f"{self.source}, line {index + 1}"


class TrueLabels:
    """The true labels of texts that come in batches, in their order.

    Raises:
        ValueError: the model does not give one of several labels to each text.
    """

    def __init__(self, answers: Answers, labels: Iterable[str | int] | None, source: str | None) -> None:
        if labels is not None and type(answers) is not Answers:
            name = "labels" if source is None else "--labelled"
            raise ValueError(f"{name} must be left out: the model does not give each text one of several labels")
        self.labels = None if labels is None else iter(labels)
        self.source = source
        self.indices = {str(name): index for index, name in enumerate(answers.names)}
        if not any(name.isdigit() for name in self.indices):
            # Names that are numbers themselves, as of one to five stars, are meant as names.
            self.indices |= {str(index): index for index in range(len(answers.names))}
        self.read = 0

    def of(self, batch: Batch) -> Tensor | None:
        """(num_texts,) indices of the labels of the next batch; None if they are not known.

        Raises:
            ValueError: there is no label left, or one is not the model's.
        """
        if self.labels is None:
            return None
        found = []
        for label in islice(self.labels, len(batch.texts)):
            if str(label) not in self.indices:
                where = f"labels[{self.read}]" if self.source is None else f"{self.source}, line {self.read + 1}: label"
                raise ValueError(f"{where} must be one of {shortened([*self.indices])}, got {label!r}")
            found.append(self.indices[str(label)])
            self.read += 1
        if len(found) < len(batch.texts):
            raise ValueError(f"labels must be one for each text, got {self.read} for more texts")
        return torch.tensor(found)

    def check_all_read(self) -> None:
        """Raises ValueError if there are more labels than texts."""
        for _ in self.labels or ():
            raise ValueError(f"labels must be one for each text, got more for {self.read} texts")
