"""Packed tokens to hidden states: the embeddings, the layers, and the last layer for the selected rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from fastcls_kernels import (
    AddNorm,
    PackedLayout,
    absorb_query,
    add_layer_norm,
    apply_rotary_,
    attention_varlen,
    cls_attention,
    cls_attention_kv,
    cls_output,
    disentangled_attention,
    embedding_layer_norm,
    gated_activation,
    linear,
    linear_activation,
    linear_add_layer_norm,
    takes_norm,
)

from .convolution import EmbeddingConvolution
from .packing import PackedTokens
from .relative import BiasTable, DisentangledTables, PositionTables
from .rotary import RotaryPositions
from .spec import BucketBias, Disentangled, EncoderSpec
from .weights import Weighted, under

LastLayer = Literal["full", "selected", "absorbed"]
# Which rows of the last layer are wanted: each text's first one, all, or those that the packing names.
Selection = Literal["first", "all", "rows"]


class How(NamedTuple):
    """What a pass computes of its tokens.

    Attributes:
        last_layer: the rung of the last layer.
        selection: the rows that are wanted of it.
        pools: whether they are averaged over each text.
    """

    last_layer: LastLayer
    selection: Selection
    pools: bool


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module as a whole does more than its class's ``forward``: hooks, or another one set on it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def check_last_layer(last_layer: str) -> None:
    """Raises ValueError where ``last_layer`` is no rung of the ladder."""
    if last_layer not in get_args(LastLayer):
        raise ValueError(f"last_layer must be one of {', '.join(get_args(LastLayer))}, got {last_layer!r}")


class Pass(NamedTuple):
    """What all layers of one pass share.

    Attributes:
        layout: where each sequence lies.
        position_ids: (total_tokens,), for rotary positions.
        bias: (num_heads, 2 * reach + 1), for relative ones, or None.
    """

    layout: PackedLayout
    position_ids: Tensor
    bias: Tensor | None


class Wanted(NamedTuple):
    """The rows that are wanted of the last layer, at least one.

    Attributes:
        rows: (num_rows,) int32, rows of the packing.
        bounds: start and end of what each attends to, two int32 tensors; None where row i is the first of sequence i.
    """

    rows: Tensor
    bounds: tuple[Tensor, Tensor] | None


class States(NamedTuple):
    """Rows between two layers: what the next one projects, and what it adds its result to.

    Behind a norm that ends a layer they are the same; of a pre-norm encoder the second is the sum before the norm.
    """

    normed: Tensor
    residual: Tensor


class Embeddings(Weighted):
    """Word, token type and position embeddings, of those that there are, summed and normalised."""

    word_weight: Tensor
    position_weight: Tensor | None
    token_type_weight: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor | None
    projection_weight: Tensor | None
    projection_bias: Tensor | None

    def __init__(self, spec: EncoderSpec, weights: Mapping[str, nn.Parameter]) -> None:
        optional = ("position_weight", "token_type_weight", "norm_bias", "projection_weight", "projection_bias")
        super().__init__(weights, optional)
        self.eps = spec.layer_norm_eps

    def forward(self, packed: PackedTokens) -> Tensor:
        """(total_tokens, hidden_size)."""
        if packed.inputs_embeds is not None:
            # Embeddings that the caller made stand in for the word table: one row a token.
            token_ids = torch.arange(packed.inputs_embeds.shape[0], device=packed.inputs_embeds.device)
            word_table = packed.inputs_embeds
        else:
            assert packed.token_ids is not None
            token_ids, word_table = packed.token_ids, self.word_weight
        embedded = embedding_layer_norm(
            token_ids,
            None if self.position_weight is None else packed.position_ids,
            packed.token_type_ids,
            word_table,
            self.position_weight,
            self.token_type_weight,
            self.norm_weight,
            self.norm_bias,
            self.eps,
        )
        if self.projection_weight is None:
            return embedded
        return linear(embedded, self.projection_weight, self.projection_bias)


class EncoderLayer(Weighted):
    """One layer over packed tokens, whole or for some rows alone.

    Its second norm is the one that its result goes through: in a pre-norm encoder the first of the next layer.
    """

    qkv_weight: Tensor
    qkv_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    attention_norm_weight: Tensor
    attention_norm_bias: Tensor | None
    up_weight: Tensor
    up_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None
    output_norm_weight: Tensor
    output_norm_bias: Tensor | None

    def __init__(self, spec: EncoderSpec, weights: Mapping[str, nn.Parameter]) -> None:
        biases = ("qkv_bias", "out_bias", "attention_norm_bias", "up_bias", "down_bias", "output_norm_bias")
        positions = ("position_key_weight", "position_key_bias", "position_query_weight", "position_query_bias")
        super().__init__(weights, (*biases, *positions))
        self.spec = spec

    def forward(self, states: States, run: Pass, attention: Attention) -> States:
        """Every row: (total_tokens, hidden_size) to the same."""
        # The queries, keys and values are gone before the feed-forward needs their memory.
        return self._feed_forward(self._add_attended(self._attend(states.normed, run, attention), states.residual))

    def before_norm(self, states: States, run: Pass, attention: Attention) -> tuple[Tensor, AddNorm]:
        """Every row of the last product, and the layer norm that ends the layer, not taken yet."""
        attended = self._add_attended(self._attend(states.normed, run, attention), states.residual).normed
        down = linear(self._up(attended), self.down_weight)
        assert self.output_norm_bias is not None
        norm = (self.output_norm_weight, self.output_norm_bias, self.spec.layer_norm_eps)
        return down, AddNorm(self.down_bias, attended, *norm)

    def selected(
        self,
        states: States,
        run: Pass,
        attention: Attention,
        wanted: Wanted,
        last_layer: LastLayer,
        norm: AddNorm | None = None,
    ) -> Tensor:
        """Some rows of the result: (total_tokens, hidden_size) to (num_rows, hidden_size).

        ``norm`` is a layer norm that the states still have before them, where `takes_norm_inside` holds.
        """
        if last_layer == "full":
            return self(states, run, attention).normed[wanted.rows]
        if last_layer == "absorbed" and attention.reads_rows(wanted):
            return self._feed_forward(self._attend_absorbed(states, run, attention, wanted, norm)).normed
        if attention.reads_rows(wanted):
            context = self._attend_rows(states.normed, run, attention, wanted)
        else:
            context = self._attend(states.normed, run, attention)[wanted.rows]
        return self._feed_forward(self._add_attended(context, states.residual[wanted.rows])).normed

    def takes_norm_inside(
        self, hidden_states: Tensor, attention: Attention, wanted: Wanted, last_layer: LastLayer
    ) -> bool:
        """Whether the norm before this layer may be left to it."""
        absorbed = last_layer == "absorbed" and attention.reads_rows(wanted) and not attention.needs_keys
        return absorbed and wanted.bounds is None and not self.spec.pre_norm and takes_norm(hidden_states)

    def _project(self, hidden_states: Tensor, run: Pass, attention: Attention) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (total_tokens, num_heads, head_dim) each."""
        qkv = linear(hidden_states, self.qkv_weight, self.qkv_bias)
        heads, head_dim = self.spec.num_heads, self.spec.head_dim
        if attention.rotary is not None:
            apply_rotary_(qkv.unflatten(1, (3 * heads, head_dim))[:, : 2 * heads], run.position_ids, *attention.rotary)
        q, k, v = qkv.unflatten(1, (3, heads, head_dim)).unbind(1)
        return q, k, v

    def _attend(self, hidden_states: Tensor, run: Pass, attention: Attention) -> Tensor:
        q, k, v = self._project(hidden_states, run, attention)
        layout = run.layout
        if attention.tables is not None:
            context = disentangled_attention(
                *(q, k, v, *attention.positions, attention.tables.buckets),
                *(layout.cu_seqlens, layout.max_seqlen, attention.scale),
                layout=layout,
            )
        else:
            context = attention_varlen(
                *(q, k, v, layout.cu_seqlens, layout.max_seqlen, attention.scale),
                window_size=attention.window_size,
                bias=run.bias,
                layout=layout,
            )
        return context.flatten(1)

    def _attend_rows(self, hidden_states: Tensor, run: Pass, attention: Attention, wanted: Wanted) -> Tensor:
        """Keys and values of every token, the queries of some rows."""
        layout, size, bias = run.layout, self.spec.hidden_size, self.qkv_bias
        heads = (self.spec.num_heads, self.spec.head_dim)
        query = self._query(hidden_states, run, attention, wanted)
        kv = linear(hidden_states, self.qkv_weight[size:], None if bias is None else bias[size:])
        k, v = kv.unflatten(1, (2, *heads)).unbind(1)
        if attention.rotary is not None:
            apply_rotary_(k, run.position_ids, *attention.rotary)
        context = cls_attention_kv(
            *(query, k, v, layout.cu_seqlens, layout.max_seqlen, attention.scale),
            layout=layout,
            bias=attention.seen_from_first(query, k, run),
            row_bounds=attention.bounds(wanted, layout),
        )
        return context.flatten(1)

    def _query(self, hidden_states: Tensor, run: Pass, attention: Attention, wanted: Wanted) -> Tensor:
        """(num_rows, num_heads, head_dim)."""
        size, bias = self.spec.hidden_size, self.qkv_bias
        query = linear(hidden_states[wanted.rows], self.qkv_weight[:size], None if bias is None else bias[:size])
        query = query.unflatten(1, (self.spec.num_heads, self.spec.head_dim))
        if attention.rotary is not None:
            apply_rotary_(query, run.position_ids[wanted.rows], *attention.rotary)
        return query

    def _attend_absorbed(
        self, states: States, run: Pass, attention: Attention, wanted: Wanted, norm: AddNorm | None
    ) -> States:
        """No values, which are projected after the sum; and no keys, where the queries can take their projection.

        The few rows that carry the answer are computed in at least float32, so that absorbing costs no accuracy.
        """
        layout = run.layout
        query_weight, key_weight, value_weight = self.qkv_weight.chunk(3)
        query_bias, key_bias, value_bias = (None,) * 3 if self.qkv_bias is None else self.qkv_bias.chunk(3)
        source, residual = states.normed, states.residual
        rows: Tensor | None = wanted.rows
        keys = None
        if attention.needs_keys:
            query = self._query(source, run, attention, wanted)
            keys = linear(source, key_weight, key_bias).unflatten(1, (self.spec.num_heads, self.spec.head_dim))
            if attention.rotary is not None:
                apply_rotary_(keys, run.position_ids, *attention.rotary)
        else:
            normed: Tensor = source
            if norm is not None:
                residual = normed = add_layer_norm(source, *norm, rows=rows)
                rows = None
            # Encoders without biases have rotary positions.
            assert query_bias is not None
            if key_bias is not None:
                # It adds the same number to all scores of a row, which changes no weight, but NaN is to stay NaN.
                query_bias = torch.add(query_bias, key_bias, alpha=0)
            query = absorb_query(normed, rows, query_weight, query_bias, key_weight, self.spec.num_heads)
        summed = cls_attention(
            *(query, source, layout.cu_seqlens, layout.max_seqlen, attention.scale),
            layout=layout,
            norm=norm,
            keys=keys,
            bias=attention.seen_from_first(query, keys, run),
            row_bounds=attention.bounds(wanted, layout),
        )
        inputs = (summed, value_weight, value_bias, self.out_weight, self.out_bias, residual, rows)
        norms = (self.attention_norm_weight, self.attention_norm_bias, self.spec.layer_norm_eps)
        if self.spec.pre_norm:
            return States(*cls_output(*inputs, *norms, keep_sum=True))
        normed = cls_output(*inputs, *norms)
        return States(normed, normed)

    def _add_attended(self, context: Tensor, residual: Tensor) -> States:
        product = (context, self.out_weight, self.out_bias, residual)
        norm = (self.attention_norm_weight, self.attention_norm_bias, self.spec.layer_norm_eps)
        if self.spec.pre_norm:
            return States(*linear_add_layer_norm(*product, *norm, keep_sum=True))
        normed = linear_add_layer_norm(*product, *norm)
        return States(normed, normed)

    def _feed_forward(self, attended: States) -> States:
        norm = (self.output_norm_weight, self.output_norm_bias, self.spec.layer_norm_eps)
        weight, bias, residual = self.down_weight, self.down_bias, attended.residual
        # Handed on without a name, so that nobody holds the widest rows of the layer while they are not needed.
        if self.spec.pre_norm:
            return States(
                *linear_add_layer_norm(self._up(attended.normed), weight, bias, residual, *norm, keep_sum=True)
            )
        normed = linear_add_layer_norm(self._up(attended.normed), weight, bias, residual, *norm)
        return States(normed, normed)

    def _up(self, hidden_states: Tensor) -> Tensor:
        if self.spec.gated:
            return gated_activation(linear(hidden_states, self.up_weight, self.up_bias), self.spec.activation)
        return linear_activation(hidden_states, self.up_weight, self.up_bias, self.spec.activation)


