"""What people do with a transformers model, and its fast one goes along with or refuses by name."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from support import TINY_FAMILIES, tiny_bert, tiny_model
from test_families import CLASSES, every_class, family_and_head, shaped_for
from torch import Tensor, nn

import fastcls
from fastcls.engine.spec import LastLayer
from fastcls.models import TASKS
from fastcls_kernels import use_backend

IDS = torch.tensor([[5, 17, 33, 8, 90, 12], [7, 7, 150, 21, 3, 66], [9, 8, 7, 6, 5, 4]])


def labels_of(model: Any) -> dict[str, Tensor]:
    parameters = inspect.signature(model.forward).parameters
    if "start_positions" in parameters:
        return {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 4, 5])}
    name = type(model).__name__
    if "MultipleChoice" in name:
        return {"labels": torch.tensor([1])}
    by_token = "TokenClassification" in name or "MaskedLM" in name
    return {"labels": IDS % 2 if by_token else torch.tensor([0, 1, 1])} if "labels" in parameters else {}


@family_and_head
@every_class
def test_outputs_have_the_type_items_and_tuple_of_transformers(model_class: str, family: str) -> None:
    model = tiny_model(model_class, family)
    fast = fastcls.optimize(model)
    inputs: dict[str, Any] = shaped_for(model_class, {"input_ids": IDS})
    for more in ({}, labels_of(model)):
        with torch.no_grad():
            expected, actual = model(**inputs, **more), fast(**inputs, **more)
            expected_tuple, actual_tuple = (
                model(**inputs, **more, return_dict=False),
                fast(**inputs, **more, return_dict=False),
            )
        assert isinstance(actual, type(expected))
        assert list(actual.keys()) == list(expected.keys())
        # Fields that are None are there to be asked for, too.
        assert all(hasattr(actual, name) for name in vars(expected))
        assert len(actual_tuple) == len(expected_tuple)
        for got, wanted in zip(actual_tuple, expected_tuple, strict=True):
            assert float((got - wanted).abs().max()) <= 1e-4
    assert fast.num_parameters() == model.num_parameters()
    if "MaskedLM" not in model_class:
        # Of a table that is tied to the last product transformers goes by which of both was named first.
        assert fast.num_parameters(exclude_embeddings=True) == model.num_parameters(exclude_embeddings=True)


def test_which_rows_of_a_mask_filler_were_predicted_is_said_beside_the_output() -> None:
    fast = fastcls.optimize(tiny_model("BertForMaskedLM", "bert"), mask_token_id=7)
    output = fast(IDS)
    assert output.rows.tolist() == [[1, 0], [1, 1], [2, 2]]
    assert "rows" not in output
    (logits,) = fast(IDS, return_dict=False)
    assert torch.equal(logits, output.logits)


IGNORED = {
    "offset_mapping": torch.zeros(3, 6, 2),
    "special_tokens_mask": torch.ones(3, 6),
    "length": torch.tensor([6, 6, 6]),
    "overflow_to_sample_mapping": torch.tensor([0, 1, 2]),
    "use_cache": True,
    "idx": [1, 2, 3],
    "token_embeddings": torch.ones(3, 6, 64),
}


def test_keywords_that_transformers_ignores_are_ignored() -> None:
    model = tiny_bert()
    fast = fastcls.optimize(model)
    with torch.no_grad():
        assert float((fast(IDS, **IGNORED).logits - model(IDS, **IGNORED).logits).abs().max()) <= 1e-5


ROWS_OF_ZEROS = torch.tensor([[0] * 6, [1, 1, 1, 0, 0, 0], [0] * 6])


def masked(model_class: str, mask: Tensor) -> tuple[Any, Any, dict[str, Tensor]]:
    model = tiny_model(model_class, "bert")
    return model, fastcls.optimize(model), shaped_for(model_class, {"input_ids": IDS, "attention_mask": mask})


@pytest.mark.parametrize("last_layer", ["absorbed", "selected", "full"])
@pytest.mark.parametrize("model_class", [name for name, family in CLASSES if family == "bert"])
def test_rows_of_zeros_in_a_mask_have_no_answer(model_class: str, last_layer: LastLayer) -> None:
    model, fast, inputs = masked(model_class, ROWS_OF_ZEROS)
    fast.last_layer = last_layer
    with torch.no_grad():
        expected, actual = model(**inputs), fast(**inputs)
    for name in actual:
        found, wanted = actual[name], expected[name]
        if "MultipleChoice" in model_class:
            found, wanted = found[0], wanted[0]
        if found.shape[:2] == IDS.shape and name != "pooler_output":
            found, wanted = found[:, :3], wanted[:, :3]
            assert not bool(found[0].isnan().any())
        elif "MultipleChoice" in model_class:
            assert int(found.argmax()) == 1
        else:
            assert bool(found[[0, 2]].isnan().all())
        assert float((found[1] - wanted[1]).abs().max()) <= 1e-5
    nothing = {**inputs, "attention_mask": torch.zeros_like(inputs["attention_mask"])}
    assert next(iter(fast(**nothing).values())).shape == next(iter(actual.values())).shape


def test_a_pooler_that_reads_padding_gives_no_answer() -> None:
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [0] * 5 + [1]])
    model, fast, inputs = masked("BertModel", mask)
    with torch.no_grad():
        expected, actual = model(**inputs), fast(**inputs)
    assert float((actual.pooler_output[0] - expected.pooler_output[0]).abs().max()) <= 1e-5
    assert bool(actual.pooler_output[1:].isnan().all())
    kept = mask.bool()
    assert float((actual.last_hidden_state[kept] - expected.last_hidden_state[kept]).abs().max()) <= 1e-5
    fast.gives_pooler_output = False
    assert fast(**inputs).pooler_output is None


def test_texts_go_on_where_no_table_of_positions_ends() -> None:
    model = tiny_model("DebertaV2ForSequenceClassification", "deberta-v2")
    ids = torch.randint(5, 199, (2, 300))
    mask = torch.ones_like(ids)
    mask[0, 250:] = 0
    mask[1, 5:200:3] = 0
    fast = fastcls.optimize(model)
    with torch.no_grad():
        for more in ({}, {"attention_mask": mask}):
            assert float((fast(ids, **more).logits - model(ids, **more).logits).abs().max()) <= 1e-5
        assert float((fast.logits_of(ids.tolist()) - model(ids).logits).abs().max()) <= 1e-5
    assert fast.warm_up() is None
    with_table = fastcls.optimize(tiny_model("DebertaV2Model", "deberta-v2", position_biased_input=True))
    with pytest.raises(ValueError, match="300 tokens is longer than the model's 96 positions"):
        with_table(ids)


@pytest.mark.parametrize("family", list(TINY_FAMILIES))
@pytest.mark.parametrize("heads", [8, 16])
def test_heads_of_4_and_8(heads: int, family: str) -> None:
    name = next(name for name, each in CLASSES if each == family and name.endswith("ForSequenceClassification"))
    option = "n_heads" if family == "distilbert" else "num_attention_heads"
    model = tiny_model(name, family, **{option: heads})
    for last_layer in ("absorbed", "selected", "full"):
        fast = fastcls.optimize(model, last_layer=last_layer)
        with torch.no_grad():
            assert float((fast(IDS).logits - model(IDS).logits).abs().max()) <= 1e-5


def test_what_is_asked_of_a_model_besides_its_answer() -> None:
    model = tiny_bert()
    model.config.name_or_path = "somebody/a-model"
    fast = fastcls.optimize(model)
    assert fast.name_or_path == "somebody/a-model"
    table = fast.get_input_embeddings()
    assert table.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    with torch.no_grad():
        assert torch.equal(fast(inputs_embeds=table(IDS)).logits, fast(IDS).logits)
    assert fast.num_parameters(only_trainable=True) == 0


@pytest.mark.parametrize("family", list(TINY_FAMILIES))
def test_the_base_model_is_an_encoder_over_the_same_weights(family: str) -> None:
    name = next(name for name, each in CLASSES if each == family and name.endswith("ForSequenceClassification"))
    model = tiny_model(name, family)
    fast = fastcls.optimize(model)
    with torch.no_grad():
        expected, actual = model.base_model(IDS), fast.base_model(IDS)
    assert isinstance(actual, type(expected))
    assert list(actual.keys()) == list(expected.keys())
    assert float((actual.last_hidden_state - expected.last_hidden_state).abs().max()) <= 1e-4
    places = {weight.data_ptr() for weight in fast.parameters()}
    assert all(weight.data_ptr() in places for weight in fast.base_model.parameters())
    encoder = fast.base_model
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
        assert float((encoder(IDS)[0] - model.base_model(IDS)[0]).abs().max()) <= 1e-4
    theirs = model.base_model.state_dict()
    assert all(torch.equal(theirs[name], weight) for name, weight in encoder.state_dict().items())
    assert encoder.base_model is encoder


def test_tensors_are_made_where_they_belong_whatever_the_default_device() -> None:
    models = {family: next(name for name, each in CLASSES if each == family) for family in TINY_FAMILIES}
    pairs = [(model := tiny_model(name, family), fastcls.optimize(model)) for family, name in models.items()]
    mask = torch.tensor([[1] * 6, [1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        expected = [model(IDS, attention_mask=mask).logits for model, _ in pairs]
        torch.set_default_device("meta")
        try:
            found = [fast(IDS, attention_mask=mask).logits for _, fast in pairs]
            lists = [fast.logits_of(IDS.tolist()) for _, fast in pairs]
            made = fastcls.optimize(pairs[0][0])(IDS, mask).logits
        finally:
            torch.set_default_device(None)
    assert all(float((got - wanted).abs().max()) <= 1e-5 for got, wanted in zip(found, expected, strict=True))
    assert all(each.device.type == "cpu" for each in (*lists, made))


def test_what_a_fast_model_lacks_is_said() -> None:
    model = tiny_bert()
    fast = fastcls.optimize(model)
    assert fast.main_input_name == model.main_input_name
    assert fast.get_memory_footprint() == model.get_memory_footprint(return_buffers=False)
    with pytest.raises(AttributeError, match="no attribute 'bert': its encoder is base_model"):
        _ = fast.bert
    for name in ("resize_token_embeddings", "set_attn_implementation", "classifier"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}': the transformers model has, whose weights"):
            getattr(fast, name)
    assert not hasattr(fast, "anything")
    with pytest.raises(AttributeError, match=r"no attribute 'anything'$"):
        _ = fast.anything
    with pytest.raises(TypeError, match="it is a fast model already"):
        fastcls.optimize(fast)


def test_an_original_that_was_resized_is_named_before_ids_that_do_not_fit() -> None:
    model = tiny_bert()
    fast = fastcls.optimize(model)
    model.resize_token_embeddings(250, mean_resizing=False)
    for call in (lambda: fast(torch.tensor([[5, 210]])), lambda: fast.logits_of([[5, 210]])):
        with pytest.raises(RuntimeError, match=r"word_embeddings.weight of the model .*was replaced since"):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_trace_that_would_hold_its_examples_lengths_is_refused(dtype: torch.dtype) -> None:
    fast = fastcls.optimize(tiny_bert().to(dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=r"torch.jit.trace.* must be left out"):
            torch.jit.trace(fast, (IDS, torch.ones_like(IDS)), strict=False)
        with pytest.raises(RuntimeError, match=r"torch.onnx.export with dynamo=False, must be left out"):
            # What is more than its arguments is the exporter's own.
            torch.jit.trace(fast, (IDS, *[torch.ones_like(IDS)] * 9), strict=False)


# Hooks on the fast model


def doubled(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output * 2
    return type(output)(*(each * 2 for each in output))


def hooked_after(module: nn.Module, calls: list[str]) -> Callable[[], Any]:
    return module.register_forward_hook(lambda *_: calls.append("")).remove


def hooked_before(module: nn.Module, calls: list[str]) -> Callable[[], Any]:
    return module.register_forward_pre_hook(lambda *_: calls.append("")).remove


def with_another_forward(module: nn.Module, calls: list[str]) -> Callable[[], Any]:
    forward = module.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append("")
        return forward(*args, **kwargs)

    module.forward = counted
    return lambda: delattr(module, "forward")


@pytest.mark.parametrize("hook", [hooked_after, hooked_before, with_another_forward])
@pytest.mark.parametrize("last_layer", ["absorbed", "full"])
@pytest.mark.parametrize("family", list(TINY_FAMILIES))
def test_hooks_on_the_fast_model_run_or_are_refused(
    family: str, last_layer: LastLayer, hook: Callable[[nn.Module, list[str]], Callable[[], Any]]
) -> None:
    name = next(name for name, each in CLASSES if each == family and name.endswith("ForSequenceClassification"))
    fast = fastcls.optimize(tiny_model(name, family), last_layer=last_layer)
    before = fast(IDS).logits
    ran, refused = [], []
    for path, module in fast.named_modules():
        if isinstance(module, nn.ModuleList) or not path:
            continue
        calls: list[str] = []
        unhook = hook(module, calls)
        if fast.never_called(path, module, fast.head.spec.rows) is None:
            fast(IDS)
            assert calls, f"a hook on {path} was passed by"
            ran.append(path)
        else:
            with pytest.raises(RuntimeError, match=f"{path} must have no forward hooks"):
                fast(IDS)
            refused.append(path)
        unhook()
    assert {"encoder", "encoder.embeddings", "encoder.layers.0", "head"} <= set(ran)
    last = f"encoder.layers.{fast.spec.layers[-1]}"
    # With a mean over all tokens the last layer runs as a whole.
    assert (last in refused) == (last_layer == "absorbed" and fast.head.spec.rows == "first")
    assert torch.equal(fast(IDS).logits, before)


def test_a_hook_changes_what_the_fast_model_gives() -> None:
    model = tiny_bert()
    fast = fastcls.optimize(model)
    model.bert.encoder.layer[1].register_forward_hook(doubled)
    fast.encoder.layers[1].register_forward_hook(doubled)
    with torch.no_grad():
        assert float((fast(IDS).logits - model(IDS).logits).abs().max()) <= 1e-5


def test_methods_that_pass_the_models_own_hooks_by_are_refused() -> None:
    fast = fastcls.optimize(tiny_bert())
    handle = fast.register_forward_hook(lambda _module, _inputs, output: setattr(output, "logits", output.logits / 2))
    ids = IDS.tolist()
    packed = fast.pack(ids)
    for call in (lambda: fast.logits_of(ids), lambda: fast.forward_packed(packed[0])):
        with pytest.raises(RuntimeError, match="must be called as a whole"):
            call()
    handle.remove()
    assert fast.logits_of(ids).shape == (3, 3)
    fast.forward = lambda *_args, **_kwargs: None
    with pytest.raises(RuntimeError, match="must be called as a whole"):
        fast.logits_of(ids)


def test_hooks_inside_are_refused_in_a_graph() -> None:
    fast = fastcls.optimize(tiny_bert())
    compiled = torch.compile(fast, backend="eager")
    expected = fast(IDS).logits
    assert torch.equal(compiled(IDS).logits, expected)
    unhook = with_another_forward(fast.encoder.layers[0], [])
    with pytest.raises(RuntimeError, match=r"encoder.layers.0 must have no forward hooks, and no other forward"):
        compiled(IDS)
    unhook()
    assert torch.equal(compiled(IDS).logits, expected)
    fast.encoder.layers[0].register_forward_hook(doubled)
    with pytest.raises(RuntimeError, match=r"encoder.layers.0 must have no forward hooks"):
        compiled(IDS)


@pytest.mark.full
def test_a_compiled_model_follows_the_original() -> None:
    for model in (tiny_bert(), tiny_model("DebertaV2ForSequenceClassification", "deberta-v2")):
        compiled = torch.compile(fastcls.optimize(model), backend="aot_eager")
        compiled(IDS)
        for change in (in_place, by_other_tensors):
            change(model)
            with torch.no_grad():
                assert float((compiled(IDS).logits - model(IDS).logits).abs().max()) <= 2e-5
        torch.compiler.reset()


def test_an_encoder_of_a_model_is_compiled_too() -> None:
    encoder = fastcls.optimize(tiny_bert()).base_model
    assert torch.equal(torch.compile(encoder, backend="eager")(IDS)[0], encoder(IDS)[0])


def test_hooks_on_the_encoder_of_a_model_run_or_are_refused() -> None:
    encoder = fastcls.optimize(tiny_bert()).base_model
    encoder.encoder.layers[-1].register_forward_hook(doubled)
    with pytest.raises(RuntimeError, match=r"encoder.layers.2 must have no forward hooks"):
        encoder(IDS, select="first")


def test_hooks_on_a_base_model_that_is_not_called_are_refused() -> None:
    fast = fastcls.optimize(tiny_bert())
    for register in (fast.base_model.register_forward_hook, fast.base_model.register_forward_pre_hook):
        with pytest.raises(RuntimeError, match="base_model of a fast model must have no forward hooks"):
            register(lambda *_: None)
    encoder = fastcls.optimize(tiny_model("BertModel", "bert"))
    encoder.register_forward_hook(lambda *_: None).remove()


def test_a_hook_on_a_head_that_is_not_called_is_refused() -> None:
    for model_class, family in (("BertModel", "bert"), ("DistilBertModel", "distilbert")):
        encoder = fastcls.optimize(tiny_model(model_class, family))
        calls: list[str] = []
        unhook = hooked_after(encoder.head, calls)
        with pytest.raises(RuntimeError, match="head must have no forward hooks"):
            encoder.embeddings_of(IDS.tolist())
        with pytest.raises(RuntimeError, match="head must have no forward hooks"):
            encoder(IDS, select=torch.ones_like(IDS, dtype=torch.bool))
        if family == "distilbert":
            with pytest.raises(RuntimeError, match="head must have no forward hooks"):
                encoder(IDS)
        else:
            encoder(IDS)
            assert calls
        unhook()


@family_and_head
@every_class
def test_arguments_without_names_are_taken_in_the_classs_own_order(model_class: str, family: str) -> None:
    model = tiny_model(model_class, family)
    fast = fastcls.optimize(model)
    types = getattr(model.config, "type_vocab_size", 0) > 1
    given: dict[str, Any] = shaped_for(
        model_class,
        {
            "input_ids": IDS,
            "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [1] * 5 + [0]]),
            "token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 0]] * 3) * types,
            "position_ids": torch.tensor([[5, 4, 3, 2, 8, 7]] * 3),
        },
    )
    names = [name for name in inspect.signature(model.forward).parameters if name in given or name == "labels"]
    names = names[: 1 + max(names.index(name) for name in given if name in names)]
    arguments = [given.get(name) for name in names if name != "labels" or "MultipleChoice" in model_class]
    order = [*inspect.signature(model.forward).parameters][: len(names)]
    if order != names:
        # Arguments that are left out stand between: as far as they come without.
        arguments = arguments[: next(i for i, pair in enumerate(zip(order, names, strict=True)) if pair[0] != pair[1])]
    with torch.no_grad():
        expected, actual = model(*arguments)[0], fast(*arguments)[0]
    kept = given["attention_mask"].bool()
    if actual.shape[:2] == kept.shape:
        expected, actual = expected[kept], actual[kept]
    assert float((actual - expected).abs().max()) <= 1e-4


def in_place(model: Any) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)


def by_other_tensors(model: Any) -> None:
    for weight in model.parameters():
        weight.data = weight.data * 1.1


def test_labels_of_any_kind_are_no_hindrance() -> None:
    numbers = torch.arange(3).numpy()
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96
    )
    labels: Any = {number: ("a", int(number)) for number in numbers}
    try:
        config.id2label, config.label2id = labels, {label: number for number, label in labels.items()}
    except StrictDataclassFieldValidationError as error:
        pytest.skip(f"transformers {transformers.__version__} refuses such labels itself: {error!r:.60}")
    config.note = {(1, 2): torch.float32}
    model = transformers.BertForSequenceClassification(config).eval()
    fast = fastcls.optimize(model)
    with torch.no_grad():
        assert float((fast(IDS % 100).logits - model(IDS % 100).logits).abs().max()) <= 1e-5
        assert torch.compile(fast, backend="eager")(IDS % 100).logits.shape == (3, 3)


def test_nan_stays_nan() -> None:
    for family, name in {
        family: name for name, family in CLASSES if name.endswith("ForSequenceClassification")
    }.items():
        model = tiny_model(name, family, attn_implementation="eager")
        with torch.no_grad():
            for place in ("key", "classifier", "out"):
                each = copy.deepcopy(model)
                names = [name for name, _ in each.named_parameters() if place in name and name.endswith("bias")]
                if names:
                    each.get_parameter(names[-1])[0] = float("nan")
                    expected = each(IDS).logits.isnan()
                    assert torch.equal(fastcls.optimize(each)(IDS).logits.isnan(), expected), (family, names[-1])


@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
@pytest.mark.parametrize(
    ("num_labels", "labels"),
    [
        (3, torch.tensor([0, 2, 1])),
        (3, torch.tensor([[1.0, 0, 1], [0, 0, 1], [0, 1, 0]])),
        (1, torch.tensor([0.5, 1.5, -1.0])),
    ],
)
def test_losses_are_the_classs_own_and_leave_the_config_alone(num_labels: int, labels: Tensor, family: str) -> None:
    name = {"bert": "BertForSequenceClassification", "deberta-v2": "DebertaV2ForSequenceClassification"}[family]
    model = tiny_model(name, family, num_labels=num_labels)
    fast = fastcls.optimize(model)
    actual = fast(IDS, labels=labels)
    assert model.config.problem_type is None
    with torch.no_grad():
        expected = model(IDS, labels=labels)
    assert float((actual.loss - expected.loss).abs()) <= 1e-4
    assert actual.logits.shape == expected.logits.shape


def seven_labels(model: Any) -> None:
    model.classifier, model.num_labels = nn.Linear(64, 7), 7


def config_of_one_label(model: Any) -> None:
    model.config.num_labels = 1


def one_label(model: Any) -> None:
    model.num_labels = 1


@pytest.mark.parametrize("change", [seven_labels, config_of_one_label, one_label])
@pytest.mark.parametrize(
    "model_class",
    ["BertForSequenceClassification", "DebertaV2ForSequenceClassification", "BertForTokenClassification"],
)
def test_a_loss_counts_with_as_many_labels_as_the_model(model_class: str, change: Callable[[Any], None]) -> None:
    model = tiny_model(model_class, "deberta-v2" if "Deberta" in model_class else "bert")
    change(model)
    fast = fastcls.optimize(model)
    given = {"labels": IDS % 3 if "Token" in model_class else torch.tensor([2, 1, 0])}
    try:
        with torch.no_grad():
            expected = model(IDS, **given).loss
    except (ValueError, RuntimeError, IndexError):
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            fast(IDS, **given)
        return
    assert float((fast(IDS, **given).loss - expected).abs()) <= 1e-4


def test_labels_in_the_padding_are_refused_in_graphs_too() -> None:
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [1] * 6])
    good, bad = torch.where(mask == 1, IDS % 2, -100), IDS % 2
    for model_class in ("BertForTokenClassification", "BertForMaskedLM"):
        fast = fastcls.optimize(tiny_model(model_class, "bert"))
        compiled = torch.compile(fast, backend="eager")
        assert torch.equal(compiled(IDS, mask, labels=good).loss, fast(IDS, mask, labels=good).loss)
        with pytest.raises(ValueError, match="labels must be -100 where attention_mask is 0"):
            compiled(IDS, mask, labels=bad)
        torch.compiler.reset()
    fast = fastcls.optimize(tiny_model("BertForQuestionAnswering", "bert"))
    starts, ends = torch.tensor([1, 1, 1]), torch.tensor([2, 2, 9])
    program = torch.export.export(
        fast, (IDS, mask), kwargs={"start_positions": starts, "end_positions": ends}, strict=False
    ).module()
    expected = fast(IDS, mask, start_positions=starts, end_positions=ends).loss
    assert torch.equal(program(IDS, mask, start_positions=starts, end_positions=ends).loss, expected)
    with pytest.raises(ValueError, match="start_positions must point to a token, got 4 for text 1"):
        program(IDS, mask, start_positions=torch.tensor([1, 4, 1]), end_positions=ends)


@pytest.mark.parametrize("version", ["", "V2"], ids=["v1", "v2"])
def test_debertas_loss_leaves_out_what_has_no_label(version: str) -> None:
    model = tiny_model(f"Deberta{version}ForSequenceClassification", "deberta-v2" if version else "deberta")
    labels = torch.tensor([1, -1, 2])
    with torch.no_grad():
        expected = model(IDS, labels=labels).loss
    assert float((fastcls.optimize(model)(IDS, labels=labels).loss - expected).abs()) <= 1e-4


def test_an_answer_in_the_padding_is_refused() -> None:
    fast = fastcls.optimize(tiny_model("BertForQuestionAnswering", "bert"))
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [1] * 6])
    ends = torch.tensor([2, 4, 9])
    with pytest.raises(ValueError, match="end_positions must point to a token, got 4 for text 1, where attention_mask"):
        fast(IDS, mask, start_positions=torch.tensor([1, 1, 1]), end_positions=ends)


@pytest.mark.full
def test_every_task_has_a_fast_model() -> None:
    assert {type(fastcls.optimize(tiny_model(name, family))) for name, family in CLASSES} == {*TASKS.values()}


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.full)])
def either_path(request: pytest.FixtureRequest, kernel_device: str) -> Iterator[str]:
    """Runs operations in PyTorch or as Triton kernels; gives the device."""
    with use_backend(request.param):
        yield "cpu" if request.param == "torch" else kernel_device


# What a hook makes of rows, and whether that is refused.
MADE_OF_ROWS: dict[str, tuple[Callable[[Tensor], Any], str | None]] = {
    "transposed": (lambda rows: rows.T.contiguous().T, None),
    "every_other": (lambda rows: rows.repeat_interleave(2, 1)[:, ::2], None),
    "in_wider_rows": (lambda rows: torch.cat([rows, rows], 1)[:, : rows.shape[1]], None),
    "fewer": (lambda rows: rows[:-1], "of shape"),
    "narrower": (lambda rows: rows[:, :-4], "of shape"),
    "another_dtype": (lambda rows: rows.double(), "a tensor of torch.float32, got torch.float64"),
    "a_list": (lambda rows: rows.tolist(), "a tensor of torch.float32, got list"),
}


@pytest.mark.parametrize("made", MADE_OF_ROWS)
@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("encoder.embeddings", "after"),
        ("encoder.layers.0", "after"),
        ("encoder.layers.0", "before"),
        ("encoder.layers.2", "after"),
        ("encoder", "after"),
        ("head", "before"),
    ],
)
def test_rows_that_hooks_have_made_are_right_or_refused(path: str, kind: str, made: str, either_path: str) -> None:
    fast = fastcls.optimize(tiny_bert().to(either_path), last_layer="full")
    change, refused = MADE_OF_ROWS[made]
    if path == "head" and made == "fewer":
        refused = None
    before = fast(IDS).logits

    def changed(given: Any) -> Any:
        return change(given) if isinstance(given, Tensor) else type(given)(*map(change, given))

    def changed_inputs(_: Any, inputs: Any) -> Any:
        return (changed(inputs[0]), *inputs[1:])

    module = fast.get_submodule(path)
    if kind == "after":
        module.register_forward_hook(lambda _module, _inputs, output: changed(output))
    else:
        module.register_forward_pre_hook(changed_inputs)
    if refused is not None:
        with pytest.raises((TypeError, ValueError), match=f"hooks must leave .* {refused}"):
            fast(IDS)
    elif made != "fewer":
        assert float((fast(IDS).logits - before).abs().max()) <= 1e-5


@pytest.mark.parametrize("name", ["encoder.layers.0.up_bias", "encoder.layers.1.qkv_weight", "head.out_weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_that_was_put_in_place_by_hand_and_does_not_fit_is_named(
    name: str, dtype: torch.dtype, either_path: str
) -> None:
    fast = fastcls.optimize(tiny_bert().to(either_path))
    fast(IDS)
    weight = fast.get_parameter(name)
    weight.data = weight.data[:1].to(dtype)
    with pytest.raises((TypeError, ValueError), match=rf"{name} must be .*, got"):
        fast(IDS)


@pytest.mark.parametrize(
    "name",
    ["layers.0.qkv_weight", "relative.table_weight", "relative.norm_weight", "convolution.kernel_weight"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_that_tables_are_made_of_is_named_before_they_are_made(
    name: str, dtype: torch.dtype, either_path: str
) -> None:
    with_convolution: dict[str, Any] = {"conv_kernel_size": 3, "conv_act": "gelu"}
    model = tiny_model("DebertaV2ForSequenceClassification", "deberta-v2", **with_convolution)
    fast = fastcls.optimize(model.to(either_path))
    fast(IDS)
    weight = fast.encoder.get_parameter(name)
    weight.data = weight.data[:-1].to(dtype)
    with pytest.raises((TypeError, ValueError), match=rf"encoder.{name} must be .*, got"):
        fast(IDS)


def test_rotary_frequencies_that_do_not_fit_are_named(either_path: str) -> None:
    fast = fastcls.optimize(tiny_model("ModernBertForSequenceClassification", "modernbert").to(either_path))
    fast(IDS)
    name, frequencies = next(fast.named_rotary())
    frequencies.data = frequencies.data[:2]
    with pytest.raises(ValueError, match=rf"{name} must be contiguous, of shape \(8,\)"):
        fast(IDS)


@pytest.mark.parametrize("name", ["encoder.embeddings.token_type_weight", "encoder.layers.0.up_weight"])
def test_a_weight_without_data_or_dimensions_is_named_and_not_computed_with(name: str) -> None:
    fast = fastcls.optimize(tiny_bert())
    fast(IDS)
    owner, key = fast.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    weight = fast.get_parameter(name)
    for wrong in (weight.to("meta"), weight.flatten()):
        setattr(owner, key, nn.Parameter(wrong, requires_grad=False))
        with pytest.raises(ValueError, match=rf"{name} must be contiguous, of shape"):
            fast(IDS)


def test_a_bias_with_strides_is_refused_and_not_read_as_its_neighbours(either_path: str) -> None:
    fast = fastcls.optimize(tiny_bert().to(either_path))
    fast(IDS)
    bias = fast.head.out_bias
    assert bias is not None
    wider = torch.stack([bias.data, bias.data + 100], -1)
    for strided in (wider[:, 0], bias.data[:1].expand(3)):
        fast.head.out_bias = nn.Parameter(strided, requires_grad=False)
        with pytest.raises(ValueError, match=r"head.out_bias must be contiguous, of shape \(3,\)"):
            fast(IDS)


def test_a_weight_that_is_put_where_there_was_none_is_taken_or_named(either_path: str) -> None:
    model = tiny_model("ModernBertForSequenceClassification", "modernbert").to(either_path)
    fast = fastcls.optimize(model)
    before = fast(IDS).logits
    layer: Any = fast.encoder.layers[1]
    zeros = torch.zeros(64, device=either_path)
    layer.out_bias = nn.Parameter(zeros, requires_grad=False)
    assert float((fast(IDS).logits - before).abs().max()) <= 1e-5
    for wrong in (zeros[:1], torch.stack([zeros, zeros + 100], -1)[:, 0]):
        layer.out_bias = nn.Parameter(wrong, requires_grad=False)
        with pytest.raises(ValueError, match=r"encoder.layers.1.out_bias must be contiguous, of shape \(64,\)"):
            fast(IDS)
    layer.out_bias = None
    fast.encoder.embeddings.token_type_weight = nn.Parameter(zeros[None, :8], requires_grad=False)
    with pytest.raises(
        ValueError, match=r"token_type_weight must be None, since this model has none, got shape \(1, 8\)"
    ):
        fast(IDS)


def test_a_weight_in_wider_rows_is_taken(either_path: str) -> None:
    fast = fastcls.optimize(tiny_bert().to(either_path))
    before = fast(IDS).logits
    layer: Any = fast.encoder.layers[0]
    wider = torch.cat([layer.up_weight, layer.up_weight + 1], 1)
    layer.up_weight = nn.Parameter(wider[:, : layer.up_weight.shape[1]], requires_grad=False)
    assert float((fast(IDS).logits - before).abs().max()) <= 1e-5


def test_a_weight_of_another_dtype_in_the_same_memory_is_named() -> None:
    fast = fastcls.optimize(tiny_bert())
    fast(IDS)
    table: Any = fast.encoder.embeddings.position_weight
    table.data = table.data.view(torch.int32)
    with pytest.raises(TypeError, match=r"embeddings.position_weight must be torch.float32 .*, got torch.int32"):
        fast(IDS)


def test_hooks_for_all_modules_may_give_rows_with_strides(either_path: str) -> None:
    fast = fastcls.optimize(tiny_model("MPNetForSequenceClassification", "mpnet").to(either_path))
    before = fast(IDS).logits

    def strided(_module: Any, _inputs: Any, output: Any) -> Any:
        change = MADE_OF_ROWS["every_other"][0]
        if isinstance(output, Tensor) and output.ndim == 2:
            return change(output)
        return type(output)(*map(change, output)) if isinstance(output, tuple) else None

    handle = nn.modules.module.register_module_forward_hook(strided)
    try:
        assert float((fast(IDS).logits - before).abs().max()) <= 1e-5
    finally:
        handle.remove()


def test_modules_and_weights_that_are_replaced_are_computed_with() -> None:
    fast: Any = fastcls.optimize(tiny_model("ModernBertForSequenceClassification", "modernbert"))
    before = fast(IDS).logits
    fast.encoder.rotary = copy.deepcopy(fast.encoder.rotary)
    assert torch.equal(fast(IDS).logits, before)
    fast = fastcls.optimize(tiny_model("DebertaV2ForSequenceClassification", "deberta-v2"))
    before = fast(IDS).logits
    relative = copy.deepcopy(fast.encoder.relative)
    relative._layers = fast.encoder.relative._layers
    fast.encoder.relative = relative
    assert torch.equal(fast(IDS).logits, before)
    fast = fastcls.optimize(tiny_bert())
    layer: Any = fast.encoder.layers[0]
    before = fast(IDS).logits
    nn.utils.parametrize.register_parametrization(layer, "out_weight", nn.Identity())
    assert torch.equal(fast(IDS).logits, before)
    layer.out_bias = None
    assert torch.isfinite(fast(IDS).logits).all()
    fast.adapter = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"adapter.weight must not require gradients"):
        fast(IDS)


def written_to(layout: Any, **values: Any) -> Any:
    """A layout of a caller's who has written to it since it was checked."""
    vars(layout).update(values)
    return layout


