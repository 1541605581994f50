"""How fast Ray and Spark label texts with fastcls on this machine's cores, beside the plain command. On Linux and CPUs.

python benchmarks/clusters.py --out clusters            # MiniLM on 60,000 sentences: some 20 minutes on two cores
python benchmarks/clusters.py --rows 2000 --rounds 1    # in miniature: starting takes most of the time
python benchmarks/clusters.py --part memory --memory-rows 1000000    # of workers, with a model of one layer
python benchmarks/clusters.py --part pieces             # what a plan for a cluster is made of, a thread each

Each way reads parquet files of 4,000 rows and writes parquet, in a process of its own. Its time begins once it has its
cluster, if it needs one, and before a model is loaded: actors' starting is in it; of the plain command all is. Ways
take turns, round by round; answers are compared. The pipeline is Ray Data's documented way, transformers' in
`map_batches`, on a tenth of the rows.
"""

from __future__ import annotations

import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from transformers import BertConfig, BertForSequenceClassification

from fastcls.files.job import Job, Options
from fastcls.flow import MAX_ROWS, Scored
from fastcls.loading import load_tokenizer
from fastcls.predicting.loaded import load_shared
from fastcls.predicting.options import PredictOptions
from fastcls.texts import Item
from fastcls.tokenizing import Cut, encode
from fastcls.tools import demo_model
from fastcls_benchmarks import provenance
from fastcls_benchmarks.from_files import Bench, Sizes, different, say
from fastcls_benchmarks.from_files import write as write_file
from fastcls_benchmarks.texts import LONGEST

CLI, CLI_AGAIN, CLI_ON_RAY = "fastcls classify", "fastcls classify again", "fastcls classify --ray"
DATA, DATA_OF_ONE, PIPELINE, SPARK = "Ray Data", "Ray Data, one actor", "Ray Data, pipeline", "Spark"
WAYS = (CLI, CLI_ON_RAY, DATA, DATA_OF_ONE, SPARK, PIPELINE, CLI_AGAIN)
_ROWS_A_FILE = 4000
_PIPELINE_SHARE = 10
_SECONDS_BETWEEN_SAMPLES = 0.5
_BLOCKS = (32, 256, 1024, MAX_ROWS)
_DRIVER_ROWS = 200_000
# Another label is no mistake where both have nearly the same score: a text's neighbours move its last digits.
_TIE = 1e-4


Tag = TypeVar("Tag")


class Sample(NamedTuple):
    """One way's time over one round's rows."""

    round: int
    way: str
    rows: int
    seconds: float
    load: float


class Piece(NamedTuple):
    """What one thread does: so many rows, or loads, in so many seconds."""

    precision: str
    what: str
    times: int
    seconds: float


def cores() -> int:
    return len(os.sched_getaffinity(0))


def started(folder: Path, source: Path, model: str, way: str, quantize: str | None) -> Callable[[], None]:
    """Starts what a way needs, and gives what is timed."""
    target = folder / "out"
    options: dict[str, Any] = {"quantize": quantize} if quantize else {}
    if way in (CLI, CLI_AGAIN, CLI_ON_RAY):
        command = [sys.executable, "-m", "fastcls", "classify", model, f"{source}/*.parquet"]
        command += ["-o", str(target / "out.parquet"), "--device", "cpu", "--overwrite"]
        command += ["--id-column", "row", "--id-column", "text"]
        command += ["--quantize", quantize] if quantize else []
        command += ["--ray", "local"] if way == CLI_ON_RAY else ["--threads", str(cores())]
        target.mkdir()
        return lambda: void(subprocess.run(command, check=True, capture_output=True))
    if way == SPARK:
        from pyspark.sql import SparkSession

        import fastcls.spark

        builder: Any = SparkSession.builder
        session = builder.master(f"local[{cores()}]").config("spark.ui.enabled", "false").getOrCreate()
        session.sparkContext.setLogLevel("ERROR")
        # A task for each file, as far as files are this small.
        session.conf.set("spark.sql.files.openCostInBytes", "128m")
        frame = session.read.parquet(str(source))
        found = fastcls.spark.predict(frame, model, device="cpu", **options)
        return lambda: found.write.parquet(str(target))
    import ray

    import fastcls.ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=cores(), include_dashboard=False, **quiet)
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.read_parquet(str(source))
    if way == PIPELINE:
        done = dataset.map_batches(
            Pipeline,
            fn_constructor_args=[model],
            batch_size=256,
            compute=ray.data.ActorPoolStrategy(size=cores()),
            num_cpus=0.5,
        )
    else:
        done = fastcls.ray.predict(dataset, model, actors=1 if way == DATA_OF_ONE else cores(), **options)
    return lambda: void(done.write_parquet(str(target)))


