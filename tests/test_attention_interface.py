"""fastcls's attention inside transformers models that are not converted: sdpa's results, or a clear no."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import tiny_model
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertModel,
    ErnieConfig,
    ErnieModel,
    GPT2Config,
    GPT2Model,
    T5Config,
    T5EncoderModel,
)
from transformers.masking_utils import bidirectional_mask_function

import fastcls
from fastcls.integrations import transformers_attention as attention_interface
from fastcls_kernels import batch_invariant

SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 112,
    "max_position_embeddings": 64,
}
MASKS = {
    "none": None,
    "whole": [[1] * 9] * 3,
    "right_padded": [[1] * 9, [1] * 4 + [0] * 5, [1] + [0] * 8],
    "left_padded": [[1] * 9, [0] * 5 + [1] * 4, [0] * 8 + [1]],
    "with_holes": [[1, 0, 1, 1, 0, 1, 1, 1, 0], [1] * 9, [0, 1, 0, 0, 0, 0, 0, 1, 0]],
    "an_empty_text": [[1] * 3 + [0] * 6, [0] * 9, [0] * 4 + [1] * 5],
    "all_empty": [[0] * 9] * 3,
}
WHOLE = (MASKS["none"], MASKS["whole"])


@pytest.fixture(autouse=True)
def registered() -> None:
    fastcls.register_attention()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which operations ran."""
    ran: list[str] = []

    def spy(name: str) -> None:
        original = getattr(attention_interface, name)

        def counted(*args: Any, **kwargs: Any) -> Tensor:
            ran.append(name)
            result: Tensor = original(*args, **kwargs)
            return result

        monkeypatch.setattr(attention_interface, name, counted)

    for name in ("attention_varlen", "scaled_dot_product_attention"):
        spy(name)
    return ran


def _states(model: Any, implementation: str, mask: Any, **inputs: Any) -> Tensor:
    model.set_attn_implementation(implementation)
    ids = {} if inputs else {"input_ids": torch.arange(27).view(3, 9) + 5}
    if mask is not None:
        inputs["attention_mask"] = torch.tensor(mask)
    with torch.no_grad():
        states: Tensor = model(**ids, **inputs).last_hidden_state
    return states


@pytest.mark.parametrize("in_groups", [False, True], ids=["sdpa_for_padding", "in_groups"])
@pytest.mark.parametrize("mask", list(MASKS.values()), ids=list(MASKS))
@pytest.mark.parametrize("family", ["bert", "ernie"])
def test_states_are_those_of_sdpa_in_all_rows(family: str, mask: Any, in_groups: bool, calls: list[str]) -> None:
    # ERNIE is a family that `optimize` does not take.
    model: Any = tiny_model("BertModel", "bert") if family == "bert" else ErnieModel(ErnieConfig(**SIZES)).eval()
    expected = _states(model, "sdpa", mask)
    # As on a GPU: what is invariant on a CPU takes the same way.
    with batch_invariant(in_groups):
        found = _states(model, "fastcls", mask)
    assert (found - expected).abs().max() <= 1e-5
    layers, all_empty = model.config.num_hidden_layers, mask is MASKS["all_empty"]
    ours = in_groups or mask in WHOLE
    assert calls == (
        [] if ours and all_empty else ["attention_varlen" if ours else "scaled_dot_product_attention"] * layers
    )


@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"], indirect=True)
def test_kernels_compute_all_rows(kernels: str, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 3, 2, 9, 16, device=kernels, dtype=dtype).unbind(0)
    mask = torch.tensor(MASKS["with_holes"], device=kernels)
    given = AttentionMaskInterface()["fastcls"](mask_function=bidirectional_mask_function, attention_mask=mask)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=given[:, None, None])
    attend, module = AttentionInterface()["fastcls"], torch.nn.Module()
    # A mask that was copied has lost what follows from it.
    for each in (given, given.clone()):
        torch.testing.assert_close(attend(module, q, k, v, each)[0], expected.transpose(1, 2))


