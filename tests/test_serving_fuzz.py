"""A server under requests that nobody would write: none is answered by a defect of its own, none ends it."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_support import SAVE, Answer, ask, serving

from fastcls.serving.routes import ROUTES
from fastcls.serving.v1 import ROUTES as V1_ROUTES

KINDS = list(SAVE)
PATHS = [route.path for route in (*ROUTES, *V1_ROUTES)]
# What a request may be answered with: the statuses of the server's description, and those of HTTP itself.
STATUSES = {200, 400, 404, 405, 413, 415, 422, 424}
EXAMPLES = pytest.mark.parametrize("examples", [8, pytest.param(50, marks=pytest.mark.full)])


def always(examples: int) -> settings:
    """The same examples every time, so that a failure is no accident of the day."""
    checks = list(HealthCheck)
    return settings(max_examples=examples, derandomize=True, database=None, suppress_health_check=checks)


@pytest.fixture(scope="module")
def urls(checkpoints: Callable[[str], Path]) -> Iterator[Callable[[str], str]]:
    """Gives the URL of a server of a kind."""
    with ExitStack() as stack:
        started: dict[str, str] = {}

        def of(kind: str) -> str:
            if kind not in started:
                started[kind] = stack.enter_context(serving(checkpoints(kind)))
            return started[kind]

        yield of


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, urls: Callable[[str], str]) -> Iterator[str]:
    """Of a server of each kind, which still answers once the test has ended."""
    found = urls(request.param)
    yield found
    assert ask(found, "/health").status == 200
    assert ask(found, "/tokenize", {"inputs": "a good film"}).status == 200


def checked(answer: Answer) -> Answer:
    """An answer that no defect has given, with an error that says why."""
    assert answer.status in STATUSES, answer.content
    if answer.status != 200:
        said = answer.json
        assert said["error_type"] in ("Backend", "Validation", "Tokenizer", "Empty")
        assert said.get("error") or said["message"]
    return answer


@EXAMPLES
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
@pytest.mark.parametrize("path", PATHS)
def test_answers_are_as_the_server_describes_them(url: str, path: str, mode: str, examples: int) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    described = schemathesis.openapi.from_dict(ask(url, "/openapi.json").json)
    described.config.update(base_url=url)
    operation = described[path]["POST"]
    session = pytest.importorskip("requests").Session()

    @always(examples)
    @given(operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
    def asked(case: Any) -> None:
        # No schema says what a tokenizer takes, how many texts are allowed, or which kind of model is served.
        case.call_and_validate(session=session, excluded_checks=[positive_data_acceptance])

    with session:
        asked()


_NAMES = sorted({name for route in (*ROUTES, *V1_ROUTES) for name in route.body.model_fields} | {"parameters", "top_k"})
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["ok", "", "Left"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(_NAMES), inner, max_size=3),
    max_leaves=12,
)
_BODIES = st.dictionaries(st.sampled_from(_NAMES), _VALUES, max_size=6)


@EXAMPLES
@pytest.mark.parametrize("path", ["/", "/invocations", *PATHS])
def test_any_json_is_answered(url: str, path: str, examples: int) -> None:
    @always(examples)
    @given(_VALUES | _BODIES | st.builds(lambda body: {**body, "inputs": "ok"}, _BODIES))
    def asked(body: Any) -> None:
        # Python's own NaN and Infinity are in it, as numbers that JSON has not.
        checked(ask(url, path, json.dumps(body).encode()))

    asked()


@EXAMPLES
def test_any_bytes_are_answered(url: str, examples: int) -> None:
    @always(examples)
    @given(
        st.sampled_from(["/", *PATHS]), st.binary(max_size=200), st.sampled_from([b"", b'{"inputs":', b'{"query":"'])
    )
    def asked(path: str, content: bytes, begun: bytes) -> None:
        assert checked(ask(url, path, begun + content)).status in (400, 422)

    asked()


OK = b'{"inputs":"ok"}'
DIGITS = b"9" * 4_000
CONTENTS: dict[str, tuple[str, bytes, int]] = {
    "deep lists": ("/predict", b'{"inputs":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
    "deep objects": ("/", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400),
    "deep and unknown": ("/", b'{"inputs":"ok","a":' + b"[" * 150 + b"]" * 150 + b"}", 200),
    "a number that Python makes no text of": ("/embed", b'{"inputs":"ok","dimensions":' + DIGITS * 2 + b"}", 400),
    "many digits": ("/embed", b'{"inputs":"ok","dimensions":' + DIGITS + b"}", 413),
    "many digits below zero": ("/embed", b'{"inputs":"ok","dimensions":-' + DIGITS + b"}", 422),
    "many digits of an id": ("/embed", b'{"inputs":[2,' + DIGITS + b"]}", 422),
    "many digits of a token": ("/decode", b'{"ids":[2,' + DIGITS + b"]}", 422),
    "many digits of places": ("/v1/rerank", b'{"query":"a","documents":["b"],"top_n":' + DIGITS + b"}", 200),
    "many digits of tokens": (
        "/v1/rerank",
        b'{"query":"a","documents":["b"],"max_tokens_per_doc":' + DIGITS + b"}",
        422,
    ),
    "many digits of labels": ("/", b'{"inputs":"ok","parameters":{"top_k":' + DIGITS + b"}}", 200),
    "a key twice": ("/predict", b'{"inputs":"bad","inputs":"ok"}', 200),
    "no UTF-8": ("/predict", b'{"inputs":"\xff"}', 400),
    "half a character": ("/predict", b'{"inputs":"\\ud83d"}', 400),
    "halves of a character, changed": ("/predict", b'{"inputs":"\\ude00\\ud83d"}', 400),
    "half a character for a key": ("/", b'{"inputs":"ok","\\ud800":1}', 400),
    "UTF-8 of half a character": ("/predict", b'{"inputs":"\xed\xa0\xbd"}', 400),
    "a character of two halves": ("/predict", b'{"inputs":"\\ud83d\\ude00"}', 200),
    "a zero": ("/predict", b'{"inputs":"\\u0000"}', 200),
    "a name of a prompt that cannot be printed": ("/embed", b'{"inputs":"ok","prompt_name":"\\u0000\\n"}', 413),
    "NaN": ("/predict", b'{"inputs":NaN}', 422),
    "a byte order mark": ("/predict", b"\xef\xbb\xbf" + OK, 400),
    "UTF-16": ("/predict", OK.decode().encode("utf-16"), 400),
    "nothing": ("/predict", b"", 400),
    "more than an object": ("/predict", OK + OK, 400),
    "a list": ("/", b"[]", 422),
    "null": ("/", b"null", 422),
    "parameters that are none": ("/", b'{"inputs":"ok","parameters":0}', 422),
    "a body that is too large": ("/predict", b'{"inputs":"' + b"a" * 2_000_000 + b'"}', 413),
    "as many spaces": ("/predict", b" " * 2_000_001, 413),
    "a long text": ("/predict", b'{"inputs":"' + b"a " * 900_000 + b'"}', 200),
    "a long word": ("/predict", b'{"inputs":"' + b"a" * 1_900_000 + b'"}', 200),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_odd_contents(urls: Callable[[str], str], name: str) -> None:
    path, content, status = CONTENTS[name]
    url = urls({"/embed": "embedding", "/v1/rerank": "reranker"}.get(path, "classifier"))
    answer = checked(ask(url, path, content))
    assert answer.status == status
    assert len(answer.content) < 10_000
    if name == "a key twice":
        assert answer.content == ask(url, path, OK).content


@pytest.mark.parametrize(
    "content_type",
    ["", "text/plain", "application/json-seq", "multipart/form-data", "application", "\xff", ";", "a/b/c"],
)
def test_contents_of_another_type(urls: Callable[[str], str], content_type: str) -> None:
    assert checked(ask(urls("classifier"), "/predict", OK, Content_Type=content_type)).status == 415


@pytest.mark.parametrize(
    "content_type", ["application/JSON ; charset=utf-8", "application/vnd.api+json", "application/json;"]
)
def test_contents_of_jsons_types(urls: Callable[[str], str], content_type: str) -> None:
    assert ask(urls("classifier"), "/predict", OK, Content_Type=content_type).status == 200


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "HEAD"])
def test_a_route_that_computes_takes_posts_alone(urls: Callable[[str], str], method: str) -> None:
    for path in [*PATHS, "/invocations", "/models/tiny-classifier/predict"]:
        answer = ask(urls("classifier"), path, method=method)
        assert (answer.status, answer.headers["allow"]) == (405, "POST")
        said = "message" if path.startswith(("/v1/", "/v2/")) else "error"
        assert method == "HEAD" or "Method Not Allowed" in answer.json[said]


@pytest.mark.parametrize("path", ["/health", "/ping", "/info", "/metrics", "/v1/models", "/openapi.json", "/"])
def test_what_is_shown_has_a_head(urls: Callable[[str], str], path: str) -> None:
    head, whole = (ask(urls("classifier"), path, method=method) for method in ("HEAD", "GET"))
    assert (head.status, head.content) == (whole.status, b"") == (200, b"")
    assert ask(urls("classifier"), path, method="DELETE").status == 405


@pytest.mark.parametrize(
    "path",
    [
        f"/{'a' * 60_000}",
        f"/models/{'a' * 60_000}/predict",
        "/models//predict",
        "/models/%00%0d%0a/predict",
        "/models/%1b%5b2J/predict",
        "/%ff%fe",
        "/../predict",
        "//predict",
        "/%2e%2e/info",
        f"/predict?{'a=b&' * 10_000}=",
    ],
    ids=lambda path: path[:30],
)
def test_odd_paths(urls: Callable[[str], str], path: str) -> None:
    answer = checked(ask(urls("classifier"), path, OK))
    assert answer.status == (200 if "?" in path else 404)
    assert len(answer.content) < 1_000
    assert ask(urls("classifier"), path).status in (404, 405)


def test_a_slash_too_many_leads_to_the_route(urls: Callable[[str], str]) -> None:
    url = urls("classifier")
    for host in (dict[str, str](), {"Host": "["}):
        answer = ask(url, "/predict/", OK, **host)
        assert (answer.status, answer.headers["location"]) == (307, f"{url}/predict")


@pytest.mark.parametrize(
    ("status", "header"), [(413, {}), (415, {"Content_Type": "text/plain"}), (404, {"path": "/models/nobody/predict"})]
)
def test_a_refusal_reaches_a_client_that_first_sends_all(
    urls: Callable[[str], str], status: int, header: dict[str, str]
) -> None:
    # Such connections end with the answer, and are reset where bytes are left unread: unless they are read.
    given = {"Connection": "close", **header}
    size = 10_000_000 if status == 413 else 1_500_000
    body = b'{"inputs": "' + b"x" * size + b'"}'
    answer = checked(ask(urls("classifier"), given.pop("path", "/predict"), body, **given))
    assert answer.status == status


def test_a_refusal_waits_for_no_body(urls: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    # As long as the answer is awaited here: it comes first.
    monkeypatch.setattr("fastcls.serving.app._SECONDS_OF_SILENCE", 60.0)
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9000000\r\n\r\n"
    assert sent(urls("classifier"), head).startswith(b"HTTP/1.1 413")


def sent(url: str, content: bytes) -> bytes:
    """What comes back on a connection for what is no HTTP of any client's."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=50) as connection:
        connection.sendall(content)
        return connection.recv(65_536)


