"""Tile sizes: pure functions of the chip and the problem's shape, so that nothing is tuned in a user's process.

They stand in ``configs/*.json``, one file for each chip, and ``default.json`` for all others. A file holds rules for
each operation, and the first that fits counts: a rule's numbers are upper limits on the facts of a problem (``{"rows":
512}`` fits up to 512 rows). Where no rule of the chip's file fits, the rules of ``default.json`` follow.
``benchmarks/tune.py`` measures and writes such files. An unmeasured rule is a safe choice: ``tests/test_aot.py``
compiles every rule of every file for its chip, and holds it to the chip's memory, no spills and the intended matrix
unit.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from .invariance import ANY_ROWS, choices
from .triton import cdiv, next_power_of_2

CONFIGS = Path(__file__).parents[1] / "configs"


class AttentionTile(NamedTuple):
    """One launch of attention: BLOCK_M query rows by BLOCK_N keys.

    PER_SEQUENCE: a tile holds rows of one sequence, not any BLOCK_M neighbours. TMA: the copy engine of sm_90 and newer
    fetches keys and values.
    """

    PER_SEQUENCE: bool
    TMA: bool
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


class DisentangledTile(NamedTuple):
    """One launch of `disentangled_attention`: BLOCK_M query rows by BLOCK_N keys."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


class ClsTile(NamedTuple):
    """One launch of the [CLS] pass: BLOCK_H heads, BLOCK_N tokens, CHUNKS column chunks of BLOCK_W each.

    NORM: the pass takes the layer norm before it, which needs all columns in one program.
    """

    NORM: bool
    BLOCK_H: int
    BLOCK_N: int
    BLOCK_W: int
    CHUNKS: int
    num_warps: int
    num_stages: int


class RowsTile(NamedTuple):
    """One launch over the [CLS] rows alone: BLOCK_B rows, BLOCK_N output columns, BLOCK_K input columns a step."""

    BLOCK_B: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class GeluTile(NamedTuple):
    """How `linear_gelu` is computed.

    BY: "triton", our kernel, in the tile that the other numbers give; "torch", the library's product and a GELU after
    it; "cublaslt", one kernel of that library, whose GELU is the tanh form: in bfloat16 alone, where this errs less
    than an exact GELU of a rounded product.
    """

    BY: Literal["triton", "torch", "cublaslt"]
    TMA: bool = False
    BLOCK_M: int = 0
    BLOCK_N: int = 0
    BLOCK_K: int = 0
    num_warps: int = 0
    num_stages: int = 0


class SplitTile(NamedTuple):
    """How the product of `linear_add_layer_norm` is computed.

    BY: "torch", by the library; "triton", as SPLITS partial products, which the layer norm sums.
    """

    BY: Literal["triton", "torch"]
    SPLITS: int = 1
    BLOCK_M: int = 0
    BLOCK_N: int = 0
    BLOCK_K: int = 0
    num_warps: int = 0
    num_stages: int = 0


class Rule(NamedTuple):
    """A choice, and the limits up to which it holds."""

    limits: dict[str, int]
    tile: dict[str, Any]


@functools.cache
def arch_of(device: torch.device) -> str:
    """The chip's name as compilers write it: "sm_90", "gfx942"; "interpreter" for tensors that are not on a GPU."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def unsqueezed(arch: str) -> dict[str, int]:
    """Launch options under which NVIDIA's assembler spills nothing that a thread's 255 registers hold.

    Left alone the assembler spills a few to fit one more program on a multiprocessor, even where shared memory has no
    room for one, and which kernels it squeezes changes with each version, chip and shape. Only kernels that were seen
    to spill take these options: all others fit more programs without them.
    """
    return {"maxnreg": 255} if arch.startswith("sm_") else {}


def config_file(arch: str) -> Path:
    """The file of a chip; other AMD chips take gfx942's, and any other chip without one takes the default."""
    own = CONFIGS / f"{arch}.json"
    if not own.is_file() and arch.startswith("gfx"):
        own = CONFIGS / "gfx942.json"
    return own if own.is_file() else CONFIGS / "default.json"


@functools.cache
def rules_of(arch: str, operation: str) -> tuple[Rule, ...]:
    """The rules of an operation on a chip, of which the first that fits counts."""
    files = dict.fromkeys((config_file(arch), CONFIGS / "default.json"))
    found = [
        rule for file in files for rule in json.loads(file.read_text(encoding="utf-8"))["rules"].get(operation, [])
    ]
    return tuple(Rule(rule.get("up_to", {}), rule["tile"]) for rule in found)


def explain_tiles(arch: str) -> str:
    """Which table a chip's tiles come from, and for which operations it was measured."""
    file = config_file(arch)
    measured = json.loads(file.read_text(encoding="utf-8"))["measured"]
    how = f"measured for {', '.join(measured)}" if measured else "chosen by compiling, not measured yet"
    return f"{file.name}, {how}"


def limits_of(arch: str, fact: str) -> list[int]:
    """All upper limits on ``fact`` in the tables of a chip: between two limits no choice depends on it."""
    operations = json.loads((CONFIGS / "default.json").read_text(encoding="utf-8"))["rules"]
    rules = [rule for operation in operations for rule in rules_of(arch, operation)]
    return sorted({rule.limits[fact] for rule in rules if fact in rule.limits})


_forced: dict[str, dict[str, Any]] = {}


@contextlib.contextmanager
def use_tile(operation: str, tile: Mapping[str, Any]) -> Iterator[None]:
    """Inside the ``with`` block ``operation`` takes this tile, whatever the table says: to measure and to test it.

    It holds for the whole process, threads included.
    """
    before = dict(_forced)
    _forced[operation] = dict(tile)
    _forget_choices()
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
        _forget_choices()


