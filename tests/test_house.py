"""The walls of the house: what is imported where, the way down to a kernel, the length of files, the public names."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any, cast

import pytest
import torch
from support import tiny_bert
from test_imports import BLOCK, run

import fastcls
import fastcls_kernels
from fastcls.engine.batch import PaddedBatch

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("fastcls", "kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")]


def test_the_engine_needs_torch_and_the_kernels_alone() -> None:
    above = ("transformers", "huggingface_hub", "tokenizers", "typer", "rich", "numpy")
    code = BLOCK.format(blocked=above) + (
        "import fastcls.engine\n"
        "rooms = ('models', 'original', 'families', 'integrations', 'tools', 'classifier', 'conversion')\n"
        "print([room for room in rooms if f'fastcls.{room}' in sys.modules])"
    )
    assert run(code) == "[]"


def test_engine_from_plain_data_runs_without_transformers() -> None:
    code = BLOCK.format(blocked=("transformers",)) + (
        "import torch\n"
        "from fastcls.engine import Engine\n"
        "from fastcls.engine.batch import PaddedBatch\n"
        "from fastcls.engine.spec import EncoderSpec, HeadSpec\n"
        "sizes = dict(vocab_size=9, max_positions=8, position_rows=8, token_types=2, hidden_size=16, num_heads=2)\n"
        "spec = EncoderSpec(**sizes, intermediate_size=24, layer_norm_eps=1e-12, layers=(0,), embedding_size=16)\n"
        "shapes = {'encoder.embeddings.word_weight': (9, 16), 'encoder.embeddings.position_weight': (8, 16)}\n"
        "shapes |= {'encoder.embeddings.token_type_weight': (2, 16)}\n"
        "shapes |= {'head.out_weight': (3, 16), 'head.out_bias': (3,)}\n"
        "for name, rows, columns in (('qkv', 48, 16), ('out', 16, 16), ('up', 24, 16), ('down', 16, 24)):\n"
        "    shapes |= {f'encoder.layers.0.{name}_weight': (rows, columns), f'encoder.layers.0.{name}_bias': (rows,)}\n"
        "for norm in ('embeddings.norm', 'layers.0.attention_norm', 'layers.0.output_norm'):\n"
        "    shapes |= {f'encoder.{norm}_{kind}': (16,) for kind in ('weight', 'bias')}\n"
        "weights = {name: torch.nn.Parameter(torch.randn(shape), False) for name, shape in shapes.items()}\n"
        "engine = Engine(spec, HeadSpec('token classification', {}), weights)\n"
        "batch = PaddedBatch(torch.randint(9, (2, 5)), None, None, None, None)\n"
        "engine.check(batch)\n"
        "print(*(tuple(engine.rows(batch, rows).shape) for rows in ('first', 'mean', 'all')))"
    )
    assert run(code) == "(2, 3) (2, 3) (2, 5, 3)"


def test_all_packages_are_installed() -> None:
    # An editable install has every folder, whatever the list says.
    listed = re.search(
        r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.DOTALL | re.M
    )
    assert listed is not None
    folders = {"fastcls": ROOT, "fastcls_kernels": ROOT / "kernels", "fastcls_benchmarks": ROOT / "benchmarks"}
    there = {
        ".".join(path.parent.relative_to(root).parts)
        for name, root in folders.items()
        for path in (root / name).rglob("__init__.py")
    }
    assert set(re.findall(r'"([\w.]+)"', listed[1])) == there


def reading_order() -> list[tuple[str, str]]:
    """The functions that CONTRIBUTING lists from a call to the first kernel, each with its file."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text[text.index("## The way down") :]
    return re.findall(r"^\d+\. `([\w.]+)` in `([\w/.]+)`", section[: section.index("\n## ", 3)], re.MULTILINE)


def test_the_way_down_is_the_one_that_contributing_lists() -> None:
    # The kernels in C take a shorter way for plain batches.
    fast = fastcls.optimize(tiny_bert(), pack_weights=False)
    ids = torch.randint(5, 199, (2, 7))
    fast(input_ids=ids)
    entered: list[tuple[str, str]] = []
    stack: list[tuple[str, str]] = []

    def named(frame: FrameType) -> tuple[str, str]:
        path = Path(frame.f_code.co_filename)
        own = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
        owner = frame.f_locals.get("self")
        method = frame.f_code.co_name
        owners = [each.__name__ for each in type(owner).__mro__ if method in vars(each)] if owner is not None else []
        # Of an override that calls the method that it overrides, each is entered under its own class.
        name = f"{owners[0]}.{method}" if owners else method
        return name, own

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or stack:
            return
        entered.append(named(frame))
        if frame.f_code.co_name == "embedding_layer_norm_unchecked":
            above: FrameType | None = frame.f_back
            while above is not None:
                stack.append(named(above))
                above = above.f_back

    sys.setprofile(watch)
    try:
        fast(input_ids=ids)
    finally:
        sys.setprofile(None)
    listed = reading_order()
    assert 0 < len(listed) <= 12
    assert len({file for _, file in listed}) <= 6
    ours = [(name, file) for name, file in entered if (name, file) in listed]
    assert list(dict.fromkeys(ours)) == listed, "CONTRIBUTING lists other functions, or in another order"
    down = [(name, file) for name, file in reversed(stack) if file.startswith("fastcls/") and name[0] != "<"]
    assert set(down) <= set(listed), "a function on the way down is not listed"


def test_a_source_file_is_read_in_one_sitting() -> None:
    lines = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8").count("\n") for path in SOURCES}
    assert {name: count for name, count in lines.items() if count > 450} == {}
    assert "fastcls/engine/engine.py" in lines


def test_public_names() -> None:
    models = "Classifier Encoder MaskedLM MultipleChoice NextSentencePredictor QuestionAnswerer TokenClassifier"
    fast = [f"Fast{name}" for name in models.split()]
    assert sorted(fastcls.__all__) == sorted(
        ["Classifier", *fast, "MultiHead", "optimize", "optimize_encoder", "optimize_heads", "register_attention"]
    )
    assert all(hasattr(fastcls, name) for name in fastcls.__all__)
    operations = """
        absorb_query add_layer_norm apply_rotary_ attention_padded attention_varlen cls_attention cls_attention_kv
        cls_output disentangled_attention embedding_layer_norm gated_activation layer_norm linear linear_activation
        linear_add_layer_norm linear_gelu linear_per_head mean_pool pack_weight packed_layer packed_linear
        pooler_classifier
    """
    others = """
        Activation AddNorm Backend Buckets HAS_TRITON PackedLayer PackedLayout PackedWeight Packing batch_invariant
        explain_backend explain_compiled is_batch_invariant takes_norm use_backend uses_onednn warming_shapes
    """
    assert sorted(fastcls_kernels.__all__) == sorted((operations + others).split())


def test_an_engine_names_rows_that_it_does_not_know() -> None:
    fast = fastcls.optimize(tiny_bert())
    batch = PaddedBatch(torch.randint(5, 199, (2, 7)), None, None, None, None)
    with pytest.raises(ValueError, match="rows must be one of first, mean, all, chosen, got 'last'"):
        fast.rows(batch, cast(Any, "last"))
    with pytest.raises(ValueError, match='chosen must be given with rows "chosen" and with no others, got rows'):
        fast.rows(batch, "chosen")
