"""An encoder's products with weights that are trained, and with adapters (LoRA) that add low-rank ones to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcls_kernels import Activation
from fastcls_kernels.training import Dropout, activated_linear, activation, adapted_linear, linear, low_rank_inner

# Seeds of one adapter's uses are this far apart; odd, so that no two of 2^32 are the same.
_APART = 0x9E3779B1
# The passes over tokens take rows of a multiple of this.
_ALIGNED = 16


class LowRank(NamedTuple):
    """What one adapter adds to a product: up (down drop(rows)).

    Attributes:
        down: (rank, in_features), LoRA's A.
        up: (some of out_features, rank), LoRA's B times its scale.
        first: the row of our weight at which ``up`` begins.
        rate: of the dropout of what ``down`` reads.
        seed: of that dropout; each use of the adapter has one of its own, made of this.
    """

    down: Tensor
    up: Tensor
    first: int
    rate: float = 0.0
    seed: int = 0

    def dropout(self, use: int) -> Dropout | None:
        """The dropout of the adapter's use of a number, or None."""
        return Dropout(self.rate, (self.seed + use * _APART) % 2**32) if self.rate else None

    def within(self, rows: slice) -> Tensor | None:
        """(rows, rank), what it adds to some rows of the weight; None if to none of them."""
        begin, end = max(self.first, rows.start), min(self.first + len(self.up), rows.stop)
        if begin >= end:
            return None
        return F.pad(self.up[begin - self.first : end - self.first], (0, 0, begin - rows.start, rows.stop - end))


Adapters = Mapping[str, Sequence[LowRank]]


def seeded(adapters: Adapters) -> Adapters:
    """The adapters with a seed each, drawn from PyTorch's generator on the CPU where one of them drops out."""
    each = [(name, one) for name, several in adapters.items() for one in several]
    if not any(one.rate for _, one in each):
        return adapters
    found: dict[str, list[LowRank]] = {}
    seeds = torch.randint(2**32, (len(each),), dtype=torch.int64, device="cpu").tolist()
    for (name, one), seed in zip(each, seeds, strict=True):
        found.setdefault(name, []).append(one._replace(seed=seed))
    return found


class Products:
    """Products of rows with the weights of a layer, or of what stands outside of layers.

    Args:
        weights: by their names there.
        adapters: for names of weights what is added to their products.
        dtype: what products are computed in.
        use: which layer it is, since layers may share adapters and drop other numbers.
    """

    def __init__(self, weights: Mapping[str, Tensor], adapters: Adapters, dtype: torch.dtype, use: int = 0) -> None:
        self.weights = weights
        self.adapters = adapters
        self.dtype = dtype
        self.use = use

    def linear(self, name: str, rows: Tensor, part: slice | None = None, *, of_positions: bool = False) -> Tensor:
        """rows weightᵀ + bias, (num_rows, out_features), with what adapters add.

        Args:
            name: the weight's, without its end.
            rows: (num_rows, in_features), of any dtype.
            part: the weight's rows to take, or None for all.
            of_positions: whether rows are DeBERTa's distances, in which adapters drop other numbers.
        """
        rows = rows.to(self.dtype).contiguous()
        weight, bias = self.weights[f"{name}_weight"], self.weights.get(f"{name}_bias")
        if part is not None:
            weight, bias = weight[part], None if bias is None else bias[part]
        added = self.low_rank(name, rows, part or slice(0, len(weight)), of_positions=of_positions)
        return linear(rows, weight, bias) if added is None else adapted_linear(rows, weight, bias, *added)

    def activated(self, name: str, up: Tensor, function: Activation, *, gated: bool = False) -> Tensor:
        """`linear` of the activation of ``up``, of which nothing is kept where no adapter reads it."""
        if self.adapters.get(f"{name}_weight"):
            return self.linear(name, activation(up, function, gated=gated))
        return activated_linear(
            up, self.weights[f"{name}_weight"], self.weights.get(f"{name}_bias"), function, gated=gated
        )

    def low_rank(
        self, name: str, rows: Tensor, part: slice, *, of_positions: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        """What adapters add to the rows ``part`` of a weight: inner and up, as `adapted_linear` takes them, or None."""
        several = self.adapters.get(f"{name}_weight", ())
        found = [(each, up) for each in several if (up := each.within(part)) is not None]
        if not found:
            return None
        # As PEFT computes: in the adapters' dtype if that is wider, but in autocast's where that is on.
        dtype = self.dtype
        if self.weights[f"{name}_weight"].dtype == dtype:
            dtype = torch.promote_types(dtype, found[0][0].down.dtype)
        use = 2 * self.use + of_positions
        plain = [(each, up) for each, up in found if not each.rate]
        inner = [low_rank_inner(rows, each.down, dtype, each.dropout(use)) for each, _ in found if each.rate]
        ups = [up for each, up in found if each.rate]
        if plain:
            # One product for all whose rows are the same.
            downs = [each.down for each, _ in plain]
            inner.append(low_rank_inner(rows, downs[0] if len(downs) == 1 else torch.cat(downs), dtype))
            ups += [up for _, up in plain]
        return (inner[0] if len(inner) == 1 else torch.cat(inner, 1)), (ups[0] if len(ups) == 1 else torch.cat(ups, 1))

    def carrying(self, name: str, rows: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Rows and some rows of a weight, joined to what adapters read and add: their product is that of `linear`.

        A weighted sum of such rows may so be taken before the product, dropout or not.

        Returns:
            (num_rows, in_features + ranks) and (out_features, in_features + ranks), the latter in float32 at least.
        """
        rows = rows.to(self.dtype)
        weight = self.weights[f"{name}_weight"][part]
        weight = weight.to(torch.promote_types(self.dtype, torch.float32))
        added = self.low_rank(name, rows, part)
        if added is None:
            return rows, weight
        inner, up = added
        lacking = -inner.shape[1] % _ALIGNED
        inner, up = (F.pad(each, (0, lacking)) for each in (inner.to(rows.dtype), up.to(weight.dtype)))
        return torch.cat((rows, inner), 1), torch.cat((weight, up), 1)
