"""The benchmark of servers: its arithmetic, what it refuses to time, and that it leaves no server behind."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

pytest.importorskip("httptools", reason="the load needs httptools")
if not Path("/proc/self/stat").exists():
    pytest.skip("a server's processes are read from /proc", allow_module_level=True)

import serving
import serving_load
import serving_processes
from serving import Way
from serving_load import NO_ANSWER, REFUSED, WRONG, Log, Order
from serving_processes import Server

from fastcls_benchmarks import provenance, sentences

TEXTS = ["a fine film", "a dull one", "neither"]
EXPECTED = [("good", 0.9), ("bad", 0.8), ("bad", 0.6)]
# One server in Python alone: it answers as EXPECTED has it, or wrongly, or refuses every other request, or all later.
STUB = f"""
import itertools, json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

kind, port = sys.argv[1], int(sys.argv[2])
known = dict(zip({TEXTS!r}, {EXPECTED!r}))
numbers = itertools.count()

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["inputs"]
        label, score = known.get(asked, ("good", 0.5))
        other = {{"good": "bad", "bad": "good"}}[label]
        if kind == "wrong" and asked == "neither":
            label, other = other, label
        is_refused = kind == "refuses" and next(numbers) % 2
        answer = [{{"label": label, "score": score}}, {{"label": other, "score": 1 - score}}]
        body = json.dumps("busy" if is_refused else answer).encode()
        self.send_response(429 if is_refused else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

if kind == "fails":
    sys.exit("the model has no head")
ThreadingHTTPServer.request_queue_size = 128
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
DRIVER = """
import serving, test_bench_serving, typer
from pathlib import Path

test_bench_serving.use_stubs(Path({folder!r}), setattr, [("right", "fastcls serve"), ("right", "LitServe")])
typer.run(serving.main)
"""


def log_of(times: list[tuple[float, float, float, int]]) -> Log:
    """Requests of (intended, sent, done, status)."""
    intended, sent, done, status = np.array(times, dtype=float).reshape(-1, 4).T
    return Log(intended, sent, done, status.astype(int), 0.25, "")


def stub_way(folder: Path, kind: str, name: str) -> Way:
    script = folder / "stub.py"
    script.write_text(STUB, encoding="utf-8")
    port = serving.free_port()
    return Way(name, [sys.executable, str(script), kind, str(port)], f"http://127.0.0.1:{port}/predict")


def use_stubs(folder: Path, replace: Any, kinds: list[tuple[str, str]]) -> None:
    """The benchmark with stubs for servers, three sentences and no model."""
    (first, name), *others = kinds
    replace(serving, "fastcls_way", lambda _model, _settings, way=name: stub_way(folder, first, way))
    replace(serving, "peer_ways", lambda *_: [stub_way(folder, *each) for each in others])
    replace(serving, "fitted", lambda *_: "no model")
    replace(serving, "expected_of", lambda *_: EXPECTED)
    replace(serving, "alone", lambda _: 0.5)
    replace(serving, "_WARM_UP", 0.1)
    replace(serving, "CLIENTS", (1, 8))
    replace(serving, "_SECONDS_OF_CALM", 1.0)
    # A report on the whole environment takes seconds.
    replace(provenance, "get_pretty_env_info", lambda: "")
    replace(sentences, "missing", lambda: None)
    replace(sentences, "read", lambda _: (TEXTS, [1, 0, 0]))


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda *kinds: use_stubs(tmp_path, monkeypatch.setattr, list(kinds))


def run_main(tmp_path: Path, *arguments: str) -> tuple[Any, dict[str, Any]]:
    app = typer.Typer()
    app.command()(serving.main)
    run = CliRunner().invoke(app, [*arguments, "--threads", "1", "--out", str(tmp_path / "out")])
    return run, json.loads((tmp_path / "out" / "serving.json").read_text(encoding="utf-8"))


def runs(pid: int) -> bool:
    return any(each.pid == pid for each in serving_processes.processes_of(pid))


def test_a_closed_loop_counts_what_was_answered_in_its_time() -> None:
    latencies = [index / 1000 for index in range(1, 101)]
    times = [(0.5, 0.5, 0.5 + each, 200) for each in latencies]
    # Answered before the time, or after it.
    times += [(-0.2, -0.2, -0.1, 200), (1.9, 1.9, 2.1, 200)]
    times += [(1.0, 1.0, 1.1, REFUSED), (1.0, 1.0, 1.2, 500), (1.0, 1.0, 1.3, NO_ANSWER), (1.0, 1.0, 1.4, WRONG)]
    found = serving_load.closed_summary(log_of(times), 2)
    assert [found[name] for name in ("requests", "answered", "refused", "errors")] == [104, 100, 1, 3]
    assert (found["requests_per_second"], found["by_second"]) == (50, [100, 0])
    # Linear between ranks: the median of 1 to 100 ms lies in the middle of 50 and 51.
    for name, milliseconds in (("p50_ms", 50.5), ("p90_ms", 90.1), ("p99_ms", 99.01), ("max_ms", 100)):
        assert found[name] == pytest.approx(milliseconds)


def test_an_open_loops_latency_starts_when_a_request_was_meant_to_be_sent() -> None:
    found = serving_load.open_summary(log_of([(1.0, 1.5, 1.6, 200), (2.0, 2.0, 2.1, REFUSED)]))
    assert found["max_ms"] == pytest.approx(600)
    assert found["generator"]["lag_max_ms"] == pytest.approx(500)
    assert found["generator"]["cores"] == 0.25


def test_no_answers_have_no_percentiles() -> None:
    found = serving_load.closed_summary(log_of([(0.0, 0.0, 0.1, NO_ANSWER)]), 1)
    assert (found["requests_per_second"], found["p50_ms"], found["errors"]) == (0, None, 1)
    empty = serving_load.closed_summary(log_of([]), 1)
    assert (empty["requests"], empty["p99_ms"]) == (0, None)


def test_an_overloads_end_is_found() -> None:
    calm = [(at, at, at + 0.01, 200) for at in np.arange(0, 10, 0.1)]
    over = [(at, at, at + (1.0 if index % 3 else 0.001), 200 if index % 3 else REFUSED)
            for index, at in enumerate(10 + np.arange(300) / 100)]  # fmt: skip
    # As the overload's last requests: late for 0.4 s more. One quick one among them is luck.
    after = [(at, at, at + (0.005 if index >= 20 or index == 3 else 0.5), 200)
             for index, at in enumerate(13 + np.arange(150) / 50)]  # fmt: skip
    log = log_of([*after, *over, *calm])
    found = serving_load.overload_summary(log, [(10, 10), (100, 3), (50, 3)])
    assert found["overload"]["share_refused"] == pytest.approx(1 / 3)
    assert found["overload"]["p50_ms"] == pytest.approx(1000)
    assert found["calm"]["p99_ms"] == pytest.approx(10)
    assert found["recovered_seconds"] == pytest.approx(0.4)
    assert found["sent_in_the_next_second"] == 50
    assert found["answered_in_the_next_second"] == sum(13 <= each[2] < 14 for each in [*over, *after] if each[3] == 200)
    late = log_of([*calm, *over, *((at, at, at + 0.5, 200) for at in 13 + np.arange(150) / 50)])
    assert serving_load.overload_summary(late, [(10, 10), (100, 3), (50, 3)])["recovered_seconds"] is None


def test_memorys_growth_is_that_of_the_last_two_thirds() -> None:
    samples = [(float(at), 100.0 + 10 * min(at, 3)) for at in range(10)]
    found = serving.memory_summary(samples)
    assert found == {"start_mib": 100, "third_mib": 130, "end_mib": 130, "growth_mib": 0}


def test_rates_are_beside_the_fastest_peers_faster_wait() -> None:
    def row(server: str, wait: float | None, rate: float, **others: Any) -> dict[str, Any]:
        found = {"server": server, "wait": wait, "clients": 1, "requests_per_second": rate, "p50_ms": 3.0}
        return {**found, **others}

    rows = [row(serving.FASTCLS, None, 300, model_alone_ms=2.0), row("LitServe", 0.01, 50), row("LitServe", 0.0, 80)]
    rows += [row("Ray Serve", 0.01, 100), row("Ray Serve", 0.0, 20), row("server at x", None, 200)]
    found = {each["server"]: each for each in serving.beside(rows)}
    assert {name: each["times_fastest_peer"] for name, each in found.items()} == {
        serving.FASTCLS: 3, "LitServe": 0.8, "Ray Serve": 1, "server at x": 2,
    }  # fmt: skip
    assert (found["LitServe"]["wait"], found["Ray Serve"]["wait"]) == (0.0, 0.01)
    assert found[serving.FASTCLS]["p50_of_model_alone"] == 1.5
    assert found["LitServe"]["p50_of_model_alone"] is None
    (alone,) = serving.beside([row(serving.FASTCLS, None, 300)])
    assert alone["times_fastest_peer"] is None


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ({"label": "good", "score": 0.70005}, True),
        ([{"label": "bad", "score": 0.3}, {"label": "good", "score": 0.7}], True),
        ([[{"label": "good", "score": 0.7}, {"label": "bad", "score": 0.3}]], True),
        ({"label": "bad", "score": 0.7}, False),
        ({"label": "good", "score": 0.7002}, False),
        ({"label": "good"}, False),
        ([], False),
        (None, False),
    ],
)
def test_answers_are_compared(answer: Any, is_right: bool) -> None:
    assert serving_load.is_right(json.dumps(answer).encode(), ("good", 0.7)) is is_right
    # With equal scores either label is right.
    assert serving_load.is_right(b'{"label": "bad", "score": 0.50004}', ("good", 0.50003))


