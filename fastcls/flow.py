"""Windows of texts to what a model says of each: tokenized ahead of the model, equal texts computed once.

A window is what is looked at at once: its texts are sorted by length and computed in passes of a bounded number of
tokens, so that memory does not grow with the number of texts. What becomes of a window depends on its texts alone.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .ahead import made_ahead
from .engine.batch import BadText, outside
from .engine.spec import EncoderSpec
from .texts import Item
from .tokenizing import Cut, Encoded, Ids, encode, is_plain, pair_problem, tokenizer_problem
from .underway import Underway

LongTexts = Literal["truncate", "error", "window"]
WindowScores = Literal["mean", "max"]

# What a window holds: enough to fill the machine, and to find equal texts in. Its texts and their ids are in memory.
MAX_ROWS, MAX_CHARACTERS = 4096, 4_194_304
# On a GPU so many windows are tokenized ahead, and so many passes under way, while the CPU does the rest. On a CPU the
# model takes all cores, and whoever tokenizes beside it holds up one of them that the others then wait for.
_AHEAD = {"cpu": 0, "cuda": 2}

_Tag = TypeVar("_Tag")


class LongTextPolicy(NamedTuple):
    """What becomes of texts that are longer than the model takes.

    Attributes:
        long_texts: "truncate" cuts them, "error" makes them problems, "window" computes overlapping windows.
        overlap: of windows, how many tokens of one begin the next.
        window_scores: whether a text's scores are the mean of its windows', or for each label the largest.
    """

    long_texts: LongTexts = "truncate"
    overlap: int = 64
    window_scores: WindowScores = "mean"

    def check(self, length: int | None, special: int) -> None:
        """Checks the values.

        Args:
            length: the number of tokens that a text may have, special ones included; None for any.
            special: how many of them are special.

        Raises:
            ValueError: a value that does not exist, or an overlap that leaves a window nothing new.
        """
        for name, value, known in (
            ("long_texts", self.long_texts, get_args(LongTexts)),
            ("window_scores", self.window_scores, get_args(WindowScores)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.long_texts == "window":
            room = None if length is None else length - special
            is_count = isinstance(self.overlap, int) and not isinstance(self.overlap, bool) and self.overlap >= 0
            if not is_count or (room is not None and self.overlap >= room):
                most = "" if room is None else f", less than the {room} tokens of text that a window holds"
                raise ValueError(f"overlap must be an int from 0{most}, got {self.overlap!r}")


class Model(Protocol):
    """A fast model, as far as a flow asks it."""

    @property
    def spec(self) -> EncoderSpec: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...

    tokens_per_pass: int


class Scored(NamedTuple):
    """What became of a window.

    Attributes:
        numbers: (rows, width) float32 on the CPU, logits or vectors; NaN in rows that have a problem.
        scores: the same shape, what the flow's ``score`` makes of them.
        missing: rows that have no text, or a problem, in order.
        problems: why a row's text could not be computed.
        cut: how many rows' texts were cut.
        repeated: how many rows stand for a text that stood in the window before.
        tokens: how many tokens were computed.
        seconds: how long the model was busy.
    """

    numbers: Tensor
    scores: Tensor
    missing: list[int]
    problems: dict[int, str]
    cut: int
    repeated: int
    tokens: int
    seconds: float


class _Found(NamedTuple):
    """A text, tokenized; of a long one the first window, and those behind it."""

    ids: Ids
    types: Ids
    was_cut: bool
    further: Sequence[tuple[Ids, Ids]] = ()


class _Window(NamedTuple):
    """A window, tokenized.

    Attributes:
        found: its different texts, those that can be computed.
        text_of: for each row its text, by a number that `found` has or, for a bad one, has not; None for no text.
        problems: of texts.
    """

    found: dict[int, _Found]
    text_of: list[int | None]
    problems: dict[int, str]


class Flow:
    """Windows of texts through a tokenizer and a model.

    Args:
        model: a fast model.
        tokenizer: its tokenizer, which the flow alone uses while it holds ``lock``.
        compute: lists of token ids and their types to (num_texts, width) numbers on the model's device.
        score: such numbers, float32 on the CPU, to scores.
        cut: how texts are cut, whose length is None where the model takes any.
        policy: what becomes of longer ones.
        lock: held while the tokenizer is used.
        problem_of: says why a text of these ids cannot be computed, or None.

    Raises:
        ValueError: a policy that does not fit, or windows of a tokenizer that gives none.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        compute: Callable[[list[Ids], list[Ids]], Tensor],
        score: Callable[[Tensor], Tensor],
        cut: Cut,
        policy: LongTextPolicy,
        lock: AbstractContextManager[Any] | None = None,
        *,
        problem_of: Callable[[Ids], str | None] | None = None,
    ) -> None:
        policy.check(cut.length, tokenizer.num_special_tokens_to_add(pair=False))
        if policy.long_texts == "window" and not is_plain(tokenizer):
            raise ValueError(
                f'long_texts="window" must have a tokenizer in Rust, got {type(tokenizer).__name__}, which gives no '
                "windows"
            )
        self._model, self._tokenizer, self._compute, self._score = model, tokenizer, compute, score
        self._cut, self._policy, self._lock = cut, policy, lock or threading.Lock()
        self._problem_of = problem_of
        self._ahead = _AHEAD.get(model.device.type, 0)
        if model.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(model.device)
            model.tokens_per_pass = min(model.tokens_per_pass, _tokens_that_fit(model.spec, model.dtype, free))

    def __getstate__(self) -> dict[str, Any]:
        # A copy, in another process for instance, gets its own lock.
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def run(self, windows: Iterable[tuple[Sequence[Item | None], _Tag]]) -> Iterator[tuple[Scored, _Tag]]:
        """What becomes of each window, in order.

        Args:
            windows: the texts of each, None where a row has none, and something that comes back with its result.
        """
        tokenized = ((self._tokenized(texts), tag) for texts, tag in windows)
        underway: deque[tuple[_Window, Underway, _Tag]] = deque()
        try:
            for window, tag in made_ahead(tokenized, self._ahead) if self._ahead else tokenized:
                underway.append((window, self._begun(window), tag))
                if len(underway) > min(self._ahead, 1):
                    yield self._oldest(underway)
        except Exception:
            # If the source fails, what came before is still given.
            while underway:
                yield self._oldest(underway)
            raise
        while underway:
            yield self._oldest(underway)

    def _oldest(self, underway: deque[tuple[_Window, Underway, _Tag]]) -> tuple[Scored, _Tag]:
        window, numbers, tag = underway.popleft()
        return self._finished(window, numbers), tag

    def _tokenized(self, texts: Sequence[Item | None]) -> _Window:
        known: dict[Item, int] = {}
        text_of = [None if text is None else known.setdefault(text, len(known)) for text in texts]
        items, problems, found = list(known), dict[int, str](), dict[int, _Found]()
        with self._lock:
            for is_pair in (False, True):
                rows = [row for row, item in enumerate(items) if (item.pair is not None) is is_pair]
                for row, text in self._found(items, rows, is_pair, problems):
                    if problem := self._problem(text.ids, text.was_cut):
                        problems[row] = problem
                    else:
                        found[row] = text
        return _Window(found, text_of, problems)

    def _found(
        self, items: list[Item], rows: list[int], is_pair: bool, problems: dict[int, str]
    ) -> Iterator[tuple[int, _Found]]:
        """The texts or pairs in these rows; what the tokenizer does not take becomes a problem."""
        cut, overlap = self._cut, None
        if self._policy.long_texts == "window" and cut.length is not None:
            # Of a pair the second text is the document.
            cut, overlap = Cut("only_second" if is_pair else "longest_first", cut.length), self._policy.overlap
        if rows and is_pair and (problem := pair_problem(self._tokenizer, cut)):
            problems.update(dict.fromkeys(rows, problem))
            return

        if overlap is not None and is_pair:
            rows = self._with_room(items, rows, overlap, problems)

        def call(rows: list[int]) -> Encoded:
            pairs = [items[row].pair or "" for row in rows] if is_pair else None
            return encode(self._tokenizer, [items[row].text for row in rows], pairs, cut, overlap=overlap)

        try:
            batches = [(rows, call(rows))]
        except Exception:
            batches = []
            for row in rows:
                try:
                    batches.append(([row], call([row])))
                except Exception as error:
                    problems[row] = tokenizer_problem(items[row], error)
        for batch, encoded in batches:
            for index, row in enumerate(batch):
                further = encoded.further[index] if encoded.further else ()
                was_cut = encoded.cut[index] and not further
                yield row, _Found(encoded.ids[index], encoded.types[index], was_cut, further)

    def _with_room(self, items: list[Item], rows: list[int], overlap: int, problems: dict[int, str]) -> list[int]:
        """The pairs whose windows get on; of the others tokenizers in Rust do not raise an error, they panic."""
        limit, special = self._cut.length or 0, self._tokenizer.num_special_tokens_to_add(pair=True)
        firsts, seconds = [items[row].text for row in rows], [items[row].pair or "" for row in rows]
        try:
            lengths = self._lengths(firsts)
        except Exception:
            lengths = [limit] * len(rows)
        kept = []
        for row, first, second, length in zip(rows, firsts, seconds, lengths, strict=True):
            room = limit - special - length
            if room <= overlap:
                try:
                    room = limit - special - self._lengths([first])[0]
                    fits = sum(self._lengths([first, second])) <= limit - special
                except Exception as error:
                    problems[row] = tokenizer_problem(items[row], error)
                    continue
                if room <= overlap and not fits:
                    problems[row] = (
                        f"has a first text that leaves windows of the second room for {max(room, 0)} tokens, "
                        f"of which {overlap} overlap"
                    )
                    continue
            kept.append(row)
        return kept

    def _lengths(self, texts: list[str]) -> list[int]:
        """Tokens of each text, without special ones."""
        special = self._tokenizer.num_special_tokens_to_add(pair=False)
        return [len(ids) - special for ids in encode(self._tokenizer, texts, None, Cut(False, None)).ids]

    def _problem(self, ids: Ids, was_cut: bool) -> str | None:
        limit, length = self._cut.length, len(ids)
        if not length:
            return "has no tokens"
        if limit is not None and length > limit:
            return f"is {length} tokens long and cannot be cut to {limit}"
        if was_cut and self._policy.long_texts == "error":
            return f"is longer than {limit} tokens"
        return self._problem_of(ids) if self._problem_of is not None else None

    def _begun(self, window: _Window) -> Underway:
        """Computes a window, or has a GPU compute it; texts that the model does not take become problems."""
        while True:
            ids, types = _pieces(window.found.values())
            try:
                return Underway.of(partial(self._within_memory, ids, types), self._model.device)
            except BadText as error:
                # Where one text holds an id that the model has not, many may, and each try takes a window's time.
                owners = [row for row, text in window.found.items() for _ in range(1 + len(text.further))]
                bad = self._outside(window) or {owners[error.row]: error.problem}
                window.problems.update(bad)
                for row in bad:
                    del window.found[row]

    def _outside(self, window: _Window) -> dict[int, str]:
        """The texts that hold an id outside the model's vocabulary, and the first such id of each."""
        size = self._model.spec.vocab_size
        found = {}
        for row, text in window.found.items():
            ids, _ = _pieces([text])
            if max(map(max, ids)) >= size:
                found[row] = outside(next(token for piece in ids for token in piece if token >= size), size)
        return found

    def _within_memory(self, ids: list[Ids], types: list[Ids]) -> Tensor:
        """Computes pieces in passes that are halved as long as they do not fit into the device's memory."""
        while True:
            try:
                return self._compute(ids, types)
            except torch.OutOfMemoryError:
                tokens = self._model.tokens_per_pass
                if tokens <= max(map(len, ids)):
                    raise
                self._model.tokens_per_pass = tokens // 2
                warnings.warn(
                    f"{tokens} tokens in a pass are more than fit into the memory of {self._model.device}: "
                    f"going on with {tokens // 2}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            if self._model.device.type == "cuda":
                torch.cuda.empty_cache()

    def _finished(self, window: _Window, underway: Underway) -> Scored:
        numbers, seconds = underway.wait()
        found, text_of = window.found, window.text_of
        scores = self._score(numbers)
        counts = [1 + len(text.further) for text in found.values()]
        if len(numbers) > len(found):
            numbers, scores = (self._of_texts(each, counts) for each in (numbers, scores))
        place = {text: index for index, text in enumerate(found)}
        # One row more, for those that have none.
        places = [len(found) if text is None else place.get(text, len(found)) for text in text_of]
        index, last = torch.tensor(places, dtype=torch.long), numbers.new_full((1, numbers.shape[1]), torch.nan)
        problems = window.problems
        return Scored(
            torch.cat((numbers, last))[index],
            torch.cat((scores, last))[index],
            [row for row, place_of_row in enumerate(places) if place_of_row == len(found)],
            {row: problems[text] for row, text in enumerate(text_of) if text is not None and text in problems},
            sum(text is not None and text in found and found[text].was_cut for text in text_of),
            sum(text is not None for text in text_of) - len(found) - len(problems),
            sum(map(len, _pieces(found.values())[0])),
            seconds,
        )

    def _of_texts(self, numbers: Tensor, counts: list[int]) -> Tensor:
        """Numbers of windows to those of texts, of which each has ``counts`` windows."""
        return torch.segment_reduce(numbers, self._policy.window_scores, lengths=torch.tensor(counts), axis=0)


def _pieces(texts: Iterable[_Found]) -> tuple[list[Ids], list[Ids]]:
    """The ids and types of all windows of texts."""
    pieces = [piece for text in texts for piece in ((text.ids, text.types), *text.further)]
    return [ids for ids, _ in pieces], [types for _, types in pieces]


def _tokens_that_fit(spec: EncoderSpec, dtype: torch.dtype, free: int) -> int:
    """How many tokens a pass may have, so that it takes at most half of ``free`` bytes.

    At its widest a layer holds its input, queries, keys and values, and the feed-forward's inner states twice.
    """
    bytes_per_token = dtype.itemsize * (5 * spec.hidden_size + 2 * spec.intermediate_size * (1 + spec.gated))
    return max(free // 2 // bytes_per_token, spec.max_positions or MAX_ROWS)
