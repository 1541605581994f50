"""The example of Ray Serve: requests share passes, none fails its neighbours, and who leaves is not computed."""

from __future__ import annotations

import asyncio
import functools
import http.client
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support import assert_as_exact_as, tiny_bert

from fastcls import Classifier
from fastcls.tools.demo import sample_texts, sample_tokenizer

pytest.importorskip("ray.serve", reason="the example needs ray[serve]")
pytest.importorskip("fastapi", reason="the example needs ray[serve]")

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("bad", "fair", "good")
CLIENTS = 16


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    sys.path.insert(0, str(EXAMPLES))
    import serve_ray

    yield serve_ray
    sys.path.remove(str(EXAMPLES))


Test = Callable[..., Coroutine[Any, Any, None]]


def in_a_loop(test: Test) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 60))

    return run


class Model:
    """Answers a text by itself in capitals, as soon as `may_end` is set; BAD by why not, and BUG by an error."""

    def __init__(self) -> None:
        self.passes: list[list[str]] = []
        self.may_end = threading.Event()
        self.threads: set[int] = set()

    def compute(self, texts: list[str]) -> list[str]:
        self.passes.append(texts)
        self.threads.add(threading.get_ident())
        assert self.may_end.wait(60)
        if "BUG" in texts:
            raise ZeroDivisionError
        return [f"not {text}" if text == "BAD" else text.upper() for text in texts]

    def count(self, texts: list[str]) -> list[int]:
        return [len(text) for text in texts]


async def busy(example: Any, model: Model, tokens_per_pass: int) -> tuple[Any, list[asyncio.Task[Any]]]:
    """Passes of a model that computes its first text until it may end."""
    passes = example.Passes(model.compute, model.count, tokens_per_pass)
    first = asyncio.create_task(passes.answers(["first"]))
    while not model.passes:
        await asyncio.sleep(0.001)
    return passes, [first]


async def asked(passes: Any, *requests: list[str]) -> list[asyncio.Task[Any]]:
    """Requests in this order, once all their texts wait."""
    tasks = []
    for texts in requests:
        before = passes.statistics()["waiting"]
        tasks.append(asyncio.create_task(passes.answers(texts)))
        while passes.statistics()["waiting"] < before + len(texts):
            await asyncio.sleep(0.001)
    return tasks


@in_a_loop
async def test_what_waits_is_computed_in_order_by_passes_of_so_many_tokens(example: Any) -> None:
    model = Model()
    passes, tasks = await busy(example, model, 6)
    tasks += await asked(passes, ["aa", "bbbbb", "c"], ["dddddddddd", "e"], ["f"])
    model.may_end.set()
    assert await asyncio.gather(*tasks) == [["FIRST"], ["AA", "BBBBB", "C"], ["DDDDDDDDDD", "E"], ["F"]]
    assert model.passes == [["first"], ["aa", "bbbbb"], ["c", "dddddddddd"], ["e", "f"]]
    assert passes.statistics() == {"requests": 4, "texts": 7, "passes": 4, "waiting": 0}
    assert len(model.threads) == 1
    assert threading.get_ident() not in model.threads


@in_a_loop
async def test_a_text_that_comes_alone_does_not_wait_for_others(example: Any) -> None:
    model = Model()
    model.may_end.set()
    passes = example.Passes(model.compute, model.count, 1000)
    assert await passes.answers(["one"]) == ["ONE"]
    assert await passes.answers(["two"]) == ["TWO"]
    assert model.passes == [["one"], ["two"]]


@in_a_loop
async def test_what_a_client_that_left_asked_is_dropped_where_it_waits(example: Any) -> None:
    model = Model()
    passes, tasks = await busy(example, model, 6)
    left, stays = await asked(passes, ["aaaa", "bbbb", "cccc"], ["dd", "ee"])
    left.cancel()
    tasks[0].cancel()
    model.may_end.set()
    assert await stays == ["DD", "EE"]
    assert model.passes == [["first"], ["dd", "ee"]], "those dropped do not fill a pass"
    with pytest.raises(asyncio.CancelledError):
        await left


