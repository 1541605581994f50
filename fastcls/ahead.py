"""An iterator whose items are made ahead of their use, by a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

_T = TypeVar("_T")


class _Failed(NamedTuple):
    error: BaseException


class _End(NamedTuple):
    pass


def made_ahead(items: Iterator[_T], count: int) -> Iterator[_T]:
    """The same items, of which a thread makes at most ``count`` that nobody took yet.

    An exception of the iterator is raised here, behind the items before it. Whoever stops early, stops the thread.
    """
    waiting: queue.Queue[_T | _Failed | _End] = queue.Queue(count)
    stopped = threading.Event()

    def put(item: _T | _Failed | _End) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for item in items:
                if not put(item):
                    return
        except BaseException as error:
            put(_Failed(error))
        else:
            put(_End())

    thread = threading.Thread(target=make, name="fastcls-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := waiting.get(), _End):
            if isinstance(item, _Failed):
                raise item.error
            yield item
    finally:
        stopped.set()
        thread.join()
