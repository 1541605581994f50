"""Which row of DeBERTa's position tables a distance takes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._ops import Members


@dataclass(frozen=True, eq=False)
class Buckets:
    """Which row of the position tables a distance takes: ``table[clamp(distance, -reach, reach) + reach]``.

    Args:
        table: (2 * reach + 1,), int32, contiguous, on the device where it is used.
        rows: the same numbers on the host, in rising order, which say without waiting for the device how many rows
            the position tables must have.

    Raises:
        TypeError: ``table`` is no int32 tensor.
        ValueError: a shape that does not fit, or ``rows`` that fall or begin below 0. That ``table`` holds ``rows`` is
            checked where it lies on the CPU; on a GPU that would stall the device, so there it is trusted.
    """

    table: Tensor
    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.table, Tensor) or self.table.dtype != torch.int32:
            raise TypeError(f"table must be a torch.int32 tensor, got {getattr(self.table, 'dtype', type(self.table))}")
        if len(self.rows) % 2 == 0:
            raise ValueError(f"rows must be 2 * reach + 1 numbers, got {len(self.rows)}")
        if self.table.shape != (len(self.rows),) or not self.table.is_contiguous():
            raise ValueError(
                f"table must be contiguous, of shape ({len(self.rows)},) like rows, "
                f"got shape {tuple(self.table.shape)} with strides {self.table.stride()}"
            )
        if self.rows[0] < 0 or any(row > after for row, after in itertools.pairwise(self.rows)):
            raise ValueError(f"rows must rise from 0 or more, got {self.rows[0]} to {self.rows[-1]}")
        if self.table.device.type == "cpu" and tuple(self.table.tolist()) != self.rows:
            raise ValueError("table must hold the numbers of rows")

    @property
    def reach(self) -> int:
        return len(self.rows) // 2

    def first(self, count: int, reach: int) -> Tensor:
        """The rows of ``count`` distances from -``reach`` on; ``reach`` is at most the table's own."""
        rows = self.table[self.reach - reach :][:count]
        missing = count - rows.shape[0]
        return torch.cat((rows, rows[-1:].expand(missing))) if missing else rows

    def of(self, distances: Tensor) -> Tensor:
        """The row of each distance."""
        return self.table[distances.clamp(-self.reach, self.reach).long() + self.reach]

    @staticmethod
    def members() -> Members:
        """Buckets in an operator's schema: a tensor and a list of numbers."""
        return Members(
            "buckets",
            split=lambda buckets: {"bucket_table": buckets.table, "bucket_rows": list(buckets.rows)},
            join=lambda given: Buckets(given["bucket_table"], tuple(given["bucket_rows"])),
        )


class DistanceTables(NamedTuple):
    """One layer's embeddings of distances.

    Attributes:
        keys: (num_buckets, nheads, headdim), for queries to be multiplied with, or None.
        queries: (num_buckets, nheads, headdim), for keys to be multiplied with, or None.
        buckets: the row of both for each distance.
    """

    keys: Tensor | None
    queries: Tensor | None
    buckets: Buckets
