"""Tables of each library in, the same kind out: values against the classifier's own call, and what is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_bert
from test_imports import run

import fastcls
import fastcls.tables.job
from fastcls.tools.demo import sample_texts, sample_tokenizer

REASON = "a library of tables"
pyarrow: Any = pytest.importorskip("pyarrow", reason=REASON)
pandas: Any = pytest.importorskip("pandas", reason=REASON)
polars: Any = pytest.importorskip("polars", reason=REASON)
datasets: Any = pytest.importorskip("datasets", reason=REASON)

TEXTS = ["a visually stunning rumination on love", "ok", "", "nothing but boilerplate cliches", "dull and long", "fine"]
OTHERS = ["which film?", "why", "so it is", "is it", "no", ""]
IDS = [3, 1, 4, 1, 5, 9]
DATA: dict[str, list[Any]] = {"id": IDS, "text": TEXTS}


@pytest.fixture(scope="module")
def classifier() -> fastcls.Classifier:
    tokenizer = sample_tokenizer(sample_texts())
    names = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
    return fastcls.Classifier(tiny_bert(vocab_size=len(tokenizer), **names), tokenizer)


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastcls.tables.job, "MAX_ROWS", 4)


def stream_of(data: dict[str, list[Any]], **options: Any) -> Any:
    return datasets.Dataset.from_dict(data, **options).to_iterable_dataset()


def unknown_stream(data: dict[str, list[Any]]) -> Any:
    """A stream that does not know its columns."""

    def rows() -> Iterator[dict[str, Any]]:
        yield from (dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True))

    return datasets.IterableDataset.from_generator(rows)


MAKERS: dict[str, Callable[[dict[str, list[Any]]], Any]] = {
    "pandas": pandas.DataFrame,
    "polars": polars.DataFrame,
    "pyarrow": pyarrow.table,
    "batch": pyarrow.RecordBatch.from_pydict,
    "dataset": datasets.Dataset.from_dict,
    "stream": stream_of,
    "unknown_stream": unknown_stream,
}
each_kind = pytest.mark.parametrize("make", list(MAKERS.values()), ids=list(MAKERS))


def rows_of(table: Any) -> list[dict[str, Any]]:
    """A table's rows in plain Python, pandas' missing values as None."""
    if isinstance(table, pandas.DataFrame):
        columns = {
            name: [None if missing else value for value, missing in zip(column.tolist(), column.isna(), strict=True)]
            for name, column in table.items()
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if isinstance(table, polars.DataFrame):
        return list(table.to_dicts())
    if isinstance(table, (pyarrow.Table, pyarrow.RecordBatch)):
        return list(table.to_pylist())
    return [dict(row) for row in table]


def column_of(table: Any, name: str) -> list[Any]:
    return [row[name] for row in rows_of(table)]


def answers(classifier: fastcls.Classifier, texts: list[Any], **options: Any) -> list[Any]:
    return classifier(texts, **options)


def assert_labelled(table: Any, expected: list[Any], label: str = "label", score: str = "score") -> None:
    """Expected answers of the classifier's call; None for null results."""
    rows = rows_of(table)
    assert [row[label] for row in rows] == [each and each["label"] for each in expected]
    for row, each in zip(rows, expected, strict=True):
        assert row[score] == (each and pytest.approx(each["score"], abs=1e-5))


@each_kind
def test_labels_are_added_to_the_kind_that_was_given(classifier: fastcls.Classifier, make: Callable[..., Any]) -> None:
    table = make(DATA)
    before = rows_of(table)
    labelled = classifier.map(table)
    assert type(labelled) is type(table)
    assert list(rows_of(labelled)[0]) == ["id", "text", "label", "score"]
    assert_labelled(labelled, answers(classifier, TEXTS))
    assert [{name: row[name] for name in ("id", "text")} for row in rows_of(labelled)] == before
    assert rows_of(table) == before


