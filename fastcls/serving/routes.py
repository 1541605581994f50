"""The routes of text-embeddings-inference: bodies to what is computed, and that to answers."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import __version__
from ..labels import scores_of
from ..texts import Item
from .asking import Asking, Server, parsed
from .errors import RequestError
from .schemas import (
    AnyRequest,
    Body,
    DecodeRequest,
    EmbedAllRequest,
    EmbedRequest,
    EmbedSparseRequest,
    HubRequest,
    PredictRequest,
    RerankRequest,
    SimilarityRequest,
    TokenizeRequest,
)
from .served import Input, Kind, Numbers, Served, Side, Weights

# A vector of zeros has no direction: torch.nn.functional.normalize's bound.
_SHORTEST = 1e-12
# Of a tokenize request, whose answer is some fifty times as long.
_CHARACTERS_TO_SHOW = 200_000

Answering = Callable[[Asking, Any], Awaitable[Any]]


class Route(NamedTuple):
    """A route that computes.

    Attributes:
        path: where it is.
        body: what it takes.
        kinds: the models that answer; none for all.
        answer: makes the answer.
        about: what it does, in a line.
    """

    path: str
    body: type[Body]
    kinds: tuple[Kind, ...]
    answer: Answering
    about: str


async def predict(asking: Asking, body: PredictRequest) -> Any:
    """Labels with scores, the best one first."""
    given: Any = body.inputs
    # A batch is a list of lists.
    is_batch = isinstance(given, list) and not (given and isinstance(given[0], str))
    items = [_item(each) for each in (given if is_batch else [given])]
    asking.check_batch(len(items))
    found = await asking.compute("logits", items, truncate=body.truncate, side=body.side, is_batch=is_batch)
    answers = [_predictions(asking, each.logits if body.raw_scores else each.scores) for each in found]
    return answers if is_batch else answers[0]


async def predict_as_hub(asking: Asking, body: HubRequest) -> Any:
    """Labels with scores, in the form of Hugging Face's hub: a list for each text."""
    parameters = body.parameters
    (found,) = await asking.compute("logits", [Item(body.inputs, None)], truncate=None, side="right", is_batch=False)
    scores = found.scores
    if parameters.function_to_apply is not None:
        scores = scores_of(torch.tensor([found.logits]), parameters.function_to_apply)[0].tolist()
    return [_predictions(asking, scores)[: parameters.top_k]]


async def rerank(asking: Asking, body: RerankRequest) -> Any:
    """Texts with scores, the best one first."""
    asking.check_batch(len(body.texts), "texts")
    scores = await ranked(asking, body.query, body.texts, body.truncate, body.side, body.raw_scores)
    ranks: list[dict[str, Any]] = [{"index": index, "score": score} for index, score in enumerate(scores)]
    if body.return_text:
        ranks = [{**rank, "text": text} for rank, text in zip(ranks, body.texts, strict=True)]
    return sorted(ranks, key=lambda rank: -rank["score"])


async def ranked(
    asking: Asking, query: str, texts: Sequence[str], truncate: bool | None, side: Side, raw: bool
) -> list[float]:
    """Of each text its score for a query."""
    items = [Item(query, text) for text in texts]
    found = await asking.compute("logits", items, truncate=truncate, side=side, is_batch=True)
    return [_finite_scores(each.logits if raw else each.scores)[0] for each in found]


async def embed(asking: Asking, body: EmbedRequest) -> Any:
    """A vector for each text."""
    inputs, is_batch = inputs_of(asking, body.inputs, body.prompt_name)
    check_dimensions(asking, body.dimensions)
    found = await asking.compute("vector", inputs, truncate=body.truncate, side=body.side, is_batch=is_batch)
    return vectors(found, body.dimensions, normalize=body.normalize)


async def embed_all(asking: Asking, body: EmbedAllRequest) -> Any:
    """A vector for each token of each text."""
    inputs, is_batch = inputs_of(asking, body.inputs, body.prompt_name)
    found = await asking.compute("states", inputs, truncate=body.truncate, side=body.side, is_batch=is_batch)
    return list(map(_finite, found))


