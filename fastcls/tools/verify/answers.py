"""A model's answers about texts, task by task, as rows of numbers: each row is one decision."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from copy import copy
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...engine.spec import EncoderSpec
from ...engine.spec import Task as TaskName
from ...families import family_of
from ...labels import label_names
from ...models import FastEncoder, FastMaskedLM

Text: TypeAlias = "str | Sequence[str]"


class Encoded(NamedTuple):
    """A text's token ids: one list of them; in multiple choice one list per choice.

    Attributes:
        number: the text's index in the input, from 0.
        key: only texts with equal keys share a batch.
    """

    number: int
    text: Text
    ids: list[list[int]]
    types: list[list[int]]
    key: Hashable


class Batch(NamedTuple):
    """Texts and a transformers model's inputs for them, on the CPU."""

    texts: list[Encoded]
    inputs: dict[str, Tensor]

    @property
    def mask(self) -> Tensor:
        return self.inputs["attention_mask"].bool()

    def take(self, rows: list[int]) -> Batch:
        """Some of its texts, padded as before."""
        return Batch([self.texts[row] for row in rows], {name: tensor[rows] for name, tensor in self.inputs.items()})


class Runner(NamedTuple):
    """How to ask one model.

    Attributes:
        answer: a batch to the model's output; this call is timed.
        rows: the output and its batch to (num_rows, width), on the CPU, in float32 or float64.
    """

    answer: Callable[[Batch], Any]
    rows: Callable[[Any, Batch], Tensor]

    def ask(self, batch: Batch) -> Tensor:
        """The rows of the model's answer to a batch."""
        return self.rows(self.answer(batch), batch)


class Answers:
    """Text classification into one of several labels, and the base of the other tasks.

    Attributes:
        decides: a row's label is its largest number ("best") or the sign of its only number ("sign"), or it has no
            label ("nothing").
    """

    decides: ClassVar[Literal["best", "sign", "nothing"]] = "best"

    def __init__(
        self, model: PreTrainedModel, spec: EncoderSpec, tokenizer: PreTrainedTokenizerBase, num_labels: int
    ) -> None:
        self.tokenizer = tokenizer
        named = num_labels if self.decides != "nothing" else 0
        self.names: list[Any] = label_names(model.config.id2label, named) if named else []
        self.max_positions = spec.max_positions
        self.token_types = spec.token_types
        self.vocab_size = spec.vocab_size

    def pieces(self, text: Text) -> list[Text]:
        """The texts or pairs that the encoder reads for one text of the input.

        Raises:
            ValueError: the text does not have as many parts as the task needs.
        """
        if not isinstance(text, str) and len(text) != 2:
            raise ValueError("must be one text or a pair")
        return [text]

    def key(self, ids: list[list[int]]) -> Hashable:
        """See `Encoded`."""
        del ids
        return None

    def batch(self, texts: list[Encoded]) -> Batch:
        """Pads texts with equal keys to the longest of them."""
        flat = {"input_ids": [ids for text in texts for ids in text.ids]}
        if self.token_types:
            flat["token_type_ids"] = [types for text in texts for types in text.types]
        padded = self.tokenizer.pad(
            flat, padding=True, padding_side="right", return_attention_mask=True, return_tensors="pt", verbose=False
        )
        return Batch(texts, self._shaped(dict(padded), len(texts)))

    def _shaped(self, inputs: dict[str, Tensor], texts: int) -> dict[str, Tensor]:
        del texts
        return inputs

    def original(self, model: PreTrainedModel) -> Runner:
        """How to ask a transformers model."""

        def answer(batch: Batch) -> Any:
            placed = {name: tensor.to(model.device) for name, tensor in batch.inputs.items()}
            return model(**placed, return_dict=True)

        return Runner(answer, self.rows)

    def fast(self, model: Any) -> Runner:
        """How to ask the result of `fastcls.optimize`."""
        return Runner(lambda batch: model(**batch.inputs, return_dict=True), self.rows)

    def rows(self, output: Any, batch: Batch) -> Tensor:
        """See `Runner`."""
        del batch
        return _single(output.logits)

    def owners(self, batch: Batch) -> Tensor:
        """(num_rows,): for each row the index of its text in the batch."""
        return torch.arange(len(batch.texts))

    def counted(self, batch: Batch) -> Tensor | None:
        """(num_rows, width) bool: the numbers that count; None if all do."""
        del batch
        return None

    def place(self, batch: Batch, row: int) -> str | None:
        """Where in its text a row is, in words."""
        del batch, row
        return None

    def label(self, batch: Batch, row: int, choice: int) -> str:
        """A row's label, in words."""
        del batch, row
        return str(self.names[choice])

    def token(self, batch: Batch, text: int, place: int) -> str:
        """A token in words."""
        token_id = int(batch.inputs["input_ids"][text, place])
        return f"token {place} {self.tokenizer.convert_ids_to_tokens(token_id)}"


