"""The gradients of disentangled attention, on a CPU and as kernels, against autograd of its definition."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support import cu_seqlens_of, random
from torch import Tensor
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from fastcls_kernels import Buckets, PackedLayout
from fastcls_kernels.disentangled_attention.buckets import DistanceTables
from fastcls_kernels.training import disentangled, disentangled_tiles
from fastcls_kernels.training.disentangled import disentangled_backward, disentangled_forward
from fastcls_kernels.training.disentangled_kernel import launch_disentangled_backward, launch_disentangled_forward
from fastcls_kernels.training.dropout import Dropout

# Six buckets a side, of one distance each and then of ranges; farther ones than the table reaches take the last.
SPAN, FARTHEST, REACH, NUM_BUCKETS = 6, 16, 20, 12
SCALE = 0.15
DROPOUT = Dropout(0.25, 2**32 - 5)
NAMES = ("out", "grad_q", "grad_k", "grad_v", "grad_pos_key", "grad_pos_query")
TERMS = {"both_terms": (True, True), "key_term": (True, False), "query_term": (False, True)}
LENGTHS = {
    "with_empty_texts": [0, 1, 0, 40, 2, 0, 7, 33, 0],
    "short": [3, 1, 4, 1, 5, 9, 2, 6, 5, 5],
    "long_and_short": [130, 1, 70, 7],
    "nothing_at_all": [0, 0],
    "no_sequences": [],
}


class Case(NamedTuple):
    """Rows and tables of one attention, and what its output's gradient is."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    tables: DistanceTables
    layout: PackedLayout
    dropout: Dropout | None


def make_case(
    lengths: list[int],
    dtype: torch.dtype,
    device: str,
    *,
    num_heads: int = 2,
    head_dim: int = 16,
    terms: tuple[bool, bool] = (True, True),
    holes: bool = False,
    dropout: Dropout | None = DROPOUT,
) -> Case:
    # Two rows that belong to no sequence stand at the end.
    total = sum(lengths) + 2
    q, k, v = random(total, 3, num_heads, head_dim, dtype=dtype, device=device).unbind(1)
    grad_out = random(total, num_heads, head_dim, dtype=dtype, device=device)
    rows = (make_log_bucket_position(torch.arange(-REACH, REACH + 1), SPAN, FARTHEST).int() + SPAN).clamp(0, 11)
    buckets = Buckets(rows.to(device), tuple(rows.tolist()))
    shape = (NUM_BUCKETS, num_heads, head_dim)
    pos_key, pos_query = (random(*shape, dtype=dtype, device=device) if term else None for term in terms)
    positions = None
    if holes:
        # Up to three tokens are missing before each.
        places = [torch.randint(1, 5, (length,)).cumsum(0) - 1 for length in lengths]
        positions = torch.cat([*places, torch.zeros(2)]).int().to(device)
    layout = PackedLayout(cu_seqlens_of(lengths, device), max(lengths, default=0), total, positions)
    return Case(q, k, v, grad_out, DistanceTables(pos_key, pos_query, buckets), layout, dropout)


def definition(case: Case, q: Tensor, k: Tensor, v: Tensor, pos_key: Tensor | None, pos_query: Tensor | None) -> Tensor:
    """`disentangled_attention_reference` with dropout, made to be differentiated."""
    buckets, layout = case.tables.buckets, case.layout
    outs = []
    for start, end in itertools.pairwise(layout.cu_seqlens.tolist()):
        queries, keys, values = (tensor[start:end].transpose(0, 1) for tensor in (q, k, v))
        place = layout.token_positions[start:end].long()
        rows = buckets.of(place[:, None] - place[None, :]).long()
        scores = queries @ keys.transpose(1, 2)
        if pos_key is not None:
            scores = scores + (queries @ pos_key.permute(1, 2, 0)).gather(2, rows.expand_as(scores))
        if pos_query is not None:
            by_key = (keys @ pos_query.permute(1, 2, 0)).gather(2, rows.T.expand_as(scores))
            scores = scores + by_key.transpose(1, 2)
        weights = torch.softmax(scores * SCALE, dim=-1)
        if case.dropout is not None:
            num_heads = q.shape[1]
            heads = torch.arange(num_heads, dtype=torch.int32, device=q.device)[:, None, None]
            numbers = torch.arange(start, end, dtype=torch.int32, device=q.device)
            kept = case.dropout.kept(numbers[:, None] * num_heads + heads, numbers - start)
            weights = weights * kept.to(weights.dtype) * case.dropout.factor
        outs.append((weights @ values).transpose(0, 1))
    return torch.cat([*outs, q[layout.cu_seqlens[-1] :] * 0])


