"""disentangled_attention against its definition, and its definition against transformers."""

# Arguments come by the list, which mypy cannot count.
# mypy: disable-error-code="arg-type,call-arg"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import assert_as_exact_as, cu_seqlens_of, eager_runs, random
from torch import Tensor
from transformers import DebertaV2Config
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention, make_log_bucket_position

from fastcls_kernels import Buckets, PackedLayout, disentangled_attention
from fastcls_kernels.disentangled_attention import cpu
from fastcls_kernels.reference import disentangled_attention_reference
from fastcls_kernels.runtime.tile_tables import use_tile

HEADS = [pytest.param(3, 16, id="3x16"), pytest.param(1, 64, id="1x64")]
TERMS = [
    pytest.param((True, False), id="key_term"),
    pytest.param((False, True), id="query_term"),
]
# Six buckets a side, of one distance each and then of ranges up to 40; farther ones take the last.
SPAN, FARTHEST, REACH = 6, 40, 45
NUM_BUCKETS = 2 * SPAN
SCALE = 0.15


def make_buckets(device: str, span: int = SPAN, farthest: int = FARTHEST, reach: int = REACH) -> Buckets:
    distances = torch.arange(-reach, reach + 1)
    rows = (make_log_bucket_position(distances, span, farthest).int() + span).clamp(0, 2 * span - 1)
    return Buckets(rows.to(device), tuple(rows.tolist()))


@pytest.fixture(params=[(32, 16), (64, 64)], ids=["32x16", "64x64"])
def tiles(request: pytest.FixtureRequest, kernels: str) -> Iterator[str]:
    """Runs the kernel by tiles lower and higher than most texts are long; gives the device."""
    block_m, block_n = request.param
    with use_tile("disentangled_attention", {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 1}):
        yield kernels


