"""What may be imported where: the kernels with torch alone, nothing that asks for a device, no folder in the way."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastcls.tools.serve import LIBRARIES as SERVER_LIBRARIES

ROOT = Path(__file__).parents[1]

BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def run(code: str, cwd: Path = ROOT, **env: str) -> str:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "0", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.full
def test_kernels_need_torch_alone() -> None:
    code = BLOCK.format(blocked=("triton", "transformers", "fastcls")) + (
        "import torch, fastcls_kernels as fk\n"
        "q = torch.randn(5, 2, 16)\n"
        "cu = torch.tensor([0, 2, 5], dtype=torch.int32)\n"
        "print(fk.HAS_TRITON, tuple(fk.attention_varlen(q, q, q, cu, 3).shape))"
    )
    assert run(code) == "False (5, 2, 16)"


def test_triton_backend_without_triton_says_so() -> None:
    code = BLOCK.format(blocked=("triton",)) + (
        "import fastcls_kernels as fk\n"
        "try:\n    fk.use_backend('triton').__enter__()\nexcept RuntimeError as error:\n    print(error)"
    )
    assert "triton missing" in run(code)


@pytest.mark.parametrize(
    "module",
    [
        "fastcls_kernels",
        pytest.param("fastcls, fastcls.models.base, fastcls.classifier, fastcls.tools.cli", marks=pytest.mark.full),
    ],
)
def test_import_asks_for_no_device(module: str) -> None:
    code = (
        "import torch\n"
        "def fail(*args, **kwargs): raise AssertionError('a device was asked for at import')\n"
        "for name in ('is_available', 'device_count', 'current_device', 'get_device_capability', "
        "'get_device_properties', '_lazy_init'): setattr(torch.cuda, name, fail)\n"
        f"import {module}\nprint('imported')"
    )
    assert run(code) == "imported"


def test_import_fastcls_leaves_transformers_for_later() -> None:
    assert run("import sys, fastcls; print('transformers' in sys.modules, 'torch' in sys.modules)") == "False False"


def test_kernels_folder_is_no_package() -> None:
    # Importable, it would stand in for the Hugging Face library `kernels`, which transformers looks for.
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.full
@pytest.mark.parametrize(
    "with_library",
    [pytest.param(False, id="without_kernels_library", marks=pytest.mark.full), pytest.param(True, id="with_one")],
)
def test_transformers_imports_at_the_root(tmp_path: Path, with_library: bool) -> None:
    if with_library:
        # The library's names that transformers asks for, enough to see which `kernels` wins.
        library = tmp_path / "kernels"
        library.mkdir()
        names = "Device, LayerRepository, FuncRepository, LocalLayerRepository, LocalFuncRepository, Mode"
        (library / "__init__.py").write_text(
            "from unittest.mock import MagicMock\n"
            f"{names.replace(', ', ' = ')} = MagicMock()\n"
            "get_kernel = register_kernel_mapping = replace_kernel_forward_from_hub = MagicMock()\n"
            "use_kernel_forward_from_hub = use_kernel_func_from_hub = lambda name: (lambda cls: cls)\n"
            "kernelize = lambda model, **options: model\n"
        )
        meta = tmp_path / "kernels-0.17.2.dist-info"
        meta.mkdir()
        (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")
    paths = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    code = "import sys; sys.path.insert(0, ''); from transformers import BertModel; print(BertModel.__name__)"
    assert run(code, PYTHONPATH=paths) == "BertModel"


@pytest.mark.full
def test_tools_can_import_all_that_they_find_in_the_packages() -> None:
    # The modules of the server are there for those who have its extra.
    without = [] if all(map(importlib.util.find_spec, SERVER_LIBRARIES)) else ["fastcls.serving."]
    code = (
        "import importlib, pkgutil, fastcls, fastcls_kernels\n"
        "found = [each.name for package in (fastcls, fastcls_kernels)\n"
        "    for each in pkgutil.walk_packages(package.__path__, package.__name__ + '.')]\n"
        f"left_out = ('__main__', *{without})\n"
        "[importlib.import_module(name) for name in found if not any(each in name for each in left_out)]\n"
        "print(len(found) > 100)"
    )
    assert run(code) == "True"
