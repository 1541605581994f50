"""Every family and every head against the transformers model that it replaces."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from support import MANY_LABELS, TINY_FAMILIES, CountTokenProducts, assert_as_exact_as, tiny_model
from torch import Tensor

import fastcls
from fastcls.engine.spec import LastLayer
from fastcls.families import FAMILIES, head_in
from fastcls_kernels import use_backend
from fastcls_kernels.runtime.tile_tables import use_tile

RUNGS = get_args(LastLayer)
CLASSES = [(name, family.model_type) for family in FAMILIES for name in family.heads]
CLASSIFIERS = [pair for pair in CLASSES if pair[0].endswith("ForSequenceClassification")]
FILLERS = [pair for pair in CLASSES if pair[0].endswith("ForMaskedLM")]
every_class = pytest.mark.parametrize(("model_class", "family"), CLASSES, ids=[name for name, _ in CLASSES])
every_classifier = pytest.mark.parametrize(
    ("model_class", "family"), CLASSIFIERS, ids=[name for _, name in CLASSIFIERS]
)
every_filler = pytest.mark.parametrize(("model_class", "family"), FILLERS, ids=[name for _, name in FILLERS])


def by_family_and_head(case: Mapping[str, Any]) -> dict[str, Any]:
    """A class told into what is its family's and what its head's, "" for an encoder without one."""
    others = {name: value for name, value in case.items() if name != "model_class"}
    return {"head": head_in(case["model_class"]), **others}


# For what is slow: the short run takes each family and each head once, not each class.
family_and_head = pytest.mark.covering(by=by_family_and_head, alone=["family", "head"])

# Families that compute what another does, but for names, embeddings and heads.
_PRE_NORM = ("megatron-bert", "roberta-prelayernorm", "xlm-roberta-xl")
_TWINS = {
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "data2vec-text", "ernie", "distilbert"), "bert"),
    **dict.fromkeys(("rembert", "albert"), "electra"),
    **dict.fromkeys(_PRE_NORM, "megatron-bert"),
    "nomic_bert": "gte",
}


def by_arithmetic(case: Mapping[str, Any]) -> dict[str, Any]:
    """A class told into what its layers compute, and what its head is."""
    others = {name: value for name, value in by_family_and_head(case).items() if name != "family"}
    return {"arithmetic": _TWINS.get(case["family"], case["family"]), **others}


# For what is slowest: the short run leaves out families that compute what another does.
arithmetic_and_head = pytest.mark.covering(by=by_arithmetic, alone=["arithmetic", "head"])
arithmetic = pytest.mark.covering(by=lambda case: {"arithmetic": _TWINS.get(case["family"], case["family"])})

LENGTH = 21
MASKS = {
    "right_padding": [[1] * LENGTH, [1] * 7 + [0] * 14, [1] + [0] * 20],
    "holes": [[1, 0, 1, 1, 0, 0, 1] + [1] * 14, [1, 1] + [0] * 18 + [1], [1, 0] * 10 + [1]],
    "all_tokens": [[1] * LENGTH] * 3,
    "none": None,
}
# What transformers itself computes in float32 whatever the model is in: rotary positions, DeBERTa's scale and norms,
# RMS norms and, between them, the softmax.
SINGLE_INSIDE = {
    "modernbert": 2e-5,
    "esm": 1e-6,
    "eurobert": 5e-6,
    "ultrabert": 5e-6,
    "deberta": 2e-6,
    "deberta-v2": 2e-6,
}
ANSWERS = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")


def in_float64(model: Any) -> Any:
    """A copy to hold others to. Eager's softmax over a window is float32, where float64's lowest number is -inf."""
    exact = copy.deepcopy(model).double()
    if exact.config.model_type in ("modernbert", "ultrabert"):
        exact.set_attn_implementation("sdpa")
    return exact


def batch(mask: str = "none", rows: int = 3, length: int = LENGTH, device: str = "cpu") -> dict[str, Tensor]:
    torch.manual_seed(1)
    inputs = {"input_ids": torch.randint(5, 199, (rows, length), device=device)}
    if MASKS[mask] is not None:
        inputs["attention_mask"] = torch.tensor(MASKS[mask], device=device)
    return inputs


def classifier_of(family: str) -> str:
    """The family's class for texts; the test is skipped where transformers is too old to have it."""
    found = next((name for name, of in CLASSIFIERS if of == family), None)
    return found or pytest.skip(f"transformers {transformers.__version__} has no {family}")


