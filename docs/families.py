"""Writes the lists of what fastcls takes and does not take, so that neither can drift from the code.

python docs/families.py
python docs/families.py --check

README.md's tables of families and heads come from `fastcls.families`: what people know a family by and what is special
in it are the first line of its file. The list of transformers' other classes in docs/families.md comes from
docs/families.toml, which gives the reason for each.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, NamedTuple

import transformers
import typer
from packaging.version import Version

from fastcls import families
from fastcls.families import FAMILIES, Family, head_in

ROOT = Path(__file__).resolve().parent.parent
README, PAGE, REASONS = ROOT / "README.md", ROOT / "docs" / "families.md", ROOT / "docs" / "families.toml"
# The class that the list of others is about.
HEAD = "ForSequenceClassification"
# By what follows "For" in the names of a head's classes: our word for it, and the rows that it reads.
HEADS = {
    "SequenceClassification": ("texts", "the first token, or for a mean every one"),
    "MultipleChoice": ("choices", "the first token"),
    "NextSentencePrediction": ("next sentences", "the first token"),
    "MaskedLM": (
        "masks",
        "the masked tokens, with `optimize(model, mask_token_id=tokenizer.mask_token_id)`; or the tokens with labels",
    ),
    "TokenClassification": ("tokens", "every token, padded back at the end"),
    "QuestionAnswering": ("questions", "every token, padded back at the end"),
    "": ("states", "every token, or with `select=` the first, or those of a boolean mask"),
}


class Group(NamedTuple):
    """Classes that are not taken for one reason.

    Attributes:
        title: of the group.
        reason: for all of them.
        classes: those of which there is no more to say, by what their names begin with.
        besides: what there is to say of each of the others, by what its name begins with.
    """

    title: str
    reason: str
    classes: Sequence[str]
    besides: Mapping[str, str]


class Reasons(NamedTuple):
    """What docs/families.toml says.

    Attributes:
        version: the newest release of transformers whose classes are all there.
        groups: all classes that are not taken.
    """

    version: str
    groups: Sequence[Group]

    @property
    def classes(self) -> list[str]:
        """The classes of all groups, by what their names begin with."""
        return [name for group in self.groups for name in (*group.classes, *group.besides)]


def read_reasons(path: Path = REASONS) -> Reasons:
    """Reads docs/families.toml.

    Raises:
        ValueError: a class stands there twice.
        SystemExit: this Python is too old to read TOML.
    """
    if sys.version_info < (3, 11):
        raise SystemExit("docs/families.py needs Python 3.11 or newer, which reads TOML")
    import tomllib

    found = tomllib.loads(path.read_text(encoding="utf-8"))
    groups = [
        Group(each["title"], each["reason"].strip(), each.get("classes", ()), each.get("besides", {}))
        for each in found["group"]
    ]
    reasons = Reasons(found["transformers"], groups)
    twice = sorted({name for name in reasons.classes if reasons.classes.count(name) > 1})
    if twice:
        raise ValueError(f"{path.name} has twice: {', '.join(twice)}")
    return reasons


def classes_in(folder: Path) -> set[str]:
    """What the names of all classes ...ForSequenceClassification begin with that a folder's modeling files define."""
    pattern = re.compile(rf"^class (\w+){HEAD}\b", re.MULTILINE)
    found: set[str] = set()
    for path in folder.rglob("modeling_*.py"):
        found.update(pattern.findall(path.read_text(encoding="utf-8")))
    # Those of the Auto classes are no models.
    return {name for name in found if not name.startswith("AutoModel")}


def classes_taken(taken: Iterable[Family]) -> set[str]:
    """What the names of the families' classes ...ForSequenceClassification begin with."""
    return {name.removesuffix(HEAD) for family in taken for name in family.heads if name.endswith(HEAD)}


def open_questions(defined: set[str], taken: set[str], reasons: Reasons, version: str) -> list[str]:
    """What docs/families.toml must still be told, one line each.

    Args:
        defined: the classes that transformers has.
        taken: the classes that fastcls takes.
        reasons: what docs/families.toml says.
        version: transformers'. One older than the reasons lacks classes, and fastcls takes none of these.
    """
    listed = set(reasons.classes)
    found = [
        f"{name}{HEAD} is new in transformers: add a family (CONTRIBUTING.md), or read its source, put the reason why "
        "fastcls does not take it into docs/families.toml, and run docs/families.py"
        for name in sorted(defined - taken - listed)
    ]
    found += [
        f"{name}{HEAD} is a family's now: remove its line from docs/families.toml, and run docs/families.py"
        for name in sorted(listed & taken)
    ]
    if Version(version) >= Version(reasons.version):
        found += [
            f"{name}{HEAD} is no longer in transformers: remove its line from docs/families.toml, and run "
            "docs/families.py"
            for name in sorted(listed - defined)
        ]
    return found


