"""Texts of many requests in a fair order: long texts and large requests neither hold up small ones nor starve.

Every request gets an equal share of the model's time, as if the requests that wait were served by turns, a moment each
(generalised processor sharing: Demers, Keshav and Shenker, 1989). A text's turn is the share at which it would be done;
the earliest turn comes first. Besides, each pass takes the text that has waited longest.
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
        gone: whether it is in a pass, or was left out.
    """

    owner: Any
    group: Any
    tokens: int
    cost: float
    text: Any
    index: int
    turn: float = field(default=0.0, init=False)
    gone: bool = field(default=False, init=False)


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
        self._count = 0
        self._by_turn: dict[Hashable, list[tuple[float, int, Waiting]]] = {}
        self._by_age: deque[Waiting] = deque()
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
            each.turn = turn
            self._count += 1
            heapq.heappush(self._by_turn.setdefault(each.group, []), (turn, self._count, each))
            self._by_age.append(each)
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
        while self._by_age and self._by_age[0].gone:
            self._by_age.popleft()
        if not self._by_age:
            # What is left in the heaps was dropped.
            self._by_turn.clear()
            return []
        requests, oldest = self.requests, self._by_age.popleft()
        taken, tokens = [oldest], oldest.tokens
        self._remove(oldest)
        heap = self._by_turn[oldest.group]
        while heap and (max_texts is None or len(taken) < max_texts):
            *_, each = heap[0]
            if not each.gone:
                if tokens + each.tokens > max_tokens:
                    break
                self._remove(each)
                taken.append(each)
                tokens += each.tokens
            heapq.heappop(heap)
        if not heap:
            del self._by_turn[oldest.group]
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
