"""A model that computes something else than its config says is refused, or computed as its modules are."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from support import tiny_bert, tiny_model
from test_families import CLASSES, arithmetic_and_head
from test_original import IDS, answer
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune
from transformers import AttentionInterface, BertForSequenceClassification, masking_utils, modeling_utils
from transformers.activations import ACT2FN
from transformers.models.bert import modeling_bert
from transformers.models.bert.modeling_bert import BertPooler, BertSelfAttention
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

import fastcls


class HalfAttention(BertSelfAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        attended, weights = cast("Any", super().forward(*args, **kwargs))
        return attended * 0.5, weights


class MeanPooler(BertPooler):
    def forward(self, hidden_states: Tensor) -> Tensor:
        pooled: Tensor = self.activation(self.dense(hidden_states.mean(1)))
        return pooled


class Scaled(nn.Linear):
    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows) * 2


class GELU(nn.Module):
    """Of one's own, under the name of torch's."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows * torch.sigmoid(1.702 * rows)


class Doubled(nn.Module):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)
        output.logits = output.logits * 2
        return output


class DropoutOfItsOwn(BertForSequenceClassification):
    """A method that stands before the module of that name."""

    def dropout(self, rows: Tensor) -> Tensor:  # type: ignore[override]
        return rows * 2


class ClassifierOfItsOwn(BertForSequenceClassification):
    @property
    def classifier(self) -> Any:
        return nn.Identity()

    @classifier.setter
    def classifier(self, module: nn.Module) -> None:
        self._modules["classifier"] = module


class CalledOtherwise(BertForSequenceClassification, Doubled):
    pass


class OnTheHub(PyTorchModelHubMixin, BertForSequenceClassification):  # type: ignore[misc]
    pass


class ModelOfItsOwn(BertForSequenceClassification):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        replace_attention(self)


class LossOfItsOwn(BertForSequenceClassification):
    def loss_function(self, *args: Any, **kwargs: Any) -> Any:
        return super().loss_function(*args, **kwargs) * 2


