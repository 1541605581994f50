"""The server's own description, made of its routes and of the models of their bodies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, TypeAdapter

from .. import __version__
from .routes import Route
from .schemas import (
    DocumentsAnswer,
    ErrorAnswer,
    Info,
    Models,
    OpenAIAnswer,
    OpenAIError,
    Prediction,
    Rank,
    SparseValue,
    Token,
)

_REF = "#/components/schemas/{model}"
_ANSWERS: dict[str, Any] = {
    "/predict": list[Prediction] | list[list[Prediction]],
    "/rerank": list[Rank],
    "/embed": list[list[float]],
    "/embed_all": list[list[list[float]]],
    "/embed_sparse": list[list[SparseValue]],
    "/similarity": list[float],
    "/tokenize": list[list[Token]],
    "/decode": list[str],
    "/v1/embeddings": OpenAIAnswer,
    "/v1/rerank": DocumentsAnswer,
}
_ERRORS = {
    400: "An empty batch or text, or a body that is no JSON",
    404: "No such model",
    408: "The body does not come",
    413: "Too many texts, a text that is too long, or a body that is too large",
    415: "A body that is not said to be JSON",
    422: "A body of other types, or a text that the tokenizer does not take",
    424: "A model of another kind, or one that failed",
    429: "The model is overloaded",
}


def document(routes: Sequence[Route], *, has_key: bool) -> dict[str, Any]:
    """The OpenAPI document, version 3.1.

    Args:
        routes: those that compute.
        has_key: whether requests need a key.
    """
    components: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for route in routes:
        error = OpenAIError if route.path.startswith("/v1/") else ErrorAnswer
        responses = {str(status): _response(text, error, components) for status, text in _errors(has_key).items()}
        paths[route.path] = {
            "post": {
                "summary": route.about,
                "operationId": route.answer.__module__.rpartition(".")[2] + "_" + route.answer.__name__,
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": _schema(route.body, components, "validation")}},
                },
                "responses": {"200": _response("The answer", _ANSWERS[route.path], components), **responses},
                **({"security": [{"key": []}]} if has_key else {}),
            }
        }
    for path, kind, text in (("/info", Info, "What is served"), ("/v1/models", Models, "The models that are served")):
        paths[path] = {"get": {"summary": text, "responses": {"200": _response(text, kind, components)}}}
    down = _response("The model does not compute", ErrorAnswer, components)
    paths["/health"] = {
        "get": {"summary": "Whether the model computes", "responses": {"200": {"description": "It does"}, "503": down}}
    }
    metrics = {"description": "Metrics", "content": {"text/plain": {"schema": {"type": "string"}}}}
    paths["/metrics"] = {"get": {"summary": "Metrics for Prometheus", "responses": {"200": metrics}}}
    security = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if has_key else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": "fastcls", "version": __version__},
        "paths": paths,
        "components": {"schemas": components, **security},
    }


def _errors(has_key: bool) -> dict[int, str]:
    return {**_ERRORS, **({401: "No key, or another one"} if has_key else {})}


def _response(text: str, kind: Any, components: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": _schema(kind, components, "serialization")}}
    return {"description": text, "content": content}


def _schema(kind: Any, components: dict[str, Any], mode: Any) -> dict[str, Any]:
    """A type's schema, whose parts are put among the components."""
    schema = TypeAdapter(kind).json_schema(mode=mode, ref_template=_REF)
    components.update(schema.pop("$defs", {}))
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        components[kind.__name__] = schema
        return {"$ref": _REF.format(model=kind.__name__)}
    return schema