PACKED: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "an_id_too_large": (lambda packed: {"token_ids": packed.token_ids + 190}, "token_ids must lie from 0 to 198"),
    "a_negative_position": (lambda packed: {"position_ids": packed.position_ids - 1}, "position_ids must lie from 0"),
    "positions_with_strides": (
        lambda packed: {"position_ids": packed.position_ids.repeat_interleave(2)[::2]},
        "position_ids must be contiguous, of shape",
    ),
    "one_position": (lambda packed: {"position_ids": packed.position_ids[:1]}, "position_ids must be contiguous"),
    "ids_that_are_floats": (lambda packed: {"token_ids": packed.token_ids.float()}, "token_ids must be an int32 or"),
    "a_type_too_large": (lambda packed: {"token_type_ids": packed.token_ids * 0 + 5}, "token_type_ids must lie from 0"),
    "more_ids": (lambda packed: {"token_ids": packed.token_ids.repeat(2)}, "token_ids must be contiguous, of shape"),
    "neither": (lambda _: {"token_ids": None}, "exactly one of token_ids and inputs_embeds"),
    "embeddings_transposed": (
        lambda packed: {"token_ids": None, "inputs_embeds": torch.randn(64, len(packed.token_ids)).T},
        "inputs_embeds must be contiguous, of shape",
    ),
    "lengths_written_to": (
        lambda packed: {"layout": written_to(packed.layout, cu_seqlens=packed.layout.cu_seqlens + 9)},
        "cu_seqlens must rise from 0 to at most total_tokens",
    ),
    "more_texts_than_sequences": (lambda _: {"num_texts": 3}, "num_texts must lie from 0 to 2, .* got 3"),
    "fewer_tokens_than_none": (lambda _: {"num_tokens": -1}, "num_tokens must lie from 0 to .*, got -1"),
    "a_longest_that_is_not": (
        lambda packed: {"layout": written_to(packed.layout, max_seqlen=3)},
        "max_seqlen must be at least the longest sequence, 4, got 3",
    ),
}


