"""Mask fillers: the last layer and the product with the vocabulary run for the masked tokens alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForMaskedLMLoss
from transformers.modeling_outputs import MaskedLMOutput

from ..engine.batch import PaddedBatch
from ..engine.spec import Rows
from .embeddings import ModelWithHead
from .losses import IGNORED, checked_labels


@dataclass
class FastMaskedLMOutput(MaskedLMOutput):
    """A masked language model's output, with the rows that were computed.

    Attributes:
        logits: (batch, seqlen, vocab_size), zeros where nothing was predicted; or, not dense, (num_rows, vocab_size).
        rows: (num_rows, 2) int64 on the CPU, text and token of each predicted row, in order; None from a compiled or
            exported graph. An attribute only: the output's items and tuple are transformers' own.
    """

    rows: ClassVar[Tensor | None] = None

    @classmethod
    def of(cls, loss: Tensor | None, logits: Tensor, rows: Tensor) -> FastMaskedLMOutput:
        output = cls(loss=loss, logits=logits)
        object.__setattr__(output, "rows", rows)
        return output


class FastMaskedLM(ModelWithHead):
    """Fills masks: see `FastModel`. The last layer and the vocabulary product run for the masked tokens only.

    Attributes:
        mask_token_id: the id of the mask token, ``tokenizer.mask_token_id``. While it is None every token is predicted,
            unless labels say which; so it is in training, too, where a loss of one's own may read any token.
        dense: whether logits stand at their places in a padded batch, or are one row for each predicted token.
    """

    mask_token_id: int | None = None
    dense: bool = True

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
    ) -> FastMaskedLMOutput | tuple[Any, ...]:
        """Predicts the tokens of a padded batch that have labels, else the masked ones, else all.

        Arguments and errors are those of `FastClassifier.forward`, but any mask with a token in each row is taken, and
        ``labels`` are (batch, seqlen), -100 for tokens that are not to be predicted; they add the loss.

        Returns:
            FastMaskedLMOutput, without gradient.
        """
        batch = PaddedBatch(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        shape = self._checked(batch, kwargs)
        wanted: Tensor | None = None
        if labels is not None:
            labels = checked_labels(labels, shape, attention_mask)
            wanted = labels != IGNORED
        elif self.mask_token_id is not None and input_ids is not None and not self.training:
            wanted = input_ids == self.mask_token_id
        if torch.compiler.is_compiling():
            return self._given(self._traced(batch, wanted, labels), return_dict)
        rows: Rows = "all" if wanted is None else "chosen"
        logits = self._rows(batch, rows, chosen=wanted, dense=self.dense)
        if wanted is None:
            wanted = torch.ones(shape, dtype=torch.bool, device="cpu")
        if attention_mask is not None:
            wanted = wanted & attention_mask.to(wanted.device).bool()
        predicted = wanted.nonzero().cpu()
        loss = None
        if labels is not None:
            found = logits[tuple(predicted.T)] if self.dense else logits
            expected = labels[tuple(predicted.to(labels.device).T)]
            count = kwargs.get("num_items_in_batch") if self.accepts_loss_kwargs else None
            loss = ForMaskedLMLoss(found, expected, found.shape[1], num_items_in_batch=count)
        return self._given(FastMaskedLMOutput.of(loss, logits, predicted), return_dict)

    def _traced(self, batch: PaddedBatch, wanted: Tensor | None, labels: Tensor | None) -> FastMaskedLMOutput:
        if not self.dense:
            raise RuntimeError(
                "dense must be True in a graph, which does not know how many tokens are masked: set it, or call the "
                "model outside of what is compiled or exported"
            )
        logits = self._rows(batch, "all" if wanted is None else "chosen", chosen=wanted)
        loss = None if labels is None else ForMaskedLMLoss(logits, labels, self.width)
        return FastMaskedLMOutput(loss=loss, logits=logits)
