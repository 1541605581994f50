"""The documentation's examples, run as they stand, page by page; and that what it shows is all there is."""

from __future__ import annotations

import ast
import doctest
import functools
import importlib.util
import re
import shlex
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
import torch
from support import has_compiler, tiny_model
from typer.testing import CliRunner

import fastcls
import fastcls_kernels
from fastcls.tools.cli import app
from fastcls.tools.demo import sample_texts, sample_tokenizer

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
}
# Documents without examples in Python, of which the documentation shows the text.
SHOWN = ("CONTRIBUTING.md", "kernels/README.md", "benchmarks/README.md", "CHANGELOG.md")

# Examples that need a network, minutes or other programs. Each stands in a fence of the class .not-run.
NOT_RUN = {
    "docs/files.md": 1,
    "docs/scale.md": 5,
    "docs/serving.md": 9,
    "docs/quick-start.md": 2,
    "docs/migration.md": 2,
    "docs/onnxruntime.md": 1,
}


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        language: its first word, or its first class.
        runs: whether it is to be run here.
        code: what is between the fences.
        line: the number of its first line in the page.
    """

    language: str
    runs: bool
    code: str
    line: int


def blocks_of(text: str) -> list[Block]:
    found = []
    for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        classes = re.findall(r"\.([\w-]+)", match[1]) if "{" in match[1] else match[1].split()[:1]
        line = text.count("\n", 0, match.start(2)) + 1
        found.append(Block((classes or [""])[0], "not-run" not in classes, match[2], line))
    return found


def needed(text: str) -> set[str]:
    """The libraries that a page's examples import."""
    found: set[str] = set()
    for block in blocks_of(text):
        if block.language == "python" and block.runs:
            for node in ast.walk(ast.parse(block.code)):
                if isinstance(node, ast.Import):
                    found.update(alias.name.split(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module:
                    found.add(node.module.split(".")[0])
                    if any(alias.name == "Trainer" for alias in node.names):
                        # transformers' own extra.
                        found.add("accelerate")
    return found


def is_installed(library: str) -> bool:
    # Of the folder kernels/ python would make a package without an __init__.py, and so without an origin.
    spec = importlib.util.find_spec(library)
    return spec is not None and spec.origin is not None


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny checkpoints under the names that stand for the reader's own."""
    folder = tmp_path_factory.mktemp("stand-ins")
    tokenizer = sample_tokenizer(sample_texts())
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    for name, model_class, options in (
        ("bert-classifier", "BertForSequenceClassification", {"num_labels": 2}),
        ("reranker", "BertForSequenceClassification", {"num_labels": 1}),
        ("token-classifier", "BertForTokenClassification", {}),
        ("mask-filler", "BertForMaskedLM", {}),
        ("encoder", "BertModel", {}),
    ):
        tiny_model(model_class, "bert", vocab_size=len(tokenizer), **options).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def desk(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The reader's working directory."""
    (tmp_path / "your").symlink_to(stand_ins)
    (tmp_path / "kernels").symlink_to(ROOT / "kernels")
    for name in ("texts.txt", "a_million_lines.txt"):
        (tmp_path / name).write_text("\n".join(sample_texts()[:12]) + "\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": sample_texts()[:12]}), tmp_path / "reviews.parquet")
    monkeypatch.chdir(tmp_path)
    if not has_compiler():
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    yield tmp_path
    # What a page compiled is no other test's.
    torch._dynamo.reset()


def run_python(page: str, block: Block, names: dict[str, Any]) -> None:
    """Runs a block; what ``print(...)  # so`` prints must be what the comment says, with ... for anything."""
    comments = {
        block.line + number: found[1]
        for number, line in enumerate(block.code.splitlines())
        if (found := re.match(r"\s*print\(.*\)  # (.*)$", line))
    }
    seen = set()

    def checked_print(*values: object) -> None:
        line = sys._getframe(1).f_lineno
        told, expected = " ".join(map(str, values)), comments.get(line)
        if expected is not None:
            fits = doctest.OutputChecker().check_output(f"{expected}\n", f"{told}\n", doctest.ELLIPSIS)
            assert fits, f"{page}:{line} says {expected}, and prints {told}"
            seen.add(line)

    names["print"] = checked_print
    # Line numbers in a traceback are the page's.
    exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), names)
    assert seen == set(comments), f"{page}: not printed at lines {sorted(set(comments) - seen)}"


