"""DeBERTa's attention over packed sequences, in which distances are scored, too:

    out_i = Σ_j softmax_j(scale · (q_i · k_j + q_i · K_b + k_j · Q_b)) v_j,    b = bucket(p_i - p_j), j in i's sequence.

K and Q, the keys and queries of positions, have one row for each bucket; p_i is a token's position in its own text.

The products of all tokens with positions are made first, with one column for each distance, not for each bucket. All
that query i needs then lies side by side in row i of its product, and all that key j needs in row j of the other: there
are more columns than buckets, but no pair is looked up.
"""

from __future__ import annotations

from torch import Tensor

from .._ops import operator
from ..layout import PackedLayout
from ..runtime.backend import runs_triton
from ..runtime.checks import check_device, check_last_dim_contiguous, check_qkv, check_tensor
from ..runtime.gradients import differentiably
from .buckets import Buckets, DistanceTables
from .cpu import disentangled_attention_runs
from .kernel import choose_tile, launch_disentangled_attention

__all__ = ["Buckets", "disentangled_attention", "disentangled_attention_unchecked"]


@operator(
    "(Tensor q, Tensor k, Tensor v, Tensor? pos_key, Tensor? pos_query, Tensor bucket_table, SymInt[] bucket_rows, "
    "Tensor cu_seqlens, SymInt max_seqlen, float softmax_scale, Tensor? positions) -> Tensor",
    fake=lambda q, *_: q.new_empty(q.shape),
    members=(PackedLayout.members("q"), Buckets.members()),
)
def disentangled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    buckets: Buckets,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    *,
    layout: PackedLayout | None = None,
) -> Tensor:
    """Bidirectional attention inside each of many packed sequences, by what tokens are and how far apart they stand.

    Args:
        q, k, v: (total_tokens, nheads, headdim), float32, float16 or bfloat16, head sizes from 4 to 128. Any strides
            with a contiguous last dimension: views of one fused projection are taken as they are.
        pos_key, pos_query: (num_buckets, nheads, headdim) in q's dtype, contiguous in the last dimension: the tables
            that multiply queries and keys. Either may be None, and its term is left out.
        buckets: the row of the tables for each distance between two tokens.
        cu_seqlens: (num_sequences + 1,), int32: sequence i is rows ``cu_seqlens[i]:cu_seqlens[i + 1]``. Zero-length
            sequences are allowed. Rows from ``cu_seqlens[-1]`` on belong to no sequence.
        max_seqlen: the longest sequence, in tokens, or any bound above it. On a GPU it decides, up to the buckets'
            reach, how many distances the products have: total_tokens * nheads * 2 * max_seqlen numbers each.
        softmax_scale: factor on the sum of the three terms.
        layout: ``PackedLayout(cu_seqlens, max_seqlen, total_tokens)``, for callers that use one packing many times.
            Where it has positions, distances are between them, not between rows.

    Returns:
        (total_tokens, nheads, headdim), contiguous, in q's dtype; zero in rows that belong to no sequence.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, stride, device, head size or length that does not fit. ``cu_seqlens`` is checked by
            value where it lies on the CPU; on a GPU that would stall the device, so there it is trusted.

    Sums and the softmax are float32. Source: He et al., "DeBERTa: Decoding-enhanced BERT with Disentangled Attention"
    (2021), and the log buckets of its second version.
    """
    check_qkv(q, k, v, "(total_tokens, nheads, headdim)")
    _check_positions(q, pos_key, pos_query, buckets)
    layout = PackedLayout.of(q, cu_seqlens, max_seqlen, layout)
    tables = DistanceTables(pos_key, pos_query, buckets)
    return differentiably(disentangled_attention_unchecked, q, k, v, tables, layout, softmax_scale)


def disentangled_attention_unchecked(
    q: Tensor, k: Tensor, v: Tensor, tables: DistanceTables, layout: PackedLayout, scale: float
) -> Tensor:
    """`disentangled_attention` of arguments that are known to fit."""
    if not runs_triton(q):
        return disentangled_attention_runs(q, k, v, tables, layout, scale)
    return launch_disentangled_attention(q, k, v, tables, layout, scale, choose_tile(q))


def _check_positions(q: Tensor, pos_key: Tensor | None, pos_query: Tensor | None, buckets: Buckets) -> None:
    tables = [(name, table) for name, table in (("pos_key", pos_key), ("pos_query", pos_query)) if table is not None]
    if not tables:
        raise ValueError("one of pos_key and pos_query must be a tensor, got None for both")
    if not isinstance(buckets, Buckets):
        raise TypeError(f"buckets must be a Buckets, got {type(buckets).__name__}")
    for name, table in tables:
        check_tensor(name, table, "(num_buckets, nheads, headdim)", like=q)
        if table.shape[1:] != q.shape[1:] or table.shape[0] <= buckets.rows[-1]:
            raise ValueError(
                f"{name} must have shape (num_buckets, {q.shape[1]}, {q.shape[2]}) with a row for each of the buckets "
                f"0 to {buckets.rows[-1]}, got {tuple(table.shape)}"
            )
        check_last_dim_contiguous(name, table)
    if len({table.shape[0] for _, table in tables}) > 1:
        raise ValueError(f"pos_query must have pos_key's {tables[0][1].shape[0]} rows, got {tables[1][1].shape[0]}")
    check_device("buckets.table", buckets.table, q)
