"""The models and the batches of texts that are measured, each defined once.

Token ids and weights are random, since time does not depend on their values. It depends on lengths, so each
distribution of lengths says where it comes from.
"""

from __future__ import annotations

import math
import statistics
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

Batch = dict[str, Tensor]

SEED = 0
VOCAB_SIZE = 30522  # bert-base-uncased's
CLS_ID = 101
MASK_ID = 103
FIRST_WORD_ID = 1000  # below lie special tokens and single characters
_RESIDUES = (4, 24)  # the 20 amino acids in ESM's vocabulary


@dataclass(frozen=True)
class Checkpoint:
    """A model in the shape of a well-known checkpoint.

    Attributes:
        model_class: in transformers.
        options: of its config, if they differ from the class's own.
        fitted: whether `sentences.fitted_model` knows real weights for it.
    """

    model_class: str = "BertForSequenceClassification"
    options: Mapping[str, Any] = field(default_factory=dict)
    fitted: bool = False

    @property
    def about(self) -> str:
        """Describes it in a line."""
        asked = ", one [MASK] a text" if self.model_class.endswith(_FILLS_MASKS) else ""
        weights = "real weights, a head fitted to SST-2 (random if not found)" if self.fitted else "random weights"
        return f"{self.model_class}, {weights}{asked}"


_FILLS_MASKS = "ForMaskedLM"
_ROBERTA: dict[str, Any] = {"max_position_embeddings": 514, "type_vocab_size": 1}
_MINILM: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}