class Attention(NamedTuple):
    """How one layer's tokens see one another.

    Attributes:
        scale: factor on scores.
        window: how many tokens to each side, None for all.
        rotary: cosines and sines, (max_positions, head_dim // 2) each, or None.
        bias: MPNet's, or None.
        tables: DeBERTa's, or None.
        layer: the set of weights, for which ``tables`` has some of its own.
    """

    scale: float
    window: int | None
    rotary: tuple[Tensor, Tensor] | None
    bias: BiasTable | None
    tables: DisentangledTables | None
    layer: int

    @property
    def window_size(self) -> tuple[int, int]:
        return (-1, -1) if self.window is None else (self.window, self.window)

    @property
    def positions(self) -> PositionTables:
        assert self.tables is not None
        return self.tables.of_layer(self.layer)

    @property
    def needs_keys(self) -> bool:
        """Whether a key depends on where its token stands, so that no query can take the projection of all of them."""
        return self.rotary is not None or self.tables is not None

    def reads_rows(self, wanted: Wanted) -> bool:
        """Whether rows' attention can be computed apart: relative positions are known as a first token sees them."""
        return wanted.bounds is None or (self.bias is None and self.tables is None)

    def bounds(self, wanted: Wanted, layout: PackedLayout) -> tuple[Tensor, Tensor] | None:
        """What each row attends to; None where row i attends to all of sequence i."""
        if self.window is None:
            return wanted.bounds
        starts, ends = layout.window_bounds(*self.window_size)
        return starts[wanted.rows], ends[wanted.rows]

    def seen_from_first(self, query: Tensor, keys: Tensor | None, run: Pass) -> Tensor | None:
        """(total_tokens, num_heads): what the positions of tokens add to their scores, or None."""
        if self.bias is not None:
            assert run.bias is not None
            return self.bias.seen_from_first(run.bias, run.layout)
        if self.tables is not None:
            assert keys is not None
            return self.tables.seen_from_first(self.positions, query, keys, run.layout, self.scale)
        return None


