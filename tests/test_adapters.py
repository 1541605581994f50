"""PEFT's adapters (LoRA) run in fast models: the same losses and gradients as PEFT over the transformers model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import tiny_model
from test_training import (
    CLASSES,
    LENGTHS,
    ONE_OF_EACH_KIND,
    ROUNDED,
    assert_alike,
    gradients,
    inputs_of,
    rates_of,
    scale,
)
from test_training_devices import error
from torch import Tensor, nn
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

import fastcls
from fastcls.engine.training import LowRank
from fastcls.engine.training.products import Products
from fastcls_benchmarks.training import kept_tensors
from fastcls_kernels import use_backend
from fastcls_kernels.runtime.backend import Backend

peft = pytest.importorskip("peft", reason="adapters need peft, which is not installed")

CLASSIFIER = "BertForSequenceClassification"


def linear_layers(model: nn.Module) -> list[str]:
    """The names of all linear layers but those whose weight is tied to another."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for weight in module.parameters(recurse=False):
            names.setdefault(id(weight), []).append(name)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and len(set(names[id(module.weight)])) == 1
    ]


def config_of(model: Any, **options: Any) -> Any:
    """Adapters that say something, on all layers that may have some."""
    defaults = {"r": 3, "lora_alpha": 5, "target_modules": linear_layers(model), "init_lora_weights": False}
    return peft.LoraConfig(**{**defaults, **options})


def quiet(model_class: str = CLASSIFIER, family: str = "bert", **options: Any) -> Any:
    """A tiny model without dropout."""
    return tiny_model(model_class, family, **dict.fromkeys(rates_of(family), 0.0), **options)


def adapted(model: Any, config: Any, way: str) -> tuple[Any, Any]:
    """PEFT's model over a transformers model, and a fast one with the same adapters, which is in training mode."""
    torch.manual_seed(0)
    reference = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
    if way == "optimized":
        return reference.train(), fastcls.optimize(copy.deepcopy(reference)).train()
    torch.manual_seed(0)
    return reference.train(), peft.get_peft_model(fastcls.optimize(copy.deepcopy(model)).train(), copy.deepcopy(config))


@pytest.mark.parametrize(
    ("model_type", "model_class"),
    [pytest.param(*each, marks=[] if each in ONE_OF_EACH_KIND else [pytest.mark.full]) for each in CLASSES],
)
@pytest.mark.parametrize(("way", "drops"), [("optimized", False), ("injected", True)])
@pytest.mark.covering(alone=["model_type", "model_class", "way", "drops"])
@pytest.mark.filterwarnings("ignore:layers of the head are not trained")
def test_loss_and_gradients_are_pefts_own(
    monkeypatch: pytest.MonkeyPatch, model_type: str, model_class: str, way: str, drops: bool
) -> None:
    rates = rates_of(model_type)
    model = tiny_model(model_class, model_type, **(rates if drops else dict.fromkeys(rates, 0.0)))
    model.set_attn_implementation("eager")
    model = model.double()
    config = config_of(model, lora_dropout=0.3 if drops else 0.0)
    reference, fast = adapted(model, config, way)
    scale(monkeypatch)
    bound = 1e-5 if model_type in ROUNDED else 1e-10
    inputs = inputs_of(
        model, model_class, lengths=(9, 9, 9, 9) if model_type in ("modernbert", "ultrabert") else (9, 1, 6, 14)
    )
    assert_alike(fast, reference, inputs, bound)


@pytest.fixture
def pair() -> tuple[Any, Any]:
    """PEFT's model over BERT with two adapters, and a fast one of the same, in eval mode."""
    model = quiet()
    torch.manual_seed(0)
    reference = peft.get_peft_model(
        model, config_of(model, task_type="SEQ_CLS", target_modules=["query", "value", "dense"])
    )
    reference.add_adapter("other", config_of(model, task_type="SEQ_CLS", target_modules=["key"], r=2))
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if "modules_to_save.other" in name:
                weight.add_(1)
    reference.eval()
    return reference, fastcls.optimize(copy.deepcopy(reference))


def use(model: nn.Module, names: list[str]) -> None:
    """Has each LoRA layer add what all these adapters say."""
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_adapter(names)


