"""Windows of texts through tokenizer and model: what a classifier says of each, and what becomes of the others."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from support import tiny_bert
from transformers import PreTrainedTokenizerBase

import fastcls
from fastcls import flow as flows
from fastcls.ahead import made_ahead
from fastcls.flow import Flow, LongTextPolicy, Scored
from fastcls.texts import Item
from fastcls.tokenizing import Ids
from fastcls.tools.demo import sample_texts, sample_tokenizer

POSITIONS = 96
LONG = " ".join(f"word {number} is fine" for number in range(60))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return sample_tokenizer(sample_texts())


@pytest.fixture
def classifier(tokenizer: PreTrainedTokenizerBase, device: str) -> fastcls.Classifier:
    return fastcls.Classifier(fastcls.optimize(tiny_bert(vocab_size=len(tokenizer)).to(device)), tokenizer)


def scored(flow: Flow, texts: Sequence[Any]) -> Scored:
    """One window of strings, pairs and None."""
    ((result, tag),) = flow.run([(items(texts), "tag")])
    assert tag == "tag"
    return result


def items(texts: Sequence[Any]) -> list[Item | None]:
    return [None if text is None else Item(text, None) if isinstance(text, str) else Item(*text) for text in texts]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected.float().cpu(), rtol=0, atol=1e-5, equal_nan=True)


MIXED = ["fine", ("fine", "bad"), "", "fine", LONG, ("fine", ""), ("fine", "bad"), (LONG, LONG), "\u4e2d\u6587 good"]


def test_says_what_a_classifier_says(classifier: fastcls.Classifier) -> None:
    found = scored(classifier.flow(), [*MIXED, None])
    expected = classifier.logits(MIXED, truncation=True)
    close(found.numbers[:-1], expected)
    close(found.scores[:-1], expected.softmax(-1))
    assert bool(found.numbers[-1].isnan().all() and found.scores[-1].isnan().all())
    assert found.numbers.dtype == torch.float32
    assert (found.missing, found.problems, found.cut, found.repeated) == ([9], {}, 2, 2)
    assert found.seconds > 0


def test_equal_texts_are_computed_once(classifier: fastcls.Classifier) -> None:
    once, often = (scored(classifier.flow(), ["fine", "bad", ("fine", "bad"), LONG] * count) for count in (1, 5))
    assert often.tokens == once.tokens > POSITIONS
    assert (once.repeated, often.repeated, once.cut, often.cut) == (0, 16, 1, 5)
    close(often.numbers, once.numbers.repeat(5, 1))


@pytest.mark.parametrize("texts", [[], [None], [None, None], ["\ud800"], ["\ud800", None]])
@pytest.mark.parametrize("long_texts", ["truncate", "window"])
def test_windows_without_a_text(classifier: fastcls.Classifier, texts: list[Any], long_texts: Any) -> None:
    found = scored(classifier.flow(LongTextPolicy(long_texts, 8)), texts)
    assert found.numbers.shape == found.scores.shape == (len(texts), 3)
    assert found.missing == list(range(len(texts)))
    assert (found.tokens, found.cut) == (0, 0)
    assert set(found.problems) == {row for row, text in enumerate(texts) if text is not None}


def test_bad_texts_do_not_hold_up_others(tokenizer: PreTrainedTokenizerBase, device: str) -> None:
    # The model knows fewer tokens than the tokenizer.
    model = fastcls.optimize(tiny_bert(vocab_size=tokenizer.convert_tokens_to_ids("fine")).to(device))
    classifier = fastcls.Classifier(model, tokenizer)
    texts = ["a b", "fine", "\ud800", None, "fine", ("a", "fine"), "b \udfff", ("a", "b")]
    found = scored(classifier.flow(), texts)
    close(found.numbers[[0, 7]], classifier.logits(["a b", ("a", "b")]))
    assert found.missing == [1, 2, 3, 4, 5, 6]
    assert sorted(found.problems) == [1, 2, 4, 5, 6]
    assert found.problems[1] == found.problems[4]
    assert "lone surrogate" in found.problems[2]
    assert (found.repeated, found.cut) == (1, 0)
    assert bool(found.numbers[found.missing].isnan().all())


def test_a_text_without_tokens(tokenizer: PreTrainedTokenizerBase, device: str) -> None:
    bare = pickle.loads(pickle.dumps(tokenizer))
    bare.backend_tokenizer.post_processor = None
    classifier = fastcls.Classifier(fastcls.optimize(tiny_bert(vocab_size=len(tokenizer)).to(device)), bare)
    found = scored(classifier.flow(), ["", "fine"])
    assert found.problems == {0: "has no tokens"}
    assert found.missing == [0]


def test_long_texts_may_be_errors(classifier: fastcls.Classifier) -> None:
    found = scored(classifier.flow(LongTextPolicy("error"), max_length=8), ["fine", LONG, ("fine", LONG), "bad"])
    assert found.problems == dict.fromkeys((1, 2), "is longer than 8 tokens")
    assert found.cut == 0
    close(found.numbers[[0, 3]], classifier.logits(["fine", "bad"]))


def test_a_classifier_that_cuts_nothing_by_itself(tokenizer: PreTrainedTokenizerBase) -> None:
    model = fastcls.optimize(tiny_bert(vocab_size=len(tokenizer)))
    for truncation in (False, "do_not_truncate"):
        classifier = fastcls.Classifier(model, tokenizer, truncation=truncation)
        assert scored(classifier.flow(), [LONG]).cut == 1
    only_second = fastcls.Classifier(model, tokenizer, truncation="only_second")
    assert 0 in scored(only_second.flow(), [(LONG, "fine")]).problems


@pytest.mark.parametrize("kind", ["mean", "max"])
@pytest.mark.parametrize("overlap", [0, 5])
def test_windows_are_what_one_computes_by_hand(classifier: fastcls.Classifier, kind: Any, overlap: int) -> None:
    texts = ["fine", LONG, ("fine", LONG), LONG, ("fine", "bad"), (LONG, "fine"), ("bad", LONG + " bad")]
    found = scored(classifier.flow(LongTextPolicy("window", overlap, kind), max_length=20), texts)
    assert sorted(found.problems) == [5]
    assert "leaves windows of the second room for 0 tokens" in found.problems[5]
    assert (found.cut, found.repeated) == (0, 1)
    tokens = {}
    for row, text in enumerate(texts):
        if row == 5:
            continue
        given = (text,) if isinstance(text, str) else text
        strategy = "longest_first" if isinstance(text, str) else "only_second"
        called = classifier.tokenizer(
            *given, truncation=strategy, max_length=20, stride=overlap, return_overflowing_tokens=True
        )
        assert (len(called["input_ids"]) > 3) is (LONG in given or row == 6)
        logits = classifier.model.logits_of(called["input_ids"], called["token_type_ids"]).float().cpu()
        reduce = torch.mean if kind == "mean" else torch.amax
        close(found.numbers[row], reduce(logits, 0))
        close(found.scores[row], reduce(logits.softmax(-1), 0))
        tokens[text] = sum(map(len, called["input_ids"]))
    assert found.tokens == sum(tokens.values())


def test_a_first_text_that_leaves_windows_no_room(classifier: fastcls.Classifier) -> None:
    # Tokenizers panic where an overlap leaves nothing new, with what is no Exception.
    flow = classifier.flow(LongTextPolicy("window", 8), max_length=20)
    found = scored(flow, [("fine " * count, second) for second in (LONG, "fine") for count in (8, 9, 16, 17, 40)])
    rooms = {row: int(problem.split("room for ")[1].split()[0]) for row, problem in found.problems.items()}
    assert rooms == {1: 8, 2: 1, 3: 0, 4: 0, 8: 0, 9: 0}
    assert found.problems[1].endswith("room for 8 tokens, of which 8 overlap")
    surrogates = scored(flow, [("\ud800", LONG), ("fine", LONG), ("fine " * 17, "\ud800")])
    assert sorted(surrogates.problems) == [0, 2]
    assert all("lone surrogate" in problem for problem in surrogates.problems.values())


@pytest.mark.parametrize("kind", ["mean", "max"])
def test_what_is_no_number_stays_none(classifier: fastcls.Classifier, kind: Any) -> None:
    flow = classifier.flow(LongTextPolicy("window", 0, kind), max_length=20)
    compute = flow._compute

    def broken(ids: list[Ids], types: list[Ids]) -> torch.Tensor:
        logits = compute(ids, types).clone()
        logits[-1, 1] = torch.nan
        return logits

    flow._compute = broken
    found = scored(flow, ["fine", LONG])
    assert found.numbers.isnan().tolist() == [[False] * 3, [False, True, False]]
    assert found.scores.isnan().tolist() == [[False] * 3, [True] * 3]
    assert found.missing == []


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (LongTextPolicy("cut"), "long_texts must be one of truncate, error, window, got 'cut'"),  # type: ignore[arg-type]
        (LongTextPolicy(window_scores="min"), "window_scores must be one of mean, max, got 'min'"),  # type: ignore[arg-type]
        (LongTextPolicy("window", 18), "overlap must be an int from 0, less than the 18 tokens .* got 18"),
        (LongTextPolicy("window", -1), "overlap must be an int from 0, .* got -1"),
        (LongTextPolicy("window", True), "overlap must be an int from 0, .* got True"),
    ],
)
def test_policies_that_do_not_fit(tokenizer: PreTrainedTokenizerBase, policy: LongTextPolicy, message: str) -> None:
    classifier = fastcls.Classifier(fastcls.optimize(tiny_bert(vocab_size=len(tokenizer))), tokenizer)
    with pytest.raises(ValueError, match=message):
        classifier.flow(policy, max_length=20)
    assert classifier.flow(LongTextPolicy("window", 17), max_length=20)


def test_windows_come_in_order_and_an_error_behind_them(
    classifier: fastcls.Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def source(fails: bool) -> Iterator[tuple[list[Item | None], int]]:
        for number in range(7):
            yield items([f"word {number}", None, "fine"] * (number % 3)), number
        if fails:
            raise OSError("the disk is gone")

    plain = [(result.numbers, tag) for result, tag in classifier.flow().run(source(False))]
    for ahead in (0, 2):
        monkeypatch.setattr(flows, "_AHEAD", {"cpu": ahead, "cuda": ahead})
        found: list[Any] = []
        with pytest.raises(OSError, match="the disk is gone"):  # noqa: PT012 - what came before counts
            for result, tag in classifier.flow().run(source(True)):
                found.append((result.numbers, tag))
        assert [tag for _, tag in found] == list(range(7))
        for (numbers, _), (expected, _) in zip(found, plain, strict=True):
            close(numbers, expected)


def test_an_iterator_made_ahead() -> None:
    before, made = threading.active_count(), []

    def numbers(error: BaseException | None = None) -> Iterator[int]:
        for number in range(50):
            made.append(number)
            yield number
        if error is not None:
            raise error

    assert list(made_ahead(numbers(), 3)) == list(range(50))
    found = made_ahead(numbers(KeyError("late")), 1)
    assert [next(found) for _ in range(50)] == list(range(50))
    with pytest.raises(KeyError, match="late"):
        next(found)
    made.clear()
    stopped = made_ahead(numbers(), 2)
    assert next(stopped) == 0
    time.sleep(0.05)
    # One was taken, two wait, and one has no place yet.
    assert len(made) <= 4
    stopped.close()  # type: ignore[attr-defined]
    assert len(made) <= 4
    assert threading.active_count() == before


def test_passes_are_halved_until_they_fit(tokenizer: PreTrainedTokenizerBase) -> None:
    classifier = fastcls.Classifier(fastcls.optimize(tiny_bert(vocab_size=len(tokenizer))), tokenizer)
    flow, model = classifier.flow(), classifier.model
    compute, fits = flow._compute, 100

    def limited(ids: list[Ids], types: list[Ids]) -> torch.Tensor:
        if model.tokens_per_pass > fits:
            raise torch.OutOfMemoryError("too much")
        return compute(ids, types)

    flow._compute = limited
    model.tokens_per_pass = 350
    with pytest.warns(RuntimeWarning, match="350 tokens in a pass .* going on with 175") as warned:
        found = scored(flow, MIXED)
    assert [warning.category for warning in warned] == [RuntimeWarning] * 2
    assert model.tokens_per_pass == 87
    close(found.numbers, classifier.logits(MIXED, truncation=True))
    fits = 10
    with pytest.raises(torch.OutOfMemoryError):
        scored(flow, [LONG])


def test_a_pickled_flow_says_the_same(classifier: fastcls.Classifier) -> None:
    flow = classifier.flow()
    close(scored(pickle.loads(pickle.dumps(flow)), MIXED).numbers, scored(flow, MIXED).numbers)


def test_others_may_use_the_classifier_meanwhile(classifier: fastcls.Classifier) -> None:
    expected, failures = classifier.logits(MIXED, truncation=True), list[BaseException]()
    stop = threading.Event()

    def disturb() -> None:
        try:
            while not stop.is_set():
                classifier.logits(["fine bad fine bad " * 3], max_length=3 + int(time.monotonic() * 1e6) % 5)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for found, _ in classifier.flow().run((items(MIXED), None) for _ in range(30)):
            close(found.numbers, expected)
    finally:
        stop.set()
        thread.join()
    assert not failures


def test_a_pass_takes_at_most_half_of_the_free_memory(tokenizer: PreTrainedTokenizerBase) -> None:
    spec = fastcls.optimize(tiny_bert(vocab_size=len(tokenizer))).spec
    tokens = flows._tokens_that_fit(spec, torch.float32, 10**9)
    assert tokens == 10**9 // 2 // (4 * (5 * 64 + 2 * 112))
    assert flows._tokens_that_fit(spec, torch.float16, 10**9) in (2 * tokens, 2 * tokens + 1)
    # One text must fit.
    assert flows._tokens_that_fit(spec, torch.float32, 1000) == POSITIONS


@pytest.mark.gpu
def test_a_gpu_with_little_memory_free_takes_smaller_passes(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu, on_gpu = (
        fastcls.Classifier(fastcls.optimize(tiny_bert(vocab_size=len(tokenizer)).to(device)), tokenizer)
        for device in ("cpu", "cuda")
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1_000_000, 2_000_000))
    flow = on_gpu.flow()
    assert on_gpu.model.tokens_per_pass == flows._tokens_that_fit(on_gpu.model.spec, torch.float32, 1_000_000)
    windows = [(items([*MIXED, None, *sample_texts()[start : start + 40]]), start) for start in range(0, 240, 40)]
    results = zip(flow.run(windows), on_cpu.flow().run(windows), strict=True)
    for (found, tag), (expected, expected_tag) in results:
        assert tag == expected_tag
        assert (found.missing, found.problems, found.cut) == (expected.missing, expected.problems, expected.cut)
        torch.testing.assert_close(found.numbers, expected.numbers, rtol=0, atol=2e-3, equal_nan=True)
