"""What is computed of each text, as plain values that any process can be sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

from ..engine.spec import Quantize
from ..flow import LongTextPolicy, LongTexts, WindowScores
from ..labels import ScoreFunction
from ..loading import parse_dtype, parse_quantize
from ..results import Wanted
from .embedder import Pooling


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """What is computed of each text.

    Attributes:
        long_texts, overlap, window_scores: see `LongTextPolicy`.
        max_length: tokens that a text may have; None for what the model takes.
        top_k, threshold, all_scores, logits, prefix: see `Wanted`; of masks ``top_k`` gives so many tokens.
        embeddings: "first" or "mean" gives vectors instead of labels.
        normalize: whether vectors have length 1.
        fill_mask: gives the tokens that fill each text's mask instead of labels.
        function_to_apply: "softmax", "sigmoid" or "none"; None for what the config says.
        device, dtype, quantize: see `Classifier.from_pretrained`.
    """

    long_texts: LongTexts = "truncate"
    max_length: int | None = None
    overlap: int = 64
    window_scores: WindowScores = "mean"
    top_k: int | None = None
    threshold: float | None = None
    all_scores: bool = False
    logits: bool = False
    prefix: str = ""
    embeddings: Pooling | None = None
    normalize: bool = False
    fill_mask: bool = False
    function_to_apply: ScoreFunction | None = None
    device: str | None = None
    dtype: str | None = None
    quantize: Quantize | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> PredictOptions:
        """Options by their names.

        Raises:
            TypeError: one that does not exist.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(f"options must be {', '.join(known)}, got {name}")
        return cls(**options)

    @property
    def policy(self) -> LongTextPolicy:
        return LongTextPolicy(self.long_texts, self.overlap, self.window_scores)

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.top_k, self.all_scores, self.logits, self.threshold, self.prefix)

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of `Classifier.from_pretrained`."""
        return {"device": self.device, "dtype": self.dtype, "quantize": self.quantize}

    def spelled(self, name: str) -> str:
        """An option as its user wrote it, for messages."""
        return name

    def check(self) -> None:
        """Checks what needs no model, and no device of another machine.

        Raises:
            ValueError: options that do not go together, or a value that does not exist.
        """
        spelled = self.spelled
        if self.embeddings is not None and self.embeddings not in get_args(Pooling):
            known = ", ".join(get_args(Pooling))
            raise ValueError(f"{spelled('embeddings')} must be one of {known}, got {self.embeddings!r}")
        if self.embeddings is not None and self.fill_mask:
            raise ValueError(f"{spelled('embeddings')} and {spelled('fill_mask')} ask for two things: leave one out")
        if self.normalize and self.embeddings is None:
            raise ValueError(f"{spelled('normalize')} is for vectors: add {spelled('embeddings')}, or leave it out")
        other = "embeddings" if self.embeddings is not None else "fill_mask" if self.fill_mask else None
        if other is not None:
            for name in ("top_k", "threshold", "all_scores", "logits", "function_to_apply"):
                value = getattr(self, name)
                if value is not None and value is not False and (name != "top_k" or other == "embeddings"):
                    raise ValueError(f"{spelled(name)} is for labels: leave it out with {spelled(other)}")
            if self.long_texts == "window":
                raise ValueError(
                    f"{spelled('long_texts')} must not be window with {spelled(other)}: windows are for labels, "
                    "whose scores can be joined"
                )
        self.policy.check(None, 0)
        parse_dtype(self.dtype), parse_quantize(self.quantize)
