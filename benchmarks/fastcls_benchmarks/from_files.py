"""Files of texts to files of labels beside the model alone, and in how much memory: what benchmarks/files.py measures.

All ways of a part take turns, round by round, in an order that changes, so that noise hits all alike. A way's answers
are compared before it is timed. Loading the model is in no figure.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pyarrow as pa
import pyarrow.parquet
import torch
import transformers
from transformers import BertForSequenceClassification

import fastcls.tokenizing
from fastcls.classifier import Classifier
from fastcls.files.job import Job, Options
from fastcls.flow import MAX_ROWS
from fastcls.tokenizing import Cut, Ids, encode
from fastcls.tools import demo_model, plan, throughput

from . import sentences
from .provider import quietly
from .texts import LONGEST, corpus, tokenizer_of
from .workloads import SEED, build_model

PRECISIONS: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {"float32": {}, "int8": {"quantize": "int8"}},
    "cuda": {"float32": {}, "float16": {"dtype": "float16"}},
}
FILES, MODEL, MODEL_AGAIN, PIPELINE, LISTS = "files", "model alone", "model alone again", "pipeline", "Classifier, list"
FORMS = ("parquet", "txt")
ONCE, IN_WINDOW, IN_FILE = "each once", "twice in a window", "twice in the file"
# So often a new order of a text's words is tried; then it is left out of this repetition.
_ORDERS = 10
# Another label is no mistake where both have nearly the same score: a text's neighbours move its last digits.
_TIE = 1e-4
_SECONDS_BETWEEN_SAMPLES = 0.25
# Of a long run at most so many are kept.
_MOST_SAMPLES = 500
_ROWS_AT_ONCE = 65_536

# What is timed. It returns its tokens, None if it does not tell.
Run = Callable[[], "int | None"]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured.

    Attributes:
        rows, block: of ``speed``, and how many of them are a round; ``plan`` reads blocks, too.
        pipeline_rows: of each block those that transformers' pipeline takes.
        duplicate_rows: of each file.
        documents, words: how many documents, of how many words each.
        memory_rows, memory_forms: of the files of ``memory``.
        plan_seconds: for which a prediction measures.
        rounds: of all parts but ``speed`` and ``memory``.
    """

    rows: int
    block: int
    pipeline_rows: int
    duplicate_rows: int
    documents: int
    words: int
    memory_rows: tuple[int, ...]
    memory_forms: tuple[str, ...]
    plan_seconds: float
    rounds: int


class Sample(NamedTuple):
    """One way's time over one round's rows; of a prediction, those it stands for."""

    part: str
    round: int
    precision: str
    way: str
    rows: int
    tokens: int | None
    seconds: float
    load: float


class Memory(NamedTuple):
    """A run in a process of its own: seconds since its start and resident MiB then, and its peak."""

    form: str
    rows: int
    seconds: float
    samples: list[tuple[float, float]]
    peak: float


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def different(texts: list[str], seed: int = SEED) -> Iterator[str]:
    """The texts, then again and again with their words in other orders; none twice."""
    draw, known = random.Random(seed), set[int]()
    while True:
        before = len(known)
        for text in texts:
            words = text.split()
            for _ in range(_ORDERS):
                if hash(text) not in known:
                    known.add(hash(text))
                    yield text
                    break
                draw.shuffle(words)
                text = " ".join(words)
        if len(known) == before:
            raise ValueError("there are no new orders of these texts' words")


def write(path: Path, texts: Iterator[str] | list[str]) -> str:
    """A file of texts: parquet with one column, or lines. Its path."""
    source = iter(texts)
    if path.suffix == ".txt":
        with path.open("w", encoding="utf-8") as file:
            file.writelines(f"{text}\n" for text in source)
    else:
        with pa.parquet.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
            while part := list(islice(source, _ROWS_AT_ONCE)):
                writer.write_table(pa.table({"text": pa.array(part, pa.string())}))
    return str(path)