class OnlyMoreMethods(BertForSequenceClassification):
    """What many recipes write: the model, with something to train it by."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.temperature = 2.0

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self(**batch).loss
        return loss

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(*args, **kwargs)


def layer(model: Any, index: int) -> Any:
    return model.bert.encoder.layer[index]


def replace_attention(model: Any) -> None:
    layer(model, 1).attention.self = HalfAttention(model.config, layer_idx=1)


def replace_activation(model: Any) -> None:
    layer(model, 2).intermediate.intermediate_act_fn = nn.Hardswish()


def one_activation(model: Any) -> None:
    layer(model, 1).intermediate.intermediate_act_fn = nn.ReLU()


def inside_an_activation(model: Any) -> None:
    layer(model, 1).intermediate.intermediate_act_fn.act = torch.relu


def replace_norm(model: Any) -> None:
    layer(model, 0).output.LayerNorm = nn.RMSNorm(64)


def replace_pooler(model: Any) -> None:
    model.bert.pooler = MeanPooler(model.config)


def replace_classifier(model: Any) -> None:
    model.classifier = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))


def subclass_linear(model: Any) -> None:
    layer(model, 1).output.dense = Scaled(112, 64)


def change_class(model: Any) -> None:
    layer(model, 1).output.dense.__class__ = Scaled


def dropout_that_does_something(model: Any) -> None:
    model.dropout = nn.LayerNorm(64, elementwise_affine=False)


def eps_of_one(model: Any) -> None:
    layer(model, 1).output.LayerNorm.eps = 0.1


def scaling_of_one(model: Any) -> None:
    layer(model, 2).attention.self.scaling = 0.05


def heads_of_one(model: Any) -> None:
    attention = layer(model, 1).attention.self
    attention.num_attention_heads, attention.attention_head_size = 2, 32


def embeddings_that_normalise(model: Any) -> None:
    model.bert.embeddings.word_embeddings.max_norm = 1.0


def positions_in_reverse(model: Any) -> None:
    model.bert.embeddings.position_ids = model.bert.embeddings.position_ids.flip(1)


def types_of_ones(model: Any) -> None:
    model.bert.embeddings.token_type_ids.fill_(1)


def activation_of_that_name(model: Any) -> None:
    for each in model.bert.encoder.layer:
        each.intermediate.intermediate_act_fn = GELU()


def patch_what_is_the_same(model: Any) -> None:
    model.dropout = nn.Identity()
    model.dropout.forward = lambda rows: rows * 2


def layers_named_otherwise(model: Any) -> None:
    layers = model.bert.encoder.layer
    layers._modules = dict(reversed([*layers._modules.items()]))


def another_config_inside(model: Any) -> None:
    model.bert.encoder.layer[1].attention.self.config = copy.deepcopy(model.config)
    model.bert.encoder.layer[1].attention.self.config._attn_implementation = "own"


def compiled_to_something_else(model: Any) -> None:
    model.bert._compiled_call_impl = lambda *_args, **_kwargs: None


def hook(model: Any) -> None:
    layer(model, 0).register_forward_hook(lambda _module, _inputs, output: output * 1.5)


def hook_on_the_model(model: Any) -> None:
    model.register_forward_hook(lambda *_: None)


def pre_hook(model: Any) -> None:
    model.classifier.register_forward_pre_hook(lambda _module, inputs: (inputs[0].clamp(-0.1, 0.1),))


def hook_with_keywords(model: Any) -> None:
    layer(model, 2).attention.register_forward_pre_hook(lambda *_: None, with_kwargs=True)


def hook_on_what_is_left_out(model: Any) -> None:
    model.dropout = nn.Identity()
    model.dropout.register_forward_hook(lambda *_: None)


def patch_an_instance(model: Any) -> None:
    old = model.bert.embeddings.forward
    model.bert.embeddings.forward = lambda *args, **kwargs: old(*args, **kwargs) + 0.3


def patch_the_model(model: Any) -> None:
    old = model.forward
    model.forward = functools.wraps(old)(lambda *args, **kwargs: old(*args, **kwargs))


def patch_a_method(model: Any) -> None:
    each = layer(model, 0)
    each.feed_forward_chunk = types.MethodType(lambda _self, states: states, each)


def patch_the_loss(model: Any) -> None:
    model.loss_function = lambda *_args, **_kwargs: torch.tensor(0.0)


def prune_weights(model: Any) -> None:
    prune.l1_unstructured(layer(model, 1).output.dense, "weight", amount=0.5)


def prune_heads(model: Any) -> None:
    attention = layer(model, 2).attention
    for name in ("query", "key", "value"):
        setattr(attention.self, name, nn.Linear(64, 32))
    attention.output.dense = nn.Linear(32, 64)
    attention.self.num_attention_heads, attention.self.all_head_size = 2, 32


def parametrize(model: Any) -> None:
    parametrizations.weight_norm(layer(model, 1).intermediate.dense)


def drop_out(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()


def drop_out_of_attention(model: Any) -> None:
    layer(model, 1).attention.self.training = True


def more_modules(model: Any) -> None:
    layer(model, 1).adapter = nn.Linear(2, 2)


def fewer_modules(model: Any) -> None:
    del layer(model, 1).attention.output.dropout


def more_parameters(model: Any) -> None:
    layer(model, 1).register_parameter("gate", nn.Parameter(torch.zeros(1)))


def own_attention(_module: Any, query: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, None]:
    return query.transpose(1, 2), None


def attention_of_ones_own(model: Any) -> None:
    AttentionInterface.register("own", own_attention)
    model.config._attn_implementation = "own"


REFUSED: dict[Callable[[Any], None], str] = {
    replace_attention: r"model.bert.encoder.layer.1.attention.self must be a BertSelfAttention.* got a .*HalfAttention",
    replace_activation: r"model.bert.encoder.layer.2.intermediate.intermediate_act_fn must be a GELU.* got .*Hardswish",
    one_activation: r"model.bert.encoder.layer.1.intermediate.intermediate_act_fn must be",
    inside_an_activation: r"model.bert.encoder.layer.1.intermediate.intermediate_act_fn.act must be",
    replace_norm: r"model.bert.encoder.layer.0.output.LayerNorm must be a LayerNorm.* got a .*RMSNorm",
    replace_pooler: r"model.bert.pooler must be a BertPooler.* got a .*MeanPooler",
    replace_classifier: r"model.classifier must be a Linear.* got a torch.nn.*Sequential",
    subclass_linear: r"model.bert.encoder.layer.1.output.dense must be a Linear.* got a .*Scaled",
    change_class: r"model.bert.encoder.layer.1.output.dense must be a Linear.* got a .*Scaled",
    dropout_that_does_something: r"model.dropout must be a Dropout.* got a .*LayerNorm",
    eps_of_one: r"model.bert.encoder.layer.1.output.LayerNorm.eps must be 1e-12.* got 0.1",
    scaling_of_one: r"model.bert.encoder.layer.2.attention.self.scaling must be 0.25.* got 0.05",
    heads_of_one: r"model.bert.encoder.layer.1.attention.self.num_attention_heads must be 4.* got 2",
    embeddings_that_normalise: r"model.bert.embeddings.word_embeddings.max_norm must be None.* got 1.0",
    positions_in_reverse: r"model.bert.embeddings.position_ids must be 0, 1, 2",
    types_of_ones: r"model.bert.embeddings.token_type_ids must be zeros",
    activation_of_that_name: r"intermediate_act_fn must be a GELUActivation.* got a test_structure.GELU",
    patch_what_is_the_same: r"model.dropout.forward must be its class's own",
    layers_named_otherwise: r"model.bert.encoder.layer must be in the order 0, 1, 2.* got in the order 2, 1, 0",
    another_config_inside: r"model.bert.encoder.layer.1.attention.self.config must be for .* got own",
    compiled_to_something_else: r"model.bert._compiled_call_impl must be its class's own",
    hook: r"model.bert.encoder.layer.0 must have no forward hooks, got hook.<locals>",
    hook_on_the_model: r"model must have no forward hooks",
    pre_hook: r"model.classifier must have no forward hooks, got pre_hook",
    hook_with_keywords: r"model.bert.encoder.layer.2.attention must have no forward hooks",
    hook_on_what_is_left_out: r"model.dropout must have no forward hooks",
    patch_an_instance: r"model.bert.embeddings.forward must be its class's own, got .*patch_an_instance",
    patch_the_model: r"model.forward must be its class's own",
    patch_a_method: r"model.bert.encoder.layer.0.feed_forward_chunk must be its class's own",
    patch_the_loss: r"model._loss_function must be its class's own",
    prune_weights: r"model.bert.encoder.layer.1.output.dense must have no forward hooks, got L1Unstructured",
    prune_heads: r"model.bert.encoder.layer.2.attention.self.num_attention_heads must be 4.* got 2",
    parametrize: r"model.bert.encoder.layer.1.intermediate.dense must be a Linear.* got a .*ParametrizedLinear",
    drop_out: r"model.bert.embeddings.dropout must be in eval mode .*Monte-Carlo",
    drop_out_of_attention: r"model.bert.encoder.layer.1.attention.self must be in eval mode",
    more_modules: r"model.bert.encoder.layer.1.adapter must be nothing.*got .*Linear.*adapters must be merged first",
    fewer_modules: r"model.bert.encoder.layer.1.attention.output.dropout must be a Dropout.* got nothing",
    more_parameters: r"model.bert.encoder.layer.1.gate must have shape None.* got \(1,\)",
    attention_of_ones_own: r"_attn_implementation must be one of transformers' own, got 'own'",
}


@pytest.mark.parametrize("change", list(REFUSED), ids=lambda change: change.__name__)
def test_what_computes_something_else_is_refused_by_its_path(change: Callable[[Any], None]) -> None:
    model = tiny_bert()
    change(model)
    with pytest.raises(ValueError, match=REFUSED[change]):
        fastcls.optimize(model)


@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        (ModelOfItsOwn, "got a .*HalfAttention"),
        (LossOfItsOwn, "a loss_function of its own"),
        (CalledOtherwise, "Doubled with a __call__ of its own"),
        (DropoutOfItsOwn, "DropoutOfItsOwn with a dropout of its own"),
        (ClassifierOfItsOwn, "ClassifierOfItsOwn with a classifier of its own"),
    ],
)
def test_a_subclass_that_computes_something_else_is_refused(model_class: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastcls.optimize(model_class(tiny_bert().config).eval())


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (modeling_bert.BertLayer, "forward"),
        (modeling_bert.BertLayer, "feed_forward_chunk"),
        (nn.Linear, "forward"),
        (modeling_bert, "eager_attention_forward"),
        (BertForSequenceClassification, "forward"),
        (nn.Module, "__call__"),
        (torch.nn.functional, "embedding"),
        (RobertaEmbeddings, "create_position_ids_from_input_ids"),
    ],
)
def test_patched_classes_and_modules_are_refused(place: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("RobertaForSequenceClassification", "roberta") if place is RobertaEmbeddings else tiny_bert()
    old = getattr(place, name)
    patched = functools.wraps(old)(lambda *args, **kwargs: old(*args, **kwargs))
    monkeypatch.setattr(place, name, staticmethod(patched) if place is RobertaEmbeddings else patched)
    with pytest.raises(ValueError, match=rf"{name} must be transformers' own, got .*test_structure.py"):
        fastcls.optimize(model)


class Called:
    """An object in place of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs) * 2

    def method(self, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)


