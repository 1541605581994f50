"""An encoder and its head as plain data: all that the packed computation needs but the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from fastcls_kernels import Activation

Task = Literal[
    "sequence classification",
    "next sentence prediction",
    "multiple choice",
    "masked language modelling",
    "token classification",
    "question answering",
    "encoder",
]
# The row that a head reads of a text: its first one, or the mean of all.
Pooling = Literal["first", "mean"]
# The rows that are wanted of the last layer: of each text its first one or the mean of all, or of its tokens all or
# those that a mask chooses.
Rows = Literal["first", "mean", "all", "chosen"]
# How the last layer is computed: see `FastModel.last_layer`.
LastLayer = Literal["full", "selected", "absorbed"]
# What products are computed in, if not in the weights' dtype: see `FastModel.quantize`.
Quantize = Literal["int8"]
# What a layer's adapter adds its result to: the rows that it reads, behind a norm, or those before that norm.
Adapter = Literal["normed", "sum"]


def check_last_layer(last_layer: str) -> None:
    """Raises ValueError where ``last_layer`` is not one of `LastLayer`."""
    if last_layer not in get_args(LastLayer):
        raise ValueError(f"last_layer must be one of {', '.join(get_args(LastLayer))}, got {last_layer!r}")


def check_quantize(quantize: str | None) -> None:
    """Raises ValueError where ``quantize`` is neither None nor one of `Quantize`."""
    if quantize is not None and quantize not in get_args(Quantize):
        raise ValueError(f"quantize must be None or one of {', '.join(get_args(Quantize))}, got {quantize!r}")


@dataclass(frozen=True)
class BucketBias:
    """MPNet's and T5's relative positions: each head adds a learnt number to a score, one for each bucket of distances.

    Attributes:
        num_buckets: rows of the table, half of them for keys before the query and half for keys after it.
        reach: distances beyond share the last bucket.
    """

    num_buckets: int
    reach: int


@dataclass(frozen=True)
class Disentangled:
    """DeBERTa's relative positions: queries and keys are multiplied with embeddings of distances.

    Attributes:
        span: the table holds rows for buckets from -span to below span.
        buckets: how many buckets there are on each side, or 0 where each distance has its own row.
        reach: the largest distance that bucketing knows.
        content_to_position, position_to_content: which of the two terms there are.
        shares_projections: whether positions are projected by the layers' own query and key weights.
        normalised: whether the table goes through a layer norm.
    """

    span: int
    buckets: int
    reach: int
    content_to_position: bool
    position_to_content: bool
    shares_projections: bool
    normalised: bool

    @property
    def num_terms(self) -> int:
        """How many terms a score is the sum of: content, and each of the position terms."""
        return 1 + self.content_to_position + self.position_to_content


@dataclass(frozen=True)
class Convolution:
    """DeBERTa's convolution over the embeddings, which joins the first layer's output."""

    kernel_size: int
    activation: Activation


@dataclass(frozen=True)
class EncoderSpec:
    """The shape of an encoder.

    Attributes:
        max_positions: the longest text, in tokens; None where no table of positions ends.
        position_rows: rows of the table of positions, 0 if there is none.
        first_position: the row of a text's first token.
        padding_id: RoBERTa's padding token, which is not counted and whose position is this number, or None.
        token_types: rows of the table of token types, 0 if there is none.
        embedding_size: columns of the tables of embeddings; a projection follows if it is not hidden_size.
        layers: for each layer, in order, its set of weights: several layers may share one.
        windows: for each layer, how many tokens on each side a token attends to, None for all.
        rotary: for each layer, the kind of rotary frequencies that it turns by; empty without rotary positions.
        pre_norm: layer norms stand before each half of a layer, not behind it.
        gated: the feed-forward multiplies its activation by a second projection (GeGLU).
        relative: relative positions within the attention, or None.
        convolution: the convolution that joins the first layer's output, or None.
        rms: norms divide by the root mean square alone (RMSNorm).
        num_kv_heads: heads of keys and values, which groups of query heads share; None for one for each.
        rotary_scale: factor on cosines and sines (YaRN's).
        rotary_interleaved: rotary positions turn neighbours, not halves.
        rotary_is_saved: checkpoints hold the frequencies.
        query_key_norm: queries and keys go through a layer norm over all heads before they are turned.
        residual_scale: what a layer adds to its input is divided by it.
        mask_token_id: ESM's token whose embedding is zero, while the others' make up for it, or None.
        final_embeds: embeddings that a caller gives are the first layer's input as they are.
        adapter: each layer ends with a second, narrow feed-forward (X-MOD's), whose result is added to this; or None.
    """

    vocab_size: int
    max_positions: int | None
    position_rows: int
    token_types: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    layer_norm_eps: float
    layers: tuple[int, ...]
    embedding_size: int
    activation: Activation = "gelu"
    first_position: int = 0
    padding_id: int | None = None
    windows: tuple[int | None, ...] = ()
    rotary: tuple[str, ...] = ()
    pre_norm: bool = False
    gated: bool = False
    relative: BucketBias | Disentangled | None = None
    convolution: Convolution | None = None
    rms: bool = False
    num_kv_heads: int | None = None
    rotary_scale: float = 1.0
    rotary_interleaved: bool = False
    rotary_is_saved: bool = False
    query_key_norm: bool = False
    residual_scale: float = 1.0
    mask_token_id: int | None = None
    final_embeds: bool = False
    adapter: Adapter | None = None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """How many columns queries, keys and values have."""
        keys = (self.num_kv_heads or self.num_heads) * self.head_dim
        return self.hidden_size, keys, keys

    @property
    def norm_eps(self) -> float:
        """What the layers' norms add: where residuals are scaled, rows are kept as many times as large."""
        return self.layer_norm_eps * self.residual_scale**2

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_layer_weights(self) -> int:
        """How many sets of layer weights there are."""
        return max(self.layers) + 1

    @property
    def needs_places(self) -> bool:
        """Whether scores depend on a token's place in its text, so that holes in a mask matter."""
        return self.relative is not None or self.convolution is not None or any(self.windows)


@dataclass(frozen=True)
class HeadSpec:
    """The head on an encoder: dense layers, their activation, a layer norm and a product, as far as it has them.

    Attributes:
        task: the task.
        pooling: how a text's rows become one, for tasks with one row a text.
        activation: behind each dense layer.
        eps: of the layer norm.
        is_late: the head is computed for every row, and the mean of what it gives is taken.
        names: the checkpoint's names of "dense", "inner" (the second dense layer), "norm" and "out", without ".weight"
            and ".bias"; and of "bias", if the product's bias has a name of its own.
    """

    task: Task
    names: Mapping[str, str]
    pooling: Pooling = "first"
    activation: Activation = "tanh"
    eps: float = 0.0
    is_late: bool = False

    @property
    def rows(self) -> Rows:
        """The rows that the task reads where a call does not say."""
        reads_tokens = ("masked language modelling", "token classification", "question answering", "encoder")
        return "all" if self.task in reads_tokens else self.pooling

    @property
    def possible_rows(self) -> tuple[Rows, ...]:
        """All that a call may ask for."""
        if self.task == "encoder":
            return ("first", "mean", "all", "chosen")
        return ("all", "chosen") if self.task == "masked language modelling" else (self.rows,)