def assert_logits_alike(fast: Any, reference: Any) -> Tensor:
    inputs = inputs_of(reference, CLASSIFIER)
    with torch.no_grad():
        found, expected = fast(**inputs).logits, reference(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    return expected


def test_adapters_are_switched_merged_and_taken_away(pair: tuple[Any, Any]) -> None:
    reference, fast = pair
    answers = [assert_logits_alike(fast, reference)]

    def both(change: Any) -> None:
        for each in pair:
            change(each)
        answers.append(assert_logits_alike(fast, reference))

    both(lambda each: each.set_adapter("other"))
    assert float((answers[0] - answers[1]).abs().max()) > 0.1, "adapters that say the same would prove nothing"
    both(lambda each: each.set_adapter("default"))
    torch.testing.assert_close(answers[-1], answers[0])
    both(lambda each: use(each, ["default", "other"]))
    both(lambda each: use(each, ["default"]))
    with reference.disable_adapter(), fast.disable_adapter():
        off = assert_logits_alike(fast, reference)
    assert float((answers[0] - off).abs().max()) > 0.1
    assert_logits_alike(fast, reference)
    both(lambda each: each.merge_adapter())
    torch.testing.assert_close(answers[-1], answers[0], atol=1e-5, rtol=1e-5)
    both(lambda each: each.unmerge_adapter())
    both(lambda each: each.delete_adapter("other"))
    for each in pair:
        each.base_model.merge_and_unload()
    assert_logits_alike(fast.base_model.model, reference.base_model.model)


def test_adapters_are_the_given_models(pair: tuple[Any, Any]) -> None:
    _, given = pair
    fast = fastcls.optimize(given_of := copy.deepcopy(pair[0]))
    assert {id(each) for each in fast.parameters()} == {id(each) for each in given_of.parameters()}
    with torch.no_grad():
        for name, weight in given_of.named_parameters():
            if "lora_B.default" in name:
                weight.mul_(-2)
    assert_logits_alike(fast, given_of)
    assert type(given) is type(pair[0])


def test_an_adapter_that_comes_later_is_seen() -> None:
    model = quiet().eval()
    fast = fastcls.optimize(model)
    before = assert_logits_alike(fast, model)
    around = peft.get_peft_model(model, config_of(model, task_type="SEQ_CLS"))
    after = assert_logits_alike(fast, around.eval())
    assert float((before - after).abs().max()) > 0.01
    again = fastcls.optimize(model)
    assert_logits_alike(again, around)
    around.unload()
    torch.testing.assert_close(assert_logits_alike(fast, around.base_model.model).shape, before.shape)


def test_training_changes_adapters_alone_and_they_are_saved(tmp_path: Path) -> None:
    model = quiet()
    config = config_of(model, task_type="SEQ_CLS", target_modules=["query", "value"])
    reference, fast = adapted(model, config, "injected")
    inputs = inputs_of(model, CLASSIFIER)
    frozen = {name: weight.clone() for name, weight in fast.named_parameters() if not weight.requires_grad}
    losses: list[list[float]] = []
    for each in (reference, fast):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2)
        losses.append([])
        for _ in range(8):
            loss = each(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1][-1] < losses[1][0]
    assert all(torch.equal(weight, frozen[name]) for name, weight in fast.named_parameters() if name in frozen)
    expected = assert_logits_alike(fast.eval(), reference.eval())
    fast.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quiet_again(model), tmp_path).eval()
    torch.testing.assert_close(assert_logits_alike(fastcls.optimize(loaded), loaded), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(assert_logits_alike(loaded, reference), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.full
def test_dropout_of_adapters_is_drawn_anew_for_each_layer_and_comes_again_with_its_seed() -> None:
    model = quiet("AlbertForSequenceClassification", "albert")
    reference, fast = adapted(model, config_of(model, task_type="SEQ_CLS", lora_dropout=0.4), "injected")
    inputs = inputs_of(model, CLASSIFIER)

    def answer(seed: int) -> Tensor:
        torch.manual_seed(seed)
        logits: Tensor = fast(**inputs).logits
        return logits.detach()

    first = answer(0)
    assert torch.equal(answer(0), first)
    assert not torch.allclose(answer(1), first, atol=1e-3)
    # As many of PEFT's own answers have the same mean.
    found = torch.stack([answer(seed) for seed in range(100)])
    with torch.no_grad():
        theirs = torch.stack([reference(**inputs).logits for _ in range(100)])
    spread = (found.var(0) + theirs.var(0)).sqrt() / len(found) ** 0.5
    assert float(((found.mean(0) - theirs.mean(0)).abs() / spread).max()) < 5
    torch.testing.assert_close(found.std(0), theirs.std(0), rtol=0.35, atol=0)
    grads = []
    for every in (0, 1):
        fast.base_model.model.checkpointed_layers = every
        fast.zero_grad()
        torch.manual_seed(3)
        fast(**inputs).loss.backward()
        grads.append([weight.grad.clone() for weight in fast.parameters() if weight.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_sums_before_the_product_are_sums_behind_it(rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((24, 10), (7, 10)))
    adapters = {
        "qkv_weight": [
            LowRank(
                torch.randn(3, 10, generator=generator).double(), torch.randn(8, 3).double(), first, rate, seed=first
            )
            for first in (0, 16)
        ]
    }
    products = Products({"qkv_weight": weight}, adapters, torch.float64, use=2)
    part = slice(8, 24)
    carried, joined = products.carrying("qkv", rows, part)
    shares = torch.rand(1, 7, generator=generator, dtype=torch.float64)
    expected = shares @ products.linear("qkv", rows, part)
    torch.testing.assert_close(shares @ carried @ joined.T, expected)
    plain = Products({"qkv_weight": weight}, {}, torch.float64).linear("qkv", rows, part)
    assert float((shares @ plain - expected).abs().max()) > 0.1


def test_each_use_of_an_adapter_drops_other_numbers() -> None:
    # Layers may share adapters, and DeBERTa's distances go through those of the tokens.
    weight, rows = torch.zeros(8, 10), torch.ones(4, 10)
    adapters = {"qkv_weight": [LowRank(torch.ones(2, 10), torch.ones(8, 2), 0, 0.5, seed=7)]}
    found = [
        Products({"qkv_weight": weight}, adapters, torch.float32, use).linear("qkv", rows, of_positions=of_positions)
        for use in range(3)
        for of_positions in (False, True)
    ]
    assert all(not torch.equal(one, other) for at, one in enumerate(found) for other in found[:at])
    again = Products({"qkv_weight": weight}, adapters, torch.float32, 2).linear("qkv", rows, of_positions=True)
    assert torch.equal(again, found[-1])


def test_a_frozen_weight_keeps_no_rows() -> None:
    model = quiet()
    inputs = inputs_of(model, CLASSIFIER)
    _, fast = adapted(model, config_of(model, task_type="SEQ_CLS", target_modules=["query"]), "injected")
    whole = fastcls.optimize(quiet()).train()

    def kept(each: Any) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in kept_tensors(each, lambda: each(**inputs)))

    assert kept(fast) < kept(whole)


@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits_are_as_exact_as_pefts(autocast: bool) -> None:
    model = quiet(hidden_size=128, num_attention_heads=4)
    config = config_of(model, task_type="SEQ_CLS")
    exact, _ = adapted(model.double(), config, "optimized")
    model = model.to(torch.float32 if autocast else torch.bfloat16)
    reference, fast = adapted(model, config, "optimized")
    weights = {name: weight.double() for name, weight in reference.state_dict().items()}
    exact.load_state_dict(weights)
    inputs = inputs_of(model, CLASSIFIER)

    def found(each: Any) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and each is not exact):
            logits = each(**inputs).logits
        logits.double().sin().sum().backward()
        return [weight.grad.double() for weight in each.parameters() if weight.grad is not None]

    expected, theirs, ours = (found(each) for each in (exact, reference, fast))
    errors = [
        float(torch.cat([(one - other).flatten() for one, other in zip(grads, expected, strict=True)]).norm())
        for grads in (theirs, ours)
    ]
    assert errors[1] <= 1.25 * errors[0]


def test_the_trainer_trains_adapters(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate, which is not installed")
    model = quiet()
    config = config_of(model, task_type="SEQ_CLS", target_modules=["query", "value"])
    inputs = inputs_of(model, CLASSIFIER)
    rows = [{name: tensor[index] for name, tensor in inputs.items()} for index in range(4)]
    losses = []
    for each in adapted(model, config, "optimized"):
        arguments = transformers.TrainingArguments(
            str(tmp_path), num_train_epochs=3, per_device_train_batch_size=2, report_to="none", use_cpu=True,
            disable_tqdm=True, logging_steps=1, save_strategy="no", learning_rate=1e-2, seed=0,
            gradient_checkpointing=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model=each, args=arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(losses[0]) == 6


UNTAKEN = {
    "dora": ({"use_dora": True}, ValueError, "must be plain LoRA, got Dora"),
    "bias": ({"lora_bias": True}, ValueError, "must have lora_bias=False"),
    "embeddings": ({"target_modules": ["word_embeddings"]}, ValueError, "word_embeddings must be a Embedding.*merge"),
}


@pytest.mark.parametrize(("options", "error", "message"), list(UNTAKEN.values()), ids=list(UNTAKEN))
def test_adapters_that_are_not_computed_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = quiet()
    with pytest.raises(error, match=message):
        fastcls.optimize(peft.get_peft_model(model, config_of(model, **{"target_modules": ["query"], **options})))


def test_adapters_of_other_kinds_are_refused() -> None:
    model = quiet()
    config = peft.IA3Config(target_modules=["query"], feedforward_modules=[])
    with pytest.raises(TypeError, match="must have adapters of LoRA, got a PeftModel of IA3: merge adapters"):
        fastcls.optimize(peft.get_peft_model(model, config))


def test_an_adapter_of_a_tied_weight_leaves_the_other_alone() -> None:
    model = quiet("BertForMaskedLM")
    reference, fast = adapted(model, config_of(model, target_modules=["decoder"]), "optimized")
    inputs = {name: tensor for name, tensor in inputs_of(model, "BertForMaskedLM").items() if name != "labels"}
    with torch.no_grad():
        found, expected = (each.eval()(**inputs).logits for each in (fast, reference))
    kept = inputs["attention_mask"] == 1
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-5, rtol=1e-5)


def test_what_pefts_model_gives_is_not_the_fast_ones(pair: tuple[Any, Any], tmp_path: Path) -> None:
    _, fast = pair
    inner = fast.base_model.model
    with pytest.raises(RuntimeError, match="a checkpoint must be made of a model without adapters"):
        inner.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="a copy, or a pickle, must be made of a model without adapters"):
        copy.deepcopy(fast)
    with pytest.raises(ValueError, match="release must be False for a model with adapters"):
        fastcls.optimize(pair[0], release=True)


def test_hooks_on_adapters_are_refused(pair: tuple[Any, Any]) -> None:
    _, fast = pair
    fast.train()
    layer = next(module for module in fast.modules() if isinstance(module, peft.tuners.lora.LoraLayer))
    layer.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="must have no hooks"):
        fast(**inputs_of(pair[0], CLASSIFIER))


@pytest.mark.parametrize(
    ("family", "model_class", "names"),
    [
        ("deberta-v2", "DebertaV2ForSequenceClassification", ["pooler.dense"]),
        ("modernbert", "ModernBertForSequenceClassification", ["head.dense", "head.norm"]),
        ("eurobert", "EuroBertForSequenceClassification", ["dense"]),
        ("bert", CLASSIFIER, []),
    ],
)
def test_layers_of_a_head_that_peft_does_not_save_are_named(
    family: str, model_class: str, names: list[str], recwarn: pytest.WarningsRecorder
) -> None:
    model = quiet(model_class, family)
    targets = [name for name in linear_layers(model) if "layers." in name or "layer." in name]
    _, fast = adapted(model, config_of(model, task_type="SEQ_CLS", target_modules=targets), "optimized")
    fast(**inputs_of(model, model_class))
    said = [str(each.message) for each in recwarn if "PEFT does not save them" in str(each.message)]
    assert bool(said) is bool(names)
    for name in names:
        assert f'"{name}"' in said[0]
    _, fast = adapted(
        model, config_of(model, task_type="SEQ_CLS", target_modules=targets, modules_to_save=names or None), "optimized"
    )
    recwarn.clear()
    fast(**inputs_of(model, model_class)).loss.backward()
    assert not [each for each in recwarn if "PEFT does not save them" in str(each.message)]


def quiet_again(model: Any) -> Any:
    """Another model with the same weights."""
    again = type(model)(model.config)
    again.load_state_dict(
        {
            name.replace(".base_layer", "").replace("original_module.", ""): weight
            for name, weight in model.state_dict().items()
            if "lora" not in name and "modules_to_save" not in name
        }
    )
    return again


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "model_class"),
    [
        ("bert", CLASSIFIER),
        # Slow in the interpreter; the kernels without adapters, and the adapters without kernels, run it, too.
        pytest.param("deberta-v2", "DebertaV2ForSequenceClassification", marks=pytest.mark.full),
    ],
)
@pytest.mark.filterwarnings("ignore:layers of the head are not trained")
def test_the_kernels_give_the_gradients_of_the_torch_path(family: str, model_class: str, kernel_device: str) -> None:
    rates = rates_of(family)
    # A layer for all rows, and the last one.
    model = tiny_model(model_class, family, **rates, num_hidden_layers=2)
    _, fast = adapted(model, config_of(model, task_type="SEQ_CLS", lora_dropout=0.3), "optimized")
    _, wide = adapted(model.double(), config_of(model, task_type="SEQ_CLS", lora_dropout=0.3), "optimized")
    wide.load_state_dict({name: weight.double() for name, weight in fast.state_dict().items()})
    errors = []
    # Several, since the rounding of one batch's logits weighs on all its gradients.
    for seed in range(3):
        # In rising order, since the torch path sorts texts, and the kernels do not: a seed drops what lies in a row.
        inputs = inputs_of(model, model_class, seed, lengths=tuple(sorted(LENGTHS))[1:3])
        found = []
        runs: tuple[tuple[Any, Backend, str], ...] = (
            *((wide, "torch", "cpu"), (fast, "torch", "cpu")),
            (fast, "triton", kernel_device),
        )
        for each, backend, device in runs:
            each.to(device).zero_grad()
            with use_backend(backend):
                torch.manual_seed(seed)
                found.append(gradients(each, {name: tensor.to(device) for name, tensor in inputs.items()})[1])
        errors.append([error(each, found[0]) ** 2 for each in found[1:]])
    eager, kernels = (sum(each) for each in zip(*errors, strict=True))
    assert kernels**0.5 <= 1.5 * eager**0.5


