"""DeBERTa's convolution: neighbouring embeddings of a text, added to what the first layer makes of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastcls_kernels import PackedLayout
from fastcls_kernels.unchecked import add_layer_norm, linear_activation

from .spec import EncoderSpec
from .weights import Weighted, checked_rows, in_memory_of, is_intercepted, weight_version


class EmbeddingConvolution(Weighted):
    """LayerNorm(first layer + activation(convolution of the embeddings)), the convolution within each text alone."""

    kernel_weight: Tensor
    kernel_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor

    def __init__(self, spec: EncoderSpec, weights: Mapping[str, nn.Parameter]) -> None:
        super().__init__(weights)
        assert spec.convolution is not None
        self.spec = spec.convolution
        self.eps = spec.layer_norm_eps
        # The matrix, behind what it was made of.
        self._made: tuple[object, Tensor] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_made": None}

    def refresh(self) -> None:
        """Makes the kernel's matrix anew if the weight has changed since, in the same memory if it fits."""
        made_of, made = weight_version(self.kernel_weight), self._made
        if made is None or made[0] != made_of:
            self._made = (made_of, in_memory_of(None if made is None else made[1], self._matrix_of_kernel()))

    def doubt(self) -> None:
        """Makes `refresh` compute the matrix again, in its place."""
        made = self._made
        self._made = None if made is None else (None, made[1])

    def clear(self) -> None:
        """Forgets the matrix."""
        self._made = None

    def matrix(self) -> Tensor:
        """The kernel as a matrix, (out_features, kernel_size * in_features)."""
        made = self._made
        # Another thread may have forgotten it since.
        return self._matrix_of_kernel() if made is None else made[1]

    def _matrix_of_kernel(self) -> Tensor:
        # [out, in, taps] to [out, taps * in]: neighbours stand side by side in a row. A copy, since with one tap a view
        # would do, and what is made here is written to later.
        return self.kernel_weight.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(1)

    def forward(self, embedded: Tensor, hidden_states: Tensor, layout: PackedLayout) -> Tensor:
        """The embeddings and the first layer's result, (total_tokens, hidden_size) each, to the same shape."""
        if is_intercepted(self):
            shape = (layout.total_tokens, self.norm_weight.shape[0])
            embedded = checked_rows("the embeddings", embedded, shape, self.norm_weight)
            hidden_states = checked_rows("the first layer's rows", hidden_states, shape, self.norm_weight)
        half = self.spec.kernel_size // 2
        taps = [neighbours(embedded, layout, offset) for offset in range(-half, half + 1)]
        convolved = linear_activation(torch.cat(taps, 1), self.matrix(), self.kernel_bias, self.spec.activation)
        return add_layer_norm(convolved, None, hidden_states, self.norm_weight, self.norm_bias, self.eps)[0]


def neighbours(tokens: Tensor, layout: PackedLayout, offset: int) -> Tensor:
    """For each row the row ``offset`` places further in its text, or zeros."""
    starts, ends = layout.window_bounds(max(-offset, 0), max(offset, 0))
    # The farthest row within reach is that neighbour, unless the mask leaves it out.
    found = starts if offset < 0 else (ends - 1).clamp(min=0)
    places = layout.token_positions
    there = (places[found] == places + offset) & (ends > 0)
    return torch.where(there[:, None], tokens[found], 0.0)