@pytest.mark.parametrize("case", PACKED)
def test_packed_tokens_that_do_not_fit_are_refused(case: str) -> None:
    fast = fastcls.optimize(tiny_bert())
    (packed,) = fast.pack([[5, 6, 7], [8, 9, 10, 11]])
    change, message = PACKED[case]
    with pytest.raises((TypeError, ValueError), match=message):
        fast.forward_packed(dataclasses.replace(packed, **change(packed)))


# Fields that a move would leave behind.
LEFT_BEHIND: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "other_ids": (lambda packed: {"token_ids": packed.token_ids + 1}, "token_ids"),
    "fewer_ids": (lambda packed: {"token_ids": packed.token_ids[:5]}, "token_ids"),
    "embeddings": (
        lambda packed: {"token_ids": None, "inputs_embeds": torch.randn(len(packed.position_ids), 64)},
        "token_ids",
    ),
    "other_positions": (lambda packed: {"position_ids": packed.position_ids + 1}, "position_ids"),
    "no_types": (lambda _: {"token_type_ids": None}, "token_type_ids"),
    "other_lengths": (
        lambda packed: {"layout": written_to(packed.layout, cu_seqlens=packed.layout.cu_seqlens.clone())},
        "layout.cu_seqlens",
    ),
    "places": (
        lambda packed: {"layout": written_to(packed.layout, positions=packed.position_ids * 2)},
        "layout.positions",
    ),
}


@pytest.mark.parametrize("case", LEFT_BEHIND)
def test_packed_tokens_that_would_not_be_moved_are_refused(case: str) -> None:
    fast = fastcls.optimize(tiny_bert())
    (packed,) = fast.pack([[5, 6, 7], [8, 9, 10, 11]], [[0, 0, 1], [0, 0, 0, 1]])
    change, name = LEFT_BEHIND[case]
    with pytest.raises(ValueError, match=rf"{name} must lie in the packing's integers to be moved"):
        fast.to("meta").forward_packed(dataclasses.replace(packed, **change(packed)))