def test_a_run_keeps_every_part(tmp_path: Path, stubs: Any) -> None:
    stubs(("right", serving.FASTCLS), ("right", "LitServe"))
    run, found = run_main(tmp_path, "--seconds", "1", "--minutes", "0.05", "--overload-seconds", "1")
    assert run.exit_code == 0, run.output
    assert found["complete"]
    assert found["failed"] == []
    servers = (serving.FASTCLS, "LitServe", serving.FASTCLS_AGAIN)
    assert [(each["server"], each["clients"]) for each in found["throughput"]] == [
        (server, clients) for server in servers for clients in serving.CLIENTS
    ]
    for row in found["throughput"]:
        assert row["errors"] == 0, row["problem"]
        assert row["answered"] > 0
        assert sum(row["by_second"]) == row["answered"]
    assert [each.get("model_alone_ms") for each in found["throughput"][:2]] == [0.5, None]
    assert found["soak"]["errors"] == found["overload"]["calm"]["errors"] == 0
    assert len(found["soak"]["resident_mib"]) >= 2
    assert found["soak"]["end_mib"] > 1
    assert found["provenance"]["cores"] >= 1
    assert not any(text in json.dumps(found) for text in TEXTS)
    for name in (*servers, "Soak", "Overload"):
        assert name in run.output