def test_a_fused_step_of_adapters_alone_is_seen_in_eval_mode() -> None:
    model = quiet()
    reference, fast = adapted(model, config_of(model, task_type="SEQ_CLS", target_modules=["query"]), "optimized")
    given = [weight for name, weight in fast.named_parameters() if "lora_B" in name]
    for each in (reference, fast):
        each.eval()
    before = assert_logits_alike(fast, reference)
    # The optimizer holds no other weight, and writes without counting changes.
    optimizer = torch.optim.SGD(given, lr=1.0, fused=True)
    for weight in given:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if "lora_B" in name:
                weight.sub_(1)
    assert float((assert_logits_alike(fast, reference) - before).abs().max()) > 0.01


def test_adapters_in_the_place_of_others_are_seen(pair: tuple[Any, Any]) -> None:
    reference, fast = pair
    for seed in range(12):
        for each in pair:
            each.delete_adapter("other")
            torch.manual_seed(seed)
            each.add_adapter("other", config_of(each, task_type="SEQ_CLS", target_modules=["key"], r=2))
            each.set_adapter("other")
        assert_logits_alike(fast, reference)
    for each in pair:
        for name, weight in each.named_parameters():
            if "lora_A.other" in name:
                weight.data = weight.data * -3
    assert_logits_alike(fast, reference)


