"""The examples do what they say."""

from __future__ import annotations

import csv
import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import typer
from conftest import Sentences
from rich.console import Console
from safetensors.torch import load_file
from support import tiny_bert
from transformers import AutoTokenizer, BertForSequenceClassification, PreTrainedTokenizerBase

import fastcls
from fastcls.tools import demo_model
from fastcls.tools.demo import _DEMO_MODEL

EXAMPLES = Path(__file__).parents[1] / "examples"


def loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An example as a module of its own, which imports others from beside it, as a script does."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("sklearn", reason="the example needs scikit-learn")
    return loaded("features_sst2", monkeypatch)


@pytest.fixture
def finetune(monkeypatch: pytest.MonkeyPatch) -> Any:
    return loaded("finetune_sst2", monkeypatch)


@pytest.fixture
def distill(monkeypatch: pytest.MonkeyPatch) -> Any:
    return loaded("distill_sst2", monkeypatch)


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


NAMES = ("negative", "positive")
TEXTS = [
    (f"a {word} film, number {number}", label)
    for word, label in (("lovely", 1), ("dreadful", 0))
    for number in "123456"
]


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    path = tmp_path / "texts.tsv"
    path.write_text("".join(f"{text}\t{label}\n" for text, label in TEXTS), encoding="utf-8")
    return path


