"""Ray: datasets and files over several processes, none of whose deaths loses or doubles a row."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support import tiny_bert
from typer.testing import CliRunner, Result

import fastcls
from fastcls.files.job import Job, Options
from fastcls.flow import Scored
from fastcls.predicting.loaded import load
from fastcls.predicting.options import PredictOptions
from fastcls.ray import library
from fastcls.ray.share import Share, shares
from fastcls.ray.workers import Versions, Worker, WorkerLostError, Workers
from fastcls.texts import Item
from fastcls.tools.cli import app
from fastcls.tools.demo import sample_texts, sample_tokenizer

ROOT = Path(__file__).parents[1]
WORDS = ["good", "bad", "film", "plot", "never", "always", "boring", "warm"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = sample_tokenizer(sample_texts())
    tiny_bert(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster on this machine, of as many processes as it is asked for."""
    found = pytest.importorskip("ray", reason="needs Ray: pip install 'fastcls[ray]'")
    pytest.importorskip("ray.data", reason="needs Ray Data: pip install 'fastcls[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTCLS_SHARED", str(tmp_path_factory.mktemp("shared")))
        # Workers import this file.
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (Path(__file__).parent, *sys.path))))
        found.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        context = found.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        yield found
        found.shutdown()


def texts_of(count: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, 30))) for _ in range(count)]


def labels(model: str, texts: Any) -> list[tuple[str, float]]:
    classifier = fastcls.Classifier.from_pretrained(model, truncation=True)
    return [(each["label"], each["score"]) for each in classifier(texts)]


def test_a_dataset_has_what_the_classifier_says_of_each_row_in_order(ray: Any, model: str) -> None:
    texts = texts_of(700)
    # A dictionary, whose nulls Ray's other formats give other rows' texts.
    column: Any = pa.array([None if row % 50 == 7 else text for row, text in enumerate(texts)]).dictionary_encode()
    dataset = ray.data.from_arrow(pa.table({"text": column, "row": list(range(700))}))
    found = fastcls.ray.predict(dataset, model, actors=2, block_rows=100).take_all()
    assert [row["row"] for row in found] == list(range(700))
    expected = labels(model, texts)
    for row in found:
        if row["row"] % 50 == 7:
            assert (row["text"], row["label"], row["score"], row["error"]) == (None, None, None, "text is null")
        else:
            assert row["text"] == texts[row["row"]]
            assert (row["label"], row["error"]) == (expected[row["row"]][0], None)
            assert row["score"] == pytest.approx(expected[row["row"]][1], abs=1e-6)


@pytest.mark.full
def test_pairs_and_vectors_go_over_a_cluster(ray: Any, model: str) -> None:
    dataset = ray.data.from_arrow(pa.table({"one": ["good", "bad"], "two": ["film", "plot"]}))
    found = fastcls.ray.predict(dataset, model, actors=1, text_column="one", pair_column="two").take_all()
    expected = labels(model, [("good", "film"), ("bad", "plot")])
    assert [row["label"] for row in found] == [label for label, _ in expected]
    vectors = fastcls.ray.predict(dataset, model, actors=1, text_column="one", embeddings="mean", normalize=True)
    for row in vectors.take_all():
        assert torch.tensor(row["embedding"]).norm() == pytest.approx(1, abs=1e-6)


class Marked(fastcls.ray.Predictor):
    """A predictor whose process kills itself once, in the middle of a run."""

    def __init__(self, model: str, mark: str, **options: Any) -> None:
        super().__init__(model, **options)
        self._mark = Path(mark)

    def __call__(self, table: Any) -> Any:
        if 300 in table.column("row").to_pylist() and not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(table)


def test_an_actor_that_dies_loses_and_doubles_no_row(ray: Any, model: str, tmp_path: Path) -> None:
    mark = tmp_path / "died"
    table = pa.table({"text": texts_of(600), "row": list(range(600))})
    found = (
        ray.data.from_arrow(table)
        .repartition(target_num_rows_per_block=50)
        .map_batches(
            Marked,
            fn_constructor_args=[model, str(mark)],
            batch_format="pyarrow",
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=2),
            num_cpus=0.5,
        )
        .take_all()
    )
    assert mark.exists()
    assert [row["row"] for row in found] == list(range(600))
    assert [row["label"] for row in found] == [label for label, _ in labels(model, table.column("text").to_pylist())]