@pytest.mark.parametrize("mask", ["none", "with_holes", "an_empty_text"])
@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"], indirect=True)
def test_gradients_are_those_of_sdpa(kernels: str, dtype: torch.dtype, mask: str) -> None:
    numbers = torch.randn(3, 3, 2, 9, 16, device=kernels, dtype=dtype, requires_grad=True)
    given = None if mask == "none" else torch.tensor(MASKS[mask], device=kernels).bool()
    attend, module = AttentionInterface()["fastcls"], torch.nn.Module()
    sees = None if given is None else given[:, None, None]
    q, k, v = numbers.unbind(0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=sees).transpose(1, 2)
    found = attend(module, q, k, v, given, is_causal=False)[0]
    weights = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(each, numbers, weights)[0] for each in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_real_rows_have_the_bits_that_they_have_alone() -> None:
    mask = [[1] * 9, [1] * 4 + [0] * 5, [1] + [0] * 8]
    attend, module = AttentionInterface()["fastcls"], torch.nn.Module()
    q, k, v = torch.randn(3, 3, 4, 9, 16).unbind(0)
    with batch_invariant():
        together = attend(module, q, k, v, torch.tensor(mask).bool())[0]
        for text, row in enumerate(mask):
            length = sum(row)
            alone = (each[text, None, :, :length] for each in (q, k, v))
            assert torch.equal(together[text, :length], attend(module, *alone, None, is_causal=False)[0][0])


def test_query_expansion_of_colbert(minilm_path: Path) -> None:
    # The encoder attends to no [MASK] behind a query, and every one of them is scored.
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    if not hasattr(library, "MultiVectorEncoder"):
        pytest.skip("this version of sentence-transformers has no MultiVectorEncoder")
    modules = importlib.import_module("sentence_transformers.base.modules")
    scoring = importlib.import_module("sentence_transformers.multi_vector_encoder.modules")
    encoder = modules.Transformer(
        str(minilm_path), query_expansion={"strategy": "fixed", "attend": False, "length": 32}
    )
    model = library.MultiVectorEncoder(modules=[encoder, scoring.MultiVectorMask()], device="cpu")
    texts = ["a charming journey", "no", "unflinchingly bleak and desperate"]
    expected = model.encode_query(texts)
    encoder.auto_model.set_attn_implementation("fastcls")
    for ours, theirs in zip(model.encode_query(texts), expected, strict=True):
        assert ours.shape == theirs.shape == (32, 384)
        assert abs(ours - theirs).max() <= 1e-5


def test_a_checkpoint_loaded_with_it(tmp_path: Path) -> None:
    model = tiny_model("BertForSequenceClassification", "bert")
    ids, mask = torch.arange(18).view(2, 9) + 5, torch.tensor([[1] * 9, [1] * 3 + [0] * 6])
    with torch.no_grad():
        expected = model(ids, mask).logits
        model.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path, attn_implementation="fastcls"
        )
        assert (loaded(ids, mask).logits - expected).abs().max() <= 1e-5


def test_pictures(calls: list[str]) -> None:
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=112, image_size=16, patch_size=4
    )
    model, pixels = transformers.ViTModel(config).eval(), torch.randn(2, 3, 16, 16)
    expected, found = (_states(model, name, None, pixel_values=pixels) for name in ("sdpa", "fastcls"))
    assert (found - expected).abs().max() <= 1e-5
    assert calls == ["attention_varlen"] * 2


def _bert(**overrides: Any) -> Any:
    return BertModel(BertConfig(**{**SIZES, **overrides})).eval()


def _causal() -> Any:
    return _bert(is_decoder=True)


def _call(model: Any, **inputs: Any) -> None:
    with torch.no_grad():
        model(torch.arange(27).view(3, 9) + 5, **inputs)


def _in_training(model: Any) -> None:
    model.train()
    _call(model)


def _four_dimensions(model: Any) -> None:
    _call(model, attention_mask=torch.zeros(3, 1, 9, 9))