def fused_qkv(total: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return random(total, 3, num_heads, head_dim, dtype=dtype, device=device).unbind(1)


def make_tables(
    num_heads: int, head_dim: int, dtype: torch.dtype, device: str, terms: tuple[bool, bool] = (True, True)
) -> list[Tensor | None]:
    return [random(NUM_BUCKETS, num_heads, head_dim, dtype=dtype, device=device) if term else None for term in terms]


def with_holes(lengths: list[int], device: str) -> Tensor:
    """Positions of texts that have lost up to three tokens before each that is left."""
    texts = [torch.randint(1, 5, (length,)).cumsum(0) - 1 for length in lengths]
    return torch.cat([*texts, torch.zeros(2)]).int().to(device)


def check(
    lengths: list[int],
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    *,
    terms: tuple[bool, bool] = (True, True),
    holes: bool = False,
    longer: int = 0,
    size: float = 1.0,
) -> None:
    # Two rows that belong to no sequence stand at the end.
    total = sum(lengths) + 2
    q, k, v = fused_qkv(total, num_heads, head_dim, dtype, device)
    q, k = q * size, k * size
    tables, buckets = make_tables(num_heads, head_dim, dtype, device, terms), make_buckets(device)
    cu_seqlens, bound = cu_seqlens_of(lengths, device), max(lengths, default=0) + longer
    layout = PackedLayout(cu_seqlens, bound, total, with_holes(lengths, device) if holes else None)
    arguments: list[Any] = [q, k, v, *tables, buckets, cu_seqlens, bound, SCALE]
    actual = disentangled_attention(*arguments, layout=layout)
    where = (buckets.table, layout.token_positions, cu_seqlens, SCALE)
    eager = eager_runs(disentangled_attention_reference, q, k, v, *tables, *where)
    doubles = [None if tensor is None else tensor.double() for tensor in (q, k, v, *tables)]
    assert_as_exact_as(actual, eager, disentangled_attention_reference(*doubles, *where))
    assert not bool(actual[sum(lengths) :].any()), "rows that belong to no sequence must be zero"


@pytest.mark.parametrize(("num_heads", "head_dim"), HEADS)
def test_kernel_matches_definition(
    tiles: str, lengths: list[int], num_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    check(lengths, num_heads, head_dim, dtype, tiles)


@pytest.mark.parametrize(("num_heads", "head_dim"), HEADS)
def test_torch_path_matches_definition(
    torch_path: str, lengths: list[int], num_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    # Few float32 numbers make an RMS that varies by more than the bound's tenth.
    check(lengths * 4, num_heads, head_dim, dtype, torch_path)


@pytest.mark.parametrize("terms", TERMS)
def test_kernel_takes_one_term_alone(kernels: str, dtype: torch.dtype, terms: tuple[bool, bool]) -> None:
    check([17, 60, 3, 33], 2, 32, dtype, kernels, terms=terms)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("holes", [False, True], ids=["rows", "holes"])
def test_torch_path_takes_one_term_alone(
    torch_path: str, dtype: torch.dtype, terms: tuple[bool, bool], holes: bool
) -> None:
    check([17, 17, 0, 60, 3, 33, 1] * 4, 2, 32, dtype, torch_path, terms=terms, holes=holes)


def test_kernel_takes_positions_with_holes(tiles: str, dtype: torch.dtype) -> None:
    # Positions reach farther than rows.
    check([17, 0, 33, 3, 21, 1], 2, 32, dtype, tiles, holes=True)


@pytest.mark.parametrize("head_dim", [4, 8, 24, 26, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_kernel_takes_every_head_size(kernels: str, head_dim: int, dtype: torch.dtype) -> None:
    check([5, 70, 33], 2, head_dim, dtype, kernels)


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
@pytest.mark.parametrize("longer", [0, 1, 8, 1000])
def test_kernel_takes_a_bound_above_the_longest_sequence(kernels: str, dtype: torch.dtype, longer: int) -> None:
    # So short that each distance has a bucket of its own.
    check([3, 2, 4, 1, 3] * 4, 2, 16, dtype, kernels, longer=longer)


@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])
def test_large_scores_do_not_overflow(kernels: str, dtype: torch.dtype) -> None:
    check([40], 1, 16, dtype, kernels, size=100.0)


@pytest.mark.parametrize("holes", [False, True], ids=["rows", "holes"])
@pytest.mark.parametrize("cached", [1, 1000])
@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])
def test_torch_path_takes_a_run_in_pieces(
    torch_path: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, cached: int, holes: bool
) -> None:
    monkeypatch.setattr(cpu, "CACHED", cached)
    check([9] * 7 + [2] * 40 + [60] * 3, 5, 16, dtype, torch_path, holes=holes)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_kernel_on_long_sequences(kernels: str, head_dim: int, dtype: torch.dtype) -> None:
    check([2048, 1, 511, 513, 0], 2, head_dim, dtype, kernels)


@pytest.mark.parametrize("defect", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("spoiled", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_a_text_that_overflows_spoils_no_other(tiles: str, dtype: torch.dtype, spoiled: str, defect: float) -> None:
    check_isolation(dtype, tiles, spoiled, defect)


@pytest.mark.parametrize("spoiled", ["q", "k", "v"])
def test_a_text_that_overflows_spoils_no_other_in_the_torch_path(torch_path: str, spoiled: str) -> None:
    check_isolation(torch.float32, torch_path, spoiled, float("nan"))


def check_isolation(dtype: torch.dtype, device: str, spoiled: str, defect: float) -> None:
    tensors: dict[str, Any] = dict(zip("qkv", fused_qkv(30, 2, 16, dtype, device), strict=True))
    pos_key, pos_query = make_tables(2, 16, dtype, device)
    tensors |= {"pos_key": pos_key, "pos_query": pos_query, "buckets": make_buckets(device)}
    packing: dict[str, Any] = {"cu_seqlens": cu_seqlens_of([10, 10, 8], device), "max_seqlen": 10}
    clean = disentangled_attention(**tensors, **packing, softmax_scale=SCALE)
    tensors[spoiled][15, 0, 3] = defect
    # What stands after the last sequence is stale.
    for name in "qkv":
        tensors[name][28:] = float("nan")
    actual = disentangled_attention(**tensors, **packing, softmax_scale=SCALE)
    others = [*range(10), *range(20, 30)]
    assert torch.equal(actual[others], clean[others])
    assert not bool(actual[10:20, 0].isfinite().all()), "what went wrong must be seen in the text's own rows"


@torch.no_grad()
@pytest.mark.parametrize("span", [-1, 8], ids=["each_distance", "log_buckets"])
@pytest.mark.parametrize("pos_att_type", [["c2p", "p2c"], ["c2p"], ["p2c"]], ids="_".join)
def test_definition_is_that_of_transformers(pos_att_type: list[str], span: int) -> None:
    farthest, length = 20, 50
    config = DebertaV2Config(
        hidden_size=64, num_attention_heads=4, relative_attention=True, pos_att_type=pos_att_type, share_att_key=True,
        position_buckets=span, max_relative_positions=farthest,
    )  # fmt: skip
    attention: Any = DisentangledSelfAttention(config).double().eval()
    hidden, embeddings = torch.randn(1, length, 64).double(), torch.randn(2 * attention.pos_ebd_size, 64).double()
    expected, _ = attention(hidden, torch.ones(1, 1, length, length), rel_embeddings=embeddings)

    q, k, v = (
        layer(hidden[0]).unflatten(1, (4, 16))
        for layer in (attention.query_proj, attention.key_proj, attention.value_proj)
    )
    pos_key = attention.key_proj(embeddings).unflatten(1, (4, 16)) if "c2p" in pos_att_type else None
    pos_query = attention.query_proj(embeddings).unflatten(1, (4, 16)) if "p2c" in pos_att_type else None
    if span > 0:
        buckets = make_buckets("cpu", span, farthest, length)
    else:
        rows = (torch.arange(-length, length + 1) + farthest).clamp(0, 2 * farthest - 1).int()
        buckets = Buckets(rows, tuple(rows.tolist()))
    # transformers takes the root in float32.
    scale = 1 / float(torch.tensor(16.0 * (1 + len(pos_att_type))).sqrt())
    cu_seqlens = cu_seqlens_of([length])
    where = (buckets.table, torch.arange(length), cu_seqlens, scale)
    defined = disentangled_attention_reference(q, k, v, pos_key, pos_query, *where).flatten(1)
    assert float((defined - expected[0]).abs().max()) < 1e-13
    ours = disentangled_attention(q, k, v, pos_key, pos_query, buckets, cu_seqlens, length, scale).flatten(1)
    assert float((ours - defined).abs().max()) < 1e-13


def test_layout_is_used_in_place_of_cu_seqlens() -> None:
    arguments = valid()
    layout = PackedLayout(arguments["cu_seqlens"], 8, 12)
    assert torch.equal(disentangled_attention(**arguments, layout=layout), disentangled_attention(**arguments))
    with pytest.raises(ValueError, match="must be the layout's own"):
        disentangled_attention(**{**arguments, "cu_seqlens": cu_seqlens_of([6, 6])}, layout=layout)


def valid() -> dict[str, Any]:
    q, k, v = fused_qkv(12, 2, 16, torch.float32, "cpu")
    pos_key, pos_query = make_tables(2, 16, torch.float32, "cpu")
    return {
        "q": q,
        "k": k,
        "v": v,
        "pos_key": pos_key,
        "pos_query": pos_query,
        "buckets": make_buckets("cpu"),
        "cu_seqlens": cu_seqlens_of([4, 8]),
        "max_seqlen": 8,
        "softmax_scale": SCALE,
    }


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q_of_two_dimensions": ({"q": torch.zeros(12, 32)}, ValueError, r"q must have shape .*got \(12, 32\)"),
    "k_of_another_dtype": ({"k": torch.zeros(12, 2, 16).half()}, TypeError, "k must be torch.float32"),
    "v_of_another_shape": ({"v": torch.zeros(12, 3, 16)}, ValueError, r"v must have q's shape \(12, 2, 16\)"),
    "strided_last_dimension": (
        {"k": torch.zeros(12, 2, 32)[..., ::2]},
        ValueError,
        "k must be contiguous in its last dimension",
    ),
    "head_of_3": (
        dict.fromkeys("qkv", torch.zeros(12, 2, 3)),
        ValueError,
        "q must have a head size from 4 to 128, got 3",
    ),
    "no_table": ({"pos_key": None, "pos_query": None}, ValueError, "one of pos_key and pos_query must be a tensor"),
    "table_of_another_dtype": (
        {"pos_key": torch.zeros(NUM_BUCKETS, 2, 16).half()},
        TypeError,
        "pos_key must be torch.float32",
    ),
    "table_of_other_heads": (
        {"pos_query": torch.zeros(NUM_BUCKETS, 1, 16)},
        ValueError,
        r"pos_query must have shape \(num_buckets, 2, 16\) .*got \(12, 1, 16\)",
    ),
    "table_of_too_few_rows": (
        {"pos_key": torch.zeros(NUM_BUCKETS - 1, 2, 16)},
        ValueError,
        r"pos_key must have .*buckets 0 to 11, got \(11, 2, 16\)",
    ),
    "strided_table": (
        {"pos_key": torch.zeros(NUM_BUCKETS, 2, 32)[..., ::2]},
        ValueError,
        "pos_key must be contiguous in its last dimension",
    ),
    "table_on_another_device": (
        {"pos_key": torch.zeros(NUM_BUCKETS, 2, 16, device="meta")},
        ValueError,
        "pos_key must be on cpu",
    ),
    "buckets_on_another_device": ({"buckets": make_buckets("meta")}, ValueError, "buckets.table must be on cpu"),
    "buckets_that_are_a_tensor": (
        {"buckets": make_buckets("cpu").table},
        TypeError,
        "buckets must be a Buckets, got Tensor",
    ),
    "short_max_seqlen": ({"max_seqlen": 7}, ValueError, "max_seqlen must be at least the longest sequence, 8, got 7"),
}


@pytest.mark.parametrize(("change", "error", "message"), list(BAD.values()), ids=list(BAD))
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        disentangled_attention(**{**valid(), **change})


@pytest.mark.parametrize(
    ("table", "rows", "error", "message"),
    [
        pytest.param(torch.tensor([0, 1, 2]), (0, 1, 2), TypeError, "torch.int32 tensor, got torch.int64", id="int64"),
        pytest.param([0], (0,), TypeError, "torch.int32 tensor, got .*list", id="no_tensor"),
        pytest.param(torch.zeros(2).int(), (0, 0), ValueError, r"2 \* reach \+ 1 numbers, got 2", id="even"),
        pytest.param(
            torch.zeros(5).int(), (0, 0, 0), ValueError, r"shape \(3,\) like rows, got shape \(5,\)", id="shape"
        ),
        pytest.param(torch.zeros(6).int()[::2], (0, 0, 0), ValueError, r"got .*strides \(2,\)", id="strided"),
        pytest.param(torch.tensor([0, 2, 1]).int(), (0, 2, 1), ValueError, "rise from 0 or more", id="falling"),
        pytest.param(torch.tensor([-1, 0, 1]).int(), (-1, 0, 1), ValueError, "got -1 to 1", id="negative"),
        pytest.param(torch.tensor([0, 1, 1]).int(), (0, 1, 2), ValueError, "must hold the numbers of rows", id="other"),
    ],
)
def test_bad_buckets_are_named(table: Any, rows: tuple[int, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Buckets(table, rows)
