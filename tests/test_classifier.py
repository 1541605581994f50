"""Texts in, labels out: against transformers' own pipeline, and on input of every kind."""

from __future__ import annotations

import copy
import json
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support import live_bytes, tiny_bert
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import fastcls
import fastcls.classifier
from fastcls.tokenizing import Cut, length_limit
from fastcls.tools.demo import sample_texts, sample_tokenizer

# Its overloads know no model but transformers' own.
pipeline: Any = transformers.pipeline

TEXTS = [
    "a visually stunning rumination on love",
    "the plot is nothing but boilerplate cliches from start to finish",
    "",
    "ok",
]
PAIRS = [("is it raining?", "rain is expected by noon"), ("where is it?", "here")]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return sample_tokenizer(sample_texts())


def sample_bert(tokenizer: PreTrainedTokenizerBase, **overrides: Any) -> Any:
    return tiny_bert(vocab_size=len(tokenizer), **overrides)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A fine-tuned model's folder, as save_pretrained leaves it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    names = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
    sample_bert(tokenizer, **names).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def classifier(checkpoint: Path, device: str) -> fastcls.Classifier:
    return fastcls.Classifier.from_pretrained(checkpoint, device=device)


def assert_same(actual: Any, expected: Any) -> None:
    """Equal labels in equal structure, scores to float32's rounding in a softmax."""
    assert isinstance(actual, type(expected))
    if isinstance(expected, list):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
        return
    assert actual["label"] == expected["label"]
    assert actual["score"] == pytest.approx(expected["score"], abs=1e-5)


CONFIGS: dict[str, dict[str, Any]] = {
    "three_labels": {},
    "one_label": {"num_labels": 1},
    "regression": {"num_labels": 1, "problem_type": "regression"},
    "multi_label": {"problem_type": "multi_label_classification"},
    "single_label": {"problem_type": "single_label_classification"},
}


@pytest.mark.parametrize("overrides", list(CONFIGS.values()), ids=list(CONFIGS))
def test_answers_are_those_of_the_pipeline(tokenizer: PreTrainedTokenizerBase, overrides: dict[str, Any]) -> None:
    model = sample_bert(tokenizer, **overrides)
    theirs = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    ours = fastcls.Classifier(model, tokenizer)
    as_mappings = [{"text": text, "text_pair": pair} for text, pair in PAIRS]
    assert_same(ours(TEXTS), theirs(TEXTS))
    assert_same(ours(TEXTS[0]), theirs(TEXTS[0]))
    assert_same(ours(TEXTS[0], top_k=None), theirs(TEXTS[0], top_k=None))
    assert_same(ours(TEXTS, top_k=2), theirs(TEXTS, top_k=2))
    assert_same(ours(PAIRS), theirs(as_mappings))
    assert_same(ours(as_mappings), theirs(as_mappings))
    # Of one mapping the pipeline gives the label itself, of one string a list of it.
    assert_same(ours(as_mappings[0]), theirs(as_mappings[0]))
    assert_same(ours({"text": TEXTS[0]}), theirs({"text": TEXTS[0]}))
    assert_same(ours(as_mappings[0], top_k=2), theirs(as_mappings[0], top_k=2))
    assert_same(ours(TEXTS, function_to_apply="none"), theirs(TEXTS, function_to_apply="none"))


def test_a_tokenizer_without_types_means_type_0(tokenizer: PreTrainedTokenizerBase) -> None:
    model, plain = sample_bert(tokenizer), copy.deepcopy(tokenizer)
    plain.model_input_names = ["input_ids", "attention_mask"]
    theirs = pipeline("text-classification", model=model, tokenizer=plain, device="cpu")
    as_mappings = [{"text": text, "text_pair": pair} for text, pair in PAIRS]
    assert_same(fastcls.Classifier(model, plain)(PAIRS), theirs(as_mappings))
    assert fastcls.Classifier(model, plain)(PAIRS) != fastcls.Classifier(model, tokenizer)(PAIRS)


class PeftModelForSequenceClassification(torch.nn.Module):
    """What PEFT calls its wrapper."""


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            PeftModelForSequenceClassification(),
            "got PeftModelForSequenceClassification: merge adapters .*merge_and_unload",
        ),
        (torch.nn.DataParallel(torch.nn.Linear(1, 1)), "got DataParallel: give the model that it wraps"),
        ("your/bert-classifier", "got str: to load it by name use Classifier.from_pretrained"),
        (None, "got NoneType$"),
    ],
    ids=["peft", "data_parallel", "name", "none"],
)
def test_a_wrapped_model_says_what_to_do(tokenizer: PreTrainedTokenizerBase, model: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"model must be a sequence classifier of transformers' .*, {message}"):
        fastcls.Classifier(model, tokenizer)


def test_a_model_of_sentence_transformers_goes_to_optimize(tokenizer: PreTrainedTokenizerBase) -> None:
    library = pytest.importorskip("sentence_transformers")
    reranker = library.CrossEncoder.__new__(library.CrossEncoder)
    with pytest.raises(TypeError, match=r"got CrossEncoder: pass it to fastcls\.optimize"):
        fastcls.Classifier(reranker, tokenizer)


