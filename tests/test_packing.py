"""Packing: what goes in comes out, in any pattern of tokens and padding."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastcls.packing import PackedTokens, pack_lists, pack_padded, unpack_rows

# Each text is a pattern of kept and padded columns whose first is kept.
patterns = st.integers(1, 24).flatmap(
    lambda length: st.lists(
        st.lists(st.booleans(), min_size=length, max_size=length).map(lambda row: [True, *row[1:]]),
        min_size=1,
        max_size=12,
    )
)
limits = st.one_of(st.none(), st.integers(1, 60))


def sequences(parts: list[PackedTokens], field: str) -> dict[int, list[int]]:
    """For each row of the batch what was packed for it, whichever part it went to."""
    found = {}
    for part in parts:
        values: Tensor = getattr(part, field)
        bounds = part.layout.cu_seqlens.tolist()
        for sequence, row in enumerate(part.order.tolist()):
            assert row not in found, "a row was packed twice"
            found[row] = values[bounds[sequence] : bounds[sequence + 1]].tolist()
    return found


def pack(mask: Tensor, max_tokens: int | None) -> list[PackedTokens]:
    ids = torch.arange(mask.numel()).view(mask.shape)
    positions = torch.arange(mask.shape[1]).expand(mask.shape)
    return list(pack_padded(mask, ids, ids % 2, positions, None, max_tokens))


@given(patterns, limits)
def test_every_kept_token_is_packed_once_in_its_place(pattern: list[list[bool]], max_tokens: int | None) -> None:
    mask = torch.tensor(pattern)
    parts = pack(mask, max_tokens)
    columns = {row: [column for column, kept in enumerate(kept_row) if kept] for row, kept_row in enumerate(pattern)}
    width = mask.shape[1]
    assert sequences(parts, "position_ids") == columns
    assert sequences(parts, "token_ids") == {row: [row * width + c for c in cs] for row, cs in columns.items()}
    assert sequences(parts, "token_type_ids") == {
        row: [(row * width + c) % 2 for c in cs] for row, cs in columns.items()
    }


@given(patterns, limits)
def test_parts_hold_at_most_what_they_may(pattern: list[list[bool]], max_tokens: int | None) -> None:
    parts = pack(torch.tensor(pattern), max_tokens)
    for part in parts:
        lengths = part.layout.cu_seqlens.diff()
        assert int(lengths.max()) == part.layout.max_seqlen
        assert lengths.tolist() == sorted(lengths.tolist())
        assert max_tokens is None or len(lengths) == 1 or int(lengths.sum()) <= max_tokens
    assert max_tokens is not None or len(parts) == 1


@given(patterns, limits)
def test_rows_come_back_in_order(pattern: list[list[bool]], max_tokens: int | None) -> None:
    parts = pack(torch.tensor(pattern), max_tokens)
    # Each row's result is its own row number.
    results = [(part.order[:, None].float(), part.order) for part in parts]
    assert unpack_rows(results)[:, 0].tolist() == list(range(len(pattern)))


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=20), min_size=1, max_size=12), limits)
def test_lists_pack_like_padded_rows(texts: list[list[int]], max_tokens: int | None) -> None:
    types = [[token % 2 for token in text] for text in texts]
    parts = list(pack_lists(texts, types, max_tokens))
    assert sequences(parts, "token_ids") == dict(enumerate(texts))
    assert sequences(parts, "token_type_ids") == dict(enumerate(types))
    assert sequences(parts, "position_ids") == {row: list(range(len(text))) for row, text in enumerate(texts)}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_rows_of_filling_belong_to_no_sequence(lengths: list[int]) -> None:
    (part,) = pack_lists([[7] * length for length in lengths], None, None)
    total, filled = sum(lengths), part.layout.total_tokens
    assert int(part.layout.cu_seqlens[-1]) == total <= filled < total + 8
    assert part.token_ids is not None
    assert part.token_ids.shape == part.position_ids.shape == (filled,)
    assert not bool(part.token_ids[total:].any())


@given(st.lists(st.integers(0, 30), max_size=20))
def test_runs_and_bounds_describe_the_same_layout(lengths: list[int]) -> None:
    from fastcls_kernels import PackedLayout

    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    layout = PackedLayout(cu_seqlens, max(lengths, default=0), sum(lengths) + 3)
    starts, ends = layout.row_bounds
    expected = [(start, end) for start, end in zip(cu_seqlens.tolist(), cu_seqlens[1:].tolist(), strict=False)]
    rows = [bounds for bounds in expected for _ in range(bounds[1] - bounds[0])] + [(0, 0)] * 3
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == rows
    covered = [
        (run.start_token + index * run.length, run.start_token + (index + 1) * run.length)
        for run in layout.runs
        for index in range(run.num_sequences)
    ]
    assert covered == [bounds for bounds in expected if bounds[0] < bounds[1]]