def run_shell(page: str, block: Block) -> None:
    """Runs each command of a block: ours in this process, which has imported what takes long."""
    for command in block.code.splitlines():
        program, *arguments = shlex.split(command)
        target = arguments.pop() if ">" in arguments else None
        arguments = [argument for argument in arguments if argument != ">"]
        if program == "fastcls":
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 0, f"{page}: {command}\n{done.output}"
            output = done.stdout
        else:
            assert program == "python", f"{page}: {command}"
            output = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout
        if target is not None:
            Path(target).write_text(output, encoding="utf-8")


def installs(block: Block) -> bool:
    return block.language == "sh" and block.code.startswith("pip install")


# The other pages' are the full run's.
FIRST_PAGES = ("README.md", "docs/quick-start.md")
RUN_PAGES = [page for page, text in PAGES.items() if any(block.runs for block in blocks_of(text))]


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[] if page in FIRST_PAGES else [pytest.mark.full]) for page in RUN_PAGES]
)
def test_examples_run(page: str, desk: Path) -> None:
    for library in sorted(needed(PAGES[page])):
        if not is_installed(library):
            pytest.skip(f"needs {library}, which is not installed")
    names: dict[str, Any] = {"__name__": page}
    for block in blocks_of(PAGES[page]):
        if block.language == "python" and block.runs:
            run_python(page, block, names)
        elif block.language == "sh" and block.runs and not installs(block):
            run_shell(page, block)
    if page == "README.md":
        assert str(getattr(names["out"], "shape", None)) == "torch.Size([30, 12, 64])"
        assert str(getattr(names["vectors"], "shape", None)) == "(2, 64)"
    if "labels.jsonl" in PAGES[page]:
        assert len((desk / "labels.jsonl").read_text(encoding="utf-8").splitlines()) == 12


@pytest.fixture(scope="module")
def server(stand_ins: Path) -> Iterator[str]:
    """Where the models answer of which the page about serving speaks."""
    for library in ("uvicorn", "httptools", "orjson", "prometheus_client"):
        pytest.importorskip(library, reason="a server needs the extra serve")
    import uvicorn

    from fastcls.serving.app import create_app
    from fastcls.serving.loaded import load
    from fastcls.serving.options import LoadOptions, ServeOptions
    from fastcls.serving.run import bound

    poolings: dict[str, Any] = {"bert-classifier": None, "reranker": None, "encoder": "mean"}
    models = [
        load(str(stand_ins / name), name, LoadOptions(device="cpu", pooling=pooling))
        for name, pooling in poolings.items()
    ]
    with bound("127.0.0.1", 0) as at:
        running = uvicorn.Server(uvicorn.Config(create_app(lambda: models, ServeOptions()), log_config=None))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [at]})
        thread.start()
        while not running.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{at.getsockname()[1]}"
        running.should_exit = True
        thread.join(60)


# They stand in .not-run, because they need a server.
@pytest.mark.parametrize(
    "block",
    [block for block in blocks_of(PAGES["docs/serving.md"]) if block.language == "python"],
    ids=lambda block: re.split(r"[ .]", block.code)[1],
)
def test_clients_of_a_server_get_answers(block: Block, server: str) -> None:
    for library in re.findall(r"^(?:from|import) ([\w.]+)", block.code, flags=re.MULTILINE):
        pytest.importorskip(library, reason=f"needs {library}, which is not installed")
    assert "http://localhost:3000" in block.code
    code = block.code.replace("http://localhost:3000", server)
    run_python("docs/serving.md", block._replace(code=code), {"__name__": "docs/serving.md"})


def test_probes_ask_for_what_a_server_has(server: str) -> None:
    (probes,) = [block.code for block in blocks_of(PAGES["docs/serving.md"]) if block.language == "yaml"]
    paths = re.findall(r"httpGet: {path: (\S+), port: 3000}", probes)
    assert len(paths) == probes.count("httpGet") == 3
    for path in paths:
        with urllib.request.urlopen(server + path) as answer:
            assert answer.status == 200