def open_questions_here(reasons: Reasons) -> list[str]:
    """`open_questions` of the installed transformers."""
    folder = Path(transformers.__file__).parent / "models"
    return open_questions(classes_in(folder), classes_taken(FAMILIES), reasons, transformers.__version__)


def described(module: ModuleType) -> tuple[str, str]:
    """A family's names and what is special in it, from the first line of its file: "Names (source): what is special."

    Raises:
        ValueError: the line has another form.
    """
    first = (module.__doc__ or "").partition("\n")[0]
    names, _, special = first.partition(": ")
    if not special.endswith("."):
        raise ValueError(f'{module.__name__} must begin with """Names (source): what is special.""", not {first!r}')
    return re.sub(r" \(.*?\)", "", names), special.removesuffix(".")


def families_by_file(taken: Sequence[Family]) -> dict[str, list[Family]]:
    """The families of each file in fastcls/families, by its module's name, in the order of ``taken``.

    Raises:
        ValueError: a family stands in no file, or in several.
    """
    home: dict[int, list[str]] = {}
    for info in pkgutil.iter_modules(families.__path__, f"{families.__name__}."):
        module = importlib.import_module(info.name)
        for family in getattr(module, "FAMILIES", None) or filter(None, [getattr(module, "FAMILY", None)]):
            home.setdefault(id(family), []).append(info.name)
    found: dict[str, list[Family]] = {}
    for family in taken:
        files = home.get(id(family), [])
        if len(files) != 1:
            raise ValueError(
                f"{family.model_type} must be FAMILY or in FAMILIES of one file, and is of {' '.join(files) or 'none'}"
            )
        found.setdefault(files[0], []).append(family)
    return found


def _head_of(model_class: str) -> str:
    head = head_in(model_class)
    if head not in HEADS:
        raise ValueError(f"HEADS of docs/families.py must have a word for {head}, the head of {model_class}")
    return head


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _table_of_families(taken: Sequence[Family]) -> str:
    rows = []
    for name, members in families_by_file(taken).items():
        names, special = described(importlib.import_module(name))
        found = {_head_of(model_class) for family in members for model_class in family.heads}
        rows.append(
            [
                names,
                ", ".join(f"`{family.model_type}`" for family in members),
                special,
                ", ".join(word for head, (word, _) in HEADS.items() if head in found),
            ]
        )
    return _table(["family", "`model_type`", "what is special", "heads"], rows)


def _table_of_heads(taken: Sequence[Family]) -> str:
    rows = []
    for head, (word, computed) in HEADS.items():
        classes = [name for family in taken for name in family.heads if _head_of(name) == head]
        pattern = classes[0] if len(classes) == 1 else f"...For{head}" if head else "AutoModel"
        rows.append([word, f"`{pattern}`", computed])
    return _table(["head", "transformers class", "what the last layer computes"], rows)


def tables(taken: Sequence[Family] = FAMILIES) -> str:
    """README.md's tables: the families, a row for each file, and the heads."""
    return f"{_table_of_families(taken)}\n\n{_table_of_heads(taken)}"


def list_of_others(reasons: Reasons) -> str:
    """The list of docs/families.md: the classes that are not taken, by reason."""
    parts = [
        f"{len(reasons.classes)} of the classes `...{HEAD}` in transformers {reasons.version} are of no family. "
        "They stand here without this end of their names."
    ]
    for group in reasons.groups:
        parts.append(f"### {group.title}\n\n{group.reason}")
        if group.classes:
            parts.append(f"{', '.join(f'`{name}`' for name in group.classes)}.")
        if group.besides:
            rows = ([f"`{name}`", said] for name, said in group.besides.items())
            parts.append(_table(["class", "what it has"], rows))
    return "\n\n".join(parts)


def with_section(text: str, name: str, section: str) -> str:
    """``text`` with ``section`` between its markers of a name.

    Raises:
        ValueError: there is not one pair of markers.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ValueError(f"there must be one pair of markers, {begin} and {end}")
    return f"{text.partition(begin)[0]}{begin}\n{section}\n{end}{text.partition(end)[2]}"


app = typer.Typer(add_completion=False)


@app.command()
def main(
    check: Annotated[bool, typer.Option("--check", help="Only exit 1 if a list is out of step.")] = False,
    readme: Annotated[Path, typer.Option(help="The file with the markers of the families.")] = README,
    page: Annotated[Path, typer.Option(help="The file with the markers of the other classes.")] = PAGE,
) -> None:
    """Writes the lists of families and of transformers' other classes."""
    try:
        reasons = read_reasons()
        for path, name, section in (
            (readme, "families", tables()),
            (page, "other classes", list_of_others(reasons)),
        ):
            text = path.read_text(encoding="utf-8")
            written = with_section(text, name, section)
            if written != text:
                if check:
                    raise ValueError(f"{path} is out of step with the code: run docs/families.py")
                path.write_text(written, encoding="utf-8")
        if questions := open_questions_here(reasons):
            raise ValueError("\n".join(questions))
    except (OSError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
