"""The benchmark of files: what it keeps, its ratios, and that it refuses to time other answers."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import files
import pytest
import torch
import typer
from support import tiny_bert
from typer.testing import CliRunner

from fastcls_benchmarks import from_files, sentences
from fastcls_benchmarks.from_files import FILES, IN_WINDOW, MODEL, Bench, Memory, Sample, Sizes

SIZES = Sizes(
    rows=40,
    block=20,
    pipeline_rows=4,
    duplicate_rows=20,
    documents=2,
    words=2000,
    memory_rows=(100,),
    memory_forms=("parquet", "txt"),
    plan_seconds=0.01,
    rounds=2,
)


@pytest.fixture(autouse=True)
def model_is_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights under the tokenizer that is found, and made-up words."""
    monkeypatch.setattr(sentences, "missing", lambda: "not asked for")
    made = tiny_bert(vocab_size=30_522, max_position_embeddings=512)
    monkeypatch.setattr(from_files, "build_model", lambda *_: made)
    monkeypatch.setattr(files, "Sizes", lambda **_: SIZES)


def test_quick_keeps_every_part(tmp_path: Path) -> None:
    run = CliRunner().invoke(
        run_app(), ["--quick", "--part", "speed,duplicates,documents,plan", "--out", str(tmp_path)]
    )
    assert run.exit_code == 0, run.output
    kept = json.loads((tmp_path / "files.json").read_text(encoding="utf-8"))
    assert kept["complete"]
    assert {each["part"] for each in kept["samples"]} == {"speed", "duplicates", "documents", "plan"}
    rounds = [each["round"] for each in kept["samples"] if each["part"] == "speed" and each["way"] == FILES]
    assert sorted(rounds) == [0, 0, 1, 1]
    tokens = {each["way"]: each["tokens"] for each in kept["samples"] if each["part"] == "duplicates"}
    # Each text is computed once.
    assert tokens[IN_WINDOW] < 0.6 * tokens["each once"]
    alone, by_files = (
        {each["tokens"] for each in kept["samples"] if (each["part"], each["way"], each["round"]) == ("speed", way, 0)}
        for way in (MODEL, FILES)
    )
    assert alone == by_files
    assert "x model alone (A/A)" in run.stdout


@pytest.mark.full
def test_memory_is_that_of_a_process_of_its_own(tmp_path: Path) -> None:
    run = CliRunner().invoke(run_app(), ["--quick", "--part", "memory", "--out", str(tmp_path)])
    assert run.exit_code == 0, run.output
    kept = json.loads((tmp_path / "files.json").read_text(encoding="utf-8"))["memory"]
    assert [each["form"] for each in kept] == ["parquet", "txt"]
    assert all(each["peak"] >= max(mib for _, mib in each["samples"]) > 50 for each in kept)
    assert (tmp_path / "files.png").stat().st_size > 1000


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(bench: Bench) -> None:
        bench.samples.append(Sample("plan", 0, "int8", FILES, 10, 50, 2.0, 0.1))
        raise KeyboardInterrupt

    monkeypatch.setitem(files.PARTS, "plan", interrupted)
    run = CliRunner().invoke(run_app(), ["--part", "plan", "--out", str(tmp_path)])
    kept = json.loads((tmp_path / "files.json").read_text(encoding="utf-8"))
    assert run.exit_code == 130
    assert not kept["complete"]
    assert kept["summary"][0]["texts_per_second"] == [5.0, 5.0, 5.0]


def test_a_ratio_is_that_within_a_round() -> None:
    # The machine's speed changes from round to round, and what is compared with it.
    seconds = {(0, MODEL): 1.0, (0, FILES): 2.0, (1, MODEL): 10.0, (1, FILES): 20.0, (2, MODEL): 4.0, (2, FILES): 8.0}
    samples = [Sample("speed", index, "int8", way, 8, 1, each, 0.0) for (index, way), each in seconds.items()]
    found = {row["way"]: row for row in files.summary(samples)}
    assert found[FILES]["ratio"] == [0.5, 0.5, 0.5]
    assert found[MODEL]["texts_per_second"][1] == 2.0


def test_other_answers_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Bench.answers

    def other(self: Bench, precision: str, source: str) -> list[dict[str, Any]]:
        return [{**row, "label": "another"} for row in answers(self, precision, source)]

    monkeypatch.setattr(Bench, "answers", other)
    bench = Bench(SIZES, torch.device("cpu"), tmp_path)
    with pytest.raises(ValueError, match=r"files in float32: .* labels are others"):
        from_files.speed(bench)
    assert bench.samples == []


def test_no_text_stands_twice_and_each_keeps_its_words() -> None:
    texts = ["a b c d", "e f g", "h"]
    found = list(islice(from_files.different(texts), 12))
    assert len(set(found)) == 12
    assert {" ".join(sorted(text.split())) for text in found} == set(texts)
    with pytest.raises(ValueError, match="no new orders"):
        list(from_files.different(["a b"]))


def test_refusals() -> None:
    for given, named in (
        (["--part", "size"], "size"),
        (["--memory-rows", "1k"], "1k"),
        (["--memory-forms", "doc"], "doc"),
    ):
        run = CliRunner().invoke(run_app(), given)
        assert run.exit_code == 2
        assert named in run.output


def test_the_picture_has_a_line_for_each_run() -> None:
    runs = [
        Memory("txt", 10, 2.0, [(0.5, 100.0), (1.5, 120.0)], 130.0),
        Memory("parquet", 20, 1.0, [(0.5, 90.0)], 95.0),
    ]
    axes: Any = files.picture(runs).axes[0]
    assert [list(line.get_xdata()) for line in axes.lines] == [[25, 75], [50]]


def run_app() -> typer.Typer:
    app = typer.Typer()
    app.command()(files.main)
    return app