@in_a_loop
async def test_a_failed_pass_fails_its_own_requests_and_the_health_until_one_succeeds(example: Any) -> None:
    model = Model()
    passes, tasks = await busy(example, model, 6)
    tasks += await asked(passes, ["BUG", "xxx", "second", "dropped"], ["of its own"])
    model.may_end.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert found[0] == ["FIRST"]
    assert isinstance(found[1], ZeroDivisionError)
    assert found[2] == ["OF ITS OWN"]
    assert not any("dropped" in texts for texts in model.passes), "nobody waits for it any more"
    replica = object.__new__(example.Replica.__mro__[1])
    replica._passes = passes
    await replica.check_health()
    with pytest.raises(ZeroDivisionError):
        await passes.answers(["BUG"])
    with pytest.raises(RuntimeError, match="computes no more"):
        await replica.check_health()
    assert await passes.answers(["fine"]) == ["FINE"]
    await replica.check_health()
    passes.worker.cancel()
    await asyncio.wait([passes.worker])
    with pytest.raises(RuntimeError, match="computes no more"):
        await replica.check_health()


# A pass of the served application, and a request that keeps it busy for a while.
TOKENS_PER_PASS = 256
LONG = [f"{'service ' * 80}{number}" for number in range(1024)]


def passes_of(lengths: list[int]) -> int:
    """How many passes texts of so many tokens make that wait together."""
    passes = tokens = 0
    for length in lengths:
        passes, tokens = passes + (tokens == 0), tokens + length
        if tokens >= TOKENS_PER_PASS:
            tokens = 0
    return passes


