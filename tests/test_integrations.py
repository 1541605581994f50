"""The benchmark of other people's libraries: what it times, and that nobody is timed who is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import integrations
import pytest
import torch
import typer
from support import tiny_model
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner

import fastcls
from fastcls.tools.demo import sample_texts

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")


@pytest.fixture
def weights(minilm_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that a CPU times at once, and a few sentences in SST-2's place."""
    folder = tmp_path / "weights"
    sizes = {"vocab_size": len(minilm_tokenizer), "max_position_embeddings": 512}
    tiny_model("BertModel", "bert", **sizes).save_pretrained(folder)
    minilm_tokenizer.save_pretrained(folder)
    (tmp_path / "dev.tsv").write_text("".join(f"{text}\t1\n" for text in sample_texts()), encoding="utf-8")
    monkeypatch.setattr(integrations, "SST2", tmp_path)
    return folder


def run(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(integrations.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_both_are_timed_in_turn(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run("--weights", weights, "--texts", 5, "--seconds", 0, "--out", out)
    assert done.exit_code == 0, done.output
    kept = json.loads(out.read_text())
    assert kept["provenance"]["chip"]
    assert [case["subject"] for case in kept["cases"]] == ["reranking", "classification"]
    for case in kept["cases"]:
        assert {name: len(rounds) for name, rounds in case["seconds"].items()} == {
            "original": 5,
            "fastcls": 5,
            "original (again)": 5,
        }
        assert case["batch_size"] == 5
        assert f"\n{case['subject']} " in done.output.replace("\n ", "\n")


def test_who_is_wrong_is_not_timed(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimize = fastcls.optimize

    def wrong(model: Any) -> Any:
        fast = optimize(model)
        head = fast.model.head
        head.out_bias = torch.nn.Parameter(head.out_bias + 1, requires_grad=False)
        return fast

    monkeypatch.setattr(fastcls, "optimize", wrong)
    out = tmp_path / "out.json"
    done = run("--weights", weights, "--texts", 5, "--seconds", 0, "--case", "reranking", "--out", out)
    assert done.exit_code == 1
    assert "scores differ by 1.0e+00" in done.output
    (case,) = json.loads(out.read_text())["cases"]
    assert not case["seconds"]


def test_what_it_cannot_time_is_said(weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unknown = run("--case", "summaries")
    assert unknown.exit_code == 2
    assert "must be one of reranking, classification" in " ".join(unknown.output.replace("│", " ").split())
    monkeypatch.setattr(integrations, "SST2", tmp_path / "nowhere")
    missing = run("--weights", weights, "--case", "classification")
    assert missing.exit_code == 2
    assert "set FASTCLS_SST2" in " ".join(missing.output.replace("│", " ").split())


def test_pairs_are_of_mixed_lengths_and_always_the_same() -> None:
    pairs = integrations.query_passage_pairs(200)
    lengths = sorted(len(passage.split()) for _, passage in pairs)
    assert lengths[0] >= 8
    assert lengths[-1] <= 200
    assert 45 <= lengths[100] <= 65
    assert lengths[180] >= 2 * lengths[20]
    assert pairs == integrations.query_passage_pairs(200)
