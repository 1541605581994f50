"""Files to files: what is written is what the classifier says, whatever the form, and however often a run was ended."""

from __future__ import annotations

import functools
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_bert

import fastcls
from fastcls.flow import Scored
from fastcls.texts import Item
from fastcls.tools.demo import sample_texts, sample_tokenizer

pa = pytest.importorskip("pyarrow", reason="files are written with pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="files are written with pyarrow")
csv = pytest.importorskip("pyarrow.csv", reason="files are written with pyarrow")

from fastcls.files import manifest, output, writing  # noqa: E402
from fastcls.files import run as running  # noqa: E402
from fastcls.files.job import Job, Options  # noqa: E402
from fastcls.files.manifest import Manifest  # noqa: E402
from fastcls.files.output import Held, Output, Places  # noqa: E402
from fastcls.files.run import BadRow, Totals  # noqa: E402
from fastcls.files.sources import Columns, open_sources  # noqa: E402
from fastcls.files.writing import Form, check_schema, open_writer  # noqa: E402
from fastcls.results import Results, Wanted  # noqa: E402

ROOT = Path(__file__).parents[1]
NAMES = ["bad", "fair", "good"]
# Repeated texts, one that needs quotation marks, one beyond ASCII, an empty one.
TEXTS = ["fine", 'a "b", c', "où est 日本", "fine", "", "two\tparts", "very good", "not at all"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = sample_tokenizer(sample_texts())
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: row for row, name in enumerate(NAMES)}}
    tiny_bert(vocab_size=len(tokenizer), **names).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(model: Path) -> fastcls.Classifier:
    return fastcls.Classifier.from_pretrained(str(model), truncation=True)


@pytest.fixture(autouse=True)
def same_classifier(monkeypatch: pytest.MonkeyPatch, classifier: fastcls.Classifier) -> None:
    """One load is enough for all."""
    monkeypatch.setattr(
        "fastcls.predicting.loaded.Classifier", type("Loaded", (), {"from_pretrained": lambda *_, **__: classifier})
    )


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "MAX_ROWS", 3)


def rows_of(texts: Sequence[str | None]) -> list[dict[str, Any]]:
    return [{"id": index, "text": text} for index, text in enumerate(texts)]


def write_input(path: Path, texts: Sequence[str | None]) -> str:
    if path.suffix == ".parquet":
        schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
        pq.write_table(pa.Table.from_pylist(rows_of(texts), schema=schema), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(texts)))
    return str(path)


def do(
    model: Path, inputs: Sequence[str], target: Path | str, asked: dict[str, Any] | None = None, **options: Any
) -> Totals:
    job = Job(str(model), inputs, str(target), Options(**options), **(asked or {}))
    job.load()
    return job.run()


