"""Weights in the form that the compiled products read: packed once, in panels of 64 output columns.

    dtype       the numbers of a panel                  rows are read as
    float32     (in_features, 64)                       float32
    bfloat16    (in_features / 2, 64, 2)                bfloat16, rounded once
    int8        (in_features / 4, 64, 4)                uint8, quantised once

An int8 weight has a scale for each output column, symmetric: w = scale * q with q from -127 to 127. A row is quantised
by groups of 128 columns, each with a scale and a zero point of its own that its numbers alone decide:
x = scale * (q - zero_point) with q from 0 to 255. Sums within a group are exact, in int32; they are scaled and added up
in float32. So a row's result depends on no other row. Groups err less than one scale a row: LayerNorm leaves a few
wide columns, which would take the digits of all others.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.activations import Activation
from .library import Packing, WeightStruct, library

PANEL = 64
GROUP = 128

_KINDS: dict[str, int] = {name: number for number, name in enumerate(get_args(Packing))}
_FUNCTIONS: dict[Activation | None, int] = {None: 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "silu": 4, "tanh": 5}


def function_number(activation: Activation | None) -> int:
    """The number by which the compiled kernels know an activation."""
    return _FUNCTIONS[activation]


def packs(packing: Packing, in_features: int) -> bool:
    """Whether the compiled kernels multiply rows of ``in_features`` with a weight of this packing on this machine."""
    compiled = library()
    return compiled is not None and packing not in compiled.lacking and in_features % 16 == 0


class PackedWeight:
    """A weight and its bias, packed. It never changes, so copies and threads share it.

    Args:
        packing: what its numbers are.
        in_features, out_features: its shape.
        panels, bias, scales, sums: see `pack_weight`.

    Attributes:
        struct: what the compiled kernels read, to be had from `placed`.
        may_move: its tensors may no longer lie where ``struct`` says.
    """

    def __init__(
        self,
        packing: Packing,
        in_features: int,
        out_features: int,
        panels: Tensor,
        bias: Tensor,
        scales: Tensor | None,
        sums: Tensor | None,
    ) -> None:
        self.packing: Packing = packing
        self.in_features = in_features
        self.out_features = out_features
        self.panels, self.bias, self.scales, self.sums = panels, bias, scales, sums
        self.struct = WeightStruct(_KINDS[packing], in_features, out_features, 0 if sums is None else sums.stride(0))
        self._point()
        self.may_move = False

    def _point(self) -> None:
        tensors = (self.panels, self.bias, self.scales, self.sums)
        places = (None if each is None else each.data_ptr() for each in tensors)
        self.struct.packed, self.struct.bias, self.struct.scales, self.struct.sums = places

    def placed(self) -> WeightStruct:
        """What the compiled kernels read."""
        if self.may_move:
            self._point()
        return self.struct

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # To hand tensors to another process torch.multiprocessing moves them, at any time from now on.
        self.may_move = True
        own = (self.packing, self.in_features, self.out_features, self.panels, self.bias, self.scales, self.sums)
        return PackedWeight, own

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return sum(each.nbytes for each in (self.panels, self.bias, self.scales, self.sums) if each is not None)

    def columns(self, first: int, count: int) -> PackedWeight:
        """Some output columns, over the same memory; ``first`` is a multiple of 64."""
        last = first + -(-count // PANEL) * PANEL
        return PackedWeight(
            self.packing,
            self.in_features,
            count,
            self.panels[first // PANEL : last // PANEL],
            self.bias[first:last],
            None if self.scales is None else self.scales[first:last],
            None if self.sums is None else self.sums[:, first:last],
        )

    def unpacked(self) -> Tensor:
        """(out_features, in_features) float32, the numbers that it stands for."""
        wide = self.panels.float()
        rows = wide.transpose(1, 2) if wide.ndim == 3 else wide.permute(0, 2, 1, 3)
        weight = rows.reshape(-1, self.in_features)
        if self.scales is not None:
            weight = weight * self.scales[:, None]
        return weight[: self.out_features]


def pack_weight(
    weight: Tensor, bias: Tensor | None = None, packing: Packing = "float32", *, name: str = "weight"
) -> PackedWeight:
    """Packs a weight for `packed_linear`.

    Args:
        weight: (out_features, in_features), on the CPU; in_features is a multiple of 16.
        bias: (out_features,) or None.
        packing: "float32", "bfloat16" or "int8".
        name: what messages call the weight.

    Raises:
        TypeError: weight or bias is no floating point tensor.
        ValueError: a shape or device that does not fit, another packing, or, for int8, a weight that is not finite.
    """
    if packing not in _KINDS:
        raise ValueError(f"packing must be one of {', '.join(_KINDS)}, got {packing!r}")
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{name} must be a floating point tensor, got {found}")
    if weight.ndim != 2 or weight.device.type != "cpu" or not weight.numel() or weight.shape[1] % 16:
        raise ValueError(
            f"{name} must have shape (out_features, a multiple of 16) on the CPU, got {tuple(weight.shape)} on "
            f"{weight.device}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    out_features, in_features = weight.shape
    filled = -out_features % PANEL
    with torch.inference_mode(False), torch.no_grad():
        wide = F.pad(weight.detach().float(), (0, 0, 0, filled))
        given = weight.new_zeros(out_features) if bias is None else bias.detach()
        # A copy, also where nothing is filled up: a bias is written to in place.
        padded = F.pad(given.float(), (0, filled)).clone()
        scales = sums = None
        if packing == "int8":
            if not bool(wide.isfinite().all()):
                raise ValueError(f"{name} must be finite for packing int8, got NaN or infinity in it")
            # The smallest normal number stands in for a column of zeros.
            scales = (wide.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
            wide = (wide / scales[:, None]).round_().clamp_(-127, 127)
            sums = torch.stack([part.sum(1) for part in wide.split(GROUP, 1)]).to(torch.int32)
        rows = wide.unflatten(0, (-1, PANEL))
        if packing == "float32":
            panels = rows.transpose(1, 2).contiguous()
        else:
            together, dtype = (2, torch.bfloat16) if packing == "bfloat16" else (4, torch.int8)
            panels = rows.to(dtype).unflatten(2, (-1, together)).transpose(1, 2).contiguous()
    return PackedWeight(packing, in_features, out_features, panels, padded, scales, sums)
