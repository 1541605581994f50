"""What one model is, as plain data: everything that the packed computation needs to know besides the weights."""

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


def check_last_layer(last_layer: str) -> None:
    """Raises ValueError where ``last_layer`` is not one of `LastLayer`."""
    if last_layer not in get_args(LastLayer):
        raise ValueError(f"last_layer must be one of {', '.join(get_args(LastLayer))}, got {last_layer!r}")


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
    """DeBERTa's relative positions: embeddings of distances that queries and keys are multiplied with.

    Attributes:
        span: the table holds rows for buckets from -span to below span.
        buckets: how many buckets there are on each side where distances are bucketed, or 0 where each has its own row.
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
        """How many terms a score is the sum of."""
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
        padding_id: the token whose position is this very number and which is not counted (RoBERTa), or None.
        token_types: rows of the table of token types, 0 if there is none.
        embedding_size: columns of the tables of embeddings; where it is not hidden_size, a projection follows.
        layers: for each layer in its order which set of weights it takes: several may share one.
        windows: for each layer how many tokens to each side a token attends to, None for all.
        rotary: for each layer which of the encoder's rotary frequencies it turns by; empty where there are none.
        pre_norm: layer norms stand before each half of a layer and not behind it.
        gated: the feed-forward multiplies its activation by a second projection (GeGLU).
        relative: relative positions within the attention, or None.
        convolution: what joins the first layer's output, or None.
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

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_layer_weights(self) -> int:
        """How many sets of layers' weights there are."""
        return max(self.layers) + 1

    @property
    def needs_places(self) -> bool:
        """Whether scores depend on where in its text a token stands, so that holes in a mask must be known."""
        return self.relative is not None or self.convolution is not None or any(self.windows)


@dataclass(frozen=True)
class HeadSpec:
    """What stands on an encoder: a dense layer, an activation and a layer norm, each if there is one, and a product.

    Attributes:
        task: what it is for.
        pooling: how a text's rows become one, where the task has one row a text.
        activation: behind the dense layer.
        eps: of the layer norm.
        names: the checkpoint's names of "dense", "norm" and "out", without ".weight" and ".bias"; "bias" where the
            product's bias is a parameter of another name.
    """

    task: Task
    names: Mapping[str, str]
    pooling: Pooling = "first"
    activation: Activation = "tanh"
    eps: float = 0.0

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
