"""A request's texts on their way, and what is known of the passes that compute them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..texts import Item
from .fair_queue import Waiting
from .served import Input, Served, Side, Want

# A guess at a text's tokens before it is tokenized: English has some four characters a token, and two are special.
_CHARACTERS_A_TOKEN, _SPECIAL = 4, 2
# Of what was measured before a pass so much still counts after it.
_KEPT = 0.9
# Each pass that fits lets the next one be larger by one part of so many.
_RECOVERY = 64


class Answer(NamedTuple):
    """What became of a request's texts.

    Attributes:
        results: of each text, what `Served.compute` gives.
        tokens: how many were computed.
        tokenization, queue, inference: seconds; of the queue and of inference a mean over the texts.
    """

    results: list[Any]
    tokens: int
    tokenization: float
    queue: float
    inference: float


@dataclass(eq=False, slots=True)
class Request:
    """The texts of a request, on their way.

    Attributes:
        came, waited: when, and for how many seconds until it was tokenized.
        tokenized: when it was; 0 if it was not.
        queue, inference: seconds, summed over the texts that were computed so far.
    """

    served: Served
    want: Want
    inputs: Sequence[Input]
    truncate: bool
    side: Side
    guess: float
    deadline: float
    future: asyncio.Future[Answer]
    waiting: list[Waiting] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    error: Exception | None = None
    left: int = 0
    tokens: int = 0
    came: float = field(default_factory=time.monotonic)
    waited: float = 0.0
    tokenized: float = 0.0
    tokenization: float = 0.0
    queue: float = 0.0
    inference: float = 0.0
    is_begun: bool = False
    is_over: bool = False

    @property
    def answer(self) -> Answer:
        count = len(self.results)
        waited = self.waited + self.queue / count
        return Answer(self.results, self.tokens, self.tokenization, waited, self.inference / count)


class Pace:
    """How fast a model computes, by its passes, of which later ones and larger ones count for more."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self._tokens = _KEPT * self._tokens + tokens
        self._seconds = _KEPT * self._seconds + seconds

    @property
    def seconds_a_token(self) -> float:
        return self._seconds / self._tokens if self._tokens else 0.0


class PassSize:
    """How large a pass may be: less for a while after one that did not fit into memory.

    Args:
        most: tokens of a pass, where memory is no matter.

    Attributes:
        tokens: of a pass, for now.
    """

    def __init__(self, most: int) -> None:
        self._most = self.tokens = most

    def did_not_fit(self, tokens: int) -> None:
        """A pass of so many tokens did not fit."""
        self.tokens = max(1, min(self.tokens, tokens) // 2)

    def fitted(self) -> None:
        """A pass has fitted: whoever took the memory may give it back."""
        self.tokens = min(self._most, self.tokens + self.tokens // _RECOVERY + 1)


class ClientGoneError(Exception):
    """A client has left before it was answered."""


def characters_of(inputs: Sequence[Input]) -> int:
    """How many characters texts have, those given by token ids excepted."""
    return sum(each.characters for each in inputs if isinstance(each, Item))


def tokens_of(given: Input) -> float:
    """A guess at how many tokens a text has, before it is tokenized."""
    if not isinstance(given, Item):
        return len(given)
    return given.characters / _CHARACTERS_A_TOKEN + _SPECIAL
