"""Where each sequence lies in a packed tensor, and the tables that follow from it, made once for many calls."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._ops import Members
from .runtime.checks import check_device
from .runtime.invariance import choices
from .runtime.tile_map import launch_sequence_tiles, row_bounds

# More than any position, so that a sequence's first row and a position in it make one 64-bit key.
_MAX_POSITIONS = 1 << 31


class Run(NamedTuple):
    """Neighbouring sequences of one length: ``tokens[start_token:end_token]`` is (num_sequences, length, ...)."""

    first_sequence: int
    num_sequences: int
    start_token: int
    length: int

    @property
    def end_token(self) -> int:
        return self.start_token + self.num_sequences * self.length

    def batch(self, tokens: Tensor) -> Tensor:
        """The run's rows of a packed tensor as a view of shape (num_sequences, length, ...)."""
        # Not unflatten, which takes several times as long; this is called often.
        return tokens[self.start_token : self.end_token].view(self.num_sequences, self.length, *tokens.shape[1:])

    def sequences(self, rows: Tensor) -> Tensor:
        """The run's rows of a tensor that has one row a sequence."""
        return rows[self.first_sequence : self.first_sequence + self.num_sequences]


class PackedLayout:
    """The layout of packed tokens: sequence i is rows ``cu_seqlens[i]:cu_seqlens[i + 1]``.

    Args:
        cu_seqlens: (num_sequences + 1,), int32, contiguous. Zero-length sequences are allowed. Checked by value where
            it lies on the CPU; on a GPU that would stall the device, so there it is trusted.
        max_seqlen: the longest sequence, in tokens, or any bound above it.
        total_tokens: rows of the packed tensors, at least ``cu_seqlens[-1]``; the rows after that belong to no
            sequence.
        positions: (total_tokens,), int32, contiguous: each row's place in its own sequence, where rows in between were
            left out; rising from one row to the next inside a sequence, from at least 0. None for 0, 1, 2, ... in each.
            Checked by value on the CPU, as ``cu_seqlens``.

    Raises:
        TypeError: ``cu_seqlens`` or ``positions`` is not an int32 tensor, or ``max_seqlen`` not an int.
        ValueError: a shape, device or value that does not fit.
    """

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, total_tokens: int, positions: Tensor | None = None) -> None:
        self._hold(cu_seqlens, max_seqlen, total_tokens, positions)
        self.check()

    def _hold(self, cu_seqlens: Tensor, max_seqlen: int, total_tokens: int, positions: Tensor | None) -> None:
        self.cu_seqlens = cu_seqlens
        self.max_seqlen = max_seqlen
        self.total_tokens = total_tokens
        self.positions = positions
        self._sequence_tiles: dict[int, Tensor] = {}
        self._window_bounds: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @classmethod
    def unchecked(
        cls, cu_seqlens: Tensor, max_seqlen: int, total_tokens: int, positions: Tensor | None = None
    ) -> PackedLayout:
        """A layout of arguments that are known to fit. `check` checks it later."""
        layout = cls.__new__(cls)
        layout._hold(cu_seqlens, max_seqlen, total_tokens, positions)
        return layout

    def check(self) -> None:
        """Checks what the layout holds, by value on the CPU.

        Raises:
            TypeError, ValueError: as the class says.
        """
        cu_seqlens, positions = self.cu_seqlens, self.positions
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
            found = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
            raise TypeError(f"cu_seqlens must be a torch.int32 tensor, got {found}")
        if cu_seqlens.ndim != 1 or cu_seqlens.numel() == 0 or not cu_seqlens.is_contiguous():
            raise ValueError(
                "cu_seqlens must be contiguous, of shape (num_sequences + 1,), "
                f"got shape {tuple(cu_seqlens.shape)} with strides {cu_seqlens.stride()}"
            )
        if not isinstance(self.max_seqlen, int):
            raise TypeError(f"max_seqlen must be an int, got {type(self.max_seqlen).__name__}")
        on_cpu = cu_seqlens.device.type == "cpu"
        if on_cpu:
            self._check_values()
        if positions is not None:
            self._check_positions(positions)
            if on_cpu:
                self._check_position_values(positions)

    @classmethod
    def of(cls, tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int, layout: PackedLayout | None) -> PackedLayout:
        """``layout`` if it is given and fits ``tokens`` (total_tokens, ...), else one made of the other arguments."""
        if layout is None:
            layout = cls(cu_seqlens, max_seqlen, tokens.shape[0])
        elif layout.total_tokens != tokens.shape[0]:
            raise ValueError(f"layout must be of total_tokens = {tokens.shape[0]}, got {layout.total_tokens}")
        elif layout.cu_seqlens is not cu_seqlens or layout.max_seqlen != max_seqlen:
            raise ValueError("cu_seqlens and max_seqlen must be the layout's own where a layout is given")
        check_device("cu_seqlens", layout.cu_seqlens, tokens)
        return layout

    @staticmethod
    def members(tokens: str) -> Members:
        """A layout in an operator's schema: its positions, beside the lengths, which are arguments of their own.

        Args:
            tokens: the operator's argument that has total_tokens rows.
        """

        def join(given: Mapping[str, Any]) -> PackedLayout:
            total_tokens = given[tokens].shape[0]
            return PackedLayout(given["cu_seqlens"], given["max_seqlen"], total_tokens, given.get("positions"))

        return Members("layout", lambda layout: {"positions": None if layout is None else layout.positions}, join)

    def _check_values(self) -> None:
        lengths = self.cu_seqlens.diff()
        first, last = int(self.cu_seqlens[0]), int(self.cu_seqlens[-1])
        if first != 0 or last > self.total_tokens or bool((lengths < 0).any()):
            raise ValueError(
                f"cu_seqlens must rise from 0 to at most total_tokens = {self.total_tokens}, "
                f"got {_shortened(self.cu_seqlens)}"
            )
        longest = int(lengths.max()) if lengths.numel() else 0
        if longest > self.max_seqlen:
            raise ValueError(f"max_seqlen must be at least the longest sequence, {longest}, got {self.max_seqlen}")

    def _check_positions(self, positions: Tensor) -> None:
        if not isinstance(positions, Tensor) or positions.dtype != torch.int32:
            found = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
            raise TypeError(f"positions must be a torch.int32 tensor, got {found}")
        if positions.shape != (self.total_tokens,) or not positions.is_contiguous():
            raise ValueError(
                f"positions must be contiguous, of shape (total_tokens,) = ({self.total_tokens},), "
                f"got shape {tuple(positions.shape)} with strides {positions.stride()}"
            )
        check_device("positions", positions, self.cu_seqlens)

    def _check_position_values(self, positions: Tensor) -> None:
        # No row comes before the first of a sequence, nor before the one after the last.
        before = torch.nn.functional.pad(positions, (1, 0))
        before[self.cu_seqlens.long()] = -1
        last = int(self.cu_seqlens[-1])
        falls = positions[:last] <= before[:last]
        if bool(falls.any()):
            row = int(falls.int().argmax())
            raise ValueError(
                f"positions must rise inside each sequence, from at least 0, got {int(positions[row])} at row {row}"
            )

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    @functools.cached_property
    def row_bounds(self) -> tuple[Tensor, Tensor]:
        """For each row its sequence's start and end, two int32 tensors (total_tokens,), both 0 where there is none.

        Computed on the tensor's device without waiting for it.
        """
        return row_bounds(self.cu_seqlens, self.total_tokens)

    @functools.cached_property
    def token_positions(self) -> Tensor:
        """For each row its position in its sequence, int32 (total_tokens,), 0 where there is none.

        Computed on the tensor's device without waiting for it.
        """
        starts, ends = self.row_bounds
        positions = self._rows - starts if self.positions is None else self.positions
        return positions * (ends > 0)

    @property
    def _rows(self) -> Tensor:
        return torch.arange(self.total_tokens, dtype=torch.int32, device=self.cu_seqlens.device)

    def window_bounds(self, left: int, right: int) -> tuple[Tensor, Tensor]:
        """For each row i the rows j of its sequence with -left <= position j - position i <= right: start and end.

        Two int32 tensors (total_tokens,), both 0 where a row belongs to no sequence. -1 for no limit on a side.
        Computed on the tensor's device without waiting for it, once for each window.
        """
        if (left, right) not in self._window_bounds:
            bounds = self._window_of_rows if self.positions is None else self._window_of_positions
            self._window_bounds[left, right] = bounds(left, right)
        return self._window_bounds[left, right]

    def _window_of_rows(self, left: int, right: int) -> tuple[Tensor, Tensor]:
        starts, ends = self.row_bounds
        # Clamped to the packing, so that sums stay within 32 bits.
        if left >= 0:
            starts = torch.maximum(starts, self._rows - min(left, self.total_tokens)) * (ends > 0)
        if right >= 0:
            ends = torch.minimum(ends, self._rows + (min(right, self.total_tokens) + 1))
        return starts, ends

    def _window_of_positions(self, left: int, right: int) -> tuple[Tensor, Tensor]:
        starts, ends = self.row_bounds
        first = starts.long() * _MAX_POSITIONS
        positions = self.token_positions.long()
        # Keys rise over the whole packing; the rows after the last sequence come last.
        keys = first + positions + (ends == 0) * (self.total_tokens * _MAX_POSITIONS)
        if left >= 0:
            lowest = first + (positions - min(left, _MAX_POSITIONS)).clamp(min=0)
            # 0 as well where a row belongs to no sequence, since its start and its position are 0.
            starts = torch.searchsorted(keys, lowest, out_int32=True)
        if right >= 0:
            highest = first + (positions + min(right, _MAX_POSITIONS)).clamp(max=_MAX_POSITIONS - 1)
            ends = torch.searchsorted(keys, highest, right=True, out_int32=True) * (ends > 0)
        return starts, ends

    def sequence_tiles(self, block_m: int) -> Tensor:
        """(num_tiles, 4) int32: tiles of ``block_m`` rows, each with rows of one sequence only.

        For the kernels (runtime/tile_map.py names the columns); computed on the tensor's device without waiting for it.
        """
        if block_m not in self._sequence_tiles:
            self._sequence_tiles[block_m] = launch_sequence_tiles(self.cu_seqlens, self.total_tokens, block_m)
        return self._sequence_tiles[block_m]

    @property
    def runs(self) -> list[Run]:
        """Runs of neighbouring sequences of one length; zero-length sequences belong to none.

        The PyTorch paths batch by them, without padding or copies; sorting by length makes the fewest. With
        `batch_invariant` each sequence is a run of its own, so that the shape of its products depends on it alone.
        Waits for the device where ``cu_seqlens`` is on one.
        """
        return self._shared_runs if choices().joined_texts else self._single_runs

    def has_gaps(self, run: Run) -> bool:
        """Whether positions in a run may differ from the rows' places in their sequences.

        With `batch_invariant` the run's own positions decide; otherwise gaps in any sequence are enough.
        """
        if self.positions is None or choices().joined_texts:
            return self.positions is not None
        first, last = self.positions[run.start_token], self.positions[run.end_token - 1]
        return int(last - first) + 1 > run.length

    @functools.cached_property
    def _shared_runs(self) -> list[Run]:
        lengths = itertools.groupby(self.cu_seqlens.diff().tolist())
        return self._runs_of((length, sum(1 for _ in group)) for length, group in lengths)

    @functools.cached_property
    def _single_runs(self) -> list[Run]:
        return self._runs_of((length, 1) for length in self.cu_seqlens.diff().tolist())

    def _runs_of(self, lengths: Iterable[tuple[int, int]]) -> list[Run]:
        runs = []
        sequence = token = 0
        for length, count in lengths:
            if length:
                runs.append(Run(sequence, count, token, length))
            sequence += count
            token += count * length
        return runs