class _ManyLabels(Answers):
    """Any number of labels per text, each by the sign of its own logit."""

    decides = "sign"

    def rows(self, output: Any, batch: Batch) -> Tensor:
        return super().rows(output, batch).reshape(-1, 1)

    def owners(self, batch: Batch) -> Tensor:
        return super().owners(batch).repeat_interleave(len(self.names))

    def label(self, batch: Batch, row: int, choice: int) -> str:
        name = super().label(batch, row, row % len(self.names))
        return name if choice else f"not {name}"


class _Number(Answers):
    """One number per text: a score, or the result of a regression."""

    decides = "nothing"


class _NextSentence(Answers):
    def pieces(self, text: Text) -> list[Text]:
        if isinstance(text, str):
            raise ValueError("must be a pair of texts (--pairs): the model says whether one follows the other")
        return super().pieces(text)

    def label(self, batch: Batch, row: int, choice: int) -> str:
        del batch, row
        return ("follows", "does not follow")[choice]


class _Choice(Answers):
    def pieces(self, text: Text) -> list[Text]:
        if isinstance(text, str) or len(text) < 3:
            raise ValueError("must be a question and two choices or more (in a file: with tabs between)")
        return [(text[0], choice) for choice in text[1:]]

    def key(self, ids: list[list[int]]) -> Hashable:
        # A batch is a block: all its texts have as many choices.
        return len(ids)

    def _shaped(self, inputs: dict[str, Tensor], texts: int) -> dict[str, Tensor]:
        return {name: tensor.unflatten(0, (texts, -1)) for name, tensor in inputs.items()}

    def label(self, batch: Batch, row: int, choice: int) -> str:
        return f"choice {choice + 1} {batch.texts[row].text[choice + 1]}"


class _Tokens(Answers):
    """A label for each token, padding left out."""

    def rows(self, output: Any, batch: Batch) -> Tensor:
        return _single(output.logits.cpu()[self._wanted(batch)])

    def owners(self, batch: Batch) -> Tensor:
        return self._wanted(batch).nonzero()[:, 0]

    def place(self, batch: Batch, row: int) -> str | None:
        text, place = self._wanted(batch).nonzero()[row].tolist()
        return self.token(batch, text, place)

    def _wanted(self, batch: Batch) -> Tensor:
        return batch.mask


class _Masked(_Tokens):
    """The token predicted at each mask; in a text without a mask, at every place."""

    def key(self, ids: list[list[int]]) -> Hashable:
        # Texts with and without a mask take different paths through fastcls.
        return self.tokenizer.mask_token_id in ids[0]

    def fast(self, model: Any) -> Runner:
        assert isinstance(model, FastMaskedLM)
        # Copies that share the weights, so that the caller's model keeps its settings.
        ways: dict[Hashable, FastMaskedLM] = {}
        for masked, mask_token_id in ((True, self.tokenizer.mask_token_id), (False, None)):
            ways[masked] = copy(model)
            ways[masked].mask_token_id, ways[masked].dense = mask_token_id, True
        return Runner(lambda batch: ways[batch.texts[0].key](**batch.inputs, return_dict=True), self.rows)

    def label(self, batch: Batch, row: int, choice: int) -> str:
        del batch, row
        return str(self.tokenizer.convert_ids_to_tokens(choice))

    def _wanted(self, batch: Batch) -> Tensor:
        masked = batch.texts[0].key
        return batch.inputs["input_ids"] == self.tokenizer.mask_token_id if masked else batch.mask