async def embed_sparse(asking: Asking, body: EmbedSparseRequest) -> Any:
    """A weight for each word that a text is about."""
    inputs, is_batch = inputs_of(asking, body.inputs, body.prompt_name)
    found = await asking.compute("weights", inputs, truncate=body.truncate, side=body.side, is_batch=is_batch)
    return [_sparse(each) for each in found]


async def similarity(asking: Asking, body: SimilarityRequest) -> Any:
    """The cosine of each sentence's vector and the source's."""
    sentences = body.inputs.sentences
    # The source counts, too.
    asking.check_batch(len(sentences) and 1 + len(sentences), "inputs.sentences")
    given = body.parameters
    prompt = asking.model.prompt(given.prompt_name if given else None)
    items = [_prompted(prompt, text) for text in (body.inputs.source_sentence, *sentences)]
    found = await asking.compute(
        "vector",
        items,
        truncate=given.truncate if given else None,
        side=given.side if given else "right",
        is_batch=True,
    )
    source, *others = vectors(found, None, normalize=True)
    return [float(other @ source) for other in others]


async def tokenize(asking: Asking, body: TokenizeRequest) -> Any:
    """The tokens of each text, and where they stand in it."""
    given = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    asking.check_batch(len(given))
    served = asking.model
    prompt = served.prompt(body.prompt_name)
    if (count := sum(map(len, given))) > _CHARACTERS_TO_SHOW:
        raise RequestError(f"`inputs` must have at most {_CHARACTERS_TO_SHOW} characters, got {count}", "Validation")
    texts = [_prompted(prompt, text).text for text in given]
    return await asking.with_spare(partial(served.tokens, texts, body.add_special_tokens))


async def decode(asking: Asking, body: DecodeRequest) -> Any:
    """The text of each list of token ids."""
    given: Any = [body.ids] if body.ids and isinstance(body.ids[0], int) else body.ids
    asking.check_batch(len(given), "ids")
    return await asking.with_spare(partial(asking.model.decoded, given, body.skip_special_tokens))


async def answer_any(asking: Asking, body: AnyRequest) -> Any:
    """What suits the model, and the body."""
    given, raw = body.model_extra or {}, asking.raw
    kind = asking.model.kind
    if "query" in given:
        asking.check_kind(("reranker",), "/rerank")
        return await rerank(asking, parsed(RerankRequest, raw))
    if isinstance(given.get("inputs"), dict):
        asking.check_kind(("embedding",), "/similarity")
        return await similarity(asking, parsed(SimilarityRequest, raw))
    if kind == "embedding":
        return await embed(asking, parsed(EmbedRequest, raw))
    if kind == "sparse":
        return await embed_sparse(asking, parsed(EmbedSparseRequest, raw))
    if given.get("parameters") is not None:
        return await predict_as_hub(asking, parsed(HubRequest, raw))
    return await predict(asking, parsed(PredictRequest, raw))


def inputs_of(asking: Asking, given: str | list[Any], prompt_name: str | None) -> tuple[list[Input], bool]:
    """Texts, with their prompt, or ids; and whether they are a batch.

    Raises:
        RequestError: an empty batch or one that is too large, or a prompt that there is not.
    """
    is_batch = isinstance(given, list) and not (given and isinstance(given[0], int))
    texts: list[Any] = given if is_batch else [given]  # type: ignore[assignment]
    asking.check_batch(len(texts))
    prompt = asking.model.prompt(prompt_name)
    if prompt and not all(isinstance(text, str) for text in texts):
        raise RequestError(f"`inputs` must be texts with the prompt {prompt!r:.80}, got token ids", "Validation")
    return [_prompted(prompt, text) if isinstance(text, str) else tuple(text) for text in texts], is_batch