@each_kind
def test_all_options_reach_the_columns(classifier: fastcls.Classifier, make: Callable[..., Any]) -> None:
    table = make({"id": IDS, "first": TEXTS, "second": OTHERS})
    wanted = {"top_k": 2, "all_scores": True, "logits": True, "threshold": 0.4, "prefix": "p_"}
    labelled = classifier.map(
        table,
        text_column="first",
        pair_column="second",
        function_to_apply="sigmoid",
        **wanted,  # type: ignore[arg-type]
    )
    pairs = list(zip(TEXTS, OTHERS, strict=True))
    every = answers(classifier, pairs, top_k=None, function_to_apply="sigmoid")
    logits = classifier.logits(pairs)
    for row, labels, numbers in zip(rows_of(labelled), every, logits.tolist(), strict=True):
        kept = [each for each in labels[:2] if each["score"] >= 0.4]
        assert [each["label"] for each in row["p_labels"]] == [each["label"] for each in kept]
        assert row["p_scores"] == pytest.approx({each["label"]: each["score"] for each in labels}, abs=1e-5)
        assert list(row["p_logits"].values()) == pytest.approx(numbers, abs=1e-5)


NULLS: dict[str, Callable[[list[Any]], Any]] = {
    "pandas": lambda texts: pandas.DataFrame({"text": texts}),
    "pandas_objects": lambda texts: pandas.DataFrame({"text": pandas.Series(texts, dtype=object)}),
    "pandas_nan": lambda texts: pandas.DataFrame({"text": [float("nan") if text is None else text for text in texts]}),
    "pandas_na": lambda texts: pandas.DataFrame(
        {"text": pandas.Series([pandas.NA if text is None else text for text in texts], dtype=object)}
    ),
    "pandas_string": lambda texts: pandas.DataFrame({"text": pandas.Series(texts, dtype="string")}),
    "pandas_category": lambda texts: pandas.DataFrame({"text": pandas.Series(texts, dtype="category")}),
    "pandas_arrow": lambda texts: pandas.DataFrame(
        {"text": pandas.Series(texts, dtype=pandas.ArrowDtype(pyarrow.large_string()))}
    ),
    "pandas_dictionary": lambda texts: pandas.DataFrame(
        {"text": pandas.Series(texts, dtype=pandas.ArrowDtype(pyarrow.dictionary(pyarrow.int32(), pyarrow.string())))}
    ),
    "polars": lambda texts: polars.DataFrame({"text": texts}),
    "polars_categorical": lambda texts: polars.DataFrame({"text": polars.Series(texts, dtype=polars.Categorical)}),
    "polars_enum": lambda texts: polars.DataFrame(
        {"text": polars.Series(texts, dtype=polars.Enum([text for text in texts if text is not None]))}
    ),
    "arrow": lambda texts: pyarrow.table({"text": texts}),
    "arrow_large": lambda texts: pyarrow.table({"text": pyarrow.array(texts, pyarrow.large_string())}),
    "arrow_view": lambda texts: pyarrow.table({"text": pyarrow.array(texts, pyarrow.string_view())}),
    "arrow_dictionary": lambda texts: pyarrow.table({"text": pyarrow.array(texts).dictionary_encode()}),
    "arrow_null_in_dictionary": lambda texts: pyarrow.table(
        {"text": pyarrow.DictionaryArray.from_arrays(pyarrow.array(range(len(texts))), pyarrow.array(texts))}
    ),
    "arrow_chunks": lambda texts: pyarrow.table({"text": pyarrow.chunked_array([texts[:3], [], texts[3:]])}),
    "batch": lambda texts: pyarrow.RecordBatch.from_pydict({"text": texts}),
    "dataset": lambda texts: datasets.Dataset.from_dict({"text": texts}),
    "stream": lambda texts: stream_of({"text": texts}),
}
each_null = pytest.mark.parametrize("make", list(NULLS.values()), ids=list(NULLS))