class Bench:
    """What all parts share: sizes, sentences, the model in its precisions, a folder, and what was measured so far.

    Args:
        sizes: how much is measured.
        device: where the model is.
        folder: for files that are left behind.
    """

    def __init__(self, sizes: Sizes, device: torch.device, folder: Path) -> None:
        self.sizes, self.device, self.folder = sizes, device, folder
        self.samples: list[Sample] = []
        self.memory: list[Memory] = []
        self.real = not sentences.missing()
        if self.real:
            self.texts, self.about = sentences.read("train")[0], "SST-2's training sentences"
        else:
            self.texts, self.about = corpus("sst2-dev", 1, False).items, "texts of made-up words"
        self.about += ", further ones with their words in other orders: no text twice"
        self._classifiers: dict[str, Classifier] = {}

    @property
    def precisions(self) -> dict[str, dict[str, Any]]:
        return PRECISIONS[self.device.type]

    def model(self) -> str:
        """The folder of the checkpoint."""
        folder = self.folder / "model"
        if not folder.exists():
            cpu, dtype = torch.device("cpu"), torch.float32
            model = sentences.fitted_model("minilm-l6-sst2", cpu, dtype) if self.real else None
            model = model or build_model("minilm-l6", cpu, dtype)
            with quietly():
                model.save_pretrained(folder)
                tokenizer_of(model).save_pretrained(folder)
        return str(folder)

    def classifier(self, precision: str) -> Classifier:
        if precision not in self._classifiers:
            options = self.precisions[precision]
            loaded = Classifier.from_pretrained(self.model(), device=self.device, truncation=True, **options)
            self._classifiers[precision] = loaded
        return self._classifiers[precision]

    def files(self, precision: str, source: str, name: str = "answers") -> Run:
        """From file to file, with the model that is loaded already.

        Args:
            precision: of the model.
            source: the file.
            name: of the output, another one for each run of a round.
        """
        options = Options(device=str(self.device), **self.precisions[precision])
        job = Job(self.model(), [source], self._target(precision, name), options, overwrite=True)
        with mock.patch.object(Classifier, "from_pretrained", return_value=self.classifier(precision)):
            job.load()
        return lambda: job.run().tokens

    def answers(self, precision: str, source: str) -> list[dict[str, Any]]:
        """Labels and scores of a file by a run, which is not timed."""
        self.files(precision, source)()
        table = pa.parquet.read_table(self._target(precision, "answers"), columns=["label", "score"])
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows

    def _target(self, precision: str, name: str) -> str:
        return str(self.folder / f"{name}.{precision}.parquet")

    def check(self, what: str, found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
        """Refuses to time what answers otherwise.

        Raises:
            ValueError: other labels.
        """
        apart = sum(
            one["label"] != other["label"] and max(one["score"], other["score"]) > 0.5 + _TIE
            for one, other in zip(found, expected, strict=True)
        )
        if apart:
            raise ValueError(f"{what}: {apart} of {len(found)} labels are others")

    def time(self, part: str, index: int, ways: dict[tuple[str, str], tuple[int, Run]]) -> None:
        """Times each way once, in an order that changes by round; a round that is broken off leaves nothing."""
        names, found = list(ways), list[Sample]()
        first = index * 2 % len(names)
        for precision, way in names[first:] + names[:first]:
            rows, run = ways[precision, way]
            began = time.perf_counter()
            tokens = run()
            seconds = time.perf_counter() - began
            found.append(Sample(part, index, precision, way, rows, tokens, seconds, os.getloadavg()[0]))
        self.samples += found
        rates = (f"{each.precision} {each.way} {each.rows / each.seconds:,.0f}/s" for each in found)
        say(f"{part}, round {index + 1}: {'; '.join(rates)}; load {found[-1].load:.1f}")


def model_alone(classifier: Classifier, ids: list[Ids], types: list[Ids]) -> int:
    """The model on windows of ids at hand, as a flow gives them; the tokens."""
    starts = range(0, len(ids), MAX_ROWS)
    logits = [classifier.model.logits_of(ids[at : at + MAX_ROWS], types[at : at + MAX_ROWS]) for at in starts]
    torch.cat(logits).cpu()
    return sum(map(len, ids))


def speed(bench: Bench) -> None:
    """Files beside the model alone, transformers' pipeline, and lists."""
    sizes, source = bench.sizes, different(bench.texts)
    checkpoint = BertForSequenceClassification.from_pretrained(bench.model()).eval().to(bench.device)
    pipe: Any = transformers.pipeline(
        "text-classification", model=checkpoint, tokenizer=tokenizer_of(checkpoint), device=bench.device
    )

    def pipeline(texts: list[str]) -> list[dict[str, Any]]:
        return list(pipe(texts, batch_size=32, truncation=True))

    for index in range(-(-sizes.rows // sizes.block)):
        texts = list(islice(source, min(sizes.block, sizes.rows - index * sizes.block)))
        file, few = write(bench.folder / "block.parquet", texts), texts[: sizes.pipeline_rows]
        ways: dict[tuple[str, str], tuple[int, Run]] = {}
        for precision in bench.precisions:
            classifier = bench.classifier(precision)
            encoded = encode(classifier.tokenizer, texts, None, Cut("longest_first", LONGEST))
            if index == 0:
                # All ways are warm thereafter.
                expected = classifier(texts)
                bench.check(f"files in {precision}", bench.answers(precision, file), expected)
                if precision == "float32":
                    bench.check("the pipeline", pipeline(few), expected[: len(few)])
                model_alone(classifier, encoded.ids, encoded.types)

            def alone(classifier: Classifier = classifier, encoded: Any = encoded) -> int:
                return model_alone(classifier, encoded.ids, encoded.types)

            def lists(classifier: Classifier = classifier, texts: list[str] = texts) -> None:
                classifier(texts)

            ways[precision, MODEL] = len(texts), alone
            ways[precision, FILES] = len(texts), bench.files(precision, file)
            ways[precision, LISTS] = len(texts), lists
            ways[precision, MODEL_AGAIN] = len(texts), alone

        def by_pipeline(few: list[str] = few) -> None:
            pipeline(few)

        ways["float32", PIPELINE] = len(few), by_pipeline
        bench.time("speed", index, ways)


def duplicates(bench: Bench) -> None:
    """Files in which each text stands twice, beside one of as many texts, equally long, that all differ."""
    half, draw = bench.sizes.duplicate_rows // 2, random.Random(SEED)
    once, again = list[str](), list[str]()
    known: set[str] = set()
    for text in different(bench.texts):
        words = text.split()
        for _ in range(_ORDERS):
            draw.shuffle(words)
            if not {text, other := " ".join(words)} & known and other != text:
                known |= {text, other}
                once.append(text)
                again.append(other)
                break
        if len(once) == half:
            break

    def in_windows(second: list[str]) -> list[str]:
        found: list[str] = []
        for at in range(0, half, MAX_ROWS // 2):
            window = [*once[at : at + MAX_ROWS // 2], *second[at : at + MAX_ROWS // 2]]
            # The same places in each file.
            random.Random(at).shuffle(window)
            found += window
        return found

    anywhere = [*once, *once]
    draw.shuffle(anywhere)
    files = {
        ONCE: write(bench.folder / "once.parquet", in_windows(again)),
        IN_WINDOW: write(bench.folder / "window.parquet", in_windows(once)),
        IN_FILE: write(bench.folder / "file.parquet", anywhere),
    }
    for precision in bench.precisions:
        found, expected = bench.answers(precision, files[IN_WINDOW]), bench.classifier(precision)(in_windows(once))
        bench.check(f"texts that stand twice, in {precision}", found, expected)
    for index in range(bench.sizes.rounds):
        bench.time(
            "duplicates",
            index,
            {
                (precision, name): (2 * half, bench.files(precision, file, name.replace(" ", "-")))
                for precision in bench.precisions
                for name, file in files.items()
            },
        )


def documents(bench: Bench) -> None:
    """Long documents, of which the model reads the beginning: tokenized as far as that reaches, and whole."""
    sizes, draw = bench.sizes, random.Random(SEED)
    words = [word for text in bench.texts for word in text.split()]
    texts = [" ".join(draw.choices(words, k=sizes.words)) for _ in range(sizes.documents)]
    file = write(bench.folder / "documents.parquet", texts)

    def whole(run: Run) -> Run:
        def patched() -> int | None:
            with _whole():
                return run()

        return patched

    def tokenize() -> int:
        parts = (texts[at : at + 32] for at in range(0, len(texts), 32))
        tokenizer, cut = bench.classifier("float32").tokenizer, Cut("longest_first", LONGEST)
        return sum(len(ids) for part in parts for ids in encode(tokenizer, part, None, cut).ids)

    for precision in bench.precisions:
        found = bench.answers(precision, file)
        with _whole():
            bench.check(f"documents in {precision}", found, bench.answers(precision, file))
    for index in range(sizes.rounds):
        ways = {("", "tokens, beginning"): (len(texts), tokenize), ("", "tokens, whole"): (len(texts), whole(tokenize))}
        for precision in bench.precisions:
            ways[precision, "files, beginning"] = len(texts), bench.files(precision, file)
            ways[precision, "files, whole"] = len(texts), whole(bench.files(precision, file, "whole"))
        bench.time("documents", index, ways)


def _whole() -> AbstractContextManager[Any]:
    """Texts are not cut before they are tokenized."""
    return mock.patch.object(fastcls.tokenizing, "prefix", lambda text, *_: text)


def prediction(bench: Bench) -> None:
    """What `fastcls plan` predicts from the beginning of a minute, beside files themselves."""
    sizes, source = bench.sizes, different(bench.texts)
    like = Path(write(bench.folder / "like.txt", list(islice(source, sizes.block))))
    chosen = plan.drawn(like, throughput.TEXTS).texts
    for index in range(sizes.rounds):
        file = write(bench.folder / "planned.parquet", list(islice(source, sizes.block)))
        ways: dict[tuple[str, str], tuple[int, Run]] = {}
        for precision in bench.precisions:
            ways[precision, FILES] = sizes.block, bench.files(precision, file)
        bench.time("plan", index, ways)
        for precision in bench.precisions:
            classifier = bench.classifier(precision)
            lengths = throughput.lengths_of(classifier, chosen)
            blocks = throughput.measure(classifier, chosen, lengths.tokens, sizes.plan_seconds, lambda _: None)
            rate = throughput.quartiles(blocks)[1] / statistics.fmean(lengths.tokens)
            load = os.getloadavg()[0]
            bench.samples.append(Sample("plan", index, precision, "plan", sizes.block, None, sizes.block / rate, load))
            say(f"plan, round {index + 1}: {precision} predicted {rate:,.0f}/s")


def memory(bench: Bench) -> None:
    """The command in a process of its own, on files of several sizes, with the model of `--demo`."""
    for rows in bench.sizes.memory_rows:
        for form in bench.sizes.memory_forms:
            source = write(bench.folder / f"memory.{form}", islice(different(bench.texts), rows))
            target = bench.folder / "memory.out.parquet"
            threads = ("--threads", str(torch.get_num_threads()), "--device", str(bench.device))
            command = [sys.executable, "-m", "fastcls", "classify", demo_model(), source, "-o", str(target)]
            found = watched([*command, "--overwrite", *threads], bench.folder)
            written = pa.parquet.read_metadata(target).num_rows
            if written != rows:
                raise ValueError(f"{rows} rows of {form} became {written}")
            target.unlink()
            bench.memory.append(Memory(form, rows, *found))
            say(f"memory: {rows:,} rows of {form} in {found[0]:.1f} s, at most {found[2]:,.0f} MiB")


def watched(command: list[str], folder: Path) -> tuple[float, list[tuple[float, float]], float]:
    """Runs a command: its seconds, its resident MiB by time, and their peak.

    Raises:
        ValueError: it failed, with what it said.
    """
    samples, peak, began = list[tuple[float, float]](), 0.0, time.perf_counter()
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            while process.poll() is None:
                # The system's own count of a child's peak would begin with this process's.
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
                sizes = dict(line.split(":", 1) for line in status.splitlines())
                if "VmRSS" in sizes:
                    samples.append((time.perf_counter() - began, int(sizes["VmRSS"].split()[0]) / 1024))
                    peak = max(peak, int(sizes["VmHWM"].split()[0]) / 1024)
                time.sleep(_SECONDS_BETWEEN_SAMPLES)
        finally:
            process.kill()
            process.wait()
    seconds = time.perf_counter() - began
    if process.returncode:
        raise ValueError(f"{' '.join(command)} ended with {process.returncode}: {log.read_text(encoding='utf-8')}")
    return seconds, samples[:: len(samples) // _MOST_SAMPLES + 1], peak
