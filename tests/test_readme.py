"""The README's examples, run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import tiny_bert, tiny_model

from fastcls.demo import sample_texts, sample_tokenizer

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = sample_tokenizer(sample_texts())
    tiny_bert(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    tiny_model("BertModel", "bert", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    (tmp_path / "a_million_lines.txt").write_text("\n".join(sample_texts()), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    assert len(BLOCKS) == 4
    for block in BLOCKS:
        # The names that stand for the reader's own models.
        for name, folder in (("your/bert-classifier", "classifier"), ("your/encoder", "encoder")):
            block = block.replace(name, str(tmp_path / folder))
        exec(block, names)
    assert str(getattr(names["out"], "shape", None)) == "torch.Size([30, 12, 64])"
    assert str(getattr(names["vectors"], "shape", None)) == "(2, 64)"


def test_links_lead_somewhere() -> None:
    root = Path(__file__).parents[1]
    for document in ("README.md", "CONTRIBUTING.md", "kernels/README.md", "benchmarks/README.md"):
        folder = (root / document).parent
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", (root / document).read_text(encoding="utf-8")):
            assert (folder / target).exists(), f"{document} links to {target}"