def decompressed(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(content)
    return pa.CompressedInputStream(str(path), "zstd").read() if path.suffix == ".zst" else content


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    content = decompressed(path)
    inner = path.stem if path.suffix in (".gz", ".zst") else path.name
    if inner.endswith(("jsonl", "ndjson")):
        return [json.loads(line) for line in content.decode().splitlines()]
    parsing = csv.ParseOptions(delimiter="\t" if inner.endswith("tsv") else ",", newlines_in_values=True)
    converting = csv.ConvertOptions(strings_can_be_null=True, quoted_strings_can_be_null=False)
    return csv.read_csv(io.BytesIO(content), parse_options=parsing, convert_options=converting).to_pylist()


FILES = ["o.parquet", "o.jsonl", "o.csv", "o.tsv", "o.jsonl.gz", "o.csv.zst", "o.ndjson", "O.CSV.GZ"]


def says(classifier: fastcls.Classifier, texts: Sequence[str]) -> list[tuple[str, Any]]:
    return [(row["label"], pytest.approx(row["score"], abs=1e-5)) for row in classifier(list(texts))]


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("source", ["i.parquet", "i.jsonl"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_holds_what_the_classifier_says(
    model: Path, classifier: fastcls.Classifier, tmp_path: Path, name: str, source: str
) -> None:
    """Over the borders of windows, shards and files."""
    inputs = [write_input(tmp_path / source, TEXTS), write_input(tmp_path / f"j{source}", TEXTS[:5])]
    target = tmp_path / name
    totals = do(model, inputs, target, shard_rows=7, id_columns=("id", "text"))
    texts = TEXTS + TEXTS[:5]
    found = read(target if name.islower() else target.rename(tmp_path / name.lower()))
    assert [list(row) for row in found] == [["id", "text", "label", "score"]] * len(texts)
    assert [(row["id"], row["text"]) for row in found] == [
        (row["id"], row["text"]) for row in rows_of(TEXTS) + rows_of(TEXTS[:5])
    ]
    assert [(row["label"], row["score"]) for row in found] == says(classifier, texts)
    assert (totals.rows, totals.bad) == (13, 0)
    left = {path.name for path in tmp_path.iterdir()} - {source, f"j{source}", name, name.lower()}
    assert left == {f"{name}.manifest.jsonl"}


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("kind", [None, "csv.gz", "jsonl"])
def test_a_folder_holds_shards(model: Path, classifier: fastcls.Classifier, tmp_path: Path, kind: str | None) -> None:
    source = write_input(tmp_path / "i.jsonl", [*TEXTS, None])
    do(model, [source], tmp_path / "out", shard_rows=4, output_format=kind)
    parts = sorted((tmp_path / "out").glob("part-*"))
    assert [part.name for part in parts] == [f"part-0000{index}.{kind or 'parquet'}" for index in range(3)]
    found = [row for part in parts for row in read(part)] if kind != "csv.gz" else [*read(parts[0]), *read(parts[1])]
    assert [(row["label"], row["score"]) for row in found] == says(classifier, TEXTS)
    assert read(tmp_path / "out" / "errors.jsonl") == [{"file": source, "line": 9, "reason": "text is null"}]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv.gz", "jsonl.zst"])
def test_standard_output_is_the_same_and_stays_open(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    source, stream = write_input(tmp_path / "i.jsonl", TEXTS), io.TextIOWrapper(io.BytesIO())
    do(model, [source], tmp_path / f"o.{kind}")
    monkeypatch.setattr(sys, "stdout", stream)
    do(model, [source], "-", output_format=kind)
    assert stream.buffer.getvalue() == (tmp_path / f"o.{kind}").read_bytes()


@pytest.mark.usefixtures("small_windows")
def test_columns_of_answers(model: Path, classifier: fastcls.Classifier, tmp_path: Path) -> None:
    source = write_input(tmp_path / "i.jsonl", TEXTS)
    wanted: Any = {"top_k": 2, "all_scores": True, "logits": True, "threshold": 0.3, "prefix": "p_"}
    for name in ("o.parquet", "o.jsonl", "o.csv"):
        do(model, [source], tmp_path / name, id_columns=("id",), **wanted)
    logits, best = classifier.logits(TEXTS).tolist(), classifier(TEXTS, top_k=2)
    for name in ("o.parquet", "o.jsonl"):
        for row, numbers, labels in zip(read(tmp_path / name), logits, best, strict=True):
            assert list(row) == ["id", "p_labels", "p_scores", "p_logits"]
            assert [row["p_logits"][each] for each in NAMES] == pytest.approx(numbers, abs=1e-5)
            kept = [each for each in labels if each["score"] >= 0.3]
            assert [each["label"] for each in row["p_labels"]] == [each["label"] for each in kept]
    for row, other in zip(read(tmp_path / "o.csv"), read(tmp_path / "o.parquet"), strict=True):
        assert json.loads(row["p_labels"]) == other["p_labels"]
        assert [row[f"p_scores.{each}"] for each in NAMES] == pytest.approx(list(other["p_scores"].values()), abs=1e-6)


def test_names_that_clash_are_refused(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "i.jsonl"
    source.write_text('{"text": "a", "label": "x", "scores.bad": 1}\n')
    with pytest.raises(ValueError, match=r"got label in the input and among the answers: add --prefix"):
        do(model, [str(source)], tmp_path / "o.jsonl", id_columns=("label",))
    with pytest.raises(ValueError, match=r"columns of csv must have different names, got two columns scores\.bad"):
        do(model, [str(source)], tmp_path / "o.csv", id_columns=("scores.bad",), all_scores=True)


@pytest.mark.parametrize("name", [*FILES[:6], "out"])
@pytest.mark.parametrize("count", [0, 1])
def test_an_input_of_no_row_or_one(model: Path, tmp_path: Path, name: str, count: int) -> None:
    source = write_input(tmp_path / "i.parquet", TEXTS[:count])
    do(model, [source], tmp_path / name)
    target = tmp_path / name / "part-00000.parquet" if name == "out" else tmp_path / name
    assert [row["text"] for row in read(target)] == TEXTS[:count]
    if target.suffix == ".parquet":
        assert pq.read_schema(target).names == ["text", "label", "score"]
    if name == "o.csv":
        assert target.read_bytes().startswith(b'"text","label","score"\n')


@pytest.mark.usefixtures("small_windows")
def test_vectors_keep_a_row_for_each_of_the_input(tmp_path: Path, model: Path) -> None:
    source = write_input(tmp_path / "i.jsonl", ["fine", None, "good"])
    do(model, [source], tmp_path / "o.npy", embeddings="mean", normalize=True, shard_rows=2)
    do(model, [source], tmp_path / "o.parquet", embeddings="mean", normalize=True)
    found = np.load(tmp_path / "o.npy")
    assert found.dtype == np.float32
    assert found.shape[0] == 3
    assert np.isnan(found[1]).all()
    assert np.linalg.norm(found[[0, 2]], axis=1) == pytest.approx(1, abs=1e-5)
    assert found[[0, 2]] == pytest.approx(
        np.array([row["embedding"] for row in read(tmp_path / "o.parquet")]), abs=1e-5
    )
    assert len(read(tmp_path / "o.npy.errors.jsonl")) == 1
    empty = write_input(tmp_path / "e.parquet", [])
    do(model, [empty], tmp_path / "e.npy", embeddings="first")
    assert np.load(tmp_path / "e.npy").shape == (0, found.shape[1])


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    batch = pa.RecordBatch.from_pydict({"score": [1.0, float("nan")], "inner": [[float("inf")], [2.0]]})
    writer = open_writer(tmp_path / "o.jsonl", Form("jsonl", None, ".jsonl"), batch.schema)
    writer.write(batch)
    writer.close()
    assert read(tmp_path / "o.jsonl") == [{"score": 1.0, "inner": [None]}, {"score": None, "inner": [2.0]}]


def test_any_type_but_bytes_is_written(tmp_path: Path) -> None:
    inner = pa.struct([("b", pa.struct([("c", pa.list_(pa.int64()))]))])
    batch = pa.RecordBatch.from_arrays(
        [
            pa.array(["x"]).dictionary_encode(),
            pa.array(["x"], pa.string_view()),
            pa.array([1], pa.timestamp("ns")),
            pa.array([{"b": {"c": [1]}}], inner),
        ],
        names=["d", "v", "t", "a"],
    )
    for name in ("csv", "jsonl"):
        form = Form.asked(name)
        assert form is not None
        check_schema(batch.schema, form)
        writer = open_writer(tmp_path / f"o.{name}", form, batch.schema)
        writer.write(batch)
        writer.close()
    assert (tmp_path / "o.csv").read_text().splitlines()[0] == '"d","v","t","a.b.c"'
    time = "1970-01-01 00:00:00.000000001"
    assert (tmp_path / "o.csv").read_text().splitlines()[1] == f'"x","x",{time},"[1]"'
    assert read(tmp_path / "o.jsonl") == [{"d": "x", "v": "x", "t": time, "a": {"b": {"c": [1]}}}]
    for of_bytes in (pa.binary(), pa.list_(pa.binary()), pa.struct([("b", pa.binary())])):
        with pytest.raises(ValueError, match=r"column x must have a form in csv, got .*: write \.parquet"):
            check_schema(pa.schema([("x", of_bytes)]), Form("csv", None, ".csv"))


def test_row_groups_are_of_some_size(tmp_path: Path) -> None:
    form = Form("parquet", None, ".parquet")
    schema = pa.schema([("text", pa.string()), ("kind", pa.dictionary(pa.int8(), pa.string()))])
    parts, expected = [tmp_path / "a.parquet", tmp_path / "b.parquet"], []
    for part in parts:
        writer = open_writer(part, form, schema)
        for window in range(20):
            rows = {"text": [f"{window} {row} " + "x" * 1000 for row in range(500)], "kind": [f"{window}"] * 500}
            batch = pa.record_batch(
                [pa.array(rows["text"]), pa.array(rows["kind"]).dictionary_encode().cast(schema.types[1])],
                schema=schema,
            )
            writer.write(batch)
            expected += batch.to_pylist()
        writer.close()
        # Ten million bytes.
        assert pq.read_metadata(part).num_row_groups == 1
    writing.join(parts, tmp_path / "o.parquet", form, schema)
    assert pq.read_metadata(tmp_path / "o.parquet").num_row_groups == 2
    found = pq.read_table(tmp_path / "o.parquet")
    assert found.schema.equals(schema)
    assert found.to_pylist() == expected


def test_documents_are_joined_a_row_group_at_a_time(tmp_path: Path) -> None:
    form, schema = Form("parquet", None, ".parquet"), pa.schema([("text", pa.string())])
    writer = open_writer(tmp_path / "a.parquet", form, schema)
    for _ in range(50):
        writer.write(pa.record_batch([[os.urandom(100_000).hex() for _ in range(10)]], schema=schema))
    writer.close()
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    try:
        writing.join([tmp_path / "a.parquet"], tmp_path / "o.parquet", form, schema)
    finally:
        pa.set_memory_pool(before)
    # Of 100 million bytes a row group that is read and one that is written, each of 17 million.
    assert pool.max_memory() < 75_000_000
    assert pq.read_table(tmp_path / "o.parquet").equals(pq.read_table(tmp_path / "a.parquet"))


@pytest.mark.usefixtures("small_windows")
def test_bad_rows_go_to_their_file(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_input(tmp_path / "i.jsonl", ["a", None, "b", "c", None, "d", "e"])
    totals = do(model, [source], tmp_path / "o.jsonl", {"errors": str(tmp_path / "new" / "bad.jsonl")}, shard_rows=4)
    assert [row["text"] for row in read(tmp_path / "o.jsonl")] == ["a", "b", "c", "d", "e"]
    reasons = [{"file": source, "line": row, "reason": "text is null"} for row in (2, 5)]
    assert read(tmp_path / "new" / "bad.jsonl") == reasons
    assert (totals.rows, totals.bad) == (7, 2)
    with pytest.raises(BadRow, match=r"i\.jsonl, line 2: text is null"):
        do(model, [source], tmp_path / "s.jsonl", {"strict": True})
    assert not (tmp_path / "s.jsonl").exists()
    stream = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(BadRow):
        do(model, [source], "-", output_format="jsonl.gz")
    assert json.loads(gzip.decompress(stream.buffer.getvalue()))["text"] == "a"


def test_the_input_is_never_written_to(model: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "part-00000.jsonl", TEXTS)
    everything = str(tmp_path / "*.jsonl")
    for target, errors in ((source, None), (f"{tmp_path}/", None), ("-", source), (tmp_path / "o.csv", source)):
        with pytest.raises(ValueError, match="must be other files than the input"):
            do(model, [everything], target, {"errors": errors, **({} if target == "-" else {"overwrite": True})})
    assert len(read(Path(source))) == len(TEXTS)
    with pytest.raises(ValueError, match="--errors must be another file than the output"):
        Places.of("o.csv", None, "o.csv")


# What follows needs no model: a flow that knows a text's numbers by itself.


class Stub:
    """A flow whose logits are those of a text's length."""

    def run(self, windows: Iterable[tuple[Sequence[Item | None], Any]]) -> Iterator[tuple[Scored, Any]]:
        for items, tag in windows:
            lengths = [float("nan") if item is None else float(len(item.text)) for item in items]
            numbers = torch.tensor(lengths)[:, None] * torch.tensor([0.01, 0.02, 0.03])
            missing = [row for row, item in enumerate(items) if item is None]
            yield Scored(numbers, numbers, missing, {}, 0, 0, len(items), 0.0), tag


def stub_run(
    source: str,
    target: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    asked: str = "",
    shard_rows: int = 7,
) -> Output:
    """A run of the stub; its output, left."""
    sources = open_sources([source], Columns("text", None, ("id", "text")))
    results = Results(Wanted(), NAMES, "none")
    out = Output(Places.of(str(target), None, None), {"asked": asked}, resume=resume, overwrite=overwrite)
    try:
        out.open(pa.schema([*sources[0].schema, *results.schema]))
        running.run(Stub(), sources, results, out, shard_rows=shard_rows)
        out.finish()
    finally:
        out.leave()
    return out


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Killed(BaseException):
    pass


def counted(function: Callable[..., Any], step: Callable[[], None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        step()
        found = function(*args, **kwargs)
        step()
        return found

    return call


STEPS = [
    (os, "replace"),
    (os, "fsync"),
    (Path, "unlink"),
    (Path, "mkdir"),
    (Path, "rmdir"),
    (Manifest, "begin"),
    (Manifest, "_append"),
    (output, "join"),
    (output, "open_writer"),
    (writing._Parquet, "write"),
    (writing._Lines, "write"),
    (writing._Separated, "write"),
    (writing._Stream, "close"),
    (shutil, "copyfileobj"),
]
BAD = {3, 11, 12, 13}
MANY = [None if row in BAD else "x" * row for row in range(17)]


@pytest.mark.covering(alone=["name", "earlier", "how"])
@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("how", ["killed", "failed"])
@pytest.mark.parametrize("earlier", [False, True], ids=["new", "overwriting"])
@pytest.mark.parametrize("name", ["o.parquet", "o.jsonl", "o.csv.gz", "o/"])
def test_a_run_that_ends_at_any_step_is_resumed_to_the_same_bytes(
    tmp_path: Path, name: str, earlier: bool, how: str
) -> None:
    """Before and after each step on the disk: nothing is lost, doubled or left behind."""
    source = write_input(tmp_path / "i.parquet", MANY)
    longer = write_input(tmp_path / "j.parquet", [*MANY, *MANY, None])
    calm, folder = tmp_path / "calm", tmp_path / "folder"
    stub_run(source, Path(f"{calm}/{name}"))
    if name == "o/":
        # Path drops the slash, and a folder is known by being one.
        assert (calm / "o").is_dir()
    expected = files_in(calm)
    target = folder / name
    for last in range(1, 1000):
        shutil.rmtree(folder, ignore_errors=True)
        if earlier:
            stub_run(longer, target)
        left = [last]

        def step(left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise Killed if how == "killed" else OSError(28, "full")

        with pytest.MonkeyPatch.context() as patch:
            for owner, attribute in STEPS:
                patch.setattr(owner, attribute, counted(getattr(owner, attribute), step))
            if how == "killed":
                # Nobody tidies up behind a process that is killed; its lock goes with it.
                patch.setattr(Output, "leave", lambda self: self._held and self._held.release())
            try:
                stub_run(source, target, overwrite=earlier)
            except (Killed, OSError):
                pass
            except BaseException as error:
                raise AssertionError(f"at step {last}") from error
        if left[0] > 0:
            break
        # A run that overwrites and did not begin has left all as it was.
        out = stub_run(source, target, resume=True, overwrite=False) if not _unbegun(target, name) else None
        if out is None:
            continue
        out.remove_parts()
        assert files_in(folder) == expected, f"at step {last}"
    else:
        raise AssertionError("it never ended")
    assert last > 30


def _unbegun(target: Path, name: str) -> bool:
    """Whether the finished output of the longer input is still there as a whole."""
    record = Manifest.read(target / "manifest.jsonl" if name == "o/" else Path(f"{target}.manifest.jsonl"))
    return record is not None and sum(shard.rows for shard in record.shards) > len(MANY)


@pytest.mark.usefixtures("small_windows")
def test_a_torn_line_of_the_manifest_is_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = write_input(tmp_path / "i.parquet", MANY), tmp_path / "o.jsonl"
    stub_run(source, tmp_path / "calm.jsonl")

    def torn(self: Manifest, row: dict[str, Any]) -> None:
        content = manifest.line_of(row)
        with self.path.open("ab") as file:
            file.write(content if len(self.shards) < 1 else content[: len(content) // 2])
        if self.shards:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "_append", torn)
        with pytest.raises(Killed):
            stub_run(source, target)
    record = Manifest.read(Path(f"{target}.manifest.jsonl"))
    assert record is not None
    assert len(record.shards) == 1
    stub_run(source, target, resume=True)
    assert target.read_bytes() == (tmp_path / "calm.jsonl").read_bytes()


def test_an_earlier_output_is_refused_resumed_or_replaced(model: Path, tmp_path: Path) -> None:
    source, target = write_input(tmp_path / "i.jsonl", ["a", None]), tmp_path / "o.jsonl"
    do(model, [source], target, {"resume": True})
    before = files_in(tmp_path)
    job = Job(str(model), [source], str(target), Options(), resume=True)
    assert job.is_finished
    assert job.done.rows == 2
    with pytest.raises(ValueError, match=r"o\.jsonl is there already: go on with --resume .*--overwrite"):
        do(model, [source], target)
    for changed, what in (({"top_k": 2}, "options: top_k was None, is 2"), ({"dtype": "bfloat16"}, "dtype was None")):
        with pytest.raises(ValueError, match=what):
            do(model, [source], target, {"resume": True}, **changed)
    with pytest.raises(ValueError, match="another errors"):
        do(model, [source], target, {"resume": True, "errors": str(tmp_path / "x.jsonl")})
    assert files_in(tmp_path) == before
    other = shutil.copytree(model, tmp_path / "model")
    do(other, [source], tmp_path / "m.jsonl")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="another model: is was"):
        do(other, [source], tmp_path / "m.jsonl", {"resume": True})
    status = os.stat(source)
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="another inputs"):
        do(model, [source], target, {"resume": True})
    write_input(Path(source), ["b"])
    do(model, [source], target, {"overwrite": True})
    assert [row["text"] for row in read(target)] == ["b"]
    assert not Path(f"{target}.errors.jsonl").exists()
    target.unlink()
    with pytest.raises(ValueError, match=r"o\.jsonl must be there, as .* says: begin anew"):
        do(model, [source], target, {"resume": True})


def test_only_one_run_at_a_time(tmp_path: Path) -> None:
    source, target = write_input(tmp_path / "i.parquet", MANY), tmp_path / "o.jsonl"
    places = Places.of(str(target), None, None)
    places.parts.mkdir()
    held = Held.of(places.parts)
    (places.parts / "part-00000.jsonl.unfinished").write_text("of the other")
    for overwrite in (False, True):
        before = files_in(tmp_path)
        with pytest.raises(ValueError, match=r"one run at a time|is there already"):
            stub_run(source, target, overwrite=overwrite)
        assert files_in(tmp_path) == before
    held.release()
    late = Output(places, {}, resume=False, overwrite=True)
    stub_run(source, target, overwrite=True)
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match="another one has just been there"):
        late.open(pa.schema([("a", pa.string())]))
    assert files_in(tmp_path) == before


def test_files_of_others_stay(tmp_path: Path) -> None:
    source, folder = write_input(tmp_path / "i.parquet", MANY), tmp_path / "o"
    folder.mkdir()
    others = {"part-00000-of-00003.parquet": b"theirs", "notes.txt": b"mine"}
    for name, content in others.items():
        (folder / name).write_bytes(content)
    for overwrite in (False, True):
        stub_run(source, folder, overwrite=overwrite)
        assert others.items() <= files_in(folder).items()


# Real processes.


def started(*arguments: str | Path, limit: int | None = None, **options: Any) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "500", "NO_COLOR": "1", "TRITON_INTERPRET": "0"}

    def limited() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # type: ignore[arg-type]

    return subprocess.Popen(
        [sys.executable, "-m", "fastcls", "classify", *map(str, arguments)],
        stderr=subprocess.PIPE,
        env=environment,
        preexec_fn=limited if limit else None,
        **options,
    )


@pytest.mark.full
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a system without /dev/full")
def test_a_run_that_is_killed_and_one_whose_disk_is_full_go_on(model: Path, tmp_path: Path) -> None:
    """One process is killed, then the file may not grow; resumed it is what an undisturbed run gives."""
    source = write_input(tmp_path / "i.jsonl", [f"{text} {row}" for row in range(700) for text in TEXTS])
    calm, target = tmp_path / "calm.jsonl", tmp_path / "o.jsonl"
    record = Path(f"{target}.manifest.jsonl")
    asked: list[str | Path] = [model, source, "-o", target, "--shard-rows", "100"]
    with started(*asked) as process:
        while process.poll() is None and not (record.exists() and record.read_bytes().count(b"\n") > 2):
            threading.Event().wait(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    with started(*asked, "--resume", limit=100_000) as process:
        _, messages = process.communicate()
    # The shards fit, the whole does not.
    assert process.returncode == 2
    assert b"o.jsonl: cannot be written: File too large" in messages
    assert b"Traceback" not in messages
    assert b"--resume goes on from there" in messages
    assert not target.exists()
    assert not Path(f"{target}.unfinished").exists()
    assert do(model, [source], target, {"resume": True}, shard_rows=100).rows == 0
    do(model, [source], calm, shard_rows=100)
    assert target.read_bytes() == calm.read_bytes()


@pytest.mark.full
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a system without /dev/full")
def test_standard_output_that_takes_no_more(model: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "i.jsonl", TEXTS)
    with open("/dev/full", "wb") as full, started(model, source, stdout=full) as process:
        _, messages = process.communicate()
    assert process.returncode == 2
    assert messages.strip() == b"Error: standard output: cannot be written: No space left on device"


def test_an_input_that_breaks_off(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is finished stays; standard output has all rows before."""
    source = tmp_path / "i.jsonl.gz"
    lines = "".join(json.dumps({"text": f"{row} {row * 7919 % 1000}"}) + "\n" for row in range(9000))
    content = gzip.compress(lines.encode(), mtime=0)
    source.write_bytes(content[: len(content) * 9 // 10])
    with pytest.raises(OSError, match=r"i\.jsonl\.gz: reading stopped after row \d+: "):
        do(model, [str(source)], tmp_path / "o.csv", shard_rows=1000)
    record = Manifest.read(tmp_path / "o.csv.manifest.jsonl")
    assert record is not None
    assert {shard.rows for shard in record.shards} == {1000}
    stream = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(OSError, match="reading stopped") as error:
        do(model, [str(source)], "-")
    rows = stream.buffer.getvalue().count(b"\n")
    assert f"after row {rows}:" in str(error.value)
    assert rows > len(record.shards) * 1000 - 1


@pytest.mark.full
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not say how much memory a process took; getrusage counts its parent's, too")
    script = (
        "import sys; sys.path[:0] = sys.argv[3:]; import test_files_runs as t; from pathlib import Path\n"
        "t.stub_run(sys.argv[1], Path(sys.argv[2]), shard_rows=t.running.SHARD_ROWS)\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    peaks = []
    for count in (100_000, 400_000):
        source = tmp_path / f"{count}.jsonl"
        write_input(source, [f"{row} " + "word " * 60 for row in range(count)])
        paths = [str(Path(__file__).parent), str(ROOT), str(ROOT / "kernels")]
        done = subprocess.run(
            [sys.executable, "-c", script, source, tmp_path / f"{count}.parquet", *paths],
            capture_output=True,
            check=True,
        )
        peaks.append(int(done.stdout) / 1024)
    print("peak MiB", peaks)
    # The rows are 90 MiB more.
    assert peaks[1] - peaks[0] < 30
