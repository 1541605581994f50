"""A model that is served: texts to ids, and ids to what its routes answer with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..engine.batch import outside
from ..labels import ScoreFunction, scores_of
from ..models import FastClassifier, FastEncoder, FastMaskedLM
from ..predicting.embedder import Pooling
from ..predicting.padded import groups_of, padded
from ..texts import Item
from ..tokenizing import Cut, Ids, encode, pair_problem, tokenizer_problem
from .errors import RequestError

Kind: TypeAlias = Literal["classifier", "reranker", "embedding", "sparse"]
# What is computed of a text: a number for each label, a vector, a vector for each token, or weights of words.
Want: TypeAlias = Literal["logits", "vector", "states", "weights"]
Side: TypeAlias = Literal["left", "right"]
# A text, a pair of texts, or the ids of a text.
Input: TypeAlias = "Item | tuple[int, ...]"
Numbers: TypeAlias = "NDArray[np.float32]"

_WANTS: dict[Kind, tuple[Want, ...]] = {
    "classifier": ("logits",),
    "reranker": ("logits",),
    "embedding": ("vector", "states"),
    "sparse": ("weights",),
}
# Every token of a masked language model has a number for each word.
_TOKENS_AT_ONCE = 2048
# The tokens of longer texts are not counted for an error's sake.
_CHARACTERS_COUNTED = 20_000


class Encoded(NamedTuple):
    """A text's ids and their types, and of several heads on one encoder the one that is asked."""

    ids: Ids
    types: Ids
    head: int = 0


class Computing(Protocol):
    """What computes passes: a model, or several heads on one encoder."""

    def compute(self, texts: Sequence[Encoded], want: Want) -> list[Any]: ...


class Labelled(NamedTuple):
    """A number for each label: logits, and the scores that the model's config makes of them."""

    logits: list[float]
    scores: list[float]


class Weights(NamedTuple):
    """The weights of words that are not 0, by ascending id."""

    ids: NDArray[np.int64]
    values: Numbers


