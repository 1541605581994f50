"""The model that is optimized stays as it was, and the fast one follows its weights."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import accelerate  # type: ignore[import-untyped]
import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, save_file, save_model
from support import TINY_FAMILIES, live_bytes, tiny_bert, tiny_model
from test_families import CLASSES, FILLERS, family_and_head
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, BertModel

import fastcls

IDS = torch.tensor([[5, 17, 33, 8, 90, 12], [7, 7, 150, 21, 3, 66]])
# All that follows from weights: joined matrices, DeBERTa's tables and convolution, rotary frequencies, ties.
FOLLOWING: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "bert", {}),
    "bert-fill": ("BertForMaskedLM", "bert", {}),
    "mpnet": ("MPNetForSequenceClassification", "mpnet", {}),
    "modernbert": ("ModernBertForSequenceClassification", "modernbert", {}),
    "by-head": ("DebertaForSequenceClassification", "deberta", {}),
    "grouped": ("EuroBertForSequenceClassification", "eurobert", {}),
    "deberta": ("DebertaV2ForSequenceClassification", "deberta-v2", {"conv_kernel_size": 3}),
    "deberta-apart": ("DebertaV2ForSequenceClassification", "deberta-v2", {"share_att_key": False}),
    "albert": ("AlbertForSequenceClassification", "albert", {}),
}


def answer(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        first: Tensor = model(input_ids=ids, return_dict=False)[0]
    return first.float()


def assert_follows(fast: Any, model: Any, what: str = "", bound: float = 2e-5) -> None:
    expected = answer(model.eval())
    assert float((answer(fast) - expected).abs().max()) <= bound * max(1.0, float(expected.abs().max())), what


def every_fact_of(model: nn.Module) -> dict[str, Any]:
    """What there is to be seen of a model's modules and tensors, and where these lie."""
    facts: dict[str, Any] = {}
    for path, module in model.named_modules():
        facts[path] = {
            name: (id(value), dict(value) if isinstance(value, dict) else None)
            for name, value in module.__dict__.items()
            if name != "training"
        }
        facts[f"{path}: mode"] = module.training
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        storage = tensor.untyped_storage()
        facts[f"{name}: tensor"] = (
            *(id(tensor), tensor.requires_grad, tensor.grad, tensor._version, tensor.stride(), tensor.storage_offset()),
            *(storage.data_ptr(), storage.nbytes(), tensor.detach().numpy().tobytes()),
        )
    return facts


@family_and_head
@pytest.mark.parametrize(("model_class", "family"), CLASSES, ids=[name for name, _ in CLASSES])
def test_the_model_stays_as_it_was(model_class: str, family: str) -> None:
    model = tiny_model(model_class, family)
    config, before = copy.deepcopy(model.config.to_dict()), every_fact_of(model)
    fast = fastcls.optimize(model)
    ids = IDS[None] if "MultipleChoice" in model_class else IDS
    fast(ids)
    fast.to(torch.float64)(ids)
    fast.load_state_dict(fast.state_dict())
    assert every_fact_of(model) == before
    assert model.config.to_dict() == config


class OnTheHub(nn.Module, PyTorchModelHubMixin):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder


def saved_by_torch(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    torch.save(model.state_dict(), folder / "weights.pt")
    loaded: dict[str, Tensor] = torch.load(folder / "weights.pt")
    return loaded


def saved_by_accelerate(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    accelerate.Accelerator(cpu=True).save_model(model, folder)
    return load_file(folder / "model.safetensors")


def saved_whole(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    save_model(model, str(folder / "model.safetensors"))
    return load_file(folder / "model.safetensors")


def saved_by_dict(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    save_file(model.state_dict(), folder / "model.safetensors")
    return load_file(folder / "model.safetensors")


def saved_by_the_hubs_mixin(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    OnTheHub(model).save_pretrained(folder)
    return {name.removeprefix("encoder."): weight for name, weight in load_file(folder / "model.safetensors").items()}


def saved_by_transformers(model: Any, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


SAVES = [saved_by_torch, saved_by_accelerate, saved_whole, saved_by_dict, saved_by_the_hubs_mixin]


@pytest.mark.parametrize("fast", [False, True], ids=["given", "fast"])
@pytest.mark.parametrize("save", [*SAVES, saved_by_transformers])
def test_both_are_saved_whole_by_every_usual_way(save: Callable[..., Any], fast: bool, tmp_path: Path) -> None:
    model = tiny_bert()
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimized = fastcls.optimize(model)
    saved = save(optimized if fast else model, tmp_path)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in expected.items())


def test_one_module_is_pickled_once() -> None:
    model = tiny_bert()
    query = model.bert.encoder.layer[0].attention.self.query

    def size() -> int:
        written = io.BytesIO()
        torch.save(query, written)
        return written.tell()

    before = size()
    assert fastcls.optimize(model) is not None
    assert size() == before


def test_the_model_is_trained_moved_resized_and_copied_as_ever() -> None:
    model, untouched = tiny_bert(), tiny_bert()
    assert fastcls.optimize(model) is not None
    for each in (model, untouched):
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.01)
        each(IDS, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        each.resize_token_embeddings(205, mean_resizing=False)
        each.bert.embeddings.word_embeddings.weight.data[199:] = 0.5
    assert torch.equal(answer(copy.deepcopy(model)), answer(untouched))
    assert torch.equal(answer(pickle.loads(pickle.dumps(model))), answer(untouched))
    assert torch.equal(answer(model.double()), answer(untouched.double()))


def in_place(model: Any) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)


def by_an_optimizer(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    model(input_ids=IDS, return_dict=False)[0].square().sum().backward()
    optimizer.step()


def by_loading(model: Any, **options: Any) -> None:
    model.load_state_dict({name: weight.clone() * 1.1 for name, weight in model.state_dict().items()}, **options)


def by_assigning(model: Any) -> None:
    by_loading(model, assign=True)
    model.tie_weights()


def by_other_tensors(model: Any) -> None:
    for weight in {id(weight): weight for weight in model.parameters()}.values():
        weight.data = weight.data * 1.1


def by_other_parameters(model: Any) -> None:
    fresh: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in [*module.named_parameters(recurse=False)]:
            fresh.setdefault(id(weight), nn.Parameter(weight.detach() * 1.1))
            setattr(module, name, fresh[id(weight)])


def by_a_fused_optimizer(model: Any) -> None:
    # It writes to weights without counting.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)
    model(input_ids=IDS, return_dict=False)[0].square().sum().backward()
    optimizer.step()


def one_alone(model: Any) -> None:
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if name.endswith("bias")).add_(0.5)


CHANGES = [
    *(in_place, by_an_optimizer, by_a_fused_optimizer, by_loading, by_assigning, by_other_tensors, by_other_parameters),
    one_alone,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", list(FOLLOWING))
def test_the_fast_model_follows(kind: str, change: Callable[[Any], None]) -> None:
    model_class, family, options = FOLLOWING[kind]
    model = tiny_model(model_class, family, **options)
    fast = fastcls.optimize(model)
    before = answer(fast)
    for _ in range(2):
        # Twice, since a weight that took another's place is followed in its turn.
        change(model)
        assert_follows(fast, model, kind)
    assert not torch.allclose(answer(fast), before)


@pytest.mark.parametrize("move", [torch.bfloat16, torch.float64], ids=str)
def test_a_fast_model_elsewhere_follows_in_its_own_dtype(move: torch.dtype) -> None:
    model = tiny_bert()
    fast = fastcls.optimize(model).to(move)
    in_place(model)
    assert_follows(fast, model, bound=0.1 if move == torch.bfloat16 else 2e-5)
    assert fast.dtype == move


def test_a_model_that_moves_leaves_the_fast_one_where_it_is() -> None:
    model = tiny_bert()
    fast = fastcls.optimize(model)
    model.double()
    in_place(model)
    assert_follows(fast, model)
    in_place(model)
    assert_follows(fast, model)
    assert fast.dtype == torch.float32
    before = answer(fast)
    model.to("meta")
    assert torch.equal(answer(fast), before)


def test_rotary_frequencies_are_the_models_own() -> None:
    model = tiny_model("ModernBertForSequenceClassification", "modernbert", local_attention=64)
    # Rounded for good: float() gives the weights their dtype back, and no frequency its bits.
    model = model.to(torch.bfloat16).float()
    with torch.no_grad():
        model.model.rotary_emb.full_attention_inv_freq.mul_(1.3)
    ids = torch.randint(5, 199, (2, 60))
    fast = fastcls.optimize(model)
    assert float((answer(fast, ids) - answer(model, ids)).abs().max()) <= 2e-5
    with torch.no_grad():
        model.model.rotary_emb.sliding_attention_inv_freq.mul_(0.7)
    assert float((answer(fast, ids) - answer(model, ids)).abs().max()) <= 2e-5


def test_what_counts_no_changes_is_seen_after_clear_caches() -> None:
    model = tiny_bert()
    fast = fastcls.optimize(model)
    for weight in model.parameters():
        weight.data.mul_(1.1)
    fast.clear_caches()
    assert_follows(fast, model)


def test_weights_made_in_inference_mode_are_taken() -> None:
    with torch.inference_mode():
        model = tiny_bert()
    assert_follows(fastcls.optimize(model), model)


def out_of_order(model: Any) -> None:
    layer = model.bert.encoder.layer[1]
    for linear in (layer.attention.self.key, layer.output.dense, model.bert.embeddings.word_embeddings):
        linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
    assert not layer.output.dense.weight.is_contiguous()


def tied(model: Any) -> None:
    attention = model.bert.encoder.layer[1].attention.self
    attention.key.weight = attention.query.weight
    model.bert.encoder.layer[2].output.dense.weight = model.bert.encoder.layer[0].output.dense.weight


def expanded(model: Any) -> None:
    norm = model.bert.encoder.layer[0].output.LayerNorm
    norm.bias = nn.Parameter(torch.full((1,), 0.25).expand(64))


@pytest.mark.parametrize("prepare", [out_of_order, tied, expanded])
def test_weights_that_lie_otherwise_are_right_and_followed(prepare: Callable[[Any], None]) -> None:
    model = tiny_bert()
    prepare(model)
    fast = fastcls.optimize(model)
    assert_follows(fast, model)
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.query.weight.mul_(1.5)
        model.bert.encoder.layer[0].output.dense.weight.mul_(1.5)
        model.bert.encoder.layer[1].output.dense.weight.mul_(1.5)
    assert_follows(fast, model)


def another_module(model: Any) -> None:
    model.classifier = nn.Linear(64, 3)


def another_shape(model: Any) -> None:
    model.resize_token_embeddings(250, mean_resizing=False)


def one_layer_more(model: Any) -> None:
    model.bert.encoder.layer.append(copy.deepcopy(model.bert.encoder.layer[0]))


def a_weight_less(model: Any) -> None:
    model.classifier.bias = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_module, r"^classifier of the model .* another module stands there: optimize the model again"),
        (another_shape, "word_embeddings.* of the model that this one was made of was replaced since"),
        (a_weight_less, r"^classifier.bias of the model .* it is None"),
        (one_layer_more, r"^bert.encoder.layer.0 of the model .* more or fewer modules"),
    ],
)
def test_a_model_that_became_another_one_is_named(change: Callable[[Any], None], message: str) -> None:
    model = tiny_bert()
    fast = fastcls.optimize(model)
    before = answer(fast)
    change(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            fast(IDS)
    fast.stop_following()
    assert torch.equal(answer(fast), before)


def test_what_is_loaded_is_the_fast_models_own() -> None:
    model = tiny_bert()
    kept = answer(model)
    fast = fastcls.optimize(model)
    fast.load_state_dict({name: weight * 1.1 for name, weight in fast.state_dict().items()})
    loaded = answer(fast)
    assert torch.equal(answer(model), kept)
    assert not torch.allclose(loaded, kept)
    in_place(model)
    assert torch.equal(answer(fast), loaded)


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))],
    ids=["copy", "deep_copy", "pickle"],
)
def test_copies_have_weights_of_their_own(copied: Callable[[Any], Any]) -> None:
    model = tiny_bert()
    fast = fastcls.optimize(model)
    twin = copied(fast)
    before = answer(twin)
    in_place(model)
    assert torch.equal(answer(twin), before)
    assert_follows(fast, model)