class _Span(Answers):
    """Where the answer begins and where it ends: two rows per text, with a number for each of its tokens."""

    def rows(self, output: Any, batch: Batch) -> Tensor:
        del batch
        return _single(torch.stack((output.start_logits, output.end_logits), 1).flatten(0, 1))

    def owners(self, batch: Batch) -> Tensor:
        return super().owners(batch).repeat_interleave(2)

    def counted(self, batch: Batch) -> Tensor | None:
        return batch.mask.repeat_interleave(2, 0)

    def place(self, batch: Batch, row: int) -> str | None:
        del batch
        return ("start", "end")[row % 2]

    def label(self, batch: Batch, row: int, choice: int) -> str:
        return self.token(batch, row // 2, choice)


class States(Answers):
    """An encoder's states: of every token, and then of each text's first token, computed on its own."""

    decides = "nothing"

    def original(self, model: PreTrainedModel) -> Runner:
        return (
            super()
            .original(model)
            ._replace(rows=lambda output, batch: self._joined(output, output.last_hidden_state[:, 0], batch))
        )

    def fast(self, model: Any) -> Runner:
        assert isinstance(model, FastEncoder)

        def rows(output: Any, batch: Batch) -> Tensor:
            first = model(**batch.inputs, select="first", return_dict=True).last_hidden_state[:, 0]
            return self._joined(output, first, batch)

        return Runner(lambda batch: model(**batch.inputs, select="all", return_dict=True), rows)

    def owners(self, batch: Batch) -> Tensor:
        return torch.cat((batch.mask.nonzero()[:, 0], super().owners(batch)))

    def place(self, batch: Batch, row: int) -> str | None:
        places = batch.mask.nonzero()
        return "first token alone" if row >= len(places) else self.token(batch, *places[row].tolist())

    def first(self, rows: Tensor, batch: Batch) -> Tensor:
        """The rows of first tokens that were computed on their own: [CLS], as an embedding."""
        return rows[-len(batch.texts) :]

    def _joined(self, output: Any, first: Tensor, batch: Batch) -> Tensor:
        return _single(torch.cat((output.last_hidden_state.cpu()[batch.mask], first.cpu())))


_TASKS: dict[TaskName, type[Answers]] = {
    "next sentence prediction": _NextSentence,
    "multiple choice": _Choice,
    "masked language modelling": _Masked,
    "token classification": _Tokens,
    "question answering": _Span,
    "encoder": States,
}


def task_of(model: PreTrainedModel) -> TaskName:
    """The task of a transformers model.

    Raises:
        TypeError: the model is not supported.
    """
    family, model_class = family_of(model)
    return family.head(model_class, model.config).task


def answers_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_labels: int) -> Answers:
    """The answers of a model's task.

    Args:
        model: the original.
        tokenizer: the tokenizer that belongs to it.
        num_labels: how many labels with names it has; 0 if its task has none.

    Raises:
        TypeError: as `task_of`.
        ValueError: its config asks for something that fastcls does not compute, or does not name its labels.
    """
    family, _ = family_of(model)
    spec, task = family.spec(model.config), task_of(model)
    if task != "sequence classification":
        kind = _TASKS[task]
    elif model.config.problem_type == "multi_label_classification":
        kind = _ManyLabels
    elif model.config.problem_type == "regression" or num_labels == 1:
        kind = _Number
    else:
        kind = Answers
    return kind(model, spec, tokenizer, num_labels)


def _single(numbers: Tensor) -> Tensor:
    """Moves numbers to the CPU: float64 stays, every other dtype becomes float32."""
    return numbers.cpu() if numbers.dtype == torch.float64 else numbers.cpu().float()