@pytest.mark.parametrize("make", [lambda: tiny_bert().bert, lambda: fastcls.optimize(tiny_bert().bert)])
def test_a_model_that_does_not_classify_is_refused(make: Callable[[], Any], tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(TypeError, match=r"model must be a sequence classifier.*, got (BertModel|FastEncoder)"):
        fastcls.Classifier(make(), tokenizer)


def test_the_fast_model_works_in_the_pipeline(tokenizer: PreTrainedTokenizerBase) -> None:
    model = sample_bert(tokenizer)
    theirs = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    ours = pipeline("text-classification", model=fastcls.optimize(model), tokenizer=tokenizer, device="cpu")
    assert_same(ours(TEXTS, batch_size=3), theirs(TEXTS, batch_size=3))


def test_order_is_kept_over_many_windows(classifier: fastcls.Classifier) -> None:
    texts = sample_texts() * 9
    results = classifier(texts)
    alone = {text: classifier([text])[0] for text in set(texts)}
    assert len(results) == len(texts) > 512
    assert_same(results, [alone[text] for text in texts])


def test_texts_and_pairs_may_be_mixed(classifier: fastcls.Classifier) -> None:
    mixed: list[Any] = [TEXTS[0], PAIRS[0], TEXTS[1], {"text": "a"}]
    assert_same(classifier(mixed), [classifier([item])[0] for item in mixed])


def test_a_pair_is_not_its_first_text(classifier: fastcls.Classifier) -> None:
    assert classifier([PAIRS[0]]) != classifier([PAIRS[0][0]])


def test_an_empty_second_text_is_a_pair_as_in_batches(tokenizer: PreTrainedTokenizerBase) -> None:
    # Models are trained with batches. The pipeline takes one text at a time, where the tokenizer drops an empty one.
    model = sample_bert(tokenizer)
    classifier = fastcls.Classifier(model, tokenizer)
    trained_with = tokenizer(["ok", "where"], ["", "here"], padding=True, return_tensors="pt")
    pairs: list[Any] = [("ok", ""), {"text": "where", "text_pair": "here"}]
    torch.testing.assert_close(classifier.logits(pairs), model(**trained_with).logits, rtol=0, atol=1e-5)
    empty = {"text": "ok", "text_pair": ""}
    assert classifier([empty]) == classifier([("ok", "")]) == [classifier(empty)] != classifier(["ok"])
    theirs = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    # If this changes, so does what the docs say of it.
    assert_same(theirs([empty, empty], batch_size=2), classifier(["ok"] * 2))
    assert_same(theirs(empty), classifier({"text": "ok"}))


def test_nothing_in_nothing_out(classifier: fastcls.Classifier) -> None:
    assert classifier([]) == []
    assert list(classifier.stream(iter(()))) == []
    assert classifier.logits([]).shape == (0, 3)


@pytest.fixture(params=[0, 1], ids=["one_after_another", "one_underway"])
def windows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Windows of 256 texts everywhere, and how many are underway while the next is tokenized."""
    for place in ("cpu", "cuda"):
        monkeypatch.setitem(fastcls.classifier._WINDOW, place, (256, 32_768))
        monkeypatch.setitem(fastcls.classifier._WINDOWS_UNDERWAY, place, request.param)
    underway: int = request.param
    return underway


@pytest.mark.usefixtures("windows")
def test_windows_come_in_order(classifier: fastcls.Classifier) -> None:
    texts = [f"{'very ' * (index % 5)}{TEXTS[index % 2]}" for index in range(600)]
    assert_same(list(classifier.stream(iter(texts))), classifier(texts[:300]) + classifier(texts[300:]))


class BrokenSourceError(Exception):
    """What a source of texts may raise."""


def texts_with_fault(bad: int | None, found: Any) -> Iterator[Any]:
    """40 texts of several lengths, singles and pairs, one of them replaced."""
    for index in range(40):
        if index == bad and found is BrokenSourceError:
            raise BrokenSourceError("the disk is gone")
        text = "very " * (index % 5) + TEXTS[index % 2]
        yield found if index == bad else (text, "ok") if index % 3 else text


FAULTS: dict[str, tuple[Any, type[Exception], str]] = {
    "no_text": (7, TypeError, r"texts\[{}\] must be a string"),
    "missing": (None, TypeError, r"texts\[{}\] .*a missing text"),
    "too_long": ("word " * 200, ValueError, r"texts\[{}\] is \d+ tokens long"),
    "too_long_pair": (("word " * 200, "ok"), ValueError, r"texts\[{}\] is \d+ tokens long"),
    "surrogate": ("good \ud800", ValueError, r"texts\[{}\] holds half a character"),
    "broken_source": (BrokenSourceError, BrokenSourceError, "the disk is gone"),
}


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("bad", [0, 7, 25, 39])
@pytest.mark.parametrize(("found", "error", "message"), list(FAULTS.values()), ids=list(FAULTS))
def test_what_stands_before_a_fault_is_not_lost(
    classifier: fastcls.Classifier,
    bad: int,
    found: Any,
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for place in ("cpu", "cuda"):
        monkeypatch.setitem(fastcls.classifier._WINDOW, place, (16, 32_768))
    results: list[Any] = []
    stream = classifier.stream(texts_with_fault(bad, found))
    with pytest.raises(error, match=message.format(bad)):
        results.extend(stream)
    assert_same(results, classifier(list(texts_with_fault(None, None))[:bad]))


def test_of_several_faults_the_first_is_named(classifier: fastcls.Classifier) -> None:
    # Singles are tokenized before pairs, and lengths are looked at last.
    texts: list[Any] = ["ok", "ok", "word " * 200, ("ok", "\ud800"), "\ud800"]
    results: list[Any] = []
    stream = classifier.stream(texts)
    with pytest.raises(ValueError, match=r"texts\[2\] is \d+ tokens long"):
        results.extend(stream)
    assert len(results) == 2
    for call in (classifier, classifier.logits):
        with pytest.raises(ValueError, match=r"texts\[2\] is \d+ tokens long"):
            call(texts)


def test_stream_reads_ahead_by_as_many_windows_as_it_says(classifier: fastcls.Classifier, windows: int) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "ok"

    results = classifier.stream(endless())
    first = [next(results) for _ in range(300)]
    assert len(first) == 300
    assert taken <= 512 + windows * 256


@pytest.mark.usefixtures("windows")
def test_memory_does_not_grow_with_the_number_of_texts(classifier: fastcls.Classifier) -> None:
    # Tensors are counted on their own: tracemalloc does not see their memory.
    tracemalloc.start()
    held = {}
    for index, _ in enumerate(classifier.stream("some words to classify" for _ in range(2049))):
        if index in (512, 2048):
            held[index] = tracemalloc.get_traced_memory()[0] + live_bytes()
    tracemalloc.stop()
    assert held[2048] < held[512] + 200_000


# The last stands in the second window of a CPU.
@pytest.mark.parametrize("place", [1, 300])
def test_long_texts_are_refused_or_cut(checkpoint: Path, place: int) -> None:
    texts = ["ok"] * place + ["word " * 200]
    message = rf"texts\[{place}\] is \d+ tokens long and the model has 96 positions: .*truncation"
    with pytest.raises(ValueError, match=message):
        fastcls.Classifier.from_pretrained(checkpoint, device="cpu")(texts)
    assert len(fastcls.Classifier.from_pretrained(checkpoint, device="cpu", truncation=True)(texts)) == place + 1


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        pytest.param(["ok", 3], r"texts\[1\] must be a string, a pair .*got int: 3", id="number"),
        pytest.param(["ok", None], r"texts\[1\] .*got NoneType", id="none"),
        pytest.param([b"ok"], r"texts\[0\] .*got bytes", id="bytes"),
        pytest.param([("a", "b", "c")], r"texts\[0\] .*got tuple", id="triple"),
        pytest.param([{"txt": "a"}], r"texts\[0\] .*got dict", id="mapping_without_text"),
        pytest.param([{"text": "a", "label": "b"}], r"texts\[0\] .*got dict", id="mapping_with_more"),
        pytest.param(7, "texts must be an iterable of texts, got int", id="no_iterable"),
        pytest.param(("a", "b"), r"texts must be a list: \[\(text, text_pair\)\]", id="bare_pair"),
    ],
)
def test_what_is_no_text_is_named_before_anything_is_computed(
    classifier: fastcls.Classifier, texts: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier.model, "logits_of", lambda *_: pytest.fail("computed before it was checked"))
    with pytest.raises(TypeError, match=message):
        classifier(texts)


# Tables, columns and what else stands where a list of texts was expected


class Scalar:
    """What iterating over an array of pyarrow's gives."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def as_py(self) -> Any:
        return self.value


class Frame:
    """A table whose iterator gives the names of its columns, as that of pandas does."""

    columns = ("text", "label")

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)


