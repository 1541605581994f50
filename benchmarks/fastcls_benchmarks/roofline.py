"""Rooflines: the least work that an answer needs, the machine's best rates, and the floor that both put under a time.

The useful work is the products of real tokens with the layers' weights, attention among the tokens of a text that see
one another, and in the last layer one pass over its input and the products of the rows that are read: no padding, no
rows that nobody reads. Everything elementwise is left out, and so are a classifier's few labels: no program can reach
the floor. Rates are measured on random data in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from fastcls.engine.spec import Disentangled, EncoderSpec, HeadSpec
from fastcls.families import FAMILIES
from fastcls_kernels import linear

from .results import Rate
from .timing import seconds_of
from .workloads import SEED, Batch, class_of, config_of, lengths_of, masked_rows

# (out_features, in_features)
Product = tuple[int, int]


class ModelShape(NamedTuple):
    """The shape that decides the work: an encoder's, and its head's."""

    spec: EncoderSpec
    head: HeadSpec

    @classmethod
    def of(cls, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> ModelShape:
        name = model_class.__name__
        family = next(each for each in FAMILIES if name in each.heads)
        return cls(family.spec(config), family.head(name, config))

    @classmethod
    def named(cls, name: str) -> ModelShape:
        """One of `MODELS`."""
        return cls.of(class_of(name), config_of(name))

    @property
    def fills_masks(self) -> bool:
        return self.head.task == "masked language modelling"

    @property
    def layer(self) -> list[Product]:
        """One layer's four products, query, key and value being one."""
        width, inner = self.spec.hidden_size, self.spec.intermediate_size
        gated = (1 + self.spec.gated) * inner
        return [(sum(self.spec.qkv_sizes), width), (width, width), (gated, width), (width, inner)]

    @property
    def embeddings(self) -> list[Product]:
        """The projection that widens small embeddings."""
        width, embedded = self.spec.hidden_size, self.spec.embedding_size
        return [(width, embedded)] if embedded != width else []

    @property
    def last(self) -> list[Product]:
        """The head's: a masked language model's transformation and its vocabulary; a classifier's pooler."""
        width, embedded = self.spec.hidden_size, self.spec.embedding_size
        if self.fills_masks:
            return [(embedded, width), (self.spec.vocab_size, embedded)]
        return [(width, width)] if "dense" in self.head.names else []


def product_shapes(shape: ModelShape) -> list[Product]:
    """Of a layer's products, of the projection of embeddings, if any, and of a masked language model's head."""
    return [*shape.layer, *shape.embeddings, *(shape.last if shape.fills_masks else [])]


def _size(products: list[Product]) -> int:
    return sum(out_features * in_features for out_features, in_features in products)


def useful_flops(shape: ModelShape, batch: Batch) -> int:
    """The number of floating point operations; a multiply-add is two."""
    spec, lengths = shape.spec, lengths_of(batch)
    width, layer_weights = spec.hidden_size, _size(shape.layer)
    everything = batch["attention_mask"].nonzero()
    tokens = len(everything)
    windows = spec.windows or (None,) * spec.num_layers
    flops = 2 * _size(shape.embeddings) * tokens
    reads_all = shape.head.is_late or shape.head.pooling == "mean"
    for window in windows if reads_all else windows[:-1]:
        scores = _seen(everything, lengths, window) + _distances(spec, everything, lengths)
        flops += 2 * layer_weights * tokens + 2 * width * (scores + _seen(everything, lengths, window))

    if reads_all:
        return flops + 2 * _size(shape.last) * (tokens if shape.head.is_late else len(lengths))
    first_rows = torch.stack([torch.arange(len(lengths)), torch.zeros_like(lengths)], 1)
    rows = masked_rows(batch) if shape.fills_masks else first_rows
    seen = _seen(rows, lengths, windows[-1])
    # A row passes through every weight once, through the value's after the sum, for which each head reads each token.
    row_weights, summed = layer_weights, spec.num_heads * width * seen
    if spec.rotary or isinstance(spec.relative, Disentangled):
        # Keys depend on their tokens' positions, so they are made.
        keys = spec.qkv_sizes[1]
        row_weights -= keys * width
        scored = keys * width * tokens + width * (seen + _distances(spec, rows, lengths))
    else:
        # The query goes through the key's weights as if it were a value, and each head reads each token for its score.
        scored = summed
    return flops + 2 * (scored + summed) + 2 * (row_weights + _size(shape.last)) * len(rows)