def test_no_example_is_left_out_unseen() -> None:
    for page, text in PAGES.items():
        blocks = blocks_of(text)
        assert text.count("```") == 2 * len(blocks), f"{page}: a fence that is no block"
        assert {block.language for block in blocks} <= {"python", "sh", "yaml"}, page
        assert sum(not block.runs for block in blocks) == NOT_RUN.get(page, 0), page
    for document in SHOWN:
        assert {block.language for block in blocks_of((ROOT / document).read_text(encoding="utf-8"))} <= {"sh"}


def test_commands_that_install_are_run_by_ci() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    commands = [block.code.strip() for block in blocks_of(PAGES["README.md"]) if installs(block)]
    assert len(commands) == 3
    for command in commands:
        assert f"readme_command '{command}'" in ci
    assert not any(
        installs(block) and block.runs for page in PAGES if page != "README.md" for block in blocks_of(PAGES[page])
    )


def test_links_lead_somewhere() -> None:
    # mkdocs looks after those of the documentation itself.
    for document in ("README.md", *SHOWN):
        folder = (ROOT / document).parent
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / document).read_text(encoding="utf-8")):
            assert (folder / target).exists(), f"{document} links to {target}"


@pytest.mark.parametrize("package", [fastcls, fastcls_kernels], ids=lambda package: package.__name__)
def test_reference_has_every_public_name(package: Any) -> None:
    page = PAGES[f"docs/reference/{package.__name__.removeprefix('fastcls_')}.md"]
    listed = re.findall(rf"^::: {package.__name__}\.(\w+)$", page, flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(package.__all__) <= set(listed), "public, and not in the reference"


def test_picture_counts_as_the_derivation_does() -> None:
    picture = (DOCS / "last-layer.svg").read_text(encoding="utf-8")
    derivation = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    d, heads, n = 768, 12, 128
    for name, count in (
        ("full", 12 * d**2 + 2 * n * d),
        ("selected", 2 * d**2 + 2 * d),
        ("absorbed", 2 * heads * d),
    ):
        assert f"{count:,} for d = {d}, {heads} heads, n = {n}" in picture, name
        assert re.search(rf"^\| `{name}`.*\| {count:,} \|$", derivation, flags=re.MULTILINE), name


class TestIncluding:
    """What pages take from other files."""

    @pytest.fixture
    def hooks(self) -> Any:
        pytest.importorskip("mkdocs", reason='pip install -e ".[docs]"')
        spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def test_a_section_ends_where_the_next_begins_and_comments_in_code_are_no_headings(
        self, hooks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        section = "One.\n\n```sh\n# A comment.\npytest\n```\n\n### Below\n\nTwo."
        (tmp_path / "FILE.md").write_text(f"# Title\n\nZero.\n\n## A\n\n{section}\n\n## B\n\nThree.\n")
        monkeypatch.setattr(hooks, "ROOT", tmp_path)
        assert hooks.included("FILE.md", "A", "page.md") == section
        assert hooks.included("FILE.md", "B", "page.md") == "Three."
        assert hooks.included("FILE.md", None, "page.md") == f"Zero.\n\n## A\n\n{section}\n\n## B\n\nThree."

    def test_links_lead_to_pages(self, hooks: Any) -> None:
        assert "[kernels/README.md](derivation.md)" in hooks.included("README.md", "Three ways to use it", "index.md")
        assert "[these families](../families.md)" in hooks.included("README.md", "Three ways to use it", "a/b.md")
        assert hooks._relinked("docs/quick-start.md#install", "README.md", "a/b.md") == "../quick-start.md#install"

    @pytest.mark.parametrize(
        ("name", "heading", "told"),
        [
            ("NOWHERE.md", None, "x.md includes NOWHERE.md, and there is no such file"),
            ("README.md", "Nothing of the kind", "x.md includes Nothing of the kind of README.md, which has 0 such"),
        ],
        ids=["file", "heading"],
    )
    def test_what_is_not_there_is_told(self, hooks: Any, name: str, heading: str | None, told: str) -> None:
        with pytest.raises(Exception, match=re.escape(told)):
            hooks.included(name, heading, "x.md")