@each_null
def test_nulls_are_refused_with_their_row(
    classifier: fastcls.Classifier, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make([*TEXTS, None, "the end"])
    computed: list[Any] = []
    monkeypatch.setattr(classifier.model, "logits_of", lambda *ids: computed.append(ids))
    with pytest.raises(ValueError, match=rf"column 'text' in row {len(TEXTS)} \(from 0\) is null"):
        list(classifier.map(table))
    assert not computed


@each_null
def test_nulls_may_give_null_results(classifier: fastcls.Classifier, make: Callable[..., Any]) -> None:
    labelled = classifier.map(make([None, *TEXTS, None]), errors="null", all_scores=True)
    assert_labelled(labelled, [None, *answers(classifier, TEXTS), None])
    scores = column_of(labelled, "scores")
    assert scores[0] is None
    # A list of dicts, as streams have them, fills a struct's fields.
    assert scores[1].keys() == {"bad", "fair", "good"}


def test_a_null_in_a_pair_is_a_null(classifier: fastcls.Classifier) -> None:
    table = pyarrow.table({"text": TEXTS, "other": [*OTHERS[:-1], None]})
    with pytest.raises(ValueError, match="column 'other' in row 5"):
        classifier.map(table, pair_column="other")
    expected = answers(classifier, list(zip(TEXTS, OTHERS, strict=True)))
    assert_labelled(classifier.map(table, pair_column="other", errors="null"), [*expected[:-1], None])


def test_values_that_are_no_strings_are_named(classifier: fastcls.Classifier) -> None:
    frame = pandas.DataFrame({"text": pandas.Series(["ok", 3, b"ok", None], dtype=object)})
    for table in (frame, unknown_stream({"text": ["ok", 3]})):
        with pytest.raises(TypeError, match=r"column 'text' in row 1 \(from 0\) must be a string, got 3"):
            list(classifier.map(table))
    assert_labelled(classifier.map(frame, errors="null"), [answers(classifier, ["ok"])[0], None, None, None])


def test_a_column_without_any_text_gives_nulls(classifier: fastcls.Classifier) -> None:
    for table in (
        pandas.DataFrame({"text": [None, None]}, dtype=object),
        polars.DataFrame({"text": [None, None]}),
        pyarrow.table({"text": pyarrow.nulls(2)}),
        datasets.Dataset.from_dict({"text": [None, None]}),
    ):
        labelled = classifier.map(table, errors="null")
        assert_labelled(labelled, [None, None])


@each_kind
def test_no_rows_give_no_rows(classifier: fastcls.Classifier, make: Callable[..., Any]) -> None:
    if make is unknown_stream:
        pytest.skip("datasets takes no stream without rows")
    table = make({"text": ["ok"]})
    empty = table.take(0) if make is stream_of else table.select([]) if make is MAKERS["dataset"] else table[:0]
    assert rows_of(classifier.map(empty, all_scores=True)) == []


def test_texts_too_long_are_cut_or_named(classifier: fastcls.Classifier) -> None:
    long = "the plot is a mess but the actors shine and the music soars " * 12
    table = pyarrow.table({"text": [*TEXTS, long]})
    assert_labelled(classifier.map(table), answers(classifier, [*TEXTS, long], truncation=True))
    with pytest.raises(ValueError, match=r"column 'text' in row 6 \(from 0\) is longer than 96 tokens"):
        classifier.map(table, long_texts="error")
    labelled = classifier.map(table, long_texts="error", errors="null")
    assert_labelled(labelled, [*answers(classifier, TEXTS), None])


def test_pairs_are_cut_as_the_classifier_cuts_them(classifier: fastcls.Classifier) -> None:
    long = "the plot is a mess but the actors shine and the music soars " * 12
    own = fastcls.Classifier(classifier.model, classifier.tokenizer, truncation="only_second")
    table = pyarrow.table({"text": ["ok", long], "other": [long, "ok"]})
    labelled = own.map(table, pair_column="other", errors="null")
    assert_labelled(labelled, [*answers(own, [("ok", long)]), None])
    with pytest.raises(ValueError, match=r"row 1 \(from 0\) "):
        own.map(table, pair_column="other")


def test_half_a_character_is_named(classifier: fastcls.Classifier) -> None:
    frame = pandas.DataFrame({"text": pandas.Series(["ok", "\ud83d"], dtype=object)})
    with pytest.raises(ValueError, match=r"column 'text' in row 1 \(from 0\) holds half a character"):
        classifier.map(frame)
    assert_labelled(classifier.map(frame, errors="null"), [answers(classifier, ["ok"])[0], None])


# Which column


@each_kind
def test_the_only_column_of_strings_is_read(classifier: fastcls.Classifier, make: Callable[..., Any]) -> None:
    if make is unknown_stream:
        with pytest.raises(ValueError, match=r"text_column must name a column of the table, got 'text'; columns: 'id'"):
            list(classifier.map(make({"id": IDS, "sentence": TEXTS})))
        return
    assert_labelled(classifier.map(make({"id": IDS, "sentence": TEXTS})), answers(classifier, TEXTS))
    pairs = answers(classifier, list(zip(TEXTS, OTHERS, strict=True)))
    assert_labelled(classifier.map(make({"other": OTHERS, "sentence": TEXTS}), pair_column="other"), pairs)
    with pytest.raises(ValueError, match="several of strings, 'a', 'b'"):
        classifier.map(make({"a": TEXTS, "b": OTHERS}))
    with pytest.raises(ValueError, match="none of strings: 'id'"):
        classifier.map(make({"id": IDS}))


@each_kind
def test_columns_that_do_not_fit_are_refused(classifier: fastcls.Classifier, make: Callable[..., Any]) -> None:
    table = make(DATA)
    with pytest.raises(
        ValueError, match=r"text_column must name a column of the table, got 'txt'; columns: 'id', 'tex"
    ):
        list(classifier.map(table, text_column="txt"))
    with pytest.raises(ValueError, match="pair_column must name a column of the table, got 'txt'"):
        list(classifier.map(table, pair_column="txt"))
    with pytest.raises(TypeError, match=r"column 'id' .*must (hold strings, got [iI]nt64|be a string, got 3)"):
        list(classifier.map(table, text_column="id"))


@each_kind
def test_a_column_that_is_there_already_is_not_overwritten(
    classifier: fastcls.Classifier, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make({"text": TEXTS, "label": IDS})
    with monkeypatch.context() as patch:
        patch.setattr(classifier.model, "logits_of", lambda *_: pytest.fail("computed"))
        with pytest.raises(ValueError, match=r"has a column 'label' already: pass prefix=\"predicted_\""):
            list(classifier.map(table))
    labelled = classifier.map(table, prefix="predicted_")
    assert_labelled(labelled, answers(classifier, TEXTS), "predicted_label", "predicted_score")
    with pytest.raises(
        ValueError, match="has a column 'predicted_label' already: pass another prefix than 'predicted_'"
    ):
        list(classifier.map(labelled, prefix="predicted_"))


def test_a_name_that_several_columns_have_is_refused(classifier: fastcls.Classifier) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(TEXTS), pyarrow.array(TEXTS)], names=["text", "text"])
    frame = pandas.DataFrame([["a", "b"]], columns=["text", "text"])
    for twice in (table, frame):
        with pytest.raises(ValueError, match=r"text_column must name a column .*'text'; which 2 columns have"):
            classifier.map(twice)
    levels = pandas.DataFrame([["a"]], columns=pandas.MultiIndex.from_tuples([("text", "")]))
    with pytest.raises(ValueError, match="one level of column names, got 2"):
        classifier.map(levels)