@pytest.mark.parametrize(
    ("place", "name", "replaced"),
    [
        (modeling_bert, "eager_attention_forward", Called),
        (modeling_bert, "eager_attention_forward", lambda old: Called(old).method),
        (modeling_bert.BertLayer, "feed_forward_chunk", Called),
        (torch.nn.functional, "scaled_dot_product_attention", lambda _old: torch.add),
        (torch.nn.functional, "linear", Called),
        (torch.nn.functional, "gelu", lambda _old: torch.relu),
        (torch.nn.functional, "embedding", Called),
        (torch, "bmm", Called),
        (modeling_bert, "eager_attention_forward", lambda old: functools.lru_cache(lambda *args: old(*args))),
        (modeling_bert, "eager_attention_forward", lambda old: Mock(side_effect=old)),
        (modeling_bert, "eager_attention_forward", lambda _old: torch.nn.functional.dropout),
        (modeling_bert, "eager_attention_forward", lambda _old: torch.neg),
        (masking_utils, "and_masks", lambda _old: masking_utils.or_masks),
        (modeling_bert.BertLayer, "feed_forward_chunk", lambda old: functools.partialmethod(old)),
        (nn.LayerNorm, "forward", lambda _old: nn.Identity.forward),
        (modeling_bert.BertOutput, "forward", lambda _old: modeling_bert.BertSelfOutput.forward),
        (modeling_bert.BertLayer, "chunk_size", lambda _old: property(lambda _self: 0)),
    ],
    ids=[
        *("object", "method_of_one", "in_a_class", "builtin", "for_a_builtin", "gelu", "for_a_function"),
        *("of_torch", "cached", "mocked", "another_function", "another_builtin", "mask", "partial_method"),
        *("another_forward", "another_blocks_forward", "property"),
    ],
)
def test_objects_in_place_of_functions_are_refused(
    place: Any, name: str, replaced: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_bert()
    monkeypatch.setattr(place, name, replaced(getattr(place, name, None)), raising=False)
    with pytest.raises(ValueError, match=rf"{name} must be (transformers'|torch's) own, got"):
        fastcls.optimize(model)


def test_mocks_of_what_loads_and_saves_are_no_other_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bert()
    for place, name in ((BertForSequenceClassification, "from_pretrained"), (modeling_bert, "logger")):
        monkeypatch.setattr(place, name, Mock(return_value=model))
    monkeypatch.setattr(nn.Linear, "reset_parameters", Mock())
    assert float((answer(fastcls.optimize(model)) - answer(model)).abs().max()) <= 1e-5


def test_a_model_is_taken_once_what_was_patched_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bert(max_position_embeddings=77)
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "gelu", functools.partial(torch.nn.functional.gelu, approximate="tanh"))
        with pytest.raises(ValueError, match="gelu must be torch's own"):
            fastcls.optimize(model)
    with monkeypatch.context() as patched:
        patched.setattr(modeling_bert.BertLayer, "__init__", Called(modeling_bert.BertLayer.__init__))
        with pytest.raises(ValueError, match=r"BertLayer.__init__ must be|must build a Bert"):
            fastcls.optimize(model)
    assert float((answer(fastcls.optimize(model)) - answer(model)).abs().max()) <= 1e-5


