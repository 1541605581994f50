"""Requests and answers, as text-embeddings-inference, OpenAI, Cohere and Hugging Face's hub have them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from .errors import ErrorType

# What a tokenizer holds, and more.
_Id: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]
# A list of a million wrong things is wrong once: an error for each would take seconds to make.
_Ids: TypeAlias = Annotated[list[_Id], Field(fail_fast=True)]
_Texts: TypeAlias = Annotated[list[str], Field(fail_fast=True)]
_OneOrTwo: TypeAlias = Annotated[list[str], Field(min_length=1, max_length=2, fail_fast=True)]
_Direction: TypeAlias = Literal["left", "right", "Left", "Right"]
_Input: TypeAlias = str | _Ids | Annotated[list[str | _Ids], Field(fail_fast=True)]

_INPUT = "a string, a list of token ids, or a list of these"


class Body(BaseModel):
    """A request's body. Keys that no field has are left alone, as text-embeddings-inference does.

    Attributes:
        expected: what a field must be, where it may be several things.
    """

    model_config = ConfigDict(strict=True)
    expected: ClassVar[dict[str, str]] = {}


class _Truncated(Body):
    truncate: bool | None = Field(None, description="Cut texts that are too long; null is the server's auto_truncate.")
    truncation_direction: _Direction = "right"

    @property
    def side(self) -> Literal["left", "right"]:
        """Where texts are cut."""
        return "left" if self.truncation_direction.lower() == "left" else "right"


class PredictRequest(_Truncated):
    """Texts or pairs to classify."""

    expected = {
        "inputs": "a string, a pair of strings [string, string], or a batch of strings and pairs "
        "[[string], [string, string], ...]"
    }
    inputs: str | _OneOrTwo | Annotated[list[_OneOrTwo], Field(fail_fast=True)] = Field(
        description="A text, a pair [text, text], or a batch [[text], [text, text], ...].",
        examples=["What is Deep Learning?"],
    )
    raw_scores: bool = Field(False, description="Logits instead of scores.")


class RerankRequest(_Truncated):
    """A query, and texts to rank by it."""

    query: str = Field(examples=["What is Deep Learning?"])
    texts: _Texts = Field(examples=[["Deep Learning is ..."]])
    raw_scores: bool = Field(False, description="Logits instead of scores.")
    return_text: bool = False


class _Prompted(_Truncated):
    prompt_name: str | None = Field(None, description="What stands before each text, by its name in the checkpoint.")


class EmbedAllRequest(_Prompted):
    """Texts to embed, a vector for each token."""

    expected = {"inputs": _INPUT}
    inputs: _Input = Field(examples=["What is Deep Learning?"])


class EmbedSparseRequest(EmbedAllRequest):
    """Texts to embed, a weight for each word."""


class EmbedRequest(EmbedAllRequest):
    """Texts to embed, a vector each."""

    normalize: bool = Field(True, description="Vectors of length 1.")
    dimensions: int | None = Field(None, ge=1, description="The first so many numbers of each vector.")


class SimilarityInput(Body):
    """A sentence, and others."""

    source_sentence: str = Field(examples=["What is Deep Learning?"])
    sentences: _Texts = Field(examples=[["What is Machine Learning?"]])


class SimilarityRequest(Body):
    """A sentence to compare with others."""

    inputs: SimilarityInput
    parameters: _Prompted | None = None


class TokenizeRequest(Body):
    """Texts to cut into tokens."""

    expected = {"inputs": "a string or a list of strings"}
    inputs: str | _Texts = Field(examples=["What is Deep Learning?"])
    add_special_tokens: bool = True
    prompt_name: str | None = None


class DecodeRequest(Body):
    """Token ids to text."""

    expected = {"ids": "a list of token ids, or a list of such lists"}
    ids: _Ids | Annotated[list[_Ids], Field(fail_fast=True)] = Field(examples=[[101, 2054, 102]])
    skip_special_tokens: bool = True


class OpenAIRequest(Body):
    """Texts to embed, as OpenAI has it."""

    expected = {"input": _INPUT}
    input: _Input = Field(examples=["What is Deep Learning?"])
    model: str | None = Field(None, description="Which model, where several are served that embed.")
    user: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)


class _Document(Body):
    text: str


class DocumentsRequest(Body):
    """A query, and documents to rank by it, as Cohere and Jina have it."""

    expected = {"documents": 'a list of strings, or of objects with "text"'}
    query: str = Field(examples=["What is Deep Learning?"])
    documents: Annotated[list[str | _Document], Field(fail_fast=True)] = Field(examples=[["Deep Learning is ..."]])
    model: str | None = Field(None, description="Which model, where several are served that rank.")
    top_n: int | None = Field(None, ge=1, description="The best so many; null is all.")
    return_documents: bool | None = None
    rank_fields: _Texts | None = Field(None, description='Must be null or ["text"].')
    max_chunks_per_doc: int | None = Field(None, description="Must be null: documents are cut, not chunked.")
    max_tokens_per_doc: int | None = Field(None, description="Must be null: see the server's max_input_length.")


class HubParameters(Body):
    """What Hugging Face's hub takes beside a text to classify."""

    model_config = ConfigDict(strict=True, extra="forbid")
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    top_k: int | None = Field(None, ge=1)


class HubRequest(Body):
    """A text to classify, as Hugging Face's hub has it."""

    expected = {"inputs": "a string: for a batch leave parameters out, and pass [[string], [string], ...]"}
    inputs: str
    parameters: HubParameters


class AnyRequest(Body):
    """The body of the route that suits the model: see /predict, /rerank, /embed, /embed_sparse and /similarity."""

    model_config = ConfigDict(strict=True, extra="allow")


class Prediction(BaseModel):
    """A label with its score."""

    score: float
    label: str


class Rank(BaseModel):
    """A text's place, with its score."""

    index: int
    score: float
    text: str | None = None


class SparseValue(BaseModel):
    """A word's weight."""

    index: int
    value: float


class Token(BaseModel):
    """A token, and where in the text's UTF-8 it stands, in bytes."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class OpenAIEmbedding(BaseModel):
    """A text's vector: numbers, or the base64 of its float32 bytes."""

    object: Literal["embedding"]
    embedding: list[float] | str
    index: int


class Usage(BaseModel):
    """The tokens of a request."""

    prompt_tokens: int
    total_tokens: int


class OpenAIAnswer(BaseModel):
    """The vectors of a request."""

    object: Literal["list"]
    data: list[OpenAIEmbedding]
    model: str
    usage: Usage


class DocumentRank(BaseModel):
    """A document's place, with its score."""

    index: int
    relevance_score: float
    document: dict[str, str] | None = None


class DocumentsAnswer(BaseModel):
    """Documents, the best one first."""

    id: str
    model: str
    results: list[DocumentRank]
    usage: Usage
    meta: dict[str, Any]


class Info(BaseModel):
    """What is served."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    served_model_name: str
    model_type: dict[str, Any]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None
    docker_label: str | None


class ListedModel(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: Literal["classifier", "reranker", "embedding", "sparse"]


class Models(BaseModel):
    """The models that are served."""

    object: Literal["list"]
    data: list[ListedModel]


class ErrorAnswer(BaseModel):
    """Why a request was not answered."""

    error: str
    error_type: ErrorType


class OpenAIError(BaseModel):
    """Why a request of OpenAI's or Cohere's kind was not answered."""

    message: str
    code: int
    type: ErrorType
    error_type: ErrorType
