"""The answer is checked before it is timed: a fast wrong answer is worth nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .provider import Forward, Model, Provider, own_copy
from .providers import EAGER, baseline_of

# A provider of reduced precision that keeps fewer labels is not timed. The crudest of them, ONNX Runtime's int8 with
# one scale for all texts of a batch, keeps 94 % on real weights; an ignored mask leaves 75 %.
LEAST_AGREEMENT = 0.9


class Verdict(NamedTuple):
    """Whether a provider may be timed; if not, ``reason`` says why."""

    passed: bool
    difference: float | None
    reason: str = ""


class Reference:
    """The answers of the transformers model in float32 by its baseline, and how far from them a provider may be.

    In float32 the bound is the provider's own, for logits of about 1, which random weights give over the labels and
    over the vocabulary. In 16 bits it is twice the difference that transformers eager makes in the same dtype on the
    same inputs: a provider need not be more exact than the usual way, and may not be cruder. Inputs are batches or,
    where ``way`` makes of a provider of batches one of texts, corpora.
    """

    def __init__(
        self, model: Model, inputs: Sequence[Any], way: Callable[[Provider], Provider] = lambda each: each
    ) -> None:
        self.inputs, in_float32 = inputs, model.dtype == torch.float32
        single = model if in_float32 else own_copy(model).float()
        exact = way(baseline_of(type(single))).load(single).forward
        self.answers = [exact(each).cpu() for each in inputs]
        self._of_eager = None if in_float32 else self._difference(way(EAGER).load(model).forward)

    def bound(self, provider: Provider) -> float:
        return provider.bound if self._of_eager is None else 2 * self._of_eager

    def check(self, provider: Provider, forward: Forward) -> Verdict:
        """Runs every input, which also warms the provider up."""
        try:
            difference = self._difference(forward)
        except ValueError as error:
            return Verdict(False, None, str(error))
        bound = math.inf if provider.reduced else self.bound(provider)
        reason = f"logits differ by {difference:.1e}, more than {bound:.0e}" if difference > bound else ""
        return Verdict(not reason, difference, reason)

    @torch.inference_mode()
    def _difference(self, forward: Forward) -> float:
        largest = []
        for each, expected in zip(self.inputs, self.answers, strict=True):
            found = forward(each).float().cpu()
            if found.shape != expected.shape:
                raise ValueError(f"logits have shape {tuple(found.shape)} and not {tuple(expected.shape)}")
            if not bool(found.isfinite().all()):
                raise ValueError("logits are not all finite")
            largest.append(float((found - expected).abs().max()))
        return max(largest)


class Kept(NamedTuple):
    """What a provider keeps of transformers' answers in float32."""

    agreement: float | None  # the share of texts with the same label; None on random weights, where it means nothing
    mean_error: float  # of a logit, or a score
    reason: str = ""  # why it is not enough, if it is not


class Judge:
    """Compares labels and answers of many texts, where no bound on a single logit can tell rounding from an error.

    On real weights, those of `sentences.fitted_model`, it takes real sentences and asks for `LEAST_AGREEMENT`. Random
    weights give nearly the same logits for every text. There it asks only that an error is smaller, on average, than
    the difference between two texts: a coarse net. The peers' graphs are also checked by their providers in float32.
    """

    def __init__(self, exact: Forward, inputs: Sequence[Any], fitted: bool, texts: str) -> None:
        self.inputs, self.fitted = inputs, fitted
        self.answers = self._answers(exact)
        self.about = f"{len(self.answers)} {texts}"

    @torch.inference_mode()
    def _answers(self, forward: Forward) -> Tensor:
        return torch.cat([forward(each).float().cpu() for each in self.inputs])

    def judge(self, forward: Forward) -> Kept:
        found = self._answers(forward)
        error = float((found - self.answers).abs().mean())
        if self.fitted:
            agreement = float((found.argmax(1) == self.answers.argmax(1)).double().mean())
            few = f"keeps {agreement:.1%} of the labels, less than {LEAST_AGREEMENT:.0%}"
            return Kept(agreement, error, few if agreement < LEAST_AGREEMENT else "")
        apart = float((self.answers - self.answers.roll(1, 0)).abs().mean())
        large = f"logits are off by {error:.1e} on average, and texts differ by {apart:.1e}"
        return Kept(None, error, "" if error < apart else large)
