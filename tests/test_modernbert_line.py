"""ModernBERT's line: every published count and pattern of layers, at a tiny width, against transformers in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import tiny_model
from test_families import answers, assert_close, by_rung, in_float64
from torch import Tensor

import fastcls

# What config.json says of the layers, and where that was read. Every model of the line has a global layer first and
# at every third, windows of 128 tokens in the others, no biases.
_BASE = {"global_attn_every_n_layers": 3, "local_attention": 128, "hidden_activation": "gelu"}
# transformers' ModernBertConfig, and AnswerDotAI/ModernBERT: yamls/modernbert/modernbert-base-pretrain.yaml.
_MODERNBERT = {**_BASE, "global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0}
# JHU-CLSP/ettin-encoder-vs-decoder: pretraining/configs/standard/*/prolong_decay/encoder_*.yaml, where very_tiny is the
# model of 17 million parameters and huge that of a billion; JHU-CLSP/mmBERT: configs/mmBERT-*-decay.yaml.
_ETTIN = {**_BASE, "global_rope_theta": 160_000.0, "local_rope_theta": 160_000.0}
# primeqa/ollama: MODERNBERT_DEBUG_STATUS.md, which quotes the config of granite-embedding-english-r2; the layers of the
# small one are in arXiv:2508.21085, and its thetas are the same in others' copies of its config.
_GRANITE = {**_BASE, "global_rope_theta": 80_000.0, "local_rope_theta": 10_000.0}
PUBLISHED: dict[str, dict[str, Any]] = {
    # gte's model card names ModernBERT-base as its base.
    "modernbert-base, gte-modernbert-base": {**_MODERNBERT, "num_hidden_layers": 22},
    # arXiv:2412.13663.
    "modernbert-large": {**_MODERNBERT, "num_hidden_layers": 28},
    "ettin-17m": {**_ETTIN, "num_hidden_layers": 7},
    "ettin-32m": {**_ETTIN, "num_hidden_layers": 10},
    "ettin-68m": {**_ETTIN, "num_hidden_layers": 19},
    "ettin-150m, mmbert-small, mmbert-base": {**_ETTIN, "num_hidden_layers": 22},
    "ettin-400m, ettin-1b": {**_ETTIN, "num_hidden_layers": 28},
    "granite-english-r2": {**_GRANITE, "num_hidden_layers": 22},
    "granite-small-english-r2": {**_GRANITE, "num_hidden_layers": 12},
    # ggml-org/llama.cpp#22716. Its card tells of SiLU and of 12 of 22 layers that were kept, not of which kinds.
    "SiLU, as in granite-97m-multilingual-r2": {**_GRANITE, "num_hidden_layers": 12, "hidden_activation": "silu"},
}
LAST_IS_LOCAL = [name for name, options in PUBLISHED.items() if (options["num_hidden_layers"] - 1) % 3]
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128}
# A token sees 64 others on either side.
LENGTHS = (100, 70, 1)


def of_line(name: str, **overrides: Any) -> Any:
    options = {**PUBLISHED[name], **SIZES, **overrides}
    return in_float64(tiny_model("ModernBertForSequenceClassification", "modernbert", **options))


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return {"input_ids": torch.randint(5, 199, mask.shape), "attention_mask": mask.long()}


def in_doubles(monkeypatch: pytest.MonkeyPatch, model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's answers without the rounding of queries and keys to float32 before they are turned."""
    with monkeypatch.context() as patch:
        # Queries and keys have four dimensions, frequencies and positions fewer.
        patch.setattr(Tensor, "float", lambda x: x if x.ndim == 4 else x.to(torch.float32))
        return answers(model, inputs)


@pytest.mark.covering(alone=["name"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_patterns_of_layers_are_exact(name: str, pooling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = of_line(name, classifier_pooling=pooling), batch()
    expected = in_doubles(monkeypatch, model, inputs)
    for last_layer, actual in by_rung(model, inputs):
        assert_close(actual, expected, 1e-12, last_layer)


@pytest.mark.parametrize("name", PUBLISHED)
def test_layers_are_local_but_every_third(name: str) -> None:
    windows = fastcls.optimize(of_line(name)).spec.windows
    assert windows == tuple(64 if layer % 3 else None for layer in range(PUBLISHED[name]["num_hidden_layers"]))
    assert (windows[-1] is not None) == (name in LAST_IS_LOCAL)


def test_a_last_layer_that_is_local_reads_its_window_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    (name, *_) = LAST_IS_LOCAL
    model, inputs = of_line(name), batch()
    everywhere = of_line(name, layer_types=[*model.config.layer_types[:-1], "full_attention"])
    local, full = (in_doubles(monkeypatch, each, inputs)["logits"] for each in (model, everywhere))
    differ = (local - full).abs().amax(1) > 1e-3
    # Of two texts that are longer than a window the others' texts say nothing.
    assert differ.tolist() == [True, True, False]
    for last_layer, actual in by_rung(everywhere, inputs):
        assert_close(actual, {"logits": full}, 1e-12, last_layer)