class Both(nn.Module):
    """As a trainer's module has it: what is trained, and what evaluates it."""

    def __init__(self, model: nn.Module, *, fast_first: bool) -> None:
        super().__init__()
        self.fast: Any
        self.model: Any
        fast = fastcls.optimize(model)
        for name, module in (
            reversed([("model", model), ("fast", fast)]) if fast_first else [("model", model), ("fast", fast)]
        ):
            self.add_module(name, module)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("is_called", [False, True], ids=["trained_first", "called_first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_module_that_holds_both_is_loaded_and_the_fast_one_follows_on(
    assign: bool, is_called: bool, dtype: torch.dtype
) -> None:
    both = Both(tiny_bert(), fast_first=False)
    state = {name: weight.clone() for name, weight in both.state_dict().items()}
    if not assign:
        both.to(dtype)
    in_place(both.model)
    both.load_state_dict(state, assign=assign)
    both.load_state_dict(state, assign=assign)
    bound = 2e-5 if both.fast.dtype == torch.float32 else 0.1
    if is_called:
        assert_follows(both.fast, both.model, "as loaded", bound)
    by_an_optimizer(both.model)
    assert_follows(both.fast, both.model, "trained on", bound)


def test_who_loads_the_fast_model_before_the_other_is_warned() -> None:
    both = Both(tiny_bert(), fast_first=True)
    state = {name: weight.clone() for name, weight in both.state_dict().items()}
    in_place(both.model)
    with pytest.warns(RuntimeWarning, match="goes on with these, and follows that model no longer"):
        both.load_state_dict(state)
    assert_follows(both.fast, both.model, "as loaded")
    by_an_optimizer(both.model)
    assert torch.equal(both.fast.state_dict()["classifier.weight"], state["fast.classifier.weight"])


@pytest.mark.parametrize("alive", ["model", "encoder", "nothing"])
def test_other_weights_loaded_into_a_part_are_its_own(alive: str) -> None:
    model, other = tiny_bert(), tiny_bert()
    in_place(other)
    part = nn.ModuleList([fastcls.optimize(model)])
    before, expected = answer(model), answer(other)
    encoder = model.bert if alive == "encoder" else None
    state = {f"0.{name}": weight for name, weight in other.state_dict().items()}
    if alive != "model":
        del model
        gc.collect()
    if alive == "nothing":
        part.load_state_dict(state)
    else:
        with pytest.warns(RuntimeWarning, match="goes on with these"):
            part.load_state_dict(state)
    # Before anything else looks at them.
    assert torch.equal(dict(part.named_parameters())["0.head.out_weight"], other.classifier.weight)
    # What was given is not held: its owner may write to it.
    in_place(other)
    assert float((answer(part[0]) - expected).abs().max()) <= 1e-4
    if alive == "model":
        assert torch.equal(answer(model), before)
        in_place(model)
        assert float((answer(part[0]) - expected).abs().max()) <= 1e-4
    del encoder


def test_a_model_that_is_optimized_in_inference_mode_is_trained_on() -> None:
    for name, family, options in FOLLOWING.values():
        model = tiny_model(name, family, **options)
        with torch.inference_mode():
            fast = fastcls.optimize(model)
            fast(IDS)
        in_place(model)
        assert_follows(fast, model)


class Tagged(Tensor):
    """Of a class of its own."""


def test_a_tensor_that_became_one_of_another_class_is_named() -> None:
    model = tiny_bert()
    fast = fastcls.optimize(model)
    swapped = nn.Parameter(torch.zeros(64, 64).as_subclass(Tagged))
    torch.utils.swap_tensors(model.bert.encoder.layer[0].attention.self.query.weight, swapped)
    with pytest.raises(
        RuntimeError, match=r"layer.0.attention.self.query.weight .*must be a plain tensor, got a .*Tagged"
    ):
        fast(IDS)


def test_tensors_that_stand_in_for_one_call_stay_as_they_are() -> None:
    model = tiny_bert()
    fast = fastcls.optimize(model)
    given = {"head.out_weight": torch.zeros(3, 64), "head.out_bias": torch.ones(3)}
    with torch.no_grad():
        model.classifier.weight.mul_(2)
        model.bert.encoder.layer[0].attention.self.query.weight.mul_(2)
    found = torch.func.functional_call(fast, given, (IDS,)).logits
    assert torch.equal(found, torch.ones(2, 3))
    assert not given["head.out_weight"].any()
    assert_follows(fast, model)


def test_the_copy_of_query_key_and_value_is_all_that_it_costs() -> None:
    model = tiny_bert(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, vocab_size=2000)
    size = sum(weight.numel() * 4 for weight in model.parameters())
    joined = 6 * 3 * (256 * 256 + 256) * 4
    live_before = live_bytes()
    fast = fastcls.optimize(model)
    assert joined <= live_bytes() - live_before <= joined + 0.01 * size
    assert fast is not None
    # With the model its own query, key and value go.
    del model
    assert live_bytes() - live_before <= 0.01 * size


def test_release_leaves_nothing_twice_and_nothing_behind() -> None:
    model = tiny_model("BertForMaskedLM", "bert", hidden_size=256, intermediate_size=1024, vocab_size=2000)
    size = sum(weight.numel() * 4 for weight in model.parameters())
    expected = answer(model)
    live_before = live_bytes()
    fast = fastcls.optimize(model, release=True)
    assert live_bytes() - live_before <= 0.01 * size
    assert float((answer(fast) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert all(weight.is_meta for weight in model.parameters())
    with pytest.raises((RuntimeError, NotImplementedError)):
        answer(model).tolist()


def test_a_part_that_outlives_the_model_is_followed() -> None:
    model = tiny_bert()
    fast, encoder = fastcls.optimize(model), model.bert
    classifier = copy.deepcopy(model.classifier)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    in_place(encoder)
    again = BertForSequenceClassification(encoder.config).eval()
    again.bert, again.classifier = encoder, classifier
    assert_follows(fast, again)


@pytest.mark.parametrize(("model_class", "family"), FILLERS[:1], ids=["BertForMaskedLM"])
def test_no_weight_is_there_twice_but_for_what_is_joined(model_class: str, family: str) -> None:
    model = tiny_model(model_class, family)
    fast = fastcls.optimize(model)
    places = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    own = [name for name, weight in fast.named_parameters() if weight.untyped_storage().data_ptr() not in places]
    assert all("qkv" in name for name in own)


@pytest.mark.parametrize("family", list(TINY_FAMILIES))
def test_a_fast_models_pickle_is_the_same_after_calls(family: str) -> None:
    name = next(name for name, each in CLASSES if each == family and name.endswith("ForSequenceClassification"))
    fast = fastcls.optimize(tiny_model(name, family))
    before = pickle.dumps(fast)
    answer(fast)
    assert pickle.dumps(fast) == before


def test_a_model_on_two_devices_or_none_is_refused() -> None:
    model = tiny_bert()
    model.classifier.to("meta")
    with pytest.raises(ValueError, match="on one device that holds data, got cpu, meta"):
        fastcls.optimize(model)


class Own(Tensor):
    """A tensor that computes in a way of its own, as quantised and distributed ones do."""


def test_weights_that_are_no_plain_tensors_are_refused() -> None:
    model = tiny_bert()
    dense = model.bert.encoder.layer[1].output.dense
    dense.weight = nn.Parameter(dense.weight.detach().as_subclass(Own))
    with pytest.raises(ValueError, match=r"model.bert.encoder.layer.1.output.dense.weight must be a plain tensor, got"):
        fastcls.optimize(model)


def test_save_pretrained_reads_back_what_was_followed(tmp_path: Path) -> None:
    model = tiny_bert()
    fast = fastcls.optimize(model)
    in_place(model)
    fast.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(answer(again), answer(model))


def test_a_tie_that_is_cut_is_named() -> None:
    model = tiny_model("BertForMaskedLM", "bert")
    fast = fastcls.optimize(model)
    model.load_state_dict({name: weight.clone() for name, weight in model.state_dict().items()}, assign=True)
    with pytest.raises(
        RuntimeError, match=r"cls.predictions.decoder.(bias|weight) of the model .* is tied to .* no longer"
    ):
        fast(IDS)


def gone(model: list[Any], _fast: Any) -> None:
    model.clear()
    gc.collect()


def no_longer_followed(_model: list[Any], fast: Any) -> None:
    fast.stop_following()


def released_to_another(model: list[Any], _fast: Any) -> None:
    fastcls.optimize(model[0], release=True)


def saved(_model: list[Any], fast: Any) -> Any:
    return pickle.loads(pickle.dumps(fast))


@pytest.mark.parametrize("end", [gone, no_longer_followed, released_to_another, saved])
def test_a_change_just_before_following_ends_is_not_lost(end: Callable[[list[Any], Any], Any]) -> None:
    model = [tiny_bert()]
    fast = fastcls.optimize(model[0])
    in_place(model[0])
    expected = answer(model[0])
    fast = end(model, fast) or fast
    assert float((answer(fast) - expected).abs().max()) <= 2e-5


def test_a_release_is_nobody_elses_affair() -> None:
    model, other = tiny_bert(), tiny_bert()
    fast, unrelated = fastcls.optimize(model), fastcls.optimize(other)
    other.resize_token_embeddings(250, mean_resizing=False)
    released = fastcls.optimize(model, release=True)
    assert torch.equal(answer(released), answer(fast))
    with pytest.raises(RuntimeError, match="was replaced since"):
        unrelated(IDS)


def test_a_doubt_outlasts_a_refusal() -> None:
    model = tiny_bert()
    fast = fastcls.optimize(model)
    model.bert.encoder.layer[0].attention.self.query.weight.data.mul_(3)
    fast.clear_caches()
    kept, model.classifier.weight = model.classifier.weight, nn.Parameter(torch.zeros(3, 32))
    with pytest.raises(RuntimeError, match="its shape was"):
        fast(IDS)
    model.classifier.weight = kept
    assert_follows(fast, model)


def test_what_is_loaded_into_the_base_model_is_not_the_originals() -> None:
    model = tiny_bert()
    kept = answer(model)
    fast = fastcls.optimize(model)
    encoder = fast.base_model
    encoder.load_state_dict({name: weight * 1.1 for name, weight in encoder.state_dict().items()})
    assert torch.equal(answer(model), kept)
    assert not torch.allclose(answer(fast), kept)
    again = fastcls.optimize(model).base_model
    again.stop_following()
    before = answer(again)
    in_place(model)
    assert torch.equal(answer(again), before)


def test_threads_optimize_side_by_side_and_leave_torch_as_it_was() -> None:
    models = [tiny_bert(num_hidden_layers=layers, hidden_dropout_prob=layers / 100) for layers in (1, 2, 4, 5)]
    before = (nn.init.kaiming_uniform_, nn.init.normal_)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(fastcls.optimize, models))
    assert (nn.init.kaiming_uniform_, nn.init.normal_) == before
    for fast, model in zip(made, models, strict=True):
        assert_follows(fast, model)


def test_a_thread_that_trains_and_others_that_call() -> None:
    model = tiny_model("DebertaV2ForSequenceClassification", "deberta-v2")
    fast = fastcls.optimize(model)
    done = threading.Event()

    def call() -> int:
        calls = 0
        while not done.is_set():
            answer(fast)
            calls += 1
        return calls

    with ThreadPoolExecutor(2) as pool:
        callers = [pool.submit(call) for _ in range(2)]
        for _ in range(20):
            by_loading(model, assign=True)
            in_place(model)
        done.set()
        assert all(caller.result() for caller in callers)
    assert_follows(fast, model)


def odd_head(model: Any) -> None:
    model.classifier = nn.Linear(64, 5)


def fewer_layers(model: Any) -> None:
    del model.bert.encoder.layer[2:]


@pytest.mark.parametrize("change", [odd_head, fewer_layers])
def test_save_pretrained_writes_what_the_modules_are(change: Callable[[Any], None], tmp_path: Path) -> None:
    model = tiny_bert()
    change(model)
    fastcls.optimize(model).save_pretrained(tmp_path)
    saved_weights = load_file(tmp_path / "model.safetensors")
    assert saved_weights.keys() == model.state_dict().keys()
    assert all(torch.equal(saved_weights[name], weight) for name, weight in model.state_dict().items())


def test_an_encoder_without_a_pooler_is_saved(tmp_path: Path) -> None:
    model = BertModel(tiny_bert().config, add_pooling_layer=False).eval()
    fastcls.optimize(model).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
