"""The README's examples, run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import tiny_bert

from fastcls.demo import sample_texts, sample_tokenizer

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = sample_tokenizer(sample_texts())
    tiny_bert(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    (tmp_path / "a_million_lines.txt").write_text("\n".join(sample_texts()), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    assert len(BLOCKS) == 3
    for block in BLOCKS:
        # The one name that stands for the reader's own model.
        exec(block.replace("your/bert-classifier", str(tmp_path / "classifier")), names)
    assert str(getattr(names["out"], "shape", None)) == "torch.Size([30, 12, 64])"


def test_links_lead_somewhere() -> None:
    root = Path(__file__).parents[1]
    for document in ("README.md", "CONTRIBUTING.md", "kernels/README.md", "benchmarks/README.md"):
        folder = (root / document).parent
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", (root / document).read_text(encoding="utf-8")):
            assert (folder / target).exists(), f"{document} links to {target}"