def _seen(rows: Tensor, lengths: Tensor, window: int | None) -> int:
    """How many tokens all of ``rows``, (num_rows, 2) text and token, see together: within ``window`` on each side."""
    texts, places = rows.unbind(1)
    before, behind = places, lengths[texts] - 1 - places
    if window is not None:
        before, behind = before.clamp(max=window), behind.clamp(max=window)
    return int((before + 1 + behind).sum())


def _distances(spec: EncoderSpec, rows: Tensor, lengths: Tensor) -> int:
    """DeBERTa's products of contents with positions, for each of its terms.

    Distances that share an embedding count once, so that far ones are left out: each near one has its own.
    """
    relative = spec.relative
    if not isinstance(relative, Disentangled):
        return 0
    return (relative.num_terms - 1) * _seen(rows, lengths, relative.buckets // 2 or relative.span)


def weight_bytes(shape: ModelShape, itemsize: int) -> int:
    """Bytes that every batch must read: all layers' weights, shared ones once, and the others of `product_shapes`."""
    rest = _size(product_shapes(shape)) - _size(shape.layer)
    return (shape.spec.num_layer_weights * _size(shape.layer) + rest) * itemsize


# On a CPU fastcls_kernels.linear may go to oneDNN where torch's own linear does not; on a GPU both go to cuBLAS.
PRODUCTS: dict[str, Callable[..., Tensor]] = {"F.linear": F.linear, "fastcls_kernels.linear": linear}


@torch.inference_mode()
def measured_rates(device: torch.device, dtype: torch.dtype, shapes: Sequence[Product], seconds: float) -> list[Rate]:
    """Rates of products and of copies of several sizes, each the best of repeated tries, ``seconds`` altogether.

    ``shapes`` are of the models' own weights, measured in addition to square ones.
    """
    random = partial(torch.randn, generator=torch.Generator(device).manual_seed(SEED), device=device, dtype=dtype)
    on_gpu = device.type == "cuda"
    rows, squares, megabytes = (16384, (4096, 8192), (256, 1024)) if on_gpu else (512, (1024, 2048), (64, 256))
    products = dict(list(PRODUCTS.items())[: 1 if on_gpu else None])
    sizes = [*((rows, *shape) for shape in dict.fromkeys(shapes)), *((size, size, size) for size in squares)]
    each = seconds / (len(sizes) * len(PRODUCTS) + len(megabytes))
    name = str(dtype).removeprefix("torch.")
    rates = []
    for num_rows, out_features, in_features in sizes:
        x, weight, bias = random(num_rows, in_features), random(out_features, in_features), random(out_features)
        for library, product in products.items():
            flops = 2 * num_rows * out_features * in_features
            what = f"{num_rows} x {in_features} by {in_features} x {out_features}, {library}"
            rates.append(
                Rate("product", what, name, flops / _shortest(partial(product, x, weight, bias), device, each))
            )
    for size in megabytes:
        source = random(size * 2**20 // dtype.itemsize)
        shortest = _shortest(partial(torch.empty_like(source).copy_, source), device, each)
        rates.append(Rate("copy", f"{size} MiB, read and written", name, 2 * size * 2**20 / shortest))
    return rates


def _shortest(function: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest of at least three tries after one that is not counted: a floor is what nothing falls below."""
    seconds_of(function, device)
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        times.append(seconds_of(function, device))
    return min(times)