def _cross_attending(model: Any) -> None:
    _call(model, encoder_hidden_states=torch.randn(3, 5, 64))


def _gpt() -> Any:
    return GPT2Model(GPT2Config(vocab_size=199, n_embd=64, n_layer=1, n_head=4, n_positions=32)).eval()


def _windowed() -> Any:
    return tiny_model("ModernBertModel", "modernbert")


REFUSED: dict[str, tuple[Callable[[], Any], Callable[[Any], None], str]] = {
    "dropout": (_bert, _in_training, r"without dropout \(model.eval\(\)\), got dropout = 0.1"),
    "a_mask_for_each_query": (
        _bert,
        _four_dimensions,
        r"boolean attention_mask of shape \(batch, seqlen\), got torch.float32 of \(3, 1, 9, 9\)",
    ),
    "causal_bert": (_causal, _call, "every token attends to every other one, got a mask by"),
    "gpt2": (_gpt, _call, "every token attends to every other one, got a mask by"),
    "windows": (_windowed, _call, "every token attends to every other one, got a mask by"),
    "cross_attention": (
        lambda: _bert(is_decoder=True, add_cross_attention=True),
        _cross_attending,
        "every token attends to every other one",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_it_does_not_compute_is_refused(case: str) -> None:
    make, call, message = REFUSED[case]
    model = make()
    model.set_attn_implementation("fastcls")
    if model.config._attn_implementation != "fastcls":
        pytest.skip(f"{type(model).__name__} of transformers {transformers.__version__} keeps its own attention")
    with pytest.raises(ValueError, match=message) as refused:
        call(model)
    assert 'set_attn_implementation("sdpa")' in str(refused.value)


def test_position_biases_are_refused() -> None:
    config = T5Config(vocab_size=199, d_model=64, d_kv=16, d_ff=112, num_layers=1, num_heads=4)
    model = T5EncoderModel(config).eval()
    if not model._can_set_attn_implementation():
        pytest.skip("T5 of this version has an attention of its own")
    model.set_attn_implementation("fastcls")
    with pytest.raises(ValueError, match="position_bias to be left out"):
        _call(model)


@pytest.mark.parametrize("name", ["head_mask", "softcap", "output_attentions", "cache"])
def test_what_changes_the_result_is_refused(name: str) -> None:
    q = torch.randn(2, 4, 9, 16)
    module = torch.nn.Module()
    module.is_causal = False  # type: ignore[assignment]
    attend = AttentionInterface()["fastcls"]
    assert attend(module, q, q, q, None, **{name: None})[0].shape == (2, 9, 4, 16)
    with pytest.raises(ValueError, match=f"needs {name} to be left out"):
        attend(module, q, q, q, None, **{name: True})
    with pytest.raises(
        ValueError, match=r"own tokens and number of heads, got q, k, v of shapes \(2, 4, 9, 16\), \(2, 2"
    ):
        attend(module, q, q[:, :2], q[:, :2], None)


def test_heads_of_a_size_that_no_kernel_has_are_refused() -> None:
    model = _bert(hidden_size=8)
    model.set_attn_implementation("fastcls")
    with pytest.raises(ValueError, match="head"):
        _call(model)


def test_it_may_be_registered_twice_and_sdpa_stays() -> None:
    fastcls.register_attention()
    model = _bert()
    assert model.config._attn_implementation == "sdpa"
    model(torch.arange(27).view(3, 9))


def test_a_causal_module_without_a_mask_is_refused() -> None:
    q, module = torch.randn(2, 4, 9, 16), torch.nn.Module()
    attend = AttentionInterface()["fastcls"]
    # sdpa takes a module that does not say for a causal one.
    with pytest.raises(ValueError, match="every token attends to every other one, got a causal Module"):
        attend(module, q, q, q, None)
    assert attend(module, q, q, q, None, is_causal=False)[0].shape == (2, 9, 4, 16)
    assert attend(module, q[:, :, :1], q[:, :, :1], q[:, :, :1], None)[0].shape == (2, 1, 4, 16)
