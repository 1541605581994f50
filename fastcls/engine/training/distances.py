"""DeBERTa's embeddings of distances, as a layer that is trained reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcls_kernels import Buckets, PackedLayout
from fastcls_kernels.disentangled_attention.buckets import DistanceTables
from fastcls_kernels.training import Dropout, Heads, Scoring, add_norm, dropped
from fastcls_kernels.training.disentangled_attention import disentangled_attention

from ..spec import Disentangled, EncoderSpec
from .products import Products


class Distances:
    """The rows of the table of distances that texts of a batch can reach, before a layer projects them.

    Args:
        spec, relative: the encoder's shape.
        table: (rows, hidden_size), all distances.
        norm: its layer norm's weight and bias, or None.
        buckets: the table's row for each distance.
        max_seqlen: the longest text.
        places: whether texts have holes, so that distances may be larger than texts are long.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        relative: Disentangled,
        table: Tensor,
        norm: tuple[Tensor, Tensor] | None,
        buckets: Buckets,
        max_seqlen: int,
        *,
        has_places: bool,
    ) -> None:
        self.spec = spec
        self.relative = relative
        reach = buckets.reach if has_places else min(max_seqlen, buckets.reach)
        rows = buckets.rows[buckets.reach - reach : buckets.reach + reach + 1]
        # Rows rise with distances, so those of near ones are neighbours.
        lowest, highest = rows[0], rows[-1]
        self.buckets = Buckets(
            (buckets.table[buckets.reach - reach : buckets.reach + reach + 1] - lowest).contiguous(),
            tuple(row - lowest for row in rows),
        )
        self.table = table[lowest : highest + 1]
        if norm is not None:
            self.table = add_norm(self.table.contiguous(), None, *norm, spec.layer_norm_eps)[0]

    def attention(
        self,
        qkv: Tensor,
        heads: Heads,
        layout: PackedLayout,
        scoring: Scoring,
        dropout: Dropout | None,
        products: Products,
    ) -> Tensor:
        """(total_tokens, hidden_size), as `fastcls_kernels.training.attention` gives it."""
        return disentangled_attention(qkv, self._projected(dropout, products), heads, layout, scoring)

    def seen_from_first(
        self,
        query: Tensor,
        keys: Tensor,
        layout: PackedLayout,
        scale: float,
        dropout: Dropout | None,
        products: Products,
    ) -> Tensor:
        """(total_tokens, num_heads), at least float32: what positions add to the scores of tokens from a first row.

        Args:
            query: (num_sequences, num_heads, head_dim), of the first rows.
            keys: (total_tokens, num_heads, head_dim).
            layout: where tokens lie.
            scale: factor on scores.
            dropout: what drops numbers of the table, or None.
            products: the layer's.
        """
        pos_key, pos_query, buckets = self._projected(dropout, products)
        positions = layout.token_positions
        wide = torch.promote_types(keys.dtype, torch.float32)
        terms = keys.new_zeros(keys.shape[:2], dtype=wide)
        if pos_key is not None:
            # The first token stands at 0, so distances to it are 0, -1, -2, ...
            seen = pos_key[buckets.of(-torch.arange(buckets.reach + 1, device=keys.device)).long()]
            # [num_sequences, num_heads, reach + 1]
            scores = torch.einsum("rhd,phd->rhp", query.to(wide), seen.to(wide))
            lengths = layout.cu_seqlens.diff()
            sequences = torch.arange(query.shape[0], device=keys.device).repeat_interleave(
                lengths, output_size=keys.shape[0]
            )
            terms = terms + scores[sequences, :, positions.clamp(max=buckets.reach).long()]
        if pos_query is not None:
            terms = terms + (keys * pos_query[buckets.of(-positions).long()]).to(wide).sum(2)
        return terms * scale

    def _projected(self, dropout: Dropout | None, products: Products) -> DistanceTables:
        spec, relative = self.spec, self.relative
        table = dropped(self.table, dropout)

        def projected(name: str, part: int) -> Tensor:
            if relative.shares_projections:
                width = spec.num_heads * spec.head_dim
                own = slice(part * width, (part + 1) * width)
                rows = products.linear("qkv", table, own, of_positions=True)
            else:
                rows = products.linear(name, table)
            return rows.unflatten(1, (spec.num_heads, spec.head_dim))

        return DistanceTables(
            projected("position_key", 1) if relative.content_to_position else None,
            projected("position_query", 0) if relative.position_to_content else None,
            self.buckets,
        )