def test_a_server_that_answers_wrongly_is_not_timed(tmp_path: Path, stubs: Any) -> None:
    stubs(("right", serving.FASTCLS), ("wrong", "LitServe"))
    run, found = run_main(tmp_path, "--part", "throughput", "--seconds", "1")
    assert run.exit_code == 1
    assert {each["server"] for each in found["throughput"]} == {serving.FASTCLS, serving.FASTCLS_AGAIN}
    (failed,) = found["failed"]
    assert failed["server"] == "LitServe"
    assert "answers 1 of 3 sentences otherwise than transformers: sentence 2 has ('bad', 0.6)" in failed["why"]
    assert "LitServe is not timed" in run.output


def test_refusals_are_counted_apart_from_errors(tmp_path: Path) -> None:
    way = stub_way(tmp_path, "refuses", "stub")
    assert way.command is not None
    with Server("stub", way.command, way.url, {}) as server:
        assert server.resident() > 1
        log = serving_load.run(Order(url=way.url, texts=TEXTS, expected=EXPECTED, phases=[(200, 0.5)], seed=3))
        with pytest.raises(ValueError, match=r"stub answers [12] of 3 .* otherwise than transformers: status 429"):
            serving_load.check("stub", way.url, TEXTS, EXPECTED)
    found = serving_load.counts(log)
    # Every other one: one more or less, by whose turn it was.
    assert abs(found["refused"] - found["answered"]) <= 1
    assert (found["errors"], log.problem) == (0, "")
    assert found["requests"] > 20


