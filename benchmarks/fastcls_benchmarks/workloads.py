"""What is measured: models, and batches of texts of given lengths, each defined once.

Token ids and weights are random, since time does not depend on their values; lengths are what time depends on, so each
distribution of lengths says where it comes from.
"""

from __future__ import annotations

import math
import statistics
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

Batch = dict[str, Tensor]

SEED = 0
VOCAB_SIZE = 30522  # bert-base-uncased's
CLS_ID = 101
FIRST_WORD_ID = 1000  # below lie special tokens and single characters

CONFIGS: dict[str, dict[str, Any]] = {
    "minilm-l6": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "distilbert": {"num_hidden_layers": 6},
    "bert-base": {},
    "bert-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
MODELS = tuple(CONFIGS)


def config_of(name: str) -> BertConfig:
    """The shape of one of `MODELS`."""
    return BertConfig(**CONFIGS[name])


def build_model(name: str, device: torch.device, dtype: torch.dtype) -> BertForSequenceClassification:
    """A BERT classifier of one of `MODELS`' shapes with random weights, the same ones every time, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = BertForSequenceClassification(config_of(name)).eval()
    torch.nn.Module.to(model, device, dtype)
    return model


@dataclass(frozen=True)
class Lengths:
    """A distribution of texts' lengths in tokens, [CLS] and [SEP] included.

    Attributes:
        description: as reports show it.
        source: where the numbers come from.
        quantiles: the lengths at equally spaced probabilities from 0 to 1; between them it is interpolated.
    """

    description: str
    source: str
    quantiles: tuple[int, ...]

    def at(self, probability: float) -> int:
        position = probability * (len(self.quantiles) - 1)
        below = min(int(position), len(self.quantiles) - 2)
        low, high = self.quantiles[below : below + 2]
        return round(low + (high - low) * (position - below))


def _equal(length: int) -> Lengths:
    return Lengths(f"{length} tokens each, no padding", "all alike", (length, length))


def _log_normal(mean: float, sigma: float, shortest: int, longest: int) -> tuple[int, ...]:
    """Quantiles of a log-normal distribution cut at both ends, whose mean after the cut is ``mean``."""
    normal = statistics.NormalDist(sigma=sigma)
    # The middles of 101 equal parts; the median is found by bisection.
    factors = [math.exp(normal.inv_cdf((index + 0.5) / 101)) for index in range(101)]

    def cut(median: float) -> list[float]:
        return [min(max(median * factor, shortest), longest) for factor in factors]

    low, high = float(shortest), float(longest)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if statistics.fmean(cut(middle)) < mean else (low, middle)
    return tuple(map(round, cut(high)))


# The percentiles, from the shortest to the longest.
_SST2 = (
    3,
    5,
    6,
    7,
    7,
    8,
    8,
    9,
    9,
    10,
    10,
    10,
    11,
    11,
    11,
    12,
    12,
    13,
    13,
    13,
    13,
    14,
    14,
    14,
    15,
    15,
    15,
    16,
    16,
    16,
    17,
    17,
    17,
    18,
    18,
    18,
    18,
    19,
    19,
    19,
    19,
    20,
    20,
    20,
    21,
    21,
    21,
    22,
    22,
    22,
    22,
    23,
    23,
    23,
    24,
    24,
    24,
    24,
    25,
    25,
    25,
    26,
    26,
    26,
    27,
    27,
    27,
    27,
    28,
    28,
    28,
    29,
    29,
    30,
    30,
    30,
    31,
    31,
    32,
    32,
    32,
    33,
    33,
    34,
    34,
    35,
    35,
    36,
    37,
    37,
    38,
    39,
    40,
    40,
    41,
    42,
    44,
    45,
    48,
    52,
    67,
)

LENGTHS: dict[str, Lengths] = {
    "sst2": Lengths(
        "SST-2 sentences, mean 23",
        "measured: all 9,613 labelled sentences of SST-2 (train, dev, test) under bert-base-uncased's vocabulary",
        _SST2,
    ),
    "mnli": Lengths(
        "pairs as in MNLI, mean 39",
        "a model, not data: log-normal with MNLI's mean; its spread (sigma 0.5) is assumed; 8 to 128 tokens",
        _log_normal(39, 0.5, 8, 128),
    ),
    "squad": Lengths(
        "questions with a passage as in SQuAD, mean 177 of 384",
        "a model, not data: log-normal with SQuAD 1.1's mean; its spread (sigma 0.4) is assumed; 40 to 384 tokens",
        _log_normal(177, 0.4, 40, 384),
    ),
    "mixed-512": Lengths(
        "uniform up to 408 tokens, mean 40 % of 512",
        "a model: uniform, as padding-free transformers have been measured since ByteTransformer (arXiv:2210.03052)",
        (2, 408),
    ),
    **{str(length): _equal(length) for length in (16, 32, 64, 128, 256, 384, 512)},
}


@dataclass(frozen=True)
class Workload:
    """Batches of ``batch_size`` texts whose lengths follow `LENGTHS`\\[lengths]."""

    batch_size: int
    lengths: str

    @property
    def name(self) -> str:
        return f"{self.batch_size} x {self.lengths}"

    @property
    def description(self) -> str:
        return f"{self.batch_size} x {LENGTHS[self.lengths].description}"

    def batches(self, count: int) -> list[Batch]:
        """``count`` different batches, padded to their longest, on the CPU, as a tokenizer gives them.

        Lengths are drawn independently. Of many batches those are taken whose tokens, real and padded, are nearest to
        the average, so that few stand for many and each costs about the same. Single texts are one from each of
        ``count`` equal parts of the distribution.
        """
        # crc32, because Python's own hash of a text differs from process to process.
        generator = torch.Generator().manual_seed(SEED + zlib.crc32(self.name.encode()))
        distribution = LENGTHS[self.lengths]
        if self.batch_size == 1:
            order = torch.randperm(count, generator=generator)
            drawn = [[distribution.at((int(part) + 0.5) / count)] for part in order]
        else:
            probabilities = torch.rand(_CANDIDATES, self.batch_size, generator=generator, dtype=torch.float64)
            drawn = _most_typical([[distribution.at(each) for each in row] for row in probabilities.tolist()], count)
        return [_batch(lengths, generator) for lengths in drawn]


_CANDIDATES = 500


def _most_typical(candidates: list[list[int]], count: int) -> list[list[int]]:
    real = statistics.fmean(map(sum, candidates))
    longest = statistics.fmean(map(max, candidates))

    def distance(lengths: list[int]) -> float:
        return abs(sum(lengths) / real - 1) + abs(max(lengths) / longest - 1)

    return sorted(candidates, key=distance)[:count]


def _batch(lengths: Sequence[int], generator: torch.Generator) -> Batch:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(FIRST_WORD_ID, VOCAB_SIZE, mask.shape, generator=generator)
    ids[:, 0] = CLS_ID
    return {"input_ids": ids * mask, "token_type_ids": torch.zeros_like(ids), "attention_mask": mask}


def lengths_of(batch: Batch) -> Tensor:
    """(batch_size,) tokens of each text."""
    return batch["attention_mask"].sum(1)


def real_tokens(batch: Batch) -> int:
    """Tokens that are not padding."""
    return int(batch["attention_mask"].sum())


def padded_tokens(batch: Batch) -> int:
    """Tokens as the batch's shape counts them."""
    return batch["input_ids"].numel()
