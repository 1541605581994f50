"""The operations that `benchmarks/tune.py` measures: their problems, inputs, and tiles to try."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastcls_kernels as ours
from fastcls_kernels import reference

Tile = dict[str, Any]
Facts = dict[str, int]
Random = Callable[..., Tensor]
Arguments = tuple[Any, ...]

EPS = 1e-12


class Problem(NamedTuple):
    """Inputs of an operation: a shape, for which kernels are compiled, and sizes known only at run time."""

    operation: str
    shape: tuple[int, int]
    rows: int
    mean_seqlen: int = 0

    @property
    def name(self) -> str:
        texts = f", {self.mean_seqlen} a text" if self.mean_seqlen else ""
        return f"{self.shape[0]} x {self.shape[1]}, {self.rows} rows{texts}"

    def to_check(self) -> Problem:
        """A small problem of the same shape, whose sizes no tile divides."""
        return self._replace(rows=9 * 150, mean_seqlen=150) if self.mean_seqlen else self._replace(rows=201)


class Operation(NamedTuple):
    """An operation of the tables.

    Attributes:
        run, definition: as users call it, and in the plainest torch.
        make: a problem's arguments, from a source of random numbers.
        facts: the keys into the table, the outermost first: its limit holds for all that come after.
        tiles: candidates; `suits` says for which problems.
        shapes, sizes: of the problems that are measured; sizes are rows, and tokens per text if there are texts.
    """

    run: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    make: Callable[[Random, Problem], Arguments]
    facts: Callable[[Problem], Facts]
    tiles: list[Tile]
    shapes: Sequence[tuple[int, int]]
    sizes: Sequence[tuple[int, ...]]


# Inputs


def _packing(problem: Problem, device: torch.device) -> ours.PackedLayout:
    """Texts of half to one and a half times the mean length, evenly spread, shortest first; the mean is exact."""
    texts, mean = problem.rows // problem.mean_seqlen, problem.mean_seqlen
    short = [round(mean * (0.5 + (index + 0.5) / texts)) for index in range(texts // 2)]
    lengths = [*short, *[mean] * (texts % 2), *(2 * mean - length for length in reversed(short))]
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    return ours.PackedLayout(cu_seqlens, lengths[-1], sum(lengths))


def _projection(random: Random, out_features: int, in_features: int) -> Tensor:
    """Scaled as trained weights are."""
    return random(out_features, in_features) * in_features**-0.5


def _selected(random: Random, problem: Problem) -> tuple[Tensor, Tensor]:
    """Hidden states, of which every second row is wanted."""
    hidden_states = random(2 * problem.rows, problem.shape[1])
    return hidden_states, torch.arange(0, 2 * problem.rows, 2, device=hidden_states.device, dtype=torch.int32)


def _attention(random: Random, problem: Problem) -> Arguments:
    q, k, v = random(problem.rows, 3, *problem.shape).unbind(1)
    return q, k, v, _packing(problem, q.device)


def _run_attention(q: Tensor, k: Tensor, v: Tensor, layout: ours.PackedLayout) -> Tensor:
    return ours.attention_varlen(q, k, v, layout.cu_seqlens, layout.max_seqlen, layout=layout)


def _define_attention(q: Tensor, k: Tensor, v: Tensor, layout: ours.PackedLayout) -> Tensor:
    return reference.attention_varlen_reference(q, k, v, layout.cu_seqlens, layout.max_seqlen)


def _cls_attention(random: Random, problem: Problem) -> Arguments:
    width = problem.shape[1]
    x, residual = (random(problem.rows, width) for _ in range(2))
    layout = _packing(problem, x.device)
    # In float32, as from absorb_query.
    query = random(layout.num_sequences, *problem.shape).float()
    return query, x, layout, width**-0.5, random(width), residual, random(width), random(width), EPS


def _run_cls_attention(query: Tensor, x: Tensor, layout: ours.PackedLayout, scale: float, *norm: Any) -> Tensor:
    """With the layer norm before it, which a tile computes inside or leaves to a separate pass."""
    norm = ours.AddNorm(*norm)
    return ours.cls_attention(query, x, layout.cu_seqlens, layout.max_seqlen, scale, layout=layout, norm=norm)


def _define_cls_attention(query: Tensor, x: Tensor, layout: ours.PackedLayout, scale: float, *norm: Any) -> Tensor:
    hidden_states = reference.add_layer_norm_reference(x, *norm)
    return reference.cls_attention_reference(query, hidden_states, layout.cu_seqlens, layout.max_seqlen, scale)


def _linear(random: Random, problem: Problem) -> Arguments:
    in_features, out_features = problem.shape
    weight = _projection(random, out_features, in_features)
    return random(problem.rows, in_features), weight, random(out_features)


def _linear_norm(random: Random, problem: Problem) -> Arguments:
    width = problem.shape[1]
    return *_linear(random, problem), random(problem.rows, width), random(width), random(width), EPS


def _define_linear_norm(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return reference.add_layer_norm_reference(F.linear(x, weight), *others)


def _absorb_query(random: Random, problem: Problem) -> Arguments:
    heads, width = problem.shape
    query_weight, key_weight = (_projection(random, width, width) for _ in range(2))
    return *_selected(random, problem), query_weight, random(width), key_weight, heads


def _cls_output(random: Random, problem: Problem) -> Arguments:
    width = problem.shape[1]
    value_weight, out_weight = (_projection(random, width, width) for _ in range(2))
    value_bias, out_bias, *norm = (random(width) for _ in range(4))
    # In float32, as from cls_attention.
    summed = random(problem.rows, *problem.shape).float()
    return summed, value_weight, value_bias, out_weight, out_bias, *_selected(random, problem), *norm, EPS


def _pooler_classifier(random: Random, problem: Problem) -> Arguments:
    labels, width = problem.shape
    pooler, classifier = _projection(random, width, width), _projection(random, labels, width)
    return random(problem.rows, width), pooler, random(width), classifier, random(labels)


# Candidates


def _tiles(names: str, numbers: str, **constants: Any) -> list[Tile]:
    """A tile for each group of numbers."""
    groups = (map(int, group.split()) for group in numbers.split(","))
    return [{**constants, **dict(zip(names.split(), group, strict=True))} for group in groups]


# Fewer than 64 rows would miss the widest matrix instructions.
_ATTENTION_NAMES = "BLOCK_M BLOCK_N num_warps num_stages"
_TOKEN_TILES = "64 32 4 3, 64 64 4 2, 64 64 4 3, 128 32 8 3, 128 64 8 2"
_SEQUENCE_TILES = "64 64 4 2, 64 64 4 3, 64 128 4 2, 128 64 4 2, 128 64 8 2, 128 64 8 3, 128 128 8 2"
_ATTENTION_TILES = [
    tile
    for per_sequence, numbers in ((False, _TOKEN_TILES), (True, _SEQUENCE_TILES))
    for tma in (False, True)
    for tile in _tiles(_ATTENTION_NAMES, numbers, PER_SEQUENCE=per_sequence, TMA=tma)
]
_CLS_NAMES = "BLOCK_H BLOCK_N MAX_BLOCK_W num_warps num_stages"
_PASS_TILES = (
    "16 16 128 4 2, 16 16 256 4 2, 16 16 256 8 2, 16 16 256 8 3, 16 32 128 4 2, 16 32 128 8 3, 16 32 256 8 2,"
    "16 32 256 8 3, 16 64 128 8 2, 16 64 256 8 2"
)
_NORM_AND_PASS_TILES = (
    "16 16 128 4 2, 16 16 256 4 2, 16 16 256 8 2, 16 16 256 8 3, 16 32 128 8 2, 16 32 256 8 2, 16 64 128 8 2"
)
_CLS_TILES = _tiles(_CLS_NAMES, _PASS_TILES, NORM=False) + _tiles(_CLS_NAMES, _NORM_AND_PASS_TILES, NORM=True)
_PRODUCT_NAMES = "BLOCK_M BLOCK_N BLOCK_K num_warps num_stages"
_FLAT = "16 32 128 4 4, 16 64 64 4 3, 16 64 128 4 3, 16 128 64 4 3, 32 64 64 4 3, 32 64 128 4 3"
_HIGH = (
    "64 64 64 4 4, 64 128 64 4 4, 64 256 64 8 3, 128 64 64 4 4, 128 128 64 8 3, 128 128 64 8 4, 128 128 128 8 2,"
    "128 256 64 8 3"
)
_GELU_TILES = [
    {"BY": "torch"},
    {"BY": "cublaslt"},
    *_tiles(_PRODUCT_NAMES, f"{_FLAT}, {_HIGH}", BY="triton", TMA=False),
    *_tiles(_PRODUCT_NAMES, _HIGH, BY="triton", TMA=True),
]
_SPLIT_TILES = [
    {"BY": "torch"},
    *_tiles(
        f"SPLITS {_PRODUCT_NAMES}",
        "4 16 32 128 4 3, 4 16 64 64 4 3, 4 16 64 128 4 3, 8 16 32 128 4 3, 8 16 64 64 4 3, 8 16 64 128 4 3,"
        "8 16 128 64 4 3, 16 16 64 64 4 3, 4 32 64 64 4 3, 1 64 64 64 4 3, 2 64 64 64 4 3, 2 64 128 64 4 3,"
        "4 64 64 64 4 3, 8 64 64 64 4 3, 1 128 64 64 4 3, 1 128 128 64 8 3, 1 128 128 64 8 4, 1 128 256 64 8 3,"
        "2 128 128 64 8 3",
        BY="triton",
    ),
]
# More rows make enough tiles, and their parts would be much to write and to read.
_SPLIT_ROWS = 1024
_ROWS_TILES = _tiles(
    "BLOCK_B BLOCK_N BLOCK_K num_warps num_stages",
    "16 32 64 4 3, 16 32 128 4 3, 16 64 64 2 3, 16 64 64 4 3, 16 64 128 4 3, 16 64 128 8 3, 16 128 64 4 3,"
    "16 128 128 8 2, 32 64 64 4 3, 32 64 128 4 3, 32 128 64 4 3, 64 64 64 4 3, 64 128 64 8 3",
)


def suits(tile: Tile, problem: Problem, has_tma: bool) -> bool:
    """Whether a tile is worth trying: it does not lie mostly beyond the last row, and does not make needlessly many."""
    # A norm takes all columns in one program.
    if (tile.get("TMA") and not has_tma) or (tile.get("NORM") and problem.shape[1] > 4 * tile["MAX_BLOCK_W"]):
        return False
    if "PER_SEQUENCE" in tile:
        mean = problem.mean_seqlen
        return bool(tile["BLOCK_M"] <= 4 * mean if tile["PER_SEQUENCE"] else mean <= 256)
    if tile.get("SPLITS", 1) > 1 and problem.rows > _SPLIT_ROWS:
        return False
    height = tile.get("BLOCK_M", tile.get("BLOCK_B"))
    return height is None or min(problem.rows // 32, 128) <= height < 2 * max(problem.rows, 16)


# The measured shapes: those of MiniLM, BERT-base and BERT-large, and wider ones if a kernel then works otherwise, since
# the rules of the widest shape hold for all that are wider still.

HEADS = {384: 12, 768: 12, 1024: 16}
# A multiple of each mean.
TOKENS = 24_576
MEAN_SEQLENS = (16, 32, 48, 64, 96, 128, 256, 512, 2048)
ROWS = [(rows,) for rows in (1, 16, 64, 128, 256, 512, 1024, 4096, 16_384, 65_536)]
CLS_ROWS = [(rows,) for rows in (1, 16, 32, 128, 1024)]


def _product_facts(problem: Problem) -> Facts:
    return {"out_features": problem.shape[1], "in_features": problem.shape[0], "rows": problem.rows}


def _on_cls_rows(name: str, make: Callable[[Random, Problem], Arguments], labels: int = 0) -> Operation:
    shapes = [(labels or heads, width) for width, heads in HEADS.items()]
    run, definition = getattr(ours, name), getattr(reference, f"{name}_reference")
    return Operation(run, definition, make, lambda problem: {"rows": problem.rows}, _ROWS_TILES, shapes, CLS_ROWS)


OPERATIONS = {
    "attention": Operation(
        _run_attention,
        _define_attention,
        _attention,
        lambda problem: {"head_dim": problem.shape[1], "mean_seqlen": problem.mean_seqlen},
        _ATTENTION_TILES,
        [(12, 32), (12, 64), (8, 128)],
        [(TOKENS, mean) for mean in MEAN_SEQLENS],
    ),
    "cls_attention": Operation(
        _run_cls_attention,
        _define_cls_attention,
        _cls_attention,
        lambda problem: {"width": problem.shape[1]},
        _CLS_TILES,
        [*((heads, width) for width, heads in HEADS.items()), (16, 2048)],
        [(128 * 512, 512), (32 * 128, 128)],
    ),
    "linear_gelu": Operation(
        ours.linear_gelu,
        reference.linear_gelu_reference,
        _linear,
        _product_facts,
        _GELU_TILES,
        [(width, 4 * width) for width in HEADS],
        ROWS,
    ),
    "linear_add_layer_norm": Operation(
        ours.linear_add_layer_norm,
        _define_linear_norm,
        _linear_norm,
        _product_facts,
        _SPLIT_TILES,
        [(size * width, width) for width in HEADS for size in (1, 4)],
        ROWS,
    ),
    "absorb_query": _on_cls_rows("absorb_query", _absorb_query),
    "cls_output": _on_cls_rows("cls_output", _cls_output),
    "pooler_classifier": _on_cls_rows("pooler_classifier", _pooler_classifier, labels=2),
}