@pytest.mark.parametrize(
    ("model_class", "family"),
    [("ElectraForSequenceClassification", "electra"), ("ElectraForMaskedLM", "electra"), ("BertModel", "bert")],
)
def test_names_of_activations_that_stand_for_others_are_refused(
    model_class: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cast("Any", ACT2FN), "gelu", nn.ReLU)
    model = tiny_model(model_class, family)
    with pytest.raises(ValueError, match=r"ACT2FN\['gelu'\] must be transformers' own, got torch.nn.*ReLU"):
        fastcls.optimize(model)


def test_an_attention_of_transformers_that_was_replaced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bert(attn_implementation="sdpa")
    monkeypatch.setattr(modeling_utils.ALL_ATTENTION_FUNCTIONS, "_local_mapping", {"sdpa": own_attention})
    with pytest.raises(ValueError, match="must be one of transformers' own, got 'sdpa'"):
        fastcls.optimize(model)


def test_hooks_on_all_modules_are_refused() -> None:
    model = tiny_bert()
    handle = register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="no forward hooks on all modules"):
            fastcls.optimize(model)
    finally:
        handle.remove()


def test_code_without_a_file_is_a_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    # As in a notebook's or an interpreter's prompt.
    typed: dict[str, Any] = {}
    exec(compile("def forward(self, hidden_states): return hidden_states[:, 0]", "<stdin>", "exec"), typed)
    monkeypatch.setattr(BertPooler, "forward", typed["forward"])
    with pytest.raises(ValueError, match=r"BertPooler.forward must be transformers' own, got forward from <stdin>"):
        fastcls.optimize(tiny_bert())