class PaddedRows:
    """Where a padded batch's tokens lie, as a `PackedLayout` says it of packed ones."""

    def __init__(self, seqlens: Tensor, seqlen: int) -> None:
        self.seqlens = seqlens
        self.seqlen = seqlen
        self.num_sequences = seqlens.numel()
        self.total_tokens = self.num_sequences * seqlen

    def _bounds(self, block_m: int) -> tuple[Tensor, Tensor, Tensor]:
        """Each block's first row, and the start and end of its keys: (batch, blocks) each."""
        starts = torch.arange(self.num_sequences, device=self.seqlens.device)[:, None] * self.seqlen
        blocks = torch.arange(0, self.seqlen, block_m, device=self.seqlens.device)
        real = blocks[None, :] < self.seqlens[:, None]
        return starts + blocks, starts * real, (starts + self.seqlens[:, None]) * real

    @property
    def row_bounds(self) -> tuple[Tensor, Tensor]:
        _, starts, ends = self._bounds(1)
        return starts.flatten().int(), ends.flatten().int()

    def sequence_tiles(self, block_m: int) -> Tensor:
        first, starts, ends = self._bounds(block_m)
        last = first[:, :1] + self.seqlen
        return torch.stack((first, last.expand_as(first), starts, ends), -1).flatten(0, 1).int()


def _shortened(values: Tensor) -> str:
    listed = values.tolist()
    return str(listed) if len(listed) <= 8 else f"[{', '.join(map(str, listed[:4]))}, ..., {listed[-1]}]"
