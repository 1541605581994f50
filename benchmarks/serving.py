"""How many requests a second `fastcls serve` answers, and how soon, beside other servers of the same model. On Linux.

python benchmarks/serving.py --out serving                     # all parts: 25 minutes
python benchmarks/serving.py --part throughput --seconds 5     # beside LitServe, Ray Serve and a queue in FastAPI
python benchmarks/serving.py --part soak --minutes 60          # memory under a steady load
python benchmarks/serving.py --part overload                   # three times what the server can do
python benchmarks/serving.py --server http://localhost:8080    # one more row: text-embeddings-inference

The parts are throughput (1, 8 and 32 clients in a closed loop, server by server, fastcls first and last: their
difference is the noise); soak (90 % of the most that the server can do, in an open loop); overload (calm, three times
the most, calm again). All servers have the same threads and the same model, MiniLM with a head for SST-2, and get one
of SST-2's sentences a request. A server's answers are compared with transformers' before it is timed, and each one as
it comes. The load is a process of its own on the same machine: the results name its share of the cores. The peers pause
for more texts of a batch, or not: both are measured, the faster one is shown. What is not installed is left out:
pip install -e ".[serve]" litserve "ray[serve]" fastapi. The results hold no text.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import serving_load
import torch
import transformers
import typer
from files import some_of
from rich.console import Console
from serving_load import Order
from serving_processes import Server, running

from fastcls import Classifier
from fastcls_benchmarks import provenance, sentences
from fastcls_benchmarks.from_files import say
from fastcls_benchmarks.provider import not_installed, quietly
from fastcls_benchmarks.tables import facts, number, plain_table
from fastcls_benchmarks.texts import corpus, tokenizer_of
from fastcls_benchmarks.workloads import SEED, build_model

PARTS = ("throughput", "soak", "overload")
CLIENTS = (1, 8, 32)
FASTCLS, FASTCLS_AGAIN = "fastcls serve", "fastcls serve again"
# Each with the module that it needs, and its name in serving_peers.py.
PEERS = {"LitServe": ("litserve", "litserve"), "Ray Serve": ("ray.serve", "ray"), "FastAPI": ("uvicorn", "fastapi")}
# Seconds for which a batch waits for more texts: the documented examples' own, and none.
WAITS = (0.01, 0.0)
PACKAGES = ("litserve", "ray", "fastapi", "starlette", "uvicorn", "uvloop", "httptools")
_WARM_UP = 2.0
_SHARE_OF_SOAK, _SHARE_OF_CALM, _TIMES_OF_OVERLOAD = 0.9, 0.5, 3
_SECONDS_OF_CALM = 10.0
_SECONDS_OF_A_MAXIMUM = 5.0
_SECONDS_BETWEEN_SAMPLES = 5.0
# So many sentences one by one are the model's own time.
_ALONE = 300
_HOST = "127.0.0.1"


class Way(NamedTuple):
    """A server: how it is called, what starts it, its port at hand, or where it runs already."""

    name: str
    command: list[str] | None
    url: str
    wait: float | None = None

    @property
    def label(self) -> str:
        return self.name if self.wait is None else f"{self.name}, waits {1e3 * self.wait:.0f} ms"


class Settings(NamedTuple):
    """What is measured, for how long."""

    seconds: float
    minutes: float
    overload_seconds: float
    deadline: float
    threads: int
    serve_options: str
    server: str | None


def free_port() -> int:
    with socket.socket() as free:
        free.bind((_HOST, 0))
        return int(free.getsockname()[1])


def fastcls_way(model: str, settings: Settings, name: str = FASTCLS) -> Way:
    port = str(free_port())
    command = [sys.executable, "-m", "fastcls", "serve", model, "--host", _HOST, "--port", port]
    # A line for each request is what the peers leave out, too.
    command += ["--log-level", "warning", "--deadline", str(settings.deadline), "--threads", str(settings.threads)]
    return Way(name, [*command, *shlex.split(settings.serve_options)], f"http://{_HOST}:{port}/predict")


def peer_ways(model: str, settings: Settings) -> list[Way]:
    """The other servers, each with both waits, and one that runs already."""
    found = []
    for name, (module, script) in PEERS.items():
        if lacking := not_installed(module, "fastapi"):
            say(f"{name} is left out: {lacking}")
            continue
        for wait in WAITS:
            port = str(free_port())
            command = [sys.executable, str(Path(__file__).with_name("serving_peers.py")), script, model]
            command += [port, str(wait), str(settings.threads)]
            found.append(Way(name, command, f"http://{_HOST}:{port}/predict", wait))
    if settings.server is not None:
        found.append(Way(f"server at {settings.server}", None, f"{settings.server.rstrip('/')}/predict"))
    return found


class Bench:
    """What all parts share: the model, sentences with transformers' answers, settings, and what was measured so far.

    Args:
        settings: what is measured.
        model: a checkpoint's folder, or None for MiniLM with a fitted head.
        folder: for files that are left behind.
        out: a folder for serving.json, which is written after each row.
    """

    def __init__(self, settings: Settings, model: str | None, folder: Path, out: Path | None) -> None:
        self.settings, self.out = settings, out
        real = not sentences.missing()
        self.texts: list[str] = sentences.read("dev")[0] if real else list(corpus("sst2-dev", 1, False).items)
        self.model = model or fitted(folder / "model", real)
        self.expected = expected_of(self.model, self.texts)
        self.found: dict[str, Any] = {
            "kind": "serving",
            "provenance": provenance.collect(torch.device("cpu")),
            "engines": {name: provenance.version_of(name) for name in PACKAGES},
            "settings": {**settings._asdict(), "clients": CLIENTS, "waits": WAITS, "warm_up": _WARM_UP, "seed": SEED},
            "model": model or "minilm-l6-sst2",
            "texts": f"{len(self.texts)} {'of SST-2 (dev)' if real else 'of made-up words'}, one a request",
            "complete": False,
            "throughput": [],
            "failed": [],
            "soak": None,
            "overload": None,
        }

    def keep(self) -> None:
        """Writes what was measured so far."""
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            results = json.dumps(self.found, indent=1, allow_nan=False)
            (self.out / "serving.json").write_text(results + "\n", encoding="utf-8")

    def order(self, way: Way, **options: Any) -> Order:
        return Order(url=way.url, texts=self.texts, expected=self.expected, seed=SEED, **options)

    def started(self, way: Way) -> AbstractContextManager[Any]:
        """The server, whose answers are not checked yet."""
        say(f"{way.label} ...")
        if way.command is None:
            return running(way.url)
        return Server(way.label, way.command, way.url, {"OMP_NUM_THREADS": str(self.settings.threads)})

    def closed(self, way: Way, clients: int, seconds: float) -> dict[str, Any]:
        """A closed loop's summary."""
        log = serving_load.run(self.order(way, clients=clients, seconds=seconds, warm_up=_WARM_UP))
        return serving_load.closed_summary(log, seconds) | {"problem": log.problem}

    def most(self, way: Way) -> float:
        """Requests a second at most: of the part throughput, or measured for a few seconds."""
        rates = [each["requests_per_second"] for each in self.found["throughput"] if each["server"] == FASTCLS]
        seconds = min(self.settings.seconds, _SECONDS_OF_A_MAXIMUM)
        return max(rates, default=0) or max(1.0, self.closed(way, CLIENTS[-1], seconds)["requests_per_second"])


