"""Models that give each token logits: for its label, or for being an answer's first or last token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForQuestionAnsweringLoss
from transformers.modeling_outputs import QuestionAnsweringModelOutput, TokenClassifierOutput

from ..engine.batch import PaddedBatch
from .classification import Labelled
from .embeddings import ModelWithHead
from .losses import checked_labels, checked_positions, token_loss


class FastTokenClassifier(Labelled):
    """Labels each token: see `FastModel`."""

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
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Classifies the tokens of a padded batch, as the transformers model does.

        Arguments and errors are those of `FastClassifier.forward`, but any mask with a token in each row is taken, and
        ``labels`` are (batch, seqlen), -100 where none is wanted, as for padding.

        Returns:
            TokenClassifierOutput with ``logits`` (batch, seqlen, num_labels), without gradient; zeros for padding.
        """
        batch = PaddedBatch(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        shape = self._checked(batch, kwargs)
        if labels is not None:
            labels = checked_labels(labels, shape, attention_mask)
        logits = self._rows(batch, "all")
        loss = None if labels is None else token_loss(logits, labels, self._labels_of_loss())
        return self._given(TokenClassifierOutput(loss=loss, logits=logits), return_dict)


class FastQuestionAnswerer(ModelWithHead):
    """Scores where in a text the answer begins and ends: see `FastModel`."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """Scores each token of a padded batch as the answer's first and last, as the transformers model does.

        Arguments and errors are those of `FastClassifier.forward`, but any mask with a token in each row is taken;
        ``start_positions`` and ``end_positions``, (batch,) and together, add the loss, which leaves padding out,
        while transformers' own counts what it computes there.

        Returns:
            QuestionAnsweringModelOutput with ``start_logits`` and ``end_logits`` (batch, seqlen), without gradient; the
            lowest number there is for padding, so that no answer is found in it.
        """
        batch = PaddedBatch(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        texts = self._checked(batch, kwargs)[0]
        start_positions, end_positions = checked_positions(
            texts, attention_mask, start_positions=start_positions, end_positions=end_positions
        )
        if self.width != 2:
            raise ValueError(f"config.num_labels must be 2 for question answering, got {self.width}")
        start, end = self._rows(batch, "all", torch.finfo(self.dtype).min).unbind(2)
        start, end, loss = start.contiguous(), end.contiguous(), None
        if start_positions is not None and end_positions is not None:
            loss = ForQuestionAnsweringLoss(
                start, end, start_positions.to(start.device), end_positions.to(start.device)
            )
        return self._given(QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end), return_dict)
