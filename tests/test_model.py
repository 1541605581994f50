"""The optimized model against the transformers model that it replaces."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import Sentences
from support import MANY_LABELS, CountTokenProducts, assert_as_exact_as, tiny_bert, tiny_model
from torch import Tensor
from transformers import (
    BertForSequenceClassification,
    BertLMHeadModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput

import fastcls
from fastcls.engine.spec import LastLayer
from fastcls_kernels import use_backend
from fastcls_kernels.runtime.tile_tables import use_tile

RUNGS = get_args(LastLayer)

MASKS = {
    "right_padding": [[1] * 9, [1] * 4 + [0] * 5, [1] + [0] * 8],
    "holes": [[1, 0, 1, 1, 0, 0, 1, 0, 1], [1, 1, 0, 0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 1, 0, 0, 1, 0]],
    "all_tokens": [[1] * 9] * 3,
    "none": None,
}


def batch(rows: int = 3, length: int = 9, device: str = "cpu") -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "input_ids": torch.randint(5, 199, (rows, length), device=device),
        "token_type_ids": torch.randint(0, 2, (rows, length), device=device),
    }


def logits_of(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


@pytest.mark.parametrize("last_layer", RUNGS)
@pytest.mark.parametrize("mask", list(MASKS))
def test_logits_are_those_of_transformers(mask: str, last_layer: LastLayer, device: str) -> None:
    model = tiny_bert().to(device)
    inputs = batch(device=device)
    if MASKS[mask] is not None:
        inputs["attention_mask"] = torch.tensor(MASKS[mask], device=device)
    fast = fastcls.optimize(model, last_layer=last_layer)
    eager = logits_of(model, **inputs)
    assert float((logits_of(fast, **inputs) - eager).abs().max()) <= 1e-5
    assert float(eager.std(0).max()) > 0.01, "logits that do not differ from text to text would prove nothing"


@pytest.mark.parametrize("last_layer", RUNGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_as_exact_as_transformers_in_every_dtype(dtype: torch.dtype, last_layer: LastLayer, device: str) -> None:
    if dtype == torch.float32 and device == "cpu":
        pytest.skip("the CPU's float32 products are oneDNN's, held to 1e-5 by the test above")
    lengths = torch.tensor([40, 3, 17, 1, 33, 40, 25, 8] * 16)
    inputs = batch(len(lengths), 40, device)
    inputs["attention_mask"] = (torch.arange(40) < lengths[:, None]).long().to(device)
    rounded = tiny_bert(attn_implementation="eager", num_labels=MANY_LABELS).to(device, dtype)
    exact = logits_of(copy.deepcopy(rounded).double(), **inputs)
    eager = logits_of(rounded, **inputs)
    assert_as_exact_as(logits_of(fastcls.optimize(rounded, last_layer=last_layer), **inputs), [eager], exact)


@pytest.mark.parametrize("last_layer", RUNGS)
def test_exact_in_float64(last_layer: LastLayer) -> None:
    model = tiny_bert().double()
    inputs = {**batch(), "attention_mask": torch.tensor(MASKS["holes"])}
    difference = logits_of(fastcls.optimize(model, last_layer=last_layer), **inputs) - logits_of(model, **inputs)
    assert float(difference.abs().max()) < 1e-13


NORM_INSIDE = {"NORM": True, "BLOCK_H": 16, "BLOCK_N": 16, "MAX_BLOCK_W": 64, "num_warps": 4, "num_stages": 1}


@pytest.mark.parametrize("norm_inside", [False, True], ids=["norm_before", "norm_inside"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("last_layer", RUNGS)
def test_whole_model_through_the_kernels(
    kernel_device: str, last_layer: LastLayer, layers: int, norm_inside: bool
) -> None:
    # One forward pass of every kernel together, in the interpreter or on a GPU.
    model = tiny_bert(num_hidden_layers=layers).to(kernel_device)
    inputs = {**batch(device=kernel_device), "attention_mask": torch.tensor(MASKS["holes"], device=kernel_device)}
    fast = fastcls.optimize(model, last_layer=last_layer)
    with use_backend("triton"), use_tile("cls_attention", {**NORM_INSIDE, "NORM": norm_inside}):
        actual = logits_of(fast, **inputs)
    assert float((actual - logits_of(model, **inputs)).abs().max()) <= 1e-5


def with_outlier_features(model: Any) -> Any:
    """Trained encoders have a few features many times as large as the rest; rounding them costs the others most."""
    for layer in model.bert.encoder.layer:
        norm = layer.output.LayerNorm
        norm.weight.data[[3, 17]] *= 20
        norm.bias.data[[3, 40]] += 25
    return model


@pytest.mark.parametrize(
    "norm_inside",
    [pytest.param(False, id="norm_before", marks=pytest.mark.full), pytest.param(True, id="norm_inside")],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_absorbing_is_as_exact_as_transformers_with_outlier_features(
    kernels: str, dtype: torch.dtype, norm_inside: bool
) -> None:
    lengths = torch.tensor([20, 3, 17, 1, 13, 20, 15, 8] * (4 if kernels == "cpu" else 64))
    inputs = batch(len(lengths), 20, kernels)
    inputs["attention_mask"] = (torch.arange(20) < lengths[:, None]).long().to(kernels)
    rounded = with_outlier_features(tiny_bert(attn_implementation="eager", num_hidden_layers=2, num_labels=MANY_LABELS))
    rounded = rounded.to(kernels, dtype)
    exact = logits_of(copy.deepcopy(rounded).double(), **inputs)
    eager = logits_of(rounded, **inputs)
    with use_tile("cls_attention", {**NORM_INSIDE, "NORM": norm_inside}):
        assert_as_exact_as(logits_of(fastcls.optimize(rounded), **inputs), [eager], exact)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_absorbing_is_as_exact_with_outlier_features_in_torch(dtype: torch.dtype) -> None:
    # An outlier's error is that of its text.
    inputs = batch(2048, 20)
    rounded = with_outlier_features(tiny_bert(attn_implementation="eager", num_labels=MANY_LABELS)).to(dtype)
    exact = logits_of(copy.deepcopy(rounded).double(), **inputs)
    assert_as_exact_as(logits_of(fastcls.optimize(rounded), **inputs), [logits_of(rounded, **inputs)], exact)


@pytest.mark.parametrize("hidden_size", [96, 104, 312], ids=lambda size: f"head_{size // 4}")
def test_other_head_sizes(hidden_size: int) -> None:
    model = tiny_bert(hidden_size=hidden_size, num_hidden_layers=2, initializer_range=0.1)
    inputs = batch()
    assert float((logits_of(fastcls.optimize(model), **inputs) - logits_of(model, **inputs)).abs().max()) <= 1e-5


def test_one_token_and_the_longest_text() -> None:
    model = tiny_bert()
    fast = fastcls.optimize(model)
    for length in (1, 96):
        inputs = batch(2, length)
        assert float((logits_of(fast, **inputs) - logits_of(model, **inputs)).abs().max()) <= 1e-5


def test_a_large_batch_in_several_passes(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr("fastcls.engine.engine.CPU_TOKENS_PER_PASS", 100)
    monkeypatch.setattr("fastcls.engine.engine.GPU_TOKENS_PER_PASS", 100)
    model = tiny_bert().to(device)
    lengths = torch.randint(1, 60, (40,))
    inputs = {**batch(40, 60, device), "attention_mask": (torch.arange(60) < lengths[:, None]).long().to(device)}
    difference = logits_of(fastcls.optimize(model), **inputs) - logits_of(model, **inputs)
    assert float(difference.abs().max()) <= 1e-5


def test_custom_positions_and_embeddings() -> None:
    model = tiny_bert()
    fast = fastcls.optimize(model)
    positions = torch.arange(9).flip(0)[None] * 5
    embeds = torch.randn(3, 9, 64)
    mask = torch.tensor(MASKS["holes"])
    for inputs in (
        {"input_ids": batch()["input_ids"], "position_ids": positions, "attention_mask": mask},
        {"inputs_embeds": embeds, "attention_mask": mask},
    ):
        assert float((logits_of(fast, **inputs) - logits_of(model, **inputs)).abs().max()) <= 1e-5


def test_a_text_alone_and_in_company_agree() -> None:
    fast = fastcls.optimize(tiny_bert())
    ids = batch(6, 30)["input_ids"]
    mask = (torch.arange(30) < torch.tensor([30, 4, 9, 17, 22, 2])[:, None]).long()
    together = logits_of(fast, input_ids=ids, attention_mask=mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = logits_of(fast, input_ids=ids[row : row + 1, :length])
        assert float((alone - together[row]).abs().max()) <= 1e-5


def test_what_stands_under_padding_does_not_matter() -> None:
    fast = fastcls.optimize(tiny_bert())
    inputs = {**batch(), "attention_mask": torch.tensor(MASKS["right_padding"])}
    clean = logits_of(fast, **inputs)
    # Ids under padding may be anything, even outside the vocabulary: they are never looked at.
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 10**6)
    assert torch.equal(logits_of(fast, **inputs), clean)


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32], ids=str)
def test_masks_of_any_dtype(kind: torch.dtype) -> None:
    fast = fastcls.optimize(tiny_bert())
    mask = torch.tensor(MASKS["holes"])
    expected = logits_of(fast, **batch(), attention_mask=mask)
    assert torch.equal(logits_of(fast, **batch(), attention_mask=mask.to(kind)), expected)


def test_output_is_that_of_transformers() -> None:
    model = tiny_bert()
    fast = fastcls.optimize(model)
    output = fast(**batch())
    assert isinstance(output, SequenceClassifierOutput)
    assert list(output) == list(model(**batch()))
    assert isinstance(fast(**batch(), return_dict=False), tuple)
    assert output.logits is not None
    assert not output.logits.requires_grad
    assert (fast.device, fast.dtype, fast.config) == (model.device, model.dtype, model.config)


@pytest.mark.parametrize(
    ("overrides", "labels"),
    [
        pytest.param({}, torch.tensor([0, 2, 1]), id="single_label"),
        pytest.param({"num_labels": 1}, torch.tensor([0.5, 2.0, -1.0]), id="regression"),
        pytest.param({}, torch.tensor([[1.0, 0, 1]] * 3), id="multi_label"),
    ],
)
def test_loss_is_that_of_transformers(overrides: dict[str, Any], labels: Tensor) -> None:
    model = tiny_bert(**overrides)
    # Each with a config of its own: what labels say of the problem type is written there.
    expected = tiny_bert(**overrides)(**batch(), labels=labels).loss
    actual = fastcls.optimize(model)(**batch(), labels=labels).loss
    assert torch.allclose(actual, expected, atol=1e-5)


def test_autocast_changes_nothing(device: str) -> None:
    fast = fastcls.optimize(tiny_bert().to(device))
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = logits_of(fast, **batch(device=device))
    assert torch.equal(inside, logits_of(fast, **batch(device=device)))


@pytest.mark.gpu
def test_inputs_may_lie_on_the_cpu() -> None:
    model = tiny_bert().to("cuda")
    fast = fastcls.optimize(model)
    inputs = {**batch(), "attention_mask": torch.tensor(MASKS["holes"])}
    expected = logits_of(model, **{name: tensor.to("cuda") for name, tensor in inputs.items()})
    actual = logits_of(fast, **inputs)
    assert actual.device.type == "cuda"
    assert float((actual - expected).abs().max()) <= 1e-5


@pytest.mark.gpu
def test_torch_path_on_a_gpu() -> None:
    # What runs where the GPU is too old for the kernels.
    model = tiny_bert().to("cuda")
    inputs = {**batch(device="cuda"), "attention_mask": torch.tensor(MASKS["holes"], device="cuda")}
    with use_backend("torch"):
        actual = logits_of(fastcls.optimize(model), **inputs)
    assert float((actual - logits_of(model, **inputs)).abs().max()) <= 1e-5


def test_state_dict_has_the_checkpoints_names() -> None:
    model = tiny_bert()
    fast = fastcls.optimize(model)
    ours, theirs = fast.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # Inside a larger module the names carry its prefix.
    assert {f"inner.{name}" for name in theirs} == torch.nn.ModuleDict({"inner": fast}).state_dict().keys()


def test_load_state_dict_takes_a_checkpoint() -> None:
    fast = fastcls.optimize(tiny_bert())
    other = tiny_bert()
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    assert fast.load_state_dict(other.state_dict()).missing_keys == []
    assert float((logits_of(fast, **batch()) - logits_of(other, **batch())).abs().max()) <= 1e-5


def test_load_state_dict_names_what_is_wrong() -> None:
    fast = fastcls.optimize(tiny_bert())
    state = fast.state_dict()
    key = "bert.encoder.layer.0.attention.self.key.weight"
    without = {name: value for name, value in state.items() if name != key}
    with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
        fast.load_state_dict(without)
    assert fast.load_state_dict(without, strict=False).missing_keys == [key]
    with pytest.raises(RuntimeError, match=r"size mismatch for .*key.weight: the checkpoint's is \(3, 64\)"):
        fast.load_state_dict({**state, key: torch.zeros(3, 64)})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"more"'):
        fast.load_state_dict({**state, "more": torch.zeros(1)})


@pytest.mark.parametrize(
    ("model_class", "family", "key"),
    [
        ("DebertaForSequenceClassification", "deberta", "deberta.encoder.layer.1.attention.self.in_proj.weight"),
        ("DebertaForSequenceClassification", "deberta", "deberta.encoder.layer.1.attention.self.v_bias"),
        ("EuroBertForSequenceClassification", "eurobert", "model.layers.1.self_attn.k_proj.weight"),
    ],
    ids=["by_head", "bias_by_head", "of_unequal_parts"],
)
def test_weights_that_are_arranged_otherwise_are_loaded_one_by_one(model_class: str, family: str, key: str) -> None:
    fast = fastcls.optimize(tiny_model(model_class, family))
    before = fast.state_dict()
    fresh = {name: value * 1.5 for name, value in before.items()}
    shape = tuple(before[key].shape)
    message = rf"size mismatch for {key}: the checkpoint's is \(5,.*\), the model's {re.escape(str(shape))}"
    with pytest.raises(RuntimeError, match=message):
        fast.load_state_dict({**fresh, key: torch.zeros(5, *shape[1:])})
    fast.load_state_dict(before)
    without = {name: value for name, value in fresh.items() if name != key}
    assert fast.load_state_dict(without, strict=False).missing_keys == [key]
    loaded = fast.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in {**without, key: before[key]}.items())


def test_save_pretrained_round_trip(tmp_path: Path) -> None:
    model = tiny_bert()
    fastcls.optimize(model).save_pretrained(tmp_path)
    again = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(again, **batch()), logits_of(model, **batch()))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_work_and_stand_alone(how: str) -> None:
    fast = fastcls.optimize(tiny_bert())
    expected = logits_of(fast, **batch())
    twin = copy.deepcopy(fast) if how == "deepcopy" else pickle.loads(pickle.dumps(fast))
    for parameter in fast.parameters():
        parameter.data.zero_()
    assert torch.equal(logits_of(twin, **batch()), expected)
    assert twin.state_dict().keys() == fast.state_dict().keys()


def test_converting_the_fast_model_leaves_the_original_alone() -> None:
    model = tiny_bert()
    expected = logits_of(model, **batch())
    fast = fastcls.optimize(model).to(torch.bfloat16)
    assert fast.dtype == torch.bfloat16
    assert logits_of(fast, **batch()).dtype == torch.bfloat16
    assert model.dtype == torch.float32
    assert torch.equal(logits_of(model, **batch()), expected)


def test_rungs_can_be_changed() -> None:
    fast = fastcls.optimize(tiny_bert())
    assert fast.last_layer == "absorbed"
    fast.last_layer = "full"
    with pytest.raises(ValueError, match="last_layer must be one of full, selected, absorbed, got 'half'"):
        fast.last_layer = "half"
    assert fast.last_layer == "full"


@pytest.mark.parametrize(("last_layer", "products"), [("full", 4), ("selected", 1), ("absorbed", 0)])
def test_the_last_layer_does_not_compute_what_it_need_not(last_layer: LastLayer, products: int) -> None:
    # Of every token: queries with keys and values, output and the two of the feed-forward; keys and values; nothing.
    # Of PyTorch's operators: what the compiled kernels multiply is not counted.
    fast = fastcls.optimize(tiny_bert(num_hidden_layers=1), last_layer=last_layer, pack_weights=False)
    with torch.no_grad(), CountTokenProducts(tokens=27) as counted:
        fast(**batch())
    assert counted.count == products


def test_empty_batch_gives_empty_logits() -> None:
    fast = fastcls.optimize(tiny_bert())
    for shape in ((0, 5), (0, 0)):
        empty = torch.zeros(shape, dtype=torch.long)
        assert logits_of(fast, input_ids=empty, attention_mask=empty).shape == (0, 3)
    assert fast.logits_of([]).shape == (0, 3)


def test_lists_of_ids_give_the_same_logits() -> None:
    fast = fastcls.optimize(tiny_bert())
    ids, types = (tensor.tolist() for tensor in batch().values())
    lengths = [9, 2, 5]
    padded = logits_of(fast, **batch(), attention_mask=(torch.arange(9) < torch.tensor(lengths)[:, None]).long())
    cut = [[row[:length] for row, length in zip(rows, lengths, strict=True)] for rows in (ids, types)]
    assert torch.allclose(fast.logits_of(*cut), padded, atol=1e-5)


def changed(**change: Any) -> dict[str, Any]:
    return {**batch(), "attention_mask": torch.ones(3, 9, dtype=torch.long), **change}


LEFT_PADDED = torch.tensor([[1] * 9, [0] * 2 + [1] * 7, [1] * 9])

BAD_FORWARD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "left_padding": (changed(attention_mask=LEFT_PADDED), ValueError, r'first column.*row 1.*padding_side = "right"'),
    "mask_of_another_shape": (
        changed(attention_mask=torch.ones(3, 8)),
        ValueError,
        r"attention_mask must have the batch's shape \(3, 9\), got \(3, 8\)",
    ),
    "mask_of_four_dimensions": (changed(attention_mask=torch.ones(3, 1, 9, 9)), ValueError, r"got \(3, 1, 9, 9\)"),
    "additive_mask": (changed(attention_mask=torch.full((3, 9), -1e9)), ValueError, "1 .token. and 0 .padding. only"),
    "mask_that_is_a_list": (
        changed(attention_mask=[[1]]),
        TypeError,
        "attention_mask must be a torch.Tensor, got list",
    ),
    "id_out_of_range": (
        changed(input_ids=torch.full((3, 9), 199)),
        ValueError,
        r"input_ids must lie from 0 to 198 \(config.vocab_size = 199\), got 199 to 199",
    ),
    "negative_id": (changed(input_ids=torch.full((3, 9), -1)), ValueError, "input_ids must lie from 0 to 198"),
    "type_out_of_range": (
        changed(token_type_ids=torch.full((3, 9), 2)),
        ValueError,
        "token_type_ids must lie from 0 to 1",
    ),
    "types_of_another_shape": (
        changed(token_type_ids=torch.zeros(3, 8, dtype=torch.long)),
        ValueError,
        r"token_type_ids must have shape \(3, 9\), got \(3, 8\)",
    ),
    "position_out_of_range": (
        changed(position_ids=torch.full((1, 9), 96)),
        ValueError,
        "position_ids must lie from 0 to 95",
    ),
    "positions_of_another_shape": (
        changed(position_ids=torch.arange(8)[None]),
        ValueError,
        r"position_ids must have shape \(3, 9\) or \(1, 9\)",
    ),
    "too_long": (
        {"input_ids": torch.ones(2, 97, dtype=torch.long)},
        ValueError,
        "97 tokens is longer than the model's 96 positions: pass truncation=True, max_length=96",
    ),
    "float_ids": (changed(input_ids=torch.ones(3, 9)), TypeError, "input_ids must be an int64 or int32.*float32"),
    "ids_that_are_a_list": ({"input_ids": [[1, 2]]}, TypeError, "input_ids must be an int64 or int32 tensor, got list"),
    "one_dimension": ({"input_ids": torch.ones(9, dtype=torch.long)}, ValueError, r"\(batch, seqlen\), got \(9,\)"),
    "no_tokens": ({"input_ids": torch.ones(2, 0, dtype=torch.long)}, ValueError, "at least one token each"),
    "ids_on_another_device": (
        {"input_ids": torch.ones(2, 3, dtype=torch.long, device="meta")},
        ValueError,
        "input_ids must be on the CPU or on cpu like the model, got meta",
    ),
    "ids_and_embeddings": (changed(inputs_embeds=torch.zeros(3, 9, 64)), ValueError, "exactly one of input_ids"),
    "nothing": ({}, ValueError, "exactly one of input_ids and inputs_embeds"),
    "embeddings_of_another_width": (
        {"inputs_embeds": torch.zeros(3, 9, 32)},
        ValueError,
        r"inputs_embeds must have shape \(batch, seqlen, 64\), got \(3, 9, 32\)",
    ),
    "embeddings_of_another_dtype": (
        {"inputs_embeds": torch.zeros(3, 9, 64).half()},
        TypeError,
        "inputs_embeds must be torch.float32 like the model, got torch.float16",
    ),
    "labels_of_another_batch": (changed(labels=torch.tensor([1, 2])), ValueError, r"each of the 3 texts, got \(2,\)"),
    "attentions": (changed(output_attentions=True), ValueError, "output_attentions must be False"),
    "hidden_states": (changed(output_hidden_states=True), ValueError, "output_hidden_states must be False"),
    "cross_attention": (changed(encoder_hidden_states=torch.zeros(1)), TypeError, "no argument encoder_hidden_states"),
}


@pytest.mark.parametrize(("inputs", "error", "message"), list(BAD_FORWARD.values()), ids=list(BAD_FORWARD))
def test_bad_input_is_named_before_anything_is_computed(
    inputs: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = fastcls.optimize(tiny_bert())
    monkeypatch.setattr(fast.encoder.embeddings, "forward", lambda *_: pytest.fail("computed before it was checked"))
    with pytest.raises(error, match=message):
        fast(**inputs)


def test_config_that_asks_for_hidden_states_is_refused() -> None:
    fast = fastcls.optimize(tiny_bert())
    fast.config.output_hidden_states = True
    with pytest.raises(ValueError, match="output_hidden_states must be False"):
        fast(**batch())


def test_a_frozen_encoder_stays_in_eval_mode_while_its_head_trains() -> None:
    model = tiny_model("BertModel", "bert")

    class Tagger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.out = fastcls.optimize(model), torch.nn.Linear(64, 2)

        def forward(self, **inputs: Tensor) -> Tensor:
            logits: Tensor = self.out(self.encoder(**inputs).last_hidden_state)
            return logits

    tagger = Tagger()
    tagger.encoder.stays_in_eval = True
    tagger.train()
    assert tagger.out.training
    assert not any(module.training for module in tagger.encoder.modules())
    tagger(**batch()).square().sum().backward()
    assert tagger.out.weight.grad is not None
    assert bool(tagger.out.weight.grad.any())
    with torch.no_grad():
        expected = model(**batch()).last_hidden_state
    assert float((tagger.encoder(**batch()).last_hidden_state - expected).abs().max()) <= 1e-4


def test_gradients_are_refused_in_eval_mode() -> None:
    fast = fastcls.optimize(tiny_bert())
    with pytest.raises(RuntimeError, match="gradients must be asked for in training mode: call train"):
        fast.requires_grad_()
    assert not any(parameter.requires_grad for parameter in fast.requires_grad_(False).parameters())
    embedded = torch.randn(2, 5, 64, requires_grad=True)
    fast.encoder.requires_grad_()
    with pytest.raises(RuntimeError, match=r"encoder.embeddings.*_weight must not require gradients"):
        fast(**batch())
    fast.encoder.requires_grad_(False)
    with torch.no_grad():
        assert not fast(inputs_embeds=embedded).logits.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        fast(**batch()).logits.sum().backward()


def test_data_parallel_is_refused() -> None:
    fast = fastcls.optimize(tiny_bert())
    with pytest.raises(RuntimeError, match=r"nn.DataParallel must be left out.*a process"):
        # What nn.DataParallel calls where there are several GPUs.
        fast._replicate_for_data_parallel()


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "modernbert"])
def test_inference_mode_and_outside_of_it(family: str, device: str) -> None:
    name = {"bert": "Bert", "deberta-v2": "DebertaV2", "modernbert": "ModernBert"}[family]
    fast = fastcls.optimize(tiny_model(f"{name}ForSequenceClassification", family).to(device))
    with torch.inference_mode():
        inside = fast(**batch(device=device)).logits
    # What was kept inside serves outside, and changes with the weights.
    assert torch.equal(fast(**batch(device=device)).logits, inside)
    fast.load_state_dict({name: 1.1 * value for name, value in fast.state_dict().items()})
    with torch.inference_mode():
        changed = fast(**batch(device=device)).logits
    assert not torch.equal(changed, inside)
    assert torch.equal(fast(**batch(device=device)).logits, changed)


@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
def test_threads_share_a_model(family: str, device: str) -> None:
    name = "BertForSequenceClassification" if family == "bert" else "DebertaV2ForSequenceClassification"
    fast = fastcls.optimize(tiny_model(name, family).to(device))
    batches = [{"input_ids": torch.randint(5, 199, (3, length), device=device)} for length in range(3, 11)]
    expected = [logits_of(copy.deepcopy(fast), **inputs) for inputs in batches]
    start = threading.Barrier(len(batches))

    def classify(inputs: dict[str, Tensor]) -> list[Tensor]:
        # The first pass makes what all threads share.
        start.wait()
        return [fast(**inputs).logits for _ in range(3)]

    with ThreadPoolExecutor(len(batches)) as pool:
        for found, logits in zip(pool.map(classify, batches), expected, strict=True):
            assert all(torch.equal(each, logits) for each in found)


def test_a_model_in_training_mode_comes_out_in_eval_mode() -> None:
    model = tiny_bert()
    fast = fastcls.optimize(model.train())
    assert float((logits_of(fast, **batch()) - logits_of(model.eval(), **batch())).abs().max()) <= 1e-5


def test_the_last_part_is_checked_before_the_first_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcls.engine.engine.CPU_TOKENS_PER_PASS", 2)
    fast = fastcls.optimize(tiny_bert())
    monkeypatch.setattr(fast.encoder.embeddings, "forward", lambda *_: pytest.fail("computed before it was checked"))
    with pytest.raises(ValueError, match=r"token_ids\[2\] holds the id 199, outside the vocabulary of 199"):
        fast.logits_of([[1], [1, 2], [3, 4, 199]])


def test_bad_lists_of_ids_are_named() -> None:
    fast = fastcls.optimize(tiny_bert())
    with pytest.raises(ValueError, match=r"token_ids\[1\] has no tokens"):
        fast.logits_of([[1], []])
    with pytest.raises(ValueError, match="97 tokens is longer than the model's 96 positions"):
        fast.logits_of([[1] * 97])
    with pytest.raises(ValueError, match=r"token_ids\[1\] holds the id -3, outside the vocabulary of 199"):
        fast.logits_of([[1, 198], [5, -3, 6, 199], [7]])
    with pytest.raises(ValueError, match="token_type_ids must have the lengths of token_ids"):
        fast.logits_of([[1]], [[0, 0]])


class Overridden(BertForSequenceClassification):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def gpt2() -> Any:
    return GPT2ForSequenceClassification(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=99))


def with_adapter() -> Any:
    model = tiny_bert()
    model.bert.adapter = torch.nn.Linear(2, 2)
    return model


def in_two_dtypes() -> Any:
    model = tiny_bert()
    model.classifier.half()
    return model


BAD_MODELS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "another_class": (gpt2, TypeError, "family bert, .*ForSequenceClassification.*, got .*GPT2ForSequenceClass"),
    "no_model": (lambda: torch.nn.Linear(2, 2), TypeError, "or without a head, got torch.nn"),
    "another_head": (
        lambda: BertLMHeadModel(tiny_bert().config),
        TypeError,
        "or without a head, got .*BertLMHeadModel",
    ),
    "overridden_forward": (lambda: Overridden(tiny_bert().config), TypeError, "got test_model.Overridden"),
    "decoder": (lambda: tiny_bert(is_decoder=True), ValueError, "config.is_decoder must be False, got True"),
    "cross_attention": (
        lambda: tiny_bert(is_decoder=True, add_cross_attention=True),
        ValueError,
        "config.(is_decoder|add_cross_attention) must be False",
    ),
    "relative_positions": (
        lambda: tiny_bert(position_embedding_type="relative_key"),
        ValueError,
        "config.position_embedding_type must be 'absolute', got 'relative_key'",
    ),
    "another_activation": (lambda: tiny_bert(hidden_act="mish"), ValueError, "config.hidden_act must be one of gelu"),
    "head_of_3": (lambda: tiny_bert(hidden_size=18, num_attention_heads=6), ValueError, "of 4 to 128, got 18 / 6"),
    "adapter": (with_adapter, ValueError, "model.bert.adapter must be nothing.*adapters must be merged first"),
    "two_dtypes": (in_two_dtypes, TypeError, "one of float32, float16 or bfloat16, got torch.float16, torch.float32"),
    "no_data": (lambda: tiny_bert().to("meta"), ValueError, "one device that holds data, got meta"),
}


def test_quantised_layers_are_refused() -> None:
    quantised = torch.ao.quantization.quantize_dynamic(tiny_bert(), {torch.nn.Linear})
    with pytest.raises(
        ValueError, match=r"model.bert.encoder.layer.0.attention.self.query must be a Linear.*quantised are not taken"
    ):
        fastcls.optimize(quantised)


@pytest.mark.parametrize(("make", "error", "message"), list(BAD_MODELS.values()), ids=list(BAD_MODELS))
def test_unsupported_models_are_named(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastcls.optimize(make())


@pytest.mark.parametrize(
    ("last_layer", "sentences"),
    [("absorbed", 96), *(pytest.param(rung, 872, marks=pytest.mark.full) for rung in RUNGS)],
)
def test_real_weights_on_real_sentences(
    device: str,
    last_layer: LastLayer,
    sentences: int,
    minilm_sst2: Any,
    minilm_tokenizer: PreTrainedTokenizerBase,
    sst2: Callable[[str], Sentences],
) -> None:
    texts, labels = (each[:sentences] for each in sst2("dev"))
    model = copy.deepcopy(minilm_sst2).to(device)
    fast = fastcls.optimize(model, last_layer=last_layer)
    right = 0
    for start in range(0, len(texts), 32):
        inputs = minilm_tokenizer(texts[start : start + 32], padding=True, return_tensors="pt").to(device)
        expected, actual = logits_of(model, **inputs).cpu(), logits_of(fast, **inputs).cpu()
        assert float((actual - expected).abs().max()) <= 1e-5
        assert torch.equal(actual.argmax(1), expected.argmax(1))
        right += int((actual.argmax(1) == torch.tensor(labels[start : start + 32])).sum())
    assert right / len(texts) > 0.6, "a classifier that has learnt nothing would prove nothing"


@pytest.mark.full
def test_not_one_label_changes_on_sst2(
    minilm_sst2: Any,
    minilm_tokenizer: PreTrainedTokenizerBase,
    sst2: Callable[[str], Sentences],
) -> None:
    texts = [text for split in ("train", "dev", "test") for text in sst2(split).texts]
    fast = fastcls.optimize(minilm_sst2)
    ids = minilm_tokenizer(texts)["input_ids"]
    order = sorted(range(len(texts)), key=lambda index: len(ids[index]))
    expected = torch.empty(len(texts), 2)
    for start in range(0, len(order), 64):
        rows = order[start : start + 64]
        inputs = minilm_tokenizer([texts[row] for row in rows], padding=True, return_tensors="pt")
        expected[rows] = logits_of(minilm_sst2, **inputs)
    actual = fast.logits_of(ids)
    assert len(texts) > 9000
    assert float((actual - expected).abs().max()) <= 1e-5
    assert int((actual.argmax(1) != expected.argmax(1)).sum()) == 0


@pytest.mark.full
def test_real_weights_in_bfloat16_are_as_exact_as_transformers(
    minilm_sst2: Any,
    minilm_tokenizer: PreTrainedTokenizerBase,
    sst2: Callable[[str], Sentences],
) -> None:
    inputs = minilm_tokenizer(sst2("dev").texts, padding=True, return_tensors="pt")
    exact = logits_of(copy.deepcopy(minilm_sst2).double(), **inputs)
    rounded = copy.deepcopy(minilm_sst2).to(torch.bfloat16)
    eager = logits_of(rounded, **inputs)
    actual = logits_of(fastcls.optimize(rounded), **inputs)
    assert_as_exact_as(actual, [eager], exact)