class Rows(list[Any]):
    """A table whose iterator gives rows, as that of datasets does."""

    def __init__(self, *columns: str) -> None:
        super().__init__([dict.fromkeys(columns, "ok")] * 2)
        self.column_names = [*columns]


class Numbered:
    """What is iterated over by the numbers of its items alone, as torch's data sets."""

    def __getitem__(self, index: int) -> str:
        return TEXTS[:2][index]


TWO = TEXTS[:2]
COLUMNS: dict[str, Any] = {
    "array": np.array(TWO),
    "objects": np.array(TWO, dtype=object),
    "scalars": [Scalar(text) for text in TWO],
    "rows": [Scalar({"text": text}) for text in TWO],
    "numbered": Numbered(),
    "keys": dict.fromkeys(TWO).keys(),
}


@pytest.mark.parametrize("texts", list(COLUMNS.values()), ids=list(COLUMNS))
def test_columns_are_texts(classifier: fastcls.Classifier, texts: Any) -> None:
    assert classifier(texts) == classifier(TWO)
    assert list(classifier.stream(texts)) == classifier(TWO)


def test_one_scalar_is_one_text(classifier: fastcls.Classifier) -> None:
    scalar: Any = Scalar(TEXTS[0])
    assert classifier(scalar, top_k=2) == classifier(TEXTS[0], top_k=2)


def test_rows_of_texts_alone_are_texts(classifier: fastcls.Classifier) -> None:
    assert classifier(Rows("text")) == classifier(["ok"] * 2)
    assert classifier(Rows("text_pair", "text")) == classifier([("ok", "ok")] * 2)


class Interchanged:
    def __dataframe__(self) -> None: ...


