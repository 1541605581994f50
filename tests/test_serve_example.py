"""The examples of serving: Ray Serve runs the server as it is, and the image starts it and sees whether it computes."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer.main
from support import assert_as_exact_as, tiny_bert

from fastcls import Classifier
from fastcls.tools.cli import app as commands
from fastcls.tools.demo import sample_texts, sample_tokenizer

pytest.importorskip("starlette", reason='the examples need fastcls\'s extra "serve"')
pytest.importorskip("prometheus_client", reason='the examples need fastcls\'s extra "serve"')
pytest.importorskip("orjson", reason='the examples need fastcls\'s extra "serve"')

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NAMES = ("bad", "fair", "good")
CLIENTS = 16
# A pass of the served application, and a request that keeps it busy for a while.
TOKENS_PER_PASS = 256
LONG = [f"{'service ' * 80}{number}" for number in range(1024)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier and a reranker."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer = sample_tokenizer(sample_texts())
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
    model = tiny_bert(vocab_size=len(tokenizer), **names)
    # No label is the best one everywhere.
    model.classifier.bias.data -= Classifier(model, tokenizer).logits(sample_texts()).mean(0)
    for name, each in (("classifier", model), ("reranker", tiny_bert(vocab_size=len(tokenizer), num_labels=1))):
        each.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


class Served(NamedTuple):
    """An application of one replica that refuses texts it would have to cut, and where it answers."""

    port: int

    def ask(self, path: str, body: object = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            headers = {"Content-Type": "application/json"}
            content = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", path, content, headers)
            answer = connection.getresponse()
            found = answer.read().decode()
            return answer.status, json.loads(found) if found.startswith(("{", "[")) else found
        finally:
            connection.close()

    def counts(self) -> dict[str, float]:
        """Its metrics of one number."""
        status, found = self.ask("/metrics")
        assert status == 200
        return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", found, flags=re.MULTILINE)}


def passes_of(lengths: list[int]) -> int:
    """How many passes texts of so many tokens make that wait together."""
    passes, left = 0, 0
    for length in lengths:
        passes, left = (passes, left - length) if length <= left else (passes + 1, TOKENS_PER_PASS - length)
    return passes


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    pytest.importorskip("ray.serve", reason="the example needs ray[serve]")
    pytest.importorskip("fastapi", reason="the example needs ray[serve]")
    sys.path.insert(0, str(EXAMPLES))
    import serve_ray

    yield serve_ray
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def served(example: Any, folders: Path) -> Iterator[Served]:
    import ray
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What this process imports its replicas do, wherever they start.
    paths = os.pathsep.join(os.path.abspath(path) for path in (str(EXAMPLES), *sys.path) if path)
    environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = example.Settings(
            model=f"{folders / 'classifier'},{folders / 'reranker'}",
            max_replicas=1,
            max_batch_tokens=TOKENS_PER_PASS,
            max_client_batch_size=len(LONG),
            auto_truncate=False,
            deadline=60,
        )
        serve.run(example.app(settings))
        yield Served(port)
    finally:
        serve.shutdown()
        ray.shutdown()


class TestRayServe:
    """`examples/serve_ray.py`."""

    def test_requests_at_once_share_passes_and_get_the_answers_of_a_classifier(
        self, served: Served, folders: Path
    ) -> None:
        samples = sample_texts()
        requests = [
            [f"{samples[(client + row) % len(samples)]} {client}" for row in range(1 + client % 5)]
            for client in range(CLIENTS)
        ]
        # Too long for the model, between others: its own request alone is refused.
        too_long, bad = "service " * 96, 6
        requests[bad].insert(1, too_long)
        before = served.counts()

        def client(texts: list[str]) -> list[tuple[int, Any]]:
            return [served.ask("/predict", {"inputs": [[text] for text in texts]}) for _ in range(3)]

        with ThreadPoolExecutor(1 + CLIENTS) as clients:
            long = clients.submit(served.ask, "/rerank", {"query": "service", "texts": LONG})
            while not served.counts()["te_queue_size"] and not long.done():
                time.sleep(0.005)
            answers = list(clients.map(client, requests))
            assert long.result()[0] == 200
        after = served.counts()
        message = "`inputs` must have less than 96 tokens. Given: 98"
        assert answers.pop(bad) == [(413, {"error": message, "error_type": "Validation"})] * 3
        del requests[bad]
        assert {status for each in answers for status, _ in each} == {200}

        classifier = Classifier.from_pretrained(folders / "classifier", device="cpu")
        exactly = Classifier.from_pretrained(folders / "classifier", device="cpu", dtype=torch.float64)
        texts = [text for request in requests for text in request]
        own = classifier(texts)
        assert len({each["label"] for each in own}) > 1
        exact = torch.tensor([each["score"] for each in exactly(texts)], dtype=torch.float64)
        for turn in range(3):
            found = [row[0] for each in answers for row in each[turn][1]]
            assert [row["label"] for row in found] == [each["label"] for each in own]
            scores = torch.tensor([row["score"] for row in found], dtype=torch.float64).float()
            # Bits may differ, since products of other sizes add up in another order.
            assert_as_exact_as(scores, [torch.tensor([each["score"] for each in own])], exact, "scores", times=2.0)

        made = {name: after[name] - before[name] for name in before}
        assert made["fastcls_texts"] == len(LONG) + 3 * len(texts)
        lengths = [len(ids) for ids in classifier.tokenizer(["service"] * len(LONG), LONG)["input_ids"]]
        # What came while the long request was computed shares passes, though the model is faster than its clients.
        assert made["te_batch_next_size_count"] - passes_of(lengths) < 3 * len(requests)
        assert after["te_queue_size"] == 0

    def test_a_client_that_leaves_is_not_computed_to_the_end(self, served: Served) -> None:
        before = served.counts()["fastcls_texts"]
        body = json.dumps({"query": "service", "texts": LONG}).encode()
        head = "POST /rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            client.sendall(head.encode() + body)
            while not (found := served.counts())["te_queue_size"]:
                assert found["fastcls_texts"] == before, "it was over before the client could leave"
                time.sleep(0.005)
        while served.counts()["te_queue_size"]:
            time.sleep(0.005)
        status, (answer, *_) = served.ask("/predict", {"inputs": "thank you"})
        assert (status, answer["label"] in NAMES) == (200, True)
        assert served.counts()["fastcls_texts"] - before < len(LONG)

    def test_health_and_every_model_are_there(self, served: Served) -> None:
        assert served.ask("/-/healthz") == (200, "success")
        assert served.ask("/health") == (200, "")
        status, listed = served.ask("/v1/models")
        assert (status, [each["id"] for each in listed["data"]]) == (200, ["classifier", "reranker"])
        status, described = served.ask("/info")
        assert (status, described["max_concurrent_requests"], described["max_input_length"]) == (200, 64, 96)

    def test_a_replica_is_well_as_long_as_its_model_computes(
        self, example: Any, folders: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from fastcls.serving.app import create_app
        from fastcls.serving.loaded import load_all
        from fastcls.serving.options import LoadOptions, ServeOptions
        from fastcls.serving.served import Served

        def fails(*_: object) -> None:
            raise ZeroDivisionError

        async def see() -> None:
            models = load_all([str(folders / "classifier")], LoadOptions(device="cpu"))
            replica = example.Replica()
            replica.app = create_app(lambda: models, ServeOptions())
            async with replica.app.router.lifespan_context(replica.app):
                await replica.check_health()
                server = replica.app.state.server
                with monkeypatch.context() as broken:
                    broken.setattr(Served, "compute", fails)
                    # As after a pass that failed.
                    server.passes.failing.add(server.models[0].computing)
                    with pytest.raises(RuntimeError, match="computes no more"):
                        await replica.check_health()
                await replica.check_health()
                assert not server.passes.failing
            with pytest.raises(RuntimeError, match="computes no more"):
                await replica.check_health()

        asyncio.run(asyncio.wait_for(see(), 60))

    def test_settings_are_read_as_a_command_line_gives_them(self, example: Any) -> None:
        given = {"model": "x", "num_cpus": "2", "max_replicas": "8", "quantize": "int8", "auto_truncate": "false"}
        settings = example.Settings.model_validate(given)
        assert (settings.num_cpus, settings.max_replicas, settings.quantize) == (2, 8, "int8")
        assert settings.auto_truncate is False
        for wrong in ({"model": "x", "num_cpu": "2"}, {"model": "x", "max_batch_tokens": "0"}, {}):
            with pytest.raises(ValueError, match=r"num_cpu|max_batch_tokens|model"):
                example.Settings.model_validate(wrong)


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    """Each instruction of the image with what it says."""
    text = re.sub(r"^\s*#.*\n", "", (EXAMPLES / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def of(steps: list[tuple[str, str]], instruction: str) -> str:
    (found,) = [said for name, said in steps if name == instruction]
    return found


class TestImage:
    """`examples/Dockerfile`, as far as it can be seen without docker."""

    def test_what_it_copies_is_there(self, steps: list[tuple[str, str]]) -> None:
        copied = [shlex.split(said) for name, said in steps if name == "COPY" and "--from" not in said]
        assert copied
        for *sources, _ in copied:
            assert all((ROOT / source).exists() for source in sources), sources

    def test_what_it_starts_is_a_command_that_there_is(self, steps: list[tuple[str, str]]) -> None:
        program, command, *given = json.loads(of(steps, "ENTRYPOINT")) + json.loads(of(steps, "CMD"))
        assert (program, command) == ("fastcls", "serve")
        served = typer.main.get_group(commands).commands["serve"]
        known = {name: each for each in served.params for name in each.opts}
        options = [each for each in given if each.startswith("-")]
        assert set(options) <= known.keys() | {"--help"}
        assert of(steps, "EXPOSE") == str(known["--port"].default)
        assert of(steps, "STOPSIGNAL") == "SIGTERM"
        assert of(steps, "USER") not in ("root", "0")

    def test_its_health_is_whether_the_server_computes(
        self, steps: list[tuple[str, str]], folders: Path, tmp_path: Path
    ) -> None:
        _, command, *given = json.loads(of(steps, "ENTRYPOINT"))
        program, *check = json.loads(of(steps, "HEALTHCHECK").partition("CMD ")[2])
        assert program == "python"
        start = ["-m", "fastcls", command, *given, str(folders / "classifier"), "--port", "0", "--json-output"]
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": paths}
        with open(tmp_path / "log", "w+") as log:
            server = subprocess.Popen([sys.executable, *start], stderr=log, env=environment)
            try:
                while not (url := re.search(r'"url": "http://0\.0\.0\.0:(\d+)"', (tmp_path / "log").read_text())):
                    assert server.poll() is None, (tmp_path / "log").read_text()
                    time.sleep(0.05)
                # The port alone is another one: 3000 may be somebody's.
                asks = [sys.executable, *(each.replace(":3000/", f":{url[1]}/") for each in check)]
                assert asks[1:] != check
                assert subprocess.run(asks, timeout=60).returncode == 0
            finally:
                server.send_signal(signal.SIGTERM)
                status = server.wait(60)
        # uvicorn sends itself the signal once more, when all is answered.
        assert status in (0, -signal.SIGTERM)
        assert subprocess.run(asks, timeout=60, stderr=subprocess.DEVNULL).returncode != 0
