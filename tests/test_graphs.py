"""CUDA graphs: when they are made, kept and forgotten, and that a replay is the pass itself.

Without a GPU a stand-in takes the place of the capture: it runs the pass again over the memory that a graph would own,
so that whatever a graph would freeze at capture (the shape, the bound on lengths) is frozen there too.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast, get_args

import pytest
import torch
from support import tiny_bert
from torch import Tensor
from transformers import BertConfig

import fastcls
from fastcls import FastClassifier
from fastcls.engine.cuda_graphs import CudaGraphs, bucket_of, max_graph_tokens
from fastcls.engine.packing import PackedTokens
from fastcls.engine.spec import EncoderSpec, LastLayer
from fastcls.families import bert
from fastcls_kernels import Backend, batch_invariant, use_backend


class StandIn:
    """Stands in for `CudaCapture`; counts what it does."""

    def __init__(self, bytes_each: int = 0) -> None:
        self.captures = 0
        self.replays = 0
        self.bytes_each = bytes_each

    @property
    def pool_bytes(self) -> int:
        return self.captures * self.bytes_each

    def __call__(self, run: Callable[[PackedTokens], Tensor], packed: PackedTokens) -> StandInGraph:
        self.captures += 1
        return StandInGraph(self, run, packed.over(packed.integers.clone()))


class StandInGraph:
    def __init__(self, capture: StandIn, run: Callable[[PackedTokens], Tensor], packed: PackedTokens) -> None:
        self.capture = capture
        self.run = run
        self.packed = packed

    def replay(self, integers: Tensor) -> Tensor:
        self.capture.replays += 1
        self.packed.integers.copy_(integers)
        # Long enough for another thread to come between, if nothing kept it out.
        time.sleep(0.001)
        return self.run(self.packed.over(self.packed.integers))


def graphs_of(fast: FastClassifier, capture: Any, **limits: int) -> CudaGraphs:
    return CudaGraphs(fast.spec.max_positions, new_capture=lambda: capture, **limits)


@pytest.fixture
def capture() -> StandIn:
    return StandIn()


@pytest.fixture
def fast(capture: StandIn, monkeypatch: pytest.MonkeyPatch) -> FastClassifier:
    """A small classifier that replays as on a GPU, by stand-ins, over plain PyTorch."""
    fast = fastcls.optimize(tiny_bert(num_hidden_layers=2))
    monkeypatch.setattr(FastClassifier, "_may_replay", lambda self, _shape: self.cuda_graphs)
    monkeypatch.setattr("fastcls.engine.engine.explain_backend", lambda _device: ("triton", "for a test"))
    # A build of torch without CUDA cannot be asked.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    fast._graphs = graphs_of(fast, capture)
    return fast


def texts_of(*lengths: int) -> list[list[int]]:
    return [torch.randint(5, 199, (length,)).tolist() for length in lengths]


@contextlib.contextmanager
def no_graphs(fast: FastClassifier) -> Iterator[None]:
    fast.cuda_graphs = False
    try:
        yield
    finally:
        fast.cuda_graphs = True


def plain(fast: FastClassifier, texts: list[list[int]], types: list[list[int]] | None = None) -> Tensor:
    with no_graphs(fast):
        return fast.logits_of(texts, types)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= 1e-5


# Each fills up to 64 tokens in 4 sequences; the first, whose longest text a graph might keep, is the shortest.
MIXTURES = [(3, 2, 4), (1, 1, 1, 1), (20, 1, 30), (61, 1, 1), (16, 16, 16, 16), (15, 17, 2)]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_graph_serves_every_mixture_of_lengths(fast: FastClassifier, capture: StandIn, backend: Backend) -> None:
    for lengths in MIXTURES:
        texts = texts_of(*lengths)
        expected = plain(fast, texts)
        with use_backend(backend):
            assert_close(fast.logits_of(texts), expected)
    assert (capture.captures, capture.replays) == (1, 5)


def test_a_padded_batch_is_replayed_too(fast: FastClassifier, capture: StandIn) -> None:
    ids = torch.randint(5, 199, (3, 9))
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1, 0, 1, 1, 0, 0, 1, 0, 1]])
    for _ in range(3):
        logits = fast(input_ids=ids, attention_mask=mask, token_type_ids=ids % 2).logits
    with no_graphs(fast):
        assert_close(logits, fast(input_ids=ids, attention_mask=mask, token_type_ids=ids % 2).logits)
    assert capture.replays == 2


def test_a_shape_is_captured_at_its_second_use(fast: FastClassifier, capture: StandIn) -> None:
    for made in (0, 1, 1):
        fast.logits_of(texts_of(5))
        assert capture.captures == made
    fast.logits_of(texts_of(5, 5))
    assert (capture.captures, capture.replays) == (1, 2)


def test_rungs_and_token_types_have_graphs_of_their_own(fast: FastClassifier, capture: StandIn) -> None:
    texts = texts_of(5, 9)
    types = [[1] * len(text) for text in texts]
    for last_layer in get_args(LastLayer):
        fast.last_layer = last_layer
        for _ in range(2):
            assert_close(fast.logits_of(texts), plain(fast, texts))
            assert_close(fast.logits_of(texts, types), plain(fast, texts, types))
    assert (capture.captures, capture.replays) == (6, 6)


def test_batch_invariance_has_graphs_of_its_own(fast: FastClassifier, capture: StandIn) -> None:
    texts = texts_of(5, 9)
    for context in (contextlib.nullcontext, batch_invariant):
        for _ in range(2):
            with context():
                fast.logits_of(texts)
    assert (capture.captures, capture.replays) == (2, 2)


def test_the_graph_least_recently_used_goes(fast: FastClassifier, capture: StandIn) -> None:
    fast._graphs = graphs_of(fast, capture, max_graphs=2)
    one, two, three = texts_of(5), texts_of(5, 5), texts_of(5, 5, 5)
    for texts in (one, one, two, two, one, three, three):
        fast.logits_of(texts)
    assert (capture.captures, len(fast._graphs)) == (3, 2)
    fast.logits_of(one)
    assert capture.captures == 3, "the one used last but one must stay"
    replays = capture.replays
    fast.logits_of(two)
    assert capture.replays == replays, "the one least recently used must be gone"
    for _ in range(7):
        fast.logits_of(two)
    assert capture.captures == 4


def test_shapes_that_do_not_fit_in_together_do_not_chase_one_another(fast: FastClassifier, capture: StandIn) -> None:
    fast._graphs = graphs_of(fast, capture, max_graphs=2)
    for _ in range(40):
        for count in (1, 2, 3):
            fast.logits_of(texts_of(*[5] * count))
    assert capture.captures <= 3 * 3


def test_a_capture_that_breaks_is_said_and_tried_again_later(fast: FastClassifier) -> None:
    class BreaksOnce(StandIn):
        broken = False

        def __call__(self, run: Any, packed: PackedTokens) -> StandInGraph:
            if not self.broken:
                self.broken = True
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().__call__(run, packed)

    capture = BreaksOnce()
    fast._graphs = graphs_of(fast, capture)
    texts = texts_of(5, 9)
    expected = plain(fast, texts)
    fast.logits_of(texts)
    with pytest.warns(RuntimeWarning, match=r"a CUDA graph of 64 tokens failed: .*not permitted"):
        assert_close(fast.logits_of(texts), expected)
    for _ in range(10):
        assert_close(fast.logits_of(texts), expected)
    assert capture.captures == 1


def test_a_model_that_nobody_holds_is_gone_at_once() -> None:
    fast = fastcls.optimize(tiny_bert(num_hidden_layers=2))
    fast.logits_of(texts_of(5))
    alive = weakref.ref(fast)
    del fast
    assert alive() is None


def test_memory_is_given_back_when_graphs_take_too_much(fast: FastClassifier) -> None:
    made: list[StandIn] = []

    def new_capture() -> StandIn:
        made.append(StandIn(bytes_each=40))
        return made[-1]

    fast._graphs = CudaGraphs(96, new_capture=new_capture, max_pool_bytes=100)
    for count in (1, 2, 3):
        for _ in range(2):
            fast.logits_of(texts_of(*[5] * count))
    # The third took the pool to 120 bytes: it and the other two went, and the pool with them.
    assert len(fast._graphs) == 0
    for _ in range(8):
        fast.logits_of(texts_of(5))
    assert len(fast._graphs) == 1
    assert [capture.captures for capture in made] == [3, 1]


def test_what_alone_takes_too_much_is_not_captured_again(fast: FastClassifier) -> None:
    capture = StandIn(bytes_each=200)
    fast._graphs = graphs_of(fast, capture, max_pool_bytes=100)
    texts = texts_of(5, 9)
    for _ in range(5):
        assert_close(fast.logits_of(texts), plain(fast, texts))
    assert (capture.captures, len(fast._graphs)) == (1, 0)


def test_no_memory_for_a_graph_is_said_and_the_pass_runs_without(fast: FastClassifier) -> None:
    tried = []

    def out_of_memory(_run: object, _packed: object) -> Any:
        tried.append(True)
        raise torch.OutOfMemoryError("CUDA out of memory")

    fast._graphs = graphs_of(fast, out_of_memory)
    texts = texts_of(5, 9)
    fast.logits_of(texts)
    with pytest.warns(RuntimeWarning, match=r"no memory for a CUDA graph of 64 tokens: .*out of memory"):
        assert_close(fast.logits_of(texts), plain(fast, texts))
    fast.logits_of(texts)
    assert len(tried) == 1


def test_threads_do_not_mix_their_texts(fast: FastClassifier) -> None:
    batches = [texts_of(*[7] * 4) for _ in range(8)]
    expected = [plain(fast, texts) for texts in batches]
    fast.logits_of(batches[0])
    found: dict[int, list[Tensor]] = {index: [] for index in range(len(batches))}
    start = threading.Barrier(len(batches))

    def classify(index: int) -> None:
        start.wait()
        for _ in range(3):
            found[index].append(fast.logits_of(batches[index]))

    threads = [threading.Thread(target=classify, args=(index,)) for index in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, results in found.items():
        assert len(results) == 3
        for logits in results:
            assert_close(logits, expected[index])


@pytest.mark.parametrize("uses", [0, 1])
def test_a_weight_that_does_not_fit_is_named_before_it_is_captured(fast: FastClassifier, uses: int) -> None:
    for _ in range(uses):
        fast.logits_of(texts_of(5))
    bias = fast.head.out_bias
    assert bias is not None
    bias.data = bias.data[:1]
    for call in (lambda: fast.logits_of(texts_of(5)), lambda: fast.head_of(torch.zeros(1, 64)), fast.warm_up):
        with pytest.raises(ValueError, match=r"head.out_bias must be contiguous, of shape"):
            call()


@pytest.mark.parametrize("change", ["dtype", "checkpoint", "by_hand"])
def test_graphs_are_forgotten_when_weights_move(fast: FastClassifier, change: str) -> None:
    texts = texts_of(5, 9)
    for _ in range(2):
        fast.logits_of(texts)
    assert len(fast._graphs) == 1
    if change == "dtype":
        fast.to(torch.float16)
    elif change == "checkpoint":
        fast.load_state_dict(tiny_bert(num_hidden_layers=2).state_dict(), assign=True)
    else:
        fast.clear_caches()
    assert len(fast._graphs) == 0


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_makes_graphs_of_its_own(fast: FastClassifier, how: str) -> None:
    texts = texts_of(5, 9)
    for _ in range(2):
        fast.logits_of(texts)
    twin = copy.deepcopy(fast) if how == "deepcopy" else pickle.loads(pickle.dumps(fast))
    assert (len(fast._graphs), len(twin._graphs)) == (1, 0)
    for parameter in fast.parameters():
        parameter.data.zero_()
    twin._graphs = graphs_of(twin, StandIn())
    for _ in range(2):
        assert_close(twin.logits_of(texts), plain(twin, texts))
    assert float(plain(twin, texts).abs().max()) > 0


@pytest.mark.parametrize("reason", ["capturing", "switched_off", "hook", "embeddings", "odd_shape"])
def test_where_a_replay_would_not_fit_the_pass_runs_plainly(
    fast: FastClassifier, capture: StandIn, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    ids = torch.randint(5, 199, (2, 9))
    inputs: dict[str, Tensor] = {"input_ids": ids}
    seen: list[object] = []
    if reason == "capturing":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    elif reason == "switched_off":
        fast.cuda_graphs = False
    elif reason == "hook":
        cast(Any, fast.encoder.layers)[0].register_forward_hook(lambda *_: seen.append(True))
    elif reason == "embeddings":
        inputs = {"inputs_embeds": torch.randn(2, 9, 64)}
    else:
        monkeypatch.setattr(FastClassifier, "_shape", lambda _self, *shape: fastcls.engine.packing.PackShape(*shape))
    for _ in range(3):
        logits = fast(**inputs).logits
    with no_graphs(fast):
        assert_close(logits, fast(**inputs).logits)
    assert capture.captures == 0
    assert len(seen) == (4 if reason == "hook" else 0)


def spec_of(hidden_size: int, num_layers: int) -> EncoderSpec:
    return bert.spec(
        BertConfig(
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=hidden_size // 64,
            intermediate_size=4 * hidden_size,
        )
    )


def test_the_larger_the_model_the_sooner_launches_stop_mattering() -> None:
    minilm, base, large = (max_graph_tokens(spec_of(width, 6)) for width in (384, 768, 1024))
    assert minilm > base > large >= 128
    assert max_graph_tokens(spec_of(768, 12)) == base
    assert base % 64 == 0


@pytest.fixture
def on_gpu() -> FastClassifier:
    return fastcls.optimize(tiny_bert().to(device="cuda", dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("last_layer", ["full", "selected", "absorbed"])
def test_replays_give_the_logits_of_the_plain_pass(on_gpu: FastClassifier, last_layer: LastLayer) -> None:
    on_gpu.last_layer = last_layer
    for lengths in MIXTURES:
        texts = texts_of(*lengths)
        torch.testing.assert_close(on_gpu.logits_of(texts), plain(on_gpu, texts))
    assert len(on_gpu._graphs) == 1


@pytest.mark.gpu
def test_a_graph_made_in_inference_mode_serves_outside_of_it(on_gpu: FastClassifier) -> None:
    texts = texts_of(5, 9)
    with torch.inference_mode():
        for _ in range(2):
            on_gpu.logits_of(texts)
    torch.testing.assert_close(on_gpu.logits_of(texts), plain(on_gpu, texts))
    assert len(on_gpu._graphs) == 1


@pytest.mark.gpu
def test_threads_and_streams_do_not_mix_their_texts_on_a_gpu(on_gpu: FastClassifier) -> None:
    batches = [texts_of(*[7 + index] * 4) for index in range(8)]
    expected = [plain(on_gpu, texts).cpu() for texts in batches]
    wrong: list[int] = []

    def classify(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                logits = on_gpu.logits_of(batches[index]).cpu()
                if not torch.allclose(logits, expected[index], rtol=1.6e-2, atol=1e-2):
                    wrong.append(index)

    threads = [threading.Thread(target=classify, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.gpu
def test_a_users_own_capture_takes_the_pass_in(on_gpu: FastClassifier) -> None:
    texts = texts_of(5, 9)
    (packed,) = on_gpu.pack(texts)
    expected = plain(on_gpu, texts)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_gpu.forward_packed(packed)
    torch.cuda.synchronize()
    (packed,) = on_gpu.pack(texts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        logits = on_gpu.forward_packed(packed)
    graph.replay()
    torch.testing.assert_close(logits, expected)


@pytest.mark.gpu
def test_logits_stay_when_the_graph_is_replayed_again(on_gpu: FastClassifier) -> None:
    first, second = texts_of(5, 9), texts_of(6, 8)
    for _ in range(3):
        kept = on_gpu.logits_of(first)
    before = kept.clone()
    on_gpu.logits_of(second)
    assert torch.equal(kept, before)


def test_a_bucket_holds_its_own_shape() -> None:
    assert bucket_of(128, 1) == (128, 1)
    assert bucket_of(4096, 32) == (4096, 32)
    assert bucket_of(129, 1) == (192, 1)
    assert bucket_of(128, 3) == (192, 4), "an empty sequence needs a row to point at"