def test_a_batch_in_another_format_is_refused(model: str) -> None:
    with pytest.raises(TypeError, match=r'batch_format="pyarrow", got a batch as dict'):
        fastcls.ray.Predictor(model)({"text": ["good"]})


def test_what_does_not_fit_is_refused_before_anything_runs(ray: Any, model: str) -> None:
    dataset = ray.data.range(3)
    with pytest.raises(TypeError, match=r"dataset must be a ray.data.Dataset, got list"):
        fastcls.ray.predict(["good"], model)
    with pytest.raises(ValueError, match=r"actors must fit the cluster's 4 CPUs on 1 machine, .* got 9: .* room for 4"):
        fastcls.ray.predict(dataset, model, actors=9)
    with pytest.raises(TypeError, match=r"options must be .*, got topk"):
        fastcls.ray.predict(dataset, model, topk=2)
    with pytest.raises(ValueError, match="block_rows must be a positive int"):
        fastcls.ray.predict(dataset, model, block_rows=0)
    with pytest.raises(ValueError, match="errors must be one of raise, null, column, got 'ignore'"):
        fastcls.ray.predict(dataset, model, errors="ignore")
    with pytest.raises(ValueError, match="top_k must be a positive int"):
        fastcls.ray.predict(dataset, model, top_k=0)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        fastcls.ray.predict(dataset, f"{model}/none")


CORES = {"CPU": 8.0}
GPUS = {"CPU": 16.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("machines", "count", "threads", "gpus", "expected"),
    [
        ([{"CPU": 2.0}], None, 1, 0, Share(2, 0.5)),
        ([{"CPU": 1.0}], None, 1, 0, None),
        ([{"CPU": 64.0}], None, 1, 0, Share(64, 0.93)),
        ([{"CPU": 64.0}], None, 4, 0, Share(16, 3.0)),
        ([{"CPU": 64.0}], 3, 1, 0, Share(3, 1.0)),
        ([{"CPU": 2.0}], 3, 1, 0, None),
        ([CORES], 2, 8, 0, None),
        # None reaches over two machines.
        ([CORES] * 3, None, 5, 0, Share(3, 5.0)),
        ([CORES] * 3, 4, 5, 0, None),
        ([CORES] * 3, None, 9, 0, None),
        ([GPUS], None, 1, 1, Share(2, 1.0)),
        ([GPUS], None, 1, 0.5, Share(4, 1.0)),
        ([GPUS], None, 1, 0.4, Share(4, 1.0)),
        ([GPUS], 3, 1, 0.6, None),
        ([GPUS], 3, 1, 1, None),
        ([GPUS, CORES], None, 1, 2, Share(1, 1.0)),
        ([{"CPU": 8.0, "GPU": 1.0}] * 2, None, 1, 2, None),
        ([CORES], None, 1, 1, None),
        ([GPUS], None, 1, 1.5, None),
    ],
)
def test_processes_fit_their_machines_and_leave_a_cpu_for_reading(
    machines: list[dict[str, float]], count: int | None, threads: int, gpus: float, expected: Share | None
) -> None:
    if expected is None:
        with pytest.raises(ValueError, match=r"actors must fit|gpus must be 0, a fraction"):
            shares(machines, count, threads, gpus)
    else:
        found = shares(machines, count, threads, gpus)
        assert found == expected
        assert found.processes * found.cpus <= sum(machine["CPU"] for machine in machines) - 1


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["classify", *arguments])


def test_files_are_the_same_bytes_as_on_one_machine(ray: Any, model: str, tmp_path: Path) -> None:  # noqa: ARG001
    source = tmp_path / "in.txt"
    source.write_text("\n".join(texts_of(1000)))
    for name, options in (("one", ["--threads", "1"]), ("many", ["--ray", "auto", "--workers", "2"])):
        target = str(tmp_path / f"{name}.parquet")
        result = invoke(model, str(source), "-o", target, "--shard-rows", "100", "--device", "cpu", *options)
        assert result.exit_code == 0, result.stderr
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "many.parquet").read_bytes()
    assert pq.read_table(tmp_path / "many.parquet").num_rows == 1000


