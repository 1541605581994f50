"""Batch invariance: a row's bits depend on that row (and its sequence) alone, not on what is computed beside it.

Two things break it. A choice by the number of rows (a library's, or that of a tile) changes the order in which a sum is
added up; and so does where a sequence begins in a tile that it shares. On a GPU one choice is made for all sizes and
tiles begin where sequences do. On a CPU products are a library's, which no choice of ours reaches: rows go to it in
blocks of fixed sizes, and that a block gives a row the same bits in each place, and in blocks of each size, is tried on
the machine before the first one is relied on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from .triton import cdiv

_invariant: ContextVar[bool] = ContextVar("fastcls_kernels_batch_invariant", default=False)

# Rows of a batch that a tile is chosen by, in place of its own: as of a large one.
ANY_ROWS = 1 << 20

# Rows of a block: the first always, the others where they turn out to give the same bits. More than one size, so that
# neither many rows nor few are slow.
_BLOCKS = (64, 256, 16)


@contextlib.contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Inside the ``with`` block every operation gives a row the same bits whatever else is computed with it.

    That is: the rows of one sequence, in one dtype, on one device, with one version of the libraries and one number of
    threads. It holds for the operations of this package, in this thread. It costs speed: tiles are not chosen by the
    number of rows, sequences do not share them, and matrix products are not left to a library's own choice. Around what
    is compiled it holds inside, too; within a function that ``torch.compile`` traces it cannot be entered.

    Raises:
        RuntimeError: from an operation on the CPU, where its library's products depend on a row's place.
    """
    token = _invariant.set(enabled)
    try:
        yield
    finally:
        _invariant.reset(token)


def is_batch_invariant() -> bool:
    """Whether `batch_invariant` is on."""
    return _invariant.get()


class Choices(NamedTuple):
    """What an operation may choose by the amount of what it computes at once.

    Attributes:
        tiles_by_rows: the tile, by the number of rows.
        shared_tiles: tiles that hold several sequences, which begin anywhere in them.
        split_sequences: how many programs share a sequence.
        library_products: products are a library's, which chooses for itself.
        joined_texts: texts are one call on a CPU, and one look at whether their numbers are finite.
    """

    tiles_by_rows: bool
    shared_tiles: bool
    split_sequences: bool
    library_products: bool
    joined_texts: bool


_ALL = Choices(*(True,) * 5)
_NONE = Choices(*(False,) * 5)


def choices() -> Choices:
    """The choices that are free: all of them, or none with `batch_invariant`."""
    return _NONE if _invariant.get() else _ALL


def in_blocks(product: Callable[..., Tensor], rows: Tensor, *weights: Tensor | None, name: str) -> Tensor:
    """``product(rows, *weights)``, a function of each row of (num_rows, ...), by blocks of fixed sizes.

    Args:
        product: takes any number of rows.
        rows: (num_rows, ...).
        weights: what each row is multiplied with, or None.
        name: says which product it is; the same for those that differ in their weights alone.

    Raises:
        RuntimeError: the product depends on where in a block a row stands, or the rows are not on the CPU: of another
            device that runs no Triton nothing is known.
    """
    if rows.device.type != "cpu":
        raise RuntimeError(f"batch_invariant must be left off on {rows.device}: the Triton kernels do not run there")
    sizes = _sizes(product, rows, weights, name)
    num_rows = rows.shape[0]
    out: Tensor | None = None
    start = 0
    while start < num_rows or out is None:
        left = num_rows - start
        # The smallest that holds the rest, if half of it is used; else the largest that is filled.
        size = next((size for size in sizes if left <= size < 2 * max(left, 1)), None)
        size = size or max((size for size in sizes if size <= left), default=sizes[0])
        block = rows[start : start + size].contiguous()
        if left < size:
            block = torch.cat((block, block.new_zeros(size - left, *block.shape[1:])))
        made = product(block, *weights)
        if out is None:
            out = made.new_empty(num_rows, *made.shape[1:])
        out[start : start + size] = made[: num_rows - start]
        start += size
    return out


_agreeing: dict[Hashable, tuple[int, ...]] = {}


def _sizes(
    product: Callable[..., Tensor], rows: Tensor, weights: Sequence[Tensor | None], name: str
) -> tuple[int, ...]:
    """The sizes of blocks in which a row gets the same bits, smallest first."""
    shapes = tuple(None if weight is None else (weight.shape, weight.stride(), weight.dtype) for weight in weights)
    settings = (torch.get_num_threads(), torch.backends.mkldnn.enabled, torch.get_float32_matmul_precision())
    known = (name, rows.shape[1:], rows.dtype, shapes, settings)
    if known not in _agreeing:
        _agreeing[known] = _try_sizes(product, rows, weights, name)
    return _agreeing[known]


def _try_sizes(
    product: Callable[..., Tensor], rows: Tensor, weights: Sequence[Tensor | None], name: str
) -> tuple[int, ...]:
    few = min(_BLOCKS)
    generator = torch.Generator("cpu").manual_seed(0)

    def random(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(dtype)

    # Numbers of our own: zeros among the weights would hide a difference, and what overflows would feign one.
    likes = [
        None
        if weight is None
        else torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device).copy_(
            random(weight.shape, weight.dtype)
        )
        for weight in weights
    ]
    # As many different rows as the smallest block has, in turn, and all of them moved by some places.
    sample = random((few, *rows.shape[1:]), rows.dtype)

    def block(size: int, shift: int) -> Tensor:
        made = product(sample.roll(shift, 0).repeat(cdiv(size, few), *(1,) * (sample.ndim - 1)), *likes)
        return made.unflatten(0, (-1, few)).roll(-shift, 1)

    expected = block(_BLOCKS[0], 0)[:1]
    agreeing = [
        size for size in _BLOCKS if all(bool((block(size, shift) == expected).all()) for shift in (0, 1, few // 2 + 1))
    ]
    if _BLOCKS[0] not in agreeing:
        raise RuntimeError(
            f"batch_invariant must be left off on this CPU with {torch.get_num_threads()} threads: the {name} of its "
            "library gives a row other bits in another place of a block; another torch.set_num_threads may help"
        )
    return tuple(sorted(agreeing))


# Fewer numbers than PyTorch shares out among threads, and no remainder that its loops over vectors would leave to code
# which rounds otherwise.
_PIECE = 2048
_VECTORS = 64


def in_pieces_(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function``, pointwise and in place, of a contiguous tensor on the CPU, by the same code for each number."""
    flat = x.view(-1)
    whole = flat.numel() // _PIECE * _PIECE
    for piece in flat[:whole].split(_PIECE):
        function(piece)
    rest = flat[whole:]
    if rest.numel():
        padded = torch.nn.functional.pad(rest, (0, -rest.numel() % _VECTORS))
        rest.copy_(function(padded)[: rest.numel()])
    return x