def test_a_server_that_does_not_start_is_told_with_what_it_said(tmp_path: Path, stubs: Any) -> None:
    stubs(("fails", serving.FASTCLS))
    run, found = run_main(tmp_path, "--part", "soak")
    assert run.exit_code == 1
    assert not found["complete"]
    (failed,) = found["failed"]
    assert "did not start: it ended with status 1. It said last:\nthe model has no head" in failed["why"]
    assert "the model has no head" in run.output


def test_a_server_that_is_gone_gives_errors() -> None:
    url = f"http://127.0.0.1:{serving.free_port()}/predict"
    log = serving_load.run(Order(url=url, texts=TEXTS, expected=EXPECTED, clients=2, seconds=0.2))
    assert set(log.status) == {NO_ANSWER}
    assert "Connect" in log.problem


def test_what_a_server_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    way = stub_way(tmp_path, "right", "stub")
    assert way.command is not None
    # A shell that ends by itself and leaves its server to nobody.
    shell = ["sh", "-c", f"{' '.join(way.command)} & echo $! > {tmp_path}/pid; wait"]
    with Server("stub", shell, way.url, {}):
        child = int((tmp_path / "pid").read_text())
        assert runs(child)
    assert not runs(child)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl_c", "sigterm"])
def test_an_interrupted_run_keeps_what_it_has_and_ends_its_servers(tmp_path: Path, number: signal.Signals) -> None:
    script, out = tmp_path / "driver.py", tmp_path / "out" / "serving.json"
    script.write_text(DRIVER.format(folder=str(tmp_path)), encoding="utf-8")
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, here.parent, here.parent / "kernels", here.parent / "benchmarks")))
    command = [sys.executable, str(script), "--part", "throughput", "--seconds", "2", "--out", str(out.parent)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}) as run:
        assert run.stderr is not None
        said = ""
        while "1 at once" not in said:
            line = run.stderr.readline()
            assert line, said
            said += line
        # The generator's, too.
        ours = serving_processes.processes_of(run.pid)
        run.send_signal(number)
        said += run.communicate(timeout=60)[1]
    assert run.returncode == 130, said
    assert "interrupted: what was measured is kept" in said
    assert len(ours) > 1
    until = time.monotonic() + 10
    while any(each in serving_processes.processes_of(each.pid) for each in ours) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(each in serving_processes.processes_of(each.pid) for each in ours)
    found = json.loads(out.read_text(encoding="utf-8"))
    assert not found["complete"]
    assert [each["clients"] for each in found["throughput"]] == [1]
    assert all(math.isfinite(each["requests_per_second"]) for each in found["throughput"])


def test_what_is_unknown_is_refused() -> None:
    app = typer.Typer()
    app.command()(serving.main)
    run = CliRunner().invoke(app, ["--part", "speed"])
    assert run.exit_code == 2
    assert "speed" in run.output
