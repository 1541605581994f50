"""How many floating point operations an encoder needs, and the rate at which this machine could do them.

Only the layers' matrix products with weights are counted (query, key, value, output, feed-forward). Attention's own
products, the pooler and everything elementwise are not: they are overhead, for every provider alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig

from fastcls_kernels import linear

from .workloads import SEED, Batch, padded_tokens, real_tokens

# (config, batch) -> operations
Flops = Callable[[BertConfig, Batch], int]
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def product_shapes(config: BertConfig) -> list[tuple[int, int]]:
    """(out_features, in_features) of one layer's four products, query, key and value being one."""
    width, inner = config.hidden_size, config.intermediate_size
    return [(3 * width, width), (width, width), (inner, width), (width, inner)]


def _layer_flops(config: BertConfig) -> int:
    """One token in one layer; a multiply-add is two operations."""
    return sum(2 * out_features * in_features for out_features, in_features in product_shapes(config))


def useful_flops(config: BertConfig, batch: Batch) -> int:
    """All layers, real tokens only: the work that every share is measured against."""
    return config.num_hidden_layers * _layer_flops(config) * real_tokens(batch)


def padded_flops(config: BertConfig, batch: Batch) -> int:
    """All layers, padding included."""
    return config.num_hidden_layers * _layer_flops(config) * padded_tokens(batch)


def selected_flops(config: BertConfig, batch: Batch) -> int:
    """The last layer makes keys and values for each token, and the rest for [CLS] alone."""
    keys_and_values = 2 * 2 * config.hidden_size**2
    last = keys_and_values * real_tokens(batch) + (_layer_flops(config) - keys_and_values) * len(batch["input_ids"])
    return _all_but_last(config, batch) + last


def absorbed_flops(config: BertConfig, batch: Batch) -> int:
    """The last layer reads each token twice for each head (scores, sum); [CLS] rows take as much as in any layer."""
    streaming = 2 * 2 * config.num_attention_heads * config.hidden_size
    last = streaming * real_tokens(batch) + _layer_flops(config) * len(batch["input_ids"])
    return _all_but_last(config, batch) + last


def _all_but_last(config: BertConfig, batch: Batch) -> int:
    return (config.num_hidden_layers - 1) * _layer_flops(config) * real_tokens(batch)


class Ceiling:
    """The model's own matrix products and nothing else, on random data: what is left of a forward pass at best.

    Args:
        config: whose layers' shapes; each layer has weights of its own, as in the model, so that no cache holds them.
        batches: those that will be asked for; each is given as many rows as it has real tokens.
    """

    def __init__(self, config: BertConfig, batches: Sequence[Batch], device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(SEED)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        self.config = config
        shapes = product_shapes(config)
        most_rows = max(map(self.rows, batches))
        self.inputs = {in_features: random(most_rows, in_features) for _, in_features in shapes}
        self.layers = [
            [(random(out_features, in_features), random(out_features)) for out_features, in_features in shapes]
            for _ in range(config.num_hidden_layers)
        ]

    def rows(self, batch: Batch) -> int:
        """Its real tokens, filled up to a multiple of 8, where libraries are at their best."""
        tokens = real_tokens(batch)
        return tokens + -tokens % 8

    def flops(self, batch: Batch) -> int:
        """What `multiply` computes for this batch."""
        return self.config.num_hidden_layers * _layer_flops(self.config) * self.rows(batch)

    def multiply(self, product: Product, batch: Batch) -> Tensor:
        """All products of all layers, by the library in question."""
        rows = self.rows(batch)
        for layer in self.layers:
            for weight, bias in layer:
                out = product(self.inputs[weight.shape[1]][:rows], weight, bias)
        return out


# fastcls_kernels.linear goes to oneDNN where torch's own linear may not; the better of the two is the machine's rate.
PRODUCTS: dict[str, Product] = {"F.linear": F.linear, "fastcls_kernels.linear": linear}
