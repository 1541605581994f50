"""What the demo says of its measurements."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support import tiny_model

import fastcls
from fastcls.tools.demo import _saved, run_demo, sample_texts, sample_tokenizer
from fastcls_kernels import explain_compiled


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
    assert "int8" not in out.getvalue()


@pytest.mark.parametrize("pack_weights", [True, False])
def test_a_step_that_computes_what_another_does_is_left_out(
    pack_weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = sample_tokenizer(sample_texts())
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 112}
    tiny_model("BertForSequenceClassification", "bert", vocab_size=len(tokenizer), **sizes).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr("fastcls.tools.demo.optimize", lambda model: fastcls.optimize(model, pack_weights=pack_weights))
    out = io.StringIO()
    run_demo(str(tmp_path), 1, "cpu", None, Console(file=out, width=200), Console(file=io.StringIO()))
    # The compiled kernels make the last layer's keys and values.
    takes_whole_layers = pack_weights and explain_compiled()[0]
    assert ("keys and values not made" in out.getvalue()) is not takes_whole_layers
    assert "labels equal 64 of 64" in out.getvalue()


def test_int8_is_a_step_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = sample_tokenizer(sample_texts())
    tiny_model("BertForSequenceClassification", "bert", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def off_by_three_in_int8(model: Any, **options: Any) -> Any:
        fast = fastcls.optimize(model)
        # Whatever the CPU.
        fast.quantize = options.get("quantize")
        if options.get("quantize") == "int8":
            with torch.no_grad():
                fast.head.out_bias = torch.nn.Parameter(fast.head.out_bias + 3, requires_grad=False)
        return fast

    monkeypatch.setattr("fastcls.tools.demo.optimize", off_by_three_in_int8)
    out = io.StringIO()
    console = Console(file=out, width=200)
    run_demo(str(tmp_path), 1, "cpu", None, console, Console(file=io.StringIO()), quantize="int8")
    lines = out.getvalue().splitlines()
    differences = {
        found[1]: float(found[2])
        for line in lines
        if (found := re.match(r"Agreement(| in int8) +largest logit difference (\S+),", line))
    }
    assert differences[""] < 1e-4
    assert differences[" in int8"] == pytest.approx(3, abs=1)
    (row,) = (index for index, line in enumerate(lines) if "+ products in int8" in line)
    assert "last layer for [CLS] only" in lines[row - 1] or "keys and values not made" in lines[row - 1]
    monkeypatch.setattr("fastcls.tools.demo.optimize", lambda model, **_: fastcls.optimize(model))
    out = io.StringIO()
    run_demo(str(tmp_path), 1, "cpu", None, Console(file=out, width=200), console, quantize="int8")
    assert "in int8" not in out.getvalue(), "optimize has left it out"
    with pytest.raises(ValueError, match="quantize must be None or one of int8, got 'int4'"):
        run_demo(str(tmp_path), 1, "cpu", None, console, console, quantize="int4")
