"""Rooflines: the least work that an answer needs, the machine's best rates, and the floor that both put under a time.

The useful work is the products of real tokens with the layers' weights, attention among the tokens of a text that see
one another, and in the last layer one pass over its input and the products of the rows that are read: no padding, no
rows that nobody reads. Everything elementwise is left out, and so are a classifier's few labels: no program can reach
the floor. Rates are measured on random data in the same run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
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


# (out_features, in_features)
Product = tuple[int, int]


def _layer_products(spec: EncoderSpec) -> list[Product]:
    width, inner = spec.hidden_size, spec.intermediate_size
    return [(sum(spec.qkv_sizes), width), (width, width), ((1 + spec.gated) * inner, width), (width, inner)]


def _embedding_products(spec: EncoderSpec) -> list[Product]:
    """The projection that widens small embeddings."""
    return [(spec.hidden_size, spec.embedding_size)] if spec.embedding_size != spec.hidden_size else []


def _head_products(shape: ModelShape) -> list[Product]:
    """A masked language model's transformation and its vocabulary; a classifier's pooler."""
    width, embedded = shape.spec.hidden_size, shape.spec.embedding_size
    if shape.fills_masks:
        return [(embedded, width), (shape.spec.vocab_size, embedded)]
    return [(width, width)] if "dense" in shape.head.names else []


def product_shapes(shape: ModelShape) -> list[Product]:
    """(out_features, in_features) of one layer's four products, query, key and value being one; of the projection of
    embeddings, if there is one; of a masked language model's head."""
    head = _head_products(shape) if shape.fills_masks else []
    return [*_layer_products(shape.spec), *_embedding_products(shape.spec), *head]


def _size(products: list[Product]) -> int:
    return sum(out_features * in_features for out_features, in_features in products)


def useful_flops(shape: ModelShape, batch: Batch) -> int:
    """The number of floating point operations; a multiply-add is two."""
    spec = shape.spec
    width, layer_weights = spec.hidden_size, _size(_layer_products(spec))
    lengths, everything = lengths_of(batch), batch["attention_mask"].nonzero()
    tokens = len(everything)
    windows = spec.windows or (None,) * spec.num_layers
    flops = 2 * _size(_embedding_products(spec)) * tokens
    for window in windows[:-1]:
        scores = _seen(everything, lengths, window) + _distances(spec, everything, lengths)
        flops += 2 * layer_weights * tokens + 2 * width * (scores + _seen(everything, lengths, window))

    rows = masked_rows(batch) if shape.fills_masks else _first_rows(lengths)
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
        scored = spec.num_heads * width * seen
    return flops + 2 * (scored + summed) + 2 * (row_weights + _size(_head_products(shape))) * len(rows)


def _first_rows(lengths: Tensor) -> Tensor:
    return torch.stack([torch.arange(len(lengths)), torch.zeros_like(lengths)], 1)


def _seen(rows: Tensor, lengths: Tensor, window: int | None) -> int:
    """How many tokens all of ``rows`` see together.

    Args:
        rows: (num_rows, 2) text and token.
        lengths: of the texts.
        window: how many tokens on each side a row sees, or None for all.
    """
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
    rest = product_shapes(shape)[len(_layer_products(shape.spec)) :]
    return (shape.spec.num_layer_weights * _size(_layer_products(shape.spec)) + _size(rest)) * itemsize


def floor_seconds(flops: float, num_bytes: float, flops_per_second: float, bytes_per_second: float) -> float:
    """The shortest possible time: the longer of computing and moving, as if the two overlapped perfectly."""
    return max(flops / flops_per_second, num_bytes / bytes_per_second)


# On a CPU fastcls_kernels.linear may go to oneDNN where torch's own linear does not.
PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "F.linear": F.linear,
    "fastcls_kernels.linear": linear,
}


def measured_rates(
    device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int]], seconds: float
) -> list[Rate]:
    """Rates of products and of copies of several sizes, each the median of repeated tries.

    Args:
        device: the device to measure.
        dtype: of the products.
        shapes: (out_features, in_features) of the models' own weights, measured in addition to square ones.
        seconds: how long to try, altogether.
    """
    generator = torch.Generator(device).manual_seed(SEED)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    on_gpu = device.type == "cuda"
    rows = 16384 if on_gpu else 512
    squares = (4096, 8192) if on_gpu else (1024, 2048)
    sizes = [*((rows, *shape) for shape in dict.fromkeys(shapes)), *((size, size, size) for size in squares)]
    megabytes = (256, 1024) if on_gpu else (64, 256)
    each = seconds / (len(sizes) * len(PRODUCTS) + len(megabytes))
    name = str(dtype).removeprefix("torch.")
    rates = []
    with torch.inference_mode():
        for num_rows, out_features, in_features in sizes:
            x, weight, bias = random(num_rows, in_features), random(out_features, in_features), random(out_features)
            # On a GPU both go to cuBLAS.
            for library, product in list(PRODUCTS.items())[: 1 if on_gpu else None]:
                typical = _typical_time(lambda: product(x, weight, bias), device, each)  # noqa: B023 (called at once)
                flops = 2 * num_rows * out_features * in_features
                what = f"{num_rows} x {in_features} by {in_features} x {out_features}, {library}"
                rates.append(Rate("product", what, name, flops / typical))
        for size in megabytes:
            source = random(size * 2**20 // dtype.itemsize)
            target = torch.empty_like(source)
            typical = _typical_time(lambda: target.copy_(source), device, each)  # noqa: B023 (called at once)
            rates.append(Rate("copy", f"{size} MiB, read and written", name, 2 * size * 2**20 / typical))
    return rates


def _typical_time(function: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The median of at least three tries after one that is not counted."""
    seconds_of(function, device)
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        times.append(seconds_of(function, device))
    return statistics.median(times)
