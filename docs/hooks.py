"""What the documentation takes from other files of the repository, so that nothing is said twice.

A line ``<!-- include FILE -->`` of a page stands for that file without its title, ``<!-- include FILE: HEADING -->``
for what is under that heading. Links lead to where their targets are in the documentation. A line ``<!-- commands -->``
stands for what the command line says of itself.
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = re.compile(r"^<!-- include (\S+?)(?:: (.+))? -->$", re.MULTILINE)
COMMANDS = "<!-- commands -->"
LINK = re.compile(r"(?<=\]\()[^)\s]+(?=\))")

# Where what the repository's files link to is said in the documentation.
PAGES = {
    "README.md": "index.md",
    "README.md#families-and-heads": "families.md",
    "README.md#on-a-cpu": "performance.md#on-a-cpu",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "kernels/README.md": "derivation.md",
    "kernels/README.md#the-cpu": "kernels.md#the-cpu",
}
# What is shown or linked to as it is, under the same path.
SHOWN = ("benchmarks/results/*/*.png", "examples/*.py", "examples/Dockerfile")


def on_files(files: Files, config: Any) -> None:
    """Adds the repository's pictures and examples to the site."""
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts included texts in their places."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, _commands())
    return INCLUDE.sub(lambda found: included(found[1], found[2], page.file.src_uri), markdown)


def included(name: str, heading: str | None, page: str) -> str:
    """A file of the repository, or what is under one of its headings, as a page takes it.

    Args:
        name: the file's path in the repository.
        heading: the heading's text; None is all of the file but its title.
        page: the page's path in ``docs/``.

    Raises:
        PluginError: there is no such file, or not one such heading in it.
    """
    path = ROOT / name
    if not path.is_file():
        raise PluginError(f"{page} includes {name}, and there is no such file")
    lines = path.read_text(encoding="utf-8").splitlines()
    headings = list(_headings(lines))
    wanted = [i for i, (_, level, text) in enumerate(headings) if text == heading or (heading is None and level == 1)]
    if len(wanted) != 1:
        raise PluginError(f"{page} includes {heading or 'all'} of {name}, which has {len(wanted)} such headings")
    start, level, _ = headings[wanted[0]]
    end = next((line for line, other, _ in headings[wanted[0] + 1 :] if other <= level), len(lines))
    text = "\n".join(lines[start + 1 : end]).strip()
    return LINK.sub(lambda found: _relinked(found[0], name, page), text)


def _headings(lines: list[str]) -> Iterator[tuple[int, int, str]]:
    in_code = False
    for number, line in enumerate(lines):
        in_code ^= line.lstrip().startswith("```")
        found = re.match(r"(#+) (.*)", line)
        if found and not in_code:
            yield number, len(found[1]), found[2].strip()


def _relinked(target: str, name: str, page: str) -> str:
    if re.match(r"[a-z]+:", target):
        return target
    place = name + target if target[0] == "#" else posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    place = PAGES.get(place, place).removeprefix("docs/")
    return posixpath.relpath(place, posixpath.dirname(page) or ".")


def _commands() -> str:
    """Every command with its options, as Markdown."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-m", "typer", "fastcls.tools.cli", "utils", "docs", "--name", "fastcls"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise PluginError(f"the commands cannot be listed: {done.stderr}")
    return done.stdout.split("\n", 1)[1]
