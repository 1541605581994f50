"""Windows of texts to a cluster's workers and back in their order: files to files on more than one machine."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from .. import __version__
from ..flow import Flow, Scored
from ..predicting.checkpoint import Checkpoint
from ..predicting.loaded import load_shared
from ..predicting.machine import leave
from ..predicting.options import PredictOptions
from ..predicting.predictor import set_threads
from ..texts import Item, first_line
from .library import import_ray, machines_of
from .sent import sent
from .share import shares

_Tag = TypeVar("_Tag")

# While a worker computes one window, the next one is on its way to it.
_UNDERWAY_EACH = 2
# Windows in memory, most of them with results that wait for an earlier window's.
_HELD_EACH = 4
# A window that so many workers ended with is what ended them.
_MOST_DEATHS = 5
# Seconds in which workers let go of what they share.
_LEAVING = 5.0
# A window of long texts takes minutes on one thread. In seconds.
_PATIENCE = 600.0


class Versions(NamedTuple):
    """Of what computes."""

    fastcls: str
    torch: str


class WorkerLostError(Exception):
    """The process that computed something ended, or what it gave was lost with its machine."""


class Worker:
    """A model in a process of its own, on any machine of the cluster."""

    _flow: Flow | None = None

    def ready(self, checkpoint: Checkpoint, options: PredictOptions, threads: int) -> Versions:
        """Loads the model. No constructor does, because Ray wraps the errors of one."""
        set_threads(threads)
        self._flow = load_shared(checkpoint, options).flow
        return Versions(__version__, torch.__version__)

    def leave(self) -> None:
        """Lets go of what the machine's processes share, which Ray's way to end one does not."""
        self._flow = None
        leave()

    def scored(self, texts: Sequence[Item | None]) -> Scored:
        """What becomes of a window.

        Raises:
            WorkerLostError: this process has taken the place of one that had the model.
        """
        if self._flow is None:
            raise WorkerLostError("it was started again")
        ((scored, _),) = self._flow.run([(texts, None)])
        return scored


class Workers:
    """Processes with a model on the machines of a cluster.

    Args:
        address: "auto" for the cluster that this machine belongs to, "local" for one that is started here, or an
            address; a process that is connected to a cluster already stays with it.
        count: how many; None for as many as the cluster has CPUs, or GPUs, for.
        threads: CPU threads of each.
        gpus: of each; None for 1 if the cluster has any.

    Attributes:
        device: where texts are computed, "cuda" or "cpu".
        count: how many workers there are.
        lost: how often one ended and was started again.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: there is no such cluster.
        ValueError: another number; more than the cluster has room for.
    """

    def __init__(self, address: str, *, count: int | None = None, threads: int = 1, gpus: float | None = None) -> None:
        ray = self._ray = import_ray()
        self._actors: list[Any] = []
        self._owns_connection, self._is_local = not ray.is_initialized(), address == "local"
        if self._owns_connection:
            own = {"include_dashboard": False} if self._is_local else {}
            try:
                ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ConnectionError(f"{address} must be a cluster of Ray: {first_line(error)}") from error
        try:
            machines = machines_of(ray)
            self._gpus = float(any(machine.get("GPU") for machine in machines)) if gpus is None else gpus
            self.count, self._cpus = shares(machines, count, threads, self._gpus, ("--workers", "--worker-gpus"))
        except BaseException:
            self.close()
            raise
        self._threads, self.lost = threads, 0
        self.device = "cuda" if self._gpus else "cpu"

    def load(self, model: str, options: PredictOptions) -> None:
        """Starts the workers, and waits until each has loaded the model.

        Raises:
            ValueError, TypeError, OSError: as `load_shared`; a worker with other versions than this process.
        """
        make = self._ray.remote(Worker).options(
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            max_restarts=-1,
            # What a worker was computing goes to whichever is free, not back to the one that starts again.
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        # On this machine alone the folder is where it is. Kept, as a worker that starts again asks for its files again.
        self._asked = (model if self._is_local else sent(model), options, self._threads)
        own = Versions(__version__, torch.__version__)
        self._actors = [make.remote() for _ in range(self.count)]
        started = [self.ready(index) for index in range(self.count)]
        for found in map(self._started, started):
            if found != own:
                raise ValueError(
                    f"workers must have fastcls {own.fastcls} and torch {own.torch}, as this process has, got one with "
                    f"fastcls {found.fastcls} and torch {found.torch}"
                )

    def _started(self, reference: Any) -> Versions:
        try:
            found: Versions = self.result(self.first([reference]))
        except WorkerLostError as error:
            raise ValueError(f"a worker ended before it had its model: {first_line(error)}") from error
        return found

    def ready(self, index: int) -> Any:
        """Refers to the versions of a worker, which are there once it is."""
        # A number of tries would be used up while Ray has not yet seen that the process has ended.
        return self._actors[index].ready.options(max_task_retries=-1).remote(*self._asked)

    def scored(self, index: int, texts: Sequence[Item | None]) -> Any:
        """Refers to what becomes of a window at a worker."""
        return self._actors[index].scored.remote(texts)

    def result(self, reference: Any) -> Any:
        """What is referred to; errors as they were raised.

        Raises:
            WorkerLostError: the worker ended.
        """
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except (errors.RayActorError, errors.OutOfMemoryError, errors.ObjectLostError, errors.NodeDiedError) as error:
            raise WorkerLostError(first_line(error)) from error
        except errors.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from error

    def first(self, references: Sequence[Any]) -> Any:
        """Waits for the first of some results, and warns if that takes long: Ray waits for a lost machine for ever."""
        while True:
            ready, _ = self._ray.wait(references, num_returns=1, timeout=_PATIENCE)
            if ready:
                return ready[0]
            warnings.warn(
                f"no worker has answered for {_PATIENCE / 60:g} minutes: all are busy with long texts, gone, or "
                "without room in the cluster",
                RuntimeWarning,
                stacklevel=2,
            )

    def run(self, windows: Iterable[tuple[Sequence[Item | None], _Tag]]) -> Iterator[tuple[Scored, _Tag]]:
        """What becomes of each window, in order: see `Flow.run`. A worker that ends loses nothing.

        Raises:
            ValueError: a window that ends each worker that computes it.
        """
        return _Run(self, windows).results()

    def close(self) -> None:
        """Ends the workers, and the connection if it was made for them."""
        if self._actors:
            # One that computes is not waited for.
            self._ray.wait([actor.leave.remote() for actor in self._actors], num_returns=self.count, timeout=_LEAVING)
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        if self._owns_connection:
            self._ray.shutdown()
            self._owns_connection = False


class _Window(Generic[_Tag]):
    """A window that is under way: at a worker, or with its result waiting for those of earlier windows."""

    def __init__(self, texts: Sequence[Item | None], tag: _Tag) -> None:
        self.texts, self.tag = texts, tag
        self.scored: Scored | None = None
        self.deaths = 0
        self.first_row = 0


class _Run(Generic[_Tag]):
    """One run of windows over workers.

    Attributes:
        held: windows without a result that was given, in order.
        waiting: those that no worker has.
        queues: those that each worker has, in the order in which it computes them.
        starting: workers that ended, with what is there once they are again.
    """

    def __init__(self, workers: Workers, windows: Iterable[tuple[Sequence[Item | None], _Tag]]) -> None:
        self._workers, self._source = workers, iter(windows)
        self._held: deque[_Window[_Tag]] = deque()
        self._waiting: deque[_Window[_Tag]] = deque()
        self._queues: list[deque[tuple[Any, _Window[_Tag]]]] = [deque() for _ in range(workers.count)]
        self._starting: dict[int, Any] = {}
        self._rows = 0
        # How often each worker ended since it last gave a result.
        self._ends = [0] * workers.count
        self._is_over = False
        self._failure: Exception | None = None

    def results(self) -> Iterator[tuple[Scored, _Tag]]:
        while True:
            self._hand_out()
            while self._held and (scored := self._held[0].scored) is not None:
                yield scored, self._held.popleft().tag
            if self._held:
                self._take()
            elif self._is_over:
                break
        if self._failure is not None:
            raise self._failure

    def _hand_out(self) -> None:
        """Gives workers windows as long as one has room for another."""
        while (index := self._free()) is not None and (window := self._next()) is not None:
            self._queues[index].append((self._workers.scored(index, window.texts), window))

    def _free(self) -> int | None:
        """The worker with the fewest windows, if one has room."""
        able = [
            index
            for index, queue in enumerate(self._queues)
            if index not in self._starting and len(queue) < _UNDERWAY_EACH
        ]
        return min(able, key=lambda index: len(self._queues[index]), default=None)

    def _next(self) -> _Window[_Tag] | None:
        """The window to hand out, if there is one."""
        if self._waiting:
            return self._waiting.popleft()
        if self._is_over or len(self._held) >= _HELD_EACH * self._workers.count:
            return None
        try:
            window = _Window(*next(self._source))
        except StopIteration:
            self._is_over = True
            return None
        except Exception as error:
            # What came before is still given.
            self._is_over, self._failure = True, error
            return None
        window.first_row, self._rows = self._rows, self._rows + len(window.texts)
        self._held.append(window)
        return window

    def _take(self) -> None:
        """Waits for a result, for the end of a worker, or for one that is there again."""
        at = {queue[0][0]: index for index, queue in enumerate(self._queues) if queue}
        at.update({reference: index for index, reference in self._starting.items()})
        ready = self._workers.first(list(at))
        index = at[ready]
        try:
            found = self._workers.result(ready)
        except WorkerLostError as error:
            self._lose(index, error)
        else:
            if self._starting.pop(index, None) is None:
                self._queues[index].popleft()[1].scored = found
                self._ends[index] = 0

    def _lose(self, index: int, error: WorkerLostError) -> None:
        self._workers.lost += 1
        self._ends[index] += 1
        if self._ends[index] > _MOST_DEATHS:
            raise ValueError(
                f"a worker ended {self._ends[index]} times without a result: {error}. Perhaps its machine is gone, or "
                "has too little memory for so many workers"
            )
        queue = self._queues[index]
        if queue:
            window = queue[0][1]
            window.deaths += 1
            if window.deaths == _MOST_DEATHS:
                first, last = window.first_row + 1, window.first_row + len(window.texts)
                raise ValueError(
                    f"rows {first:,} to {last:,} of this run ended each of {_MOST_DEATHS} workers that computed them, "
                    "perhaps for want of memory: fewer workers a machine leave more for each"
                )
        # They come before all windows that were not handed out yet.
        self._waiting.extendleft(window for _, window in reversed(queue))
        queue.clear()
        self._starting[index] = self._workers.ready(index)