def by_autograd(case: Case, dtype: torch.dtype) -> list[Tensor | None]:
    """The output and all gradients, as `NAMES` names them."""
    given = [case.q, case.k, case.v, case.tables.keys, case.tables.queries]
    inputs: Any = [None if each is None else each.detach().to(dtype).requires_grad_() for each in given]
    with torch.enable_grad():
        out = definition(case, *inputs)
        wanted = [each for each in inputs if each is not None]
        found = iter(torch.autograd.grad(out, wanted, case.grad_out.to(dtype), materialize_grads=True))
    return [out.detach(), *(None if each is None else next(found) for each in inputs)]


def computed(
    case: Case, forward: Callable[..., Any], backward: Callable[..., Any], **options: Any
) -> list[Tensor | None]:
    """The output and all gradients of our own functions."""
    rest = (case.tables, case.layout, SCALE, case.dropout)
    out, log_sums = forward(case.q, case.k, case.v, *rest)
    grads = backward(case.grad_out, case.q, case.k, case.v, out, log_sums, *rest, **options)
    return [out, *grads]


def on_cpu(case: Case, **options: Any) -> list[Tensor | None]:
    return computed(case, disentangled_forward, disentangled_backward, **options)


def by_kernels(case: Case, **options: Any) -> list[Tensor | None]:
    return computed(case, launch_disentangled_forward, launch_disentangled_backward, **options)


def error(values: Tensor, truth: Tensor) -> float:
    """The RMS error."""
    difference = values.double() - truth
    return float(difference.square().mean().sqrt()) if truth.numel() else 0.0


def check(case: Case, compute: Callable[..., list[Tensor | None]]) -> None:
    actual, exact, eager = compute(case), by_autograd(case, torch.float64), by_autograd(case, case.q.dtype)
    for name, found, truth, run in zip(NAMES, actual, exact, eager, strict=True):
        assert (found is None) == (truth is None), f"{name} is {found}"
        if found is None or truth is None or run is None:
            continue
        is_table = "pos" in name
        assert found.dtype == (torch.float32 if is_table else case.q.dtype), f"{name} is {found.dtype}"
        assert found.shape == truth.shape
        assert bool(found.isfinite().all()), f"{name} is not finite"
        allowed = 1.5 * max(error(run, truth), error(truth.to(case.q.dtype), truth))
        assert error(found, truth) <= allowed, f"{name}: error {error(found, truth):.3e}, allowed {allowed:.3e}"
        if not is_table:
            assert not bool(found[case.layout.cu_seqlens[-1] :].any()), f"{name}: rows of no sequence must be zero"


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["whole", "dropout"])
@pytest.mark.parametrize("holes", [False, True], ids=["rows", "holes"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_torch_path_matches_autograd_of_the_definition(
    torch_path: str,
    dtype: torch.dtype,
    lengths: list[int],
    holes: bool,
    dropout: Dropout | None,
    terms: tuple[bool, bool],
) -> None:
    check(make_case(lengths, dtype, torch_path, terms=terms, holes=holes, dropout=dropout), on_cpu)


@pytest.mark.parametrize("holes", [False, True], ids=["rows", "holes"])
def test_torch_path_is_exact_in_float64(torch_path: str, holes: bool) -> None:
    case = make_case([9, 7, 0, 8, 60, 1], torch.float64, torch_path, num_heads=3, holes=holes)
    for name, found, truth in zip(NAMES, on_cpu(case), by_autograd(case, torch.float64), strict=True):
        assert found is not None
        assert truth is not None
        assert found.dtype == torch.float64
        assert float((found - truth).abs().max()) < 1e-12 * float(truth.abs().max()), name


@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])
def test_torch_path_takes_heads_in_turns_and_products_by_the_other_library(
    torch_path: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(disentangled, "_CACHED", 1)
    monkeypatch.setattr(disentangled, "_LARGE", 1)
    check(make_case([9, 7, 0, 8, 60, 1], dtype, torch_path, num_heads=3), on_cpu)


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["whole", "dropout"])
@pytest.mark.parametrize("holes", [False, True], ids=["rows", "holes"])
def test_kernels_match_autograd_of_the_definition(
    kernels: str, dtype: torch.dtype, holes: bool, dropout: Dropout | None, terms: tuple[bool, bool]
) -> None:
    # Farther apart than the table reaches, an empty text, one of one token, two in one tile.
    case = make_case([25, 0, 1, 17, 7], dtype, kernels, terms=terms, holes=holes, dropout=dropout)
    check(case, by_kernels)


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
@pytest.mark.parametrize("lengths", [[2, 5, 3], [0, 0], []], ids=["short", "nothing", "no_sequences"])
def test_kernels_take_the_shortest_texts(kernels: str, dtype: torch.dtype, lengths: list[int]) -> None:
    check(make_case(lengths, dtype, kernels), by_kernels)