NO_TEXTS: dict[str, tuple[Any, str]] = {
    "frame": (
        Frame(),
        r'a table \(.*columns: text, label\): pass one of its columns, frame\["text"\].tolist',
    ),
    "unnamed_frame": (Interchanged(), "a table .*columns: unknown"),
    "rows_with_more": (Rows("sentence", "label"), r'columns: sentence, label\): .*\["sentence"\]'),
    "structured": (np.array([("a", 1)], dtype=[("text", "U4"), ("label", "i4")]), "a table .*columns: text, label"),
    "set": ({"a", "b"}, "must have an order, which a set has not"),
    "bytes": (b"ok", "got bytes: decode it first"),
    "two_dimensions": (np.array([["a", "b"]]), r"one dimension, got ndarray of shape \(1, 2\)"),
    "no_dimension": (np.array("a"), r"one dimension, got ndarray of shape \(\)"),
    "splits": ({"train": ["a"]}, r"texts\[0\] must be .*got dict: .*: pass a list of texts, as one of its values"),
    "rows": ([{"text": "a", "label": 1}], r'texts\[0\] .*got dict: .*: pass \[row\["text"\] for row in rows\]'),
    "missing": (["a", float("nan")], r"texts\[1\] must be .*got float: nan, a missing text: drop or fill"),
    "null": ([Scalar(None)], r"texts\[0\] must be .*got NoneType: None, a missing text"),
    "encoded": (["a", b"b"], r"texts\[1\] must be .*got bytes: b'b': decode it first"),
    "missing_second": ([("a", None)], r"texts\[0\] must be .*got tuple: .*, with a missing text: drop or fill"),
    "missing_first": ([[float("nan"), "b"]], r"got list: .*, with a missing text: drop or fill"),
    "null_in_a_pair": ([(Scalar("a"), Scalar(None))], "got tuple: .*, with a missing text"),
    "encoded_pair": ([("a", b"b")], "got tuple: .*: decode its texts first"),
    "missing_pair": ([{"text": "a", "text_pair": np.float32("nan")}], "got dict: .*, whose text_pair is missing: drop"),
    "missing_text": ([{"text": None, "text_pair": "b"}], "got dict: .*, whose text is missing: drop"),
    "missing_everywhere": ([{"sentence": None, "label": 1}], "got dict: .*, a missing text"),
    "number_for_a_pair": ([{"text": "a", "text_pair": 3}], "got dict: .*: its text_pair must be a string$"),
    "encoded_text": ([{"text": b"a"}], "got dict: .*: decode its text first"),
    "rows_of_pairs": (
        [{"text": "a", "text_pair": "b", "idx": 3}],
        r'got dict: .*: pass \[\(row\["text"\], row\["text_pair"\]\) for row in rows\]$',
    ),
    "rows_of_other_pairs": (
        [{"premise": "a", "hypothesis": "b", "label": np.int64(1)}],
        r'pass \[row\["premise"\] for row in rows\], or of pairs \[\(row\["premise"\], row\["hypothesis"\]\) for',
    ),
    "rows_of_other_texts": ([{"label": 1, "sentence": "a"}], r': pass \[row\["sentence"\] for row in rows\]$'),
    "columns": (
        {"text": ["a"], "text_pair": ["b"]},
        r'pass its pairs, list\(zip\(columns\["text"\], columns\["text_pair"\]',
    ),
    "frame_of_pairs": (
        Rows("idx", "text", "text_pair"),
        r'pass its pairs, list\(zip\(frame\["text"\]\.tolist\(\), frame\["text_pair"\]\.tolist\(\)\)\)',
    ),
}


@pytest.mark.parametrize(("texts", "message"), list(NO_TEXTS.values()), ids=list(NO_TEXTS))
def test_what_would_be_read_as_something_else_is_refused(
    classifier: fastcls.Classifier, texts: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        classifier(texts)


def test_tables_of_known_libraries_say_how_a_column_is_taken(classifier: fastcls.Classifier) -> None:
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"text": TWO, "label": [0, 1]})
    table = pyarrow.Table.from_pydict({"text": TWO})
    for made, remedy in ((frame, r'frame\["text"\]\.tolist'), (table, r'table\["text"\]\.to_pylist')):
        with pytest.raises(TypeError, match=remedy):
            classifier(made)
    assert classifier(frame["text"]) == classifier(table["text"]) == classifier(TWO)
    with pytest.raises(TypeError, match=r"texts\[1\] .*missing"):
        classifier(pandas.Series(["a", None], dtype="string"))


# Options of a call


LONG = "the plot is a mess but the actors shine and the music soars " * 4
OPTIONS: dict[str, dict[str, Any]] = {
    "cut": {"truncation": True},
    "cut_by_name": {"truncation": "longest_first", "max_length": 9},
    "cut_shorter": {"truncation": True, "max_length": 9},
    "cut_less": {"truncation": True, "max_length": 40},
    "length_alone": {"max_length": 9},
    "not_cut": {"truncation": False, "max_length": 9},
    "not_cut_by_name": {"truncation": "do_not_truncate"},
    "padded": {"padding": "max_length", "truncation": True, "max_length": 30},
    "batches": {"batch_size": 2, "padding": True},
    "first": {"truncation": "only_first", "max_length": 14},
    "numbers": {"function_to_apply": "NONE", "top_k": None},
    "shares": {"function_to_apply": None, "top_k": np.int64(2)},
}


