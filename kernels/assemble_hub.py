"""Lays `fastcls_kernels` out as a repository of the Hugging Face kernel hub, from which `kernels.get_kernel` loads it.

python kernels/assemble_hub.py --out hub

The hub wants the package once for each backend: `build/torch-cpu`, `build/torch-cuda`, `build/torch-rocm`. It loads
several versions of a kernel into one process, by paths outside of `sys.path`. So a package may import itself by
relative imports alone, may need nothing but torch, triton and the standard library, and its operators need a namespace
that no other version has. All this is checked before anything is written.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

PACKAGE = Path(__file__).resolve().parent / "fastcls_kernels"
LICENSE = PACKAGE.parents[1] / "LICENSE"
NAME = "fastcls-kernels"
BACKENDS = ("cpu", "cuda", "rocm")
ALLOWED = {"torch", "triton"}
# Of a package's folder these travel; what else lies there (bytecode, say) does not.
SUFFIXES = (".json", ".py", ".typed")


def broken_rules(package: Path) -> list[str]:
    """What the hub would refuse of a package, one line each: file, line number, what stands there and what may.

    Args:
        package: The package's folder.

    Returns:
        No lines if it keeps to the rules.
    """
    return [
        f"{path.relative_to(package)}:{line}: {what}"
        for path in sorted(package.rglob("*.py"))
        for line, what in _broken_rules(path, package)
    ]


def _broken_rules(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    depth = len(path.relative_to(package).parts)
    own = package.name
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield from _absolute(node.lineno, alias.name, own)
            case ast.ImportFrom(module=str(module), level=0):
                yield from _absolute(node.lineno, module, own)
            case ast.ImportFrom(level=level) if level > depth:
                yield node.lineno, f"a relative import leaves the package: {ast.unparse(node)}"
            case ast.Call(func=function) if ast.unparse(function).split(".")[-1] in ("import_module", "__import__"):
                yield node.lineno, f"imports by name, which nobody can check: {ast.unparse(node)}"
            case ast.Constant(value=str(text)) if re.match(rf"{own}(::|$)", text) and path.name != "_ops.py":
                yield node.lineno, f"names its operators' namespace: {text!r}; take it from _ops.py"
            case ast.Attribute(attr=attribute) if attribute == own:
                yield node.lineno, f"names its operators' namespace: {ast.unparse(node)}; take it from _ops.py"


def _absolute(line: int, module: str, own: str) -> Iterator[tuple[int, str]]:
    top = module.split(".")[0]
    if top == own:
        yield line, f"imports itself by name: {module}; relative imports only"
    elif top not in ALLOWED and top not in sys.stdlib_module_names:
        yield line, f"imports {module}; only {', '.join(sorted(ALLOWED))} and the standard library may be imported"


def assemble(
    out: Path, *, package: Path = PACKAGE, version: int = 0, repo_id: str = f"your-name/{NAME}", force: bool = False
) -> list[Path]:
    """Writes the repository: `build.toml`, `README.md`, `LICENSE`, and a variant in `build/` for each backend.

    Args:
        out: The folder to write; made if need be.
        package: The package's folder.
        version: The kernel's major version on the hub, where 0 is for what is still being made.
        repo_id: Where on the hub it is going to live.
        force: Whether to replace an earlier repository of this kernel.

    Returns:
        The variants' folders.

    Raises:
        ValueError: The package breaks the hub's rules, ``out`` has something in it that may not be replaced, or
            ``version`` or ``repo_id`` is none.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"repo_id must be owner/name, got {repo_id!r}")
    if version < 0:
        raise ValueError(f"version must be 0 or more, got {version}")
    broken = broken_rules(package)
    if broken:
        raise ValueError("the hub's rules are broken:\n" + "\n".join(broken))
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, and {out} is a file")
    if out.is_dir() and any(out.iterdir()):
        if not (force and _is_ours(out)):
            raise ValueError(f"out must be new, empty or, with force=True (--force), an earlier one; {out} is not")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    files = {
        path.relative_to(package).as_posix(): path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.suffix in SUFFIXES
    }
    unique = hashlib.sha256(json.dumps(_digests(files)).encode()).hexdigest()[:7]
    (out / "build.toml").write_text(_build_toml(version, repo_id), encoding="utf-8")
    (out / "README.md").write_text(_card(version, repo_id), encoding="utf-8")
    shutil.copyfile(LICENSE, out / "LICENSE")
    return [_write_variant(out / "build" / f"torch-{backend}", files, backend, unique, version) for backend in BACKENDS]