def shaped_for(model_class: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Multiple choice has a dimension more: here each text is one question with as many choices as there are rows."""
    if "MultipleChoice" not in model_class:
        return inputs
    return {name: tensor[None] for name, tensor in inputs.items()}


def answers(model: Any, inputs: dict[str, Tensor], **more: Any) -> dict[str, Tensor]:
    """All that a model answers, of tokens only those that the mask keeps."""
    with torch.no_grad():
        output = model(**inputs, **more)
    found = {}
    for name in ANSWERS:
        answer = getattr(output, name, None)
        if answer is None:
            continue
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if mask is not None and ids.ndim == 2 and answer.shape[:2] == ids.shape:
            answer = answer[mask.bool()]
        found[name] = answer
    return found


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float, what: str = "") -> None:
    assert actual.keys() == expected.keys()
    for name, answer in expected.items():
        assert actual[name].shape == answer.shape
        assert bool(torch.isfinite(actual[name]).all())
        scale = max(1.0, float(answer.abs().max()))
        assert float((actual[name] - answer).abs().max()) <= bound * scale, f"{name} {what}"
        assert float(answer.std()) > 0.01, "answers that do not differ would prove nothing"


def by_rung(model: Any, inputs: dict[str, Tensor], **options: Any) -> Iterator[tuple[LastLayer, dict[str, Tensor]]]:
    """What the fast model answers by each way of computing the last layer."""
    fast = fastcls.optimize(model, **options)
    for last_layer in RUNGS:
        fast.last_layer = last_layer
        yield last_layer, answers(fast, inputs)


@pytest.mark.covering(by=by_family_and_head, alone=["family", "head", "mask"])
@pytest.mark.parametrize("mask", list(MASKS))
@every_class
def test_exact_in_float64(model_class: str, family: str, mask: str) -> None:
    model = in_float64(tiny_model(model_class, family, attn_implementation="eager"))
    inputs = shaped_for(model_class, batch(mask))
    expected = answers(model, inputs)
    for last_layer, actual in by_rung(model, inputs):
        assert_close(actual, expected, SINGLE_INSIDE.get(family, 1e-12), last_layer)


@every_class
def test_answers_are_those_of_transformers(model_class: str, family: str, device: str) -> None:
    model = tiny_model(model_class, family, attn_implementation="eager").to(device)
    inputs = shaped_for(model_class, batch("right_padding", device=device))
    expected = answers(model, inputs)
    for last_layer, actual in by_rung(model, inputs):
        assert_close(actual, expected, 1e-5, last_layer)


def check_in_16_bits(model_class: str, family: str, dtype: torch.dtype, device: str) -> None:
    # Many labels, or, of one score a text, many texts.
    single = any(kind in model_class for kind in ("MultipleChoice", "NextSentence"))
    lengths = torch.tensor([30, 3, 17, 1, 25, 30, 22, 8] * (96 if single else 12))
    inputs = batch(rows=len(lengths), length=30, device=device)
    inputs["attention_mask"] = (torch.arange(30) < lengths[:, None]).long().to(device)
    inputs = shaped_for(model_class, inputs)
    labels = {} if single or "QuestionAnswering" in model_class else {"num_labels": MANY_LABELS}
    rounded = tiny_model(model_class, family, attn_implementation="eager", **labels).to(device, dtype)
    exact = answers(in_float64(rounded), inputs)
    eager = answers(rounded, inputs)
    for last_layer, actual in by_rung(rounded, inputs):
        for name, answer in actual.items():
            assert_as_exact_as(answer, [eager[name]], exact[name], f"{name} {last_layer}")


@arithmetic_and_head
@every_class
def test_as_exact_as_transformers_in_bfloat16(model_class: str, family: str, device: str) -> None:
    check_in_16_bits(model_class, family, torch.bfloat16, device)


@pytest.mark.full
@arithmetic_and_head
@every_classifier
def test_as_exact_as_transformers_in_float16(model_class: str, family: str, device: str) -> None:
    check_in_16_bits(model_class, family, torch.float16, device)


# The others take the same kernels as these, which the interpreter takes long for; a GPU takes them all.
KERNELS_OF_THEIR_OWN = ("mpnet", "modernbert", "deberta-v2", "eurobert", "esm", "esmc", "roformer")
INTERPRETED = ("bert", "distilbert", "albert", *KERNELS_OF_THEIR_OWN)


def by_kernels(case: Mapping[str, Any]) -> dict[str, str]:
    """A class as what its kernels are: the short run has the interpreter run each kind once."""
    device, family = case["kernel_device"], case["family"]
    is_own = device == "cuda" or family in KERNELS_OF_THEIR_OWN
    return {"device": device, "kernels": family if is_own else "bert"}


@pytest.mark.covering(by=by_kernels)
@every_classifier
def test_whole_classifier_through_the_kernels(kernel_device: str, model_class: str, family: str) -> None:
    if kernel_device == "cpu" and family not in INTERPRETED:
        pytest.skip("its kernels are those of BERT")
    model = tiny_model(model_class, family, attn_implementation="eager", num_hidden_layers=2).to(kernel_device)
    inputs = batch("holes", device=kernel_device)
    expected = answers(model, inputs)
    with use_backend("triton"):
        for last_layer, actual in by_rung(model, inputs):
            assert_close(actual, expected, 1e-5, last_layer)


@pytest.mark.covering(by=lambda case: {"device": case["kernel_device"]})
@every_filler
def test_masked_rows_through_the_kernels(kernel_device: str, model_class: str, family: str) -> None:
    if kernel_device == "cpu" and family not in INTERPRETED:
        pytest.skip("its kernels are those of BERT")
    model = tiny_model(model_class, family, attn_implementation="eager", num_hidden_layers=2).to(kernel_device)
    inputs = batch("holes", device=kernel_device)
    wanted = inputs["attention_mask"].bool() & (torch.arange(LENGTH, device=kernel_device) % 3 == 0)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(wanted, 4)
    with torch.no_grad():
        expected = {"logits": model(**inputs).logits[wanted]}
    with use_backend("triton"):
        for last_layer, actual in by_rung(model, inputs, mask_token_id=4, dense=False):
            assert_close(actual, expected, 1e-5, last_layer)


@every_classifier
def test_one_token_and_the_longest_text(model_class: str, family: str) -> None:
    model = tiny_model(model_class, family, attn_implementation="eager")
    # DeBERTa's distances have no end; here it goes on for more than twice as far as its config says.
    for length in (1, fastcls.optimize(model).spec.max_positions or 200):
        inputs = batch(length=length)
        expected = answers(model, inputs)
        for last_layer, actual in by_rung(model, inputs):
            assert_close(actual, expected, 1e-5, last_layer)


@every_classifier
def test_lists_of_ids_give_the_same_logits(model_class: str, family: str) -> None:
    fast = fastcls.optimize(tiny_model(model_class, family))
    inputs = batch("right_padding")
    lengths = inputs["attention_mask"].sum(1).tolist()
    ids = [row[:length] for row, length in zip(inputs["input_ids"].tolist(), lengths, strict=True)]
    assert_close({"logits": fast.logits_of(ids)}, answers(fast, inputs), 1e-5)


@pytest.mark.parametrize("mask", ["right_padding", "holes"])
@every_classifier
def test_embeddings_instead_of_ids(model_class: str, family: str, mask: str) -> None:
    if family == "esmc":
        pytest.skip("EsmcModel.forward takes none")
    model = tiny_model(model_class, family, attn_implementation="eager")
    fast = fastcls.optimize(model)
    kept = torch.tensor(MASKS[mask])
    embeds = torch.randn(3, LENGTH, fast.spec.embedding_size)
    with torch.no_grad():
        expected = model(inputs_embeds=embeds, attention_mask=kept).logits
        actual = fast(inputs_embeds=embeds, attention_mask=kept).logits
    assert_close({"logits": actual}, {"logits": expected}, 1e-5)


@every_classifier
def test_token_types_where_there_are_none_are_ignored(model_class: str, family: str) -> None:
    # Tokenizers make them whatever the model is.
    fast = fastcls.optimize(tiny_model(model_class, family))
    if fast.spec.token_types:
        pytest.skip("this family has token types")
    inputs = batch("right_padding")
    types = torch.ones_like(inputs["input_ids"])
    assert torch.equal(answers(fast, {**inputs, "token_type_ids": types})["logits"], answers(fast, inputs)["logits"])


@family_and_head
@every_class
def test_state_dict_has_the_checkpoints_names(model_class: str, family: str) -> None:
    model = tiny_model(model_class, family)
    fast = fastcls.optimize(model)
    ours, theirs = fast.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@family_and_head
@every_class
def test_checkpoints_load_and_round_trip(model_class: str, family: str, tmp_path: Path) -> None:
    model, other = tiny_model(model_class, family), tiny_model(model_class, family)
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    fast = fastcls.optimize(model)
    inputs = shaped_for(model_class, batch("right_padding"))
    # What was made from the weights before must not outlive them.
    answers(fast, inputs)
    assert fast.load_state_dict(other.state_dict()).missing_keys == []
    assert_close(answers(fast, inputs), answers(other, inputs), 1e-5)
    fast.save_pretrained(tmp_path)
    again = getattr(transformers, model_class).from_pretrained(tmp_path).eval()
    assert_close(answers(again, inputs), answers(other, inputs), 1e-6)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 48}
LLAMA3 = {**YARN, "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("bert", {"hidden_act": "relu"}),
        ("bert", {"hidden_act": "silu"}),
        ("bert", {"hidden_act": "gelu_pytorch_tanh"}),
        ("roberta", {"pad_token_id": 3}),
        ("albert", {"num_hidden_groups": 1, "inner_group_num": 1, "hidden_act": "gelu"}),
        ("albert", {"num_hidden_layers": 5, "num_hidden_groups": 3}),
        ("electra", {"embedding_size": 64}),
        ("modernbert", {"classifier_pooling": "mean"}),
        ("modernbert", {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True}),
        ("modernbert", {"layer_types": ["full_attention", "full_attention", "sliding_attention"]}),
        ("modernbert", {"layer_types": ["sliding_attention"] * 3, "classifier_pooling": "mean"}),
        ("modernbert", {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), YARN)}),
        ("gte", {"rope_parameters": YARN}),
        ("gte", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
        ("gte", {"type_vocab_size": 0}),
        ("gte", {"hidden_act": "silu"}),
        ("nomic_bert", {"rope_parameters": LLAMA3}),
        ("jina_embeddings_v3", {"hidden_act": "relu"}),
        ("eurobert", {"classifier_pooling": "bos", "num_key_value_heads": 4}),
        ("eurobert", {"classifier_pooling": "mean", "num_key_value_heads": 1}),
        ("eurobert", {"attention_bias": True, "mlp_bias": True}),
        ("ultrabert", {"classifier_pooling": "mean", "sliding_window": 2}),
        ("ultrabert", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
        ("esm", {"token_dropout": False}),
        ("esm", {"emb_layer_norm_before": True}),
        ("esm", {"position_embedding_type": "absolute", "emb_layer_norm_before": True}),
        ("ernie", {"use_task_id": False}),
        ("roformer", {"embedding_size": 64, "hidden_act": "relu"}),
        ("data2vec-text", {"pad_token_id": 3}),
        ("xlm-roberta-xl", {"pad_token_id": 3}),
        ("xmod", {"pre_norm": True, "ln_before_adapter": False}),
        ("xmod", {"pre_norm": True, "adapter_layer_norm": True, "adapter_reduction_factor": 4}),
        ("xmod", {"adapter_layer_norm": True, "ln_before_adapter": False, "hidden_act": "relu"}),
        ("esmc", {"num_hidden_layers": 5, "attention_bias": True, "mlp_bias": True}),
        ("deberta", {"pos_att_type": ["c2p"], "max_relative_positions": -1}),
        ("deberta", {"pos_att_type": ["p2c"], "num_attention_heads": 2}),
        ("deberta", {"position_biased_input": True, "type_vocab_size": 2, "pos_att_type": ["p2c", "c2p"]}),
        ("deberta", {"relative_attention": False, "pos_att_type": None, "position_biased_input": True}),
        ("deberta", {"relative_attention": False, "pos_att_type": None, "num_attention_heads": 1, "hidden_size": 16}),
        ("deberta-v2", {"share_att_key": False}),
        ("deberta-v2", {"pos_att_type": ["c2p"]}),
        ("deberta-v2", {"pos_att_type": ["p2c"]}),
        ("deberta-v2", {"position_buckets": -1, "norm_rel_ebd": "none"}),
        ("deberta-v2", {"position_buckets": -1, "max_relative_positions": 7}),
        ("deberta-v2", {"position_biased_input": True, "type_vocab_size": 2}),
        ("deberta-v2", {"relative_attention": False, "pos_att_type": None}),
        ("deberta-v2", {"conv_kernel_size": 3, "conv_act": "gelu"}),
        ("deberta-v2", {"conv_kernel_size": 5, "num_hidden_layers": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", ["right_padding", "holes"])
def test_options_of_a_config(family: str, overrides: dict[str, Any], mask: str) -> None:
    model_class = classifier_of(family)
    model = in_float64(tiny_model(model_class, family, attn_implementation="eager", **overrides))
    inputs = batch(mask)
    if model.config.to_dict().get("type_vocab_size", 0) == 2:
        inputs["token_type_ids"] = inputs["input_ids"] % 2
    expected = answers(model, inputs)
    for last_layer, actual in by_rung(model, inputs):
        assert_close(actual, expected, SINGLE_INSIDE.get(family, 1e-12), last_layer)


@pytest.mark.parametrize("family", ["roberta", "mpnet"])
def test_padding_tokens_that_are_kept_have_their_own_position(family: str) -> None:
    # RoBERTa's positions come from ids, not from the mask: without one padding is read, at a position of its own.
    model_class = classifier_of(family)
    model = tiny_model(model_class, family, attn_implementation="eager")
    fast = fastcls.optimize(model)
    inputs = batch()
    inputs["input_ids"][1, 4:] = fast.spec.padding_id
    inputs["input_ids"][2, [3, 9]] = fast.spec.padding_id
    expected = answers(model, inputs)
    assert_close(answers(fast, inputs), expected, 1e-5)
    assert_close({"logits": fast.logits_of(inputs["input_ids"].tolist())}, expected, 1e-5)


def test_positions_of_ones_own_turn_rotary_embeddings() -> None:
    model = tiny_model("ModernBertForSequenceClassification", "modernbert", attn_implementation="eager")
    fast = fastcls.optimize(model)
    inputs = {**batch("right_padding"), "position_ids": torch.arange(LENGTH).flip(0)[None] * 3}
    expected = answers(model, inputs)
    assert_close(answers(fast, inputs), expected, 1e-5)
    plain = answers(model, batch("right_padding"))["logits"]
    assert float((plain - expected["logits"]).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="position_ids must lie from 0 to 95"):
        fast(**{**inputs, "position_ids": inputs["position_ids"] * 9})


@pytest.mark.parametrize(
    ("family", "argument"),
    # RoFormer's own ignores positions, without a word.
    [("ernie", "task_type_ids"), ("roformer", "position_ids"), ("esmc", "sequence_id"), ("xmod", "lang_ids")],
    ids=str,
)
def test_arguments_that_are_not_every_familys_are_refused(family: str, argument: str) -> None:
    model_class = classifier_of(family)
    fast = fastcls.optimize(tiny_model(model_class, family))
    inputs = batch("right_padding")
    with pytest.raises(TypeError, match=rf"forward\(\) takes no argument {argument}"):
        fast(**inputs, **{argument: torch.ones_like(inputs["input_ids"])})


def test_a_layer_that_ends_with_an_adapter_leaves_no_norm_to_the_last_one(kernel_device: str) -> None:
    model = tiny_model("XmodForSequenceClassification", "xmod", num_hidden_layers=2).to(kernel_device)
    inputs = batch("right_padding", device=kernel_device)
    tile = {"NORM": True, "BLOCK_H": 16, "BLOCK_N": 16, "MAX_BLOCK_W": 64, "num_warps": 4, "num_stages": 1}
    expected = answers(model, inputs)
    with use_backend("triton"), use_tile("cls_attention", tile):
        assert_close(answers(fastcls.optimize(model), inputs), expected, 1e-5)


# Options that transformers reads at each call, and another value.
_READ_AT_CALLS: dict[str, dict[str, Any]] = {
    "albert": {"num_hidden_groups": 1},
    "modernbert": {"classifier_pooling": "mean"},
    "deberta": {"pooler_hidden_act": "relu"},
    "deberta-v2": {"pooler_hidden_act": "relu"},
    "gte": {"num_hidden_layers": 2},
    "nomic_bert": {"num_hidden_layers": 2},
    "jina_embeddings_v3": {"num_hidden_layers": 2},
    "eurobert": {"num_hidden_layers": 2},
    "ultrabert": {"layer_types": ["full_attention"] * 3},
    "roformer": {"hidden_act": "relu"},
    "xmod": {"default_language": "fr_XX"},
}
READ_AT_CALLS = {family: options for family, options in _READ_AT_CALLS.items() if family in TINY_FAMILIES}


@pytest.mark.parametrize("family", READ_AT_CALLS)
def test_options_that_transformers_reads_at_each_call_must_stay(family: str) -> None:
    model_class = classifier_of(family)
    model, ((option, other),) = tiny_model(model_class, family), READ_AT_CALLS[family].items()
    inputs, fast = batch("right_padding"), fastcls.optimize(model)
    before, given = answers(fast, inputs)["logits"], getattr(model.config, option)
    setattr(model.config, option, other)
    # It is another model now, or none.
    with contextlib.suppress(IndexError):
        assert float((answers(model, inputs)["logits"] - before).abs().max()) > 1e-3
    with pytest.raises(RuntimeError, match=rf"config\.{option} must stay .*{given!r}".replace("[", r"\[")):
        fast(**inputs)
    setattr(model.config, option, given)
    assert torch.equal(answers(fast, inputs)["logits"], before)


def test_families_name_all_that_transformers_reads_at_each_call() -> None:
    assert {family.model_type for family in FAMILIES if family.read_at_calls} == READ_AT_CALLS.keys()


@pytest.mark.parametrize("mask", ["none", "right_padding", "holes"])
@pytest.mark.parametrize("task", ["SequenceClassification", "MaskedLM"])
def test_masked_residues_scale_the_others(task: str, mask: str) -> None:
    model = in_float64(tiny_model(f"EsmFor{task}", "esm", attn_implementation="eager"))
    inputs = batch(mask)
    plain = answers(model, inputs)["logits"]
    kept = torch.ones(3, LENGTH, dtype=torch.bool) if MASKS[mask] is None else torch.tensor(MASKS[mask]).bool()
    chosen = kept & (torch.arange(LENGTH) % 4 == 2)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(chosen, model.config.mask_token_id)
    expected = answers(model, inputs)
    assert float((expected["logits"] - plain).abs().max()) > 1e-3
    for last_layer, actual in by_rung(model, inputs):
        assert_close(actual, expected, SINGLE_INSIDE["esm"], last_layer)


def test_masks_in_the_padding_of_proteins_are_refused() -> None:
    # transformers counts them among those that it scales the others for.
    fast = fastcls.optimize(tiny_model("EsmForSequenceClassification", "esm"))
    inputs = batch("right_padding")
    inputs["input_ids"][1, -1] = 2
    with pytest.raises(ValueError, match=r"input_ids must hold mask tokens \(2\) only where attention_mask is 1"):
        fast(**inputs)


def test_embeddings_of_proteins_are_the_first_layers_input() -> None:
    # Unlike BERT's: neither positions nor the norm behind them are added.
    special = {"position_embedding_type": "absolute", "emb_layer_norm_before": True}
    model = tiny_model("EsmForSequenceClassification", "esm", attn_implementation="eager", **special)
    inputs = {"inputs_embeds": torch.randn(3, LENGTH, 64), "attention_mask": torch.tensor(MASKS["right_padding"])}
    with torch.no_grad():
        expected = model(**inputs).logits
        actual = fastcls.optimize(model)(**inputs).logits
    assert float((actual - expected).abs().max()) <= 1e-5


def deberta_in_float32(**overrides: Any) -> Any:
    return tiny_model("DebertaV2ForSequenceClassification", "deberta-v2", attn_implementation="eager", **overrides)


@pytest.mark.parametrize("change", ["in_place", "another_tensor", "to_float64"])
def test_what_is_made_from_weights_follows_them(change: str) -> None:
    model = deberta_in_float32(conv_kernel_size=3)
    fast = fastcls.optimize(model)
    inputs = batch("right_padding")
    before = answers(fast, inputs)["logits"]
    if change == "to_float64":
        model, fast = model.double(), fast.double()
    else:
        for name in ("encoder.rel_embeddings.weight", "encoder.LayerNorm.bias", "encoder.conv.conv.weight"):
            weight = model.deberta.get_parameter(name)
            ours = next(each for each in fast.parameters() if each.data_ptr() == weight.data_ptr())
            if change == "in_place":
                with torch.no_grad():
                    ours.mul_(1.5)
            else:
                ours.data = weight.data = weight.data * 1.5
    expected = answers(model, inputs)
    assert_close(answers(fast, inputs), expected, 1e-5)
    assert change == "to_float64" or float((before - expected["logits"]).abs().max()) > 1e-3


# What an encoder makes of weights alone, and the weight or frequencies that it is made of.
MADE_OF_WEIGHTS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Tensor]]] = {
    "disentangled": (
        deberta_in_float32,
        lambda encoder: encoder.relative.of_layer(1),
        lambda encoder: encoder.relative.table_weight,
    ),
    "convolution": (
        lambda: deberta_in_float32(conv_kernel_size=3),
        lambda encoder: [encoder.convolution.matrix()],
        lambda encoder: encoder.convolution.kernel_weight,
    ),
    "convolution_of_one": (
        lambda: deberta_in_float32(conv_kernel_size=1),
        lambda encoder: [encoder.convolution.matrix()],
        lambda encoder: encoder.convolution.kernel_weight,
    ),
    "rotary": (
        lambda: tiny_model("ModernBertForSequenceClassification", "modernbert"),
        lambda encoder: encoder.rotary.tables("full_attention"),
        lambda encoder: encoder.rotary.full_attention,
    ),
}


@pytest.mark.parametrize("kind", MADE_OF_WEIGHTS)
def test_what_is_made_from_weights_is_made_once_and_keeps_its_memory(kind: str) -> None:
    make, made_by, made_of = MADE_OF_WEIGHTS[kind]
    fast = fastcls.optimize(make())
    inputs = batch("right_padding")
    with torch.inference_mode():
        first = answers(fast, inputs)["logits"].clone()
    made = [table.data_ptr() for table in made_by(fast.encoder)]
    assert torch.equal(answers(fast, inputs)["logits"], first)
    with torch.no_grad():
        made_of(fast.encoder).mul_(2)
    assert not torch.equal(answers(fast, inputs)["logits"], first)
    # A CUDA graph reads them where they were.
    assert [table.data_ptr() for table in made_by(fast.encoder)] == made
    # What is made is written to, and a weight may be a caller's.
    assert made_of(fast.encoder).data_ptr() not in made


def test_weights_that_were_replaced_stay_as_they_were() -> None:
    model = deberta_in_float32(conv_kernel_size=1)
    fast = fastcls.optimize(model)
    answers(fast, batch())
    given = dict(model.state_dict())
    before = {name: weight.clone() for name, weight in given.items()}
    model.load_state_dict({name: weight * 1.5 for name, weight in given.items()}, assign=True)
    assert_close(answers(fast, batch()), answers(model, batch()), 1e-4)
    assert all(torch.equal(weight, before[name]) for name, weight in given.items())


@pytest.mark.parametrize(
    ("family", "absorbed"), [("bert", 0), ("mpnet", 0), ("modernbert", 1), ("deberta-v2", 1)], ids=str
)
def test_the_last_layer_makes_no_values_and_keys_only_where_they_depend_on_positions(
    family: str, absorbed: int
) -> None:
    model_class = classifier_of(family)
    # What the compiled kernels multiply is not counted.
    fast = fastcls.optimize(tiny_model(model_class, family, num_hidden_layers=1), pack_weights=False)
    inputs = batch()
    answers(fast, inputs)
    with CountTokenProducts(tokens=3 * LENGTH) as counted:
        answers(fast, inputs)
    assert counted.count == absorbed


@every_classifier
def test_the_pass_reads_no_value(model_class: str, family: str, launches: list[Any]) -> None:
    fast = fastcls.optimize(tiny_model(model_class, family))
    (packed,) = fast.pack([[5, 6, 7], [8] * 20, [9]])
    fast = fast.to("meta")
    for fast.last_layer in RUNGS:
        with torch.no_grad():
            fast.encoder.prepare()
            logits = fast._compute(packed.to(torch.device("meta")), fast.head.spec.rows, fast.last_layer)
        assert logits.shape == (3, 3)
    assert len(launches) >= 3


def deberta_v2(**overrides: Any) -> Callable[[], Any]:
    return lambda: deberta_in_float32(**overrides)


def deberta(**overrides: Any) -> Callable[[], Any]:
    return lambda: tiny_model("DebertaForSequenceClassification", "deberta", **overrides)


def modernbert(**overrides: Any) -> Callable[[], Any]:
    return lambda: tiny_model("ModernBertForSequenceClassification", "modernbert", **overrides)


def roformer_edited() -> Any:
    # Its head would go by the config as it is now, its layers by the one that they were built from.
    model = tiny_model("RoFormerForSequenceClassification", "roformer")
    model.config.hidden_act = "relu"
    return model


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "another_activation": (
        lambda: tiny_model("BertForMaskedLM", "bert", hidden_act="mish"),
        ValueError,
        "config.hidden_act must be one of gelu, .*, got 'mish'",
    ),
    "another_pooler": (
        deberta_v2(pooler_hidden_act="leaky_relu"),
        ValueError,
        "config.pooler_hidden_act must be one of .*, got 'leaky_relu'",
    ),
    "another_rope": (
        modernbert(rope_parameters=dict.fromkeys(("full_attention", "sliding_attention"), DYNAMIC)),
        ValueError,
        "config.rope_parameters must have a rope_type of default, .*, got 'dynamic'",
    ),
    "differing_ropes": (
        modernbert(rope_parameters={"full_attention": YARN, "sliding_attention": {**YARN, "factor": 4.0}}),
        ValueError,
        "config.rope_parameters must give all kinds of layers one attention factor",
    ),
    "another_pooling": (
        lambda: tiny_model("EuroBertForSequenceClassification", "eurobert", classifier_pooling="max"),
        ValueError,
        "config.classifier_pooling must be 'bos', 'mean' or 'late', got 'max'",
    ),
    "proteins_that_are_folded": (
        lambda: tiny_model("EsmForSequenceClassification", "esm", position_embedding_type="relative_key"),
        ValueError,
        "config.position_embedding_type must be 'rotary' or 'absolute', got 'relative_key'",
    ),
    "terms_without_positions": (
        deberta_v2(relative_attention=False),
        ValueError,
        "config.pos_att_type must hold 'c2p' or 'p2c' just where config.relative_attention is True",
    ),
    "terms_that_are_only_counted": (
        deberta(pos_att_type=["c2p", "p2c", "p2p"]),
        ValueError,
        "config.pos_att_type must hold 'c2p', 'p2c' or both just where .*, got .*'p2p'.* with True",
    ),
    "terms_without_distances": (
        deberta(relative_attention=False),
        ValueError,
        "config.pos_att_type must hold 'c2p', 'p2c' or both just where .* with False",
    ),
    "heads_that_talk": (deberta(talking_head=True), ValueError, "config.talking_head must be False, got True"),
    "embeddings_of_another_width": (
        deberta(embedding_size=32),
        ValueError,
        "config.embedding_size must be 64, got 32",
    ),
    "even_convolution": (deberta_v2(conv_kernel_size=4), ValueError, "config.conv_kernel_size must be odd.*got 4"),
    "convolution_groups": (
        deberta_v2(conv_kernel_size=3, conv_groups=2),
        ValueError,
        "config.conv_groups must be 1, got 2",
    ),
    "another_summary": (
        lambda: tiny_model("ElectraForMultipleChoice", "electra", summary_type="mean"),
        ValueError,
        "config.summary_type must be 'first', got 'mean'",
    ),
    "last_column": (
        lambda: tiny_model("RoFormerForMultipleChoice", "roformer", summary_type="last"),
        ValueError,
        "config.summary_type must be 'first', got 'last'",
    ),
    "no_token_types": (
        lambda: tiny_model("BertForSequenceClassification", "bert", type_vocab_size=0),
        ValueError,
        r"token_type_embeddings\.weight must have a row at least, got shape \(0, 64\)",
    ),
    "heads_of_another_width": (
        lambda: tiny_model("EuroBertForSequenceClassification", "eurobert", head_dim=32),
        ValueError,
        "config.head_dim must be 16, got 32",
    ),
    "proteins_without_padding": (
        lambda: tiny_model(
            "EsmForSequenceClassification", "esm", position_embedding_type="absolute", pad_token_id=None
        ),
        ValueError,
        "config.pad_token_id must be a token where positions are absolute, got None",
    ),
    "values_that_turn": (
        lambda: tiny_model("RoFormerForSequenceClassification", "roformer", rotary_value=True),
        ValueError,
        "config.rotary_value must be False, got True",
    ),
    "two_activations": (roformer_edited, ValueError, "intermediate_act_fn must be .*ReLU.*, got .*GELU"),
    "no_language": (
        lambda: tiny_model("XmodForSequenceClassification", "xmod", default_language=None),
        ValueError,
        "config.default_language must be one of en_XX, de_DE, fr_XX, got None",
    ),
    "adapters_without_norms": (
        lambda: tiny_model("XmodForSequenceClassification", "xmod", adapter_reuse_layer_norm=False),
        ValueError,
        "config.adapter_reuse_layer_norm must be True where config.adapter_layer_norm is False, got False",
    ),
    "other_buckets": (
        lambda: tiny_model("MPNetForSequenceClassification", "mpnet", relative_attention_num_buckets=16),
        ValueError,
        "config.relative_attention_num_buckets must be 32, got 16",
    ),
    "heads_of_2": (
        lambda: tiny_model("DistilBertForSequenceClassification", "distilbert", num_attention_heads=32, n_heads=32),
        ValueError,
        "config.dim must be from 16 to 4096 in at most 64 heads of 4 to 128, got 64 / 32",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), list(REFUSED.values()), ids=list(REFUSED))
def test_what_is_not_computed_is_refused_by_name(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastcls.optimize(make())


def test_every_family_has_a_tiny_config() -> None:
    assert {family.model_type for family in FAMILIES} == TINY_FAMILIES.keys()