def every_activation(model: Any) -> None:
    for each in model.bert.encoder.layer:
        each.intermediate.intermediate_act_fn = nn.ReLU()


def every_eps(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.1


def fewer_layers(model: Any) -> None:
    del model.bert.encoder.layer[2:]


def other_order(model: Any) -> None:
    model.bert.encoder.layer = nn.ModuleList([layer(model, 2), layer(model, 0), layer(model, 0)])


def other_words(model: Any) -> None:
    model.set_input_embeddings(nn.Embedding(160, 64))


def other_labels(model: Any) -> None:
    model.classifier = nn.Linear(64, 5)


def no_dropout(model: Any) -> None:
    model.dropout = nn.Identity()
    layer(model, 1).output.dropout = nn.Identity()


def activation_of_torch(model: Any) -> None:
    for each in model.bert.encoder.layer:
        each.intermediate.intermediate_act_fn = nn.GELU()


def modules_in_training(model: Any) -> None:
    # As layers that were put in after eval() are; only dropout computes something else in it.
    model.classifier.train()


def compiled_in_place(model: Any) -> None:
    model.bert.encoder.compile()
    del model.bert.encoder._compiled_call_impl
    model.bert.encoder._compiled_call_impl = None


def called_for_hidden_states(model: Any) -> None:
    with torch.no_grad():
        model(IDS, output_hidden_states=True)


def checkpointed(model: Any) -> None:
    model.gradient_checkpointing_enable()


def attributes_of_ones_own(model: Any) -> None:
    model.note, model.bert.note = "a note", object()


def config_of_another_use(model: Any) -> None:
    # As an encoder has that was loaded from another checkpoint.
    model.bert.config = copy.deepcopy(model.config)
    model.bert.config.architectures = ["BertModel"]
    model.bert.config.problem_type = "regression"
    model.bert.config.hidden_dropout_prob = 0.3
    model.bert.config.initializer_range = 0.1
    model.config.directionality = "bidi"


def described_otherwise(model: Any) -> None:
    model.config = copy.deepcopy(model.config)
    model.config.problem_type = "multi_label_classification"
    model.config.task_specific_params = {"a": 1}


TAKEN = [
    *(config_of_another_use, described_otherwise),
    *(every_activation, every_eps, fewer_layers, other_order, other_words, other_labels, no_dropout),
    *(activation_of_torch, modules_in_training, compiled_in_place, called_for_hidden_states),
    *(attributes_of_ones_own,),
]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("change", [*TAKEN, checkpointed], ids=lambda change: change.__name__)
def test_what_the_modules_say_is_computed(change: Callable[[Any], None]) -> None:
    model = tiny_bert()
    change(model)
    expected = answer(model)
    assert float((answer(fastcls.optimize(model)) - expected).abs().max()) <= 1e-5


@pytest.mark.parametrize("model_class", [OnlyMoreMethods, OnTheHub])
def test_a_subclass_with_more_methods_is_taken(model_class: Any) -> None:
    model = model_class(tiny_bert().config).eval()
    assert float((answer(fastcls.optimize(model)) - answer(model)).abs().max()) <= 1e-5


EDITED: list[tuple[str, str, dict[str, Any]]] = [
    ("BertForSequenceClassification", "bert", {"layer_norm_eps": 0.1, "hidden_act": "relu", "num_attention_heads": 2}),
    ("BertForSequenceClassification", "bert", {"num_hidden_layers": 2, "vocab_size": 300, "type_vocab_size": 9}),
    ("BertForSequenceClassification", "bert", {"max_position_embeddings": 300, "pad_token_id": 7}),
    ("RobertaForSequenceClassification", "roberta", {"pad_token_id": 0}),
    ("XLMRobertaForMaskedLM", "xlm-roberta", {"pad_token_id": 3, "num_attention_heads": 8}),
    ("DistilBertForSequenceClassification", "distilbert", {"activation": "relu", "n_heads": 2, "n_layers": 2}),
    ("ElectraForSequenceClassification", "electra", {"layer_norm_eps": 0.1, "num_attention_heads": 2}),
    ("AlbertForSequenceClassification", "albert", {"layer_norm_eps": 0.1, "num_attention_heads": 2}),
    ("MPNetForSequenceClassification", "mpnet", {"layer_norm_eps": 0.1, "num_attention_heads": 2, "pad_token_id": 3}),
    ("ModernBertForSequenceClassification", "modernbert", {"norm_eps": 0.1, "num_attention_heads": 2}),
    ("DebertaForSequenceClassification", "deberta", {"layer_norm_eps": 0.1, "num_attention_heads": 2}),
    ("DebertaForSequenceClassification", "deberta", {"max_relative_positions": 40, "type_vocab_size": 2}),
    ("DebertaV2ForSequenceClassification", "deberta-v2", {"max_position_embeddings": 100, "num_attention_heads": 2}),
]


@pytest.mark.parametrize(
    ("model_class", "family", "edits"), EDITED, ids=[f"{each[1]}-{'-'.join(each[2])}" for each in EDITED]
)
def test_a_config_that_was_edited_later_changes_nothing(model_class: str, family: str, edits: dict[str, Any]) -> None:
    model = tiny_model(model_class, family)
    ids = torch.randint(5, 199, (3, 40))
    expected = answer(model, ids)
    for name, value in edits.items():
        setattr(model.config, name, value)
    assert float((answer(fastcls.optimize(model), ids) - expected).abs().max()) <= 1e-5 * float(
        expected.abs().max() + 1
    )


@pytest.mark.parametrize(
    ("model_class", "family", "edits", "message"),
    [
        (
            "DebertaV2ForSequenceClassification",
            "deberta-v2",
            {"position_buckets": 4},
            "position_buckets must be 4.* got 8",
        ),
        ("DebertaV2ForSequenceClassification", "deberta-v2", {"share_att_key": False}, "must be"),
        ("DebertaForSequenceClassification", "deberta", {"pos_att_type": ["p2c"]}, "pos_att_type must be.*'p2c'"),
        ("ModernBertForSequenceClassification", "modernbert", {"local_attention": 4}, "sliding_window must be"),
        ("BertForSequenceClassification", "bert", {"hidden_size": 128}, r"word_embeddings.weight must have shape"),
        ("AlbertForSequenceClassification", "albert", {"inner_group_num": 1}, "albert_layers.1 must be nothing"),
    ],
)
def test_an_edit_that_no_module_answers_is_refused(model_class: str, family: str, edits: Any, message: str) -> None:
    model = tiny_model(model_class, family)
    for name, value in edits.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=message):
        fastcls.optimize(model)


