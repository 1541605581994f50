"""What a server is asked to be, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from ..engine.spec import Quantize
from ..loading import parse_dtype, parse_quantize
from ..texts import read_count

PoolingName: TypeAlias = Literal["cls", "mean", "splade"]

# On a GPU a pass gains from every token; on a CPU nothing is gained beyond some hundreds, and whoever comes meanwhile
# waits for the pass to end.
_TOKENS_A_PASS = {"cpu": 1024, "cuda": 16_384}


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How models are loaded.

    Attributes:
        device, dtype, quantize, batch_invariant: see `Classifier.from_pretrained`.
        pooling: of encoders, "cls" or "mean"; of masked language models "splade". None is what a checkpoint says.
        default_prompt_name, default_prompt: stands before each text that is embedded, by its name in the checkpoint's
            config_sentence_transformers.json, or itself.
        max_input_length: tokens that a text may have, special ones included; None is what sentence-transformers' files
            say of an encoder, else the tokenizer's limit, and at most the model's positions.
        one_encoder: the models are sequence classifiers that were trained on one frozen encoder, which is computed once
            for all of them; see `optimize_heads`.
        revision: the commit, branch or tag of a name on the hub.

    Raises:
        ValueError: a value that does not exist, or options that do not go together.
    """

    device: str | None = None
    dtype: str | None = None
    quantize: Quantize | None = None
    batch_invariant: bool = False
    pooling: PoolingName | None = None
    default_prompt_name: str | None = None
    default_prompt: str | None = None
    max_input_length: int | None = None
    one_encoder: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        parse_dtype(self.dtype)
        parse_quantize(self.quantize)
        if self.pooling is not None and self.pooling not in get_args(PoolingName):
            raise ValueError(f"pooling must be one of {', '.join(get_args(PoolingName))}, got {self.pooling!r}")
        if self.max_input_length is not None:
            read_count("max_input_length", self.max_input_length)
        if self.one_encoder and self.batch_invariant:
            raise ValueError("batch_invariant must be left out with one_encoder, which does not compute so")
        if self.default_prompt is not None and self.default_prompt_name is not None:
            raise ValueError("default_prompt and default_prompt_name say the same thing twice: leave one out")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What a server takes, and how it computes.

    Attributes:
        max_concurrent_requests: that are answered at once; a further one is refused with status 429.
        max_batch_tokens: tokens in a pass, unless a text alone has more; None suits the device.
        max_batch_requests: texts in a pass; None for any number.
        max_client_batch_size: texts in a request.
        payload_limit: bytes of a request's body.
        auto_truncate: whether texts that are too long are cut where a request does not say.
        deadline: seconds in which a request that is taken is to be answered. One that would wait for half of it, by the
            pace of the passes before, is refused at once with status 429; so is one that turns out to be late, unless
            some of it is computed already.
        body_timeout: seconds in which a request's body has to come.
        api_key: what clients send as "Authorization: Bearer KEY"; None asks for nothing.
        cors_allow_origin: the origins of pages that may ask; "*" is any.
        ui: whether GET / is a page to look at.

    Raises:
        ValueError: a value that is out of range.
    """

    max_concurrent_requests: int = 512
    max_batch_tokens: int | None = None
    max_batch_requests: int | None = None
    max_client_batch_size: int = 32
    payload_limit: int = 2_000_000
    auto_truncate: bool = True
    deadline: float = 10.0
    body_timeout: float = 30.0
    api_key: str | None = None
    cors_allow_origin: tuple[str, ...] = ("*",)
    ui: bool = True

    def __post_init__(self) -> None:
        for name in ("max_concurrent_requests", "max_client_batch_size", "payload_limit"):
            read_count(name, getattr(self, name))
        for name in ("max_batch_tokens", "max_batch_requests"):
            if getattr(self, name) is not None:
                read_count(name, getattr(self, name))
        for name in ("deadline", "body_timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a positive number of seconds, got {getattr(self, name)!r}")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("api_key must be printable ASCII, which is what a header holds, and not empty")

    def tokens_per_pass(self, device: str) -> int:
        """``max_batch_tokens``, or what suits a device's type."""
        return self.max_batch_tokens or _TOKENS_A_PASS.get(device, _TOKENS_A_PASS["cpu"])