def _forget_choices() -> None:
    for choice in (
        *(_attention_tile, _invariant_attention_tile, cls_tile, _disentangled_tile, invariant_linear_tile),
        *(linear_gelu_tile, linear_norm_tile, _rows_tile),
    ):
        choice.cache_clear()


def _first_fitting(arch: str, operation: str, facts: Mapping[str, int]) -> dict[str, Any]:
    if operation in _forced:
        return _forced[operation]
    for rule in rules_of(arch, operation):
        if all(facts[name] <= limit for name, limit in rule.limits.items()):
            return rule.tile
    raise LookupError(f"no rule of {operation} fits {dict(facts)} on {arch}")


# Bounded, since callers may come with any number of rows.
_remembered = functools.lru_cache(maxsize=1024)

_Tile = TypeVar("_Tile", AttentionTile, DisentangledTile, GeluTile, SplitTile, RowsTile)


def _tile_of(kind: type[_Tile], arch: str, operation: str, dtype: torch.dtype, **facts: int) -> _Tile:
    return kind(**_first_fitting(arch, operation, {"bits": 8 * dtype.itemsize, **facts}))


def attention_tile(arch: str, dtype: torch.dtype, head_dim: int, mean_seqlen: int, tma: bool) -> AttentionTile:
    """The tile of `attention_varlen`; with `batch_invariant` the same for every ``mean_seqlen``, and per sequence.

    Args:
        arch, dtype, head_dim: the chip and the tensors.
        mean_seqlen: packed rows per sequence, rounded up: all that a graph over a shape knows of the lengths.
        tma: whether the tensors lie as the copy engine needs them.
    """
    if choices().shared_tiles:
        return _attention_tile(arch, dtype, head_dim, mean_seqlen, tma)
    return _invariant_attention_tile(arch, dtype, head_dim)


@_remembered
def _invariant_attention_tile(arch: str, dtype: torch.dtype, head_dim: int) -> AttentionTile:
    # Without the copy engine, which fetches rows of the next sequence as well: infinities in them would be noticed.
    return _tile_of(AttentionTile, arch, "invariant_attention", dtype, head_dim=head_dim)


@_remembered
def _attention_tile(arch: str, dtype: torch.dtype, head_dim: int, mean_seqlen: int, tma: bool) -> AttentionTile:
    tile = _tile_of(AttentionTile, arch, "attention", dtype, head_dim=head_dim, mean_seqlen=mean_seqlen)
    return tile if tma else tile._replace(TMA=False)


def disentangled_tile(arch: str, dtype: torch.dtype, head_dim: int) -> DisentangledTile:
    """The tile of `disentangled_attention`."""
    # With `batch_invariant` the kernel reads where a tile begins, which takes registers: hence tiles of its own.
    operation = "disentangled_attention" if choices().shared_tiles else "invariant_disentangled_attention"
    return _disentangled_tile(arch, operation, dtype, head_dim)


@_remembered
def _disentangled_tile(arch: str, operation: str, dtype: torch.dtype, head_dim: int) -> DisentangledTile:
    return _tile_of(DisentangledTile, arch, operation, dtype, head_dim=head_dim)


@_remembered
def linear_gelu_tile(arch: str, dtype: torch.dtype, rows: int, in_features: int, out_features: int) -> GeluTile:
    """How `linear_gelu` is computed for this number of rows."""
    facts = {"rows": rows, "in_features": in_features, "out_features": out_features}
    tile = _tile_of(GeluTile, arch, "linear_gelu", dtype, **facts)
    # The rules do not tell float16 from bfloat16, and in float16 the tanh form is the larger error.
    return GeluTile("torch") if tile.BY == "cublaslt" and dtype != torch.bfloat16 else tile


@_remembered
def linear_norm_tile(arch: str, dtype: torch.dtype, rows: int, in_features: int, out_features: int) -> SplitTile:
    """How the product of `linear_add_layer_norm` is computed for this number of rows."""
    facts = {"rows": rows, "in_features": in_features, "out_features": out_features}
    return _tile_of(SplitTile, arch, "linear_add_layer_norm", dtype, **facts)


@_remembered
def invariant_linear_tile(arch: str, dtype: torch.dtype) -> GeluTile:
    """The tile of every product with `batch_invariant`."""
    return _tile_of(GeluTile, arch, "invariant_linear", dtype)


def rows_tile(arch: str, operation: str, dtype: torch.dtype, rows: int) -> RowsTile:
    """The tile of an operation over the [CLS] rows: `absorb_query`, `cls_output` or `pooler_classifier`.

    With `batch_invariant` it is the same for every number of ``rows``.
    """
    return _rows_tile(arch, operation, dtype, rows if choices().tiles_by_rows else ANY_ROWS)


@_remembered
def _rows_tile(arch: str, operation: str, dtype: torch.dtype, rows: int) -> RowsTile:
    return _tile_of(RowsTile, arch, operation, dtype, rows=rows)


@_remembered
def cls_tile(arch: str, dtype: torch.dtype, width: int) -> ClsTile:
    """The tile of `cls_attention`. Up to four chunks share one program; wider inputs take several column groups."""
    rule = dict(_first_fitting(arch, "cls_attention", {"bits": 8 * dtype.itemsize, "width": width}))
    # Chunks that divide the width waste nothing: 768 = 3 x 256, 384 = 3 x 128, 1024 = 4 x 256.
    largest = rule.pop("MAX_BLOCK_W")
    block_w = next(
        (size for size in (256, 128, 64, 32, 16) if size <= largest and width % size == 0 and width // size <= 4),
        min(largest, next_power_of_2(cdiv(width, 4))),
    )
    return ClsTile(BLOCK_W=block_w, CHUNKS=min(4, cdiv(width, block_w)), **rule)