@pytest.mark.parametrize(
    ("family", "model_class", "whole"),
    [("roberta", "RobertaForSequenceClassification", None), ("bert", CLASSIFIER, ["pooler"])],
)
def test_modules_with_modules_inside_are_trained_whole(family: str, model_class: str, whole: list[str] | None) -> None:
    model = quiet(model_class, family)
    config = config_of(model, task_type="SEQ_CLS", target_modules=["query"], modules_to_save=whole)
    reference, fast = adapted(model, config, "optimized")
    for each in (reference, fast):
        torch.manual_seed(1)
        each.add_adapter("other", copy.deepcopy(config))
        with torch.no_grad():
            for name, weight in each.named_parameters():
                if "modules_to_save.other" in name:
                    weight.add_(0.1)
        each.eval()
    first = assert_logits_alike(fast, reference)
    for each in (reference, fast):
        each.set_adapter("other")
    assert float((assert_logits_alike(fast, reference) - first).abs().max()) > 0.01
    with reference.disable_adapter(), fast.disable_adapter():
        assert_logits_alike(fast, reference)


def test_a_head_of_our_own_attributes_name_is_put_in_place() -> None:
    model = quiet("ModernBertForSequenceClassification", "modernbert")
    config = config_of(model, task_type="SEQ_CLS", target_modules=["Wqkv"], modules_to_save=["head"])
    reference, fast = adapted(model, config, "optimized")
    for each in (reference, fast):
        each.eval()
    assert_logits_alike(fast, reference)
    merged = [each.merge_and_unload() for each in (fast, reference)]
    assert_logits_alike(*merged)