def fitted(folder: Path, real: bool) -> str:
    """MiniLM's checkpoint, with a fitted head or, without SST-2, random weights."""
    cpu, dtype = torch.device("cpu"), torch.float32
    model = sentences.fitted_model("minilm-l6-sst2", cpu, dtype) if real else None
    model = model or build_model("minilm-l6", cpu, dtype)
    with quietly():
        model.save_pretrained(folder)
        tokenizer_of(model).save_pretrained(folder)
    return str(folder)


def expected_of(model: str, texts: list[str]) -> list[tuple[str, float]]:
    """transformers' own labels and scores."""
    with quietly():
        pipe: Any = transformers.pipeline("text-classification", model=model, device="cpu")
        return [(each["label"], each["score"]) for each in pipe(texts, batch_size=32, truncation=True)]


def alone(bench: Bench) -> float:
    """Milliseconds of a sentence in the model alone, one by one in this process: the median."""
    classifier = Classifier.from_pretrained(bench.model, device="cpu", truncation=True)
    texts = (bench.texts * (_ALONE // len(bench.texts) + 1))[:_ALONE]
    samples = []
    for text in [*texts[: _ALONE // 10], *texts]:
        began = time.perf_counter()
        classifier([text])
        samples.append(time.perf_counter() - began)
    return 1e3 * statistics.median(samples[_ALONE // 10 :])


def throughput(bench: Bench) -> None:
    """Each server in turn: so many clients, each of which asks again once it has its answer."""
    settings = bench.settings
    first, last = (fastcls_way(bench.model, settings, name) for name in (FASTCLS, FASTCLS_AGAIN))
    for way in (first, *peer_ways(bench.model, settings), last):
        rows = []
        try:
            with bench.started(way):
                serving_load.check(way.label, way.url, bench.texts, bench.expected)
                for clients in CLIENTS:
                    row: dict[str, Any] = {
                        "server": way.name,
                        "wait": way.wait,
                        "clients": clients,
                        "load": os.getloadavg()[0],
                    }
                    row |= bench.closed(way, clients, settings.seconds)
                    bench.found["throughput"].append(row)
                    rows.append(row)
                    bench.keep()
                    say(f"  {clients} at once: {row['requests_per_second']:,.1f}/s, p50 {number(row['p50_ms'])} ms")
        except ValueError as error:
            # The others are worth their time.
            say(f"{way.label} is not timed: {error}")
            bench.found["failed"].append({"server": way.label, "why": str(error)})
        if way.name in (FASTCLS, FASTCLS_AGAIN) and rows:
            # In turns with its server, which has ended, so that drift hits both.
            rows[0]["model_alone_ms"] = alone(bench)
        bench.keep()


def beside(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each server and number of clients the faster row, with its rate as a multiple of the fastest peer's."""
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        at = row["server"], row["clients"]
        if at not in best or row["requests_per_second"] > best[at]["requests_per_second"]:
            best[at] = row
    fastest: dict[int, float] = {}
    for (server, clients), row in best.items():
        if server in PEERS:
            fastest[clients] = max(fastest.get(clients, 0), row["requests_per_second"])
    found = []
    for (_, clients), row in best.items():
        base, model = fastest.get(clients), row.get("model_alone_ms")
        ratio = row["requests_per_second"] / base if base else None
        of_model = row["p50_ms"] / model if model and row["p50_ms"] is not None else None
        found.append({**row, "times_fastest_peer": ratio, "p50_of_model_alone": of_model})
    return found


def soak(bench: Bench) -> None:
    """A steady load near the most, and the server's memory."""
    way, seconds = fastcls_way(bench.model, bench.settings), 60 * bench.settings.minutes
    with bench.started(way) as server:
        serving_load.check(way.label, way.url, bench.texts, bench.expected)
        rate = _SHARE_OF_SOAK * bench.most(way)
        say(f"  {rate:,.1f} requests a second for {seconds / 60:g} minutes")
        samples, over, began = list[tuple[float, float]](), threading.Event(), time.perf_counter()

        def watch() -> None:
            while True:
                samples.append((time.perf_counter() - began, server.resident()))
                if over.wait(_SECONDS_BETWEEN_SAMPLES):
                    return

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        try:
            log = serving_load.run(bench.order(way, phases=[(rate, seconds)]))
        finally:
            over.set()
            watching.join()
            # Of a run that is broken off this is left.
            bench.found["soak"] = {"rate": rate, "complete": False, "resident_mib": samples}
            bench.keep()
        samples.append((time.perf_counter() - began, server.resident()))
    summary = serving_load.open_summary(log) | memory_summary(samples) | {"problem": log.problem}
    bench.found["soak"] |= {"complete": True, "seconds": seconds, **summary}


def memory_summary(samples: list[tuple[float, float]]) -> dict[str, float]:
    """Resident MiB at the start, after a third of the time and at the end, and the growth over the last two thirds."""
    third = next(mib for at, mib in samples if at >= samples[-1][0] / 3)
    start, end = samples[0][1], samples[-1][1]
    return {"start_mib": start, "third_mib": third, "end_mib": end, "growth_mib": end - third}


def overload(bench: Bench) -> None:
    """Three times the most that the server can do, between two calm times."""
    way, settings = fastcls_way(bench.model, bench.settings), bench.settings
    with bench.started(way):
        serving_load.check(way.label, way.url, bench.texts, bench.expected)
        most = bench.most(way)
        calm, over = (_SHARE_OF_CALM * most, _SECONDS_OF_CALM), _TIMES_OF_OVERLOAD * most
        phases = [calm, (over, settings.overload_seconds), calm]
        say(f"  {calm[0]:,.1f} requests a second, then {over:,.1f}, then {calm[0]:,.1f}")
        log = serving_load.run(bench.order(way, phases=phases))
    summary = serving_load.overload_summary(log, phases)
    bench.found["overload"] = {"most": most, "phases": phases, **summary, "problem": log.problem}


def show(found: dict[str, Any], console: Console) -> None:
    """Prints the tables."""
    console.print("\n".join(facts(found["provenance"])), markup=False, highlight=False)
    rows = beside(found["throughput"])
    for clients in dict.fromkeys(row["clients"] for row in rows):
        columns = ("server", "requests/s", "p50 ms", "p90", "p99", "max", "errors", "x peer", "load")
        table = plain_table(f"{clients} clients" if clients > 1 else "1 client", _CAPTION, columns)
        for row in rows:
            if row["clients"] == clients:
                name = Way(row["server"], None, "", row["wait"]).label
                cells = [row[key] for key in ("requests_per_second", "p50_ms", "p90_ms", "p99_ms", "max_ms")]
                cells += [row["errors"] + row["refused"], row["times_fastest_peer"], row["generator"]["cores"]]
                table.add_row(name, *map(number, cells), style="bold" if name.startswith(FASTCLS) else "")
        console.print(table)
    for row in rows:
        if row["p50_of_model_alone"] is not None:
            times = f"{row['p50_of_model_alone']:.2f} x its model alone, {row['model_alone_ms']:.2f} ms"
            console.print(f"{row['server']}, one client: p50 {row['p50_ms']:.2f} ms, {times}", highlight=False)
    if (soaked := found["soak"]) and soaked["complete"]:
        console.print(_line_of("Soak", soaked["rate"], soaked), highlight=False)
        sizes = ", ".join(f"{soaked[f'{at}_mib']:,.0f} MiB {words}" for at, words in _MOMENTS.items())
        console.print(f"  resident {sizes}: {soaked['growth_mib']:+,.1f} MiB in the last two thirds", highlight=False)
    if overloaded := found["overload"]:
        for name, (rate, _) in zip(("calm", "overload", "after"), overloaded["phases"], strict=True):
            console.print(_line_of(name.capitalize(), rate, overloaded[name]), highlight=False)
        recovered = overloaded["recovered_seconds"]
        again = "not calm again" if recovered is None else f"as calm as before after {recovered:.2f} s"
        sent, answered = (overloaded[f"{what}_in_the_next_second"] for what in ("sent", "answered"))
        deadline = f"the deadline is {found['settings']['deadline']:g} s"
        console.print(f"  {deadline}; {again}; in the next second {sent} sent, {answered} answered", highlight=False)
    for each in found["failed"]:
        console.print(f"{each['server']} is not timed: {each['why']}", style="red", markup=False, highlight=False)


_CAPTION = "x peer: times the fastest peer's requests. Load: the cores that the load itself took."
_MOMENTS = {"start": "at the start", "third": "after a third", "end": "at the end"}


def _line_of(name: str, rate: float, found: dict[str, Any]) -> str:
    share = f"{found['refused'] / found['requests']:.1%}" if found["requests"] else "none"
    late = found["generator"].get("lag_p99_ms")
    return (
        f"{name}: {rate:,.1f}/s, {share} refused, {found['errors']} errors; answered p50 {number(found['p50_ms'])} ms, "
        f"p99 {number(found['p99_ms'])} ms, max {number(found['max_ms'])} ms; the load took "
        f"{found['generator']['cores']:.2f} cores and was sent {number(late)} ms late (p99)"
    )


def main(
    part: Annotated[str, typer.Option(help="Which parts, with commas between.")] = ",".join(PARTS),
    seconds: Annotated[float, typer.Option(min=1, help="Of each number of clients of throughput.")] = 20,
    minutes: Annotated[float, typer.Option(min=0.05, help="Of the soak.")] = 10,
    overload_seconds: Annotated[float, typer.Option(min=1, help="Of the overload.")] = 30,
    deadline: Annotated[float, typer.Option(help="Seconds that a request may wait in fastcls serve.")] = 10,
    threads: Annotated[int | None, typer.Option(min=1, help="Of every server's model; by default all cores.")] = None,
    model: Annotated[str | None, typer.Option(help="A checkpoint's folder; by default MiniLM for SST-2.")] = None,
    serve_options: Annotated[str, typer.Option(help="More options of fastcls serve, in one string.")] = "",
    server: Annotated[str | None, typer.Option(help="text-embeddings-inference that serves this model.")] = None,
    out: Annotated[Path | None, typer.Option(help="A folder for serving.json.")] = None,
) -> None:
    """Times fastcls serve beside other servers."""
    parts = some_of("--part", part, PARTS)
    if lacking := not_installed("httptools"):
        raise typer.BadParameter(f"the load needs httptools: {lacking}")
    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.default_int_handler)
    settings = Settings(seconds, minutes, overload_seconds, deadline, threads, serve_options, server)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(settings, model, folder, out)
        say(f"{bench.found['texts']}; {threads} threads")
        try:
            for name in parts:
                try:
                    {"throughput": throughput, "soak": soak, "overload": overload}[name](bench)
                except ValueError as error:
                    bench.found["failed"].append({"server": f"{FASTCLS}, {name}", "why": str(error)})
                bench.keep()
            bench.found["complete"] = not bench.found["failed"]
        except KeyboardInterrupt:
            say("interrupted: what was measured is kept")
            sys.exit(130)
        finally:
            bench.keep()
            # As wide as the other tables, in a pipe, too.
            show(bench.found, Console(width=max(100, Console().width)))
    if bench.found["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
