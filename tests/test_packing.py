"""Packing: what goes in comes out, in any pattern of tokens and padding."""

from __future__ import annotations

import itertools
from random import Random
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from support import FillUp, pack_parts
from torch import Tensor

from fastcls.engine.cuda_graphs import bucket_of
from fastcls.engine.engine import CPU_TOKENS_PER_PASS
from fastcls.engine.packing import (
    FlatBatch,
    PackedTokens,
    fill_rows,
    flat_integers,
    kept_tokens,
    true_indices,
)
from fastcls.engine.unpacking import unpack_chosen, unpack_rows, unpack_tokens

# Each text is a pattern of kept and padded columns whose first is kept.
patterns = st.integers(1, 24).flatmap(
    lambda length: st.lists(
        st.lists(st.booleans(), min_size=length, max_size=length).map(lambda row: [True, *row[1:]]),
        min_size=1,
        max_size=12,
    )
)
limits = st.integers(1, 60)
fills = st.sampled_from([fill_rows, bucket_of])


def order_of(part: PackedTokens, first: int) -> list[int]:
    return list(range(first, first + part.num_texts)) if part.order is None else part.order.tolist()


def sequences(parts: list[PackedTokens], field: str) -> dict[int, list[int]]:
    """For each row of the batch what was packed for it, whichever part it went to."""
    found: dict[int, list[int]] = {}
    for part in parts:
        values: Tensor = getattr(part, field)
        bounds = part.layout.cu_seqlens.tolist()
        for sequence, row in enumerate(order_of(part, len(found))):
            assert row not in found, "a row was packed twice"
            found[row] = values[bounds[sequence] : bounds[sequence + 1]].tolist()
    return found


def pack_mask(
    mask: Tensor, max_tokens: int, sort: bool, fill_up: FillUp = fill_rows, **more: Any
) -> list[PackedTokens]:
    ids = torch.arange(mask.numel())
    positions = torch.arange(mask.shape[1]).expand(mask.shape).flatten()
    lengths = mask.sum(1)
    source = FlatBatch(lengths, kept_tokens(mask, lengths), ids, ids % 2, positions, None, **more)
    return pack_parts(source, max_tokens, fill_up, sort=sort)


def source_of(texts: list[list[int]], types: list[list[int]] | None = None) -> FlatBatch:
    return FlatBatch(
        torch.tensor([len(text) for text in texts]),
        None,
        flat_integers("token_ids", texts),
        None if types is None else flat_integers("token_type_ids", types),
        None,
        None,
    )


@given(patterns, limits, st.booleans(), fills)
def test_every_kept_token_is_packed_once_in_its_place(
    pattern: list[list[bool]], max_tokens: int, sort: bool, fill_up: FillUp
) -> None:
    mask = torch.tensor(pattern)
    places = torch.arange(mask.shape[1]).expand(mask.shape).flatten()
    parts = pack_mask(mask, max_tokens, sort, fill_up, places=places)
    for part in parts:
        # A pass trusts it.
        part.layout.check()
    columns = {row: [column for column, kept in enumerate(kept_row) if kept] for row, kept_row in enumerate(pattern)}
    width = mask.shape[1]
    assert sequences(parts, "position_ids") == columns
    assert sequences(parts, "token_ids") == {row: [row * width + c for c in cs] for row, cs in columns.items()}
    assert sequences(parts, "token_type_ids") == {
        row: [(row * width + c) % 2 for c in cs] for row, cs in columns.items()
    }


@given(patterns, limits, st.booleans())
def test_parts_hold_at_most_what_they_may(pattern: list[list[bool]], max_tokens: int, sort: bool) -> None:
    parts = pack_mask(torch.tensor(pattern), max_tokens, sort)
    for part in parts:
        lengths = part.layout.cu_seqlens.diff()[: part.num_texts]
        assert int(lengths.max()) == part.layout.max_seqlen
        assert not sort or lengths.tolist() == sorted(lengths.tolist())
        assert len(lengths) == 1 or int(lengths.sum()) <= max_tokens


@given(patterns, limits, st.booleans(), fills)
def test_rows_come_back_in_order(pattern: list[list[bool]], max_tokens: int, sort: bool, fill_up: FillUp) -> None:
    parts = pack_mask(torch.tensor(pattern), max_tokens, sort, fill_up)
    results, first = [], 0
    for part in parts:
        # Each row's result is its own row number; what belongs to no text is -1.
        rows = torch.full((part.layout.num_sequences, 1), -1.0)
        rows[: part.num_texts, 0] = torch.tensor(order_of(part, first)).float()
        results.append((rows, part))
        first += part.num_texts
    assert unpack_rows(results)[:, 0].tolist() == list(range(len(pattern)))


@given(
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=20), min_size=1, max_size=12),
    limits,
    st.booleans(),
    fills,
)
def test_lists_pack_like_padded_rows(texts: list[list[int]], max_tokens: int, sort: bool, fill_up: FillUp) -> None:
    types = [[token % 2 for token in text] for text in texts]
    parts = pack_parts(source_of(texts, types), max_tokens, fill_up, sort=sort)
    assert sequences(parts, "token_ids") == dict(enumerate(texts))
    assert sequences(parts, "token_type_ids") == dict(enumerate(types))
    assert sequences(parts, "position_ids") == {row: list(range(len(text))) for row, text in enumerate(texts)}


@given(patterns, limits, st.booleans(), fills)
def test_rows_of_tokens_come_back_to_their_places(
    pattern: list[list[bool]], max_tokens: int, sort: bool, fill_up: FillUp
) -> None:
    mask = torch.tensor(pattern)
    parts = pack_mask(mask, max_tokens, sort, fill_up, keeps_origins=True)
    assert all(part.token_ids is not None for part in parts)
    # Each token's result is its own number in the flat batch.
    results = [(part.token_ids[: part.num_tokens, None].double(), part) for part in parts]  # type: ignore[index]
    expected = torch.where(mask, torch.arange(mask.numel()).view(mask.shape), -1).double()
    assert torch.equal(unpack_tokens(results, mask.shape, fill=-1.0)[..., 0], expected)