def _is_ours(folder: Path) -> bool:
    config = folder / "build.toml"
    return config.is_file() and f'name = "{NAME}"' in config.read_text(encoding="utf-8").splitlines()


def _write_variant(folder: Path, package: dict[str, bytes], backend: str, unique: str, version: int) -> Path:
    name = NAME.replace("-", "_")
    namespace = f"_{name}_{backend}_{unique}"
    files = {
        **package,
        "_ops.py": _with_namespace(package["_ops.py"].decode(), namespace).encode(),
        f"{name}/__init__.py": SHIM.format(namespace=namespace).encode(),
    }
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    metadata: dict[str, Any] = {
        "name": NAME,
        "id": namespace,
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": _digests(files)},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return folder


def _digests(files: dict[str, bytes]) -> dict[str, str]:
    return {
        path: base64.b64encode(hashlib.sha256(content).digest()).decode() for path, content in sorted(files.items())
    }


def _with_namespace(source: str, namespace: str) -> str:
    changed, count = re.subn(r'^NAMESPACE = ".*"$', f'NAMESPACE = "{namespace}"', source, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f'_ops.py must have one line NAMESPACE = "...", it has {count}')
    return changed


SHIM = '''"""For versions of the library `kernels` that look for the package here, and not one folder up."""

import importlib.util
import sys
from pathlib import Path

if "{namespace}" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("{namespace}", Path(__file__).parent.parent / "__init__.py")
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["{namespace}"] = _module
    _spec.loader.exec_module(_module)
globals().update(vars(sys.modules["{namespace}"]))
'''


def _build_toml(version: int, repo_id: str) -> str:
    return f"""[general]
name = "{NAME}"
version = {version}
edition = 5
license = "Apache-2.0"
backends = {json.dumps(BACKENDS)}

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
pyext = {json.dumps([suffix[1:] for suffix in SUFFIXES])}
"""


def _card(version: int, repo_id: str) -> str:
    return f"""---
library_name: kernels
license: apache-2.0
tags:
- kernel
- triton
---

# {NAME}

Kernels for encoders (BERT, ModernBERT, DeBERTa and their relatives) that compute only what their answer needs: packed
tokens without padding, and a last layer for the rows that are read, which makes neither keys nor values. Triton on a
GPU, plain PyTorch elsewhere, with the same interface.

```python
import torch
from kernels import get_kernel

fastcls_kernels = get_kernel("{repo_id}", version={version}, trust_remote_code=True)

q, k, v = torch.randn(30, 3, 12, 64).unbind(1)  # 30 tokens of two texts, 12 heads of 64
cu_seqlens = torch.tensor([0, 10, 30], dtype=torch.int32)
out = fastcls_kernels.attention_varlen(q, k, v, cu_seqlens, max_seqlen=20)  # (30, 12, 64)
```

`reference.py` defines each operation in plain PyTorch. Apache-2.0.
"""


def main(
    out: Annotated[Path, typer.Option(help="The folder to write; made if need be.")],
    version: Annotated[int, typer.Option(min=0, help="The kernel's major version on the hub; 0 is for drafts.")] = 0,
    repo_id: Annotated[str, typer.Option(help="Where on the hub it is going to live.")] = f"your-name/{NAME}",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier one.")] = False,
) -> None:
    """Lays fastcls_kernels out as a repository of the Hugging Face kernel hub, after checking the hub's rules."""
    try:
        variants = assemble(out, version=version, repo_id=repo_id, force=force)
    except (OSError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    for variant in variants:
        typer.echo(variant)


if __name__ == "__main__":
    typer.run(main)