class Served(NamedTuple):
    """An application of one replica that refuses texts it would have to cut, and where it answers."""

    folder: Path
    port: int

    def ask(self, path: str, body: object = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            method = "GET" if body is None else "POST"
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            content = answer.read().decode()
            is_json = "json" in (answer.getheader("Content-Type") or "")
            return answer.status, json.loads(content) if is_json else content
        finally:
            connection.close()

    def classified(self, texts: list[str]) -> tuple[int, Any]:
        return self.ask("/classify", {"texts": texts})

    def statistics(self) -> dict[str, int]:
        status, found = self.ask("/statistics")
        assert status == 200
        return dict(found)


@pytest.fixture(scope="module")
def served(example: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    import ray
    from ray import serve

    folder = tmp_path_factory.mktemp("served")
    tokenizer = sample_tokenizer(sample_texts())
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
    model = tiny_bert(vocab_size=len(tokenizer), **names)
    # No label is the best one everywhere.
    model.classifier.bias.data -= Classifier(model, tokenizer).logits(sample_texts()).mean(0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What this process imports its replicas do, wherever they start.
    paths = os.pathsep.join(os.path.abspath(path) for path in (str(EXAMPLES), *sys.path) if path)
    environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "FASTCLS_SHARED": str(folder / "shared")}}
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = {"model": str(folder), "max_replicas": 1, "tokens_per_pass": TOKENS_PER_PASS, "long_texts": "error"}
        serve.run(example.app(example.Settings(**settings)))
        yield Served(folder, port)
    finally:
        serve.shutdown()
        ray.shutdown()


def test_requests_at_once_share_passes_and_get_the_answers_of_a_classifier(served: Served) -> None:
    samples = sample_texts()
    requests = [
        [f"{samples[(client + row) % len(samples)]} {client}" for row in range(1 + client % 5)]
        for client in range(CLIENTS)
    ]
    # Too long for the model, between others: it alone is refused, and by its place.
    too_long, bad = "service " * 96, 6
    requests[bad].insert(1, too_long)
    count = sum(map(len, requests))
    before = served.statistics()

    def client(texts: list[str]) -> list[tuple[int, Any]]:
        return [served.classified(texts) for _ in range(3)]

    with ThreadPoolExecutor(1 + CLIENTS) as clients:
        long = clients.submit(served.classified, LONG)
        while not served.statistics()["waiting"] and not long.done():
            time.sleep(0.005)
        answers = list(clients.map(client, requests))
        assert long.result()[0] == 200
    after = served.statistics()
    detail = [{"type": "text", "loc": ["body", "texts", 1], "msg": "is longer than 96 tokens"}]
    assert answers.pop(bad) == [(422, {"detail": detail})] * 3
    del requests[bad]
    assert {status for each in answers for status, _ in each} == {200}

    classifier = Classifier.from_pretrained(served.folder, device="cpu")
    exactly = Classifier.from_pretrained(served.folder, device="cpu", dtype=torch.float64)
    texts = [text for request in requests for text in request]
    own = classifier(texts)
    assert len({each["label"] for each in own}) > 1
    exact = torch.tensor([each["score"] for each in exactly(texts)], dtype=torch.float64)
    for turn in range(3):
        found = [row for each in answers for row in each[turn][1]]
        assert [row["label"] for row in found] == [each["label"] for each in own]
        scores = torch.tensor([row["score"] for row in found], dtype=torch.float64).float()
        # Bits may differ, since products of other sizes add up in another order.
        assert_as_exact_as(scores, [torch.tensor([each["score"] for each in own])], exact, "scores", times=2.0)

    made = {name: after[name] - before[name] for name in before}
    assert made["requests"] == 1 + 3 * CLIENTS
    assert made["texts"] == len(LONG) + 3 * count
    passes_of_long = passes_of([len(ids) for ids in classifier.tokenizer(LONG)["input_ids"]])
    # What came while the long request was computed shares passes, though the model is faster than its clients.
    assert made["passes"] - passes_of_long < 3 * CLIENTS
    assert after["waiting"] == 0


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"texts": []}, ["body", "texts"]),
        ({"texts": "one"}, ["body", "texts"]),
        ({"texts": ["fine", 7]}, ["body", "texts", 1]),
        ({"texts": ["fine", None]}, ["body", "texts", 1]),
        # Half a character, which JSON can say and UTF-8 cannot.
        ({"texts": ["fine", "\ud800"]}, ["body", "texts", 1]),
        ({"texts": ["x" * 100_001]}, ["body", "texts", 0]),
        ({"texts": ["x"] * 1025}, ["body", "texts"]),
        ({"text": ["one"]}, ["body", "texts"]),
    ],
    ids=["none", "no_list", "number", "null", "half_a_character", "huge", "many", "other_name"],
)
def test_what_is_no_list_of_texts_is_refused_by_place(served: Served, body: object, where: list[Any]) -> None:
    status, found = served.ask("/classify", body)
    assert status == 422
    assert [each["loc"] for each in found["detail"]] == [where]
    assert served.classified(["fine"])[0] == 200


def test_health_and_the_routes_description_are_there(served: Served) -> None:
    assert served.ask("/-/healthz") == (200, "success")
    status, described = served.ask("/openapi.json")
    assert status == 200
    assert described["paths"].keys() == {"/classify", "/statistics"}


def test_a_client_that_leaves_is_not_computed_to_the_end(served: Served) -> None:
    before = served.statistics()["texts"]
    body = json.dumps({"texts": LONG}).encode()
    head = (
        f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.sendall(head.encode() + body)
        while not (found := served.statistics())["waiting"]:
            assert found["texts"] == before, "it was over before the client could leave"
            time.sleep(0.005)
    while served.statistics()["waiting"]:
        time.sleep(0.005)
    status, (answer,) = served.classified(["thank you"])
    assert (status, answer["label"] in NAMES) == (200, True)
    assert served.statistics()["texts"] - before < len(LONG)


def test_settings_are_read_as_a_command_line_gives_them(example: Any) -> None:
    settings = example.Settings.model_validate({"model": "x", "num_cpus": "2", "max_replicas": "8", "quantize": "int8"})
    assert (settings.num_cpus, settings.max_replicas, settings.quantize) == (2, 8, "int8")
    for wrong in ({"model": "x", "num_cpu": "2"}, {"model": "x", "tokens_per_pass": "0"}, {}):
        with pytest.raises(ValueError, match=r"num_cpu|tokens_per_pass|model"):
            example.Settings.model_validate(wrong)
