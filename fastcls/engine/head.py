"""Hidden rows to logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fastcls_kernels import Activation
from fastcls_kernels.packed import PackedWeight
from fastcls_kernels.packed import packed_linear_unchecked as packed_linear
from fastcls_kernels.unchecked import layer_norm, linear, linear_activation, pooler_classifier

from .spec import HeadSpec
from .weights import Weighted, checked_rows, is_intercepted


class Head(Weighted):
    """Dense layers, their activation, a layer norm and a product, as far as the head has them: see `HeadSpec`."""

    dense_weight: Tensor | None
    dense_bias: Tensor | None
    inner_weight: Tensor | None
    inner_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    out_weight: Tensor | None
    out_bias: Tensor | None

    def __init__(self, spec: HeadSpec, weights: Mapping[str, nn.Parameter]) -> None:
        modules = ("dense", "inner", "norm", "out")
        super().__init__(weights, [f"{name}_{kind}" for name in modules for kind in ("weight", "bias")])
        self.spec = spec
        # Its products in their order, and what is behind each: `PackedWeights` makes them.
        self.packed: tuple[tuple[PackedWeight, Activation | None], ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": ()}

    def forward(self, rows: Tensor) -> Tensor:
        """(num_rows, hidden_size) to (num_rows, out_features)."""
        if is_intercepted(self):
            weights = (self.dense_weight, self.norm_weight, self.out_weight)
            first = next((weight for weight in weights if weight is not None), rows)
            rows = checked_rows("the head's rows", rows, (len(rows), first.shape[-1]), first)
        # Read once, since another thread may forget it.
        packed = self.packed
        if packed:
            # In float32 until the end, as the layers before.
            wide = rows.float()
            for weight, activation in packed:
                wide = packed_linear(wide, weight, activation)
            return wide.to(rows.dtype)
        dense_weight, dense_bias = self.dense_weight, self.dense_bias
        out_weight, out_bias = self.out_weight, self.out_bias
        if (
            dense_weight is not None
            and dense_bias is not None
            and out_weight is not None
            and out_bias is not None
            and self.norm_weight is None
            and self.inner_weight is None
        ):
            return pooler_classifier(rows, dense_weight, dense_bias, out_weight, out_bias, self.spec.activation)
        if dense_weight is not None:
            rows = linear_activation(rows, dense_weight, dense_bias, self.spec.activation)
        if self.inner_weight is not None:
            rows = linear_activation(rows, self.inner_weight, self.inner_bias, self.spec.activation)
        if self.norm_weight is not None:
            rows = layer_norm(rows, self.norm_weight, self.norm_bias, self.spec.eps)
        return rows if out_weight is None else linear(rows, out_weight, out_bias)

    def products(self) -> Iterator[tuple[Tensor, Tensor | None, Activation | None]]:
        """Each product's weight and bias and what is behind it, where the head is nothing but products."""
        if self.norm_weight is None:
            if self.dense_weight is not None:
                yield self.dense_weight, self.dense_bias, self.spec.activation
            if self.inner_weight is not None:
                yield self.inner_weight, self.inner_bias, self.spec.activation
            if self.out_weight is not None:
                yield self.out_weight, self.out_bias, None
