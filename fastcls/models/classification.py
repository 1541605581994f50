"""Models that give each text logits: for its label, for whether a second text follows, or for which choice fits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import (
    MultipleChoiceModelOutput,
    NextSentencePredictorOutput,
    SequenceClassifierOutput,
)

from ..engine.batch import PaddedBatch
from .embeddings import ModelWithHead
from .losses import classification_loss, deberta_loss


class Labelled(ModelWithHead):
    """A model with a logit for each label.

    Attributes:
        loss_labels: how many labels the loss counts: the given model's ``num_labels``, as transformers does, whatever
            the head gives. None counts the logits.
    """

    loss_labels: int | None = None

    @property
    def num_labels(self) -> int:
        return self.width

    def _labels_of_loss(self) -> int:
        return self.num_labels if self.loss_labels is None else self.loss_labels


class FastClassifier(Labelled):
    """A sequence classifier: see `FastModel`."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Classifies a padded batch, as the transformers model does.

        Args:
            input_ids: (batch, seqlen), int64 or int32.
            attention_mask: (batch, seqlen), 1 for a token and 0 for padding, any pattern whose first column is 1;
                None keeps every token.
            token_type_ids: (batch, seqlen), or None for type 0. A model without types ignores them.
            position_ids: (batch, seqlen) or (1, seqlen), or None for those that the model's own would take.
            inputs_embeds: (batch, seqlen, embedding_size), instead of ``input_ids``.
            labels: (batch,) or (batch, num_labels); adds the loss that the config's problem type asks for.
            return_dict: False gives a tuple; None asks the config.

        Integer inputs may lie on the CPU or on the model's device. Inputs on the CPU never wait for a GPU; inputs on
        the GPU make the call wait once, to read and check them.

        Returns:
            SequenceClassifierOutput with ``logits`` (batch, num_labels), without gradient.

        Raises:
            TypeError: an argument of the wrong type or dtype, or one that this model does not take.
            ValueError: a shape, device or value that does not fit; attentions or hidden states asked for.
            RuntimeError: the module is in training mode.
        """
        batch = PaddedBatch(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        texts = self._checked(batch, kwargs)[0]
        if labels is not None and (labels.ndim == 0 or labels.shape[0] != texts):
            raise ValueError(f"labels must have one row for each of the {texts} texts, got {tuple(labels.shape)}")
        logits = self._rows(batch, self.own_head.spec.rows, self.fill_of_texts)
        loss = None
        is_deberta = self.config.model_type in ("deberta", "deberta-v2")
        if labels is not None and is_deberta and self.config.problem_type is None:
            loss, logits = deberta_loss(logits, labels, self._labels_of_loss())
        elif labels is not None:
            loss, found = classification_loss(logits, labels, self._labels_of_loss(), self.config.problem_type)
            if self.training:
                # What is saved says what it was trained for: pipelines read it.
                self.config.problem_type = found
        return self._given(SequenceClassifierOutput(loss=loss, logits=logits), return_dict)

    def logits_of(
        self, token_ids: Iterable[Iterable[int]], token_type_ids: Iterable[Iterable[int]] | None = None
    ) -> Tensor:
        """Classifies sequences of token ids as they come from a tokenizer without padding.

        Args:
            token_ids: for each text its ids, special tokens included; at most the model's positions each.
            token_type_ids: the same shape, or None for type 0; a model without types ignores them.

        Returns:
            (num_texts, num_labels), in the texts' order.

        Raises:
            TypeError: something that is not an integer.
            ValueError: an empty or too long sequence, an id outside its table, or shapes that differ.
        """
        return self._list_rows(token_ids, token_type_ids, self.own_head.spec.rows)


class FastNextSentencePredictor(ModelWithHead):
    """Scores whether the second text of a pair follows the first: see `FastModel`."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> NextSentencePredictorOutput | tuple[Any, ...]:
        """Scores a padded batch of pairs, as the transformers model does.

        Arguments and errors are those of `FastClassifier.forward`; ``labels`` are (batch,), 0 where the second text
        follows.

        Returns:
            NextSentencePredictorOutput with ``logits`` (batch, 2), without gradient.
        """
        batch = PaddedBatch(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        texts = self._checked(batch, kwargs)[0]
        if labels is not None and labels.numel() != texts:
            raise ValueError(f"labels must be one for each of the {texts} pairs, got {tuple(labels.shape)}")
        logits = self._rows(batch, self.own_head.spec.rows, self.fill_of_texts)
        loss = None if labels is None else F.cross_entropy(logits, labels.view(-1).to(logits.device))
        return self._given(NextSentencePredictorOutput(loss=loss, logits=logits), return_dict)


class FastMultipleChoice(ModelWithHead):
    """Scores which of several continuations fits best: see `FastModel`."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput | tuple[Any, ...]:
        """Scores a padded batch of questions with their choices, as the transformers model does.

        Arguments and errors are those of `FastClassifier.forward`, but all inputs are (batch, num_choices, seqlen), and
        ``labels`` are (batch,), the right choice.

        Returns:
            MultipleChoiceModelOutput with ``logits`` (batch, num_choices), without gradient.
        """
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
        for name, tensor in zip(names, given, strict=True):
            wanted = 4 if name == "inputs_embeds" else 3
            if isinstance(tensor, Tensor) and tensor.ndim != wanted:
                found = tuple(tensor.shape)
                raise ValueError(
                    f"{name} must have {wanted} dimensions, (batch, num_choices, seqlen, ...), got {found}"
                )
        # Anything but a tensor is refused below, by name.
        batch = PaddedBatch(*(tensor.flatten(0, 1) if isinstance(tensor, Tensor) else tensor for tensor in given))
        self._checked(batch, kwargs)
        texts, choices = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]  # type: ignore[union-attr]
        if labels is not None and labels.shape != (texts,):
            raise ValueError(f"labels must have shape ({texts},), one a question, got {tuple(labels.shape)}")
        logits = self._rows(batch, self.own_head.spec.rows, self.fill_of_texts).view(texts, choices)
        loss = None if labels is None else F.cross_entropy(logits, labels.to(logits.device))
        return self._given(MultipleChoiceModelOutput(loss=loss, logits=logits), return_dict)
