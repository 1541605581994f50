"""`fastcls serve` as a process: what it takes and refuses, faults of clients, and how it ends."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastcls import Classifier
from fastcls.tools import demo_model
from fastcls.tools.cli import app as cli
from fastcls.tools.demo import sample_texts

pytest.importorskip("starlette", reason="a server needs the extra serve")
pytest.importorskip("uvicorn", reason="a server needs the extra serve")
pytest.importorskip("orjson", reason="a server needs the extra serve")
pytest.importorskip("prometheus_client", reason="a server needs the extra serve")

from fastcls.serving.app import create_app
from fastcls.serving.loaded import load_all
from fastcls.serving.options import LoadOptions, ServeOptions

TEXTS = list(sample_texts())[:24]


class Process:
    """A server of fastcls's own small model, on a port of its own."""

    def __init__(self, folder: Path, *options: str, models: Sequence[str] = ()) -> None:
        self.log = folder / "log"
        command = [sys.executable, "-c", "from fastcls.tools.cli import app; app()", "serve"]
        command += [*(models or [demo_model()]), "--port", "0", "--json-output", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log, env=environment)
        end = time.monotonic() + 120
        while not (ready := [line for line in self.lines() if line.get("message") == "ready"]):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)
        self.host, self.port = ready[0]["url"].removeprefix("http://").split(":")

    def lines(self) -> list[dict[str, Any]]:
        whole = [line for line in self.log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [json.loads(line) for line in whole if line.startswith("{")]

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, int(self.port), timeout=60)

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        connection = self.connection()
        try:
            raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            given = {"content-type": "application/json", **{name.replace("_", "-"): v for name, v in headers.items()}}
            connection.request("GET" if raw is None else "POST", path, raw, given)
            response = connection.getresponse()
            found = response.read()
            is_json = response.headers.get("content-type") == "application/json"
            return response.status, json.loads(found) if is_json else found.decode()
        finally:
            connection.close()

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    running = Process(tmp_path_factory.mktemp("server"), "--payload-limit", "100000", "--max-client-batch-size", "24")
    yield running
    running.end()


def test_scores_are_those_of_a_classifier(server: Process) -> None:
    classifier = Classifier.from_pretrained(demo_model(), truncation=True)
    for text, expected in zip(TEXTS, classifier(TEXTS, top_k=None), strict=True):
        status, found = server.ask("/predict", {"inputs": text})
        assert status == 200
        assert [each["label"] for each in found] == [each["label"] for each in expected]
        assert [each["score"] for each in found] == pytest.approx([each["score"] for each in expected], abs=1e-5)
    status, found = server.ask("/predict", {"inputs": [[text] for text in TEXTS], "raw_scores": True})
    logits = classifier.logits(TEXTS).tolist()
    for answer, row in zip(found, logits, strict=True):
        assert [each["score"] for each in answer] == pytest.approx(sorted(row, reverse=True), abs=1e-4)


