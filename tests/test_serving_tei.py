"""A server held to the specification of text-embeddings-inference: routes, requests, defaults, answers and errors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving_support import Answer, ask, holding, serving

from fastcls.serving.served import Served

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")

ROOT = Path(__file__).parents[1]
PATH = Path(os.environ.get("FASTCLS_TEI_SPEC", ROOT.parent / "shared" / "data" / "tei" / "openapi.json"))
if not PATH.is_file():
    pytest.skip(
        f"the specification of text-embeddings-inference is not at {PATH}: set FASTCLS_TEI_SPEC to its openapi.json",
        allow_module_level=True,
    )
SPEC: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
STATUS = {"Validation": 413, "Tokenizer": 422, "Empty": 400, "Backend": 424, "Overloaded": 429, "Unhealthy": 503}

LONG = f"{'film ' * 60}{'good ' * 60}"
# A body of each route, without what may be left out, on which all that may be given has an effect.
BODIES: dict[str, dict[str, Any]] = {
    "/predict": {"inputs": LONG},
    "/rerank": {"query": "which film?", "texts": [LONG, "ok"]},
    "/embed": {"inputs": [LONG, "ok"]},
    "/embed_all": {"inputs": [LONG, "ok"]},
    "/embed_sparse": {"inputs": [LONG, "ok"]},
    "/similarity": {"inputs": {"source_sentence": "a good film", "sentences": [LONG, "ok"]}},
    "/tokenize": {"inputs": ["a good film"]},
    "/decode": {"ids": [[2, 50, 60, 3]]},
    "/v1/embeddings": {"input": ["a good film", "ok"]},
}
COMPUTING = [path for path in BODIES if path not in ("/tokenize", "/decode")]
# What is taken if nothing is given, and something else.
VALUES: dict[str, tuple[Any, Any]] = {
    # As the command line of text-embeddings-inference has it, --auto-truncate; the specification says false.
    "truncate": (True, False),
    "truncation_direction": ("right", "Left"),
    "raw_scores": (False, True),
    "return_text": (False, True),
    "prompt_name": (None, "query"),
    "normalize": (True, False),
    "dimensions": (None, 17),
    "parameters": (None, {"prompt_name": "query"}),
    "add_special_tokens": (True, False),
    "skip_special_tokens": (True, False),
    "encoding_format": ("float", "base64"),
}
# One model is served that embeds, whoever asks.
WITHOUT_EFFECT = {"model": "any", "user": "somebody"}


def translated(schema: Any, name: str = "") -> Any:
    """A schema of OpenAPI 3.0 as one of JSON Schema, with no other properties than it has."""
    if isinstance(schema, list):
        return [translated(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: translated(value, key) for key, value in schema.items() if key not in ("nullable", "example")}
    # Of the specification's two forms of an error clients read the other one's "type".
    is_open = name == "OpenAICompatErrorResponse"
    if "properties" in found and name != "properties" and not is_open:
        found.setdefault("additionalProperties", False)
    return {"anyOf": [found, {"type": "null"}]} if schema.get("nullable") is True else found


COMPONENTS = {name: translated(schema, name) for name, schema in SPEC["components"]["schemas"].items()}


def validate(content: Any, schema: dict[str, Any]) -> None:
    whole = {**translated(schema), "components": {"schemas": COMPONENTS}}
    jsonschema.Draft202012Validator(whole).validate(content)


def checked(path: str, answer: Answer, method: str = "post") -> Answer:
    """An answer that is one of those that the specification has for a route."""
    responses = SPEC["paths"][path][method]["responses"]
    assert str(answer.status) in responses, answer.content
    for kind, described in responses[str(answer.status)].get("content", {}).items():
        assert answer.headers.get_content_type() == kind
        if kind == "application/json":
            validate(answer.json, described["schema"])
            if answer.status != 200 and answer.json["error_type"] != "Validation":
                assert answer.status == STATUS[answer.json["error_type"]]
    return answer


def request_schema(path: str) -> dict[str, Any]:
    """The schema of a route's body."""
    reference: str = SPEC["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schema: dict[str, Any] = SPEC["components"]["schemas"][reference.rpartition("/")[2]]
    return schema


def optional(schema: dict[str, Any]) -> list[str]:
    return [name for name in schema["properties"] if name not in schema.get("required", ())]


@pytest.fixture(scope="module")
def url(checkpoints: Callable[[str], Path]) -> Iterator[str]:
    with serving(*map(checkpoints, ("classifier", "reranker", "embedding", "sparse"))) as found:
        yield found


def test_each_route_is_there(url: str) -> None:
    assert set(BODIES) == {path for path, methods in SPEC["paths"].items() if "post" in methods}
    for path, methods in SPEC["paths"].items():
        for method in methods:
            answer = ask(url, path, BODIES.get(path), method=method.upper())
            assert checked(path, answer, method).status == 200


GIVEN = [(path, name) for path in BODIES for name in optional(request_schema(path))]
OF_SIMILARITY = optional(SPEC["components"]["schemas"]["SimilarityParameters"])


@pytest.mark.parametrize(("path", "name"), GIVEN)
def test_what_may_be_given_has_its_default_and_its_effect(url: str, path: str, name: str) -> None:
    plain = checked(path, ask(url, path, BODIES[path]))
    assert plain.status == 200
    if name in WITHOUT_EFFECT:
        assert checked(path, ask(url, path, {**BODIES[path], name: WITHOUT_EFFECT[name]})).json == plain.json
        return
    default, other = VALUES[name]
    said = request_schema(path)["properties"][name].get("default")
    if name != "truncate":
        assert said in (default, json.dumps(default))
    assert checked(path, ask(url, path, {**BODIES[path], name: default})).json == plain.json
    assert checked(path, ask(url, path, {**BODIES[path], name: other})).json != plain.json


@pytest.mark.parametrize("name", OF_SIMILARITY)
def test_parameters_of_a_similarity_have_their_defaults_and_effects(url: str, name: str) -> None:
    path, (default, other) = "/similarity", VALUES[name]
    plain = ask(url, path, BODIES[path]).json
    assert checked(path, ask(url, path, {**BODIES[path], "parameters": {}})).json == plain
    assert checked(path, ask(url, path, {**BODIES[path], "parameters": {name: default}})).json == plain
    assert checked(path, ask(url, path, {**BODIES[path], "parameters": {name: other}})).json != plain


@pytest.mark.parametrize("path", BODIES)
def test_what_must_be_given_is_missed(url: str, path: str) -> None:
    required = request_schema(path)["required"]
    assert set(required) == set(BODIES[path])
    for name in required:
        body = {key: value for key, value in BODIES[path].items() if key != name}
        assert checked(path, ask(url, path, body)).status == 422


@pytest.mark.parametrize("direction", SPEC["components"]["schemas"]["TruncationDirection"]["enum"])
def test_texts_are_cut_on_the_side_that_is_named(url: str, direction: str) -> None:
    given = {"inputs": LONG, "truncation_direction": direction}
    kept = ("film " * 60 + "good " * 34) if direction == "Right" else ("film " * 34 + "good " * 60)
    assert ask(url, "/predict", given).json == ask(url, "/predict", {"inputs": kept}).json


@pytest.mark.parametrize(
    ("path", "name", "given", "count"),
    [
        *(
            (path, "input" if path == "/v1/embeddings" else "inputs", given, count)
            for path in ("/embed", "/embed_all", "/embed_sparse", "/v1/embeddings")
            for given, count in (("ok", 1), ([2, 50, 3], 1), (["ok", "good"], 2), ([[2, 3], [2, 50, 3]], 2))
        ),
        ("/embed", "inputs", ["ok", [2, 50, 3]], 2),
        ("/tokenize", "inputs", "ok", 1),
        ("/tokenize", "inputs", ["ok", "good"], 2),
        ("/decode", "ids", [2, 50, 3], 1),
        ("/decode", "ids", [[2, 50], [60]], 2),
        ("/predict", "inputs", [["ok"]], 1),
        ("/predict", "inputs", [["ok"], ["good", "film"]], 2),
    ],
)
def test_each_form_of_texts_is_answered_text_by_text(url: str, path: str, name: str, given: Any, count: int) -> None:
    answer = checked(path, ask(url, path, {name: given})).json
    assert len(answer["data"] if path == "/v1/embeddings" else answer) == count


@pytest.mark.parametrize("given", ["ok", ["good", "film"]], ids=["text", "pair"])
def test_a_text_and_a_pair_to_classify_are_answered_by_one_list(url: str, given: Any) -> None:
    (of_batch,) = ask(url, "/predict", {"inputs": [[given] if isinstance(given, str) else given]}).json
    assert checked("/predict", ask(url, "/predict", {"inputs": given})).json == of_batch


def with_texts(path: str, texts: list[Any]) -> dict[str, Any]:
    """A body of a route with so many texts."""
    if path == "/similarity":
        return {"inputs": {"source_sentence": "ok", "sentences": texts}}
    name = next(name for name in ("texts", "ids", "input", "inputs") if name in BODIES[path])
    return {**BODIES[path], name: [[text] for text in texts] if path in ("/predict", "/decode") else texts}


@pytest.mark.parametrize("path", BODIES)
def test_errors_of_texts(url: str, path: str) -> None:
    text = 50 if path == "/decode" else "ok"
    for body, kind in (
        (with_texts(path, []), "Empty"),
        (with_texts(path, [text] * 33), "Validation"),
    ):
        answer = checked(path, ask(url, path, body))
        assert (answer.status, answer.json["error_type"]) == (STATUS[kind], kind)
    # Of a similarity the source counts, too.
    most = 31 if path == "/similarity" else 32
    assert checked(path, ask(url, path, with_texts(path, [text] * most))).status == 200
    assert checked(path, ask(url, path, with_texts(path, [text] * (most + 1)))).status == 413
    if path != "/decode":
        empty = checked(path, ask(url, path, with_texts(path, ["ok", ""])))
        # With a query a text may be empty.
        assert empty.status == (200 if path == "/rerank" else 400)


@pytest.mark.parametrize("path", ["/embed", "/embed_all", "/embed_sparse", "/v1/embeddings", "/decode"])
def test_an_id_outside_the_vocabulary_is_the_tokenizers_error(url: str, path: str) -> None:
    body = {("input" if path == "/v1/embeddings" else "ids" if path == "/decode" else "inputs"): [2, 10**6, 3]}
    answer = checked(path, ask(url, path, body))
    assert (answer.status, answer.json["error_type"]) == (422, "Tokenizer")


@pytest.mark.parametrize("path", [path for path in COMPUTING if path != "/v1/embeddings"])
def test_a_text_that_may_not_be_cut_is_too_long(url: str, path: str) -> None:
    truncate = {"parameters": {"truncate": False}} if path == "/similarity" else {"truncate": False}
    answer = checked(path, ask(url, path, {**BODIES[path], **truncate}))
    assert (answer.status, answer.json["error_type"]) == (413, "Validation")


@pytest.mark.parametrize("path", COMPUTING)
def test_a_model_that_fails_is_the_backends_error(url: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> list[Any]:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Served, "compute", fail)
        answer = checked(path, ask(url, path, BODIES[path]))
        assert (answer.status, answer.json["error_type"]) == (424, "Backend")
        down = checked("/health", ask(url, "/health"), "get")
        assert (down.status, down.json["error_type"]) == (503, "Unhealthy")
    assert checked("/health", ask(url, "/health"), "get").status == 200


@pytest.mark.parametrize("path", COMPUTING)
def test_a_model_of_another_kind_is_the_backends_error(checkpoints: Callable[[str], Path], path: str) -> None:
    with serving(checkpoints("embedding" if path in ("/predict", "/rerank") else "classifier")) as url:
        answer = checked(path, ask(url, path, BODIES[path]))
        assert (answer.status, answer.json["error_type"]) == (424, "Backend")


def test_a_server_that_is_busy_says_so(checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ("classifier", "reranker", "embedding", "sparse")
    with serving(*map(checkpoints, kinds), max_concurrent_requests=1) as url, ThreadPoolExecutor(1) as pool:
        with holding(monkeypatch) as begun:
            first = pool.submit(ask, url, "/predict", BODIES["/predict"])
            assert begun.wait(60)
            for path in COMPUTING:
                answer = checked(path, ask(url, path, BODIES[path]))
                assert (answer.status, answer.json["error_type"]) == (429, "Overloaded")
        assert first.result().status == 200


def test_errors_of_openais_route_are_said_in_both_forms(url: str) -> None:
    error = ask(url, "/v1/embeddings", {"input": []}).json
    assert error.pop("message")
    assert error == {"code": 400, "type": "Empty", "error_type": "Empty"}


def test_what_is_served_is_described(checkpoints: Callable[[str], Path]) -> None:
    names = {
        "classifier": "classifier",
        "reranker": "reranker",
        "embedding": "embedding",
        "sparse": "embedding",
    }
    for kind, name in names.items():
        with serving(checkpoints(kind)) as url:
            found = checked("/info", ask(url, "/info"), "get").json
        assert list(found["model_type"]) == [name]
        assert found["auto_truncate"] is True
        assert (found["max_client_batch_size"], found["max_input_length"]) == (32, 96)
