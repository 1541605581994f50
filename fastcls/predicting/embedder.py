"""Texts to vectors: an encoder with its tokenizer, and the columns of vectors."""

from __future__ import annotations

from typing import Literal

import pyarrow as pa
import torch
from torch import Tensor

from ..conversion import optimize
from ..engine.spec import Quantize
from ..flow import Flow, LongTextPolicy, Scored
from ..loading import load_model, load_tokenizer, parse_device, parse_dtype
from ..models import FastEncoder
from ..tokenizing import Ids, read_cut
from .sentence_config import read_sentence_config

Pooling = Literal["first", "mean"]


class Embedder:
    """An encoder that gives a vector for each text.

    Args:
        name: a folder with a checkpoint, or a name on the hub.
        pooling: "first" for the first token's ([CLS]), "mean" for the mean over a text's tokens.
        normalize: whether vectors have length 1.
        prefix: stands before the column's name.
        device, dtype, quantize: see `Classifier.from_pretrained`.

    Attributes:
        answers: makes the column of vectors.

    Raises:
        ValueError, TypeError, OSError: as `Classifier.from_pretrained`; a checkpoint of sentence-transformers that
            pools otherwise, or has further layers.
    """

    def __init__(
        self,
        name: str,
        pooling: Pooling,
        *,
        normalize: bool = False,
        prefix: str = "",
        device: str | None = None,
        dtype: str | None = None,
        quantize: Quantize | None = None,
    ) -> None:
        _check_sentence_model(name, pooling)
        self._pooling, self._normalize = pooling, normalize
        self._tokenizer = load_tokenizer(name)
        model = load_model(name, parse_device(device), parse_dtype(dtype), task="encoder")
        fast = optimize(model, select="first", quantize=quantize, release=True)
        assert isinstance(fast, FastEncoder)
        self._model = fast
        self.answers = Vectors(fast.width, prefix)

    def flow(self, policy: LongTextPolicy, max_length: int | None) -> Flow:
        """Windows of texts to vectors."""
        cut = read_cut(self._tokenizer, self._model.spec.max_positions, True, None, max_length)
        return Flow(self._model, self._tokenizer, self._vectors, self._scaled, cut, policy)

    def _vectors(self, ids: list[Ids], types: list[Ids]) -> Tensor:
        return self._model.embeddings_of(ids, types, pooling=self._pooling)

    def _scaled(self, vectors: Tensor) -> Tensor:
        return torch.nn.functional.normalize(vectors, dim=1) if self._normalize else vectors


class Vectors:
    """Makes columns of an embedder's numbers: "embedding", a list of so many float32 a text.

    Args:
        width: of a vector.
        prefix: stands before the column's name.
    """

    def __init__(self, width: int, prefix: str = "") -> None:
        self.prefix = prefix
        self.schema = pa.schema([(f"{prefix}embedding", pa.list_(pa.float32(), width))])
        self._width = width

    def columns_of(self, scored: Scored) -> pa.RecordBatch:
        """The column of a window's vectors."""
        flat = pa.array(scored.scores.flatten().numpy())
        absent = torch.zeros(len(scored.scores), dtype=torch.bool)
        absent[scored.missing] = True
        column = pa.FixedSizeListArray.from_arrays(flat, self._width, mask=pa.array(absent.numpy()))
        return pa.RecordBatch.from_arrays([column], schema=self.schema)


def _check_sentence_model(name: str, pooling: Pooling) -> None:
    """Checks that a checkpoint of sentence-transformers asks for this pooling and nothing more but a length of 1."""
    config = read_sentence_config(name)
    if config is None:
        return
    if config.pooling not in (None, pooling):
        raise ValueError(f"embeddings must be {config.pooling} for {name}, which pools so, got {pooling}")
    if config.further:
        raise ValueError(f"{name} must give its vectors by pooling alone, got a further layer, {config.further[0]}")
