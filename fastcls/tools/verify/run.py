"""The comparison itself: both models on the same batches, one after the other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ... import __version__
from ...conversion import optimize
from ...models.base import FastModel
from ...texts import Cut, checked_texts, found_text, length_limit, own_copy, plain, read_cut, tokenizer_problem
from ..demo import sample_texts
from .answers import Answers, Batch, Encoded, Runner, Text, answers_of, task_of
from .comparison import Comparison, rounding_errors

# The original's rounding error is measured on this many texts, and on those whose answers changed.
REFERENCE_TEXTS = 64


@dataclass
class Timed:
    """How long a model took for the texts that were timed."""

    name: str
    dtype: str
    texts: int = 0
    seconds: float = 0.0

    @property
    def texts_per_second(self) -> float | None:
        return self.texts / self.seconds if self.seconds else None


@dataclass
class Verification:
    """The findings of `verify`.

    Attributes:
        model_class, task, device, dtype: of the original.
        comparisons: fastcls against the original in the original's dtype; then, in each reduced dtype, the original
            and fastcls, both against the original in its own dtype.
        timed: the times of the original and of fastcls, in each dtype.
        texts: how many were compared.
        tokens: how many tokens they hold, without padding.
        interrupted: whether Ctrl-C ended it before the last text.
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

    def fine(self, *, strict: bool = False) -> bool:
        """Whether rounding explains every changed answer, no answer is far off and all numbers are finite.

        With ``strict`` in reduced dtypes, too.
        """
        decisive = self.comparisons if strict else self.comparisons[:1]
        return not any(each.beyond_rounding or each.far_off or each.not_finite for each in decisive)

    def to_json(self) -> dict[str, Any]:
        """The findings as plain data.

        ``model_class``, ``task``, ``device``, ``dtype``, ``texts``, ``tokens`` and ``interrupted`` are the attributes;
        ``fine`` is the verdict that decides the exit status without ``--strict``; ``versions`` has those of fastcls,
        torch and transformers. ``times`` has for each model ``name`` ("original", "fastcls"), ``dtype``, ``texts``,
        ``seconds`` and ``texts_per_second``. Each of ``comparisons`` is against the original in its own dtype:

        - ``name`` and ``dtype`` of the model compared; ``labels``, how many were compared; ``changed``, how many
          differ, and ``beyond_rounding``, how many of these rounding does not explain (null: not judged). Without
          labels both count answers that rounding does not explain.
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
                }
                for timed in self.timed
            ],
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
        }


@dataclass
class _Pair:
    """The original and fastcls in one dtype."""

    original: Runner
    fast: Runner
    timed: tuple[Timed, Timed]
    batches: int = field(default=0)

    def run(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        """Both models' answers. They take turns at coming first; the very first batch is run once without timing."""
        sides = list(zip((self.original, self.fast), self.timed, strict=True))
        if not self.batches:
            for runner, _ in sides:
                runner.answer(batch)
        found: list[Tensor | None] = [None, None]
        for index in (0, 1) if self.batches % 2 else (1, 0):
            runner, timed = sides[index]
            _wait_for(device)
            started = time.perf_counter()
            output = runner.answer(batch)
            _wait_for(device)
            timed.seconds += time.perf_counter() - started
            timed.texts += len(batch.texts)
            found[index] = runner.rows(output, batch)
        self.batches += 1
        original, fast = found
        assert original is not None
        assert fast is not None
        return original, fast


class _Reduced(NamedTuple):
    pair: _Pair
    original: Comparison
    fast: Comparison


