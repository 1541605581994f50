"""Packed tokens to hidden states: the embeddings, the layers, and of the last layer the rows that are wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcls_kernels.packed import PackedTable, Packing, packed_embedding_unchecked
from fastcls_kernels.packed_layer import PackedStack
from fastcls_kernels.unchecked import embedding_layer_norm, layer_norm, linear

from .attention import ChosenRows, LayerAttention, TokenPositions
from .convolution import EmbeddingConvolution
from .layer import EncoderLayer, HiddenStates
from .packed import PackedWeights
from .packing import PackedTokens
from .positions import BiasTable, DisentangledTables, RotaryPositions
from .spec import BucketBias, Disentangled, EncoderSpec, LastLayer, Rows
from .weights import Weighted, checked_rows, is_intercepted, under


class Embeddings(Weighted):
    """The sum of word, token type and position embeddings, as far as the encoder has them, and its layer norm."""

    word_weight: Tensor
    position_weight: Tensor | None
    token_type_weight: Tensor | None
    task_weight: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    projection_weight: Tensor | None
    projection_bias: Tensor | None
    first_norm_weight: Tensor | None
    first_norm_bias: Tensor | None

    def __init__(self, spec: EncoderSpec, weights: Mapping[str, nn.Parameter]) -> None:
        modules = ("position", "token_type", "task", "norm", "projection", "first_norm")
        super().__init__(weights, [f"{name}_{kind}" for name in modules for kind in ("weight", "bias")])
        self.spec = spec
        # Both are `PackedWeights`' to set.
        self.is_packed = False
        self.packed_table: PackedTable | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "is_packed": False, "packed_table": None}

    def forward(self, packed: PackedTokens) -> Tensor:
        """(total_tokens, hidden_size), in float32 where layers follow that keep it."""
        if packed.inputs_embeds is not None and self.spec.final_embeds:
            return packed.inputs_embeds
        word_table: Tensor | PackedTable
        # Rows of their own, one a token, stand in for the table of words.
        rows = packed.inputs_embeds
        if self.spec.mask_token_id is not None:
            assert packed.token_ids is not None
            rows = self.without_masks(F.embedding(packed.token_ids, self.word_weight), packed)
        if rows is not None:
            token_ids = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
            word_table = rows
        else:
            assert packed.token_ids is not None
            token_ids = packed.token_ids
            word_table = self.word_weight if self.packed_table is None else self.packed_table
        is_compiled = self.is_packed and self.norm_weight is not None and self._takes_float32()
        embed: Any = packed_embedding_unchecked if is_compiled else embedding_layer_norm
        embedded: Tensor = embed(
            token_ids,
            None if self.position_weight is None else packed.position_ids,
            packed.token_type_ids,
            word_table,
            self.position_weight,
            self._type_table(),
            self.norm_weight,
            self.norm_bias,
            self.spec.layer_norm_eps,
        )
        if self.projection_weight is not None:
            embedded = linear(embedded, self.projection_weight, self.projection_bias)
        return embedded if self.spec.residual_scale == 1 else embedded * self.spec.residual_scale

    def first_norm(self, embedded: Tensor) -> HiddenStates:
        """What the first layer reads: a pre-norm encoder's own norm may stand before it."""
        if self.first_norm_weight is None:
            return HiddenStates(embedded, embedded)
        norm = (self.first_norm_weight, self.first_norm_bias, self.spec.norm_eps)
        return HiddenStates(layer_norm(embedded, *norm, rms=self.spec.rms), embedded)

    def _type_table(self) -> Tensor | None:
        """Token types, with ERNIE's first kind of task added to each."""
        types, tasks = self.token_type_weight, self.task_weight
        return types if types is None or tasks is None else types + tasks[0]

    def without_masks(self, words: Tensor, packed: PackedTokens) -> Tensor:
        """``words``, (total_tokens, embedding_size), zero for mask tokens, and the others scaled for their share.

        Source: ESM-2 (Lin et al., 2022), whose training left out 0.8 of 15 % of the tokens.
        """
        assert packed.token_ids is not None
        assert self.spec.mask_token_id is not None
        is_mask = packed.token_ids.eq(self.spec.mask_token_id)
        bounds = packed.layout.cu_seqlens.long()
        counts = F.pad(is_mask.cumsum(0), (1, 0))[bounds].diff()
        # In float32 whatever the weights' dtype is, as in transformers. Sequences that fill a pass up are empty.
        share = counts.float() / bounds.diff().clamp(min=1)
        rows = torch.arange(words.shape[0], device=words.device)
        sequences = torch.searchsorted(bounds[1:], rows, right=True).clamp(max=share.shape[0] - 1)
        dtype = words.dtype
        words = words.masked_fill(is_mask[:, None], 0.0) * (1 - 0.15 * 0.8)
        return (words / (1 - share)[sequences, None]).to(dtype)

    def _takes_float32(self) -> bool:
        """Whether what reads the embeddings takes them in float32."""
        return self.word_weight.dtype == torch.float32 or (self.projection_weight is None and not is_intercepted(self))


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
        # Each pass asks for it, and a list of modules takes its time. A tuple, so that it is not registered twice.
        self._first_layer = (cast(EncoderLayer, self.layers[0]),)
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
        # What a checkpoint holds beside them, so that it can be saved whole.
        self.unread = Weighted(under("unread.", weights))
        self.packed = PackedWeights(spec, self.embeddings, cast(Sequence[EncoderLayer], self.layers))

    def _attention(self, index: int) -> LayerAttention:
        spec = self.spec
        terms = spec.relative.num_terms if isinstance(spec.relative, Disentangled) else 1
        window = spec.windows[index] if spec.windows else None
        return LayerAttention(
            scale=(spec.head_dim * terms) ** -0.5,
            window_size=(-1, -1) if window is None else (window, window),
            rotary=None if self.rotary is None else self.rotary.tables(spec.rotary[index]),
            bias=self.relative if isinstance(self.relative, BiasTable) else None,
            tables=self.relative if isinstance(self.relative, DisentangledTables) else None,
            layer=spec.layers[index],
        )

    def _derived(self) -> list[RotaryPositions | DisentangledTables | EmbeddingConvolution]:
        """The modules that keep what follows from weights alone."""
        kinds = (RotaryPositions, DisentangledTables, EmbeddingConvolution)
        return [each for each in (self.rotary, self.relative, self.convolution) if isinstance(each, kinds)]

    def prepare(self, packing: Packing | None = None) -> None:
        """Makes what follows from weights alone, where weights have changed since.

        To be called before a pass, and not while a graph is captured, since the graph reads what was made.

        Args:
            packing: as what the layers' weights are packed, or None.
        """
        if not self.packed.is_current(packing):
            self.packed.refresh(packing)
        derived = self._derived()
        if derived:
            with torch.inference_mode(False), torch.no_grad():
                for each in derived:
                    each.refresh()

    def doubt(self) -> None:
        """Has `prepare` make everything anew, in its place: weights may have changed without a count."""
        self.packed.doubt()
        for each in self._derived():
            each.doubt()

    def clear(self) -> None:
        """Forgets what `prepare` makes."""
        self.packed.clear()
        for each in self._derived():
            each.clear()

    def forward(self, packed: PackedTokens, rows: Rows, last_layer: LastLayer) -> Tensor:
        """Packed tokens to rows of the last layer, (num_rows, hidden_size): all of them for "mean", too."""
        embedded = self.embeddings(packed)
        if is_intercepted(self.embeddings):
            embedded = self._checked("the embeddings", embedded, packed)
        chosen = _chosen(packed, rows)
        whole = self.packed.stack
        if whole is not None and not any(map(is_intercepted, self.layers)):
            return self._whole_pass(whole, embedded, packed, rows, chosen, last_layer)
        # Compiled embeddings are float32, whatever the weights are.
        embedded = embedded.to(self.like.dtype)
        positions = TokenPositions(packed.layout, packed.position_ids, self._bias(embedded))
        states = self.embeddings.first_norm(embedded)
        norm = None
        last = len(self.spec.layers) - 1
        for index in range(last):
            if index == last - 1 and chosen is not None and self._leaves_norm(index, states, chosen, last_layer):
                # Only the last layer's pass reads these rows, so it takes their norm on its way.
                hidden_states, norm = self._layer(index).before_norm(states, positions, self._attention(index))
                states = HiddenStates(hidden_states, hidden_states)
                break
            states = self._whole_layer(index, states, positions)
            if index == 0 and self.convolution is not None:
                convolved = self.convolution(embedded, states.normed, packed.layout)
                if is_intercepted(self.convolution):
                    convolved = self._checked("the convolution's rows", convolved, packed)
                states = HiddenStates(convolved, convolved)
        if chosen is not None and last_layer != "full":
            return self._layer(last).chosen(states, positions, self._attention(last), chosen, last_layer, norm)
        normed = self._whole_layer(last, states, positions).normed
        return normed if chosen is None else normed[chosen.rows]

    def _whole_pass(
        self,
        stack: PackedStack,
        embedded: Tensor,
        packed: PackedTokens,
        rows: Rows,
        chosen: ChosenRows | None,
        last_layer: LastLayer,
    ) -> Tensor:
        """`forward` by the compiled kernels, between layers in float32."""
        # The layers write over their input, and what a hook gave may be its own.
        is_ours = not is_intercepted(self.embeddings)
        states = embedded if is_ours and embedded.dtype == torch.float32 else embedded.to(torch.float32, copy=True)
        if rows == "first" and last_layer != "full":
            return stack(states, packed.layout, "first").to(self.like.dtype)
        dtype, but_last = self.like.dtype, stack.but_last
        if rows == "chosen" and chosen is not None and last_layer != "full" and but_last is not None:
            states = but_last(states, packed.layout, "all").to(dtype)
            positions, last = TokenPositions(packed.layout, packed.position_ids, None), len(self.spec.layers) - 1
            between = HiddenStates(states, states)
            return self._layer(last).chosen(between, positions, self._attention(last), chosen, last_layer)
        states = stack(states, packed.layout, "all").to(dtype)
        return states if chosen is None else states[chosen.rows]

    @property
    def like(self) -> Tensor:
        """A weight that is always there: it tells all weights' device and dtype."""
        return self._first_layer[0].attention_norm_weight

    def _layer(self, index: int) -> EncoderLayer:
        return cast(EncoderLayer, self.layers[self.spec.layers[index]])

    def _whole_layer(self, index: int, states: HiddenStates, positions: TokenPositions) -> HiddenStates:
        layer = self._layer(index)
        states = layer(states, positions, self._attention(index))
        return layer.checked(states, positions) if is_intercepted(layer) else states

    def _bias(self, embedded: Tensor) -> Tensor | None:
        """MPNet's positions, (num_heads, 2 * reach + 1), at least float32."""
        if not isinstance(self.relative, BiasTable):
            return None
        wide = embedded.new_empty(0, dtype=torch.promote_types(embedded.dtype, torch.float32))
        return checked_rows(
            "the bias of distances", self.relative(), (self.spec.num_heads, 2 * self.relative.reach + 1), wide
        )

    def _checked(self, name: str, rows: Tensor, packed: PackedTokens) -> Tensor:
        shape = (packed.layout.total_tokens, self.spec.hidden_size)
        return checked_rows(name, rows, shape, self.like)

    def _leaves_norm(self, index: int, states: HiddenStates, chosen: ChosenRows, last_layer: LastLayer) -> bool:
        """Whether the layer before the last may leave its norm to the last one."""
        layer, convolved = self._layer(index), index == 0 and self.convolution is not None
        return (
            not is_intercepted(layer)
            and not convolved
            and layer.takes_norm_inside(states.normed, self._attention(index + 1), chosen, last_layer)
        )


def _chosen(packed: PackedTokens, rows: Rows) -> ChosenRows | None:
    """The rows that are computed of the last layer; None for all."""
    layout = packed.layout
    if rows in ("all", "mean"):
        return None
    if rows == "first":
        return ChosenRows(layout.cu_seqlens[:-1], None)
    assert packed.rows is not None
    assert packed.row_sequences is not None
    bounds = (layout.cu_seqlens[packed.row_sequences], layout.cu_seqlens[packed.row_sequences + 1])
    return ChosenRows(packed.rows, bounds)