@dataclass(frozen=True, eq=False)
class Served:
    """A model with its tokenizer, which one thread uses at a time.

    Attributes:
        name: what clients call it.
        checkpoint: the folder, or the name on the hub.
        revision: its commit, where it comes from the hub.
        kind: what it is for.
        model: a `FastClassifier`, `FastEncoder` or `FastMaskedLM`; of a head on a shared encoder this encoder.
        tokenizer: its own, that nothing else uses.
        spare: a copy, for a second thread: of texts that take long.
        limit: tokens that a text may have, special ones included.
        labels: their names; empty for vectors.
        apply: makes scores of logits.
        pooling: of vectors.
        prompts: what may stand before a text, by name.
        default_prompt: what stands before a text for which no prompt is named.
        heads, head: the heads that share its encoder, if any do, and which one it is.
    """

    name: str
    checkpoint: str
    revision: str | None
    kind: Kind
    model: FastClassifier | FastEncoder | FastMaskedLM
    tokenizer: PreTrainedTokenizerBase
    spare: PreTrainedTokenizerBase
    limit: int
    labels: tuple[str, ...]
    apply: ScoreFunction
    pooling: Pooling
    prompts: dict[str, str]
    default_prompt: str
    heads: Computing | None = None
    head: int = 0

    @property
    def computing(self) -> Computing:
        """What computes its passes."""
        return self if self.heads is None else self.heads

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def wants(self) -> tuple[Want, ...]:
        """What it computes of a text, the usual one first."""
        return _WANTS[self.kind]

    def prompt(self, name: str | None) -> str:
        """The prompt that a request names, or the default.

        Raises:
            RequestError: there is none of the name.
        """
        if name is None:
            return self.default_prompt
        if name not in self.prompts:
            known = ", ".join(sorted(self.prompts)) or "none"
            message = f"`prompt_name` must be one of the model's prompts ({known}), got {name!r:.80}"
            raise RequestError(message, "Validation")
        return self.prompts[name]

    def encode(
        self, inputs: Sequence[Input], truncate: bool, side: Side, *, by_spare: bool = False
    ) -> list[Encoded | RequestError]:
        """Texts to ids, cut to the limit where they may be; what cannot be computed to why."""
        tokenizer = self.spare if by_spare else self.tokenizer
        found: list[Encoded | RequestError] = [RequestError("`inputs` cannot be empty", "Empty")] * len(inputs)
        texts = [row for row, each in enumerate(inputs) if isinstance(each, Item) and (each.text or each.pair)]
        tokenizer.truncation_side = side
        for is_pair in (False, True):
            rows = [row for row in texts if (inputs[row].pair is not None) is is_pair]  # type: ignore[union-attr]
            for row, encoded in self._encoded(tokenizer, inputs, rows, is_pair, truncate):
                found[row] = encoded
        for row, each in enumerate(inputs):
            if not isinstance(each, Item) and each:
                found[row] = self._of_ids(each, truncate, side)
        return found

    def _encoded(
        self,
        tokenizer: PreTrainedTokenizerBase,
        inputs: Sequence[Any],
        rows: list[int],
        is_pair: bool,
        truncate: bool,
    ) -> Iterator[tuple[int, Encoded | RequestError]]:
        if not rows:
            return
        cut = Cut("longest_first", self.limit)
        if is_pair and (problem := pair_problem(tokenizer, cut)):
            yield from ((row, RequestError(f"`inputs` {problem}", "Tokenizer")) for row in rows)
            return
        texts = [inputs[row].text for row in rows]
        pairs = [inputs[row].pair for row in rows] if is_pair else None
        try:
            encoded = encode(tokenizer, texts, pairs, cut)
        except Exception as error:
            if len(rows) == 1:
                yield rows[0], RequestError(f"`inputs` {tokenizer_problem(inputs[rows[0]], error)}", "Tokenizer")
                return
            for row in rows:
                yield from self._encoded(tokenizer, inputs, [row], is_pair, truncate)
            return
        for row, ids, types, was_cut in zip(rows, encoded.ids, encoded.types, encoded.cut, strict=True):
            if was_cut and not truncate:
                yield row, self._too_long(_count(tokenizer, inputs[row]))
            else:
                yield row, self._checked(Encoded(ids, types, self.head))

    def _of_ids(self, given: tuple[int, ...], truncate: bool, side: Side) -> Encoded | RequestError:
        """Ids that a client made, which are taken as they are."""
        if len(given) > self.limit:
            if not truncate:
                return self._too_long(len(given))
            given = given[: self.limit] if side == "right" else given[-self.limit :]
        ids = np.array(given, dtype=np.int64)
        return self._checked(Encoded(ids, np.zeros_like(ids), self.head))

    def _checked(self, encoded: Encoded) -> Encoded | RequestError:
        """What the model can compute, so that a pass fails for no text's sake."""
        size, length = self.model.spec.vocab_size, len(encoded.ids)
        if not length:
            return RequestError("`inputs` must have tokens, got a text of which the tokenizer leaves none", "Tokenizer")
        if length > self.limit:
            return self._too_long(length)
        if int(encoded.ids.max()) >= size or int(encoded.ids.min()) < 0:
            bad = next(int(token) for token in encoded.ids if not 0 <= token < size)
            return RequestError(f"`inputs` {outside(bad, size)}", "Tokenizer")
        return encoded

    def _too_long(self, count: int | None) -> RequestError:
        given = "more" if count is None else str(count)
        return RequestError(f"`inputs` must have less than {self.limit} tokens. Given: {given}", "Validation")

    def compute(self, texts: Sequence[Encoded], want: Want) -> list[Any]:
        """One pass, or a few: of each text its `Labelled`, its vector or vectors in float32, or its `Weights`.

        Raises:
            Exception: whatever a model raises that has no memory left, or fails.
        """
        ids, types = [each.ids for each in texts], [each.types for each in texts]
        if want == "logits":
            assert isinstance(self.model, FastClassifier)
            return self.labelled(self.model.logits_of(ids, types))
        if want == "vector":
            assert isinstance(self.model, FastEncoder)
            return list(self.model.embeddings_of(ids, types, pooling=self.pooling).float().cpu().numpy())
        found: list[Any] = [None] * len(texts)
        for rows in groups_of(list(map(len, ids)), _TOKENS_AT_ONCE, len(ids)):
            of_tokens = self._rows_of_tokens([texts[row] for row in rows], want)
            for row, numbers in zip(rows, of_tokens.split([len(ids[row]) for row in rows]), strict=True):
                found[row] = _weights(numbers) if want == "weights" else numbers.float().cpu().numpy()
        return found

    def _rows_of_tokens(self, texts: Sequence[Encoded], want: Want) -> Tensor:
        """(num_tokens, width), the last layer's states, or the words' logits, of the texts' tokens in their order."""
        given = padded([each.ids for each in texts], [each.types for each in texts], self.device)
        if want == "weights":
            assert isinstance(self.model, FastMaskedLM)
            output: Any = self.model(**given)
            return output.logits
        assert isinstance(self.model, FastEncoder)
        output = self.model(**given, select=given["attention_mask"].bool())
        return output.last_hidden_state

    def labelled(self, logits: Tensor) -> list[Labelled]:
        """(num_texts, num_labels) logits, with their scores."""
        logits = logits.float().cpu()
        scores = scores_of(logits, self.apply)
        return list(map(Labelled, logits.tolist(), scores.tolist()))

    def tokens(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[dict[str, Any]]]:
        """The tokens of each text, and where in its UTF-8 they stand, in bytes.

        Raises:
            RequestError: a text that the tokenizer does not take, or that is empty.
        """
        return [self._tokens(text, add_special_tokens) for text in texts]

    def _tokens(self, text: str, add_special_tokens: bool) -> list[dict[str, Any]]:
        if not text:
            raise RequestError("`inputs` cannot be empty", "Empty")
        has_places = self.spare.is_fast
        try:
            found: Any = self.spare(
                text,
                add_special_tokens=add_special_tokens,
                truncation=False,
                return_special_tokens_mask=True,
                return_offsets_mapping=has_places,
                verbose=False,
            )
        except Exception as error:
            raise RequestError(f"`inputs` {tokenizer_problem((text,), error)}", "Tokenizer") from error
        ids, special = found["input_ids"], found["special_tokens_mask"]
        places = found["offset_mapping"] if has_places else [(None, None)] * len(ids)
        names = self.spare.convert_ids_to_tokens(ids)
        # Of each character the byte at which it begins.
        at = list(itertools.accumulate((len(each.encode()) for each in text), initial=0)) if has_places else []
        return [
            {
                "id": token,
                "text": name if is_special or start is None else text[start:stop],
                "special": bool(is_special),
                "start": None if is_special or start is None else at[start],
                "stop": None if is_special or stop is None else at[stop],
            }
            for token, name, is_special, (start, stop) in zip(ids, names, special, places, strict=True)
        ]

    def decoded(self, ids: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        """The text of each list of ids.

        Raises:
            RequestError: an empty list, or an id that there is not.
        """
        size = self.model.spec.vocab_size
        for each in ids:
            if not each:
                raise RequestError("`input_ids` cannot be empty", "Empty")
            if max(each) >= size:
                raise RequestError(f"`ids` {outside(max(each), size)}", "Tokenizer")
        return [str(self.spare.decode(list(each), skip_special_tokens=skip_special_tokens)) for each in ids]


def _count(tokenizer: PreTrainedTokenizerBase, item: Item) -> int | None:
    """How many tokens a text has that was cut; None where counting them takes long."""
    if item.characters > _CHARACTERS_COUNTED:
        return None
    pairs = None if item.pair is None else [item.pair]
    return len(encode(tokenizer, [item.text], pairs, Cut(False, None)).ids[0])


def _weights(logits: Tensor) -> Weights:
    """(num_tokens, words) logits to the weights of SPLADE: the maximum over tokens of log(1 + relu(logit))."""
    # Of the maximum alone, since both functions only grow.
    values = logits.amax(0).float().relu().log1p().cpu()
    ids = values.nonzero()[:, 0]
    return Weights(ids.numpy(), values[ids].numpy())