def void(_: object) -> None:
    """Nothing, of something that was done."""


class Pipeline:
    """Ray Data's documented way to run a transformers model: a pipeline, loaded once an actor."""

    def __init__(self, model: str) -> None:
        from transformers import pipeline

        torch.set_num_threads(1)
        self._pipe: Any = pipeline("text-classification", model=model, device="cpu")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = self._pipe(list(batch["text"]), batch_size=32, truncation=True)
        return {
            "row": batch["row"],
            "label": [each["label"] for each in found],
            "score": [each["score"] for each in found],
        }


def answers(target: Path) -> list[tuple[int, str, float]]:
    """Rows that a way has written, in the order of their numbers."""
    # Beside them may lie what a run says of itself.
    files = sorted(target.glob("*.parquet"))
    table = pa.concat_tables(pq.read_table(file, columns=["row", "label", "score"]) for file in files)
    rows: list[dict[str, Any]] = table.sort_by("row").to_pylist()
    return [(each["row"], each["label"], each["score"]) for each in rows]


def check(way: str, found: list[tuple[int, str, float]], expected: list[tuple[int, str, float]]) -> None:
    """Refuses a way that answers otherwise.

    Raises:
        ValueError: rows that are missing or doubled, or other labels.
    """
    if [row for row, *_ in found] != list(range(len(found))) or len(found) > len(expected):
        raise ValueError(f"{way} lost or doubled rows")
    apart = sum(
        one[1] != other[1] and max(one[2], other[2]) > 0.5 + _TIE for one, other in zip(found, expected, strict=False)
    )
    if apart:
        raise ValueError(f"{way}: {apart} of {len(found)} labels are others")


def write(folder: Path, texts: list[str]) -> None:
    """Parquet files of some rows each."""
    folder.mkdir()
    for at in range(0, len(texts), _ROWS_A_FILE):
        part = texts[at : at + _ROWS_A_FILE]
        columns = {"row": pa.array(range(at, at + len(part))), "text": pa.array(part, pa.string())}
        pq.write_table(pa.table(columns), folder / f"{at:09d}.parquet")


def one_way(folder: Path, source: Path, model: str, way: str, quantize: str | None) -> float:
    """A way's seconds, in a process of its own."""
    command = [sys.executable, __file__, "--timed", way, str(folder), str(source), model, quantize or ""]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise ValueError(f"{way}: {done.stderr[-2000:]}")
    return float(done.stdout.splitlines()[-1])


def timed(way: str, folder: str, source: str, model: str, quantize: str) -> None:
    """Prints a way's seconds: what the process of `one_way` does."""
    run = started(Path(folder), Path(source), model, way, quantize or None)
    began = time.perf_counter()
    run()
    print(time.perf_counter() - began, flush=True)