@pytest.mark.parametrize("head_dim", [4, 24, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_kernels_take_every_head_size(kernels: str, dtype: torch.dtype, head_dim: int) -> None:
    check(make_case([5, 20], dtype, kernels, head_dim=head_dim), by_kernels)


@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])
def test_kernels_take_heads_in_turns(kernels: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(disentangled_tiles, "_MATRIX", 1)
    check(make_case([5, 12], dtype, kernels, num_heads=3), by_kernels)


@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])
def test_gradients_go_into_parts_of_one_tensor(torch_path: str, dtype: torch.dtype) -> None:
    check_into(make_case([9, 0, 12, 1], dtype, torch_path), on_cpu)


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_kernels_gradients_go_into_parts_of_one_tensor(kernels: str, dtype: torch.dtype) -> None:
    check_into(make_case([9, 0, 12, 1], dtype, kernels), by_kernels)


def check_into(case: Case, compute: Callable[..., list[Tensor | None]]) -> None:
    total, num_heads, head_dim = case.q.shape
    fused = case.q.new_empty(total, 3, num_heads, head_dim)
    expected = compute(case)
    actual = compute(case, into=fused.unbind(1))
    for name, part, found, wanted in zip(NAMES[1:4], fused.unbind(1), actual[1:4], expected[1:4], strict=True):
        assert found is not None
        assert wanted is not None
        assert found.data_ptr() == part.data_ptr(), name
        # Twice the same numbers, too.
        assert torch.equal(part, wanted), name


@pytest.mark.parametrize("spoiled", ["q", "k", "v", "grad_out"])
@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])
def test_a_text_that_overflows_spoils_no_other(torch_path: str, dtype: torch.dtype, spoiled: str) -> None:
    check_isolation(make_case([10, 9, 8, 30], dtype, torch_path), on_cpu, spoiled)


@pytest.mark.parametrize("spoiled", ["q", "k", "v", "grad_out"])
@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_a_text_that_overflows_spoils_no_other_in_the_kernels(kernels: str, dtype: torch.dtype, spoiled: str) -> None:
    check_isolation(make_case([10, 9, 8], dtype, kernels, num_heads=1), by_kernels, spoiled)


def check_isolation(case: Case, compute: Callable[..., list[Tensor | None]], spoiled: str) -> None:
    last = int(case.layout.cu_seqlens[-1])
    # What stands after the last text is stale.
    for rows in (case.q, case.k, case.v, case.grad_out):
        rows[last:] = float("nan")
    clean = compute(case)
    for name, found in zip(NAMES, clean, strict=True):
        assert found is not None
        assert bool(found.isfinite().all()), f"{name} took what stands after the last text"
    getattr(case, spoiled)[13, 0, 3] = float("nan")
    others = [*range(10), *range(19, last + 2)]
    is_seen = False
    for name, found, wanted in zip(NAMES[:4], compute(case), clean, strict=False):
        assert found is not None
        assert wanted is not None
        assert torch.equal(found[others], wanted[others]), name
        is_seen |= not bool(found[10:19, 0].isfinite().all())
    assert is_seen, "what went wrong must be seen in the text's own rows"
