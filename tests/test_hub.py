"""The layout for the Hugging Face kernel hub: its rules, and what its own library makes of it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import assemble_hub
import pytest
import typer
from assemble_hub import PACKAGE, assemble, broken_rules
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]


def has_kernels_library() -> bool:
    # The folder kernels/ of this checkout is importable by that name, too, but has no __init__.py: no origin.
    spec = importlib.util.find_spec("kernels")
    return spec is not None and spec.origin is not None


needs_kernels = pytest.mark.skipif(not has_kernels_library(), reason="needs the library kernels: pip install kernels")


def run(code: str, *arguments: Path) -> str:
    """Runs ``code`` in a fresh process at the root, where the folder ``kernels`` is in sight."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_kernels
def test_loads_and_computes_beside_the_installed_package(tmp_path: Path) -> None:
    assemble(tmp_path)
    code = """
import importlib
import sys
from pathlib import Path

import torch
from kernels import get_loaded_kernels, get_local_kernel

hub = get_local_kernel(Path(sys.argv[1]), backend="cpu")
assert "fastcls_kernels" not in sys.modules, "it imports itself by name"
import fastcls_kernels
from fastcls_kernels.reference import attention_varlen_reference

q, k, v = torch.randn(60, 3, 4, 32).unbind(1)
cu_seqlens = torch.tensor([0, 17, 17, 60], dtype=torch.int32)
wanted = attention_varlen_reference(q, k, v, cu_seqlens, 43)
for package in (hub, fastcls_kernels):
    torch.testing.assert_close(package.attention_varlen(q, k, v, cu_seqlens, max_seqlen=43), wanted)


def operators(namespace):
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix(namespace) for name in names if name.startswith(f"{namespace}::"))


metadata = get_loaded_kernels()[0].metadata
assert hub.__name__ == metadata.id == importlib.import_module(f"{metadata.id}._ops").NAMESPACE
assert operators(metadata.id) == operators("fastcls_kernels")

# What the hub asks for besides, for older versions of the library: the same names one folder further down.
spec = importlib.util.spec_from_file_location("older", Path(hub.__file__).parent / "fastcls_kernels" / "__init__.py")
older = importlib.util.module_from_spec(spec)
spec.loader.exec_module(older)
assert older.attention_varlen is hub.attention_varlen
print(metadata.name, metadata.version, hub.attention_varlen is not fastcls_kernels.attention_varlen)
"""
    assert run(code, tmp_path) == "fastcls-kernels 0 True\n"


@needs_kernels
def test_library_accepts_what_is_written_for_every_backend(tmp_path: Path) -> None:
    variants = assemble(tmp_path, version=3, repo_id="someone/fastcls-kernels")
    code = """
import sys
from pathlib import Path

from kernels import Metadata
from kernels._rust import Build, Digest

print(*(str(backend) for backend in Build.open(sys.argv[1]).general.backends))
for variant in map(Path, sys.argv[2:]):
    metadata = Metadata.read_from_file(variant / "metadata.json")
    metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))
    print(variant.name, metadata.version, metadata.license, metadata.id.rpartition("_")[0], *metadata.python_depends)
"""
    assert run(code, tmp_path, *variants).splitlines() == [
        "cpu cuda rocm",
        "torch-cpu 3 Apache-2.0 _fastcls_kernels_cpu",
        "torch-cuda 3 Apache-2.0 _fastcls_kernels_cuda",
        "torch-rocm 3 Apache-2.0 _fastcls_kernels_rocm",
    ]


def test_everything_the_package_needs_travels(tmp_path: Path) -> None:
    for variant in assemble(tmp_path):
        shipped = {path.relative_to(variant) for path in variant.rglob("*") if path.is_file()}
        # The hub's package is not built: a CPU runs PyTorch's operators there.
        compiled = (".c", ".h", ".so", ".pyc")
        wanted = {
            path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in compiled
        }
        assert shipped - wanted == {Path("metadata.json"), Path("fastcls_kernels/__init__.py")}
        assert wanted <= shipped


def test_another_version_gets_another_namespace(tmp_path: Path) -> None:
    package = tmp_path / "fastcls_kernels"
    shutil.copytree(PACKAGE, package)
    namespaces = []
    for out in ("first", "again", "changed"):
        if out == "changed":
            with (package / "layout.py").open("a", encoding="utf-8") as file:
                file.write("# Another version.\n")
        [cpu, *_] = assemble(tmp_path / out, package=package)
        namespaces.append((cpu / "_ops.py").read_text(encoding="utf-8"))
    assert namespaces[0] == namespaces[1] != namespaces[2]


def test_package_keeps_the_rules_of_the_hub() -> None:
    assert broken_rules(PACKAGE) == []


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("import numpy as np", "imports numpy; only torch, triton and the standard library may be imported"),
        ("from transformers.utils import logging", "imports transformers.utils; only torch"),
        ("import fastcls_kernels.linear", "imports itself by name: fastcls_kernels.linear"),
        ("from fastcls_kernels import linear", "imports itself by name"),
        ("from .. import fastcls", "a relative import leaves the package: from .. import fastcls"),
        ("import importlib; importlib.import_module('einops')", "imports by name"),
        ("op = 'fastcls_kernels::linear'", "names its operators' namespace: 'fastcls_kernels::linear'"),
        ("op = torch.ops.fastcls_kernels.linear", "names its operators' namespace: torch.ops.fastcls_kernels"),
        ("def f():\n    import scipy.linalg", "imports scipy.linalg"),
    ],
    ids=[
        "numpy",
        "transformers",
        "itself",
        "from_itself",
        "upwards",
        "by_name",
        "namespace",
        "operator",
        "in_function",
    ],
)
def test_broken_rules_are_told_and_nothing_is_written(tmp_path: Path, line: str, told: str) -> None:
    package = tmp_path / "fastcls_kernels"
    shutil.copytree(PACKAGE, package)
    number = len((package / "gated_activation.py").read_text(encoding="utf-8").splitlines()) + 1 + line.count("\n")
    with (package / "gated_activation.py").open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match="the hub's rules are broken") as error:
        assemble(tmp_path / "hub", package=package)
    assert f"gated_activation.py:{number}: {told}" in str(error.value)
    assert not (tmp_path / "hub").exists()


def test_a_folder_of_the_package_may_import_from_the_package_and_no_higher(tmp_path: Path) -> None:
    package = tmp_path / "fastcls_kernels"
    shutil.copytree(PACKAGE, package)
    (package / "linear" / "more.py").write_text(
        "from ..runtime import checks\nfrom ... import fastcls\n", encoding="utf-8"
    )
    assert broken_rules(package) == ["linear/more.py:2: a relative import leaves the package: from ... import fastcls"]


def test_command_replaces_only_what_it_wrote(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(assemble_hub.main)

    def command(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["--out", str(tmp_path / "hub"), *arguments])
        return done.exit_code, " ".join(done.output.split())

    assert command("--repo-id", "nameless")[0] == 1
    assert command() == (
        0,
        " ".join(str(tmp_path / "hub" / "build" / f"torch-{name}") for name in ("cpu", "cuda", "rocm")),
    )
    stale = tmp_path / "hub" / "build" / "torch-cpu" / "stale.py"
    stale.touch()
    code, output = command()
    assert code == 1
    assert "must be new, empty or, with force=True (--force), an earlier one" in output
    assert command("--force")[0] == 0
    assert not stale.exists()

    (tmp_path / "hub" / "build.toml").unlink()
    assert command("--force")[0] == 1
    assert (tmp_path / "hub" / "README.md").exists()
