"""What the demo says of its measurements."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from support import tiny_model

from fastcls.tools.demo import _saved, run_demo, sample_texts, sample_tokenizer


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        pytest.param([1.0, 1.01, 0.99], [0.5, 0.51, 0.49], "500", id="clear"),
        pytest.param([1.0, 1.1, 0.9], [0.95, 1.05, 0.85], "within noise", id="within_noise"),
        pytest.param([1.0, 1.1, 0.9], [1.05, 1.15, 0.95], "within noise", id="within_noise_and_slower"),
        pytest.param([1.0], [2.0], "-1000", id="clearly_slower"),
    ],
)
def test_a_difference_within_the_scatter_is_called_none(before: list[float], after: list[float], said: str) -> None:
    assert _saved(before, after) == said


def test_texts_are_cut_to_what_a_model_has_positions_for(tmp_path: Path) -> None:
    tokenizer = sample_tokenizer(sample_texts())
    # Of RoBERTa's 42 positions texts have 40: the first two are for padding.
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 42}
    tiny_model("RobertaForSequenceClassification", "roberta", **sizes).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    out = io.StringIO()
    run_demo(str(tmp_path), 1, "cpu", None, Console(file=out, width=200), Console(file=io.StringIO()))
    assert "labels equal 64 of 64" in out.getvalue()