@pytest.mark.parametrize("later", [False, True])
def test_adapters_outlive_the_model_that_they_were_added_to(later: bool) -> None:
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as refusal:
        # That is for `model.add_adapter`; PEFT's own functions take every version.
        pytest.skip(f"transformers {transformers.__version__}: {refusal}")
    model = quiet().eval()
    config = config_of(model, target_modules=["query"])
    torch.manual_seed(0)
    reference = copy.deepcopy(model)
    reference.add_adapter(config)
    fast = fastcls.optimize(model) if later else None
    torch.manual_seed(0)
    model.add_adapter(copy.deepcopy(config))
    fast = fast or fastcls.optimize(model)
    assert_logits_alike(fast, reference)
    del model
    assert_logits_alike(fast, reference)
    names = [name for name, weight in fast.train().named_parameters() if weight.requires_grad]
    assert names == [name for name, weight in reference.named_parameters() if weight.requires_grad]
    assert all("lora" in name for name in names)


def test_another_forward_of_an_adapted_layer_is_refused(pair: tuple[Any, Any]) -> None:
    reference, fast = pair
    inputs = {name: tensor for name, tensor in inputs_of(reference, CLASSIFIER).items() if name != "labels"}
    layer = fast.base_model.model.bert.encoder.layer[0].attention.self.query
    layer.forward = lambda rows: 2 * layer.base_layer(rows)
    for mode in (False, True):
        with pytest.raises(
            RuntimeError, match=r"model.bert.encoder.layer.0.attention.self.query must have no .*forward"
        ):
            fast.train(mode)(**inputs)


