"""README's tables of families and docs/families.md's list of other classes: made from the code, and whole."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from support import IS_OLD
from typer.testing import CliRunner

from fastcls.families import FAMILIES, bert

ROOT = Path(__file__).parents[1]
reads_toml = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="docs/families.py reads TOML with Python 3.11's tomllib"
)


@pytest.fixture(scope="module")
def lists() -> ModuleType:
    """docs/families.py, which is a script and no part of the package."""
    spec = importlib.util.spec_from_file_location("family_lists", ROOT / "docs" / "families.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@reads_toml
def test_every_class_of_transformers_is_a_familys_or_has_a_reason(lists: ModuleType) -> None:
    questions = lists.open_questions_here(lists.read_reasons())
    assert not questions, "\n".join(questions)


@reads_toml
@pytest.mark.skipif(IS_OLD, reason="fastcls takes fewer families with an older transformers")
def test_lists_are_in_step_with_the_code(lists: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "open_questions_here", lambda _: [])
    result = CliRunner().invoke(lists.app, ["--check"])
    assert result.exit_code == 0, result.output


@reads_toml
def test_lists_are_in_step_until_anything_changes(
    lists: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "open_questions_here", lambda _: [])
    readme, page = tmp_path / "README.md", tmp_path / "families.md"
    readme.write_text("before\n<!-- families: begin -->\nold\n<!-- families: end -->\nafter\n", encoding="utf-8")
    page.write_text("<!-- other classes: begin --><!-- other classes: end -->\n", encoding="utf-8")
    where = ["--readme", str(readme), "--page", str(page)]

    def run(*arguments: str) -> int:
        return CliRunner().invoke(lists.app, [*arguments, *where]).exit_code

    assert run("--check") == 1
    assert "old" in readme.read_text(encoding="utf-8")
    assert run() == 0
    assert run("--check") == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    readme.write_text(text.replace("learned absolute", "learnt absolute"), encoding="utf-8")
    assert run("--check") == 1
    assert run() == 0
    written = page.read_text(encoding="utf-8")
    assert "| `Yoso` |" in written
    assert "`Llama`, " in written
    page.write_text(written.replace("`Llama`, ", ""), encoding="utf-8")
    assert run("--check") == 1
    page.write_text("no markers", encoding="utf-8")
    assert run() == 1
    page.write_text(written, encoding="utf-8")
    assert run("--check") == 0
    monkeypatch.setattr(lists, "open_questions_here", lambda _: ["NewForSequenceClassification is new"])
    assert run("--check") == 1


def test_a_table_has_every_family_and_every_class(lists: ModuleType) -> None:
    tables = lists.tables()
    rows, heads = ([line.split(" | ") for line in table.splitlines()[2:]] for table in tables.split("\n\n"))
    assert [name for row in rows for name in row[1].split(", ")] == [f"`{family.model_type}`" for family in FAMILIES]
    assert rows[0][2].startswith("learned absolute positions")
    assert rows[0][3] == "texts, choices, next sentences, masks, tokens, questions, states |"
    assert rows[1][0] == "| RoBERTa, XLM-RoBERTa, CamemBERT and data2vec"
    words = {word.strip("| ") for row in rows for word in row[3].split(", ")}
    assert words == {row[0].removeprefix("| ") for row in heads}


def test_a_family_without_a_file_or_a_word_is_told(lists: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="bert must be FAMILY or in FAMILIES of one file, and is of none"):
        lists.tables([replace(bert.FAMILY)])
    monkeypatch.setattr(bert, "FAMILY", replace(bert.FAMILY, heads={"BertForNothing": bert.FAMILY.heads["BertModel"]}))
    with pytest.raises(ValueError, match="must have a word for Nothing, the head of BertForNothing"):
        lists.tables([bert.FAMILY])
    monkeypatch.setattr(bert, "__doc__", "BERT as it is.\n\nAnd: more.")
    with pytest.raises(ValueError, match=r"fastcls.families.bert must begin with .*, not 'BERT as it is.'"):
        lists.tables([bert.FAMILY])


def test_classes_are_read_from_modeling_files(lists: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "modeling_a.py").write_text(
        "class AForSequenceClassification(APreTrainedModel):\n    pass\n\n\n"
        "class A2ForSequenceClassification(\n    APreTrainedModel,\n): ...\n\n\n"
        "class AForTokenClassification(APreTrainedModel): ...\n"
        "# class BForSequenceClassification(BPreTrainedModel)\n"
        "class AForSequenceClassificationOutput: ...\n"
    )
    (tmp_path / "a" / "b" / "modeling_auto.py").write_text("class AutoModelForSequenceClassification(_Auto): ...\n")
    (tmp_path / "a" / "modular_a.py").write_text("class CForSequenceClassification(CPreTrainedModel): ...\n")
    assert lists.classes_in(tmp_path) == {"A", "A2"}


def test_what_the_list_must_be_told_depends_on_the_release(lists: ModuleType) -> None:
    reasons = lists.Reasons("5.24.0", [lists.Group("Others", "No reason.", ["Old", "Newer"], {"Bert": "taken"})])

    def questions(defined: set[str], version: str) -> list[str]:
        return [question.split(":")[0] for question in lists.open_questions(defined, {"Bert"}, reasons, version)]

    new = "NewForSequenceClassification is new in transformers"
    taken = "BertForSequenceClassification is a family's now"
    gone = "OldForSequenceClassification is no longer in transformers"
    assert questions({"Old", "Newer", "Bert"}, "5.24.0") == [taken]
    assert questions({"Old", "Bert"}, "5.8.0") == [taken]
    assert questions({"Newer", "Bert", "New"}, "5.25.0.dev0") == [new, taken, gone]
    (told, *_) = lists.open_questions({"Old", "New"}, {"Bert"}, reasons, "5.8.0")
    assert "put the reason why fastcls does not take it into docs/families.toml, and run docs/families.py" in told


@reads_toml
def test_a_class_with_two_reasons_is_told(lists: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "families.toml"
    group = '[[group]]\ntitle = "{}"\nreason = "r"\nclasses = ["A"]\n[group.besides]\nB{} = "b"\n'
    path.write_text('transformers = "5.24.0"\n' + group.format("one", 1))
    assert lists.read_reasons(path).classes == ["A", "B1"]
    path.write_text('transformers = "5.24.0"\n' + group.format("one", 1) + group.format("two", 2))
    with pytest.raises(ValueError, match=r"families\.toml has twice: A"):
        lists.read_reasons(path)
