"""Which sequence a row or a tile belongs to, and which rows a window reaches, against a plain count."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import cu_seqlens_of
from torch import Tensor

from fastcls_kernels import Backend, PackedLayout, use_backend

REST = 3
WINDOWS = [(0, 0), (2, 1), (0, -1), (-1, 3), (64, 64), (1 << 40, 1 << 40), (-1, -1)]


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, kernel_device: str) -> Iterator[str]:
    """Runs layouts in plain PyTorch or as kernels; gives the device."""
    with use_backend(request.param):
        yield kernel_device


def rising_positions(lengths: list[int], rest: int) -> Tensor:
    """Positions of texts in which now and then a token was left out, also before the first, and of the rows after."""
    texts = [(torch.arange(length).square() % 7).clamp(min=1).cumsum(0) for length in lengths]
    return torch.cat((*texts, torch.zeros(rest))).int()


def layout_of(lengths: list[int], device: str, positions: list[int] | None = None) -> PackedLayout:
    given = None if positions is None else torch.tensor(positions, dtype=torch.int32, device=device)
    return PackedLayout(cu_seqlens_of(lengths, device), max(lengths, default=0), sum(lengths) + REST, given)


def check_row_bounds(lengths: list[int], device: str) -> None:
    layout = layout_of(lengths, device)
    bounds = list(itertools.pairwise(layout.cu_seqlens.tolist()))
    expected = [each for each in bounds for _ in range(*each)] + [(0, 0)] * REST
    assert pairs(layout.row_bounds) == expected


def pairs(bounds: tuple[Tensor, Tensor]) -> list[tuple[int, int]]:
    assert {bound.dtype for bound in bounds} == {torch.int32}
    starts, ends = (bound.tolist() for bound in bounds)
    return list(zip(starts, ends, strict=True))


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


def check_window(lengths: list[int], device: str, positions: list[int] | None, window: tuple[int, int]) -> None:
    layout = layout_of(lengths, device, positions)
    if positions is None:
        positions = [*itertools.chain.from_iterable(map(range, lengths)), *[0] * REST]
    left, right = window
    expected = []
    for start, end in itertools.pairwise(layout.cu_seqlens.tolist()):
        for row in range(start, end):
            offsets = [positions[other] - positions[row] for other in range(start, end)]
            near = [
                start + index
                for index, offset in enumerate(offsets)
                if (left < 0 or offset >= -left) and (right < 0 or offset <= right)
            ]
            assert near == list(range(near[0], near[-1] + 1)), "a window is one range of rows"
            expected.append((near[0], near[-1] + 1))
    assert pairs(layout.window_bounds(*window)) == expected + [(0, 0)] * REST
    assert layout.token_positions.tolist() == positions[: sum(lengths)] + [0] * REST
    assert layout.token_positions.dtype == torch.int32


def test_each_row_knows_its_sequence(backend: str, lengths: list[int]) -> None:
    check_row_bounds(lengths, backend)


@pytest.mark.parametrize("block_m", [16, 128])
def test_each_row_is_written_by_one_tile_of_its_own_sequence(
    kernel_device: str, lengths: list[int], block_m: int
) -> None:
    check_tiles(lengths, kernel_device, block_m)


@pytest.mark.parametrize("left_out", [False, True], ids=["all_rows", "rows_left_out"])
def test_a_window_reaches_the_rows_whose_positions_lie_in_it(backend: str, lengths: list[int], left_out: bool) -> None:
    positions = rising_positions(lengths, REST).tolist() if left_out else None
    for window in WINDOWS:
        check_window(lengths, backend, positions, window)


def test_the_largest_positions_there_are_stay_apart(backend: str) -> None:
    largest = (1 << 31) - 1
    # The rows that belong to no sequence may hold anything.
    positions = [largest, 0, largest - 1, largest, 0, 1, largest, largest, 0, -5]
    for window in [*WINDOWS, (largest, 0), (0, largest), (largest - 1, largest - 1)]:
        check_window([1, 3, 2, 1], backend, positions, window)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")
@given(
    st.lists(st.integers(0, 70), max_size=20),
    st.sampled_from([16, 32]),
    st.tuples(st.integers(-1, 80), st.integers(-1, 80)),
    st.booleans(),
    st.sampled_from(["torch", "triton"]),
)
def test_any_lengths_are_mapped(
    lengths: list[int], block_m: int, window: tuple[int, int], left_out: bool, backend: Backend
) -> None:
    with use_backend(backend):
        check_row_bounds(lengths, "cpu")
        check_window(lengths, "cpu", rising_positions(lengths, REST).tolist() if left_out else None, window)
    check_tiles(lengths, "cpu", block_m)


def test_a_window_is_found_once_for_all_layers() -> None:
    layout = layout_of([5, 2], "cpu", [0, 2, 3, 4, 9, 0, 1, 0, 0, 0])
    assert layout.window_bounds(2, 1) is layout.window_bounds(2, 1)
    assert pairs(layout.window_bounds(2, 1)) != pairs(layout.window_bounds(1, 2))
    assert layout.token_positions is layout.token_positions


@pytest.mark.parametrize("left_out", [False, True], ids=["all_rows", "rows_left_out"])
def test_nothing_that_a_layout_says_of_rows_reads_a_value(left_out: bool) -> None:
    # Tensors without memory have none to read, as a wait for the device would.
    positions = torch.empty(10, dtype=torch.int32, device="meta") if left_out else None
    layout = PackedLayout(torch.empty(4, dtype=torch.int32, device="meta"), 5, 10, positions)
    with use_backend("torch"):
        found = (*layout.row_bounds, layout.token_positions, *layout.window_bounds(2, 1))
    assert [(tensor.shape, tensor.dtype, tensor.device.type) for tensor in found] == [((10,), torch.int32, "meta")] * 5


BAD = {
    "list": ([0, 1, 2, 0, 1], TypeError, "positions must be a torch.int32 tensor, got list"),
    "int64": (torch.tensor([0, 1, 2, 0, 1]), TypeError, "positions must be a torch.int32 tensor, got torch.int64"),
    "too_few": (
        torch.tensor([0, 1, 2, 0], dtype=torch.int32),
        ValueError,
        r"positions must be contiguous, of shape \(total_tokens,\) = \(5,\), got shape \(4,\)",
    ),
    "strided": (torch.zeros(10, dtype=torch.int32)[::2], ValueError, r"must be contiguous.*with strides \(2,\)"),
    "elsewhere": (torch.zeros(5, dtype=torch.int32, device="meta"), ValueError, "positions must be on cpu"),
    "standing_still": (
        torch.tensor([0, 4, 4, 0, 1], dtype=torch.int32),
        ValueError,
        "positions must rise inside each sequence, from at least 0, got 4 at row 2",
    ),
    "falling": (torch.tensor([0, 1, 2, 3, 2], dtype=torch.int32), ValueError, "got 2 at row 4"),
    "negative": (torch.tensor([0, 1, 2, -1, 1], dtype=torch.int32), ValueError, "got -1 at row 3"),
}


@pytest.mark.parametrize(("positions", "error", "message"), list(BAD.values()), ids=list(BAD))
def test_bad_positions_are_named(positions: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PackedLayout(cu_seqlens_of([3, 0, 2]), 3, 5, positions)
