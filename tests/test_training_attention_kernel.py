"""Attention that can be trained, by kernels and on a CPU, against autograd of its definition."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from support import assert_as_exact_as, cu_seqlens_of, eager_runs, random
from test_tile_map import rising_positions
from torch import Tensor

from fastcls_kernels import PackedLayout
from fastcls_kernels.attention import cpu
from fastcls_kernels.training import Heads, Scoring, attention
from fastcls_kernels.training.attention_kernel import launch_attention_backward, launch_attention_forward
from fastcls_kernels.training.dropout import Dropout

# Of one token, of none, and around the tiles of every dtype.
LENGTHS = [1, 33, 0, 70, 2]
# Rows that belong to no sequence.
REST = 2
DROPOUT = Dropout(rate=0.3, seed=0x9ABC_DEF0)


class Case(NamedTuple):
    """One kind of attention, of `heads` heads of queries and `heads_k` of keys."""

    heads: int = 2
    heads_k: int = 2
    head_dim: int = 16
    window: tuple[int, int] = (-1, -1)
    reach: int | None = None
    dropout: Dropout | None = None
    has_positions: bool = False


CASES = {
    "plain": Case(),
    "wide_heads": Case(heads=1, heads_k=1, head_dim=80),
    "narrow_heads": Case(head_dim=12),
    "dropout": Case(dropout=DROPOUT),
    "grouped": Case(heads=4, dropout=DROPOUT),
    "window": Case(window=(5, 3)),
    "window_of_positions": Case(window=(3, 20), dropout=DROPOUT, has_positions=True),
    "left_neighbours": Case(window=(2, 0)),
    "causal": Case(window=(-1, 0)),
    "bias": Case(reach=9, dropout=DROPOUT),
    "bias_of_three_numbers": Case(reach=1),
    "bias_by_far_positions": Case(reach=40, has_positions=True),
    "bias_beyond_all_lengths": Case(reach=80),
    "all_of_it": Case(heads_k=1, window=(20, 33), reach=25, dropout=DROPOUT, has_positions=True),
}


class Given(NamedTuple):
    """Tensors that an attention starts from, and the layout of their rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    grad: Tensor
    layout: PackedLayout


def given(case: Case, dtype: torch.dtype, device: str, lengths: list[int]) -> Given:
    """Random ones; queries, keys and values are views of one projection."""
    total = sum(lengths) + REST
    sizes = [case.heads, case.heads_k, case.heads_k]
    q, k, v = random(total, sum(sizes), case.head_dim, dtype=dtype, device=device).split(sizes, 1)
    bias = None
    if case.reach is not None:
        bias = random(case.heads, 2 * case.reach + 1, dtype=torch.float32, device=device)
    grad = random(total, case.heads, case.head_dim, dtype=dtype, device=device)
    positions = rising_positions(lengths, REST).to(device) if case.has_positions else None
    layout = PackedLayout(cu_seqlens_of(lengths, device), max(lengths, default=0), total, positions)
    return Given(q, k, v, bias, grad, layout)


def scale_of(case: Case) -> float:
    # Not the root of the size, which could be taken for granted.
    return 0.7 * case.head_dim**-0.5


