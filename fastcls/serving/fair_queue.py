"""Texts of many requests in a fair order: long texts and large requests neither hold up small ones nor starve.

Every request gets an equal share of the model's time, as if the requests that wait were served by turns, a moment each
(generalised processor sharing: Demers, Keshav and Shenker, 1989). A text's turn is the share at which it would be done;
the earliest turn comes first. Every second pass begins with the text that has waited longest instead.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False, slots=True)
class Waiting:
    """A text that waits.

    Attributes:
        owner: the request that it belongs to.
        group: texts of one group can be computed in one pass.
        tokens: how many it has.
        cost: how long the model takes for it, probably, in seconds.
        text: what is computed.
        index: its place in the request.
        turn: its place in the order.
        gone: whether it is not in the queue: not yet, in a pass, or left out.
    """

    owner: Any
    group: Any
    tokens: int
    cost: float
    text: Any
    index: int
    turn: float = field(default=0.0, init=False)
    gone: bool = field(default=True, init=False)


class _Group:
    """The texts that can be computed in one pass, in the order of their turns and of their age."""

    def __init__(self) -> None:
        self.by_turn: list[tuple[float, int, Waiting]] = []
        self.by_age: deque[tuple[int, Waiting]] = deque()

    def trim(self) -> bool:
        """Lets go of texts in front that wait no more; whether others are left."""
        while self.by_turn and self.by_turn[0][2].gone:
            heapq.heappop(self.by_turn)
        while self.by_age and self.by_age[0][1].gone:
            self.by_age.popleft()
        return bool(self.by_turn)


class FairQueue:
    """Texts that wait, for one thread at a time.

    Attributes:
        texts: how many wait.
        cost: of all that wait, in seconds.
    """

    def __init__(self) -> None:
        self.texts, self.cost = 0, 0.0
        # What every request that waits has been given so far, in seconds.
        self._share = 0.0
        self._count = self._passes = 0
        self._groups: dict[Hashable, _Group] = {}
        self._of_owner: dict[Any, int] = {}

    @property
    def requests(self) -> int:
        """How many requests have texts that wait."""
        return len(self._of_owner)

    def put(self, texts: Sequence[Waiting]) -> None:
        """The texts of one request, in its order."""
        turn = self._share
        for each in texts:
            turn += each.cost
            each.turn, each.gone = turn, False
            self._count += 1
            group = self._groups.setdefault(each.group, _Group())
            heapq.heappush(group.by_turn, (turn, self._count, each))
            group.by_age.append((self._count, each))
            self._of_owner[each.owner] = self._of_owner.get(each.owner, 0) + 1
            self.texts += 1
            self.cost += each.cost

    def drop(self, texts: Sequence[Waiting]) -> None:
        """Leaves out those of the texts that are in no pass yet."""
        for each in texts:
            if not each.gone:
                self._remove(each)

    def next_pass(self, max_tokens: int, max_texts: int | None = None) -> list[Waiting]:
        """The texts of a pass, all of one group; none if none wait.

        Args:
            max_tokens: how many at most, unless a text alone has more.
            max_texts: how many at most; None for any number.
        """
        for key, each in list(self._groups.items()):
            if not each.trim():
                del self._groups[key]
        if not self._groups:
            return []
        self._passes += 1
        requests, taken, tokens = self.requests, list[Waiting](), 0
        if self._passes % 2:
            group = min(self._groups.values(), key=lambda group: group.by_turn[0][0])
        else:
            group = min(self._groups.values(), key=lambda group: group.by_age[0][0])
            _, oldest = group.by_age.popleft()
            taken, tokens = [oldest], oldest.tokens
            self._remove(oldest)
        while group.by_turn and (max_texts is None or len(taken) < max_texts):
            *_, waiting = group.by_turn[0]
            if not waiting.gone:
                if taken and tokens + waiting.tokens > max_tokens:
                    break
                self._remove(waiting)
                taken.append(waiting)
                tokens += waiting.tokens
            heapq.heappop(group.by_turn)
        self._share += sum(each.cost for each in taken) / requests
        return taken

    def _remove(self, each: Waiting) -> None:
        each.gone = True
        self.texts -= 1
        # Sums of floats drift.
        self.cost = self.cost - each.cost if self.texts else 0.0
        left = self._of_owner[each.owner] - 1
        if left:
            self._of_owner[each.owner] = left
        else:
            del self._of_owner[each.owner]