@pytest.mark.parametrize("options", list(OPTIONS.values()), ids=list(OPTIONS))
def test_options_are_those_of_the_pipeline(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> None:
    short = copy.deepcopy(tokenizer)
    short.model_max_length = 24
    model = sample_bert(tokenizer)
    theirs = pipeline("text-classification", model=model, tokenizer=short, device="cpu")
    ours = fastcls.Classifier(model, short)
    options_of_theirs = {**options, "top_k": int(options["top_k"])} if options.get("top_k") else options
    texts: list[Any] = [LONG, "ok", {"text": LONG, "text_pair": "ok"}]
    expected = [theirs(text, **options_of_theirs) for text in texts]
    # The pipeline wraps one text in a list, and a mapping it does not.
    expected = [each[0] if isinstance(each, list) and "top_k" not in options else each for each in expected]
    assert_same(ours(texts, **options), expected)
    assert_same(list(ours.stream(texts, **options)), expected)


def test_texts_are_cut_to_the_smaller_of_both_limits(tokenizer: PreTrainedTokenizerBase) -> None:
    model = sample_bert(tokenizer)
    for of_tokenizer, expected in ((24, 24), (4096, 96), (10**30, 96)):
        own = copy.deepcopy(tokenizer)
        own.model_max_length = of_tokenizer
        classifier = fastcls.Classifier(model, own, truncation=True)
        wanted = model(**tokenizer(LONG * 3, truncation=True, max_length=expected, return_tensors="pt")).logits
        torch.testing.assert_close(classifier.logits([LONG * 3]), wanted, rtol=0, atol=1e-5)


def test_a_text_may_have_any_length_where_nothing_bounds_it(tokenizer: PreTrainedTokenizerBase) -> None:
    own = copy.deepcopy(tokenizer)
    own.model_max_length = 10**30
    assert length_limit(own, None) is None
    assert len(own(LONG, **Cut("longest_first", None).options())["input_ids"]) == len(tokenizer(LONG)["input_ids"])


def test_a_length_of_one_call_is_not_the_next_ones(classifier: fastcls.Classifier) -> None:
    cut = classifier.logits([LONG], max_length=9)
    assert not torch.equal(classifier.logits([LONG]), cut)
    int_of_numpy: Any = np.int32(9)
    torch.testing.assert_close(classifier.logits([LONG], truncation=True, max_length=int_of_numpy), cut)


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no_labels": ({"top_k": 0}, "top_k must be a positive int or None, got 0"),
    "function": (
        {"function_to_apply": "max"},
        "function_to_apply must be one of softmax, .* or None, got 'max'",
    ),
    "truncation": ({"truncation": "first"}, "truncation must be True, False or one of .*only_first.*, got 'first'"),
    "number_as_truncation": ({"truncation": 1}, "truncation must be True, False .*got 1"),
    "no_length": ({"max_length": 0}, "max_length must be a positive int or None, got 0"),
    "true_as_length": ({"max_length": True}, "max_length must be a positive int or None, got True"),
    "no_room": ({"max_length": 1, "truncation": True}, "max_length must be at least 2, the number of special tokens"),
    "padding": ({"padding": "left"}, "padding must be True, False or one of longest, .*got 'left'"),
    "batch": ({"batch_size": 0}, "batch_size must be a positive int or None, got 0"),
}


@pytest.mark.parametrize(("options", "message"), list(BAD_OPTIONS.values()), ids=list(BAD_OPTIONS))
def test_bad_options_are_named(classifier: fastcls.Classifier, options: dict[str, Any], message: str) -> None:
    for call in (classifier, classifier.stream):
        texts = iter(["ok"])
        with pytest.raises(ValueError, match=message):
            call(texts, **options)
        assert next(texts) == "ok", "read before the options were checked"


def test_a_short_tokenizer_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    own = copy.deepcopy(tokenizer)
    own.model_max_length = 1
    with pytest.raises(ValueError, match=r"tokenizer\.model_max_length must be at least 2"):
        fastcls.Classifier(sample_bert(tokenizer), own, truncation=True)(["ok"])


# The tokenizer


