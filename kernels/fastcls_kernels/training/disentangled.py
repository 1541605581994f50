"""DeBERTa's attention over packed rows on a CPU, forward and backward:

    out_i = Σ_j drop(softmax_j(scale (q_i · k_j + q_i · K_b + k_j · Q_b))) v_j,    b = bucket(p_i - p_j)

Products with positions have a column for each distance and are read as views, as in the forward pass without
gradients. The backward pass writes the gradients of scores through the same views into matrices that are zero
elsewhere: so the gradients by position are products of matrices, too, and no pair is looked up.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..disentangled_attention.buckets import DistanceTables
from ..layout import PackedLayout
from ..linear.cpu import cpu_product, uses_onednn
from .dropout import Dropout, mix_
from .groups import Block, Group, groups_of

# Numbers in a product with positions that a CPU's caches hold from one step to the next.
_CACHED = 1 << 18
# Multiplications of a product from which on oneDNN is faster than a batch by PyTorch's own library.
_LARGE = 1 << 22


def disentangled_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: DistanceTables,
    layout: PackedLayout,
    scale: float,
    dropout: Dropout | None,
) -> tuple[Tensor, None]:
    """Disentangled attention of packed rows.

    Args:
        q, k, v: (total_tokens, nheads, headdim), of any strides with a contiguous last dimension.
        tables: the embeddings of distances, in q's dtype.
        layout: where each sequence lies and, where it has positions, its rows stand.
        scale: factor on the sum of the three terms.
        dropout: what drops probabilities, or None.

    Returns:
        (total_tokens, nheads, headdim) in q's dtype, zero in rows that belong to no sequence; and None in place of
        the kernel's log-sums: a CPU takes the whole softmax again in the time of an exponential.
    """
    out = q.new_zeros(q.shape)
    columns = _Columns(tables, layout, q)
    mask = None if dropout is None else _Mask(dropout, layout, q.shape[1], columns.dtype)
    for group in groups_of(layout, q.shape[1]):
        queries, keys, values = (_gather(group, rows) for rows in (q, k, v))
        attended = torch.empty_like(queries)
        places = columns.places(group)
        for heads in _chunks(group, q.shape[1], columns.of(group)):
            weights = _probabilities(group, queries[heads], keys[heads], columns, heads, places, scale)
            if mask is not None:
                weights *= mask.factors(group, heads)
            attended[heads] = _each(weights, values[heads])
        _scatter(group, attended, out)
    return out, None


def disentangled_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    _out: Tensor,
    _log_sums: None,
    tables: DistanceTables,
    layout: PackedLayout,
    scale: float,
    dropout: Dropout | None,
    *,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of `disentangled_forward`, of the same arguments.

    Args:
        grad_out: (total_tokens, nheads, headdim), of any strides.
        _out, _log_sums: what the forward pass returned; not read.
        q, k, v, tables, layout, scale, dropout: as it had them.
        into: where to write the gradients of q, k and v, of their shape and any strides, or None for new tensors.

    Returns:
        The gradients of q, k and v, in their dtype, zero in rows that belong to no sequence; and those of the tables'
        keys and queries, (num_buckets, nheads, headdim), float32 or of float64 tensors float64, None where they are.
    """
    grads = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)) if into is None else into
    columns = _Columns(tables, layout, q)
    mask = None if dropout is None else _Mask(dropout, layout, q.shape[1], columns.dtype)
    end_token = 0
    for group in groups_of(layout, q.shape[1]):
        queries, keys, values = (_gather(group, rows) for rows in (q, k, v))
        flows = _gather(group, grad_out)
        if not group.is_even:
            flows.masked_fill_(group.is_padding[..., None], 0.0)
        grad_q, grad_k, grad_v = (torch.empty_like(queries) for _ in grads)
        places = columns.places(group)
        for heads in _chunks(group, q.shape[1], columns.of(group)):
            asked, read, flow = queries[heads], keys[heads], flows[heads]
            probabilities = _probabilities(group, asked, read, columns, heads, places, scale)
            weights = probabilities
            grad_scores = _each(flow, values[heads].transpose(2, 3))
            if mask is not None:
                factors = mask.factors(group, heads)
                weights = probabilities * factors
                grad_scores *= factors
            grad_v[heads] = _each(flow.transpose(2, 3), weights).transpose(2, 3)
            grad_scores = torch._softmax_backward_data(grad_scores, probabilities, -1, grad_scores.dtype)
            grad_scores *= scale
            mirrored = grad_scores.transpose(2, 3)
            grad_q[heads] = _each(grad_scores, read)
            grad_k[heads] = _each(asked.transpose(2, 3), grad_scores).transpose(2, 3)
            columns.backward(group, 0, heads, grad_scores, places, asked, grad_q[heads])
            columns.backward(group, 1, heads, mirrored, places, read, grad_k[heads])
        for found, grad in zip((grad_q, grad_k, grad_v), grads, strict=True):
            _scatter(group, found, grad)
        end_token = group.end
    for grad in grads:
        grad[end_token:] = 0
    return (*grads, *columns.gradients())