def defined(case: Case, layout: PackedLayout, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """drop(softmax(q kᵀ · scale + bias)) v over each row's window in its sequence, in the plainest PyTorch."""
    k, v = (tensor.repeat_interleave(case.heads // case.heads_k, dim=1) for tensor in (k, v))
    outputs = []
    for start, end in itertools.pairwise(layout.cu_seqlens.tolist()):
        queries, keys, values = (tensor[start:end].transpose(0, 1) for tensor in (q, k, v))
        scores = queries @ keys.transpose(1, 2) * scale_of(case)
        position = layout.token_positions[start:end].long()
        offset = position[None, :] - position[:, None]
        if bias is not None:
            reach = bias.shape[1] // 2
            scores = scores + bias[:, offset.clamp(-reach, reach) + reach]
        left, right = case.window
        is_far = (offset < -left) & (left >= 0) | (offset > right) & (right >= 0)
        weights = torch.softmax(scores.masked_fill(is_far, -float("inf")), -1).to(q.dtype)
        if case.dropout is not None:
            row = torch.arange(start, end, dtype=torch.int32, device=q.device)
            head = torch.arange(case.heads, dtype=torch.int32, device=q.device)
            rows = row[None, :, None] * case.heads + head[:, None, None]
            weights = weights * case.dropout.kept(rows, (row - start)[None, None, :]) * case.dropout.factor
        outputs.append((weights @ values).transpose(0, 1))
    return torch.cat((*outputs, q.new_zeros(REST, *q.shape[1:])))


def by_autograd(case: Case, given: Given, dtype: torch.dtype) -> tuple[list[Tensor], ...]:
    """The output and the gradients of the definition in a dtype, of each eager run one."""
    leaves = [tensor.to(dtype).detach().requires_grad_() for tensor in given[:3]]
    if given.bias is not None:
        leaves.append(given.bias.to(torch.promote_types(dtype, torch.float32)).requires_grad_())

    def run() -> Tensor:
        bias = leaves[3] if given.bias is not None else None
        out = defined(case, given.layout, leaves[0], leaves[1], leaves[2], bias)
        grads = torch.autograd.grad(out, leaves, given.grad.to(dtype))
        return torch.cat([each.detach().flatten() for each in (out, *grads)])

    shapes = [given.q.shape, *(leaf.shape for leaf in leaves)]
    runs = [run()] if dtype == torch.float64 else eager_runs(run)
    parts = [run.split([shape.numel() for shape in shapes]) for run in runs]
    return tuple(
        [part[place].view(shape).to((given.q, *leaves)[place].dtype) for part in parts]
        for place, shape in enumerate(shapes)
    )


def launched(case: Case, given: Given) -> tuple[Tensor, ...]:
    """The output and the gradients by the kernels."""
    q, k, v, bias, grad, layout = given
    scoring = (layout, scale_of(case), case.window, bias, case.dropout)
    out, statistics = launch_attention_forward(q, k, v, *scoring)
    grads = launch_attention_backward(grad, q, k, v, out, statistics, *scoring)
    return (out, *grads[:3]) if grads[3] is None else (out, *grads[:3], grads[3])


NAMES = ("output", "gradient of queries", "gradient of keys", "gradient of values", "gradient of the bias")


@pytest.mark.covering(alone=["name", "dtype"])
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_match_autograd_of_the_definition(kernels: str, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    tensors = given(case, dtype, kernels, LENGTHS)
    found = launched(case, tensors)
    eager, exact = (by_autograd(case, tensors, kind) for kind in (dtype, torch.float64))
    assert len(found) == len(eager)
    for what, actual, runs, (truth,) in zip(NAMES, found, eager, exact, strict=False):
        # A sum over all keys is taken of the rounded output, which errs more than eager's where keys are few.
        assert_as_exact_as(actual, runs, truth, what, times=1.5, times_worst=3)
    for rows in found[:4]:
        assert not bool(rows[-REST:].any()), "rows that belong to no sequence must be zero"


@pytest.mark.parametrize("name", CASES)
def test_torch_path_matches_autograd_of_the_definition(
    torch_path: str, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    # Several blocks of rows in most texts.
    monkeypatch.setattr(cpu, "WINDOW_BLOCK", 4)
    monkeypatch.setattr(cpu, "BIAS_BLOCK", 8)
    case = CASES[name]
    tensors = given(case, dtype, torch_path, LENGTHS)
    qkv = torch.cat(tensors[:3], 1).flatten(1).requires_grad_()
    bias = None if tensors.bias is None else tensors.bias.requires_grad_()
    heads = Heads(case.heads, case.heads_k, case.head_dim)
    out = attention(qkv, bias, heads, tensors.layout, Scoring(scale_of(case), case.window, case.dropout))
    grad_qkv, *others = torch.autograd.grad(out, [qkv] if bias is None else [qkv, bias], tensors.grad.flatten(1))
    found = (out.view(tensors.q.shape).detach(), *heads.split(grad_qkv), *others)
    eager, exact = (by_autograd(case, tensors, kind) for kind in (dtype, torch.float64))
    for what, actual, runs, (truth,) in zip(NAMES, found, eager, exact, strict=False):
        assert_as_exact_as(actual, runs, truth, what, times=1.5, times_worst=3)


@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])
def test_the_gradient_of_a_bias_of_one_number_is_rounding_alone(kernels: str, dtype: torch.dtype) -> None:
    case = Case(reach=0)
    *_, grad_bias = launched(case, given(case, dtype, kernels, LENGTHS))
    pairs = sum(length**2 for length in LENGTHS)
    assert grad_bias.shape == (case.heads, 1)
    assert float(grad_bias.abs().max()) < pairs * torch.finfo(dtype).eps


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=["no_sequences", "nothing_at_all"])
@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_gradients_are_zero_where_there_are_no_texts(kernels: str, lengths: list[int], dtype: torch.dtype) -> None:
    case = CASES["bias"]
    for each in launched(case, given(case, dtype, kernels, lengths)):
        assert torch.equal(each, torch.zeros_like(each))


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_gradients_are_stored_into_parts_of_one_projection(kernels: str, dtype: torch.dtype) -> None:
    case = CASES["grouped"]
    q, k, v, bias, grad, layout = given(case, dtype, kernels, [1, 33, 0, 2])
    scoring = (layout, scale_of(case), case.window, bias, case.dropout)
    out, statistics = launch_attention_forward(q, k, v, *scoring)
    expected = launch_attention_backward(grad, q, k, v, out, statistics, *scoring)[:3]
    sizes = [case.heads, case.heads_k, case.heads_k]
    fused = q.new_empty(layout.total_tokens, sum(sizes), case.head_dim)
    into = fused.split(sizes, 1)
    # A gradient that is not contiguous, either.
    strided = torch.stack((grad, grad), 1)[:, 0]
    launch_attention_backward(strided, q, k, v, out, statistics, *scoring, into=(into[0], into[1], into[2]))
    assert torch.equal(fused, torch.cat(expected, 1))


@pytest.mark.parametrize("spoiled", ["q", "k", "v", "grad"])
@pytest.mark.parametrize("defect", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
@pytest.mark.covering(alone=["spoiled", "defect"])
def test_a_text_that_overflows_spoils_no_other(kernels: str, spoiled: str, defect: float, dtype: torch.dtype) -> None:
    case = CASES["dropout"]
    tensors = given(case, dtype, kernels, [5, 6, 7])
    clean = launched(case, tensors)
    getattr(tensors, spoiled)[8, 0, 3] = defect
    others = [*range(5), *range(11, 20)]
    spoilt = launched(case, tensors)
    for before, after in zip(clean, spoilt, strict=True):
        assert torch.equal(before[others], after[others])
    own = torch.cat([each[5:11, 0].flatten() for each in spoilt])
    assert not bool(own.isfinite().all()), "what went wrong must be seen in the text's own rows"


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_tiles_that_no_window_reaches_are_not_read(kernels: str, dtype: torch.dtype) -> None:
    case = Case(heads=1, heads_k=1, window=(3, 5), reach=4)
    tensors = given(case, dtype, kernels, [400])
    clean = launched(case, tensors)
    for each in (tensors.q, tensors.k, tensors.v, tensors.grad):
        each[220] = float("nan")
    # A tile of its own and the tiles beside it may take part; the others, on both sides, may not.
    others = [*range(128), *range(320, 400)]
    for before, after in zip(clean[:4], launched(case, tensors)[:4], strict=True):
        assert torch.equal(before[others], after[others])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_every_run_gives_the_same_gradients(kernels: str, dtype: torch.dtype) -> None:
    case = CASES["all_of_it"]
    tensors = given(case, dtype, kernels, [512, 1, 300, 129])
    for first, second in zip(launched(case, tensors), launched(case, tensors), strict=True):
        assert torch.equal(first, second)