def test_eval_mode_between_a_pass_and_its_gradients() -> None:
    model = quiet()
    reference, fast = adapted(model, config_of(model, task_type="SEQ_CLS"), "optimized")
    inputs = inputs_of(model, CLASSIFIER)
    for each in (reference, fast):
        loss = each(**inputs).loss
        with torch.no_grad():
            each.eval()(**inputs)
        each.train()
        loss.backward()
    for (name, ours), (_, theirs) in zip(fast.named_parameters(), reference.named_parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-3, rtol=1e-4, msg=name)


def test_export_of_what_is_trained_is_refused(pair: tuple[Any, Any]) -> None:
    _, fast = pair
    inputs = {name: tensor for name, tensor in inputs_of(pair[0], CLASSIFIER).items() if name != "labels"}
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"export copy.deepcopy\(fast\), or of a model with adapters"),
    ):
        torch.export.export(fast.base_model.model, (), inputs)
    plain = fastcls.optimize(quiet()).train().eval()
    with torch.no_grad():
        program = torch.export.export(copy.deepcopy(plain), (), inputs)
        torch.testing.assert_close(program.module()(**inputs).logits, plain(**inputs).logits)


def test_the_given_model_stays_in_its_mode_and_keeps_its_hooks_to_itself() -> None:
    model = quiet()
    given = peft.get_peft_model(model, config_of(model, task_type="SEQ_CLS", lora_dropout=0.5)).train()
    fast = fastcls.optimize(given)
    assert all(module.training for module in given.modules())
    assert not fast.training
    called: list[int] = []
    handle = fast.register_forward_hook(lambda *_: called.append(1))
    inputs = inputs_of(model, CLASSIFIER)
    given(**inputs)
    assert not called
    with torch.no_grad():
        fast(**inputs)
    assert called == [1]
    handle.remove()


def test_weight_and_adapters_are_rounded_once() -> None:
    model = quiet().bfloat16()
    given = peft.get_peft_model(model, config_of(model, target_modules=["query"])).eval()
    given.add_adapter("other", config_of(given, target_modules=["query"], r=5))
    use(given, ["default", "other"])
    fast = fastcls.optimize(given)
    fast(**{name: tensor for name, tensor in inputs_of(model, CLASSIFIER).items() if name != "labels"})
    layer = given.base_model.model.bert.encoder.layer[0].attention.self.query
    exact = layer.base_layer.weight.double() + sum(layer.get_delta_weight(name).double() for name in layer.lora_A)
    ours = fast.base_model.model.own_encoder.layers[0].qkv_weight[:64]
    # Half a step of bfloat16.
    assert float(((ours.double() - exact).abs() / exact.abs()).max()) <= 2**-8 * 1.02