class _Columns:
    """The tables of distances by column, and their gradients.

    A column is a distance up to the longest text's, or where texts have holes a bucket. Side 0 are the keys of
    distances, whose products have a row for each query; side 1 the queries, whose products have a row for each key.
    """

    def __init__(self, tables: DistanceTables, layout: PackedLayout, q: Tensor) -> None:
        self._given = (tables.keys, tables.queries)
        self._buckets = tables.buckets
        self._layout = layout
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self._longest = max((group.length for group in groups_of(layout, q.shape[1])), default=1)
        self._orders: tuple[Tensor, Tensor] | None = None
        if layout.positions is None:
            rising = tables.buckets.of(torch.arange(1 - self._longest, self._longest, device=q.device))
            # In a query's row distances fall from key to key, in a key's row they rise from query to query.
            self._orders = (rising.flip(0), rising)
        # [nheads, num_columns, headdim]
        self._tables = [self._by_column(side) for side in (0, 1)]
        self._grads = [None if table is None else torch.zeros_like(table) for table in self._tables]

    def _by_column(self, side: int) -> Tensor | None:
        table = self._given[side]
        if table is None:
            return None
        rows = table if self._orders is None else table.index_select(0, self._orders[side])
        return rows.transpose(0, 1).to(self.dtype).contiguous()

    def of(self, group: Group) -> slice:
        """The columns of a group's pairs."""
        if self._orders is None:
            return slice(0, max(table.shape[1] for table in self._tables if table is not None))
        return slice(self._longest - group.length, self._longest + group.length - 1)

    def places(self, group: Group) -> Tensor | None:
        """(num_sequences, length, length): each pair's column, where a row's place does not say it."""
        if self._orders is not None:
            return None
        whole = slice(0, group.length)
        return self._buckets.of(-group.offsets(Block(whole, whole), self._layout)).long()

    def term(self, group: Group, side: int, heads: slice, rows: Tensor, places: Tensor | None) -> Tensor | None:
        """The products of rows, (heads, num_sequences, length, headdim), by pair of a row and another, or None."""
        table = self._tables[side]
        if table is None:
            return None
        products = _products(rows.flatten(1, 2), table[heads, self.of(group)].transpose(1, 2))
        by_row = products.view(*rows.shape[:3], -1)
        if places is None:
            return _band(by_row)
        return by_row.gather(3, (places if side == 0 else places.transpose(1, 2)).expand(rows.shape[0], -1, -1, -1))

    def backward(
        self,
        group: Group,
        side: int,
        heads: slice,
        grad_scores: Tensor,
        places: Tensor | None,
        rows: Tensor,
        grad_rows: Tensor,
    ) -> None:
        """Adds the gradients of `term` to those of the rows, and to the table's."""
        table, total = self._tables[side], self._grads[side]
        if table is None or total is None:
            return
        shown = self.of(group)
        chosen = table[heads, shown]
        by_row = grad_scores.new_zeros(*rows.shape[:3], chosen.shape[1])
        if places is None:
            _band(by_row).copy_(grad_scores)
        else:
            index = places if side == 0 else places.transpose(1, 2)
            by_row.scatter_add_(3, index.expand(rows.shape[0], -1, -1, -1), grad_scores)
        products = by_row.flatten(1, 2)
        grad_rows += _products(products, chosen).view(rows.shape)
        # The other way round than they lie: oneDNN then turns the few columns of a head, not the products.
        total[heads, shown] += _products(rows.flatten(1, 2).transpose(1, 2), products).transpose(1, 2)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """The tables' gradients, by bucket."""
        found: list[Tensor | None] = []
        for side, table in enumerate(self._given):
            total = self._grads[side]
            if table is None or total is None:
                found.append(None)
                continue
            rows = total.transpose(0, 1)
            if self._orders is not None:
                rows = rows.new_zeros(table.shape).index_add_(0, self._orders[side], rows)
            found.append(rows.contiguous())
        return found[0], found[1]


