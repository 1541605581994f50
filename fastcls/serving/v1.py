"""The routes of OpenAI (/v1/embeddings) and of Cohere and Jina (/v1/rerank)."""

from __future__ import annotations

import base64
import uuid
from typing import Any

from .asking import Asking
from .errors import RequestError
from .routes import Route, check_dimensions, inputs_of, ranked, vectors
from .schemas import DocumentsRequest, OpenAIRequest
from .served import Numbers


async def embeddings(asking: Asking, body: OpenAIRequest) -> Any:
    """A vector for each text, as OpenAI has it."""
    inputs, is_batch = inputs_of(asking, body.input, None)
    check_dimensions(asking, body.dimensions)
    found = await asking.compute("vector", inputs, truncate=None, side="right", is_batch=is_batch)
    made = vectors(found, body.dimensions, normalize=True)
    as_base64 = body.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _base64(each) if as_base64 else each}
        for index, each in enumerate(made)
    ]
    return {"object": "list", "data": data, "model": asking.model.name, "usage": _usage(asking)}


async def rerank(asking: Asking, body: DocumentsRequest) -> Any:
    """Documents with scores, the best one first, as Cohere and Jina have it."""
    for name, value in (
        ("rank_fields", body.rank_fields if body.rank_fields != ["text"] else None),
        ("max_chunks_per_doc", body.max_chunks_per_doc),
        ("max_tokens_per_doc", body.max_tokens_per_doc),
    ):
        if value is not None:
            raise RequestError(f"`{name}` must be null, got {value!r:.80}: it is not computed here", "Validation", 422)
    texts = [each if isinstance(each, str) else each.text for each in body.documents]
    asking.check_batch(len(texts), "documents")
    scores = await ranked(asking, body.query, texts, None, "right", raw=False)
    best = sorted(range(len(texts)), key=lambda index: -scores[index])[: body.top_n]
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in best]
    if body.return_documents:
        results = [{**result, "document": {"text": texts[result["index"]]}} for result in results]
    version = asking.request.scope["path"].rpartition("/v")[2].partition("/")[0]
    return {
        "id": str(uuid.uuid4()),
        "model": asking.model.name,
        "results": results,
        "usage": _usage(asking),
        "meta": {"api_version": {"version": version}, "billed_units": {"search_units": 1}},
    }


def _usage(asking: Asking) -> dict[str, int]:
    return {"prompt_tokens": asking.tokens, "total_tokens": asking.tokens}


def _base64(vector: Numbers) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


ROUTES = (
    Route("/v1/embeddings", OpenAIRequest, ("embedding",), embeddings, "A vector for each text, as OpenAI has it"),
    Route("/v1/rerank", DocumentsRequest, ("reranker",), rerank, "Ranked documents, as Cohere and Jina have them"),
)
# The same, where clients look for it, too.
ALIASES = {"/embeddings": ROUTES[0], "/v2/rerank": ROUTES[1]}
