"""Which sequence a row or a tile belongs to, against a plain count."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import cu_seqlens_of

from fastcls_kernels import PackedLayout, use_backend

REST = 3


def layout_of(lengths: list[int], device: str) -> PackedLayout:
    return PackedLayout(cu_seqlens_of(lengths, device), max(lengths, default=0), sum(lengths) + REST)


def check_row_bounds(lengths: list[int], device: str) -> None:
    layout = layout_of(lengths, device)
    bounds = list(itertools.pairwise(layout.cu_seqlens.tolist()))
    expected = [each for each in bounds for _ in range(*each)] + [(0, 0)] * REST
    with use_backend("triton"):
        starts, ends = layout.row_bounds
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == expected


def check_tiles(lengths: list[int], device: str, block_m: int) -> None:
    layout = layout_of(lengths, device)
    with use_backend("triton"):
        tiles = layout.sequence_tiles(block_m).tolist()
    written = []
    for first, last, key_start, key_end in tiles:
        rows = range(first, min(first + block_m, last))
        written += [(row, key_start, key_end) for row in rows]
        assert rows or key_start == key_end, "a tile without rows must not read keys"
    bounds = [*itertools.pairwise(layout.cu_seqlens.tolist()), (sum(lengths), layout.total_tokens)]
    own = [*bounds[:-1], (0, 0)]
    assert written == [(row, *keys) for rows, keys in zip(bounds, own, strict=True) for row in range(*rows)]


def test_each_row_knows_its_sequence(kernel_device: str, lengths: list[int]) -> None:
    check_row_bounds(lengths, kernel_device)


@pytest.mark.parametrize("block_m", [16, 128])
def test_each_row_is_written_by_one_tile_of_its_own_sequence(
    kernel_device: str, lengths: list[int], block_m: int
) -> None:
    check_tiles(lengths, kernel_device, block_m)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")
@given(st.lists(st.integers(0, 70), max_size=20), st.sampled_from([16, 32]))
def test_any_lengths_are_mapped(lengths: list[int], block_m: int) -> None:
    check_row_bounds(lengths, "cpu")
    check_tiles(lengths, "cpu", block_m)
