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
from transformers import BatchEncoding

import fastcls
from fastcls.tools.demo import _saved, _time, _Variant, run_demo, sample_texts, sample_tokenizer
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


@pytest.fixture
def small_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of BERT-base's shape a tiny one, since its speed is nobody's question here."""
    # The trainer breaks ties by chance: its vocabularies of the same texts differ by a piece, and have at most 4,000.
    made = tiny_model("BertForSequenceClassification", "bert", vocab_size=4000, max_position_embeddings=512)
    monkeypatch.setattr("fastcls.tools.demo._random_bert_base", lambda *_: made)
    monkeypatch.setattr("fastcls.tools.demo._SECONDS_FOR_BASE", float("inf"))


def demo_of(*texts: str, **options: Any) -> list[str]:
    out = Console(file=io.StringIO(), width=200, **options)
    run_demo(None, 1, "cpu", None, out, Console(file=io.StringIO()), texts=texts)
    return out.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("small_base")
def test_the_demo_labels_reviews_and_sentences_of_the_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("never read"))
    lines = demo_of("I loved every [b]minute[/b] of it.", "A dull, lifeless film. " * 90)
    rows = [found.groups() for line in lines if (found := re.match(r"(positive|negative) +(\d+\.\d)% +(\S.*)", line))]
    assert ("positive", "I loved every [b]minute[/b] of it.") in [(label, text.strip()) for label, _, text in rows]
    # A text that is longer than the model's positions is cut, as it says of itself.
    assert ("negative", "A dull, lifeless film.") in [(label, text[:22]) for label, _, text in rows]
    assert len(rows) == 8
    assert {label for label, _, _ in rows} == {"positive", "negative"}
    agreements = [line for line in lines if line.startswith("Agreement")]
    assert len(agreements) == 2
    assert all("labels equal 64 of 64" in line for line in agreements)
    (said,) = (index for index, line in enumerate(lines) if "random weights: its labels mean nothing" in line)
    assert said > lines.index(agreements[0]), "the model that means something comes first"
    assert not any("A sentence of yours" in line for line in lines)


def test_a_slow_machine_is_not_kept_waiting_for_bert_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcls.tools.demo._SECONDS_FOR_BASE", 0.0)
    monkeypatch.setattr("fastcls.tools.demo._random_bert_base", None)
    lines = demo_of()
    assert len([line for line in lines if line.startswith("Agreement")]) == 1
    (said,) = (line for line in lines if "BERT-base" in line)
    assert re.search(r"is left out: it would take this machine some \d+ s now\.$", said)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("small_base")
@pytest.mark.parametrize("ending", ["\n", ""], ids=["empty_line", "end_of_input"])
def test_on_a_terminal_the_demo_asks_for_sentences(ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = Terminal(f"a wonderful film\na terrible film\n{ending}")
    monkeypatch.setattr("sys.stdin", typed)
    lines = demo_of(force_terminal=True, color_system=None)
    (last,) = (index for index, line in enumerate(lines) if "Now with your own" in line)
    labelled = re.findall(r"(positive|negative) +\d+\.\d% +(a \w+ film)", "\n".join(lines[last:]))
    assert labelled == [("positive", "a wonderful film"), ("negative", "a terrible film")]
    assert typed.read() == "", "it was read to its end"


@pytest.mark.usefixtures("small_base")
def test_what_is_written_to_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Terminal("never read\n"))
    assert not any("A sentence of yours" in line for line in demo_of())


def test_no_round_is_begun_after_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10_000, 3))
    monkeypatch.setattr("fastcls.tools.demo.time.perf_counter", lambda: float(next(now)))
    called: list[str] = []

    def variant(name: str) -> _Variant:
        def classify(_: BatchEncoding) -> torch.Tensor:
            called.append(name)
            return torch.zeros(1, 2)

        return _Variant(name, classify)

    variants = [variant("one"), variant("two")]
    logits, seconds = _time(variants, [BatchEncoding({})], 50, Console(file=io.StringIO()))
    # A round asks for the time five times, and so takes 15 seconds by this clock.
    assert [len(each) for each in seconds] == [2, 2]
    assert called.count("one") == called.count("two") == len(logits) + 1


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