@given(patterns, limits, st.booleans(), fills, st.randoms(use_true_random=False))
def test_wanted_rows_are_found_and_come_back_in_order(
    pattern: list[list[bool]], max_tokens: int, sort: bool, fill_up: FillUp, random: Random
) -> None:
    mask = torch.tensor(pattern)
    wanted = mask & torch.tensor([[random.random() < 0.4 for _ in row] for row in pattern])
    parts = pack_mask(mask, max_tokens, sort, fill_up, keeps_origins=True, chosen=wanted.flatten())
    results = []
    for part in parts:
        assert part.token_ids is not None
        assert part.rows is not None
        assert part.row_sequences is not None
        bounds = part.layout.cu_seqlens
        assert bool((bounds[part.row_sequences] <= part.rows).all())
        assert bool((part.rows < bounds[part.row_sequences + 1]).all())
        results.append((part.token_ids[part.rows, None].double(), part))
    rows, origins = unpack_chosen(results)
    assert origins.tolist() == wanted.flatten().nonzero().squeeze(1).tolist()
    assert rows[:, 0].tolist() == origins.tolist()


@given(patterns, limits, st.booleans(), fills)
def test_places_are_kept_where_a_mask_has_holes(
    pattern: list[list[bool]], max_tokens: int, sort: bool, fill_up: FillUp
) -> None:
    mask = torch.tensor(pattern)
    columns = torch.arange(mask.shape[1]).expand(mask.shape).flatten()
    for part in pack_mask(mask, max_tokens, sort, fill_up, places=columns):
        assert part.layout.positions is not None
        assert torch.equal(part.layout.positions, part.position_ids)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), fills)
def test_filling_belongs_to_no_text(lengths: list[int], fill_up: FillUp) -> None:
    (part,) = pack_parts(source_of([[7] * length for length in lengths]), 10_000, fill_up)
    total, texts = sum(lengths), len(lengths)
    assert part.shape == fill_up(total, texts)
    assert part.layout.cu_seqlens[texts:].tolist() == [total] * (part.shape.sequences - texts + 1)
    assert part.token_ids is not None
    assert part.token_ids.shape == part.position_ids.shape == (part.shape.tokens,)
    assert not bool(part.token_ids[total:].any())
    # The first token of an empty sequence, too, is a row that exists.
    assert int(part.layout.cu_seqlens[:-1].max()) < part.shape.tokens


@given(st.integers(1, 70_000), st.integers(1, 3000))
def test_shapes_are_filled_up_by_little(tokens: int, sequences: int) -> None:
    rows = fill_rows(tokens, sequences)
    least = tokens + (rows.sequences > sequences)
    assert least <= rows.tokens < least + min((least + 32) / 16, 64)
    assert sequences <= rows.sequences <= sequences * 1.25
    bucket = bucket_of(tokens, sequences)
    assert tokens <= bucket.tokens <= max(tokens + 64, tokens * 1.125 + 1)
    assert sequences <= bucket.sequences < 2 * sequences
    assert bucket_of(*bucket) == bucket


def test_there_are_few_shapes() -> None:
    assert len({bucket_of(tokens, 1).tokens for tokens in range(1, 8193)}) <= 48
    # oneDNN keeps memory for each.
    tokens_of_a_pass = range(1, CPU_TOKENS_PER_PASS + 1)
    assert len({fill_rows(tokens, 1).tokens for tokens in tokens_of_a_pass}) <= 130
    assert len({fill_rows(tokens, 1).tokens for tokens in tokens_of_a_pass[:400]}) <= 60
    assert len({fill_rows(tokens_of_a_pass[-1], sequences).sequences for sequences in range(1, 65)}) <= 20
    # One text has none beside it in the last layer.
    assert {fill_rows(tokens, 1).sequences for tokens in tokens_of_a_pass} == {1}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.booleans())
def test_arrays_start_where_wide_loads_may(lengths: list[int], with_types: bool) -> None:
    texts = [[7] * length for length in lengths]
    ones = torch.ones(sum(lengths), dtype=torch.long)
    source = source_of(texts, texts if with_types else None)._replace(chosen=ones.bool(), places=ones.cumsum(0))
    (part,) = pack_parts(source, 10_000)
    start = part.integers.data_ptr()
    arrays = (part.layout.cu_seqlens, part.token_ids, part.position_ids, part.token_type_ids, part.layout.positions)
    for array in (*arrays, part.rows, part.row_sequences):
        assert array is None or (array.data_ptr() - start) % 64 == 0


@given(st.lists(st.booleans(), max_size=50))
def test_indices_of_what_is_kept_without_asking_their_number(mask: list[bool]) -> None:
    kept = torch.tensor(mask, dtype=torch.bool)
    assert torch.equal(true_indices(kept, sum(mask)), kept.nonzero().squeeze(1))


@given(st.lists(st.integers(0, 30), max_size=20))
def test_runs_are_the_layouts_sequences(lengths: list[int]) -> None:
    from fastcls_kernels import PackedLayout

    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    layout = PackedLayout(cu_seqlens, max(lengths, default=0), sum(lengths) + 3)
    expected = list(itertools.pairwise(cu_seqlens.tolist()))
    covered = [
        (run.start_token + index * run.length, run.start_token + (index + 1) * run.length)
        for run in layout.runs
        for index in range(run.num_sequences)
    ]
    assert covered == [bounds for bounds in expected if bounds[0] < bounds[1]]
