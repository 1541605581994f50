"""The comparison itself: both models on the same batches, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ... import __version__
from ...conversion import optimize
from ...engine.spec import Quantize
from ...models.base import FastModel
from ...texts import checked_texts
from ...tokenizing import Cut, length_limit, own_copy, read_cut
from ..demo import sample_texts
from .answers import Answers, Batch, Runner, Text, answers_of, task_of
from .batches import TextEncoder, TrueLabels
from .comparison import MAX_CHANGED, Comparison, rounding_errors

# The original's rounding error is measured on this many texts, and on those whose answers changed.
REFERENCE_TEXTS = 64


@dataclass
class Timed:
    """How long a model took for the texts that were timed, and the bytes of its weights."""

    name: str
    dtype: str
    texts: int = 0
    seconds: float = 0.0
    weight_bytes: int = 0

    @property
    def texts_per_second(self) -> float | None:
        return self.texts / self.seconds if self.seconds else None


@dataclass
class Verification:
    """The findings of `verify`.

    Attributes:
        model_class, task, device, dtype: of the original.
        comparisons: fastcls against the original in the original's dtype, after fastcls in int8 if that was asked for;
            then, in each reduced dtype, the original and fastcls, both against the original in its own dtype.
        timed: the times and weights of the original and of fastcls, in each dtype.
        texts: how many were compared.
        tokens: how many tokens they hold, without padding.
        interrupted: whether Ctrl-C ended it before the last text.
        quantize: what products of the first comparison are computed in, "int8"; None if in ``dtype``.
    """

    model_class: str
    task: str
    device: str
    dtype: str
    comparisons: list[Comparison]
    timed: list[Timed]
    texts: int = 0
    tokens: int = 0
    interrupted: bool = False
    quantize: Quantize | None = None

    def fine(self, *, strict: bool = False) -> bool:
        """Whether rounding explains every changed answer, no answer is far off and all numbers are finite.

        With ``quantize``: whether at most the allowed share of labels changed, whatever rounding explains, and all
        numbers are finite; without labels, only the latter. With ``strict`` all that is said of fastcls's other dtypes
        must be fine, too.
        """
        decisive = self.comparisons if strict else self.comparisons[:1]
        if any(each.beyond_share for each in decisive):
            return False
        return not any(each.beyond_rounding or each.far_off or each.not_finite for each in decisive)

    def to_json(self) -> dict[str, Any]:
        """The findings as plain data.

        ``model_class``, ``task``, ``device``, ``dtype``, ``quantize``, ``texts``, ``tokens`` and ``interrupted`` are
        the attributes; ``fine`` is the verdict that decides the exit status without ``--strict``; ``versions`` has
        those of fastcls, torch and transformers. ``times`` has for each model ``name`` ("original", "fastcls"),
        ``dtype``, ``texts``, ``seconds``, ``texts_per_second`` and ``weight_bytes``. Each of ``comparisons`` is against
        the original in its own dtype:

        - ``name`` and ``dtype`` of the model compared; ``labels``, how many were compared; ``changed``, how many
          differ, and ``beyond_rounding``, how many of these rounding does not explain (null: not judged). Without
          labels both count answers that rounding does not explain.
        - ``changed_percent``: ``changed`` in percent of ``labels`` (null without labels), and ``max_changed``, the
          percentage that may change (null: it decides nothing).
        - ``accuracy``: null without true labels; else ``texts``, how many have one, and in percent the accuracy of the
          ``original`` and of the model ``compared``, and the ``difference``, below 0 if accuracy was lost.
        - ``far_off``: how many answers with labels have a number that differs by more than ten times what rounding
          explains (null: not judged), and ``furthest_line``, the line of the largest of these differences, or null.
        - ``differences`` between logits (for encoders, states): ``count``, ``equal``, ``not_finite`` (in one of the two
          or both), ``largest`` and ``mean`` of the finite ones, and ``histogram``, a list of ``from``, ``below`` and
          ``count``.
        - ``rounding_error_of_the_original``: the largest that was seen on the first texts (null: not judged).
        - ``embedding_cosine``: ``mean`` and ``lowest`` of an encoder's first tokens, else null.
        - ``changed_labels``: the 20 with the largest margins, each with ``line`` (from 1), ``text``, ``place``,
          ``original`` and ``fastcls`` (``label`` and ``score``; null without labels), ``margin``, ``explained_up_to``
          and ``beyond_rounding``. Infinite numbers and NaN are null.
        """
        import transformers

        return {
            "model_class": self.model_class,
            "task": self.task,
            "device": self.device,
            "dtype": self.dtype,
            "quantize": self.quantize,
            "texts": self.texts,
            "tokens": self.tokens,
            "interrupted": self.interrupted,
            "fine": self.fine(),
            "versions": {
                "fastcls": __version__,
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
            },
            "times": [
                {
                    "name": timed.name,
                    "dtype": timed.dtype,
                    "texts": timed.texts,
                    "seconds": timed.seconds,
                    "texts_per_second": timed.texts_per_second,
                    "weight_bytes": timed.weight_bytes,
                }
                for timed in self.timed
            ],
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
        }


class _Side(NamedTuple):
    """A model, how to ask it, and how long its answers take."""

    model: Any
    runner: Runner
    timed: Timed


@dataclass
class _Sides:
    """The original in one dtype, and the fast models that are compared with it there."""

    sides: list[_Side]
    batches: int = field(default=0)

    @property
    def original(self) -> Runner:
        return self.sides[0].runner

    def run(self, batch: Batch, device: torch.device) -> list[Tensor]:
        """All answers. The models take turns at coming first; the very first batch is run once without timing."""
        if not self.batches:
            for side in self.sides:
                side.runner.answer(batch)
        found: dict[int, Tensor] = {}
        for turn in range(len(self.sides)):
            index = (self.batches + 1 + turn) % len(self.sides)
            _, runner, timed = self.sides[index]
            _wait_for(device)
            started = time.perf_counter()
            output = runner.answer(batch)
            _wait_for(device)
            timed.seconds += time.perf_counter() - started
            timed.texts += len(batch.texts)
            found[index] = runner.rows(output, batch)
        self.batches += 1
        return [found[index] for index in range(len(self.sides))]


class _Reduced(NamedTuple):
    sides: _Sides
    original: Comparison
    fast: Comparison


def verify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Text],
    *,
    fast: FastModel | None = None,
    labels: Iterable[str | int] | None = None,
    quantize: Quantize | None = None,
    max_changed: float | None = None,
    reduced: Sequence[str | torch.dtype] | None = None,
    batch_size: int = 32,
    truncation: bool = False,
    limit: int | None = None,
    source: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """Compares a transformers model with its fast model from `fastcls.optimize`, on your texts.

    Both see the same batches of successive texts, padded to the longest. Rounding explains a changed label if the two
    logits that changed places could have met by rounding alone: the original's margin between them is at most twice the
    difference that the two computations may have. They may differ by three times the original's own rounding error (its
    own once, and fastcls's, which is held to twice that). This error, the largest of its logits, is measured against
    the same model in float64: on the first 64 texts and on the very text whose label changed. In reduced dtypes it is
    measured on each text against the original in its own dtype. If labels go by a logit's sign, the margin is the logit
    itself, and may be at most once that difference. Whatever its label, an answer is far off if a logit differs by more
    than ten times what the computations may; this allowance is then at least eight steps of the dtype at the answer's
    largest logit, because few logits may all be exact by chance. Without labels (scores, regression, encoders), an
    answer counts as changed if its numbers differ by more than the computations may, and fastcls's own sample texts
    join the first 64.

    With ``quantize`` the quantised model is compared, and its weights and times are shown beside those of the fast
    model that is not. Int8 moves every logit by more than rounding does, so that only the share of changed labels
    decides then.

    Args:
        model: a transformers model of a supported family, in eval mode.
        tokenizer: the tokenizer that belongs to it.
        texts: any number of them, each a string or a pair; for multiple choice a question and its choices.
        fast: the fast model to compare; None is ``fastcls.optimize(model, quantize=quantize)``, in int8 even where that
            is slow.
        labels: the true labels of the texts, in their order, by name or number, if the model gives each text one of
            several: for the accuracy of all models.
        quantize: see `FastModel`; of a given ``fast`` it is that model's own.
        max_changed: with a quantised model, how many percent of the labels may change; None is 1.
        reduced: 16-bit dtypes in which the original and fastcls are compared with it, too; needs a float32 model. None
            is bfloat16 for a float32 model, and no dtype for others or with ``quantize``.
        batch_size: texts in a batch.
        truncation: cut texts that are longer than ``tokenizer.model_max_length`` or the model's positions, to the
            smaller of both; otherwise a text longer than the positions is an error.
        limit: stop after this many texts.
        source: the name of the file whose lines the texts are, for messages.
        progress: called after each batch with the number of texts done.

    Returns:
        The findings; if Ctrl-C came before the end, those up to then.

    Raises:
        TypeError: a model that is not supported, a table, something that is no text, or another ``fast`` than the
            model's.
        ValueError: an option out of its range or that does not fit the model; no text at all; labels that are not the
            model's or not one for each text; a text that is too long, holds no token, or has too few
            parts for the task; a tokenizer that does not pad or is not the model's; a config that does not name the
            model's labels.
    """
    task = task_of(model)
    for name, number in (("batch_size", batch_size), ("limit", limit)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if model.training:
        raise ValueError("model must be in eval mode, got one in training mode: call model.eval() first")
    if tokenizer.pad_token is None:
        raise ValueError("tokenizer must have a padding token, got none: texts are compared in padded batches")
    texts = checked_texts(texts)
    if fast is None:
        fast = optimize(model)
        # Set afterwards, int8 is computed even where it is slow: its answers come as near everywhere.
        fast.quantize = quantize
    else:
        _check_fits(fast, model, task, quantize)
    if fast.quantize is not None and reduced is None:
        reduced = ()
    dtypes = _reduced_dtypes(reduced, model.dtype)
    # A copy, because a tokenizer keeps padding and truncation as its state, which other code may set meanwhile.
    answers = answers_of(model, own_copy(tokenizer), getattr(fast, "num_labels", 0))
    share = _share(max_changed, fast, answers)
    true_labels = TrueLabels(answers, labels, source)
    where = model.device
    compared = [Comparison("fastcls", _name(model.dtype), answers, judged=True)]
    models = [fast]
    if fast.quantize is not None:
        compared.insert(0, Comparison("fastcls", fast.quantize, answers, judged=False, max_changed=share))
        models.append(optimize(model))
    own = _sides(answers, model, *models)
    result = Verification(type(model).__name__, task, str(where), _name(model.dtype), [*compared], [])
    result.quantize = fast.quantize
    others = []
    for dtype in dtypes:
        # Copies, because the model shares its weights with its fast one.
        lower = _copy(model, dtype)
        found = [
            Comparison(name, _name(dtype), answers, judged=judged)
            for name, judged in (("original", False), ("fastcls", True))
        ]
        others.append(_Reduced(_sides(answers, lower, optimize(lower)), *found))
        result.comparisons += found
    exact = answers.original(_exact_copy(model))
    cut = read_cut(answers.tokenizer, answers.max_positions, truncation, None, None)
    encoder = TextEncoder(answers, cut, source)
    sides = [side for each in (own, *(other.sides for other in others)) for side in each.sides]
    result.timed += [side.timed for side in sides]
    try:
        with torch.no_grad():
            for batch in encoder.batches(islice(texts, limit), batch_size):
                known = true_labels.of(batch)
                if not result.texts and answers.decides == "nothing":
                    # Without labels the errors of a few texts may all be small by chance.
                    _learn_from_samples(answers, own, exact, others, compared[-1], batch_size)
                _compare(batch, known, answers, own, exact, others, result, where)
                if progress is not None:
                    progress(result.texts)
        if limit is None:
            true_labels.check_all_read()
    except KeyboardInterrupt:
        result.interrupted = True
    if not result.texts and not result.interrupted:
        raise ValueError(f"{source or 'texts'} must hold at least one text, got none: nothing was compared")
    for side in sides:
        # Weights may be packed at their first use. In int8 a classifier lets the others go.
        if getattr(side.model, "quantize", None) is not None:
            side.model.let_go()
        side.timed.weight_bytes = side.model.get_memory_footprint()
    return result


def _compare(
    batch: Batch,
    true_labels: Tensor | None,
    answers: Answers,
    own: _Sides,
    exact: Runner,
    others: list[_Reduced],
    result: Verification,
    where: torch.device,
) -> None:
    original, *fast = own.run(batch, where)
    lower = [other.sides.run(batch, where) for other in others]
    # Rounding judges the last of them.
    compared = result.comparisons[: len(fast)]
    is_reference = result.texts < REFERENCE_TEXTS
    suspects = [*range(len(batch.texts))] if is_reference else compared[-1].suspects(batch, original, fast[-1])
    errors = torch.zeros(len(batch.texts), dtype=torch.float64)
    if suspects:
        chosen = batch.take(suspects)
        of_chosen = torch.isin(answers.owners(batch), torch.tensor(suspects))
        errors[suspects] = rounding_errors(original[of_chosen], exact.ask(chosen), answers, chosen)
    lower_errors = [rounding_errors(rows, original, answers, batch) for rows, _ in lower]
    # Nothing below takes long, so that Ctrl-C finds whole batches counted.
    if is_reference:
        compared[-1].learn(errors)
        for other, found in zip(others, lower_errors, strict=True):
            other.fast.learn(found)
    for comparison, rows in zip(compared, fast, strict=True):
        comparison.add(batch, original, rows, errors, true_labels)
    for other, (of_original, of_fast), found in zip(others, lower, lower_errors, strict=True):
        other.original.add(batch, original, of_original, None, true_labels)
        other.fast.add(batch, original, of_fast, found, true_labels)
    result.texts += len(batch.texts)
    result.tokens += int(batch.mask.sum())


def _learn_from_samples(
    answers: Answers, own: _Sides, exact: Runner, others: list[_Reduced], comparison: Comparison, batch_size: int
) -> None:
    """Measures the original's rounding errors on the project's own texts."""
    cut = Cut("longest_first", length_limit(answers.tokenizer, answers.max_positions))
    for batch in TextEncoder(answers, cut, source=None).batches(iter(sample_texts()), batch_size):
        original = own.original.ask(batch)
        comparison.learn(rounding_errors(original, exact.ask(batch), answers, batch))
        for other in others:
            other.fast.learn(rounding_errors(other.sides.original.ask(batch), original, answers, batch))


def _share(max_changed: float | None, fast: FastModel, answers: Answers) -> float | None:
    """How many percent of the labels may change in a quantised model; None if it gives none."""
    if max_changed is None:
        return MAX_CHANGED if answers.decides != "nothing" else None
    if fast.quantize is None:
        raise ValueError("max_changed must be left out where nothing is quantised: rounding decides")
    if answers.decides == "nothing":
        raise ValueError(f"max_changed must be left out for a model without labels, got {max_changed}")
    if not 0 <= max_changed <= 100:
        raise ValueError(f"max_changed must be a percentage from 0 to 100, got {max_changed}")
    return max_changed


def _reduced_dtypes(reduced: Sequence[str | torch.dtype] | None, dtype: torch.dtype) -> list[torch.dtype]:
    if reduced is None:
        return [torch.bfloat16] if dtype == torch.float32 else []
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    parsed = [known.get(each, each) if isinstance(each, str) else each for each in reduced]
    for each in parsed:
        if each not in known.values():
            raise ValueError(f"reduced must name {' or '.join(known)}, got {each!r}")
    if parsed and dtype != torch.float32:
        raise ValueError(f"reduced dtypes are compared with an original in float32, got one in {_name(dtype)}")
    return list(dict.fromkeys(each for each in parsed if isinstance(each, torch.dtype)))


def _check_fits(fast: FastModel, model: PreTrainedModel, task: str, quantize: Quantize | None) -> None:
    if not isinstance(fast, FastModel) or fast.own_head.spec.task != task:
        raise TypeError(f"fast must be what fastcls.optimize makes of the model, for {task}, got {type(fast).__name__}")
    if (fast.dtype, fast.device) != (model.dtype, model.device):
        raise ValueError(
            f"fast must be in {_name(model.dtype)} on {model.device} like the model, "
            f"got {_name(fast.dtype)} on {fast.device}"
        )
    if quantize not in (None, fast.quantize):
        raise ValueError(f"quantize must be that of fast, {fast.quantize!r}, or left out, got {quantize!r}")


def _sides(answers: Answers, model: PreTrainedModel, *fast: FastModel) -> _Sides:
    dtype = _name(model.dtype)
    sides = [_Side(model, answers.original(model), Timed("original", dtype))]
    sides += [_Side(each, answers.fast(each), Timed("fastcls", each.quantize or dtype)) for each in fast]
    return _Sides(sides)


def _copy(model: PreTrainedModel, dtype: torch.dtype, device: torch.device | str | None = None) -> Any:
    # nn.Module.to, because transformers' wrapper around it hides its types.
    return nn.Module.to(deepcopy(model), device=device, dtype=dtype)


def _exact_copy(model: PreTrainedModel) -> Any:
    # Apple's GPUs have no float64.
    exact = _copy(model, torch.float64, "cpu" if model.device.type == "mps" else None)
    if exact.config.model_type == "modernbert":
        # Its eager softmax is float32 inside, where float64's lowest number is -inf.
        exact.set_attn_implementation("sdpa")
    return exact


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