POST = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKS = b"Transfer-Encoding: chunked\r\n\r\nf\r\n" + OK + b"\r\n0\r\n\r\n"
REQUESTS: dict[str, tuple[bytes, int]] = {
    "chunks": (POST + CHUNKS, 200),
    "chunks and a length": (POST + b"Content-Length: 5000\r\n" + CHUNKS, 400),
    "chunks of no length": (POST + CHUNKS.replace(b"\r\nf\r\n", b"\r\nx\r\n"), 400),
    "a length of many digits": (POST + b"Content-Length: " + DIGITS + b"\r\n\r\n" + OK, 400),
    "a length below zero": (POST + b"Content-Length: -1\r\n\r\n" + OK, 400),
    "two lengths": (POST + b"Content-Length: 15\r\nContent-Length: 5\r\n\r\n" + OK, 400),
    "a host that is none": (POST.replace(b"x\r\n", b"[\r\n") + CHUNKS, 200),
    "a host that is none, and no such route": (
        POST.replace(b"x\r\n", b"[\r\n").replace(b"predict", b"no") + CHUNKS,
        404,
    ),
    "a path that is not ASCII": (POST.replace(b"predict", b"\xff\xfe") + CHUNKS, 400),
    "a key that is not ASCII": (POST + b"Authorization: \xff\xfe\r\n" + CHUNKS, 200),
    "a long header": (POST + b"X: " + b"a" * 200_000 + b"\r\n" + CHUNKS, 200),
    "no such method": (b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "no HTTP": (b"\x16\x03\x01\x02\r\n\r\n", 400),
    "HTTP/1.0": (b"GET /health HTTP/1.0\r\n\r\n", 200),
    "a question of another page": (
        b"OPTIONS /predict HTTP/1.1\r\nHost: x\r\nOrigin: http://a\r\nAccess-Control-Request-Method: POST\r\n\r\n",
        200,
    ),
    "a question of another page that may not": (
        b"OPTIONS /predict HTTP/1.1\r\nHost: x\r\nOrigin: http://a\r\nAccess-Control-Request-Method: PUT\r\n\r\n",
        400,
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_odd_requests(urls: Callable[[str], str], name: str) -> None:
    content, status = REQUESTS[name]
    assert sent(urls("classifier"), content).startswith(f"HTTP/1.1 {status} ".encode())
    assert ask(urls("classifier"), "/predict", OK).status == 200


def test_a_client_that_leaves_in_the_midst_of_its_body_harms_nobody(urls: Callable[[str], str]) -> None:
    url = urls("classifier")
    host, _, port = url.removeprefix("http://").partition(":")
    for _ in range(20):
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(POST + b"Content-Length: 500\r\n\r\n" + OK)
    assert ask(url, "/predict", OK).status == 200


def test_a_defect_of_its_own_is_counted_and_ends_no_connection(
    urls: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:

    url = urls("classifier")
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    # A connection that the server has closed would be opened anew.
    connection.auto_open = 0
    connection.connect()
    statuses = []
    for is_broken in (False, True, False):
        with monkeypatch.context() as patch:
            if is_broken:
                patch.setattr("fastcls.serving.routes._predictions", lambda *_: 1 / 0)
            connection.request("POST", "/predict", OK, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            statuses.append((answer.status, "error" in json.loads(answer.read())))
    connection.close()
    assert statuses == [(200, False), (500, True), (200, False)]
    assert b'te_request_failure{err="internal"} 1.0' in ask(url, "/metrics").content