def test_options_of_a_cluster_need_one(model: str, tmp_path: Path) -> None:
    for options in (["--workers", "2"], ["--worker-gpus", "1"]):
        result = invoke(model, "in.txt", "-o", str(tmp_path / "o.parquet"), *options)
        assert result.exit_code == 2
        assert f"{options[0]} is for a cluster: add --ray ADDRESS" in result.stderr


@pytest.mark.full
def test_what_a_worker_does_not_load_is_its_own_error(ray: Any, model: str) -> None:  # noqa: ARG001
    workers = Workers("auto", count=1, gpus=0)
    try:
        with pytest.raises(ValueError, match="must have a tokenizer with a mask token"):
            workers.load(model, PredictOptions(fill_mask=True, device="cpu"))
    finally:
        workers.close()


def test_a_run_goes_on_where_a_worker_was_killed(ray: Any, model: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts_of(2000)))
    calm = tmp_path / "calm.jsonl"
    job = Job(model, [str(source)], str(calm), Options(device="cpu", shard_rows=100))
    job.load()
    job.run()
    workers = Workers("auto", count=2, gpus=0)
    killed: list[int] = []

    def report(totals: Any) -> None:
        if totals.rows >= 500 and not killed:
            killed.append(ray.get(workers._actors[0].__ray_call__.remote(lambda _: os.getpid())))
            os.kill(killed[0], signal.SIGKILL)

    try:
        target = tmp_path / "many.jsonl"
        job = Job(model, [str(source)], str(target), Options(shard_rows=100), workers=workers)
        job.load()
        assert job.run(report).rows == 2000
        assert workers.lost == len(killed) == 1
    finally:
        workers.close()
    assert target.read_bytes() == calm.read_bytes()


class Cluster(Workers):
    """Workers that compute here, one window at a time, and end as a test says."""

    def __init__(self, model: str, count: int, deadly: str = "", deaths: int = 0) -> None:
        self.count, self.lost = count, 0
        self._here = Worker()
        self._here.ready(model, PredictOptions(device="cpu"), 1)
        self._deadly, self._deaths = deadly, deaths
        self._chance = random.Random(0)
        self.most = 0
        self.queues: list[deque[int]] = [deque() for _ in range(count)]
        self._calls: dict[int, Any] = {}
        self.gone = set[int]()

    def scored(self, index: int, texts: Any) -> Any:
        call = len(self._calls)
        self._calls[call] = (index, texts)
        self.queues[index].append(call)
        self.most = max(self.most, len(self.queues[index]))
        return call

    def ready(self, index: int) -> Any:
        self.queues[index].clear()
        return self.scored(index, None)

    def first(self, references: Any) -> Any:
        return self._chance.choice(references)

    def result(self, reference: Any) -> Any:
        index, texts = self._calls[reference]
        assert self.queues[index].popleft() == reference
        if index in self.gone:
            raise WorkerLostError("its machine is gone")
        if texts is None:
            return Versions("", "")
        if self._deaths and any(item is not None and item.text == self._deadly for item in texts):
            self._deaths -= 1
            raise WorkerLostError
        return self._here.scored(texts)


def windows_of(texts: list[str], size: int = 7) -> list[tuple[list[Item | None], int]]:
    return [([Item(text, None) for text in texts[at : at + size]], at) for at in range(0, len(texts), size)]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("deaths", [0, 1, 4])
def test_windows_come_back_in_order_whatever_ends(model: str, count: int, deaths: int) -> None:
    texts = texts_of(200)
    cluster = Cluster(model, count, texts[40], deaths)
    found = list(cluster.run(iter(windows_of(texts))))
    assert [tag for _, tag in found] == list(range(0, 200, 7))
    flow = load(model, PredictOptions(device="cpu")).flow
    alone: list[Scored] = [scored for scored, _ in flow.run(windows_of(texts))]
    assert all(torch.equal(one.scores, other.scores) for (one, _), other in zip(found, alone, strict=True))
    assert (cluster.lost, cluster.most) == (deaths, 2)


