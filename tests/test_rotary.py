"""apply_rotary_ against its definition and against transformers."""

# Arguments come by the list, which mypy cannot count.
# mypy: disable-error-code="arg-type"

from __future__ import annotations

import functools

import pytest
import torch
from support import assert_as_exact_as, random
from torch import Tensor
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb
from transformers.models.roformer.modeling_roformer import RoFormerSelfAttention

from fastcls_kernels import apply_rotary_, use_backend
from fastcls_kernels.reference import apply_rotary_reference

MAX_POSITIONS = 90
# 25 heads, twice, take two blocks of the kernel's.
SHAPES = [
    pytest.param(1, 12, 64, id="one_token"),
    pytest.param(37, 3, 16, id="37x3x16"),
    pytest.param(21, 2, 50, id="21x2x50"),
    pytest.param(13, 25, 32, id="13x25x32"),
    pytest.param(17, 5, 128, id="17x5x128"),
    pytest.param(41, 4, 4, id="41x4x4"),
    pytest.param(0, 2, 16, id="no_tokens"),
]


PAIRS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])


def tables(head_dim: int, device: str) -> tuple[Tensor, Tensor]:
    angles = random(MAX_POSITIONS, head_dim // 2, dtype=torch.float32, device=device, scale=3.0)
    return angles.cos(), angles.sin()


def check(total: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: str, interleaved: bool) -> None:
    qkv = random(total, 3 * num_heads, head_dim, dtype=dtype, device=device)
    before = qkv.clone()
    x, given = (tensor[:, : 2 * num_heads] for tensor in (qkv, before))
    positions = torch.randint(MAX_POSITIONS, (total,), device=device, dtype=torch.int32)
    cos, sin = tables(head_dim, device)
    assert apply_rotary_(x, positions, cos, sin, interleaved=interleaved) is x
    eager = apply_rotary_reference(given, positions, cos, sin, interleaved=interleaved)
    exact = apply_rotary_reference(given.double(), positions, cos.double(), sin.double(), interleaved=interleaved)
    assert_as_exact_as(x, [eager], exact)
    assert torch.equal(qkv[:, 2 * num_heads :], before[:, 2 * num_heads :]), "the values must stay as they are"


@PAIRS
@pytest.mark.parametrize(("total", "num_heads", "head_dim"), SHAPES)
def test_kernel_matches_definition(
    kernels: str, total: int, num_heads: int, head_dim: int, dtype: torch.dtype, interleaved: bool
) -> None:
    check(total, num_heads, head_dim, dtype, kernels, interleaved)


@PAIRS
@pytest.mark.parametrize(("total", "num_heads", "head_dim"), SHAPES)
def test_torch_path_matches_definition(
    torch_path: str, total: int, num_heads: int, head_dim: int, dtype: torch.dtype, interleaved: bool
) -> None:
    check(total, num_heads, head_dim, dtype, torch_path, interleaved)


@PAIRS
@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_kernel_takes_strides_that_no_projection_has(kernels: str, dtype: torch.dtype, interleaved: bool) -> None:
    x = random(5, 9, 70, dtype=dtype, device=kernels).transpose(0, 1)[1::2, :, 3:67]
    before = x.clone()
    positions = torch.tensor([7, 0, 89, 7], device=kernels)
    cos, sin = tables(64, kernels)
    apply_rotary_(x, positions, cos, sin, interleaved=interleaved)
    turned = functools.partial(apply_rotary_reference, interleaved=interleaved)
    exact = turned(before.double(), positions, cos.double(), sin.double())
    assert_as_exact_as(x, [turned(before, positions, cos, sin)], exact)


def test_it_is_what_transformers_does_to_queries_and_keys() -> None:
    q, k = torch.randn(2, 31, 4, 16, dtype=torch.float64)
    positions = torch.randint(MAX_POSITIONS, (31,))
    cos, sin = tables(16, "cpu")
    expected = apply_rotary_pos_emb(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        *(torch.cat((table, table), 1)[positions][None].double() for table in (cos, sin)),
    )
    with use_backend("torch"):
        actual = [apply_rotary_(tensor.clone(), positions, cos, sin) for tensor in (q, k)]
    for turned, wanted in zip(actual, expected, strict=True):
        # transformers computes in float32 whatever it is given.
        torch.testing.assert_close(turned.transpose(0, 1)[None].float(), wanted.float())


def test_interleaved_it_is_what_roformer_does_to_queries_and_keys() -> None:
    q, k = torch.randn(2, 31, 4, 16)
    cos, sin = tables(16, "cpu")
    positions = torch.arange(31)
    # transformers' table holds sines, then cosines, by place.
    sinusoidal = torch.cat((sin, cos), 1)[None, None, :31]
    expected = RoFormerSelfAttention.apply_rotary_position_embeddings(
        sinusoidal, q.transpose(0, 1)[None], k.transpose(0, 1)[None]
    )
    with use_backend("torch"):
        actual = [apply_rotary_(tensor.clone(), positions, cos, sin, interleaved=True) for tensor in (q, k)]
    for turned, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(turned.transpose(0, 1)[None], wanted)


def valid() -> dict[str, object]:
    cos, sin = tables(16, "cpu")
    return {"x": torch.zeros(4, 2, 16), "positions": torch.arange(4), "cos": cos, "sin": sin}


BAD = {
    "x_of_two_dimensions": ({"x": torch.zeros(4, 16)}, ValueError, r"x must have shape .*got \(4, 16\)"),
    "strided_last_dimension": ({"x": torch.zeros(4, 2, 32)[..., ::2]}, ValueError, "x must be contiguous in its last"),
    "head_of_2": ({"x": torch.zeros(4, 2, 2)}, ValueError, "x must have a head size from 4 to 128, got 2"),
    "odd_head": ({"x": torch.zeros(4, 2, 17)}, ValueError, "x must have an even head size, got 17"),
    "float_positions": ({"positions": torch.zeros(4)}, TypeError, "positions must be an int32 or int64 tensor"),
    "positions_of_another_length": (
        {"positions": torch.arange(5)},
        ValueError,
        r"positions must be contiguous, of shape \(total_tokens,\) = \(4,\), got \(5,\)",
    ),
    "positions_elsewhere": (
        {"positions": torch.zeros(4, dtype=torch.int32, device="meta")},
        ValueError,
        "positions must be on cpu",
    ),
    "position_past_the_tables": (
        {"positions": torch.tensor([0, 1, 90, 2])},
        ValueError,
        "positions must lie from 0 to 89, got 0 to 90",
    ),
    "cos_of_float16": ({"cos": torch.zeros(90, 8).half()}, TypeError, "cos must be a torch.float32 tensor.*float16"),
    "sin_of_another_width": (
        {"sin": torch.zeros(90, 16)},
        ValueError,
        r"sin must be .* = \(max_positions, 8\), got shape \(90, 16\)",
    ),
    "sin_of_another_length": (
        {"sin": torch.zeros(89, 8)},
        ValueError,
        r"sin must have cos's shape \(90, 8\), got \(89, 8\)",
    ),
    "cos_elsewhere": ({"cos": torch.zeros(90, 8, device="meta")}, ValueError, "cos must be on cpu"),
}


@pytest.mark.parametrize(("change", "error", "message"), list(BAD.values()), ids=list(BAD))
def test_bad_input_is_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        apply_rotary_(**{**valid(), **change})