def test_who_pads_with_the_same_tokenizer_pads_nothing_here(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: Any = copy.deepcopy(tokenizer)
    classifier = fastcls.Classifier(sample_bert(tokenizer), shared)
    expected = classifier(TEXTS)
    setting = type(shared).set_truncation_and_padding

    def then_another_pads(self: Any, *arguments: Any, **options: Any) -> None:
        setting(self, *arguments, **options)
        shared._tokenizer.enable_padding(length=64)

    monkeypatch.setattr(type(shared), "set_truncation_and_padding", then_another_pads)
    assert len(shared("ok")["input_ids"]) == 64
    assert classifier(TEXTS) == expected


class Busy:
    """A tokenizer that notices a second call while one is underway."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.underway = self.most = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.underway += 1
        self.most = max(self.most, self.underway)
        time.sleep(0.02)
        found = self.tokenizer(*arguments, **options)
        self.underway -= 1
        return found


def test_threads_tokenize_one_after_another(tokenizer: PreTrainedTokenizerBase) -> None:
    classifier = fastcls.Classifier(sample_bert(tokenizer), tokenizer)
    busy: Any = Busy(classifier.tokenizer)
    classifier.tokenizer = busy
    threads = [threading.Thread(target=classifier.logits, args=([LONG],), kwargs={"max_length": n}) for n in (5, 9, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert busy.most == 1


def test_a_classifier_can_be_copied(tokenizer: PreTrainedTokenizerBase) -> None:
    classifier = fastcls.Classifier(sample_bert(tokenizer), tokenizer, truncation=True)
    again = copy.deepcopy(classifier)
    assert again([LONG * 3]) == classifier([LONG * 3])


def test_a_loaded_tokenizer_is_not_copied(
    checkpoint: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastcls.classifier, "own_copy", lambda _: pytest.fail("copied a tokenizer that is its own"))
    assert fastcls.Classifier.from_pretrained(checkpoint, device="cpu")(["ok"])
    kept = fastcls.Classifier(sample_bert(tokenizer), tokenizer, copy_tokenizer=False)
    assert kept.tokenizer is tokenizer


class Uncopied(PreTrainedTokenizerFast):
    def __deepcopy__(self, _: Any) -> Any:
        raise TypeError("cannot pickle a part made in Python")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "tokenizer must be a tokenizer of transformers', got NoneType: pass the model's own"),
        ("bert-base-uncased", "got str: to load both by name use Classifier.from_pretrained"),
        (Tokenizer(models.WordLevel()), "got Tokenizer: wrap it, transformers.PreTrainedTokenizerFast"),
    ],
    ids=["none", "name", "raw"],
)
def test_what_is_no_tokenizer_is_named(tokenizer: PreTrainedTokenizerBase, given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fastcls.Classifier(sample_bert(tokenizer), given)


def test_a_tokenizer_that_cannot_be_copied_is_named() -> None:
    with pytest.raises(ValueError, match=r"got Uncopied: cannot pickle .*copy_tokenizer=False"):
        fastcls.Classifier(tiny_bert(), Uncopied(tokenizer_object=Tokenizer(models.WordLevel())))


# Texts that cannot be classified, by their place in the whole input


def spare_tokenizer(**words: int) -> PreTrainedTokenizerFast:
    """A tokenizer that adds no special token, so that some texts have none at all."""
    made = Tokenizer(models.WordLevel({"[UNK]": 2, **words}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


REFUSED: dict[str, tuple[Any, str]] = {
    "no_tokens": ("", "has no tokens"),
    "other_vocabulary": ("alien", "40000"),
    "too_long": ("good " * 97, "is 97 tokens long and the model has 96 positions: pass truncation=True"),
    "surrogate": ("good \ud800", r"a lone surrogate, at place 5: 'good \\ud800'"),
    "pair_with_surrogate": (("good", "\ud800"), "a lone surrogate, at place 0"),
}


# In the second window of a CPU, of singles and pairs in turns.
@pytest.mark.parametrize(("text", "message"), list(REFUSED.values()), ids=list(REFUSED))
def test_a_refused_text_is_named_by_its_place_in_all_of_them(text: Any, message: str) -> None:
    classifier = fastcls.Classifier(tiny_bert(), spare_tokenizer(good=3, alien=40000))
    texts = [("good", "good") if index % 2 else "good" for index in range(300)]
    with pytest.raises(ValueError, match=rf"^texts\[300\] .*{message}"):
        classifier([*texts, text, "good"])


def test_what_cannot_be_cut_is_named(classifier: fastcls.Classifier) -> None:
    with pytest.raises(ValueError, match=r"^texts\[1\] cannot be tokenized: .*too short"):
        classifier(["ok", ("ok", LONG)], truncation="only_first", max_length=9)
    with pytest.raises(ValueError, match=r"^texts\[1\] is a pair, whose 3 special tokens are more than the 2"):
        classifier(["ok", ("ok", "ok")], max_length=2)


# Names of labels


NAMES: dict[str, tuple[Any, list[Any]]] = {
    "none": (None, ["LABEL_0", "LABEL_1", "LABEL_2"]),
    "list": (["bad", "fair", "good"], ["bad", "fair", "good"]),
    "tuple": (("bad", "fair", "good"), ["bad", "fair", "good"]),
    "array": (np.array(["bad", "fair", "good"]), ["bad", "fair", "good"]),
    "strings": ({"2": "good", "0": "bad", "1": "fair"}, ["bad", "fair", "good"]),
    "numpy": ({np.int64(index): str(index) for index in range(3)}, ["0", "1", "2"]),
    "other_types": ({0: 1, 1: ("a", 2), 2: None}, [1, ("a", 2), None]),
    "more": (["bad", "fair", "good", "best"], ["bad", "fair", "good"]),
}


@pytest.mark.parametrize(("given", "expected"), list(NAMES.values()), ids=list(NAMES))
def test_labels_are_named_as_the_config_says(
    tokenizer: PreTrainedTokenizerBase, given: Any, expected: list[Any]
) -> None:
    model = sample_bert(tokenizer)
    classifier = fastcls.Classifier(model, tokenizer)
    model.config.id2label = given
    order = classifier.logits(["ok"])[0].argsort(descending=True).tolist()
    assert [each["label"] for each in classifier("ok", top_k=None)] == [expected[index] for index in order]


NO_NAMES: dict[str, tuple[Any, str]] = {
    "from_one": ({1: "bad", 2: "fair", 3: "good"}, r"got \{1: 'bad'.*, which does not name 0"),
    "too_few": (["bad", "good"], "which does not name 2"),
    "nothing": ({}, r"got \{\}, which does not name 0"),
    "names_first": ({"bad": 0, "fair": 1, "good": 2}, "which does not name 0"),
    "twice": ({0: "bad", "0": "worse", 1: "fair", 2: "good"}, "which names 0 twice"),
    "text": ("bad", "got 'bad'"),
}


@pytest.mark.parametrize(("given", "message"), list(NO_NAMES.values()), ids=list(NO_NAMES))
def test_names_are_not_made_up(tokenizer: PreTrainedTokenizerBase, given: Any, message: str) -> None:
    model = sample_bert(tokenizer)
    classifier = fastcls.Classifier(model, tokenizer)
    model.config.id2label = given
    with pytest.raises(ValueError, match=f"id2label must name each label from 0 to 2, .*{message}"):
        fastcls.Classifier(classifier.model, tokenizer)
    # Changed afterwards.
    with pytest.raises(ValueError, match=message):
        classifier(["ok"])


# Options of a checkpoint


def test_options_go_where_they_belong(checkpoint: Path) -> None:
    def loaded(**options: Any) -> fastcls.Classifier:
        return fastcls.Classifier.from_pretrained(checkpoint, device="cpu", **options)

    classifier = loaded(
        id2label=["n", "m", "p"],
        problem_type="multi_label_classification",
        num_labels=3,
        model_max_length=20,
        use_fast=True,
        truncation_side="left",
        local_files_only=True,
        attn_implementation="eager",
        use_safetensors=True,
        device_map=None,
    )
    config = classifier.model.config
    assert (config.id2label, config.label2id) == ({0: "n", 1: "m", 2: "p"}, {"n": 0, "m": 1, "p": 2})
    assert (classifier.tokenizer.model_max_length, classifier.tokenizer.truncation_side) == (20, "left")
    assert not hasattr(config, "use_safetensors")
    assert not hasattr(config, "model_max_length")
    scores = [each["score"] for each in classifier("ok", top_k=None)]
    assert sum(scores) != pytest.approx(1), "the config's problem type asks for sigmoids"
    assert loaded(num_labels=3)("ok")[0]["label"] in ("bad", "fair", "good")


OTHER_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "mismatched": ({"ignore_mismatched_sizes": True}, TypeError, "no option ignore_mismatched_sizes: leave it out"),
    "dtype": ({"torch_dtype": torch.float16}, TypeError, "no option torch_dtype: pass dtype="),
    "device": ({"device_map": "auto"}, TypeError, "no option device_map: pass device="),
    "quantised": ({"quantization_config": {}}, TypeError, "no option quantization_config: pass dtype="),
    "8_bits": ({"load_in_8bit": True}, TypeError, "no option load_in_8bit: pass dtype=.*, and with quantize=.int8. in"),
    "attention": ({"attn_implementation": "flash_attention_2"}, TypeError, "no option attn_implementation: leave it"),
    "unknown": ({"hidden_dropout": 0.1}, TypeError, "no option hidden_dropout: load the model with transformers"),
    "labels": ({"num_labels": 5}, ValueError, "num_labels must fit .*, got 5 labels: its classifier.bias is "),
    "names": ({"id2label": {0: "n", 1: "p"}}, ValueError, "id2label must fit .*, got 2 labels"),
    "both": ({"num_labels": 3, "id2label": {0: "n", 1: "p"}}, ValueError, "number of names in id2label, 2, got 3"),
    "from_one": ({"id2label": {1: "a", 2: "b", 3: "c"}}, ValueError, "id2label must name each label from 0 to 2"),
    "problem": ({"problem_type": "guess"}, ValueError, "problem_type must be one of regression, .*got 'guess'"),
    "length": ({"model_max_length": "long"}, ValueError, "model_max_length must be a positive int.*got 'long'"),
    "side": ({"padding_side": "up"}, ValueError, "with the options padding_side: .*up"),
    "no_subfolder": (
        {"subfolder": "nope"},
        FileNotFoundError,
        "subfolder must be a folder in .*, got 'nope': there is",
    ),
    "number_as_subfolder": ({"subfolder": 3}, TypeError, "subfolder must be a str or PathLike, got int: 3"),
    "number_as_revision": ({"revision": 3}, TypeError, "revision must be a str, got int: 3"),
    "code": ({"code_revision": "main"}, TypeError, "no option code_revision: leave it out"),
    "ids_of_names": ({"label2id": 3}, ValueError, "label2id must be a mapping from names to ids, got 3"),
    "int8": ({"dtype": torch.int8}, ValueError, "dtype must be one of float32, float16, bfloat16, got torch.int8"),
    "float8": ({"dtype": torch.float8_e5m2}, ValueError, "dtype must be one of float32, .*got torch.float8_e5m2"),
    "list_as_dtype": ({"dtype": ["float32"]}, ValueError, r"dtype must be one of float32, .*got \['float32'\]"),
}


@pytest.mark.parametrize(("options", "error", "message"), list(OTHER_OPTIONS.values()), ids=list(OTHER_OPTIONS))
def test_an_option_that_does_not_fit_is_blamed_and_not_the_checkpoint(
    checkpoint: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        fastcls.Classifier.from_pretrained(checkpoint, device="cpu", **options)
    assert "damaged" not in str(raised.value)


def test_weights_are_there_once_while_a_checkpoint_is_loaded(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def recorded(model: Any, **options: Any) -> Any:
        given.update(options)
        return fastcls.optimize(model, **options)

    monkeypatch.setattr("fastcls.classifier.optimize", recorded)
    fastcls.Classifier.from_pretrained(checkpoint, device="cpu")
    assert given["release"]


def test_bad_loading_options_are_named(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"one of float32, float16, bfloat16, got 'int8': pass quantize=\"int8\"$"):
        fastcls.Classifier.from_pretrained(checkpoint, dtype="int8")
    with pytest.raises(ValueError, match="device must be one that torch can use here, got 'gpu'"):
        fastcls.Classifier.from_pretrained(checkpoint, device="gpu")
    device: Any = ["cpu"]
    with pytest.raises(ValueError, match=r"device must be one that torch can use here, got \['cpu'\]"):
        fastcls.Classifier.from_pretrained(checkpoint, device=device)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16], ids=["name", "dtype"])
def test_dtype_may_be_chosen(checkpoint: Path, dtype: Any) -> None:
    classifier = fastcls.Classifier.from_pretrained(checkpoint, device="cpu", dtype=dtype)
    assert classifier.model.dtype == torch.bfloat16
    assert classifier(TEXTS)[0]["label"] in ("bad", "fair", "good")


def test_a_dtype_of_auto_and_options_of_none_are_what_is_without_them(checkpoint: Path) -> None:
    nothing: dict[str, Any] = dict.fromkeys(
        ("subfolder", "revision", "token", "variant", "use_safetensors", "weights_only")
    )
    classifier = fastcls.Classifier.from_pretrained(checkpoint, device="cpu", dtype="auto", **nothing)
    assert classifier.model.dtype == torch.float32
    assert classifier(TEXTS) == fastcls.Classifier.from_pretrained(checkpoint, device="cpu")(TEXTS)


def test_int8_may_be_chosen(
    checkpoint: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever the CPU.
    monkeypatch.setattr("fastcls.conversion.explain_compiled", lambda _: (True, ""))
    loaded = fastcls.Classifier.from_pretrained(checkpoint, device="cpu", quantize="int8")
    assert loaded.model.quantize == "int8"
    assert loaded(TEXTS)[0]["label"] in ("bad", "fair", "good")
    model = sample_bert(tokenizer)
    made = fastcls.Classifier(model, tokenizer, quantize="int8")
    assert made.model.quantize == "int8"
    assert fastcls.Classifier(made.model, tokenizer, quantize="int8").model is made.model
    assert fastcls.Classifier(made.model, tokenizer).model.quantize == "int8"
    assert fastcls.Classifier(model, tokenizer).model.quantize is None
    with pytest.raises(ValueError, match="quantize must be left out for a fast model, got 'int8': pass it to fastcls"):
        fastcls.Classifier(fastcls.optimize(model), tokenizer, quantize="int8")
    monkeypatch.setattr("fastcls.conversion.explain_compiled", lambda _: (False, "it is made up"))
    with pytest.warns(RuntimeWarning, match="quantize='int8' is left out.*it is made up"):
        assert fastcls.Classifier(model, tokenizer, quantize="int8").model.quantize is None


def test_another_precision_than_int8_is_named(checkpoint: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    four_bits: Any = "int4"
    told = "quantize must be None or one of int8, got 'int4'"
    with pytest.raises(ValueError, match=told):
        fastcls.Classifier(sample_bert(tokenizer), tokenizer, quantize=four_bits)
    with pytest.raises(ValueError, match=told):
        fastcls.Classifier(fastcls.optimize(sample_bert(tokenizer)), tokenizer, quantize=four_bits)
    with pytest.raises(ValueError, match=told):
        # Before the checkpoint is looked for.
        fastcls.Classifier.from_pretrained(checkpoint / "nowhere", quantize=four_bits)


def test_torchs_default_device_does_not_count(checkpoint: Path, classifier: fastcls.Classifier, device: str) -> None:
    with torch.device("meta"):
        loaded = fastcls.Classifier.from_pretrained(checkpoint, device=device)
        assert loaded(TEXTS) == classifier(TEXTS)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for path in folder.iterdir():
            if path.name.startswith(names):
                path.unlink()

    return damage


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def drop_classifier(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("classifier")}
    save_file(weights, path, metadata={"format": "pt"})


def as_adapter(folder: Path) -> None:
    drop("config", "model")(folder)
    (folder / "adapter_config.json").write_text("{}")


DAMAGES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no_config": (drop("config"), FileNotFoundError, "the folder has no config.json"),
    "no_weights": (drop("model"), OSError, "no file named model.safetensors"),
    "no_tokenizer": (drop("tokenizer"), ValueError, "holds no tokenizer"),
    "cut_weights": (cut_weights, ValueError, "the checkpoint is damaged or incomplete"),
    "broken_tokenizer": (break_tokenizer, ValueError, "the checkpoint is damaged or incomplete"),
    "broken_config": (lambda folder: (folder / "config.json").write_text("{"), OSError, "not a valid JSON file"),
    "other_shapes": (
        lambda folder: edit_config(folder, hidden_size=128),
        ValueError,
        r"does not fit its config.json: .* is \(64,\), the config asks for \(128,\)",
    ),
    "no_classifier": (drop_classifier, ValueError, "no weights for classifier.bias, classifier.weight"),
    "other_family": (
        lambda folder: edit_config(folder, model_type="gpt2"),
        TypeError,
        "family bert, .*got a config of 'gpt2' for sequence classification",
    ),
    "quantised": (
        lambda folder: edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        ValueError,
        "must be a checkpoint in bfloat16, .*got a quantised one .*not taken",
    ),
    "adapter_alone": (as_adapter, ValueError, "must hold a whole model, got an adapter of PEFT .*merge_and_unload"),
    "adapter_beside_a_model": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        ValueError,
        "must hold a whole model, got an adapter of PEFT .*save_pretrained",
    ),
    "decoder": (lambda folder: edit_config(folder, is_decoder=True), ValueError, "config.is_decoder must be False"),
    "relative_positions": (
        lambda folder: edit_config(folder, position_embedding_type="relative_key"),
        ValueError,
        "config.position_embedding_type must be 'absolute'",
    ),
}


@pytest.mark.parametrize(("damage", "error", "message"), list(DAMAGES.values()), ids=list(DAMAGES))
def test_bad_checkpoints_are_named(
    checkpoint: Path, tmp_path: Path, damage: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    damage(folder)
    with pytest.raises(error, match=message):
        fastcls.Classifier.from_pretrained(folder, device="cpu")


def test_missing_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        fastcls.Classifier.from_pretrained(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ValueError, match=r"must be a folder with config\.json and weights, got the file"):
        fastcls.Classifier.from_pretrained(file)


def test_an_adapter_on_the_hub_is_named(tmp_path: Path) -> None:
    # As a download leaves it.
    repository = tmp_path / "models--your--adapter"
    (repository / "snapshots" / "0").mkdir(parents=True)
    (repository / "snapshots" / "0" / "adapter_config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    with pytest.raises(ValueError, match=r"your/adapter must hold a whole model, got an adapter of PEFT"):
        fastcls.Classifier.from_pretrained("your/adapter", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(OSError, match=r"cannot load your/model with subfolder='two': .*no folder of that name either"):
        fastcls.Classifier.from_pretrained("your/model", cache_dir=tmp_path, local_files_only=True, subfolder="two")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (None, "got NoneType$"),
        (3, "got int$"),
        (b"your/model", "got bytes$"),
        ("", "got an empty name$"),
        (torch.nn.Linear(1, 1), "got Linear: pass a model that is loaded already to fastcls.Classifier"),
    ],
    ids=["none", "number", "bytes", "empty", "model"],
)
def test_what_is_no_name_is_named(place: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"name_or_path must be a folder or a name on the hub, {message}"):
        fastcls.Classifier.from_pretrained(place)


def test_a_checkpoint_may_lie_in_a_subfolder(checkpoint: Path) -> None:
    for subfolder in (checkpoint.name, Path(checkpoint.name)):
        loaded = fastcls.Classifier.from_pretrained(checkpoint.parent, device="cpu", subfolder=subfolder)
        assert loaded(TEXTS) == fastcls.Classifier.from_pretrained(checkpoint, device="cpu")(TEXTS)
