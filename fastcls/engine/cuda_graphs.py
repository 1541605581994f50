"""CUDA graphs: a whole pass in one launch, for batches so small that launching takes longer than computing.

A graph is fixed to a shape of packed tokens, not to lengths, which the kernels read from `cu_seqlens` on the device. So
texts are filled up to one of few shapes (`bucket_of`), and a graph serves every mixture of lengths that fits its shape.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastcls_kernels import is_batch_invariant

from .packing import PackedTokens, PackFields, PackShape
from .spec import EncoderSpec, LastLayer, Rows

# A pass: packed tokens on the device to the rows that are wanted.
Pass = Callable[[PackedTokens], Tensor]

# Shapes differ by at least this many tokens, and by at most an eighth: a few percent of filling on average.
_STEP = 64
# Capture at the second use: most shapes of a short run come once, and the plain pass before compiles the kernels.
_USES_BEFORE_CAPTURE = 2
# A shape whose graph had to go needs this many times as many uses for another, so that shapes that do not fit in
# together do not chase each other out: capturing takes longer than many plain passes.
_MORE_USES = 4
# How many graphs are kept, and the memory of their intermediate results, which they share: one replays at a time.
MAX_GRAPHS = 64
MAX_POOL_BYTES = 1 << 30
# Estimates of where launches stop mattering: a layer's launches, the CPU's time for one, a large GPU's rate.
_LAUNCHES_PER_LAYER = 7
_SECONDS_PER_LAUNCH = 10e-6
_FLOPS_PER_SECOND = 600e12

# CUDA allows one capture at a time in a process.
_capturing = threading.Lock()


def bucket_of(tokens: int, sequences: int) -> PackShape:
    """The shape that a pass of some tokens in some sequences is filled up to."""
    num_sequences = 1 << (sequences - 1).bit_length()
    # An empty sequence after the last one is read at its first token, so that row must exist.
    tokens += num_sequences > sequences
    step = max(_STEP, 1 << max((tokens - 1).bit_length() - 4, 0))
    return PackShape(-(-tokens // step) * step, num_sequences)


def max_graph_tokens(spec: EncoderSpec) -> int:
    """The most tokens of a pass that is replayed: beyond, computing takes twice as long as launching."""
    weights = 4 * spec.hidden_size**2 + (3 if spec.gated else 2) * spec.hidden_size * spec.intermediate_size
    seconds_per_token = 2 * weights / _FLOPS_PER_SECOND
    tokens = int(2 * _LAUNCHES_PER_LAYER * _SECONDS_PER_LAUNCH / seconds_per_token)
    return max(_STEP, tokens // _STEP * _STEP)


class Captured(Protocol):
    """A captured pass, over memory of its own."""

    def replay(self, integers: Tensor) -> Tensor:
        """The pass over `PackedTokens.integers`; nothing else writes to the result."""


class Capture(Protocol):
    """Captures passes, which share one pool of memory."""

    def __call__(self, run: Pass, packed: PackedTokens) -> Captured:
        """Captures ``run`` over new memory, with packed tokens of the shape of ``packed``."""

    @property
    def pool_bytes(self) -> int:
        """The memory that the captured passes take together."""


class GraphKey(NamedTuple):
    """Everything but the weights that a captured pass depends on."""

    shape: PackShape
    fields: PackFields
    rows: Rows
    last_layer: LastLayer
    batch_invariant: bool


def graph_key(packed: PackedTokens, rows: Rows, last_layer: LastLayer) -> GraphKey:
    """What a pass over ``packed`` is kept under."""
    return GraphKey(packed.shape, packed.fields, rows, last_layer, is_batch_invariant())


class CudaGraphs:
    """The captured passes of one model: made where a shape comes again, kept by use, bounded in number and memory.

    Safe to call from several threads and streams: replays of one model take turns, since they share their memory.

    Args:
        max_seqlen: a bound on the length of any sequence, or None.
        new_capture: makes what captures, with a pool of its own.
        max_graphs: beyond it the least recently used graph goes.
        max_pool_bytes: beyond it all graphs go, since a shared pool gives its memory back as a whole.
    """

    def __init__(
        self,
        max_seqlen: int | None,
        new_capture: Callable[[], Capture] | None = None,
        max_graphs: int = MAX_GRAPHS,
        max_pool_bytes: int = MAX_POOL_BYTES,
    ) -> None:
        self._max_seqlen = max_seqlen
        self._new_capture = CudaCapture if new_capture is None else new_capture
        self._max_graphs = max_graphs
        self._max_pool_bytes = max_pool_bytes
        # Reentrant: an original that is collected during a replay hands over its last change in the same thread.
        self._lock = threading.RLock()
        self._graphs: OrderedDict[GraphKey, Captured] = OrderedDict()
        # Uses since the shape's graph last went, and how often it went.
        self._uses: Counter[GraphKey] = Counter()
        self._times_gone: Counter[GraphKey] = Counter()
        self._too_large: set[GraphKey] = set()
        self._capture: Capture | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Forgets every graph: after the weights have moved, say."""
        with self._lock:
            self._forget_all()
            self._uses.clear()
            self._times_gone.clear()
            self._too_large.clear()

    def __contains__(self, key: GraphKey) -> bool:
        """Whether a pass has been captured, and would be replayed."""
        return key in self._graphs

    def __call__(self, run: Pass, key: GraphKey, packed: PackedTokens, device: torch.device) -> Tensor:
        """A pass over ``packed``, replayed once its shape is known.

        Args:
            run: the pass, for the rows and the last layer of the key. It must not wait for the device.
            key: the pass's `graph_key`.
            packed: may lie in pinned memory of the CPU.
            device: where it runs.
        """
        with self._lock:
            graph = self._graph(run, key, packed, device)
            if graph is not None:
                return graph.replay(packed.integers)
        return run(packed.to(device))

    def _graph(self, run: Pass, key: GraphKey, packed: PackedTokens, device: torch.device) -> Captured | None:
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            return graph
        if key in self._too_large:
            return None
        self._uses[key] += 1
        if self._uses[key] < _USES_BEFORE_CAPTURE * _MORE_USES ** self._times_gone[key]:
            return None
        if self._capture is None:
            self._capture = self._new_capture()
        moved = packed.to(device)
        # The longest text is this batch's own; the graph must hold for any.
        longest = min(self._max_seqlen or packed.shape.tokens, packed.shape.tokens)
        try:
            graph = self._capture(run, moved.over(moved.integers, max_seqlen=longest))
        except torch.OutOfMemoryError as error:
            self._forget_all()
            self._too_large.add(key)
            _warn(f"no memory for a CUDA graph of {key.shape.tokens} tokens: they run without one ({error})")
            return None
        except RuntimeError as error:
            # Something else on the device interfered: another thread that synchronised it, say.
            self._forget_all()
            self._forget(key)
            _warn(f"capturing a CUDA graph of {key.shape.tokens} tokens failed: they run without one for now ({error})")
            return None
        self._graphs[key] = graph
        if len(self._graphs) > self._max_graphs:
            oldest, _ = self._graphs.popitem(last=False)
            self._forget(oldest)
        if self._capture.pool_bytes > self._max_pool_bytes:
            if len(self._graphs) == 1:
                self._too_large.add(key)
            self._forget_all()
        return graph

    def _forget_all(self) -> None:
        for key in self._graphs:
            self._forget(key)
        self._graphs.clear()
        self._capture = None

    def _forget(self, key: GraphKey) -> None:
        self._uses[key] = 0
        self._times_gone[key] += 1