def speed(bench: Bench, rows: int, rounds: int, quantize: str | None) -> list[Sample]:
    """All ways, round by round."""
    samples, model = list[Sample](), bench.model()
    texts = list(islice(different(bench.texts), rows))
    write(bench.folder / "all", texts)
    write(bench.folder / "few", texts[: rows // _PIPELINE_SHARE])
    expected: list[tuple[int, str, float]] = []
    for index in range(rounds):
        for way in WAYS:
            if way == PIPELINE and quantize:
                continue
            source = bench.folder / ("few" if way == PIPELINE else "all")
            count = rows // _PIPELINE_SHARE if way == PIPELINE else rows
            with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
                seconds = one_way(Path(folder), source, model, way, quantize)
                found = answers(Path(folder) / "out")
            if len(found) != count:
                raise ValueError(f"{way}: {count} rows became {len(found)}")
            expected = expected or found
            check(way, found, expected)
            samples.append(Sample(index, way, count, seconds, os.getloadavg()[0]))
            say(f"round {index + 1}: {way} {count / seconds:,.0f}/s in {seconds:.1f} s")
    return samples


def memory(bench: Bench, rows: int) -> list[tuple[float, float]]:
    """Seconds since the start, and MiB of the largest of a run's workers then."""
    source = bench.folder / "memory"
    write(source, list(islice(different(bench.texts), rows)))
    target, model = bench.folder / "memory.parquet", str(bench.folder / "small")
    tokenizer = load_tokenizer(demo_model())
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64
    )
    BertForSequenceClassification(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    command = [sys.executable, "-m", "fastcls", "classify", model, f"{source}/*.parquet", "-o", str(target)]
    began, samples = time.perf_counter(), list[tuple[float, float]]()
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with subprocess.Popen(
        [*command, "--ray", "local", "--device", "cpu"], stderr=subprocess.PIPE, text=True, env=environment
    ) as run:
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(run.stderr or ()))
        reader.start()
        while run.poll() is None:
            sizes = [_resident(path) for path in Path("/proc").glob("[0-9]*") if _is_worker(path)]
            if sizes:
                samples.append((time.perf_counter() - began, max(sizes)))
            time.sleep(_SECONDS_BETWEEN_SAMPLES)
        reader.join()
    if run.returncode or pq.read_metadata(target).num_rows != rows:
        raise ValueError(f"the run failed: {''.join(said)[-2000:]}")
    return samples


def pieces(bench: Bench, rows: int) -> list[Piece]:
    """What a plan for a cluster is made of, each with one thread."""
    torch.set_num_threads(1)
    os.environ["RAYON_NUM_THREADS"] = "1"
    texts, found = list(islice(different(bench.texts), rows)), list[Piece]()
    model = bench.model()
    for precision, options in bench.precisions.items():
        asked = PredictOptions(device="cpu", **options)
        for name in ("loading, the first process of a machine", "loading, a further one"):
            began = time.perf_counter()
            flow = load_shared(model, asked).flow
            found.append(Piece(precision, name, 1, time.perf_counter() - began))
        items = [Item(text, None) for text in texts]
        list(flow.run([(items[:MAX_ROWS], None)]))
        for size in _BLOCKS:
            began = time.perf_counter()
            for _ in flow.run((items[at : at + size], None) for at in range(0, rows, size)):
                pass
            found.append(Piece(precision, f"blocks of {size:,} rows", rows, time.perf_counter() - began))
    tokenizer, cut = bench.classifier("float32").tokenizer, Cut("longest_first", LONGEST)
    began = time.perf_counter()
    for at in range(0, rows, MAX_ROWS):
        encode(tokenizer, texts[at : at + MAX_ROWS], None, cut)
    found.append(Piece("", "the tokenizer", rows, time.perf_counter() - began))
    many = list(islice(different(bench.texts), _DRIVER_ROWS))
    source = write_file(bench.folder / "driver.parquet", many)
    job = Job(model, [source], str(bench.folder / "driver.out.parquet"), Options(), workers=Elsewhere())
    job.load()
    began = time.perf_counter()
    job.run()
    found.append(Piece("", "the driver: reading, sending, receiving, writing", len(many), time.perf_counter() - began))
    return found


class Elsewhere:
    """Workers that take no time: what a run's driver does is left."""

    device = "cpu"

    def load(self, model: str, options: PredictOptions) -> None:
        """Does nothing."""

    def run(self, windows: Iterable[tuple[Sequence[Item | None], Tag]]) -> Iterator[tuple[Scored, Tag]]:
        for texts, tag in windows:
            # As they are sent, and as the numbers come back.
            rows = len(pickle.loads(pickle.dumps(texts, protocol=5)))
            scores = torch.full((rows, 2), 0.5)
            yield pickle.loads(pickle.dumps(Scored(scores, scores, [], {}, 0, 0, rows, 0.0), protocol=5)), tag


def _is_worker(process: Path) -> bool:
    try:
        return (process / "cmdline").read_bytes().startswith(b"ray::Worker")
    except OSError:
        return False


def _resident(process: Path) -> float:
    """MiB, those that other processes share included."""
    try:
        lines = (process / "status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def show(samples: list[Sample]) -> None:
    """Prints each way's median, and its ratio to the plain command in the same round."""
    base = {each.round: each.rows / each.seconds for each in samples if each.way == CLI}
    print(f"{'way':28} {'texts/s':>9} {'of the plain command':>22}")
    for way in dict.fromkeys(each.way for each in samples):
        own = [each for each in samples if each.way == way]
        rates = [each.rows / each.seconds for each in own]
        ratios = [rate / base[each.round] for rate, each in zip(rates, own, strict=True)]
        print(f"{way:28} {statistics.median(rates):9,.0f} {statistics.median(ratios):22.3f}")


def show_memory(samples: list[tuple[float, float]]) -> None:
    """Prints a worker's memory by tenths of the run, the first of which loads."""
    whole = samples[-1][0]
    for tenth in range(10):
        part = [mib for at, mib in samples if tenth <= 10 * at / whole < tenth + 1]
        print(f"{10 * tenth:3}-{10 * tenth + 10} % of the run: at most {max(part, default=0):,.0f} MiB")


def show_pieces(found: list[Piece]) -> None:
    """Prints how many of each a thread does in a second."""
    for each in found:
        rate = each.times / each.seconds
        value = f"{each.seconds:.2f} s" if each.times == 1 else f"{rate:,.0f}/s"
        print(f"{each.precision:8} {each.what:50} {value}")


def main(
    rows: Annotated[int, typer.Option(min=10)] = 60_000,
    rounds: Annotated[int, typer.Option(min=1)] = 1,
    part: Annotated[str, typer.Option(help="speed, pieces, memory or all.")] = "all",
    memory_rows: Annotated[int, typer.Option(min=10)] = 1_000_000,
    quantize: Annotated[str | None, typer.Option(help="int8")] = None,
    out: Annotated[Path | None, typer.Option(help="A folder for clusters.json.")] = None,
) -> None:
    """Measures Ray and Spark beside the plain command."""
    if part not in ("speed", "pieces", "memory", "all"):
        raise typer.BadParameter(f"--part must be speed, pieces, memory or all, got {part}")
    with tempfile.TemporaryDirectory() as folder:
        sizes = Sizes(
            rows=rows, block=0, pipeline_rows=0, duplicate_rows=0, documents=0, words=0,
            memory_rows=(), memory_forms=(), plan_seconds=0, rounds=rounds,
        )  # fmt: skip
        bench = Bench(sizes, torch.device("cpu"), Path(folder))
        samples = speed(bench, rows, rounds, quantize) if part in ("speed", "all") else []
        resident = memory(bench, memory_rows) if part in ("memory", "all") else []
        small = pieces(bench, max(rows // 10, MAX_ROWS)) if part in ("pieces", "all") else []
    if samples:
        show(samples)
    if resident:
        show_memory(resident)
    if small:
        show_pieces(small)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        found = {
            "kind": "clusters",
            "provenance": provenance.collect(torch.device("cpu")),
            "engines": {name: provenance.version_of(name) for name in ("ray", "pyspark")},
            "texts": bench.about,
            "quantize": quantize,
            "samples": [each._asdict() for each in samples],
            "pieces": [each._asdict() for each in small],
            "memory_rows": memory_rows if resident else None,
            "memory": resident,
        }
        (out / "clusters.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--timed"]:
        timed(*sys.argv[2:])
    else:
        typer.run(main)
