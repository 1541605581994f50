"""Batch invariance: a row's bits depend on that row (and its sequence) alone, not on the rest of the batch.

Two things break it. A choice by the number of rows (a library's, or our choice of a tile) changes the order in which a
sum is added up, and so does the place where a sequence begins in a tile that it shares. On a GPU one choice is made for
all sizes, and tiles begin where sequences do. On a CPU a library makes the products and chooses for itself: rows go to
it in blocks of fixed sizes. Whether a row gets the same bits in each place of a block, and in blocks of each size, is
tried on the machine before the first block is used.
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

# The number of rows that stands in for any: tiles are chosen as for a large batch.
ANY_ROWS = 1 << 20

# Rows of a block: the first size always, the others where they turn out to give the same bits. There are several, so
# that neither many rows nor few are slow.
_BLOCKS = (64, 256, 16)


@contextlib.contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Inside the ``with`` block every operation gives a row the same bits whatever else is computed with it.

    That is: the rows of one sequence, in one dtype, on one device, with one version of the libraries and one number of
    threads. It holds for the operations of this package, in this thread. It costs speed: tiles are not chosen by the
    number of rows, sequences do not share them, and matrix products are not left to a library's own choice. Around a
    compiled function it holds inside, too; a function that ``torch.compile`` traces cannot enter it.

    Raises:
        RuntimeError: from an operation on the CPU, if the products of its library depend on a row's place.
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
    """What an operation may let depend on how much it computes at once.

    Attributes:
        tiles_by_rows: the tile goes by the number of rows.
        shared_tiles: a tile may hold several sequences, which begin anywhere in it.
        split_sequences: the number of programs that share a sequence goes by the number of sequences.
        library_products: a library makes products, and chooses for itself.
        joined_texts: on a CPU texts are computed in one call, and checked for infinities together.
        whole_pointwise: on a CPU a pointwise function is one call, which PyTorch shares out among threads.
    """

    tiles_by_rows: bool
    shared_tiles: bool
    split_sequences: bool
    library_products: bool
    joined_texts: bool
    whole_pointwise: bool


_ALL = Choices(*(True,) * len(Choices._fields))
_NONE = Choices(*(False,) * len(Choices._fields))


def choices() -> Choices:
    """What is allowed now: everything, or with `batch_invariant` nothing."""
    return _NONE if _invariant.get() else _ALL


def in_blocks(product: Callable[..., Tensor], rows: Tensor, *weights: Tensor | None, name: str) -> Tensor:
    """``product(rows, *weights)``, a function of each row of (num_rows, ...), by blocks of fixed sizes.

    Args:
        product: takes any number of rows.
        rows: (num_rows, ...).
        weights: each row is multiplied with them; None for a bias that is missing.
        name: names the product; products that differ in their weights alone share a name.

    Raises:
        RuntimeError: the product depends on a row's place in its block, or the rows are on another device that runs no
            Triton, of which nothing is known.
    """
    if rows.device.type != "cpu":
        raise RuntimeError(f"batch_invariant must be left off on {rows.device}: the Triton kernels do not run there")
    sizes = _sizes(product, rows, weights, name)
    num_rows = rows.shape[0]
    out: Tensor | None = None
    start = 0
    while start < num_rows or out is None:
        left = num_rows - start
        # The smallest block that holds the rest, if half of it is used; else the largest that the rest fills.
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

    # Random numbers: zeros among the weights would hide a difference, and an overflow would feign one.
    likes = [
        None
        if weight is None
        else torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device).copy_(
            random(weight.shape, weight.dtype)
        )
        for weight in weights
    ]
    # The smallest block's number of different rows, repeated to fill a block, and moved by a few places.
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


# Few enough that PyTorch does not share them out among threads, and a multiple of its vectors, since a remainder goes
# through other code, which may round otherwise.
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