def _chunks(group: Group, num_heads: int, columns: slice) -> Iterator[slice]:
    """Heads whose products with positions stay in the caches."""
    heads = max(1, _CACHED // (group.num_sequences * group.length * (columns.stop - columns.start)))
    for first in range(0, num_heads, heads):
        yield slice(first, first + heads)


def _by_head(group: Group, rows: Tensor) -> Tensor:
    """A group's rows as (heads, num_sequences, length, columns), where padding is its sequence's last row."""
    # Several times as fast as an index in brackets.
    found = rows[group.start : group.end] if group.is_even else rows.index_select(0, group.index)
    return found.unflatten(0, (group.num_sequences, group.length)).permute(2, 0, 1, 3)


def _gather(group: Group, rows: Tensor) -> Tensor:
    """`_by_head` contiguous, in float32 or wider."""
    return _by_head(group, rows).to(torch.promote_types(rows.dtype, torch.float32)).contiguous()


def _scatter(group: Group, batch: Tensor, out: Tensor) -> None:
    """Writes (nheads, num_sequences, length, headdim) to a group's packed rows."""
    rows = batch.permute(1, 2, 0, 3)
    target = out[group.start : group.end]
    if group.is_even:
        target.unflatten(0, (group.num_sequences, group.length)).copy_(rows)
    else:
        target.copy_(rows.reshape(-1, *out.shape[1:]).index_select(0, group.places))


def _each(left: Tensor, right: Tensor) -> Tensor:
    """The products of each sequence and head, (heads, num_sequences, ...) both."""
    return _products(left.flatten(0, 1), right.flatten(0, 1)).unflatten(0, left.shape[:2])


def _products(left: Tensor, right: Tensor) -> Tensor:
    """left right, (batch, rows, inner) by (batch, inner, columns)."""
    batch, rows, inner = left.shape
    if rows * inner * right.shape[2] < _LARGE or not uses_onednn(left[0]):
        return torch.bmm(left, right)
    found = [cpu_product(one, other.t(), None) for one, other in zip(left, right, strict=True)]
    return found[0].unsqueeze(0) if batch == 1 else torch.stack(found)


def _band(by_row: Tensor) -> Tensor:
    """Column length - 1 + j - i of row i in place (i, j): a view of (heads, num_sequences, length, 2 * length - 1)."""
    heads, sequences, length, columns = by_row.shape
    *strides, _, _ = by_row.stride()
    return by_row.as_strided(
        (heads, sequences, length, length), (*strides, columns - 1, 1), by_row.storage_offset() + length - 1
    )


def _probabilities(
    group: Group, queries: Tensor, keys: Tensor, columns: _Columns, heads: slice, places: Tensor | None, scale: float
) -> Tensor:
    """The softmax, (heads, num_sequences, length, length)."""
    terms = []
    if (by_key := columns.term(group, 0, heads, queries, places)) is not None:
        terms.append(by_key)
    if (by_query := columns.term(group, 1, heads, keys, places)) is not None:
        terms.append(by_query.transpose(2, 3))
    # Into memory of its own, whose rows lie side by side.
    scores = torch.empty(terms[0].shape, dtype=columns.dtype, device=queries.device)
    torch.add(*terms, out=scores) if len(terms) == 2 else scores.copy_(terms[0])
    scores += _each(queries, keys.transpose(2, 3))
    scores *= scale
    if not group.is_even:
        scores += group.padding_terms.squeeze(1)
    return torch.softmax(scores, -1)


class _Mask:
    """What dropout keeps of a packing's probabilities: the parts of `Dropout.kept` are made once for all groups."""

    def __init__(self, dropout: Dropout, layout: PackedLayout, num_heads: int, dtype: torch.dtype) -> None:
        device = layout.cu_seqlens.device
        rows = torch.arange(layout.total_tokens * num_heads, dtype=torch.int32, device=device)
        longest = max((group.length for group in groups_of(layout, num_heads)), default=0)
        # [total_tokens, nheads, 1]
        self._rows = dropout.row_keys(rows).view(-1, num_heads, 1)
        self._columns = mix_(torch.arange(longest, dtype=torch.int32, device=device))
        self._dropout = dropout
        self._dtype = dtype

    def factors(self, group: Group, heads: slice) -> Tensor:
        """0 for each probability that is dropped and the dropout's factor for others, as scores are shaped."""
        keys = _by_head(group, self._rows[:, heads]).contiguous() ^ self._columns[: group.length]
        # In place, so that the answers are as wide as what they multiply.
        return mix_(keys).ge_(self._dropout.threshold).to(self._dtype).mul_(self._dropout.factor)