def test_names_of_columns_need_not_be_text(classifier: fastcls.Classifier) -> None:
    frame = pandas.DataFrame({0: IDS, 1: TEXTS})
    assert_labelled(classifier.map(frame), answers(classifier, TEXTS))
    assert_labelled(classifier.map(frame, text_column=1), answers(classifier, TEXTS))


class Dask:
    __module__ = "dask.dataframe"


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "lazy": (lambda: polars.LazyFrame(DATA), r"got LazyFrame of polars: call \.collect\(\) first"),
    "dask": (Dask, r"got Dask of dask: call \.compute\(\) first"),
    "list": (lambda: TEXTS, r"got list; texts in a list .*classifier\(texts\)"),
    "column": (lambda: pandas.Series(TEXTS), "got Series of pandas; texts in a list or a column go to"),
    "nothing": (lambda: None, "got NoneType"),
}


@pytest.mark.parametrize(("make", "message"), list(REFUSED.values()), ids=list(REFUSED))
def test_what_is_no_known_table_is_refused(
    classifier: fastcls.Classifier, make: Callable[[], Any], message: str
) -> None:
    with pytest.raises(TypeError, match=f"table must be a DataFrame of pandas or polars, .*{message}"):
        classifier.map(make())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"errors": "ignore"}, "errors must be one of raise, null, column, got 'ignore'"),
        ({"long_texts": True}, "long_texts must be one of truncate, error.*, got True"),
        ({"top_k": 0}, "top_k must be a positive int or None, got 0"),
        ({"function_to_apply": "max"}, "function_to_apply must be one of"),
    ],
)
def test_bad_options_are_named(classifier: fastcls.Classifier, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classifier.map(pyarrow.table(DATA), **options)


@pytest.mark.parametrize("kind", ["pandas", "polars", "pyarrow", "batch", "dataset"])
def test_a_call_never_takes_a_table_for_the_names_of_its_columns(classifier: fastcls.Classifier, kind: str) -> None:
    for call in (classifier, classifier.stream, classifier.logits):
        with pytest.raises(TypeError, match=r"got a table \(.*columns: id, text\): pass one of its columns, .*text"):
            call(MAKERS[kind](DATA))


# What each library has of its own


def test_pandas_keeps_index_attributes_and_order(classifier: fastcls.Classifier) -> None:
    frame = pandas.DataFrame(DATA, index=pandas.Index(["x", "y", "x", "z", "y", "x"], name="key"))
    frame.attrs["source"] = "here"
    labelled = classifier.map(frame)
    assert labelled.index.equals(frame.index)
    assert labelled.index.name == "key"
    assert labelled.attrs == {"source": "here"}
    assert list(frame.columns) == ["id", "text"]
    assert_labelled(labelled, answers(classifier, TEXTS))
    shuffled = frame.iloc[::-1]
    assert_labelled(classifier.map(shuffled), answers(classifier, TEXTS[::-1]))
    labelled.loc[:, "id"] = 0
    assert frame["id"].tolist() == IDS


def test_columns_have_the_types_that_a_library_gives_strings_and_numbers(classifier: fastcls.Classifier) -> None:
    labelled = classifier.map(pandas.DataFrame(DATA), all_scores=True)
    assert labelled["label"].dtype == pandas.Series(["a"]).dtype
    assert labelled["score"].dtype == "float32"
    assert isinstance(labelled["scores"][0], dict)
    assert isinstance(classifier.map(pandas.DataFrame(DATA), top_k=1)["labels"][0], list)
    frame = classifier.map(polars.DataFrame(DATA), all_scores=True)
    assert frame.schema["label"] == polars.String
    assert frame.schema["score"] == polars.Float32
    assert frame.schema["scores"] == polars.Struct(dict.fromkeys(["bad", "fair", "good"], polars.Float32))


def test_metadata_of_arrow_is_kept(classifier: fastcls.Classifier) -> None:
    table = pyarrow.table(DATA).replace_schema_metadata({"made": "here"})
    for given in (table, table.to_batches()[0]):
        labelled = classifier.map(given)
        assert labelled.schema.metadata == {b"made": b"here"}
        labelled.validate(full=True)


@pytest.mark.parametrize("kind", [None, "torch", "numpy", "pandas", "arrow", "polars"])
def test_a_dataset_keeps_features_and_format(classifier: fastcls.Classifier, kind: str | None) -> None:
    features = datasets.Features({"id": datasets.ClassLabel(num_classes=10), "text": datasets.Value("large_string")})
    dataset = datasets.Dataset.from_dict(DATA, features=features).with_format(kind)
    labelled = classifier.map(dataset, all_scores=True)
    assert labelled.format == {**dataset.format, "columns": ["id", "text", "label", "score", "scores"]}
    assert {name: labelled.features[name] for name in features} == features
    assert labelled.features["label"] == datasets.Value("string")
    assert labelled.features["score"] == datasets.Value("float32")
    assert_labelled(labelled.with_format(None), answers(classifier, TEXTS))
    assert dataset.column_names == ["id", "text"]


def test_a_transform_of_a_dataset_is_not_what_is_read(classifier: fastcls.Classifier) -> None:
    def shouted(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {**batch, "text": [text.upper() for text in batch["text"]]} if "text" in batch else batch

    dataset = datasets.Dataset.from_dict(DATA).with_transform(shouted)
    labelled = classifier.map(dataset)
    assert labelled[0]["text"] == TEXTS[0].upper()
    assert_labelled(labelled.with_format(None), answers(classifier, TEXTS))
    ids_alone = datasets.Dataset.from_dict(DATA).with_format("numpy", columns=["id"])
    assert set(classifier.map(ids_alone).format["columns"]) == {"id", "label", "score"}


SELECTIONS: dict[str, Callable[[Any], Any]] = {
    "shuffled": lambda dataset: dataset.shuffle(seed=3),
    "selected": lambda dataset: dataset.select([4, 0, 4]),
    "range": lambda dataset: dataset.select(range(2, 5)),
    "none": lambda dataset: dataset.select([]),
    "none_of_joined": lambda dataset: datasets.concatenate_datasets([dataset, dataset]).select([]),
    "joined": lambda dataset: datasets.concatenate_datasets([dataset, dataset.select([5, 2])]),
    "filtered": lambda dataset: dataset.filter(lambda row: row["id"] > 3, keep_in_memory=True),
}


@pytest.mark.parametrize("select", list(SELECTIONS.values()), ids=list(SELECTIONS))
def test_selected_rows_of_a_dataset_get_their_own_labels(
    classifier: fastcls.Classifier, select: Callable[[Any], Any], tmp_path: Path
) -> None:
    datasets.Dataset.from_dict({**DATA, "many": [TEXTS] * 6}).save_to_disk(tmp_path / "data")
    dataset = select(datasets.load_from_disk(tmp_path / "data"))
    texts = list(dataset["text"])
    before = sorted(path.name for path in (tmp_path / "data").iterdir())
    labelled = classifier.map(dataset, logits=True)
    assert list(labelled["id"]) == list(dataset["id"])
    if texts:
        assert labelled.cache_files == dataset.cache_files, "the whole was read into memory, or written anew"
    assert_labelled(classifier.map(labelled, prefix="p_"), answers(classifier, texts), "p_label", "p_score")
    assert_labelled(labelled, answers(classifier, texts))
    # As any dataset it can be selected from again, and written.
    assert_labelled(labelled.select(range(len(texts))[::-1]), answers(classifier, texts[::-1]))
    if texts:  # datasets does not load what it saved without rows
        labelled.save_to_disk(tmp_path / "labelled")
        assert_labelled(datasets.load_from_disk(tmp_path / "labelled"), answers(classifier, texts))
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == before


def test_rows_of_a_dataset_that_are_not_selected_are_not_read(classifier: fastcls.Classifier) -> None:
    dataset = datasets.Dataset.from_dict({"text": [None, "ok", "fine"]}).select([2, 1])
    assert_labelled(classifier.map(dataset), answers(classifier, ["fine", "ok"]))


def test_a_dataset_is_not_hashed_and_has_a_fingerprint_of_its_own(
    classifier: fastcls.Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastcls.Classifier, "__reduce_ex__", lambda *_: pytest.fail("the model was pickled"))
    dataset = datasets.Dataset.from_dict(DATA)
    hashed: list[Any] = []
    hash_of = datasets.fingerprint.Hasher.hash

    def noted(_: Any, value: Any) -> str:
        hashed.append(value)
        return str(hash_of(value))

    monkeypatch.setattr(datasets.fingerprint.Hasher, "hash", classmethod(noted))
    one, other = classifier.map(dataset), classifier.map(dataset)
    # The names of formats and columns are hashed, values are not.
    assert all(len(str(value)) < 80 for value in hashed)
    assert not any(isinstance(value, (pyarrow.Array, pyarrow.ChunkedArray)) for value in hashed)
    assert len({dataset._fingerprint, one._fingerprint, other._fingerprint}) == 3


def test_each_split_is_classified_and_all_are_checked_first(classifier: fastcls.Classifier) -> None:
    splits = datasets.DatasetDict(
        train=datasets.Dataset.from_dict(DATA), test=datasets.Dataset.from_dict({"text": ["ok"], "more": [True]})
    )
    labelled = classifier.map(splits)
    assert type(labelled) is datasets.DatasetDict
    assert_labelled(labelled["train"], answers(classifier, TEXTS))
    assert labelled["test"].column_names == ["text", "more", "label", "score"]
    streams = classifier.map(datasets.IterableDatasetDict(test=stream_of(DATA)))
    assert type(streams) is datasets.IterableDatasetDict
    assert_labelled(streams["test"], answers(classifier, TEXTS))
    bad = datasets.DatasetDict(train=splits["train"], test=datasets.Dataset.from_dict({"text": [None]}))
    logits = classifier.logits
    try:
        classifier.logits = lambda *_, **__: pytest.fail("computed")  # type: ignore[method-assign]
        with pytest.raises(ValueError, match="column 'text' in row 0"):
            classifier.map(bad)
    finally:
        classifier.logits = logits  # type: ignore[method-assign]


def test_a_stream_is_read_as_it_is_asked_for(classifier: fastcls.Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastcls.tables, "_STREAM_WINDOW", 2)
    read: list[int] = []

    def rows() -> Iterator[dict[str, Any]]:
        for index in range(100):
            read.append(index)
            yield {"text": TEXTS[index % 6]}

    labelled = classifier.map(datasets.IterableDataset.from_generator(rows))
    assert not read
    assert_labelled(labelled.take(3), answers(classifier, TEXTS[:3]))
    assert len(read) <= 6
    with pytest.raises(ValueError, match=r"column 'text' in row 5 \(from 0\) is null"):
        list(classifier.map(stream_of({"text": [*TEXTS[:5], None]})))


@pytest.mark.parametrize("kind", [None, "torch", "numpy", "pandas", "arrow", "polars"])
def test_a_stream_keeps_features_and_format(classifier: fastcls.Classifier, kind: str | None) -> None:
    features = datasets.Features({"id": datasets.ClassLabel(num_classes=10), "text": datasets.Value("string")})
    stream = stream_of(DATA, features=features).with_format(kind)
    labelled = classifier.map(stream, top_k=2)
    assert {name: labelled.features[name] for name in features} == features
    assert labelled.features["labels"] == datasets.List(
        {"label": datasets.Value("string"), "score": datasets.Value("float32")}
    )
    assert type(next(iter(labelled))) is type(next(iter(stream)))
    firsts = [labels[0] for labels in column_of(labelled.with_format(None), "labels")]
    assert [each["label"] for each in firsts] == [each["label"] for each in answers(classifier, TEXTS)]


def test_a_stream_with_labels_can_go_to_another_process(classifier: fastcls.Classifier) -> None:
    labelled = pickle.loads(pickle.dumps(classifier.map(stream_of(DATA))))
    assert_labelled(labelled, answers(classifier, TEXTS))


def test_only_a_window_of_texts_is_held(classifier: fastcls.Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    logits_of = classifier.model.logits_of

    def counted(token_ids: Any, types: Any) -> torch.Tensor:
        seen.append(len(token_ids))
        return logits_of(token_ids, types)

    monkeypatch.setattr(classifier.model, "logits_of", counted)
    classifier.map(pyarrow.table(DATA))
    assert seen == [4, 2]


@pytest.mark.full
def test_no_library_of_tables_is_imported_for_it() -> None:
    code = (
        "import sys, fastcls\n"
        "from fastcls import Classifier\n"
        "print([name for name in ('pandas', 'polars', 'pyarrow', 'datasets') if name in sys.modules])"
    )
    assert run(code) == "[]"