BAD = {
    "no JSON": ("/predict", b'{"inputs": ', 400, "Validation"),
    "no UTF-8": ("/predict", b'{"inputs": "\xff"}', 400, "Validation"),
    "a number": ("/predict", {"inputs": 3}, 422, "Validation"),
    "three texts": ("/predict", {"inputs": ["a", "b", "c"]}, 422, "Validation"),
    "no inputs": ("/predict", {}, 422, "Validation"),
    "a list": ("/predict", [], 422, "Validation"),
    "no texts": ("/predict", {"inputs": []}, 400, "Empty"),
    "an empty text": ("/predict", {"inputs": ""}, 400, "Empty"),
    "an empty text among others": ("/predict", {"inputs": [["a"], [""]]}, 400, "Empty"),
    "too many texts": ("/predict", {"inputs": [["a"]] * 10_000}, 413, "Validation"),
    "a text that is too long": ("/predict", {"inputs": "word " * 5000, "truncate": False}, 413, "Validation"),
    "a text of 10 MB": ("/predict", {"inputs": "x" * 10_000_000}, 413, "Validation"),
    "another kind of model": ("/embed", {"inputs": "a"}, 424, "Backend"),
    "no reranker": ("/rerank", {"query": "a", "texts": ["b"]}, 424, "Backend"),
    "no such model": ("/models/none/predict", {"inputs": "a"}, 404, "Validation"),
    "no such route": ("/classify", {"inputs": "a"}, 404, "Validation"),
    "another method": ("/predict", None, 405, "Validation"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_is_refused_by_name(server: Process, case: str) -> None:
    path, body, status, error_type = BAD[case]
    found = server.ask(path, body)
    assert found[0] == status, found
    assert found[1]["error_type"] == error_type
    assert 0 < len(found[1]["error"]) < 400
    assert server.ask("/health")[0] == 200


def test_a_body_must_be_said_to_be_json(server: Process) -> None:
    status, found = server.ask("/predict", {"inputs": "a"}, content_type="text/plain")
    assert (status, found["error_type"]) == (415, "Validation")
    assert server.ask("/predict", {"inputs": "a"}, content_type="Application/JSON; charset=utf-8")[0] == 200


def test_errors_and_logs_hold_no_text(server: Process) -> None:
    for body in ({"inputs": ["secretive", 3]}, {"inputs": "secretive " * 2000, "truncate": False}):
        status, found = server.ask("/predict", body)
        assert status >= 400
        assert "secretive" not in json.dumps(found)
    server.ask("/predict", {"inputs": "secretive"})
    requests = [line for line in server.lines() if line["message"] == "request"]
    assert {"path", "status", "model", "texts", "tokens", "total_ms", "queue_ms", "inference_ms"} <= requests[-1].keys()
    assert "secretive" not in server.log.read_text()


def test_a_long_text_is_cut_unless_it_is_asked_otherwise(server: Process) -> None:
    text = "good " * 2000
    limit = server.ask("/info")[1]["max_input_length"]
    connection = server.connection()
    connection.request("POST", "/predict", json.dumps({"inputs": text}), {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200
    assert response.headers["x-compute-tokens"] == str(limit)
    assert response.headers["x-compute-characters"] == str(len(text))
    connection.close()
    _, right = server.ask("/predict", {"inputs": text + "bad " * 2000})
    _, left = server.ask("/predict", {"inputs": text + "bad " * 2000, "truncation_direction": "Left"})
    assert right[0]["label"] != left[0]["label"]


@pytest.mark.parametrize("sent", ["headers", "half a body", "a body"])
def test_a_client_that_leaves_harms_nobody(server: Process, sent: str) -> None:
    body = json.dumps({"inputs": [[text] for text in TEXTS]}).encode()
    head = f"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    part = {"headers": b"", "half a body": body[: len(body) // 2], "a body": body}[sent]
    for _ in range(8):
        client = socket.create_connection((server.host, int(server.port)))
        client.sendall(head.encode() + part)
        # Sends a reset, as a client does that is killed.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
    assert server.ask("/predict", {"inputs": TEXTS[0]})[0] == 200
    assert "Traceback" not in server.log.read_text()


def test_a_body_that_does_not_come_is_not_awaited_forever() -> None:
    options = ServeOptions(body_timeout=0.1)
    app = create_app(lambda: load_all([demo_model()], LoadOptions()), options)
    sent: list[Any] = []

    async def run() -> None:
        scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "root_path": ""}
        scope["headers"] = [(b"content-type", b"application/json"), (b"content-length", b"100")]
        parts = [{"type": "http.request", "body": b'{"inp', "more_body": True}]

        async def receive() -> Any:
            if parts:
                return parts.pop()
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        async with app.router.lifespan_context(app):
            await app(scope, receive, send)

    asyncio.run(asyncio.wait_for(run(), 60))
    assert sent[0]["status"] == 408


def test_sigterm_under_load_answers_what_was_taken(tmp_path: Path) -> None:
    server = Process(tmp_path, "--max-batch-tokens", "64")
    answered, refused = [], []
    begun = threading.Barrier(9)

    def client() -> None:
        begun.wait()
        for _ in range(1000):
            try:
                answered.append(server.ask("/predict", {"inputs": [[text] for text in TEXTS[:8]]}))
            except ConnectionError as error:
                refused.append(error)
                return

    clients = [threading.Thread(target=client) for _ in range(8)]
    for each in clients:
        each.start()
    begun.wait()
    while len(answered) < 16:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    for each in clients:
        each.join(60)
    assert server.process.wait(60) == 0
    assert len(refused) == 8
    # None that the server took is among the refused.
    assert len([line for line in server.lines() if line["message"] == "request"]) == len(answered)
    assert {status for status, _ in answered} <= {200, 429}
    assert all(len(found) == 8 for status, found in answered if status == 200)
    assert "Traceback" not in server.log.read_text()


def test_sigterm_while_models_load_ends_it() -> None:
    command = [
        sys.executable,
        "-c",
        "import time; from fastcls.serving import loaded\n"
        "loaded.load_all = lambda *_: (print('loading', flush=True), time.sleep(60))\n"
        "from fastcls.tools.cli import app; app()",
        "serve",
        demo_model(),
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"loading\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_key_is_asked_for_and_the_page_can_be_left_out(tmp_path: Path) -> None:
    server = Process(tmp_path, "--api-key", "secret", "--no-ui", "--served-model-name", "mine")
    try:
        for path, body in (("/predict", {"inputs": "a"}), ("/info", None), ("/v1/models", None)):
            for headers in ({}, {"authorization": "Bearer other"}, {"authorization": "secret"}):
                status, found = server.ask(path, body, **headers)
                assert (status, found["error_type"]) == (401, "Validation")
            assert server.ask(path, body, authorization="Bearer secret")[0] == 200
        assert server.ask("/health")[0] == server.ask("/metrics")[0] == 200
        status, page = server.ask("/", accept="text/html")
        assert (status, page) == (200, "")
        assert server.ask("/info", authorization="Bearer secret")[1]["served_model_name"] == "mine"
        assert "secret" not in server.log.read_text()
    finally:
        server.end()


def test_scores_are_bit_for_bit_the_same_in_any_company(tmp_path: Path) -> None:
    server = Process(tmp_path, "--batch-invariant")
    try:
        classifier = Classifier.from_pretrained(demo_model(), truncation=True, batch_invariant=True)
        alone = [classifier([text], top_k=None)[0] for text in TEXTS]
        found: dict[int, list[Any]] = {row: [] for row in range(len(TEXTS))}

        def client(first: int) -> None:
            for step in range(2 * len(TEXTS)):
                row = (first + step) % len(TEXTS)
                found[row].append(server.ask("/predict", {"inputs": TEXTS[row]})[1])

        clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        for each in clients:
            each.start()
        for each in clients:
            each.join(120)
        assert sum(map(len, found.values())) == 16 * len(TEXTS)
        for row, answers in found.items():
            assert all(answer == alone[row] for answer in answers)
        sizes = server.ask("/metrics")[1]
        passes, texts = (
            float(
                next(line for line in sizes.splitlines() if line.startswith(f"te_batch_next_size_{name} ")).split()[1]
            )
            for name in ("count", "sum")
        )
        assert texts > passes, "no pass had company"
    finally:
        server.end()


MISTAKES = {
    "no folder": (["/nowhere/at/all"], "no checkpoint at"),
    "an address of another machine": ([demo_model(), "--host", "192.0.2.1"], "--host and --port must be an address"),
    "a pooling of a classifier": ([demo_model(), "--pooling", "cls"], "pooling must be left out"),
    "a model twice": ([demo_model(), demo_model()], "must tell the models apart"),
    "a log level": ([demo_model(), "--log-level", "loud"], "--log-level must be"),
    "a deadline": ([demo_model(), "--deadline", "0"], "deadline must be a positive number"),
    "two ways": ([demo_model(), "--one-encoder", "--batch-invariant"], "batch_invariant must be left out"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_end_it_before_it_serves(case: str) -> None:
    arguments, message = MISTAKES[case]
    done = CliRunner().invoke(cli, ["serve", "--port", "0", *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