def verify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Text],
    *,
    fast: FastModel | None = None,
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

    Args:
        model: a transformers model of a supported family, in eval mode.
        tokenizer: the tokenizer that belongs to it.
        texts: any number of them, each a string or a pair; for multiple choice a question and its choices.
        fast: the fast model to compare; None is ``fastcls.optimize(model)``.
        reduced: 16-bit dtypes in which the original and fastcls are compared with it, too; needs a float32 model. None
            is bfloat16 for a float32 model, and no dtype for others.
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
        ValueError: an option out of its range; no text at all; a text that is too long, holds no token, or has too few
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
    dtypes = _reduced_dtypes(reduced, model.dtype)
    fast = optimize(model) if fast is None else _checked(fast, model, task)
    # A copy, because a tokenizer keeps padding and truncation as its state, which other code may set meanwhile.
    answers = answers_of(model, own_copy(tokenizer), getattr(fast, "num_labels", 0))
    where = model.device
    own = _pair(answers, model, fast)
    comparison = Comparison("fastcls", _name(model.dtype), answers, judged=True)
    result = Verification(type(model).__name__, task, str(where), _name(model.dtype), [comparison], [*own.timed])
    others = []
    for dtype in dtypes:
        # Copies, because the model shares its weights with its fast one.
        lower = _copy(model, dtype)
        pair = _pair(answers, lower, optimize(lower))
        found = [
            Comparison(name, _name(dtype), answers, judged=judged)
            for name, judged in (("original", False), ("fastcls", True))
        ]
        others.append(_Reduced(pair, *found))
        result.comparisons += found
        result.timed += pair.timed
    exact = answers.original(_exact_copy(model))
    cut = read_cut(answers.tokenizer, answers.max_positions, truncation, None, None)
    encoder = _TextEncoder(answers, cut, source)
    try:
        with torch.no_grad():
            for batch in encoder.batches(islice(texts, limit), batch_size):
                if not result.texts and answers.decides == "nothing":
                    # Without labels the errors of a few texts may all be small by chance.
                    _learn_from_samples(answers, own, exact, others, comparison, batch_size)
                _compare(batch, answers, own, exact, others, result, where)
                if progress is not None:
                    progress(result.texts)
    except KeyboardInterrupt:
        result.interrupted = True
    if not result.texts and not result.interrupted:
        raise ValueError(f"{source or 'texts'} must hold at least one text, got none: nothing was compared")
    return result


def _compare(
    batch: Batch,
    answers: Answers,
    own: _Pair,
    exact: Runner,
    others: list[_Reduced],
    result: Verification,
    where: torch.device,
) -> None:
    comparison = result.comparisons[0]
    original, fast = own.run(batch, where)
    lower = [other.pair.run(batch, where) for other in others]
    is_reference = result.texts < REFERENCE_TEXTS
    suspects = [*range(len(batch.texts))] if is_reference else comparison.suspects(batch, original, fast)
    errors = torch.zeros(len(batch.texts), dtype=torch.float64)
    if suspects:
        chosen = batch.take(suspects)
        of_chosen = torch.isin(answers.owners(batch), torch.tensor(suspects))
        errors[suspects] = rounding_errors(original[of_chosen], exact.ask(chosen), answers, chosen)
    lower_errors = [rounding_errors(rows, original, answers, batch) for rows, _ in lower]
    # Nothing below takes long, so that Ctrl-C finds whole batches counted.
    if is_reference:
        comparison.learn(errors)
        for other, found in zip(others, lower_errors, strict=True):
            other.fast.learn(found)
    comparison.add(batch, original, fast, errors)
    for other, rows, found in zip(others, lower, lower_errors, strict=True):
        other.original.add(batch, original, rows[0])
        other.fast.add(batch, original, rows[1], found)
    result.texts += len(batch.texts)
    result.tokens += int(batch.mask.sum())


def _learn_from_samples(
    answers: Answers, own: _Pair, exact: Runner, others: list[_Reduced], comparison: Comparison, batch_size: int
) -> None:
    """Measures the original's rounding errors on the project's own texts."""
    cut = Cut("longest_first", length_limit(answers.tokenizer, answers.max_positions))
    for batch in _TextEncoder(answers, cut, source=None).batches(iter(sample_texts()), batch_size):
        original = own.original.ask(batch)
        comparison.learn(rounding_errors(original, exact.ask(batch), answers, batch))
        for other in others:
            other.fast.learn(rounding_errors(other.pair.original.ask(batch), original, answers, batch))


class _TextEncoder:
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


def _checked(fast: FastModel, model: PreTrainedModel, task: str) -> FastModel:
    if not isinstance(fast, FastModel) or fast.head.spec.task != task:
        raise TypeError(f"fast must be what fastcls.optimize makes of the model, for {task}, got {type(fast).__name__}")
    if (fast.dtype, fast.device) != (model.dtype, model.device):
        raise ValueError(
            f"fast must be in {_name(model.dtype)} on {model.device} like the model, "
            f"got {_name(fast.dtype)} on {fast.device}"
        )
    return fast


def _pair(answers: Answers, model: PreTrainedModel, fast: Any) -> _Pair:
    dtype = _name(model.dtype)
    return _Pair(answers.original(model), answers.fast(fast), (Timed("original", dtype), Timed("fastcls", dtype)))


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
