"""Training a fast model: losses and gradients as the transformers model's own, for every family and every class."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from support import TINY_FAMILIES, tiny_model
from test_families import by_family_and_head
from torch import Tensor, nn

import fastcls
from fastcls.families import FAMILIES
from fastcls_benchmarks.training import kept_tensors
from fastcls_kernels.training import Dropout

CLASSES = [
    (family.model_type, model_class)
    for family in FAMILIES
    if family.model_type in TINY_FAMILIES
    for model_class in family.heads
    if hasattr(transformers, model_class)
]
# Of each family what differs by family, and of BERT every head.
ONE_OF_EACH_KIND = [each for each in CLASSES if each[0] == "bert" or each[1].endswith("ForSequenceClassification")]
# transformers computes their angles, or the scale of their scores, in float32 whatever the weights' dtype is.
ROUNDED = ("modernbert", "eurobert", "ultrabert", "esm", "deberta", "deberta-v2")
# Their eager attention gives NaN where a window holds padding alone, so these texts are of one length.
WINDOWED = ("modernbert", "ultrabert")
LENGTHS = (9, 1, 6, 14)


def inputs_of(model: Any, model_class: str, seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    """A padded batch with labels, as the class takes them."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    texts = len(lengths)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = integers(5, min(model.config.vocab_size, 60), *mask.shape)
    found = {"input_ids": ids.where(mask == 1, 1), "attention_mask": mask}
    if "MultipleChoice" in model_class:
        return {
            **{name: tensor.view(2, 2, -1) for name, tensor in found.items()},
            "labels": integers(0, 2, 2),
        }
    if "TokenClassification" in model_class:
        return {**found, "labels": integers(0, model.config.num_labels, *mask.shape).where(mask == 1, -100)}
    if "MaskedLM" in model_class:
        chosen = (integers(0, 3, *mask.shape) == 0) & (mask == 1)
        chosen[-1, 2] = True
        return {**found, "labels": ids.where(chosen, -100)}
    if "QuestionAnswering" in model_class:
        return {**found, "start_positions": torch.tensor([1, 0, 2, 5]), "end_positions": torch.tensor([3, 0, 2, 9])}
    if "NextSentence" in model_class:
        return {**found, "labels": integers(0, 2, texts)}
    if "SequenceClassification" in model_class:
        return {**found, "labels": integers(0, model.config.num_labels, texts)}
    return found


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """A number that all that the task reads of an output enters: some classes' own losses are in float32."""
    out = model(**inputs)
    total = torch.zeros((), dtype=torch.float64)
    mask = inputs["attention_mask"] == 1
    for name, found in out.items():
        if name == "loss":
            continue
        if found.shape[:2] == mask.shape:
            read = mask & (inputs["labels"] != -100) if "labels" in inputs and found.ndim == 3 else mask
            found = found[read]
        total = total + found.double().sin().sum()
    return total


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    loss = loss_of(model, inputs)
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}


def assert_alike(model: nn.Module, reference: nn.Module, inputs: dict[str, Tensor], bound: float) -> None:
    """Losses and gradients of two models in float64, up to a part of the largest."""
    expected, wanted = gradients(reference, inputs)
    loss, found = gradients(model, inputs)
    torch.testing.assert_close(loss, expected, rtol=bound, atol=bound)
    assert found.keys() == wanted.keys()
    largest = max(float(each.abs().max()) for each in wanted.values() if each is not None)
    for name, gradient in wanted.items():
        ours = found[name]
        if gradient is None or ours is None:
            # What no output depends on has a gradient of zero in one, and none in the other.
            for each in (gradient, ours):
                assert each is None or float(each.abs().max()) <= bound * largest, name
            continue
        assert float((ours - gradient).abs().max()) <= bound * largest, name


def scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of dropout every number is multiplied by 1 plus the rate: so the places and rates must be the same.

    To be called behind `fastcls.optimize`, which refuses a model whose functions were replaced.
    """

    def scaled(values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: ARG001
        return values * (1 + p) if training else values

    monkeypatch.setattr(torch.nn.functional, "dropout", scaled)
    monkeypatch.setattr(Dropout, "factor", property(lambda self: 1 + self.rate))
    monkeypatch.setattr(Dropout, "threshold", property(lambda _: -(2**31)))


def rates_of(model_type: str) -> dict[str, float]:
    """A different rate for each option of a config that is one."""
    config = transformers.AutoConfig.for_model(model_type).to_dict()
    options = sorted(
        name for name, value in config.items() if "dropout" in name and (value is None or isinstance(value, float))
    )
    # An option without a default.
    options += ["cls_dropout"] * model_type.startswith("deberta")
    return {name: 0.05 + 0.03 * index for index, name in enumerate(options)}


# Without dropout each family's classifiers alone, and all of BERT's: where numbers are dropped the rest runs, too.
WHOLE_OR_DROPPED = [
    pytest.param(*each, drops, marks=[] if drops or each in ONE_OF_EACH_KIND else [pytest.mark.full])
    for drops in (False, True)
    for each in CLASSES
]


@pytest.mark.covering(by=by_family_and_head, alone=["model_type", "head", "drops"])
@pytest.mark.parametrize(("model_type", "model_class", "drops"), WHOLE_OR_DROPPED)
def test_loss_and_gradients_are_the_models_own(
    monkeypatch: pytest.MonkeyPatch, model_type: str, model_class: str, drops: bool
) -> None:
    rates = rates_of(model_type)
    model = tiny_model(model_class, model_type, **(rates if drops else dict.fromkeys(rates, 0.0)))
    model.set_attn_implementation("eager")
    model = model.double()
    reference = copy.deepcopy(model).train()
    fast = fastcls.optimize(model).train()
    scale(monkeypatch)
    lengths = (max(LENGTHS),) * 4 if model_type in WINDOWED else LENGTHS
    assert_alike(
        fast, reference, inputs_of(model, model_class, lengths=lengths), 1e-5 if model_type in ROUNDED else 1e-10
    )


def quiet(model_class: str = "BertForSequenceClassification", family: str = "bert", **options: Any) -> Any:
    """A tiny model without dropout."""
    return tiny_model(model_class, family, **{**dict.fromkeys(rates_of(family), 0.0), **options})


def saved_bytes(model: Any, inputs: dict[str, Tensor]) -> tuple[int, list[torch.Size]]:
    """The bytes that a forward pass keeps for its backward pass, weights left out, and the shapes of what it keeps."""
    kept = kept_tensors(model, lambda: model(**inputs))
    return sum(each.untyped_storage().nbytes() for each in kept), [each.shape for each in kept]


def test_the_parameters_are_the_given_models() -> None:
    model = quiet()
    before = torch.optim.SGD(model.parameters(), lr=0.1)
    fast = fastcls.optimize(model).train()
    pairs = list(zip(fast.named_parameters(), model.named_parameters(), strict=True))
    assert all(ours[0] == theirs[0] and ours[1] is theirs[1] for ours, theirs in pairs)
    assert list(fast.state_dict()) == list(model.state_dict())
    inputs = inputs_of(model, "BertForSequenceClassification")
    old = float(fast(**inputs).loss.detach())
    fast(**inputs).loss.backward()
    before.step()
    assert float(fast(**inputs).loss.detach()) < old
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
    torch.testing.assert_close(fast.eval()(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert not fast(**inputs).logits.requires_grad


@pytest.mark.parametrize(
    ("model_class", "family"),
    [
        ("BertModel", "bert"),
        ("ModernBertModel", "modernbert"),
        ("ModernBertForSequenceClassification", "modernbert"),
        ("EuroBertForSequenceClassification", "eurobert"),
    ],
)
def test_modules_are_found_by_the_given_models_names(model_class: str, family: str) -> None:
    model = tiny_model(model_class, family)
    fast = fastcls.optimize(model)
    inner = fast.own_encoder
    fast.train()
    for name, module in model.named_children():
        assert getattr(fast, name) is module
    for name, module in model.named_modules():
        assert name == "" or fast.get_submodule(name) is module
    assert fast.own_encoder is inner
    copied = copy.deepcopy(fast)
    for name, module in copied.named_children():
        assert getattr(copied, name) is module is not getattr(model, name)


@pytest.mark.parametrize("steps", [50, pytest.param(200, marks=pytest.mark.full)])
def test_many_steps_give_the_models_losses(steps: int) -> None:
    model = quiet()
    reference = copy.deepcopy(model).train()
    fast = fastcls.optimize(model).train()
    losses: list[list[float]] = []
    for each in (reference, fast):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-4)
        losses.append([])
        for step in range(steps):
            loss = each(**inputs_of(model, "BertForSequenceClassification", seed=step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss.detach()))
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=1e-5)


def test_dropout_comes_again_with_its_seed_and_is_off_in_eval_mode() -> None:
    model = tiny_model("BertForSequenceClassification", "bert")
    fast = fastcls.optimize(model).train()
    inputs = inputs_of(model, "BertForSequenceClassification")

    def run(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        fast.zero_grad()
        fast(**inputs).loss.backward()
        return [weight.grad.clone() for weight in fast.parameters() if weight.grad is not None]

    first, again, other = run(1), run(1), run(2)
    # Bit for bit: the gradients are the same each time, too.
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    fast.eval()
    assert torch.equal(fast(**inputs).logits, fast(**inputs).logits)


def test_dropout_keeps_means_and_rates() -> None:
    dropout = Dropout(0.3, 123456789)
    rows, columns = torch.arange(500, dtype=torch.int32)[:, None], torch.arange(400, dtype=torch.int32)
    kept = dropout.kept(rows, columns).double()
    # Six standard errors of a mean over all, over rows and over columns.
    assert abs(float(kept.mean()) - 0.7) < 6 * (0.21 / kept.numel()) ** 0.5
    for axis, count in ((0, 500), (1, 400)):
        assert float((kept.mean(axis) - 0.7).abs().max()) < 6 * (0.21 / count) ** 0.5
    centred = kept - 0.7
    for shifted in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert abs(float(shifted.mean())) < 6 * 0.21 / shifted.numel() ** 0.5
    assert not torch.equal(kept, Dropout(0.3, 123456790).kept(rows, columns).double())


def test_a_model_that_nobody_else_holds_is_trained_and_saved(tmp_path: Any) -> None:
    fast = fastcls.optimize(quiet(pad_token_id=1)).train()
    inputs = inputs_of(fast, "BertForSequenceClassification")
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
    old = float(fast(**inputs).loss.detach())
    fast(**inputs).loss.backward()
    optimizer.step()
    assert float(fast(**inputs).loss.detach()) < old
    fast.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(fast.eval()(**inputs).logits, again(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_frozen_parts_have_no_gradient_and_the_others_the_same() -> None:
    model = quiet().double()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].requires_grad_(False)
    reference = copy.deepcopy(model).train()
    fast = fastcls.optimize(model).train()
    inputs = inputs_of(model, "BertForSequenceClassification")
    assert_alike(fast, reference, inputs, 1e-10)
    assert fast.bert.embeddings.word_embeddings.weight.grad is None

    assert saved_bytes(fast, inputs)[0] < saved_bytes(fastcls.optimize(quiet().double()).train(), inputs)[0]


def test_embeddings_that_a_caller_gives_have_a_gradient() -> None:
    model = quiet().double()
    reference = copy.deepcopy(model).train()
    fast = fastcls.optimize(model).train()
    inputs = inputs_of(model, "BertForSequenceClassification")
    ids = inputs.pop("input_ids")
    found = []
    for each in (reference, fast):
        given = reference.get_input_embeddings()(ids).detach().requires_grad_()
        each(inputs_embeds=given, **inputs).loss.backward()
        found.append(given.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("every", [1, 2])
def test_layers_that_are_computed_again_give_the_same_gradients(every: int) -> None:
    model = tiny_model("BertForSequenceClassification", "bert")
    fast = fastcls.optimize(model).train()
    inputs = inputs_of(model, "BertForSequenceClassification")

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        fast.zero_grad()
        fast(**inputs).loss.backward()
        return [weight.grad.clone() for weight in fast.parameters() if weight.grad is not None]

    expected, kept = run(), saved_bytes(fast, inputs)[0]
    fast.activation_checkpointing_enable(every_n_layers=every)
    assert fast.is_gradient_checkpointing
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    assert saved_bytes(fast, inputs)[0] < kept
    fast.activation_checkpointing_disable()
    assert not fast.is_gradient_checkpointing


def test_no_scores_are_kept_and_less_than_the_model_keeps() -> None:
    model = tiny_model("BertForSequenceClassification", "bert")
    length = 37
    ids = torch.randint(5, 60, (1, length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([1])}
    theirs, _ = saved_bytes(copy.deepcopy(model).train(), inputs)
    ours, shapes = saved_bytes(fastcls.optimize(model).train(), inputs)
    assert not any(shape.count(length) > 1 for shape in shapes)
    # Without any padding.
    assert ours < 0.75 * theirs


@pytest.mark.parametrize(
    ("model_class", "family"), [("BertForSequenceClassification", "bert"), ("ModernBertForMaskedLM", "modernbert")]
)
def test_the_trainer_trains_it_as_it_trains_the_model(tmp_path: Any, model_class: str, family: str) -> None:
    model = quiet(model_class, family)
    mask = torch.tensor([1, 1, 1, 1, 1, 0, 0])
    rows = []
    for row in range(8):
        ids = torch.arange(10 + row, 17 + row) * mask
        labels = ids.where((ids % 3 == row % 3) & (mask == 1), -100)
        label = labels if "Masked" in model_class else row % 2
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": label})

    def history(trained: Any, batch: int, batches: int) -> list[dict[str, float]]:
        arguments = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=batches, max_steps=3,
            logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, seed=1, save_strategy="no",
        )  # fmt: skip
        trainer = transformers.Trainer(model=trained, args=arguments, train_dataset=rows)
        trainer.train()
        steps = [{name: each[name] for name in ("loss", "grad_norm")} for each in trainer.state.log_history[:-1]]
        assert len(steps) == 3
        return steps

    expected = history(copy.deepcopy(model), 8, 1)
    for batch, batches in ((8, 1), (4, 2)):
        for ours, theirs in zip(
            history(fastcls.optimize(copy.deepcopy(model)).train(), batch, batches), expected, strict=True
        ):
            assert ours == pytest.approx(theirs, rel=1e-3)
    if "Masked" in model_class:
        # Weighted by the number of labels, as transformers weights them.
        assert history(copy.deepcopy(model), 4, 2)[0] == pytest.approx(expected[0], rel=1e-3)


@pytest.mark.parametrize(
    ("model_class", "family"),
    [
        ("BertForSequenceClassification", "bert"),
        ("ModernBertForSequenceClassification", "modernbert"),
        ("DebertaV2ForSequenceClassification", "deberta-v2"),
        ("EuroBertForSequenceClassification", "eurobert"),
    ],
)
def test_autocast_is_as_exact_as_the_models(model_class: str, family: str) -> None:
    model = quiet(model_class, family)
    inputs = inputs_of(model, model_class, lengths=(max(LENGTHS),) * 4)
    exact = copy.deepcopy(model).double().train()
    _, wanted = gradients(exact, inputs)
    fast = fastcls.optimize(model).train()
    wide = saved_bytes(fast, inputs)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert saved_bytes(fast, inputs)[0] < 0.8 * wide
    errors = []
    for each in (copy.deepcopy(model).train(), fast):
        with torch.autocast("cpu", torch.bfloat16):
            loss = each(**inputs).loss
        loss.backward()
        squares = []
        for name, weight in each.named_parameters():
            expected = wanted[name]
            if weight.grad is not None and expected is not None:
                squares.append(float((weight.grad.double() - expected).square().sum()))
        errors.append(sum(squares) ** 0.5)
    assert errors[1] <= 1.5 * errors[0]


def test_a_copy_trains_weights_of_its_own() -> None:
    fast = fastcls.optimize(quiet()).train()
    twin = copy.deepcopy(fast)
    assert twin.training
    inputs = inputs_of(fast, "BertForSequenceClassification")
    twin(**inputs).loss.backward()
    assert all(weight.grad is None for weight in fast.parameters())
    torch.optim.SGD(twin.parameters(), lr=1.0).step()
    assert not torch.equal(twin.eval()(**inputs).logits, fast.eval()(**inputs).logits)


def test_what_is_loaded_is_trained_on() -> None:
    fast = fastcls.optimize(quiet()).train()
    inputs = inputs_of(fast, "BertForSequenceClassification")
    saved = {name: weight.clone() for name, weight in fast.state_dict().items()}
    expected = fast(**inputs).loss.detach()
    with torch.no_grad():
        for weight in fast.parameters():
            weight.mul_(0.5)
    assert not torch.equal(fast(**inputs).loss, expected)
    fast.load_state_dict(saved)
    assert torch.equal(fast(**inputs).loss, expected)
    assert torch.equal(fast.train()(**inputs).loss, expected)


def test_what_training_passes_by_is_refused() -> None:
    fast = fastcls.optimize(quiet()).train()
    inputs = inputs_of(fast, "BertForSequenceClassification")
    with pytest.raises(RuntimeError, match="must be in eval mode for a method that takes lists of ids"):
        fast.logits_of([[1, 2]])
    fast.batch_invariant = True
    with pytest.raises(RuntimeError, match="batch_invariant must be False in training, got True"):
        fast(**inputs)
    fast.batch_invariant = False
    handle = fast.bert.encoder.layer[0].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"model\.bert\.encoder\.layer\.0 must have no hooks"):
        fast(**inputs)
    handle.remove()
    with pytest.raises(ValueError, match="offload must be False"):
        fast.activation_checkpointing_enable(offload=True)
    with pytest.raises(RuntimeError, match="stop_following must be left out"):
        fast.stop_following()
    other = quiet()
    other.dropout.p = 0.4
    with pytest.raises(
        RuntimeError, match=r"model\.dropout\.p must be 0\.0, as the config says, to be trained, got 0\.4"
    ):
        fastcls.optimize(other).train()
    model = quiet()
    replaced = fastcls.optimize(model).train()
    model.classifier = nn.Linear(64, 5)
    with pytest.raises(RuntimeError, match="was replaced since"):
        replaced(**inputs)


def test_second_derivatives_are_refused() -> None:
    fast = fastcls.optimize(quiet()).train()
    inputs = inputs_of(fast, "BertForSequenceClassification")
    weight = fast.bert.encoder.layer[0].output.dense.weight
    with pytest.raises(RuntimeError, match="create_graph must be False"):
        torch.autograd.grad(fast(**inputs).loss, weight, create_graph=True)


def test_an_optimizer_that_was_made_too_early_is_refused(tmp_path: Any) -> None:
    fast = fastcls.optimize(quiet())
    early = torch.optim.SGD(fast.parameters(), lr=0.1)
    inputs = inputs_of(fast, "BertForSequenceClassification")
    fast.train()(**inputs).loss.backward()
    with pytest.raises(RuntimeError, match="call train\\(\\) before the optimizer"):
        early.step()
    # Some other model's is none of its business.
    other = nn.Linear(2, 2)
    other(torch.ones(2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    rows = [
        {"input_ids": row, "attention_mask": mask, "labels": 1}
        for row, mask in zip(*list(inputs.values())[:2], strict=True)
    ]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no"
    )
    trainer = transformers.Trainer(model=fastcls.optimize(quiet()), args=arguments, train_dataset=rows)
    with pytest.raises(RuntimeError, match="call train\\(\\) before the optimizer"):
        trainer.train()


def test_quantised_products_are_not_trained() -> None:
    fast = fastcls.optimize(quiet())
    fast.quantize = "int8"
    with pytest.raises(RuntimeError, match="quantize must be None in training, got 'int8'"):
        fast.train()
    assert not fast.training
