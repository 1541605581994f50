"""Labels, checked, and losses, computed as transformers' models compute them.

A label at a masked token is refused, since transformers' models count what they compute there. A graph cannot check
values while it is traced, so there the check is a node that raises the same error when it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.loss.loss_utils import ForSequenceClassificationLoss, ForTokenClassification

# The label of a token without one.
IGNORED = -100


@dataclass
class _Config:
    """The config that a loss reads, and into which it writes the kind of labels that it found."""

    num_labels: int
    problem_type: Any = None


def classification_loss(
    logits: Tensor, labels: Tensor, num_labels: int, problem_type: str | None
) -> tuple[Tensor, Any]:
    """A sequence classifier's loss, for its problem type, or for the one that the labels look like, and that type.

    Args:
        logits: (num_texts, width).
        labels: (num_texts,) or (num_texts, width).
        num_labels: the model's number of labels, which a custom head may not have.
        problem_type: the config's.
    """
    config = _Config(num_labels, problem_type)
    loss: Tensor = ForSequenceClassificationLoss(labels, logits, config)
    return loss, config.problem_type


def deberta_loss(logits: Tensor, labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """DeBERTa's loss for a config without a problem type, and the logits in the shape that it then gives."""
    labels = labels.to(logits.device)
    if num_labels == 1:
        logits = logits.view(-1).to(labels.dtype)
        return F.mse_loss(logits, labels.view(-1)), logits
    if labels.ndim > 1 and labels.shape[-1] > 1:
        return -(logits.log_softmax(-1) * labels).sum(-1).mean(), logits
    labels = labels.view(-1)
    known = labels >= 0
    if not bool(known.any()):
        return torch.tensor(0).to(logits), logits
    return F.cross_entropy(logits[known].view(-1, num_labels).float(), labels[known].long()), logits


def token_loss(logits: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """A token classifier's loss over the tokens whose label is not `IGNORED`."""
    loss: Tensor = ForTokenClassification(logits, labels, _Config(num_labels))
    return loss


def checked_labels(labels: Tensor, shape: torch.Size, attention_mask: Tensor | None) -> Tensor:
    """Labels of tokens.

    Raises:
        ValueError: their shape is not the batch's, or a masked token has a label.
    """
    if labels.shape != shape:
        raise ValueError(f"labels must have the batch's shape {tuple(shape)}, got {tuple(labels.shape)}")
    if attention_mask is None:
        return labels
    if torch.compiler.is_compiling():
        return _checked_labels(labels, attention_mask)
    _check_labels(labels, attention_mask)
    return labels


def checked_positions(
    texts: int, attention_mask: Tensor | None, **positions: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Positions of answers, one a text, where tokens are; the loss ignores those beyond the end, as transformers does.

    Raises:
        ValueError: there are more or fewer than texts, or one stands where the mask leaves a token out.
    """
    for name, given in positions.items():
        if given is not None and given.numel() != texts:
            raise ValueError(f"{name} must be one for each of the {texts} texts, got {tuple(given.shape)}")
    if attention_mask is None:
        return tuple(positions.values())
    return tuple(
        None if given is None else _positions_within(name, given, attention_mask) for name, given in positions.items()
    )


def _positions_within(name: str, positions: Tensor, attention_mask: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return _checked_positions(positions, attention_mask, name)
    _check_positions(positions, attention_mask, name)
    return positions


def _check_labels(labels: Tensor, attention_mask: Tensor) -> None:
    if bool(((labels != IGNORED).cpu() & (attention_mask.cpu() == 0)).any()):
        raise ValueError(f"labels must be {IGNORED} where attention_mask is 0, got others there")


def _check_positions(positions: Tensor, attention_mask: Tensor, name: str) -> None:
    mask, places = attention_mask.cpu() != 0, positions.cpu().view(-1)
    inside = (places >= 0) & (places < mask.shape[1])
    wrong = inside & ~mask.gather(1, places.clamp(0, mask.shape[1] - 1)[:, None].long())[:, 0]
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name} must point to a token, got {int(places[row])} for text {row}, where attention_mask is 0"
        )


@torch.library.custom_op("fastcls::checked_labels", mutates_args=())
def _checked_labels(labels: Tensor, attention_mask: Tensor) -> Tensor:
    _check_labels(labels, attention_mask)
    # An operator may not return one of its inputs.
    return labels.clone()


@torch.library.custom_op("fastcls::checked_positions", mutates_args=())
def _checked_positions(positions: Tensor, attention_mask: Tensor, name: str) -> Tensor:
    _check_positions(positions, attention_mask, name)
    return positions.clone()


@_checked_labels.register_fake
def _(labels: Tensor, _attention_mask: Tensor) -> Tensor:
    return torch.empty_like(labels)


@_checked_positions.register_fake
def _(positions: Tensor, _attention_mask: Tensor, _name: str) -> Tensor:
    return torch.empty_like(positions)
