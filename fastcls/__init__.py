"""BERT-style encoders that compute only what their answer needs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .classifier import Classifier
    from .conversion import optimize
    from .heads.inside import optimize_encoder
    from .heads.several import MultiHead, optimize_heads
    from .integrations.transformers_attention import register_attention
    from .models import (
        FastClassifier,
        FastEncoder,
        FastMaskedLM,
        FastMultipleChoice,
        FastNextSentencePredictor,
        FastQuestionAnswerer,
        FastTokenClassifier,
    )

__version__ = "0.1.0"

__all__ = [
    "Classifier",
    "FastClassifier",
    "FastEncoder",
    "FastMaskedLM",
    "FastMultipleChoice",
    "FastNextSentencePredictor",
    "FastQuestionAnswerer",
    "FastTokenClassifier",
    "MultiHead",
    "optimize",
    "optimize_encoder",
    "optimize_heads",
    "register_attention",
]

_HOMES = {
    "Classifier": ".classifier",
    "MultiHead": ".heads.several",
    "optimize": ".conversion",
    "optimize_encoder": ".heads.inside",
    "optimize_heads": ".heads.several",
    "register_attention": ".integrations.transformers_attention",
}


def __getattr__(name: str) -> Any:
    # Importing transformers takes seconds: names are imported when used, so that `fastcls --help` answers at once.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, ".models"), __name__), name)
    globals()[name] = value
    return value
