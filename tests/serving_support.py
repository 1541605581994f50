"""Servers in a thread of the test's own process, and a tiny checkpoint of each kind that they serve."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from support import TINY, tiny_bert, tiny_model

from fastcls.tools.demo import sample_texts, sample_tokenizer

pytest.importorskip("uvicorn", reason="a server needs the extra serve")
pytest.importorskip("prometheus_client", reason="a server needs the extra serve")
pytest.importorskip("orjson", reason="a server needs the extra serve")

import uvicorn
from starlette.types import ASGIApp

from fastcls.serving.app import create_app
from fastcls.serving.loaded import load_all
from fastcls.serving.options import LoadOptions, ServeOptions
from fastcls.serving.run import bound
from fastcls.serving.served import Served

LABELS = ("bad", "fair", "good")
PROMPTS = {"query": "the film: ", "passage": "a text: "}
# Of the tiny models, in tokens with [CLS] and [SEP].
LIMIT = 96


@contextlib.contextmanager
def running(app: ASGIApp) -> Iterator[str]:
    """A server on a free port of 127.0.0.1, until the end of the block; gives its URL."""
    at = bound("127.0.0.1", 0)
    config = uvicorn.Config(app, http="httptools", ws="none", lifespan="on", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [at]}, name="server")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server has ended before it started"
            time.sleep(0.005)
        yield f"http://127.0.0.1:{at.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        at.close()
        assert not thread.is_alive(), "the server has not ended"


@contextlib.contextmanager
def serving(*checkpoints: Path, names: Sequence[str] = (), **options: Any) -> Iterator[str]:
    """A server of checkpoints, named as their folders are or otherwise, with `ServeOptions`; gives its URL."""
    models = load_all([str(each) for each in checkpoints], LoadOptions(device="cpu"), names)
    with running(create_app(lambda: models, ServeOptions(**options))) as url:
        yield url


@contextlib.contextmanager
def holding(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No pass of a server ends in the block; gives an event that is set once one has begun."""
    begun, may_end, compute = threading.Event(), threading.Event(), Served.compute

    def held(self: Served, *args: Any) -> list[Any]:
        begun.set()
        assert may_end.wait(60)
        return compute(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Served, "compute", held)
        try:
            yield begun
        finally:
            may_end.set()


class Answer(NamedTuple):
    """A server's answer."""

    status: int
    headers: http.client.HTTPMessage
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)


def ask(url: str, path: str, body: Any = None, *, method: str | None = None, **headers: str) -> Answer:
    """Sends a request, a POST of JSON unless it is told otherwise; bytes are sent as they are.

    Args:
        url: of the server.
        path: of the route.
        body: None for a GET.
        method: of the request.
        headers: further ones, or "Content_Type" in place of JSON's.
    """
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, content, given)
        answer = connection.getresponse()
        return Answer(answer.status, answer.headers, answer.read())
    finally:
        connection.close()


def post_of(url: str, path: str, body: Any) -> Any:
    """The answer to a POST, which must be one."""
    answer = ask(url, path, body)
    assert answer.status == 200, answer.content
    return answer.json


def save_classifier(folder: Path) -> Path:
    """Of three labels; its vocabulary is larger than its tokenizer's."""
    tokenizer = sample_tokenizer(sample_texts())
    tiny_bert(vocab_size=len(tokenizer) + 8, id2label=dict(enumerate(LABELS))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_reranker(folder: Path) -> Path:
    """Of one label."""
    tokenizer = sample_tokenizer(sample_texts())
    tiny_bert(vocab_size=len(tokenizer), num_labels=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_encoder(folder: Path) -> Path:
    """Of sentence-transformers, by the mean, with `PROMPTS`."""
    reason = "the checkpoint is one of sentence-transformers"
    library = pytest.importorskip("sentence_transformers", reason=reason)
    models = pytest.importorskip("sentence_transformers.models", reason=reason)
    plain, tokenizer = folder.with_name(f"{folder.name}-plain"), sample_tokenizer(sample_texts())
    tiny_model("BertModel", "bert", vocab_size=len(tokenizer)).save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    encoder = models.Transformer(str(plain), max_seq_length=LIMIT)
    pooling = models.Pooling(TINY["hidden_size"], pooling_mode="mean")
    library.SentenceTransformer(modules=[encoder, pooling], device="cpu", prompts=PROMPTS).save(str(folder))
    return folder


def save_sparse(folder: Path) -> Path:
    """A masked language model, which gives weights of words."""
    tokenizer = sample_tokenizer(sample_texts())
    config = tiny_bert(vocab_size=len(tokenizer)).config
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SAVE: dict[str, Callable[[Path], Path]] = {
    "classifier": save_classifier,
    "reranker": save_reranker,
    "embedding": save_encoder,
    "sparse": save_sparse,
}
