"""BERT-style classifiers that compute only what the label needs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .classifier import Classifier
    from .model import FastClassifier, optimize

__version__ = "0.1.0"

__all__ = ["Classifier", "FastClassifier", "optimize"]

_HOMES = {"Classifier": ".classifier", "FastClassifier": ".model", "optimize": ".model"}


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import: only what is used pays for it, so that `fastcls --help` answers at once.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value
