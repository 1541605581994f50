"""The examples do what they say."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import transformers
from conftest import Sentences
from transformers import PreTrainedTokenizerBase

import fastcls

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("sklearn", reason="the example needs scikit-learn")
    spec = importlib.util.spec_from_file_location("features_sst2", EXAMPLES / "features_sst2.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "features_sst2", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.full
def test_features_give_the_accuracy_of_transformers(
    example: Any, minilm_path: Path, minilm_tokenizer: PreTrainedTokenizerBase, sst2: Callable[[str], Sentences]
) -> None:
    model = transformers.AutoModel.from_pretrained(minilm_path).eval()
    fast = fastcls.optimize(model, select="first")
    train, test = (
        example.Labelled(split.texts[:size], split.labels[:size])
        for split, size in ((sst2("train"), 768), (sst2("dev"), 400))
    )
    ours, theirs = (example.features(each, minilm_tokenizer, test.texts) for each in (fast, model))
    assert ours.dtype == np.float32
    assert float(np.abs(ours - theirs).max()) <= 1e-5
    accuracy = example.accuracy(fast, minilm_tokenizer, train, test)
    assert accuracy == example.accuracy(model, minilm_tokenizer, train, test)
    assert accuracy > 0.6, "features that say nothing would prove nothing"


def test_the_command_learns_from_files(
    example: Any, minilm_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"a {word} film\t{label}" for word, label in (("lovely", 1), ("dreadful", 0)) for _ in range(4)]
    path = tmp_path / "texts.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    example.main(str(minilm_path), path, path)
    assert "accuracy: 1.0000" in capsys.readouterr().out