def check_dimensions(asking: Asking, dimensions: int | None) -> None:
    """Refuses more numbers than a vector has.

    Raises:
        RequestError: there are fewer.
    """
    width = asking.model.model.spec.hidden_size
    if dimensions is not None and dimensions > width:
        raise RequestError(f"`dimensions` must be at most {width}, the model's own, got {dimensions}", "Validation")


def vectors(found: list[Numbers], dimensions: int | None, *, normalize: bool) -> list[Numbers]:
    """Vectors of so many numbers, of length 1 if asked.

    Raises:
        RequestError: a vector that is not finite.
    """
    cut = [_finite(each)[:dimensions] for each in found]
    return [each / max(float(np.linalg.norm(each)), _SHORTEST) for each in cut] if normalize else cut


def info(server: Server, served: Served) -> dict[str, Any]:
    """What /info says of a model."""
    options = server.options
    ids = {str(index): label for index, label in enumerate(served.labels)}
    of_labels = {"id2label": ids, "label2id": {label: index for index, label in enumerate(served.labels)}}
    pooling = "splade" if served.kind == "sparse" else {"first": "cls", "mean": "mean"}[served.pooling]
    is_labelled = served.kind in ("classifier", "reranker")
    return {
        "model_id": served.checkpoint,
        "model_sha": served.revision,
        "model_dtype": str(served.model.dtype).removeprefix("torch."),
        "served_model_name": served.name,
        "model_type": {served.kind: of_labels} if is_labelled else {"embedding": {"pooling": pooling}},
        "max_concurrent_requests": options.max_concurrent_requests,
        "max_input_length": served.limit,
        "max_batch_tokens": options.tokens_per_pass(served.device.type),
        "max_batch_requests": options.max_batch_requests,
        "max_client_batch_size": options.max_client_batch_size,
        "auto_truncate": options.auto_truncate,
        "tokenization_workers": 1,
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }


def _prompted(prompt: str, text: str) -> Item:
    # An empty text stays one, which is refused.
    return Item(prompt + text if text else "", None)


def _item(given: str | Sequence[str]) -> Item:
    text, pair = (given, None) if isinstance(given, str) else (given[0], given[1] if len(given) == 2 else None)
    return Item(text, pair)


def _predictions(asking: Asking, scores: list[float]) -> list[dict[str, Any]]:
    labelled = zip(_finite_scores(scores), asking.model.labels, strict=True)
    return sorted(({"score": score, "label": label} for score, label in labelled), key=lambda each: -each["score"])


def _finite_scores(scores: list[float]) -> list[float]:
    # JSON has no other numbers.
    if not all(map(math.isfinite, scores)):
        raise RequestError("score is NaN or infinite", "Backend")
    return scores


def _finite(numbers: Numbers) -> Numbers:
    if not np.isfinite(numbers).all():
        raise RequestError("embedding is NaN or infinite", "Backend")
    return numbers


def _sparse(weights: Weights) -> list[dict[str, Any]]:
    _finite(weights.values)
    pairs = zip(weights.ids.tolist(), weights.values.tolist(), strict=True)
    return [{"index": index, "value": value} for index, value in pairs]


_LABELLED: tuple[Kind, ...] = ("classifier", "reranker")
ROUTES = (
    Route("/predict", PredictRequest, _LABELLED, predict, "Labels with scores, by a sequence classifier"),
    Route("/rerank", RerankRequest, ("reranker",), rerank, "Texts ranked by a query, by a reranker"),
    Route("/embed", EmbedRequest, ("embedding",), embed, "A vector for each text, by an embedding model"),
    Route("/embed_all", EmbedAllRequest, ("embedding",), embed_all, "A vector for each token, by an embedding model"),
    Route("/embed_sparse", EmbedSparseRequest, ("sparse",), embed_sparse, "Weights of words, by a model for SPLADE"),
    Route("/similarity", SimilarityRequest, ("embedding",), similarity, "Cosines, by an embedding model"),
    Route("/tokenize", TokenizeRequest, (), tokenize, "Texts cut into tokens"),
    Route("/decode", DecodeRequest, (), decode, "Token ids to text"),
)
