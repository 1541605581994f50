"""What is refused, in the words and with the status codes of text-embeddings-inference."""

from __future__ import annotations

from typing import Literal, TypeAlias

ErrorType: TypeAlias = Literal["Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer", "Empty"]

STATUS: dict[ErrorType, int] = {
    "Unhealthy": 503,
    "Backend": 424,
    "Overloaded": 429,
    "Validation": 413,
    "Tokenizer": 422,
    "Empty": 400,
}


class RequestError(Exception):
    """A request that is not answered.

    Attributes:
        message: why, in a sentence for its sender, without texts of anybody else's.
        error_type: the kind, by text-embeddings-inference's name.
        status: the HTTP status, which is the kind's own unless HTTP has one that says more.
        reason: a word for metrics.
    """

    def __init__(self, message: str, error_type: ErrorType, status: int | None = None, *, reason: str = "") -> None:
        super().__init__(message)
        self.message, self.error_type = message, error_type
        self.status = STATUS[error_type] if status is None else status
        self.reason = reason or error_type.lower()


def overloaded(why: str) -> RequestError:
    return RequestError(f"Model is overloaded: {why}", "Overloaded")