def _warn(message: str) -> None:
    # The line that asked for logits.
    warnings.warn(message, RuntimeWarning, stacklevel=6)


@dataclass(frozen=True)
class _CudaGraph:
    graph: torch.cuda.CUDAGraph
    integers: Tensor
    logits: Tensor
    # Recorded after the last use of the pool's memory, on whichever stream.
    last_use: torch.cuda.Event

    def replay(self, integers: Tensor) -> Tensor:
        with torch.cuda.device(self.integers.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self.last_use)
            self.integers.copy_(integers, non_blocking=True)
            self.graph.replay()
            logits = self.logits.clone()
            self.last_use.record(stream)
        return logits


class CudaCapture:
    """Captures passes into CUDA graphs."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream: torch.cuda.Stream | None = None
        self._last_use = torch.cuda.Event()
        self.pool_bytes = 0

    def __call__(self, run: Pass, packed: PackedTokens) -> _CudaGraph:
        device = packed.integers.device
        # A capture that fails leaves its stream current, so the caller's is set again here.
        callers = torch.cuda.stream(torch.cuda.current_stream(device))
        with _capturing, torch.cuda.device(device), callers, _no_autograd():
            if self._stream is None:
                # One stream for all captures: a pool's memory is reused within a stream only.
                self._stream = torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())
            self._stream.wait_event(self._last_use)
            with torch.cuda.stream(self._stream):
                # Allocated on this stream, so that its memory is reused only after the last replay, and outside of the
                # caller's inference mode, whose tensors cannot be written to later.
                integers = torch.empty_like(packed.integers).copy_(packed.integers)
                # Warm-up: a capture forbids the allocations and loads of a first use.
                run(packed.over(integers))
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph()
            # A new layout, since the warm-up's has cached results that were computed outside of the graph.
            captured = packed.over(integers)
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                logits = run(captured)
            self.pool_bytes += max(torch.cuda.memory_reserved() - before, 0)
            return _CudaGraph(graph, integers, logits, self._last_use)


@contextlib.contextmanager
def _no_autograd() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def being_captured() -> bool:
    """Whether the caller captures a CUDA graph, in which ours cannot be replayed."""
    return torch.cuda.is_current_stream_capturing()
