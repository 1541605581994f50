"""Texts with a masked token to the tokens that fill it: a masked language model with its tokenizer."""

from __future__ import annotations

from functools import partial
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..conversion import optimize
from ..engine.batch import outside
from ..engine.spec import Quantize
from ..flow import Flow, LongTextPolicy, Scored
from ..loading import load_model, load_tokenizer, parse_device, parse_dtype
from ..models import FastMaskedLM
from ..texts import read_count
from ..tokenizing import Ids, read_cut
from .padded import groups_of, padded

# A pass has at most so many texts, each of which needs a number for every word, and tokens.
_TEXTS_AT_ONCE, _TOKENS_AT_ONCE = 256, 16_384


class MaskFiller:
    """A masked language model that fills the one mask of each text. A text with no mask, or several, is a problem.

    Args:
        name: a folder with a checkpoint, or a name on the hub.
        top_k: how many tokens; None for the best one.
        prefix: stands before the columns' names.
        device, dtype, quantize: see `Classifier.from_pretrained`.

    Attributes:
        answers: makes the columns of tokens.

    Raises:
        ValueError, TypeError, OSError: as `Classifier.from_pretrained`; a tokenizer without a mask, a ``top_k`` that is
            no count.
    """

    def __init__(
        self,
        name: str,
        top_k: int | None = None,
        *,
        prefix: str = "",
        device: str | None = None,
        dtype: str | None = None,
        quantize: Quantize | None = None,
    ) -> None:
        self._tokenizer = load_tokenizer(name)
        mask = self._tokenizer.mask_token_id
        if mask is None:
            raise ValueError(f"{name} must have a tokenizer with a mask token, got {type(self._tokenizer).__name__}")
        model = load_model(name, parse_device(device), parse_dtype(dtype), task="masked language modelling")
        fast = optimize(model, quantize=quantize, release=True)
        assert isinstance(fast, FastMaskedLM)
        fast.mask_token_id, fast.dense = mask, False
        self._model, self._mask, self._top_k = fast, int(mask), top_k
        self.answers = Fills(self._tokenizer, top_k, prefix)

    def flow(self, policy: LongTextPolicy, max_length: int | None) -> Flow:
        """Windows of texts to scores and ids of tokens."""
        cut = read_cut(self._tokenizer, self._model.spec.max_positions, True, None, max_length)
        compute = partial(_fills, self._model, min(self._top_k or 1, self._model.spec.vocab_size))
        return Flow(self._model, self._tokenizer, compute, _as_they_are, cut, policy, problem_of=self._problem)

    def _problem(self, ids: Ids) -> str | None:
        size = self._model.spec.vocab_size
        if int(ids.max()) >= size:
            return outside(next(int(token) for token in ids if token >= size), size)
        count, mask = int((ids == self._mask).sum()), self._tokenizer.mask_token
        return None if count == 1 else f"must have one {mask} within the tokens that are computed, got {count}"


class Fills:
    """Makes columns of a mask filler's numbers.

    The columns are "token_str" (string), "token" (int32, its id) and "score" (float32, its probability); with ``top_k``
    instead of them "fills", a list of structs with these fields, best first. They are named as in transformers'
    fill-mask pipeline.

    Args:
        tokenizer: knows the tokens.
        top_k: how many for each text; None for the best one.
        prefix: stands before the columns' names.

    Raises:
        ValueError: a ``top_k`` that is no count.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, top_k: int | None = None, prefix: str = "") -> None:
        self._top_k = None if top_k is None else read_count("top_k", top_k)
        fields: list[Any] = [("token_str", pa.string()), ("token", pa.int32()), ("score", pa.float32())]
        if top_k is not None:
            fields = [("fills", pa.list_(pa.struct(fields)))]
        self.prefix, self._tokenizer = prefix, tokenizer
        self.schema = pa.schema([(f"{prefix}{name}", kind) for name, kind in fields])
        # Of the ids seen so far: to decode a whole vocabulary takes seconds.
        self._words: dict[int, str] = {}

    def _word(self, token: int) -> str:
        if token not in self._words:
            self._words[token] = str(self._tokenizer.decode([token]))
        return self._words[token]

    def columns_of(self, scored: Scored) -> pa.RecordBatch:
        """The columns of a window's tokens."""
        scores, ids = scored.numbers.chunk(2, dim=1)
        absent = torch.zeros(len(scores), dtype=torch.bool)
        absent[scored.missing] = True
        count = scores.shape[1]
        null = absent.repeat_interleave(count).numpy()
        tokens = pa.array(ids.nan_to_num().flatten().int().numpy(), mask=null)
        words = pa.array([None if token is None else self._word(token) for token in tokens.to_pylist()], pa.string())
        columns = [words, tokens, pa.array(scores.flatten().numpy(), mask=null, from_pandas=False)]
        if self._top_k is not None:
            structs = pa.StructArray.from_arrays(columns, names=["token_str", "token", "score"])
            ends = torch.arange(0, count * len(scores) + 1, count, dtype=torch.int32)
            columns = [pa.ListArray.from_arrays(pa.array(ends.numpy()), structs, mask=pa.array(absent.numpy()))]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


def _as_they_are(numbers: Tensor) -> Tensor:
    return numbers


def _fills(model: FastMaskedLM, top_k: int, ids: list[Ids], types: list[Ids]) -> Tensor:
    """(num_texts, 2 * top_k) float32, the scores of the best tokens for each text's mask, then their ids."""
    found = torch.empty(len(ids), 2 * top_k, device=model.device)
    for rows in groups_of(list(map(len, ids)), _TOKENS_AT_ONCE, _TEXTS_AT_ONCE):
        inputs = padded([ids[row] for row in rows], [types[row] for row in rows], model.device)
        # The words' numbers are exact in float32, as no vocabulary has 16 million.
        output: Any = model(**inputs)
        best = output.logits.float().softmax(-1).topk(top_k)
        found[rows] = torch.cat((best.values, best.indices.float()), 1)
    return found