MODELS: dict[str, Checkpoint] = {
    "minilm-l6": Checkpoint(options=_MINILM),
    "minilm-l6-sst2": Checkpoint(options=_MINILM, fitted=True),
    "distilbert": Checkpoint("DistilBertForSequenceClassification"),
    "bert-base": Checkpoint(),
    "bert-large": Checkpoint(
        options={
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        }
    ),
    "bert-base-fill": Checkpoint("BertForMaskedLM"),
    "roberta-base": Checkpoint("RobertaForSequenceClassification", {**_ROBERTA, "vocab_size": 50265}),
    "xlm-roberta-base": Checkpoint("XLMRobertaForSequenceClassification", {**_ROBERTA, "vocab_size": 250002}),
    "camembert-base": Checkpoint("CamembertForSequenceClassification", {**_ROBERTA, "vocab_size": 32005}),
    "electra-base": Checkpoint(
        "ElectraForSequenceClassification",
        {"embedding_size": 768, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    ),
    "albert-base-v2": Checkpoint(
        "AlbertForSequenceClassification",
        {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu_new"},
    ),
    "mpnet-base": Checkpoint("MPNetForSequenceClassification", {"vocab_size": 30527, "max_position_embeddings": 514}),
    # Only the weights' random values differ from the default: cutting them at two deviations takes a minute.
    "modernbert-base": Checkpoint("ModernBertForSequenceClassification", {"initializer_cutoff_factor": 6.0}),
    "deberta-v3-base": Checkpoint(
        "DebertaV2ForSequenceClassification",
        {
            "vocab_size": 128100,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "max_position_embeddings": 512,
            "type_vocab_size": 0,
            "relative_attention": True,
            "position_buckets": 256,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
        },
    ),
    "deberta-base": Checkpoint(
        "DebertaForSequenceClassification",
        {
            "vocab_size": 50265,
            "type_vocab_size": 0,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_biased_input": False,
        },
    ),
    "gte-multilingual-base": Checkpoint("GteForSequenceClassification"),
    "nomic-embed-text-v1.5": Checkpoint("NomicBertForSequenceClassification"),
    "jina-embeddings-v3": Checkpoint("JinaEmbeddingsV3ForSequenceClassification"),
    "eurobert-210m": Checkpoint("EuroBertForSequenceClassification", {"classifier_pooling": "bos"}),
    "esm2-35m": Checkpoint(
        "EsmForSequenceClassification",
        {
            "vocab_size": 33,
            "hidden_size": 480,
            "num_hidden_layers": 12,
            "num_attention_heads": 20,
            "intermediate_size": 1920,
            "layer_norm_eps": 1e-5,
            "pad_token_id": 1,
            "mask_token_id": 32,
            "position_embedding_type": "rotary",
            "token_dropout": True,
        },
    ),
}


def class_of(name: str) -> type[PreTrainedModel]:
    """The transformers class of one of `MODELS`."""
    return getattr(transformers, MODELS[name].model_class)


def config_of(name: str) -> PreTrainedConfig:
    """The config of one of `MODELS`."""
    config_class: Any = class_of(name).config_class
    return config_class(**MODELS[name].options)


def build_model(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """One of `MODELS` with random weights, the same ones every time, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = class_of(name)(config_of(name)).eval()
    torch.nn.Module.to(model, device, dtype)
    return model


def fills_masks(model_class: type[PreTrainedModel]) -> bool:
    """Whether the logits are the masked tokens' over the vocabulary, and not one row of labels per text."""
    return model_class.__name__.endswith(_FILLS_MASKS)


@dataclass(frozen=True)
class ModelInputs:
    """A model's inputs; the defaults are a BERT classifier's.

    Attributes:
        vocab_size: token ids are smaller.
        padding_id: the token after a text's end. RoBERTa and its relatives count positions by it.
        token_types: whether a tokenizer gives any: not if a model has none, or a single one.
        masks: whether each text has one [MASK], at a random place between its first and its last token.
        first_id: the first token.
        words: the other tokens lie from the first of these to below the second, by default the vocabulary's end.
    """

    vocab_size: int = VOCAB_SIZE
    padding_id: int = 0
    token_types: bool = True
    masks: bool = False
    first_id: int = CLS_ID
    words: tuple[int, int] | None = None

    @classmethod
    def of(cls, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> ModelInputs:
        return cls(
            config.vocab_size,
            config.pad_token_id or 0,
            getattr(config, "type_vocab_size", 0) > 1,
            fills_masks(model_class),
            *((0, _RESIDUES) if config.model_type == "esm" else ()),
        )


@dataclass(frozen=True)
class Lengths:
    """A distribution of texts' lengths in tokens, [CLS] and [SEP] included.

    Attributes:
        description: as reports show it.
        source: where the numbers come from.
        quantiles: the lengths at equally spaced probabilities from 0 to 1, interpolated between them.
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
    # The middles of 101 equal parts; bisection finds the median.
    factors = [math.exp(normal.inv_cdf((index + 0.5) / 101)) for index in range(101)]

    def cut(median: float) -> list[float]:
        return [min(max(median * factor, shortest), longest) for factor in factors]

    low, high = float(shortest), float(longest)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if statistics.fmean(cut(middle)) < mean else (low, middle)
    return tuple(map(round, cut(high)))


# The percentiles, from the shortest to the longest.
# fmt: off
_SST2 = (
    3, 5, 6, 7, 7, 8, 8, 9, 9, 10, 10, 10, 11, 11, 11, 12, 12, 13, 13, 13, 13, 14, 14, 14, 15, 15, 15, 16, 16, 16, 17,
    17, 17, 18, 18, 18, 18, 19, 19, 19, 19, 20, 20, 20, 21, 21, 21, 22, 22, 22, 22, 23, 23, 23, 24, 24, 24, 24, 25, 25,
    25, 26, 26, 26, 27, 27, 27, 27, 28, 28, 28, 29, 29, 30, 30, 30, 31, 31, 32, 32, 32, 33, 33, 34, 34, 35, 35, 36, 37,
    37, 38, 39, 40, 40, 41, 42, 44, 45, 48, 52, 67,
)
# fmt: on

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
    "proteins": Lengths(
        "proteins as in Swiss-Prot, mean 367 residues, up to 1,024 tokens",
        "a model, not data: log-normal with the mean of Swiss-Prot release 41 (44,986,459 amino acids in 122,564 "
        "entries); its spread (sigma 0.6) is assumed; cut at ESM-2's 1,022 residues",
        _log_normal(369, 0.6, 32, 1024),
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

    def batches(self, count: int, inputs: ModelInputs = ModelInputs()) -> list[Batch]:
        """``count`` different batches, padded to their longest, on the CPU, as a tokenizer gives them.

        Lengths are drawn independently. The batches whose tokens, real and padded, are nearest to the average of many
        are taken, so that few stand for many and each costs about the same. Single texts are one from each of ``count``
        equal parts of the distribution.
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
        return [_batch(lengths, inputs, generator) for lengths in drawn]


_CANDIDATES = 500


def _most_typical(candidates: list[list[int]], count: int) -> list[list[int]]:
    real = statistics.fmean(map(sum, candidates))
    longest = statistics.fmean(map(max, candidates))

    def distance(lengths: list[int]) -> float:
        return abs(sum(lengths) / real - 1) + abs(max(lengths) / longest - 1)

    return sorted(candidates, key=distance)[:count]


def _batch(lengths: Sequence[int], inputs: ModelInputs, generator: torch.Generator) -> Batch:
    ends = torch.tensor(lengths)
    mask = (torch.arange(max(lengths)) < ends[:, None]).long()
    words = inputs.words or (FIRST_WORD_ID, inputs.vocab_size)
    ids = torch.randint(*words, mask.shape, generator=generator)
    ids[:, 0] = inputs.first_id
    if inputs.masks:
        places = 1 + (torch.rand(len(lengths), generator=generator) * (ends - 2).clamp(min=1)).long()
        ids[torch.arange(len(lengths)), places] = MASK_ID
    batch = {"input_ids": ids.masked_fill(mask == 0, inputs.padding_id), "attention_mask": mask}
    return {**batch, "token_type_ids": torch.zeros_like(ids)} if inputs.token_types else batch


def masked_rows(batch: Batch) -> Tensor:
    """(num_rows, 2) text and token of each [MASK]."""
    return (batch["input_ids"] == MASK_ID).nonzero()


def lengths_of(batch: Batch) -> Tensor:
    """(batch_size,) tokens of each text."""
    return batch["attention_mask"].sum(1)


def real_tokens(batch: Batch) -> int:
    """Tokens that are not padding."""
    return int(batch["attention_mask"].sum())


def padded_tokens(batch: Batch) -> int:
    """Tokens as the batch's shape counts them."""
    return batch["input_ids"].numel()
