"""A server, asked by the clients that people have: Hugging Face's, OpenAI's, Cohere's, LangChain's and LlamaIndex's."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from serving_support import LABELS, PROMPTS, holding, serving
from support import TINY

import fastcls

TEXTS = ["a good film", "not at all good", "where is it?\nnobody knows", "ok"]
QUERY = "which film is good?"
LONG = "good " * 200
WIDTH = TINY["hidden_size"]
KEY = "a-key"
EXACT = 5e-6


@pytest.fixture(scope="module")
def classifier_url(checkpoints: Callable[[str], Path]) -> Iterator[str]:
    with serving(checkpoints("classifier")) as url:
        yield url


@pytest.fixture(scope="module")
def reranker_url(checkpoints: Callable[[str], Path]) -> Iterator[str]:
    with serving(checkpoints("reranker")) as url:
        yield url


@pytest.fixture(scope="module")
def encoder_url(checkpoints: Callable[[str], Path]) -> Iterator[str]:
    with serving(checkpoints("embedding")) as url:
        yield url


@pytest.fixture(scope="module")
def classifier(checkpoints: Callable[[str], Path]) -> fastcls.Classifier:
    return fastcls.Classifier.from_pretrained(str(checkpoints("classifier")), truncation=True)


@pytest.fixture(scope="module")
def encoder(checkpoints: Callable[[str], Path]) -> Any:
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    return fastcls.optimize(library.SentenceTransformer(str(checkpoints("embedding")), device="cpu"))


@pytest.fixture(scope="module")
def scores(checkpoints: Callable[[str], Path]) -> list[float]:
    """Of each text, by the reranker itself."""
    reranker = fastcls.Classifier.from_pretrained(str(checkpoints("reranker")), truncation=True)
    return [each["score"] for each in reranker([(QUERY, text) for text in TEXTS])]


def close(found: Any, expected: Any) -> None:
    found = np.asarray(found, np.float32)
    assert found.shape == np.shape(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=EXACT)


def vectors(encoder: Any, texts: str | list[str], dimensions: int = WIDTH, **options: Any) -> NDArray[np.float32]:
    """Those of the encoder itself, of length 1."""
    found: NDArray[np.float32] = encoder.encode(texts, **options)[..., :dimensions]
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


# Hugging Face


@pytest.fixture
def hub() -> Callable[[str], Any]:
    library = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    return lambda url: library.InferenceClient(model=url)


@pytest.mark.parametrize("function", [None, "softmax", "sigmoid", "none"])
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_hub_text_classification(
    hub: Callable[[str], Any],
    classifier_url: str,
    classifier: fastcls.Classifier,
    function: Any,
    top_k: int | None,
) -> None:
    found = hub(classifier_url).text_classification(TEXTS[0], top_k=top_k, function_to_apply=function)
    (expected,) = classifier([TEXTS[0]], top_k=None, function_to_apply=function)
    assert isinstance(found, list)
    assert [each.label for each in found] == [each["label"] for each in expected][:top_k]
    close([each.score for each in found], [each["score"] for each in expected][:top_k])


def test_hub_text_classification_in_the_form_of_text_embeddings_inference(
    hub: Callable[[str], Any], classifier_url: str, classifier: fastcls.Classifier
) -> None:
    # The client takes the first element of the answer for the list of labels.
    best = hub(f"{classifier_url}/predict").text_classification(TEXTS[0])
    (expected,) = classifier([TEXTS[0]])
    assert best.label == expected["label"]


@pytest.mark.parametrize("given", [TEXTS[0], TEXTS], ids=["text", "list"])
@pytest.mark.parametrize("route", ["", "/embed"])
def test_hub_feature_extraction(
    hub: Callable[[str], Any], encoder_url: str, encoder: Any, given: str | list[str], route: str
) -> None:
    found = hub(encoder_url + route).feature_extraction(given)
    close(found, vectors(encoder, [given] if isinstance(given, str) else given))


def test_hub_feature_extraction_without_a_length_of_one(
    hub: Callable[[str], Any], encoder_url: str, encoder: Any
) -> None:
    expected = encoder.encode(TEXTS)
    found = hub(encoder_url).feature_extraction(TEXTS, normalize=False)
    np.testing.assert_allclose(found, expected, rtol=0, atol=EXACT * float(np.abs(expected).max()))
    assert not np.allclose(np.linalg.norm(found, axis=1), 1)


@pytest.mark.parametrize("prompt", sorted(PROMPTS))
def test_hub_feature_extraction_by_prompts(
    hub: Callable[[str], Any], encoder_url: str, encoder: Any, prompt: str
) -> None:
    found = hub(encoder_url).feature_extraction(TEXTS, prompt_name=prompt, dimensions=17)
    close(found, vectors(encoder, TEXTS, 17, prompt_name=prompt))
    assert not np.allclose(found, vectors(encoder, TEXTS, 17), atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_hub_feature_extraction_cuts_texts(
    hub: Callable[[str], Any], encoder_url: str, encoder: Any, side: str
) -> None:
    text = f"{'film ' * 60}{LONG}"
    found = hub(encoder_url).feature_extraction(text, truncate=True, truncation_direction=side)
    tokenizer = encoder.tokenizer
    kept = tokenizer.tokenize(text)
    kept = kept[:94] if side == "right" else kept[-94:]
    close(found, vectors(encoder, [" ".join(kept)]))


def test_hub_errors_are_its_own(hub: Callable[[str], Any], encoder_url: str) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    for options, status in (
        ({"text": LONG, "truncate": False}, 413),
        ({"text": "", "truncate": True}, 400),
        ({"text": TEXTS, "prompt_name": "no such"}, 413),
        ({"text": TEXTS, "dimensions": WIDTH + 1}, 413),
        ({"text": TEXTS, "dimensions": "17"}, 422),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            hub(encoder_url).feature_extraction(**options)
        assert error.value.response.status_code == status


def test_hub_sentence_similarity(hub: Callable[[str], Any], encoder_url: str, encoder: Any) -> None:
    found = hub(encoder_url).sentence_similarity(TEXTS[0], TEXTS[1:])
    close(found, vectors(encoder, TEXTS[1:]) @ vectors(encoder, TEXTS[0]))


# OpenAI


@pytest.fixture
def openai() -> Any:
    return pytest.importorskip("openai", reason="openai is not installed")


def openai_client(openai: Any, url: str, key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


@pytest.mark.parametrize("form", ["text", "list", "ids", "lists of ids"])
@pytest.mark.parametrize("encoding", ["default", "float", "base64"])
@pytest.mark.parametrize("dimensions", [None, 17])
def test_openai_embeddings(
    openai: Any, encoder_url: str, encoder: Any, form: str, encoding: str, dimensions: int | None
) -> None:
    given: Any = TEXTS if "list" in form else TEXTS[0]
    if "ids" in form:
        given = encoder.tokenizer(given)["input_ids"]
    options: dict[str, Any] = {} if encoding == "default" else {"encoding_format": encoding}
    options |= {} if dimensions is None else {"dimensions": dimensions}
    answer = openai_client(openai, encoder_url).embeddings.create(model="tiny-embedding", input=given, **options)
    texts = TEXTS if "list" in form else TEXTS[:1]
    found = [each.embedding for each in answer.data]
    if encoding == "base64":
        assert all(isinstance(each, str) for each in found)
        found = [np.frombuffer(base64.b64decode(each), "<f4") for each in found]
    close(found, vectors(encoder, texts, dimensions or WIDTH))
    assert [each.index for each in answer.data] == list(range(len(texts)))
    assert answer.model == "tiny-embedding"
    assert answer.usage.prompt_tokens == sum(map(len, encoder.tokenizer(texts)["input_ids"]))


def test_openai_lists_models(openai: Any, checkpoints: Callable[[str], Path]) -> None:
    with serving(checkpoints("embedding"), checkpoints("classifier"), api_key=KEY) as url:
        found = openai_client(openai, url, KEY).models.list().data
        assert [(each.id, each.object) for each in found] == [("tiny-embedding", "model"), ("tiny-classifier", "model")]
        with pytest.raises(openai.AuthenticationError):
            openai_client(openai, url).models.list()


@pytest.mark.parametrize(
    ("given", "options", "status", "name", "kind"),
    [
        ([], {}, 400, "BadRequestError", "Empty"),
        ("", {}, 400, "BadRequestError", "Empty"),
        (["ok"] * 33, {}, 413, "APIStatusError", "Validation"),
        ("ok", {"dimensions": WIDTH + 1}, 413, "APIStatusError", "Validation"),
        ([10**6], {}, 422, "UnprocessableEntityError", "Tokenizer"),
        ([1.5], {}, 422, "UnprocessableEntityError", "Validation"),
        ("ok", {"encoding_format": "int8"}, 422, "UnprocessableEntityError", "Validation"),
    ],
    ids=["no text", "empty", "too many", "too wide", "unknown id", "no id", "encoding"],
)
def test_openai_errors_are_its_own(
    openai: Any, encoder_url: str, given: Any, options: dict[str, Any], status: int, name: str, kind: str
) -> None:
    with pytest.raises(getattr(openai, name)) as error:
        openai_client(openai, encoder_url).embeddings.create(model="any", input=given, **options)
    assert error.value.status_code == int(error.value.code) == status
    assert error.value.type == error.value.body["error_type"] == kind
    assert error.value.body["message"] in str(error.value)


def test_openai_errors_of_keys_models_and_kinds(openai: Any, checkpoints: Callable[[str], Path]) -> None:
    with serving(checkpoints("classifier"), api_key=KEY) as url:
        with pytest.raises(openai.AuthenticationError):
            openai_client(openai, url).embeddings.create(model="any", input="ok")
        with pytest.raises(openai.APIStatusError) as error:
            openai_client(openai, url, KEY).embeddings.create(model="any", input="ok")
        assert (error.value.status_code, error.value.type) == (424, "Backend")
    with (
        serving(*[checkpoints("embedding")] * 2, names=["one", "two"]) as url,
        pytest.raises(openai.NotFoundError, match="one, two"),
    ):
        openai_client(openai, url).embeddings.create(model="three", input="ok")


def test_openai_is_told_that_the_server_is_busy(
    openai: Any, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(checkpoints("embedding"), max_concurrent_requests=1) as url, ThreadPoolExecutor(1) as pool:
        client = openai_client(openai, url)
        with holding(monkeypatch) as begun:
            first = pool.submit(client.embeddings.create, model="any", input="ok")
            assert begun.wait(60)
            with pytest.raises(openai.RateLimitError) as error:
                client.embeddings.create(model="any", input="ok")
        assert error.value.type == "Overloaded"
        assert int(error.value.response.headers["retry-after"]) > 0
        assert len(first.result().data) == 1


# Cohere


@pytest.fixture
def cohere() -> Any:
    return pytest.importorskip("cohere", reason="cohere is not installed")


def cohere_client(cohere: Any, name: str, url: str, key: str = "none") -> Any:
    return getattr(cohere, name)(api_key=key, base_url=url, max_retries=0)


CLIENTS = pytest.mark.parametrize("name", ["Client", "ClientV2"])


@CLIENTS
@pytest.mark.parametrize("top_n", [None, 2, 9])
def test_cohere_rerank(cohere: Any, reranker_url: str, scores: list[float], name: str, top_n: int | None) -> None:
    options = {} if top_n is None else {"top_n": top_n}
    client = cohere_client(cohere, name, reranker_url)
    answer = client.rerank(model="any", query=QUERY, documents=TEXTS, **options)
    best = sorted(range(len(TEXTS)), key=lambda index: -scores[index])[:top_n]
    assert [each.index for each in answer.results] == best
    close([each.relevance_score for each in answer.results], [scores[index] for index in best])
    assert answer.meta.api_version.version == ("2" if name == "ClientV2" else "1")


@pytest.mark.parametrize("as_objects", [False, True], ids=["texts", "objects"])
def test_cohere_returns_documents(cohere: Any, reranker_url: str, as_objects: bool) -> None:
    documents: Any = [{"text": text} for text in TEXTS] if as_objects else TEXTS
    client = cohere_client(cohere, "Client", reranker_url)
    answer = client.rerank(query=QUERY, documents=documents, return_documents=True, rank_fields=["text"])
    assert [each.document.text for each in answer.results] == [TEXTS[each.index] for each in answer.results]
    without = client.rerank(query=QUERY, documents=documents, return_documents=False)
    assert [each.document for each in without.results] == [None] * len(TEXTS)


@CLIENTS
def test_cohere_errors_are_its_own(
    cohere: Any, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    chunks = {"max_chunks_per_doc" if name == "Client" else "max_tokens_per_doc": 5}
    reranker = checkpoints("reranker")
    with serving(reranker, max_concurrent_requests=1, api_key=KEY) as url, ThreadPoolExecutor(1) as pool:
        client = cohere_client(cohere, name, url, KEY)
        for options, error, status in (
            ({"documents": []}, cohere.BadRequestError, 400),
            ({"documents": TEXTS, **chunks}, cohere.UnprocessableEntityError, 422),
            ({"documents": [1]}, cohere.UnprocessableEntityError, 422),
            ({"documents": ["ok"] * 33}, cohere.core.ApiError, 413),
        ):
            with pytest.raises(error) as raised:
                client.rerank(model="any", query=QUERY, **options)
            assert raised.value.status_code == raised.value.body["code"] == status
        with pytest.raises(cohere.UnauthorizedError):
            cohere_client(cohere, name, url).rerank(model="any", query=QUERY, documents=TEXTS)
        with holding(monkeypatch) as begun:
            first = pool.submit(client.rerank, model="any", query=QUERY, documents=TEXTS)
            assert begun.wait(60)
            with pytest.raises(cohere.TooManyRequestsError):
                client.rerank(model="any", query=QUERY, documents=TEXTS)
        assert len(first.result().results) == len(TEXTS)


# LangChain and LlamaIndex


def test_langchain_embeddings(encoder_url: str, encoder: Any) -> None:
    library = pytest.importorskip("langchain_huggingface", reason="langchain-huggingface is not installed")
    embeddings = library.HuggingFaceEndpointEmbeddings(model=encoder_url)
    # It takes lines for words.
    expected = vectors(encoder, [text.replace("\n", " ") for text in TEXTS])
    close(embeddings.embed_documents(TEXTS), expected)
    close(embeddings.embed_query(TEXTS[0]), expected[0])
    close(asyncio.run(embeddings.aembed_documents(TEXTS)), expected)
    with_prompt = library.HuggingFaceEndpointEmbeddings(model=encoder_url, model_kwargs={"prompt_name": "query"})
    close(with_prompt.embed_query(TEXTS[0]), vectors(encoder, TEXTS[0], prompt_name="query"))


def test_llama_index_embeddings(encoder_url: str, encoder: Any) -> None:
    reason = "llama-index-embeddings-text-embeddings-inference is not installed"
    library = pytest.importorskip("llama_index.embeddings.text_embeddings_inference", reason=reason)
    embeddings = library.TextEmbeddingsInference(
        model_name="tiny", base_url=encoder_url, query_instruction=PROMPTS["query"].strip(), embed_batch_size=3
    )
    documents, query = vectors(encoder, TEXTS), vectors(encoder, QUERY, prompt_name="query")
    close(embeddings.get_text_embedding(TEXTS[0]), documents[0])
    close(embeddings.get_text_embedding_batch(TEXTS), documents)
    close(embeddings.get_query_embedding(QUERY), query)

    async def asked() -> tuple[Any, Any, Any]:
        return (
            await embeddings.aget_text_embedding(TEXTS[0]),
            await embeddings.aget_text_embedding_batch(TEXTS),
            await embeddings.aget_query_embedding(QUERY),
        )

    for found, expected in zip(asyncio.run(asked()), (documents[0], documents, query), strict=True):
        close(found, expected)


def test_labels_are_the_checkpoints_own(hub: Callable[[str], Any], classifier_url: str) -> None:
    assert {each.label for each in hub(classifier_url).text_classification("ok")} == set(LABELS)
