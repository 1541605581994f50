"""[CLS] vectors of an encoder as features of a logistic regression: the classic recipe, on SST-2.

    python examples/features_sst2.py path-or-hub-name train.tsv dev.tsv

A file holds one text and its label, 0 or 1, a line, with a tab between them. It needs scikit-learn.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.progress import track
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel, AutoTokenizer

import fastcls

BATCH_SIZE = 32


class Labelled(NamedTuple):
    """Texts and their labels, 0 or 1."""

    texts: list[str]
    labels: list[int]


def read(path: Path) -> Labelled:
    """A tab-separated file of texts and labels."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return Labelled([text for text, _ in rows], [int(label) for _, label in rows])


@torch.inference_mode()
def features(model: Any, tokenizer: Any, texts: list[str]) -> NDArray[np.float32]:
    """The [CLS] vector of each text, (num_texts, hidden_size), by a transformers model or a fast one."""
    vectors = []
    for start in track(range(0, len(texts), BATCH_SIZE), description=type(model).__name__):
        batch = tokenizer(texts[start : start + BATCH_SIZE], padding=True, truncation=True, return_tensors="pt")
        vectors.append(model(**batch).last_hidden_state[:, 0].numpy())
    return np.concatenate(vectors)


def accuracy(model: Any, tokenizer: Any, train: Labelled, test: Labelled) -> float:
    """How often a logistic regression over a model's features is right."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(features(model, tokenizer, train.texts), train.labels)
    return float(classifier.score(features(model, tokenizer, test.texts), test.labels))


def main(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, or its name on the hub.")],
    train: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Texts to learn from.")],
    test: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Texts to be tested on.")],
) -> None:
    """Learns from one file and says how often it is right on another."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    # Of the last layer nothing but the first token of each text is computed.
    fast = fastcls.optimize(AutoModel.from_pretrained(model).eval(), select="first")
    print(f"accuracy: {accuracy(fast, tokenizer, read(train), read(test)):.4f}")


if __name__ == "__main__":
    typer.run(main)
