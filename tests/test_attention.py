"""attention_varlen and attention_padded against their definition."""

# Arguments come by the list, which mypy cannot count.
# mypy: disable-error-code="arg-type,call-arg"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from support import assert_as_exact_as, cu_seqlens_of, eager_runs, random
from test_tile_map import rising_positions
from torch import Tensor

from fastcls_kernels import PackedLayout, attention_padded, attention_varlen
from fastcls_kernels.attention.cpu import BIAS_BLOCK, WINDOW_BLOCK, row_blocks
from fastcls_kernels.attention.kernel import choose_tile, fits_tma
from fastcls_kernels.reference import attention_padded_reference, attention_varlen_reference
from fastcls_kernels.runtime.tile_tables import AttentionTile, use_tile

HEADS = [pytest.param(3, 16, id="3x16"), pytest.param(2, 48, id="2x48"), pytest.param(1, 64, id="1x64")]
# Heads of queries, and of the keys and values that they share.
GROUPED = [
    pytest.param(3, 3, id="groups_of_1"),
    pytest.param(4, 2, id="groups_of_2"),
    pytest.param(6, 2, id="groups_of_3"),
    pytest.param(4, 1, id="groups_of_4"),
]

# The tiles of the smallest chip are chosen from in the interpreter; these are all schedules and ways to fetch.
SCHEDULES = [
    pytest.param((per_sequence, tma), id=f"{'sequence' if per_sequence else 'token'}_tiles{'_tma' if tma else ''}")
    for per_sequence in (False, True)
    for tma in (False, True)
]


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest, kernels: str) -> Iterator[str]:
    """Runs attention by one schedule, on every tensor that it can take; gives the device."""
    per_sequence, tma = request.param
    if tma and kernels == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("the copy engine comes with compute capability 9.0")
    tile = AttentionTile(per_sequence, tma, BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=2)
    with use_tile("attention", tile._asdict()):
        yield kernels


def fused_qkv(
    total: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: str, num_heads_k: int | None = None
) -> tuple[Tensor, ...]:
    """Views of one projection."""
    sizes = [num_heads, *([num_heads_k or num_heads] * 2)]
    return random(total, sum(sizes), head_dim, dtype=dtype, device=device).split(sizes, 1)


def check_varlen(
    lengths: list[int],
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    num_heads_k: int | None = None,
) -> None:
    # Two rows that belong to no sequence stand at the end.
    q, k, v = fused_qkv(sum(lengths) + 2, num_heads, head_dim, dtype, device, num_heads_k)
    cu_seqlens, longest = cu_seqlens_of(lengths, device), max(lengths, default=0)
    actual = attention_varlen(q, k, v, cu_seqlens, longest)
    eager = eager_runs(attention_varlen_reference, q, k, v, cu_seqlens, longest)
    exact = attention_varlen_reference(q.double(), k.double(), v.double(), cu_seqlens, longest)
    assert_as_exact_as(actual, eager, exact)
    assert not bool(actual[sum(lengths) :].any()), "rows that belong to no sequence must be zero"


