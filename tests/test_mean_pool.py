"""mean_pool against its definition."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support import assert_as_exact_as, cu_seqlens_of, eager_runs, random
from torch import Tensor

from fastcls_kernels import PackedLayout, mean_pool
from fastcls_kernels.reference import mean_pool_reference

WIDTHS = [768, 70, 1]


def one_after_another(x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """The definition with the sum's plainest order; how a float32 sum errs depends on it."""
    out = mean_pool_reference(x, cu_seqlens, max_seqlen)
    for sequence, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        if end > start:
            out[sequence] = sum(x[start:end].unbind(0)) / (end - start)
    return out


def check(lengths: list[int], width: int, dtype: torch.dtype, device: str) -> None:
    # Rows that belong to no sequence, as stale memory has them, stand at the end; and rows are those of a wider tensor.
    total = sum(lengths)
    x = random(total + 2, width + 5, dtype=dtype, device=device)[:, :width]
    x[total:] = float("nan")
    cu_seqlens, longest = cu_seqlens_of(lengths, device), max(lengths, default=0)
    actual = mean_pool(x, cu_seqlens, longest)
    eager = eager_runs(mean_pool_reference, x, cu_seqlens, longest)
    if dtype == torch.float32:
        eager.append(one_after_another(x, cu_seqlens, longest))
    assert_as_exact_as(actual, eager, mean_pool_reference(x.double(), cu_seqlens, longest))
    empty = [sequence for sequence, length in enumerate(lengths) if length == 0]
    assert not bool(actual[empty].any()), "a sequence without tokens must be zero"


@pytest.mark.parametrize("width", WIDTHS)
def test_kernel_matches_definition(kernels: str, lengths: list[int], width: int, dtype: torch.dtype) -> None:
    # Few numbers make an RMS that varies by more than the bound's tenth.
    check(lengths * (8 if width < 768 else 1), width, dtype, kernels)


@pytest.mark.parametrize("width", WIDTHS)
def test_torch_path_matches_definition(torch_path: str, lengths: list[int], width: int, dtype: torch.dtype) -> None:
    check(lengths * (8 if width < 768 else 1), width, dtype, torch_path)


def check_large_sums(dtype: torch.dtype, device: str) -> None:
    """The sums are beyond what float16 holds, the means are not."""
    x = torch.full((300, 40), 1000.0, dtype=dtype, device=device)
    actual = mean_pool(x, cu_seqlens_of([100, 200], device), 200)
    assert torch.equal(actual, torch.full_like(actual, 1000.0))


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_kernel_sums_in_float32(kernels: str, dtype: torch.dtype) -> None:
    check_large_sums(dtype, kernels)


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_torch_path_sums_in_float32(torch_path: str, dtype: torch.dtype) -> None:
    check_large_sums(dtype, torch_path)


def check_neighbours(dtype: torch.dtype, device: str) -> None:
    x = random(30, 40, dtype=dtype, device=device)
    cu_seqlens = cu_seqlens_of([10, 12, 8], device)
    clean = mean_pool(x, cu_seqlens, 12)
    x[15] = float("nan")
    actual = mean_pool(x, cu_seqlens, 12)
    assert torch.equal(actual[[0, 2]], clean[[0, 2]])
    assert bool(actual[1].isnan().all()), "what went wrong must be seen in the text's own row"


def test_a_text_that_overflows_spoils_no_other(kernels: str, dtype: torch.dtype) -> None:
    check_neighbours(dtype, kernels)


def test_a_text_that_overflows_spoils_no_other_in_the_torch_path(torch_path: str) -> None:
    check_neighbours(torch.float32, torch_path)


def test_layout_is_used_in_place_of_cu_seqlens() -> None:
    x = random(12, 16, dtype=torch.float32, device="cpu")
    layout = PackedLayout(cu_seqlens_of([4, 8]), 8, 12)
    with_layout = mean_pool(x, layout.cu_seqlens, 8, layout=layout)
    assert torch.equal(with_layout, mean_pool(x, layout.cu_seqlens, 8))
    with pytest.raises(ValueError, match="must be the layout's own"):
        mean_pool(x, cu_seqlens_of([6, 6]), 8, layout=layout)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"hidden_states": torch.zeros(12)}, ValueError, r"\(total_tokens, width\), got \(12,\)", id="1d"),
        pytest.param({"hidden_states": torch.zeros(12, 4).int()}, TypeError, "one of .*int32", id="dtype"),
        pytest.param({"hidden_states": torch.zeros(4, 12).T}, ValueError, "contiguous in its last", id="strides"),
        pytest.param({"max_seqlen": 7}, ValueError, "at least the longest sequence, 8, got 7", id="max_seqlen"),
        pytest.param({"cu_seqlens": torch.tensor([0, 12])}, TypeError, "cu_seqlens must be a torch.int32", id="int64"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    valid: dict[str, Any] = {"hidden_states": torch.zeros(12, 4), "cu_seqlens": cu_seqlens_of([4, 8]), "max_seqlen": 8}
    with pytest.raises(error, match=message):
        mean_pool(**{**valid, **change})


def test_nothing_is_made_of_a_tensor_without_columns(torch_path: str) -> None:
    assert mean_pool(torch.zeros(12, 0, device=torch_path), cu_seqlens_of([4, 8]), 8).shape == (2, 0)