class Encoder(nn.Module):
    """Embeddings and layers.

    Args:
        spec: the encoder's shape.
        weights: its parameters, and the frequencies of its rotary positions, by our names.
    """

    def __init__(self, spec: EncoderSpec, weights: Mapping[str, Any]) -> None:
        super().__init__()
        self.spec = spec
        self.embeddings = Embeddings(spec, under("embeddings.", weights))
        by_layer: list[dict[str, nn.Parameter]] = [{} for _ in range(spec.num_layer_weights)]
        for name, weight in under("layers.", weights).items():
            layer, _, rest = name.partition(".")
            by_layer[int(layer)][rest] = weight
        self.layers = nn.ModuleList(EncoderLayer(spec, each) for each in by_layer)
        self.relative: BiasTable | DisentangledTables | None = None
        if isinstance(spec.relative, BucketBias):
            self.relative = BiasTable(spec.relative, under("relative.", weights))
        elif isinstance(spec.relative, Disentangled):
            layers = cast(Sequence[Weighted], self.layers)
            self.relative = DisentangledTables(spec, spec.relative, layers, under("relative.", weights))
        self.convolution = (
            None if spec.convolution is None else EmbeddingConvolution(spec, under("convolution.", weights))
        )
        self.rotary = RotaryPositions(spec, under("rotary.", weights)) if spec.rotary else None

    def prepare(self) -> None:
        """Makes what follows from weights and config alone, where it is not there or weights have changed since.

        To be called before a pass, and not while a graph is captured, which reads what was made.
        """
        with torch.inference_mode(False), torch.no_grad():
            if self.rotary is not None:
                self.rotary.refresh()
            if isinstance(self.relative, DisentangledTables):
                self.relative.refresh()
            if self.convolution is not None:
                self.convolution.refresh()

    def doubt(self) -> None:
        """Takes weights for changed that count no changes: what `prepare` makes is made anew, in its place."""
        for made in (self.rotary, self.relative, self.convolution):
            if isinstance(made, (RotaryPositions, DisentangledTables, EmbeddingConvolution)):
                made.doubt()

    def clear(self) -> None:
        """Forgets what `prepare` makes."""
        if self.rotary is not None:
            self.rotary.clear()
        if isinstance(self.relative, DisentangledTables):
            self.relative.clear()
        if self.convolution is not None:
            self.convolution.clear()

    def forward(self, packed: PackedTokens, last_layer: LastLayer, selection: Selection) -> Tensor:
        """Packed tokens to the wanted rows of the last layer, (num_rows, hidden_size)."""
        embedded = self.embeddings(packed)
        bias = self.relative() if isinstance(self.relative, BiasTable) else None
        run = Pass(packed.layout, packed.position_ids, bias)
        states = States(embedded, embedded)
        wanted = _wanted(packed, selection)
        norm = None
        last = len(self.spec.layers) - 1
        for index, weights in enumerate(self.spec.layers):
            layer = cast(EncoderLayer, self.layers[weights])
            attention = self._attention(index)
            if index == last:
                if wanted is None:
                    return cast(States, layer(states, run, attention)).normed
                return layer.selected(states, run, attention, wanted, last_layer, norm)
            if index == last - 1 and wanted is not None and self._leaves_norm(layer, states, wanted, last_layer):
                # Nobody but the last layer's pass over them reads these rows.
                hidden_states, norm = layer.before_norm(states, run, attention)
                states = States(hidden_states, hidden_states)
                continue
            states = layer(states, run, attention)
            if index == 0 and self.convolution is not None:
                convolved = self.convolution(embedded, states.normed, packed.layout)
                states = States(convolved, convolved)
        raise AssertionError("an encoder has at least one layer")

    def _leaves_norm(self, layer: EncoderLayer, states: States, wanted: Wanted, last_layer: LastLayer) -> bool:
        last = len(self.spec.layers) - 1
        hooked = has_hooks(layer)
        convolved = last == 1 and self.convolution is not None
        return (
            not hooked
            and not convolved
            and layer.takes_norm_inside(states.normed, self._attention(last), wanted, last_layer)
        )

    def _attention(self, index: int) -> Attention:
        spec = self.spec
        terms = spec.relative.num_terms if isinstance(spec.relative, Disentangled) else 1
        return Attention(
            scale=(spec.head_dim * terms) ** -0.5,
            window=spec.windows[index] if spec.windows else None,
            rotary=None if self.rotary is None else self.rotary.tables(spec.rotary[index]),
            bias=self.relative if isinstance(self.relative, BiasTable) else None,
            tables=self.relative if isinstance(self.relative, DisentangledTables) else None,
            layer=spec.layers[index],
        )


def _wanted(packed: PackedTokens, selection: Selection) -> Wanted | None:
    """The wanted rows; None for all."""
    layout = packed.layout
    if selection == "all":
        return None
    if selection == "first":
        return Wanted(layout.cu_seqlens[:-1], None)
    assert packed.rows is not None
    assert packed.row_sequences is not None
    bounds = (layout.cu_seqlens[packed.row_sequences], layout.cu_seqlens[packed.row_sequences + 1])
    return Wanted(packed.rows, bounds)