@pytest.mark.covering(alone=["num_heads", "head_dim", "dtype"])
@pytest.mark.parametrize(("num_heads", "head_dim"), HEADS)
def test_every_schedule_matches_the_definition(
    schedule: str, lengths: list[int], num_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    check_varlen(lengths, num_heads, head_dim, dtype, schedule)


def test_the_copy_engine_takes_views_of_a_fused_projection_and_nothing_that_it_cannot() -> None:
    _, k, v = torch.empty(7, 3, 2, 64, dtype=torch.float16).unbind(1)
    assert fits_tma(k)
    assert fits_tma(v)
    assert not fits_tma(k[..., :48])
    assert not fits_tma(k[..., 1:33])
    assert not fits_tma(torch.empty(7, 2, 65, dtype=torch.float16)[..., :64])
    assert not fits_tma(k[:0])
    # Its blocks are as wide as the smallest product, and would reach into the next head.
    assert not fits_tma(torch.empty(7, 2, 8, dtype=torch.float16))


@pytest.mark.parametrize(("num_heads", "head_dim"), HEADS)
def test_kernel_matches_definition(
    kernels: str, lengths: list[int], num_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    check_varlen(lengths, num_heads, head_dim, dtype, kernels)


@pytest.mark.parametrize(("num_heads", "head_dim"), HEADS)
def test_torch_path_matches_definition(
    torch_path: str, lengths: list[int], num_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    # Few float32 numbers make an RMS that varies by more than the bound's tenth.
    check_varlen(lengths * 8, num_heads, head_dim, dtype, torch_path)


@pytest.mark.covering(alone=["schedule", "lengths", "num_heads", "num_heads_k", "dtype"])
@pytest.mark.parametrize(("num_heads", "num_heads_k"), GROUPED)
def test_every_schedule_reads_the_keys_that_heads_share(
    schedule: str, lengths: list[int], num_heads: int, num_heads_k: int, dtype: torch.dtype
) -> None:
    check_varlen(lengths, num_heads, 16, dtype, schedule, num_heads_k)


@pytest.mark.parametrize(("num_heads", "num_heads_k"), GROUPED)
def test_torch_path_reads_the_keys_that_heads_share(
    torch_path: str, lengths: list[int], num_heads: int, num_heads_k: int, dtype: torch.dtype
) -> None:
    check_varlen(lengths * 8, num_heads, 16, dtype, torch_path, num_heads_k)


class Relative(NamedTuple):
    """What depends on positions: the window, and the farthest offset that a bias tells apart, None without one."""

    window: tuple[int, int] = (-1, -1)
    reach: int | None = None


RELATIVE_BIAS = Relative(reach=9)
RELATIVE = [
    pytest.param(Relative((5, 3)), id="window"),
    pytest.param(Relative((0, 0)), id="own_row"),
    pytest.param(Relative((-1, 0)), id="causal"),
    pytest.param(Relative((40, -1)), id="left_limit"),
    pytest.param(Relative((1 << 40, 1 << 40)), id="endless_window"),
    pytest.param(RELATIVE_BIAS, id="bias"),
    pytest.param(Relative(reach=0), id="bias_of_one_number"),
    pytest.param(Relative((20, 33), reach=25), id="bias_in_window"),
]
LEFT_OUT = pytest.mark.parametrize("left_out", [False, True], ids=["all_rows", "rows_left_out"])
# Around the window's end, and across tiles.
RELATIVE_LENGTHS = [4, 70, 0, 5, 33, 6, 1, 64, 7, 65]


def check_relative(
    lengths: list[int],
    relative: Relative,
    positions: Tensor | None,
    dtype: torch.dtype,
    device: str,
    bias_dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (2, 2),
) -> None:
    total, longest = sum(lengths) + 2, max(lengths)
    num_heads, num_heads_k = heads
    q, k, v = fused_qkv(total, num_heads, 32, dtype, device, num_heads_k)
    cu_seqlens = cu_seqlens_of(lengths, device)
    positions = None if positions is None else positions.to(device)
    layout = PackedLayout(cu_seqlens, longest, total, positions)
    bias = exact_bias = None
    if relative.reach is not None:
        bias = random(num_heads, 2 * relative.reach + 1, dtype=bias_dtype, device=device)
        exact_bias = bias.double()
    actual = attention_varlen(q, k, v, cu_seqlens, longest, window_size=relative.window, bias=bias, layout=layout)
    others = (cu_seqlens, longest, None, relative.window)
    eager = eager_runs(attention_varlen_reference, q, k, v, *others, bias, positions)
    exact = attention_varlen_reference(q.double(), k.double(), v.double(), *others, exact_bias, positions)
    assert_as_exact_as(actual, eager, exact)
    assert not bool(actual[-2:].any()), "rows that belong to no sequence must be zero"


@pytest.mark.covering(alone=["schedule", "relative", "left_out"])
@LEFT_OUT
@pytest.mark.parametrize("relative", RELATIVE)
@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_every_schedule_keeps_to_windows_and_adds_biases(
    schedule: str, relative: Relative, left_out: bool, dtype: torch.dtype
) -> None:
    positions = rising_positions(RELATIVE_LENGTHS, 2) if left_out else None
    check_relative(RELATIVE_LENGTHS, relative, positions, dtype, schedule)


@pytest.mark.parametrize("relative", RELATIVE)
def test_kernel_keeps_to_windows_and_adds_biases(kernels: str, relative: Relative, dtype: torch.dtype) -> None:
    check_relative(RELATIVE_LENGTHS, relative, rising_positions(RELATIVE_LENGTHS, 2), dtype, kernels)


@LEFT_OUT
@pytest.mark.parametrize("relative", RELATIVE)
def test_torch_path_keeps_to_windows_and_adds_biases(
    torch_path: str, relative: Relative, left_out: bool, dtype: torch.dtype
) -> None:
    lengths = [*RELATIVE_LENGTHS, 70, 70, 2 * WINDOW_BLOCK + 1]
    check_relative(lengths, relative, rising_positions(lengths, 2) if left_out else None, dtype, torch_path)


# A window is one mask for all heads, and a bias has its own for each query head.
GROUPED_RELATIVE = pytest.mark.parametrize(
    "relative",
    [
        pytest.param(Relative((5, 3)), id="window"),
        pytest.param(RELATIVE_BIAS, id="bias"),
        pytest.param(Relative((20, 33), reach=25), id="bias_in_window"),
    ],
)


@pytest.mark.covering(alone=["schedule", "relative", "left_out"])
@LEFT_OUT
@GROUPED_RELATIVE
@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_every_schedule_adds_the_query_heads_biases(
    schedule: str, relative: Relative, left_out: bool, dtype: torch.dtype
) -> None:
    positions = rising_positions(RELATIVE_LENGTHS, 2) if left_out else None
    check_relative(RELATIVE_LENGTHS, relative, positions, dtype, schedule, heads=(6, 2))


@LEFT_OUT
@GROUPED_RELATIVE
def test_torch_path_adds_the_query_heads_biases(
    torch_path: str, relative: Relative, left_out: bool, dtype: torch.dtype
) -> None:
    lengths = [*RELATIVE_LENGTHS, 70, 70]
    positions = rising_positions(lengths, 2) if left_out else None
    check_relative(lengths, relative, positions, dtype, torch_path, heads=(6, 2))


@LEFT_OUT
@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_torch_path_on_a_bias_that_is_made_block_by_block(torch_path: str, left_out: bool, dtype: torch.dtype) -> None:
    lengths = [BIAS_BLOCK + 90, 3]
    check_relative(lengths, RELATIVE_BIAS, rising_positions(lengths, 2) if left_out else None, dtype, torch_path)


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_torch_path_on_blocks_of_rows_that_see_none_of_their_first_keys(torch_path: str, dtype: torch.dtype) -> None:
    # More than the library's attention takes at once.
    positions = torch.arange(1302, dtype=torch.int32)
    positions[640:] += 1_000_000
    check_relative([1300], Relative((1000, 5)), positions, dtype, torch_path)


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_kernel_takes_a_bias_in_the_dtype_of_q(kernels: str, dtype: torch.dtype) -> None:
    check_relative(RELATIVE_LENGTHS, RELATIVE_BIAS, None, dtype, kernels, bias_dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_torch_path_takes_a_bias_in_the_dtype_of_q(torch_path: str, dtype: torch.dtype) -> None:
    check_relative(RELATIVE_LENGTHS, RELATIVE_BIAS, None, dtype, torch_path, bias_dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_what_overflows_outside_of_its_window_spoils_no_row(schedule: str, dtype: torch.dtype) -> None:
    q, k, v = fused_qkv(90, 2, 16, dtype, schedule)
    cu_seqlens, others = cu_seqlens_of([80, 10], schedule), (80, None, (3, 5))
    eager = attention_varlen_reference(q, k, v, cu_seqlens, *others)
    exact = attention_varlen_reference(q.double(), k.double(), v.double(), cu_seqlens, *others)
    v[40, 0, 3] = float("nan")
    actual = attention_varlen(q, k, v, cu_seqlens, 80, window_size=(3, 5))
    seeing = torch.zeros(90, dtype=torch.bool, device=schedule)
    seeing[40 - 5 : 40 + 3 + 1] = True
    assert_as_exact_as(actual[~seeing], [eager[~seeing]], exact[~seeing])
    assert bool(actual[seeing, 0].isnan().any(-1).all())


def test_the_keys_that_a_window_reads_grow_with_the_text_and_not_with_its_square() -> None:
    blocks = list(row_blocks(8192, (64, 64)))
    assert [row for rows, _ in blocks for row in range(rows.start, rows.stop)] == list(range(8192))
    assert max(keys.stop - keys.start for _, keys in blocks) == WINDOW_BLOCK + 128


def test_a_window_takes_the_tile_of_the_shortest_texts() -> None:
    # One tile for all lengths, which tiles of one text alone would not keep narrow.
    q, k, v = fused_qkv(2000, 2, 64, torch.float16, "cpu")
    long, short = (PackedLayout(cu_seqlens_of(lengths), 1000, 2000) for lengths in ([1000] * 2, [1] * 2000))
    tile = choose_tile(q, k, v, long, (64, 64))
    assert tile == choose_tile(q, k, v, short)
    assert not tile.PER_SEQUENCE
    assert choose_tile(q, k, v, long).PER_SEQUENCE


@pytest.mark.parametrize("head_dim", [4, 8, 12, 24, 26, 32, 80, 96, 120, 128])
@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_kernel_takes_every_head_size(kernels: str, head_dim: int, dtype: torch.dtype) -> None:
    check_varlen([5, 70, 33], 2, head_dim, dtype, kernels)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_kernel_on_long_sequences(kernels: str, head_dim: int, dtype: torch.dtype) -> None:
    check_varlen([8192, 1, 511, 513, 0, 2048], 2, head_dim, dtype, kernels)


@pytest.mark.parametrize("defect", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("spoiled", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_a_text_that_overflows_spoils_no_other(schedule: str, dtype: torch.dtype, spoiled: str, defect: float) -> None:
    tensors: dict[str, Any] = dict(zip("qkv", fused_qkv(30, 2, 16, dtype, schedule), strict=True))
    cu_seqlens = cu_seqlens_of([10, 12, 8], schedule)
    clean = attention_varlen(**tensors, cu_seqlens=cu_seqlens, max_seqlen=12)
    tensors[spoiled][15, 0, 3] = defect
    actual = attention_varlen(**tensors, cu_seqlens=cu_seqlens, max_seqlen=12)
    others = [*range(10), *range(22, 30)]
    assert torch.equal(actual[others], clean[others])
    assert not bool(actual[10:22, 0].isfinite().all()), "what went wrong must be seen in the text's own rows"


def check_defect_in_shared_values(dtype: torch.dtype, device: str, *, biased: bool = False) -> None:
    q, k, v = fused_qkv(60, 6, 16, dtype, device, 2)
    bias = random(6, 5, dtype=torch.float32, device=device) if biased else None
    packing = (cu_seqlens_of([10, 42, 8], device), 42)
    eager = attention_varlen_reference(q, k, v, *packing, bias=bias)
    exact_bias = None if bias is None else bias.double()
    exact = attention_varlen_reference(q.double(), k.double(), v.double(), *packing, bias=exact_bias)
    # Of the second head of values, in two texts of which one is short.
    v[3, 1, 5] = v[25, 1, 5] = float("nan")
    actual = attention_varlen(q, k, v, *packing, bias=bias)
    spoilt = actual.isnan().any(-1)
    assert bool(spoilt[:52, 3:].all()), "what went wrong must be seen in the rows of every head that reads it"
    sound = torch.ones_like(spoilt)
    sound[:52, 3:] = False
    assert_as_exact_as(actual[sound], [eager[sound]], exact[sound])


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_a_value_that_overflows_spoils_the_heads_that_share_it(schedule: str, dtype: torch.dtype) -> None:
    check_defect_in_shared_values(dtype, schedule)


@pytest.mark.parametrize("biased", [False, True], ids=["no_bias", "bias"])
def test_a_value_that_overflows_spoils_the_heads_that_share_it_on_the_torch_path(
    torch_path: str, biased: bool, dtype: torch.dtype
) -> None:
    check_defect_in_shared_values(dtype, torch_path, biased=biased)


@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])
def test_large_scores_do_not_overflow(kernels: str, dtype: torch.dtype) -> None:
    q, k, v = fused_qkv(40, 1, 16, dtype, kernels)
    cu_seqlens = cu_seqlens_of([40], kernels)
    arguments: tuple[Any, ...] = (q * 100, k * 100, v, cu_seqlens, 40)
    exact = attention_varlen_reference(*[tensor.double() for tensor in arguments[:3]], cu_seqlens, 40)
    assert_as_exact_as(attention_varlen(*arguments), eager_runs(attention_varlen_reference, *arguments), exact)


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
@pytest.mark.parametrize("seqlens", [[17, 0, 40, 1], [40, 40, 40, 40]], ids=["ragged", "full"])
def test_padded_kernel_matches_definition(schedule: str, seqlens: list[int], dtype: torch.dtype) -> None:
    check_padded(seqlens, dtype, schedule)


@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])
def test_padded_torch_path_matches_definition(torch_path: str, dtype: torch.dtype) -> None:
    check_padded([17, 0, 40, 1], dtype, torch_path)


def check_padded(seqlens: list[int], dtype: torch.dtype, device: str, padding: float | None = None) -> None:
    q, k, v = random(len(seqlens), 40, 3, 2, 32, dtype=dtype, device=device).unbind(2)
    lengths = torch.tensor(seqlens, device=device)
    exact = attention_padded_reference(q.double(), k.double(), v.double(), lengths, 0.3)
    eager = eager_runs(attention_padded_reference, q, k, v, lengths, 0.3)
    if padding is not None:
        for tensor in (q, k, v):
            for row, length in enumerate(seqlens):
                tensor[row, length:] = padding
    assert_as_exact_as(attention_padded(q, k, v, lengths, 0.3), eager, exact)


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_nan_in_padding_is_never_seen(schedule: str, dtype: torch.dtype) -> None:
    check_nan_in_padding(dtype, schedule)


def test_nan_in_padding_is_never_seen_by_the_torch_path(torch_path: str) -> None:
    check_nan_in_padding(torch.float32, torch_path)


def check_nan_in_padding(dtype: torch.dtype, device: str) -> None:
    check_padded([17, 0, 40, 1], dtype, device, padding=float("nan"))


def test_layout_is_used_in_place_of_cu_seqlens() -> None:
    q, k, v = fused_qkv(12, 1, 16, torch.float32, "cpu")
    layout = PackedLayout(cu_seqlens_of([4, 8]), 8, 12)
    with_layout = attention_varlen(q, k, v, layout.cu_seqlens, 8, layout=layout)
    assert torch.equal(with_layout, attention_varlen(q, k, v, layout.cu_seqlens, 8))
    with pytest.raises(ValueError, match="must be the layout's own"):
        attention_varlen(q, k, v, cu_seqlens_of([6, 6]), 8, layout=layout)
    with pytest.raises(ValueError, match=r"layout must be of total_tokens = 11, got 12"):
        attention_varlen(q[:11], k[:11], v[:11], layout.cu_seqlens, 8, layout=layout)


def valid() -> dict[str, object]:
    q, k, v = fused_qkv(12, 2, 16, torch.float32, "cpu")
    return {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens_of([4, 8]), "max_seqlen": 8}


BAD = {
    "q_of_two_dimensions": ({"q": torch.zeros(12, 32)}, ValueError, r"q must have shape .*got \(12, 32\)"),
    "integer_q": ({"q": torch.zeros(12, 2, 16, dtype=torch.int32)}, TypeError, "q must be one of .*int32"),
    "k_of_another_dtype": ({"k": torch.zeros(12, 2, 16).half()}, TypeError, "k must be torch.float32"),
    "v_of_more_heads": (
        {"v": torch.zeros(12, 3, 16)},
        ValueError,
        r"v must have shape \(total_tokens, nheads_k, headdim\) = \(12, 2 or a divisor of it, 16\), got \(12, 3, 16\)",
    ),
    "v_of_fewer_heads_than_k": (
        {"v": torch.zeros(12, 1, 16)},
        ValueError,
        r"v must have k's shape \(12, 2, 16\), got \(12, 1, 16\)",
    ),
    "k_of_heads_that_do_not_divide": (
        {"q": torch.zeros(12, 4, 16), "k": torch.zeros(12, 3, 16)},
        ValueError,
        r"k must have shape .*4 or a divisor of it, 16\), got \(12, 3, 16\)",
    ),
    "k_of_no_heads": ({"k": torch.zeros(12, 0, 16)}, ValueError, r"k must have shape .*got \(12, 0, 16\)"),
    "k_of_another_head_size": ({"k": torch.zeros(12, 2, 8)}, ValueError, r"k must have shape .*got \(12, 2, 8\)"),
    "k_of_other_tokens": ({"k": torch.zeros(11, 2, 16)}, ValueError, r"k must have shape .*got \(11, 2, 16\)"),
    "k_on_another_device": ({"k": torch.zeros(12, 2, 16, device="meta")}, ValueError, "k must be on cpu"),
    "strided_last_dimension": (
        {"q": torch.zeros(12, 2, 32)[..., ::2]},
        ValueError,
        "q must be contiguous in its last dimension",
    ),
    "cu_seqlens_of_int64": ({"cu_seqlens": torch.tensor([0, 12])}, TypeError, "cu_seqlens must be a torch.int32"),
    "cu_seqlens_past_the_end": (
        {"cu_seqlens": cu_seqlens_of([4, 9]), "max_seqlen": 9},
        ValueError,
        r"at most total_tokens = 12, got \[0, 4, 13\]",
    ),
    "falling_cu_seqlens": (
        {"cu_seqlens": torch.tensor([0, 8, 4], dtype=torch.int32)},
        ValueError,
        r"cu_seqlens must rise .*got \[0, 8, 4\]",
    ),
    "short_max_seqlen": ({"max_seqlen": 7}, ValueError, "max_seqlen must be at least the longest sequence, 8, got 7"),
    "window_of_one_side": ({"window_size": 64}, TypeError, "window_size must be a tuple of two ints, got 64"),
    "window_of_floats": ({"window_size": (1.0, 2)}, TypeError, r"must be a tuple of two ints, got \(1.0, 2\)"),
    "window_below_none": ({"window_size": (-2, 0)}, ValueError, r"window_size must be at least -1.*got \(-2, 0\)"),
    "no_bias_tensor": ({"bias": [1.0]}, TypeError, "bias must be a tensor of torch.float32 or .*got list"),
    "bias_of_float16": ({"bias": torch.zeros(2, 3).half()}, TypeError, "bias must be .*float32.*got torch.float16"),
    "bias_of_other_heads": (
        {"bias": torch.zeros(3, 3)},
        ValueError,
        r"bias must be .*\(2, an odd number\), got shape \(3, 3\)",
    ),
    "bias_without_a_middle": ({"bias": torch.zeros(2, 4)}, ValueError, r"an odd number\), got shape \(2, 4\)"),
    "strided_bias": ({"bias": torch.zeros(3, 2).T}, ValueError, r"bias must be contiguous.*strides \(1, 2\)"),
    "bias_on_another_device": ({"bias": torch.zeros(2, 3, device="meta")}, ValueError, "bias must be on cpu"),
    "no_tensor": ({"q": [1.0]}, TypeError, "q must be a torch.Tensor.*got list"),
    "head_of_3": (
        dict.fromkeys("qkv", torch.zeros(12, 2, 3)),
        ValueError,
        "q must have a head size from 4 to 128, got 3",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), list(BAD.values()), ids=list(BAD))
def test_bad_input_is_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention_varlen(**{**valid(), **change})


@pytest.mark.parametrize(
    ("seqlens", "error", "message"),
    [
        pytest.param(torch.tensor([3]), ValueError, r"\(batch,\) = \(2,\), got \(1,\)", id="shape"),
        pytest.param(torch.tensor([3, 6]), ValueError, "between 0 and seqlen = 5, got 3 to 6", id="too_long"),
        pytest.param(torch.tensor([True, True]), TypeError, "int32 or int64", id="bool"),
        pytest.param(torch.tensor([3.0, 5.0]), TypeError, "int32 or int64", id="float"),
    ],
)
def test_bad_padded_lengths_are_named(seqlens: Tensor, error: type[Exception], message: str) -> None:
    q = torch.zeros(2, 5, 1, 16)
    with pytest.raises(error, match=message):
        attention_padded(q, q, q, seqlens)