@pytest.mark.full
@arithmetic_and_head
@pytest.mark.parametrize(("model_class", "family"), CLASSES, ids=[name for name, _ in CLASSES])
def test_every_module_of_every_class_is_looked_at(model_class: str, family: str) -> None:
    model = tiny_model(model_class, family)
    paths = [path for path, module in model.named_modules() if path and not isinstance(module, nn.CrossEntropyLoss)]
    for path in paths:
        handle = model.get_submodule(path).register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match=rf"model.{path} must have no forward hooks"):
            fastcls.optimize(model)
        handle.remove()
    assert fastcls.optimize(model) is not None


class LoraLinear(nn.Linear):
    """Named as adapters' layers are."""


class QuantLinear(nn.Linear):
    """Named as quantised layers are."""


@pytest.mark.parametrize(
    ("module_class", "advice"), [(LoraLinear, r"merge_and_unload\(\)"), (QuantLinear, "quantised are not taken")]
)
def test_what_to_do_about_adapters_and_quantised_layers_is_said(module_class: Any, advice: str) -> None:
    model = tiny_bert()
    layer(model, 1).attention.self.query = module_class(64, 64)
    with pytest.raises(ValueError, match=advice):
        fastcls.optimize(model)


def test_a_wrapper_is_refused_with_what_to_give_instead() -> None:
    with pytest.raises(TypeError, match="give the model that was compiled"):
        fastcls.optimize(cast("Any", torch.compile(tiny_bert())))
    with pytest.raises(TypeError, match="give the model that it wraps"):
        fastcls.optimize(nn.DataParallel(tiny_bert()))