@pytest.fixture
def teacher(minilm_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    """A tiny classifier with a real vocabulary, which is right about nothing yet."""
    folder = tmp_path / "teacher"
    names = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    tiny_bert(vocab_size=len(minilm_tokenizer), num_labels=2, hidden_dropout_prob=0.0, **names).save_pretrained(folder)
    minilm_tokenizer.save_pretrained(folder)
    return folder


def test_finetuning_learns_and_says_how(
    finetune: Any, labelled: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, curve = tmp_path / "out", tmp_path / "curve.csv"
    options = {"batch_size": 4, "learning_rate": 3e-3, "layer_decay": 0.9, "seed": 0, "epochs": 8, "stop_after": 6}
    finetune.main(labelled, labelled, out=out, test=labelled, model=str(teacher), plot=curve, **options)
    said = capsys.readouterr().out
    header, *rows = list(csv.reader(curve.open(encoding="utf-8")))
    assert header == ["epoch", "train_loss", "accuracy", "loss"]
    assert float(rows[-1][0]) == 6
    assert float(rows[-1][1]) < float(rows[0][1])
    assert max(float(row[2]) for row in rows) == 1.0
    assert f"Accuracy on {labelled}: 1.0000" in said.replace("\n", "")
    classifier = fastcls.Classifier.from_pretrained(out)
    found = [each["label"] for each in classifier([text for text, _ in TEXTS])]
    assert found == [NAMES[label] for _, label in TEXTS]


def test_ctrl_c_leaves_the_best_so_far(
    finetune: Any, labelled: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    judged = iter([(0.5, 0.7), (0.75, 0.6), (0.75, 0.65)])

    def judge(*_: Any) -> tuple[float, float]:
        found = next(judged, None)
        if found is None:
            raise KeyboardInterrupt
        return found

    saved: list[str] = []
    kept = fastcls.FastClassifier.save_pretrained

    def save(fast: Any, out: Path) -> None:
        saved.append(str(out))
        kept(fast, out)

    monkeypatch.setattr(finetune, "judge", judge)
    monkeypatch.setattr(fastcls.FastClassifier, "save_pretrained", save)
    options = {"batch_size": 3, "learning_rate": 1e-3, "layer_decay": 1.0, "seed": 0, "epochs": 2, "stop_after": None}
    with pytest.raises(typer.Exit) as left:
        finetune.main(labelled, labelled, out=tmp_path / "out", test=None, model=str(teacher), plot=None, **options)
    assert left.value.exit_code == 130
    assert saved == [str(tmp_path / "out")] * 2, "the third is as right, with a larger loss"
    said = capsys.readouterr().out
    assert "The best, epoch 0.50, dev accuracy 0.7500, is in" in said
    assert said.rstrip().endswith("Interrupted.")
    assert fastcls.Classifier.from_pretrained(tmp_path / "out")(["fine"])[0]["label"] in NAMES


def test_averaged_weights_are_judged_and_not_trained(finetune: Any, minilm_tokenizer: PreTrainedTokenizerBase) -> None:
    batch = finetune.batch_of(finetune.tokens_of(minilm_tokenizer, [text for text, _ in TEXTS]))
    labels = torch.tensor([label for _, label in TEXTS])
    ends, judged = [], []
    for averaging in (0.0, 0.9):
        model = tiny_bert(vocab_size=len(minilm_tokenizer), num_labels=2)
        fast: Any = fastcls.optimize(model)
        seen: list[torch.Tensor] = []

        def judge(model: Any = model, seen: list[torch.Tensor] = seen) -> tuple[float, float]:
            seen.append(model.classifier.weight.detach().clone())
            return 0.5, 0.7

        finetune.fit(
            fast,
            [[0, 0, 0], [0, 0, 0]],
            6,
            lambda _, fast=fast: fast(**batch, labels=labels).loss,
            judge,
            lambda: None,
            finetune.Recipe(1e-2, parts=1, averaging=averaging),
            Console(quiet=True),
            seed=0,
        )
        ends.append(model.classifier.weight.detach().clone())
        judged.append(seen)
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(judged[0][-1], ends[0]), "a mean of the last step alone"
    assert not torch.equal(judged[1][-1], ends[1])


@pytest.mark.parametrize("line", ["no label", "a film\t2", "a film\t1\tmore", ""])
def test_a_line_that_is_no_labelled_text_is_named(finetune: Any, line: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.tsv"
    path.write_text(f"good\t1\n{line}\n" if line else "", encoding="utf-8")
    with pytest.raises(typer.BadParameter, match=f"{path}, line 2 must be" if line else "must hold at least one text"):
        finetune.read(path)


def test_what_the_teacher_does_not_need_is_left_out(distill: Any, teacher: Path) -> None:
    """A student without neurons and words that do nothing has the teacher's logits."""
    model: Any = BertForSequenceClassification.from_pretrained(teacher)
    idle = [1, 4, 7]
    for layer in model.bert.encoder.layer:
        layer.output.dense.weight.data[:, idle] = 0
    model.save_pretrained(teacher)
    tokenizer: Any = AutoTokenizer.from_pretrained(teacher)
    texts = [text for text, _ in TEXTS]
    tokens = distill.tokens_of(tokenizer, texts)
    neurons = distill.importance(str(teacher), tokens, torch.tensor([label for _, label in TEXTS]))
    assert all(int((scores == 0).sum()) == len(idle) for scores in neurons)
    pieces = distill.smaller_vocabulary(tokenizer, tokens, 260)
    size = model.config.intermediate_size - len(idle)
    sizes = distill.Sizes(list(range(model.config.num_hidden_layers)), size, len(pieces), 32)
    ids = tokenizer.get_vocab()
    student = distill.student_of(str(teacher), sizes, [ids[piece] for piece in pieces], neurons).eval()
    own = distill.tokenizer_of(tokenizer, pieces, 32)
    found = distill.logits_of(student, distill.tokens_of(own, texts))
    assert float((found - distill.logits_of(model.eval(), tokens)).abs().max()) <= 1e-5


def test_words_that_are_left_out_are_spelt(distill: Any, minilm_tokenizer: Any) -> None:
    tokens = distill.tokens_of(minilm_tokenizer, ["a lovely film"])
    own = distill.tokenizer_of(minilm_tokenizer, distill.smaller_vocabulary(minilm_tokenizer, tokens, 240), 64)
    assert len(own) == 240
    assert own.tokenize("A lovely film") == ["a", "lovely", "film"]
    assert own.tokenize("Zany, isn't it?")[:4] == ["z", "##a", "##n", "##y"]
    assert own.unk_token not in own.tokenize("Façade: 12 über-odd quotes & naïve jokes!")
    assert own("film")["input_ids"][::2] == [own.cls_token_id, own.sep_token_id]
    with pytest.raises(typer.BadParameter, match=r"--pieces must be at least .*, got 9"):
        distill.smaller_vocabulary(minilm_tokenizer, tokens, 9)


def test_distilling_ends_in_a_small_checkpoint(
    distill: Any, labelled: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = {"positions": 64, "each": 2, "learning_rate": 1e-3, "temperature": 2.0, "label_share": 0.1, "plot": None}
    sizes = {"layers": "0", "neurons": 8, "pieces": 300, "epochs": 2, "seed": 3, "test": labelled}
    states = []
    for name in ("one", "two"):
        distill.main(labelled, labelled, [teacher], out=tmp_path / name, cache=tmp_path / "cache", **options, **sizes)
        states.append(load_file(tmp_path / name / "model.safetensors"))
        # The second time the teacher is not asked again.
        monkeypatch.setattr(distill, "logits_of", None)
    assert all(value.dtype == torch.float16 for value in states[0].values())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items()), "a seed repeats it"
    assert json.loads((tmp_path / "one" / "config.json").read_text())["vocab_size"] == 300
    assert BertForSequenceClassification.from_pretrained(tmp_path / "one").dtype == torch.float32
    assert "Accuracy on" in capsys.readouterr().out
    with pytest.raises(typer.BadParameter, match=r"--layers must be rising numbers from 0 to .*, got '1,0'"):
        distill.main(labelled, labelled, [teacher], **{**options, **sizes, "layers": "1,0"})


def test_the_demo_model_is_as_right_as_it_says(sst2: Callable[[str], Sentences]) -> None:
    (said,) = re.findall(r"test sentences: (0\.\d{4})", Path(demo_model(), "README.md").read_text(encoding="utf-8"))
    assert f"{float(said):.1%}" in _DEMO_MODEL
    texts, labels = sst2("test")
    classifier = fastcls.Classifier.from_pretrained(demo_model(), device="cpu")
    assert classifier.model.dtype == torch.float32
    given = [found["label"] for found in classifier(texts)]
    right = sum(name == NAMES[label] for name, label in zip(given, labels, strict=True))
    # One sentence may be so near to the border that rounding decides.
    assert right / len(texts) == pytest.approx(float(said), abs=1.5 / len(texts))
