"""The least work that an answer needs, and the floor that it puts under a time.

Useful are the products of real tokens with the layers' weights, attention among a text's own tokens, and in the last
layer one pass over its input and the products of the [CLS] rows: no padding, no rows that nobody reads. Everything
elementwise is left out, so that the floor lies below what anybody can reach.
"""

from __future__ import annotations

from transformers import BertConfig

from .workloads import Batch, lengths_of


def product_shapes(config: BertConfig) -> list[tuple[int, int]]:
    """(out_features, in_features) of one layer's four products, query, key and value being one."""
    width, inner = config.hidden_size, config.intermediate_size
    return [(3 * width, width), (width, width), (inner, width), (width, inner)]


def _layer_weights(config: BertConfig) -> int:
    return sum(out_features * in_features for out_features, in_features in product_shapes(config))


def useful_flops(config: BertConfig, batch: Batch) -> int:
    """Floating point operations; a multiply-add is two."""
    lengths = lengths_of(batch)
    tokens, texts, pairs = int(lengths.sum()), len(lengths), int(lengths.square().sum())
    width = config.hidden_size
    layer = 2 * _layer_weights(config) * tokens + 2 * 2 * width * pairs
    # Each head reads each token twice, for its score and for the sum. A [CLS] row passes through every weight once
    # (its query through the key's as if it were a value), and through the pooler.
    streaming = 2 * 2 * config.num_attention_heads * width * tokens
    rows = 2 * (_layer_weights(config) + width**2) * texts
    return (config.num_hidden_layers - 1) * layer + streaming + rows


def weight_bytes(config: BertConfig, itemsize: int) -> int:
    """Each layer's weights, which every batch must read once."""
    return config.num_hidden_layers * _layer_weights(config) * itemsize


def floor_seconds(flops: float, num_bytes: float, flops_per_second: float, bytes_per_second: float) -> float:
    """The time below which nobody can go: the longer of computing and moving, as if the two overlapped perfectly."""
    return max(flops / flops_per_second, num_bytes / bytes_per_second)
