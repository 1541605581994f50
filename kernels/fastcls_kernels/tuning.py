"""Tile sizes: pure functions of the chip and the problem's shape, so that nothing is tuned in a user's process.

The sizes are safe defaults, not measured optima: they compile for every supported chip without register spills and
within its shared memory, which ``tests/test_aot.py`` holds them to in the shapes of BERT-base, BERT-large and MiniLM.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ._triton import cdiv, next_power_of_2


class AttentionTile(NamedTuple):
    """One launch of attention: BLOCK_M query rows by BLOCK_N keys."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


class LinearTile(NamedTuple):
    """One launch of a product: BLOCK_M rows by BLOCK_N output features, BLOCK_K input features a step."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class ClsTile(NamedTuple):
    """One launch of the [CLS] pass: BLOCK_H heads, BLOCK_N tokens, CHUNKS column chunks of BLOCK_W each."""

    BLOCK_H: int
    BLOCK_N: int
    BLOCK_W: int
    CHUNKS: int
    num_warps: int
    num_stages: int


@functools.cache
def arch_of(device: torch.device) -> str:
    """The chip's name as compilers write it: "sm_90", "gfx942"; "interpreter" for tensors that are not on a GPU."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def attention_tile(arch: str, dtype: torch.dtype, head_dim: int, max_seqlen: int) -> AttentionTile:
    """The tile of `attention_varlen`: BLOCK_M query rows, BLOCK_N keys."""
    if dtype == torch.float32:
        return AttentionTile(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=1)
    if arch.startswith("gfx"):
        # Masks live in scalar registers there, and with more keys a step there are not enough of them.
        if head_dim > 64:
            return AttentionTile(BLOCK_M=64, BLOCK_N=16, num_warps=8, num_stages=2)
        if max_seqlen <= 128:
            return AttentionTile(BLOCK_M=64, BLOCK_N=16, num_warps=4, num_stages=2)
        return AttentionTile(BLOCK_M=128, BLOCK_N=16, num_warps=8, num_stages=2)
    if head_dim > 64:
        return AttentionTile(BLOCK_M=128, BLOCK_N=32, num_warps=8, num_stages=2)
    if max_seqlen <= 128:
        return AttentionTile(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2)
    return AttentionTile(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2)


def cls_tile(arch: str, dtype: torch.dtype, width: int) -> ClsTile:
    """The tile of `cls_attention`. Up to four chunks share one program; wider inputs take several column groups."""
    # Chunks that divide the width waste nothing: 768 = 3 x 256, 384 = 3 x 128, 1024 = 4 x 256.
    # Wider than what one program has registers for, chunks of 128 in several column groups do not spill.
    one_program = 768 if arch.startswith("gfx") else 1024
    largest = 128 if dtype == torch.float32 or width > one_program else 256
    block_w = next(
        (size for size in (256, 128, 64, 32, 16) if size <= largest and width % size == 0 and width // size <= 4),
        min(largest, next_power_of_2(cdiv(width, 4))),
    )
    chunks = min(4, cdiv(width, block_w))
    if arch.startswith("gfx"):
        stages = 2 if block_w * chunks >= width else 1
        return ClsTile(BLOCK_H=16, BLOCK_N=16, BLOCK_W=block_w, CHUNKS=chunks, num_warps=4, num_stages=stages)
    if dtype == torch.float32:
        return ClsTile(BLOCK_H=16, BLOCK_N=16, BLOCK_W=block_w, CHUNKS=chunks, num_warps=8, num_stages=1)
    # Two stages of 32 tokens by 1,024 columns take 133,120 bytes of shared memory, which few chips have.
    block_n = 32 if block_w * chunks <= 768 or arch in ("sm_80", "sm_90", "sm_100", "sm_103") else 16
    return ClsTile(BLOCK_H=16, BLOCK_N=block_n, BLOCK_W=block_w, CHUNKS=chunks, num_warps=8, num_stages=2)


def linear_tile(arch: str, dtype: torch.dtype, rows: int) -> LinearTile:
    """The tile of `linear_gelu`: BLOCK_M rows, BLOCK_N output features, BLOCK_K input features a step."""
    if dtype == torch.float32:
        return LinearTile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=4, num_stages=2)
    if arch.startswith("gfx"):
        return LinearTile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=2)
    if rows <= 512:
        return LinearTile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=3)
    stages = 4 if arch in ("sm_90", "sm_100") else 3
    return LinearTile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64 if stages == 4 else 32, num_warps=8, num_stages=stages)
