"""The models (models.toml) and the batches of texts (lengths.toml) that are measured, each defined once.

Token ids and weights are random, since time does not depend on their values. It depends on lengths, so each
distribution of lengths says where it comes from.
"""

from __future__ import annotations

import statistics
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Batch = dict[str, Tensor]

SEED = 0
VOCAB_SIZE, CLS_ID, MASK_ID = 30522, 101, 103  # bert-base-uncased's
FIRST_WORD_ID = 1000  # below lie special tokens and single characters
_RESIDUES = (4, 24)  # the 20 amino acids in ESM's vocabulary
_FILLS_MASKS = "ForMaskedLM"


def data(name: str) -> dict[str, Any]:
    """A TOML file of this package."""
    return tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Checkpoint:
    """A model of models.toml, which says what the fields mean."""

    model_class: str = "BertForSequenceClassification"
    options: Mapping[str, Any] = field(default_factory=dict)
    fitted: bool = False
    adapters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def about(self) -> str:
        asked = ", one [MASK] a text" if self.model_class.endswith(_FILLS_MASKS) else ""
        read = f", {self.options['classifier_pooling']} pooling" if "classifier_pooling" in self.options else ""
        weights = "real weights, a head fitted to SST-2 (random if not found)" if self.fitted else "random weights"
        adapted = ""
        if self.adapters:
            adapted = f", LoRA of rank {self.adapters['r']} on {' and '.join(self.adapters['target_modules'])}"
        return f"{self.model_class}, {weights}{asked}{read}{adapted}"


MODELS: dict[str, Checkpoint] = {}
for _name, _entry in data("models.toml").items():
    _like = MODELS.get(_entry.get("like", ""), Checkpoint())
    _options = {**_like.options, **_entry.get("options", {})}
    MODELS[_name] = Checkpoint(
        _entry.get("class", _like.model_class), _options, _entry.get("fitted", False), _entry.get("adapters", {})
    )


def class_of(name: str) -> type[PreTrainedModel]:
    """The transformers class of one of `MODELS`."""
    return getattr(transformers, MODELS[name].model_class)


def config_of(name: str, **options: Any) -> PreTrainedConfig:
    """The config of one of `MODELS`."""
    config_class: Any = class_of(name).config_class
    return config_class(**MODELS[name].options, **options)


def build_model(name: str, device: torch.device, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """One of `MODELS` with random weights, the same ones every time, in eval mode; inside PEFT's if adapted."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = class_of(name)(config_of(name, **options)).eval()
        adapters = MODELS[name].adapters
        if adapters:
            import peft

            # Without its usual zeros, which would leave one of each two gradients zero.
            model = peft.get_peft_model(model, peft.LoraConfig("SEQ_CLS", init_lora_weights=False, **adapters))
    torch.nn.Module.to(model, device, dtype)
    return model


def fills_masks(model_class: type[PreTrainedModel]) -> bool:
    """Whether the logits are the masked tokens' over the vocabulary, and not one row of labels per text."""
    return model_class.__name__.endswith(_FILLS_MASKS)


@dataclass(frozen=True)
class ModelInputs:
    """A model's inputs; the defaults are a BERT classifier's."""

    vocab_size: int = VOCAB_SIZE
    padding_id: int = 0  # the token after a text's end; RoBERTa and its relatives count positions by it
    token_types: bool = True  # whether a tokenizer gives any: not if a model has none, or a single one
    masks: bool = False  # whether each text has one [MASK], at a random place between its first and its last token
    first_id: int = CLS_ID
    words: tuple[int, int] | None = None  # the other tokens are from the first to below the second, or the vocabulary's

    @classmethod
    def of(cls, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> ModelInputs:
        special = (0, _RESIDUES) if config.model_type == "esm" else ()
        types = getattr(config, "type_vocab_size", 0) > 1
        return cls(config.vocab_size, config.pad_token_id or 0, types, fills_masks(model_class), *special)


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths.toml."""

    description: str
    source: str
    quantiles: Sequence[int]

    def at(self, probability: float) -> int:
        position = probability * (len(self.quantiles) - 1)
        below = min(int(position), len(self.quantiles) - 2)
        low, high = self.quantiles[below : below + 2]
        return round(low + (high - low) * (position - below))


LENGTHS = {name: Lengths(**entry) for name, entry in data("lengths.toml").items()}
for _each in (16, 32, 64, 128, 256, 384, 512):
    LENGTHS[str(_each)] = Lengths(f"{_each} tokens each, no padding", "all alike", [_each, _each])
_CANDIDATES = 500


@dataclass(frozen=True)
class Workload:
    """Batches of ``batch_size`` texts whose lengths follow `LENGTHS`\\[lengths], or a corpus in such batches."""

    batch_size: int
    lengths: str

    @classmethod
    def named(cls, name: str) -> Workload:
        batch_size, lengths = name.split(" x ")
        return cls(int(batch_size), lengths)

    @property
    def name(self) -> str:
        return f"{self.batch_size} x {self.lengths}"

    def batches(self, count: int, inputs: ModelInputs = ModelInputs()) -> list[Batch]:
        """``count`` different batches, padded to their longest, on the CPU, as a tokenizer gives them.

        Lengths are drawn independently. The batches whose tokens, real and padded, are nearest to the average of many
        are taken, so that few stand for many and each costs about the same. Single texts are one from each of ``count``
        equal parts of the distribution.
        """
        # crc32, because Python's own hash of a text differs from process to process.
        generator = torch.Generator().manual_seed(SEED + zlib.crc32(self.name.encode()))
        length_at = LENGTHS[self.lengths].at
        if self.batch_size == 1:
            order = torch.randperm(count, generator=generator)
            drawn = [[length_at((int(part) + 0.5) / count)] for part in order]
        else:
            probabilities = torch.rand(_CANDIDATES, self.batch_size, generator=generator, dtype=torch.float64)
            drawn = [list(map(length_at, row)) for row in probabilities.tolist()]
            real, longest = (statistics.fmean(map(measure, drawn)) for measure in (sum, max))
            drawn.sort(key=lambda each: abs(sum(each) / real - 1) + abs(max(each) / longest - 1))
        return [_batch(lengths, inputs, generator) for lengths in drawn[:count]]


def _batch(lengths: Sequence[int], inputs: ModelInputs, generator: torch.Generator) -> Batch:
    ends = torch.tensor(lengths)
    mask = (torch.arange(max(lengths)) < ends[:, None]).long()
    ids = torch.randint(*(inputs.words or (FIRST_WORD_ID, inputs.vocab_size)), mask.shape, generator=generator)
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