def test_a_window_that_ends_every_worker_is_named(model: str) -> None:
    texts = texts_of(100)
    found: list[Any] = []
    run = Cluster(model, 2, texts[40], 99).run(windows_of(texts))
    with pytest.raises(ValueError, match=r"rows 36 to 42 of this run ended each of 5 workers that computed them"):
        found.extend(run)
    assert [tag for _, tag in found] == list(range(0, 35, 7))


def test_a_worker_that_never_comes_back_ends_the_run(model: str) -> None:
    cluster = Cluster(model, 2)
    cluster.gone = {1}
    found: list[Any] = []
    with pytest.raises(ValueError, match="a worker ended 6 times without a result: its machine is gone"):
        found.extend(cluster.run(windows_of(texts_of(1000))))
    assert [tag for _, tag in found] == [7 * index for index in range(len(found))]


def test_a_source_that_fails_gives_what_came_before(model: str) -> None:
    def windows() -> Iterator[tuple[list[Item | None], int]]:
        yield from windows_of(texts_of(30))
        raise OSError("the disk is gone")

    found: list[Any] = []
    with pytest.raises(OSError, match="the disk is gone"):
        found.extend(Cluster(model, 2).run(windows()))
    assert len(found) == 5


def test_a_worker_that_has_started_again_asks_for_its_model() -> None:
    with pytest.raises(WorkerLostError, match="started again"):
        Worker().scored([Item("good", None)])


@pytest.mark.full
def test_a_cluster_of_its_own_is_gone_after_the_run_and_so_are_its_files(model: str, tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason="needs Ray Data: pip install 'fastcls[ray]'")
    (tmp_path / "in.txt").write_text("\n".join(texts_of(100)))
    command = [sys.executable, "-m", "fastcls", "classify", model, "in.txt", "-o", "out.jsonl", "--ray", "local"]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": paths, "FASTCLS_SHARED": str(tmp_path), "COLUMNS": "200"}
    done = subprocess.run(
        [*command, "--workers", "1", "--device", "cpu"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "100 rows to out.jsonl" in done.stderr
    (shared,) = tmp_path.glob("fastcls-*")
    assert list(shared.iterdir()) == []


@pytest.mark.full
def test_a_worker_with_another_version_is_refused(ray: Any, model: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setattr("fastcls.ray.workers.__version__", "0.0.9")
    workers = Workers("auto", count=1, gpus=0)
    try:
        with pytest.raises(ValueError, match=r"workers must have fastcls 0.0.9 and torch .*, got one with fastcls 0"):
            workers.load(model, PredictOptions(device="cpu"))
    finally:
        workers.close()


def test_without_ray_the_command_that_installs_it_is_named(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'Ray must be installed: pip install "fastcls\[ray\]"'):
        library.import_ray()
    result = invoke(model, "in.txt", "-o", "out.parquet", "--ray", "auto")
    assert (result.exit_code, result.stdout) == (2, "")
    assert 'Error: Ray must be installed: pip install "fastcls[ray]"' in " ".join(result.stderr.split())


@pytest.mark.gpu
def test_two_workers_share_a_gpu(ray: Any, model: str, tmp_path: Path) -> None:  # noqa: ARG001
    source = tmp_path / "in.txt"
    source.write_text("\n".join(texts_of(3000)))
    for name, options in (("one", []), ("two", ["--ray", "auto", "--workers", "2", "--worker-gpus", "0.5"])):
        result = invoke(model, str(source), "-o", str(tmp_path / f"{name}.parquet"), "--device", "cuda", *options)
        assert result.exit_code == 0, result.stderr
    one, two = (pq.read_table(tmp_path / f"{name}.parquet").to_pylist() for name in ("one", "two"))
    assert [row["label"] for row in one] == [row["label"] for row in two]
    assert [row["score"] for row in one] == pytest.approx([row["score"] for row in two], abs=1e-6)
