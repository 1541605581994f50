"""Models whose products are computed in int8, and models whose weights are packed, against the same ones otherwise."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import pickle
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
from support import MANY_LABELS, TINY_FAMILIES, assert_as_exact_as, live_bytes, tiny_bert, tiny_model
from test_families import (
    CLASSES,
    CLASSIFIERS,
    LENGTH,
    answers,
    arithmetic_and_head,
    assert_close,
    batch,
    by_family_and_head,
    every_class,
    every_classifier,
    family_and_head,
    in_float64,
    shaped_for,
)
from test_invariance import check_random_batches, texts_of
from test_original import CHANGES, FOLLOWING, IDS, answer, by_other_tensors, in_place
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize
from transformers import BertConfig, BertForSequenceClassification

import fastcls
from fastcls.engine.packed import is_plain
from fastcls.engine.spec import LastLayer
from fastcls_kernels import use_backend
from fastcls_kernels.packed import explain_compiled, pack_weight

RUNGS = get_args(LastLayer)


@pytest.fixture(autouse=True)
def compiled() -> None:
    runs, reason = explain_compiled("int8")
    if not runs:
        pytest.skip(f"the compiled kernels cannot compute int8: {reason}")


def computing_by(path: str) -> contextlib.AbstractContextManager[None]:
    """Has the compiled kernels compute, or PyTorch's operators."""
    return use_backend("torch") if path == "torch" else contextlib.nullcontext()


def int8(model: Any, **options: Any) -> Any:
    return fastcls.optimize(model, quantize="int8", **options)


def rms(numbers: Tensor) -> float:
    return float(numbers.double().square().mean().sqrt())


def many(model_class: str) -> dict[str, Tensor]:
    """Texts of odd lengths, enough of them that the RMS of few answers a text says something."""
    inputs = batch(rows=24, length=30)
    lengths = torch.tensor([30, 3, 17, 1, 25, 29, 22, 8] * 3)
    inputs["attention_mask"] = (torch.arange(30) < lengths[:, None]).long()
    return shaped_for(model_class, inputs)


# The definition


def stepped(x: Tensor) -> Tensor:
    """Rows as an int8 product reads them: by groups of 128, each a scale and a zero point for 256 steps."""
    parts = []
    for part in x.split(128, -1):
        low, high = part.amin(-1, keepdim=True).clamp(max=0), part.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low).clamp(min=1e-30) / 255
        zero_point = (-low / scale).round()
        parts.append(scale * (((part / scale).round() + zero_point).clamp(0, 255) - zero_point))
    return torch.cat(parts, -1)


def by_definition(model: Any) -> Any:
    """A copy of a transformers model whose layers' products, and table of words, are those of int8."""
    embeddings = fastcls.optimize(model).encoder.embeddings
    model = copy.deepcopy(model)
    for name, module in model.base_model.named_modules():
        # DeBERTa's tables of distances are multiplied in float32.
        if isinstance(module, nn.Linear) and "layer" in name and "pos_" not in name:
            scale = module.weight.data.abs().amax(1, keepdim=True) / 127
            module.weight.data = scale * (module.weight.data / scale).round()
            module.register_forward_pre_hook(lambda _module, given: (stepped(given[0]), *given[1:]))
    if embeddings.norm_weight is None or embeddings.spec.mask_token_id is not None:
        # The table stays as it is without a norm behind it, and where words are changed before positions are added.
        return model
    table = model.get_input_embeddings()
    parts = []
    for part in table.weight.data.split(128, 1):
        scale = (part.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
        parts.append(scale * (part / scale).round())
    table.weight.data = torch.cat(parts, 1)
    return model


# DeBERTa v2 projects its table of distances by the layers' own weights, which stay as they are for that, as X-MOD's
# adapters do.
DEFINED = [pair for pair in CLASSIFIERS if pair[1] not in ("deberta-v2", "xmod")]


# Compiled kernels take a rougher GELU, whose error of 2.4e-5 moves more numbers to the next step than others do.
OFTEN, RARELY = 0.6, 0.25


@pytest.mark.parametrize("last_layer", RUNGS)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("path", ["compiled", "torch"])
@pytest.mark.parametrize(("model_class", "family"), DEFINED, ids=[family for _, family in DEFINED])
def test_int8_is_what_is_defined(
    model_class: str, family: str, path: str, activation: str, last_layer: LastLayer
) -> None:
    option = {"distilbert": "activation", "modernbert": "hidden_activation"}.get(family, "hidden_act")
    sizes = {option: activation, "num_labels": MANY_LABELS}
    model = tiny_model(model_class, family, attn_implementation="eager", **sizes)
    inputs = many(model_class)
    expected, usual = (answers(each, inputs)["logits"] for each in (by_definition(model), model))
    fast = int8(model, last_layer=last_layer)
    with computing_by(path):
        found = answers(fast, inputs)["logits"]
    # A number that lies between two steps falls the other way where a sum before it is rounded otherwise.
    bound = OFTEN if (path, activation) == ("compiled", "gelu") else RARELY
    assert rms(found - expected) <= bound * rms(usual - expected)
    assert rms(found - usual) <= 1.2 * rms(usual - expected)


@family_and_head
@every_class
def test_int8_is_the_same_from_the_compiled_kernels_and_from_pytorch(model_class: str, family: str) -> None:
    model = tiny_model(model_class, family)
    inputs = many(model_class)
    fast = int8(model)
    found = answers(fast, inputs)
    with use_backend("torch"):
        expected = answers(fast, inputs)
    fast.quantize = None
    usual = answers(fast, inputs)
    for name, each in found.items():
        error = rms(expected[name] - usual[name])
        # Without biases int8's steps are a larger part.
        assert 0 < error <= (0.12 if family == "nomic_bert" else 0.1) * rms(usual[name])
        # Of few numbers, as a choice has, many may lie between two steps by chance.
        assert rms(each - expected[name]) <= error, name


@pytest.mark.parametrize("mask", ["right_padding", "holes", "none"])
@pytest.mark.covering(by=by_family_and_head, alone=["family", "head", "mask"])
@every_class
def test_packed_weights_change_nothing_but_roundings(model_class: str, family: str, mask: str) -> None:
    model = tiny_model(model_class, family, attn_implementation="eager")
    inputs = shaped_for(model_class, batch(mask))
    expected = answers(model, inputs)
    for pack_weights in (True, False):
        fast = fastcls.optimize(model, pack_weights=pack_weights)
        for fast.last_layer in RUNGS:
            assert_close(answers(fast, inputs), expected, 1e-5, f"{pack_weights} {fast.last_layer}")
        assert fast.encoder.packed.packing == ("float32" if pack_weights else None)


@arithmetic_and_head
@pytest.mark.parametrize("pack_weights", [True, False], ids=["packed", "as_they_are"])
@every_classifier
def test_packed_weights_are_as_exact_in_bfloat16(model_class: str, family: str, pack_weights: bool) -> None:
    model = tiny_model(model_class, family, attn_implementation="eager", num_labels=MANY_LABELS).to(torch.bfloat16)
    inputs = {name: tensor.repeat(4, 1) for name, tensor in many(model_class).items()}
    fast = fastcls.optimize(model, pack_weights=pack_weights)
    exact, eager = (answers(each, inputs)["logits"] for each in (in_float64(model), model))
    for fast.last_layer in RUNGS:
        assert_as_exact_as(answers(fast, inputs)["logits"], [eager], exact, fast.last_layer)
    is_packed = pack_weights and explain_compiled("bfloat16")[0] and is_plain(fast.spec)
    assert fast.encoder.packed.packing == ("bfloat16" if is_packed else None)


def near(found: Tensor, expected: Tensor, bound: float) -> None:
    assert float((found - expected).abs().max()) <= bound * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("computed", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("model_class", "family"), [CLASSIFIERS[0], ("AlbertForSequenceClassification", "albert")])
def test_a_hook_sees_each_layer_and_changes_nothing(model_class: str, family: str, computed: str) -> None:
    dtype = torch.bfloat16 if computed == "bfloat16" else torch.float32
    model = tiny_model(model_class, family, num_labels=MANY_LABELS).to(dtype)
    inputs = many(model_class)
    exact, eager = (answers(each, inputs)["logits"] for each in (in_float64(model), model))
    fast = fastcls.optimize(model, quantize="int8" if computed == "int8" else None, last_layer="full")
    before = answers(fast, inputs)["logits"]
    seen: list[Tensor] = []
    handle = fast.encoder.layers[0].register_forward_hook(lambda _module, _given, states: seen.append(states.normed))
    found = answers(fast, inputs)["logits"]
    assert seen
    if computed == "int8":
        # Attention sums in another order, which moves numbers between two steps.
        assert rms(found - before) <= OFTEN * rms(before - eager)
    elif computed == "bfloat16":
        assert_as_exact_as(found, [eager], exact)
    else:
        near(found, before, 1e-5)
    handle.remove()
    assert torch.equal(answers(fast, inputs)["logits"], before)


@pytest.mark.parametrize("quantize", [None, "int8"], ids=str)
def test_a_hook_on_the_embeddings_is_heeded_and_keeps_its_rows(quantize: Any) -> None:
    fast = fastcls.optimize(tiny_bert(), quantize=quantize)
    before, kept = answer(fast), []

    def double(_module: Any, _given: Any, rows: Tensor) -> Tensor:
        kept.append((rows * 2, (rows * 2).clone()))
        return kept[-1][0]

    handle = fast.encoder.embeddings.register_forward_hook(double)
    assert not torch.allclose(answer(fast), before)
    handle.remove()
    assert torch.equal(answer(fast), before)
    # The layers write over their input, but not over the hook's own.
    assert all(torch.equal(rows, copied) for rows, copied in kept)


@every_classifier
def test_embeddings_of_the_callers(model_class: str, family: str) -> None:
    fast = int8(tiny_model(model_class, family))
    embedded = fast.get_input_embeddings()(IDS)
    kept = embedded.clone()
    with torch.no_grad():
        found = fast(inputs_embeds=embedded).logits
    assert torch.equal(embedded, kept)
    expected = answer(fast)
    fast.quantize = None
    # The caller's are not in int8, as the table of words is.
    assert rms(found - expected) <= (3 if family == "nomic_bert" else 2) * rms(expected - answer(fast))
    assert rms(found - answer(fast)) <= 0.1 * rms(expected)


INVARIANT = ("bert", "albert", "mpnet", "modernbert", "deberta-v2")


@pytest.mark.parametrize("quantize", [None, "int8"], ids=str)
@pytest.mark.parametrize("last_layer", RUNGS)
@pytest.mark.parametrize("family", INVARIANT)
def test_a_texts_bits_are_its_own(family: str, last_layer: LastLayer, quantize: Any) -> None:
    name = {family: name for name, family in CLASSIFIERS}[family]
    fast = fastcls.optimize(tiny_model(name, family), quantize=quantize, last_layer=last_layer, batch_invariant=True)
    check_random_batches(fast, texts_of((1, 2, 3, 15, 16, 17, 33, 64, 65, 94)), 4, 16)


@pytest.mark.parametrize("quantize", [None, "int8"], ids=str)
def test_a_texts_bits_are_its_own_in_bfloat16_and_by_mean(quantize: Any) -> None:
    kind = tiny_model("BertModel", "bert")
    fast = fastcls.optimize(kind if quantize else kind.to(torch.bfloat16), quantize=quantize, batch_invariant=True)
    check_random_batches(fast, texts_of((1, 2, 4, 15, 16, 17, 33, 64, 65, 94)), 4, 16)


@pytest.mark.parametrize("path", ["compiled", "torch"])
def test_texts_of_several_passes(path: str) -> None:
    # More tokens than a pass takes, empty texts among them.
    fast = int8(tiny_bert())
    mask = (torch.arange(40) < torch.randint(0, 41, (130, 1))).long()
    mask[[0, 7, 129]] = 0
    ids = torch.randint(5, 199, mask.shape)
    with torch.no_grad(), computing_by(path):
        found = fast(input_ids=ids, attention_mask=mask).logits
        fast.quantize = None
        usual = fast(input_ids=ids, attention_mask=mask).logits
    empty = mask.sum(1) == 0
    assert bool(found[empty].isnan().all())
    assert rms(found[~empty] - usual[~empty]) <= 0.1 * rms(usual[~empty])


# Weights that change


@pytest.mark.covering(alone=["kind", "change"])
@pytest.mark.parametrize("quantize", ["int8", None], ids=str)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", list(FOLLOWING))
def test_packed_weights_follow(kind: str, change: Callable[[Any], None], quantize: Any) -> None:
    model_class, family, options = FOLLOWING[kind]
    model = tiny_model(model_class, family, **options)
    fast = fastcls.optimize(model, quantize=quantize)
    before = answer(fast)
    for _ in range(2):
        change(model)
        assert torch.equal(answer(fast), answer(fastcls.optimize(model.eval(), quantize=quantize)))
    assert not torch.allclose(answer(fast), before)


def test_a_change_twice_between_two_calls_is_seen() -> None:
    # The memory of the weights before may be that of the ones after.
    model = tiny_bert()
    fast = int8(model)
    for _ in range(8):
        for _ in range(2):
            by_other_tensors(model)
        assert torch.equal(answer(fast), answer(int8(model)))


@pytest.mark.parametrize("quantize", ["int8", None], ids=str)
def test_what_counts_no_changes_is_seen_after_clear_caches(quantize: Any) -> None:
    model = tiny_bert()
    fast = fastcls.optimize(model, quantize=quantize)
    answer(fast)
    for weight in model.parameters():
        weight.data.mul_(1.1)
    fast.clear_caches()
    assert torch.equal(answer(fast), answer(fastcls.optimize(model, quantize=quantize)))


@pytest.mark.parametrize("quantize", ["int8", None], ids=str)
def test_each_weight_alone_is_followed(quantize: Any) -> None:
    model = tiny_bert(num_hidden_layers=1)
    fast = fastcls.optimize(model, quantize=quantize)
    before = answer(fast)
    for name, weight in model.named_parameters():
        with torch.no_grad():
            weight.add_(torch.randn_like(weight) * 0.1)
        if "position" in name or "token_type" in name:
            continue
        after = answer(fast)
        # A key's bias adds one number to all scores of a row.
        assert "key.bias" in name or not torch.equal(after, before), name
        assert torch.equal(after, answer(fastcls.optimize(model, quantize=quantize))), name
        before = after


@pytest.mark.parametrize("quantize", ["int8", None], ids=str)
def test_what_is_loaded_or_put_in_place_is_packed(quantize: Any) -> None:
    fast, other = (fastcls.optimize(tiny_bert(), quantize=quantize) for _ in range(2))
    answer(fast)
    state = {name: weight * 1.1 for name, weight in fast.state_dict().items()}
    fast.load_state_dict(state)
    other.load_state_dict(state)
    assert torch.equal(answer(fast), answer(other))
    for each in (fast, other):
        each.encoder.layers[1].up_weight = nn.Parameter(each.encoder.layers[1].up_weight * 2, requires_grad=False)
    other.clear_caches()
    assert torch.equal(answer(fast), answer(other))


def places(fast: Any) -> set[int]:
    return {made.qkv.panels.data_ptr() for made in fast.encoder.packed._made}


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("encoder.layers.0", "up_weight"),
        ("encoder.layers.1", "output_norm_bias"),
        ("encoder.embeddings", "word_weight"),
        ("head", "dense_weight"),
    ],
)
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_what_a_parametrization_makes_is_packed_as_it_is_now(where: str, name: str, quantize: Any) -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = tiny_bert()
    fast, plain = (fastcls.optimize(copy.deepcopy(model), quantize=quantize) for _ in range(2))
    answer(fast)
    place = fast.get_submodule(where)
    parametrize.register_parametrization(place, name, Twice())
    answer(fast)
    original = cast(Any, place).parametrizations[name].original
    original.data.mul_(1.5)
    with torch.no_grad():
        plain.get_submodule(where).get_parameter(name).copy_(2 * original)
    assert torch.equal(answer(fast), answer(plain))


def test_the_memory_of_a_packed_weight_is_held_until_another_is_packed() -> None:
    fast = fastcls.optimize(tiny_bert(), release=True)
    answer(fast)
    layer = fast.encoder.layers[0]
    memory = StorageWeakRef(layer.up_weight.untyped_storage())
    layer.up_weight = nn.Parameter(torch.zeros_like(layer.up_weight), requires_grad=False)
    gc.collect()
    # Else a second new weight might get its address, and be taken for the one that is packed.
    assert not memory.expired()
    answer(fast)
    gc.collect()
    assert memory.expired()


@pytest.mark.parametrize("quantize", ["int8", None], ids=str)
def test_copies_share_packed_weights_until_one_changes(quantize: Any) -> None:
    model = tiny_bert()
    fast = fastcls.optimize(model, quantize=quantize)
    before = answer(fast)
    twin = copy.deepcopy(fast)
    assert places(twin) == places(fast) != set()
    assert torch.equal(answer(twin), before)
    assert places(twin) == places(fast)
    in_place(model)
    assert torch.equal(answer(fast), answer(fastcls.optimize(model, quantize=quantize)))
    assert torch.equal(answer(twin), before)
    assert not places(twin) & places(fast)
    # One that has not seen the change yet.
    in_place(model)
    late = copy.deepcopy(fast)
    assert torch.equal(answer(late), answer(fast))
    twin.load_state_dict(fast.state_dict())
    assert torch.equal(answer(twin), answer(fast))


@pytest.mark.parametrize("quantize", ["int8", None], ids=str)
def test_a_pickle_holds_each_weight_once_and_packs_anew(quantize: Any) -> None:
    fast = fastcls.optimize(tiny_bert(), quantize=quantize)
    before = pickle.dumps(fast)
    expected = answer(fast)
    assert len(pickle.dumps(fast)) == len(before)
    again = pickle.loads(before)
    assert again.quantize == quantize
    assert torch.equal(answer(again), expected)


def at_once(calls: list[Callable[[], Tensor]]) -> list[Tensor]:
    """Results of functions that begin together, in a thread each."""
    barrier = threading.Barrier(len(calls))

    def wait_and(call: Callable[[], Tensor]) -> Tensor:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(wait_and, calls))


@pytest.mark.parametrize("quantize", ["int8", None], ids=str)
def test_threads_at_the_first_call(quantize: Any) -> None:
    model = tiny_bert()
    expected = answer(fastcls.optimize(model, quantize=quantize))
    for _ in range(5):
        fast = fastcls.optimize(model, quantize=quantize)
        for found in at_once([lambda fast=fast: answer(fast)] * 4):  # type: ignore[misc]
            assert torch.equal(found, expected)


@pytest.mark.full
@pytest.mark.covering(alone=["kind", "forget"])
@pytest.mark.parametrize("forget", ["clear_caches", "pack_weights", "clear_caches in int8"])
@pytest.mark.parametrize("kind", ["bert", "mpnet", "modernbert", "deberta"])
def test_what_is_packed_is_forgotten_while_others_call(kind: str, forget: str) -> None:
    # Of the one layers are computed whole, of the other product by product.
    model_class, family, options = FOLLOWING[kind]
    fast = fastcls.optimize(tiny_model(model_class, family, **options), quantize="int8" if "int8" in forget else None)
    expected = answer(fast)
    done = threading.Event()
    before = sys.getswitchinterval()
    # Threads take turns at any place.
    sys.setswitchinterval(1e-6)

    def call() -> None:
        try:
            for _ in range(60):
                # As packed or not, up to rounding.
                found = answer(fast)
                assert found.shape == expected.shape
                if fast.quantize:
                    assert torch.equal(found, expected)
                near(found, expected, 1e-5)
        finally:
            done.set()

    with ThreadPoolExecutor(3) as pool:
        callers = [pool.submit(call) for _ in range(3)]
        while not done.is_set():
            if forget == "pack_weights":
                fast.pack_weights = not fast.pack_weights
            else:
                fast.clear_caches()
            done.wait(0.0005)
        sys.setswitchinterval(before)
        for caller in callers:
            caller.result()


# Plain batches, which compiled code reads

PLAIN_MASKS = {
    "none": None,
    "right_padding": [[1] * 9, [1] * 4 + [0] * 5, [1] + [0] * 8],
    "one_is_empty": [[1] * 9, [0] * 9, [1] * 2 + [0] * 7],
    "holes": [[1] * 9, [1, 0, 1, 1, 0, 0, 0, 0, 1], [1] * 9],
    "left_padding": [[1] * 9, [0] * 5 + [1] * 4, [1] * 9],
    "other_numbers": [[1] * 9, [2] * 4 + [0] * 5, [1] * 9],
}


def answer_or_error(fast: Any, inputs: dict[str, Tensor]) -> Any:
    try:
        with torch.no_grad():
            return fast(**inputs).logits
    except ValueError as error:
        return str(error)


@pytest.mark.covering(alone=["family", "mask"])
@pytest.mark.parametrize("with_types", [False, True], ids=["no_types", "types"])
@pytest.mark.parametrize("mask", list(PLAIN_MASKS))
@every_classifier
def test_plain_batches_are_read_as_others_are(model_class: str, family: str, mask: str, with_types: bool) -> None:
    fast = fastcls.optimize(tiny_model(model_class, family))
    inputs = {"input_ids": torch.randint(5, 199, (3, 9))}
    # RoBERTa's padding token takes no position, wherever it stands.
    inputs["input_ids"][0, 3] = fast.config.pad_token_id
    inputs["input_ids"][1, 4:] = fast.config.pad_token_id
    if PLAIN_MASKS[mask] is not None:
        inputs["attention_mask"] = torch.tensor(PLAIN_MASKS[mask])
    if with_types and fast.spec.token_types:
        inputs["token_type_ids"] = torch.randint(fast.spec.token_types, (3, 9))
    for rows in (slice(0, 3), slice(2, 3)):
        given = {name: tensor[rows] for name, tensor in inputs.items()}
        # Those of 32 bits are read by PyTorch.
        found, expected = (answer_or_error(fast, each) for each in (given, {n: t.int() for n, t in given.items()}))
        if isinstance(expected, str):
            assert found == expected
            continue
        assert torch.equal(found.isnan(), expected.isnan())
        near(found.nan_to_num(), expected.nan_to_num(), 1e-6)


@pytest.mark.parametrize("name", ["input_ids", "token_type_ids"])
@pytest.mark.parametrize("number", [-1, 199, 1 << 40, -(1 << 40)])
def test_an_id_outside_its_table_is_named_in_plain_batches(name: str, number: int) -> None:
    fast = fastcls.optimize(tiny_bert())
    inputs = {"input_ids": torch.randint(5, 199, (2, 9)), "token_type_ids": torch.zeros(2, 9, dtype=torch.long)}
    inputs[name][1, 8] = number
    with pytest.raises(ValueError, match=f"{name} must lie from 0 to"):
        fast(**inputs)
    # Of padding nobody reads it.
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 8] = 0
    assert fast(**inputs, attention_mask=mask).logits.isfinite().all()


def test_a_text_too_long_is_named_in_plain_batches() -> None:
    fast = fastcls.optimize(tiny_bert())
    assert fast(torch.randint(5, 199, (1, 96))).logits.isfinite().all()
    with pytest.raises(ValueError, match="96"):
        fast(torch.randint(5, 199, (1, 97)))


# Options, and memory


def test_options_are_set_at_any_time() -> None:
    model = tiny_bert()
    fast = fastcls.optimize(model)
    usual, quantised = answer(fast), answer(int8(model))
    unpacked = answer(fastcls.optimize(model, pack_weights=False))
    assert not torch.equal(usual, quantised)
    for _ in range(2):
        fast.quantize = "int8"
        assert torch.equal(answer(fast), quantised)
        fast.quantize = None
        assert torch.equal(answer(fast), usual)
        fast.pack_weights = False
        assert torch.equal(answer(fast), unpacked)
        # Whatever becomes of the others, int8 is packed.
        fast.quantize = "int8"
        assert torch.equal(answer(fast), quantised)
        fast.pack_weights, fast.quantize = True, None


def sized_bert(**options: Any) -> Any:
    return tiny_bert(hidden_size=128, intermediate_size=512, vocab_size=2000, **options)


def test_packed_weights_count_and_are_given_back() -> None:
    model = sized_bert()
    layers = 3 * (4 * 128 * 128 + 2 * 128 * 512)
    fast = fastcls.optimize(model)
    bare, live = fast.get_memory_footprint(), live_bytes()
    for quantize, bytes_each, table in ((None, 4, 0), ("int8", 1, 2000 * 128)):
        fast.quantize = cast(Any, quantize)
        answer(fast)
        packed = fast.get_memory_footprint() - bare
        # Besides there are biases, scales and the head.
        assert layers * bytes_each + table <= packed <= 1.1 * (layers * bytes_each + table) + 110_000
        assert 0 <= live_bytes() - live - packed <= 20_000
    # Passes under way would go on in float32.
    fast.clear_caches()
    assert fast.get_memory_footprint() == bare + packed
    fast.quantize = None
    answer(fast)
    fast.clear_caches()
    assert fast.get_memory_footprint() == bare
    assert live_bytes() - live <= 20_000
    answer(fast)
    fast.pack_weights = False
    answer(fast)
    assert fast.get_memory_footprint() == bare
    assert live_bytes() - live <= 20_000


def test_warm_up_packs() -> None:
    fast = int8(tiny_bert())
    assert not places(fast)
    fast.warm_up()
    made = places(fast)
    answer(fast)
    assert places(fast) == made != set()


def test_a_model_that_moves_is_packed_anew() -> None:
    fast = fastcls.optimize(tiny_bert())
    answer(fast)
    fast.to(torch.float64)
    near(answer(fast), answer(fastcls.optimize(tiny_bert().double())), 1e-12)
    assert not places(fast)
    fast.to(torch.float32)
    near(answer(fast), answer(fastcls.optimize(tiny_bert())), 1e-5)
    assert places(fast)


# Weights that are let go


@pytest.mark.parametrize("kind", list(FOLLOWING))
def test_a_released_model_gives_the_same_bits(kind: str) -> None:
    model_class, family, options = FOLLOWING[kind]
    expected = answer(int8(tiny_model(model_class, family, **options)))
    fast = int8(tiny_model(model_class, family, **options), release=True)
    for again in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), copy.copy(fast)):
        assert torch.equal(answer(again), expected)
    fast.clear_caches()
    assert torch.equal(answer(fast), expected)
    fast.warm_up()
    fast.stop_following()
    assert torch.equal(answer(fast), expected)


@pytest.mark.parametrize(("hidden_size", "num_heads", "num_kv_heads"), [(64, 4, 1), (192, 12, 3), (64, 4, 2)])
@pytest.mark.parametrize("last_layer", RUNGS)
def test_a_released_model_with_few_keys_and_values_gives_the_same_bits(
    hidden_size: int, num_heads: int, num_kv_heads: int, last_layer: LastLayer
) -> None:
    # A group's keys and values need not fill whole panels.
    sizes = {"hidden_size": hidden_size, "num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}
    model = tiny_model("EuroBertForSequenceClassification", "eurobert", **sizes)
    expected = answer(int8(model, last_layer=last_layer))
    if last_layer != "full":
        # The last layer computes in int8, too, though fewer rows of it.
        near(expected, answer(int8(model, last_layer="full")), 1e-2)
    fast = int8(model, last_layer=last_layer, release=True)
    for _ in range(2):
        assert torch.equal(answer(fast), expected)


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_a_released_model_is_as_it_was_after_another_process_got_it(kind: str) -> None:
    model_class, family, options = FOLLOWING[kind]
    fast = int8(tiny_model(model_class, family, **options), release=True)
    expected = answer(fast)
    # What is handed over goes through this pickler, which moves tensors to shared memory.
    there = pickle.loads(ForkingPickler.dumps(fast))
    gc.collect()
    for each in (fast, there, fast):
        assert torch.equal(answer(each), expected)


def test_a_released_model_may_move_to_shared_memory() -> None:
    # As torch.multiprocessing moves what it hands to another process.
    expected, fast = answer(int8(tiny_bert())), int8(tiny_bert(), release=True)
    for weight in (*fast.parameters(), *fast.buffers()):
        if not weight.is_meta:
            weight.data.share_memory_()
    assert torch.equal(answer(fast), expected)
    fast.share_memory()
    assert torch.equal(answer(fast), expected)
    norm = fast.encoder.layers[0].output_norm_weight
    norm.data = norm.data.clone()
    with pytest.raises(RuntimeError, match="weights and options must stay as they were"):
        answer(fast)


@pytest.mark.parametrize("name", ["BertModel", "BertForTokenClassification", "BertForQuestionAnswering"])
def test_a_released_model_of_another_task_gives_the_same_bits(name: str) -> None:
    inputs = many(name)
    expected = answers(int8(tiny_model(name, "bert")), inputs)
    found = answers(int8(tiny_model(name, "bert"), release=True), inputs)
    assert all(torch.equal(found[each], expected[each]) for each in expected)


def test_a_released_model_is_a_third_of_its_size() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    before = live_bytes()
    model = BertForSequenceClassification(config).eval()
    size = sum(weight.nbytes for weight in model.parameters())
    expected = answer(int8(copy.deepcopy(model)))
    fast = int8(model, release=True)
    assert torch.equal(answer(fast), expected)
    assert fast.get_memory_footprint() <= 0.35 * size
    assert live_bytes() - before <= 0.35 * size
    assert all(weight.is_meta for weight in model.parameters())
    copied = copy.deepcopy(fast)
    # What cannot be made anew is shared.
    assert live_bytes() - before <= 0.45 * size
    assert len(pickle.dumps(fast)) <= 0.35 * size
    del copied


def test_a_tied_table_of_words_stays() -> None:
    fast = int8(tiny_model("BertForMaskedLM", "bert"), release=True)
    word, out = fast.encoder.embeddings.word_weight, fast.head.out_weight
    assert not word.is_meta
    assert word.data_ptr() == out.data_ptr()
    assert fast.encoder.layers[0].up_weight.is_meta


NEEDS_WEIGHTS: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "state_dict": (lambda fast, _: fast.state_dict(), "state_dict must be left out"),
    "state_dict_around_it": (lambda fast, _: nn.ModuleList([fast]).state_dict(), "state_dict must be left out"),
    "load_state_dict": (lambda fast, _: fast.load_state_dict({}), "load_state_dict must be left out"),
    "save_pretrained": (lambda fast, folder: fast.save_pretrained(folder), "must be left out"),
    "another_dtype": (lambda fast, _: fast.to(torch.bfloat16), "must stay in torch.float32 on cpu, got torch.bfloat16"),
    "half": (lambda fast, _: fast.half(), "must stay in torch.float32 on cpu, got torch.float16"),
    "double": (lambda fast, _: fast.double(), "must stay in torch.float32 on cpu, got torch.float64"),
    "another_device": (lambda fast, _: fast.to("meta"), "must stay in torch.float32 on cpu, got torch.float32 on meta"),
    "around_it": (lambda fast, _: nn.ModuleList([fast]).double(), "must stay in torch.float32 on cpu"),
    "input_embeddings": (lambda fast, _: fast.get_input_embeddings(), "get_input_embeddings must be left out"),
    "export": (lambda fast, _: torch.export.export(fast, (IDS,)), "must be left out"),
    "compile": (
        lambda fast, _: torch.compile(fast, fullgraph=True, backend="eager")(IDS),
        "must be left out",
    ),
    "no_int8": (lambda fast, _: without_int8(fast)(IDS), "must stay as they were"),
    "a_weight_that_changed": (
        lambda fast, _: (fast.encoder.layers[0].up_bias.mul_(2), fast(IDS)),
        "must stay as they were",
    ),
}


def without_int8(fast: Any) -> Any:
    fast.quantize = None
    return fast


@pytest.mark.parametrize("case", list(NEEDS_WEIGHTS))
def test_what_needs_the_weights_that_were_let_go_is_named(case: str, tmp_path: Path) -> None:
    fast = int8(tiny_bert(), release=True)
    expected = answer(fast)
    use, message = NEEDS_WEIGHTS[case]
    with pytest.raises(Exception, match=message) as caught:
        use(copy.deepcopy(fast), tmp_path)
    assert "Optimize the model again, without release" in str(caught.value)
    assert torch.equal(answer(fast), expected)


def test_what_leaves_a_released_model_where_it_is_does_nothing() -> None:
    fast = int8(tiny_bert(), release=True)
    expected = answer(fast)
    same_place = [fast.to("cpu"), fast.float(), fast.to(torch.float32), fast.cpu(), fast.to("cpu", torch.float32)]
    for same in same_place:
        assert same is fast
        assert torch.equal(answer(same), expected)
    assert fast.device.type == "cpu"
    assert fast.dtype == torch.float32
    assert fast.num_parameters() == fastcls.optimize(tiny_bert()).num_parameters()


# Refusals

UNFIT: dict[str, tuple[Callable[[], Any], str]] = {
    "bfloat16": (lambda: int8(tiny_bert().bfloat16()), "quantize must be None for a model in torch.bfloat16 on cpu"),
    "float16": (lambda: int8(tiny_bert().half()), "quantize must be None for a model in torch.float16 on cpu"),
    "float64": (lambda: int8(tiny_bert().double()), "quantize must be None for a model in torch.float64 on cpu"),
    "meta": (lambda: int8(tiny_bert().to("meta")), "meta"),
    "word": (
        lambda: fastcls.optimize(tiny_bert(), quantize=cast(Any, "int4")),
        "quantize must be None or one of int8, got 'int4'",
    ),
    "hidden_size": (
        lambda: int8(tiny_bert(hidden_size=48)),
        "quantize must be None where hidden_size is no multiple of 64, got 48",
    ),
    "intermediate_size": (
        lambda: int8(tiny_bert(intermediate_size=100)),
        "quantize must be None where intermediate_size is no multiple of 16, got 100",
    ),
    "not_finite": (lambda: answer(int8(with_nan())), "weight must be finite for packing int8, got NaN or infinity"),
}


def with_nan() -> Any:
    model = tiny_bert()
    model.bert.encoder.layer[1].output.dense.weight.data[3, 4] = float("nan")
    return model


@pytest.mark.parametrize("case", list(UNFIT))
def test_what_cannot_be_quantised_is_named(case: str) -> None:
    call, message = UNFIT[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_set_later_is_refused_as_well() -> None:
    fast = fastcls.optimize(tiny_bert())
    expected = answer(fast)
    with pytest.raises(ValueError, match="quantize must be None or one of int8, got 'int4'"):
        fast.quantize = "int4"
    unfit_ones = ((tiny_bert().bfloat16(), "torch.bfloat16"), (tiny_bert(hidden_size=48), "no multiple of 64"))
    for unfit, message in unfit_ones:
        other = fastcls.optimize(unfit)
        with pytest.raises(ValueError, match=message):
            other.quantize = "int8"
        assert other.quantize is None
    assert torch.equal(answer(fast), expected)
    fast.quantize = "int8"
    fast.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"quantize must be None for a model in torch\.bfloat16"):
        answer(fast)


@pytest.mark.parametrize("sizes", [{"hidden_size": 48}, {"intermediate_size": 100}, {"hidden_size": 96}], ids=str)
def test_sizes_that_packing_does_not_fit_are_computed_without(sizes: dict[str, int]) -> None:
    model = tiny_bert(attn_implementation="eager", **sizes)
    fast = fastcls.optimize(model)
    near(answer(fast), answer(model), 1e-5)


def test_where_the_compiled_kernels_cannot_run_it_stays_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bert()
    expected = answer(fastcls.optimize(model, pack_weights=False))
    # Not by its name, which is a function's, too.
    library = importlib.import_module("fastcls_kernels.packed.library")
    monkeypatch.setattr(library, "_load", lambda: (None, "it is made up"))
    for release in (False, True):
        with pytest.warns(RuntimeWarning, match="quantize='int8' is left out, .* stay in float32: .*it is made up"):
            fast = int8(copy.deepcopy(model), release=release)
        assert fast.quantize is None
        assert torch.equal(answer(fast), expected)
        assert not places(fast)
        assert len(fast.state_dict()) == len(model.state_dict())
    # Asked for all the same, it is computed by PyTorch's operators.
    fast.quantize = "int8"
    assert places(fast) == set()
    found = answer(fast)
    assert places(fast)
    assert 0 < rms(found - expected) <= 0.1 * rms(expected)


# Graphs


@pytest.mark.covering(alone=["pack_weights", "quantize", "name"])
@pytest.mark.parametrize("pack_weights", [True, False], ids=["packed", "as_they_are"])
@pytest.mark.parametrize("quantize", ["int8", None], ids=str)
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "ModernBertForSequenceClassification", "BertModel"])
def test_graphs_compute_the_same(name: str, quantize: Any, pack_weights: bool) -> None:
    torch._dynamo.reset()
    family = dict(CLASSES)[name]
    model = tiny_model(name, family)
    fast = fastcls.optimize(model, quantize=quantize, pack_weights=pack_weights)
    inputs = batch("right_padding")
    for graph in (torch.compile(fast, fullgraph=True, backend="eager"), torch.export.export(fast, (), inputs).module()):
        for _ in range(2):
            expected, found = answers(fast, inputs), answers(graph, inputs)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[each], expected[each]) for each in expected)
            in_place(model)


def test_a_graph_takes_the_option_that_was_set_last() -> None:
    torch._dynamo.reset()
    fast = fastcls.optimize(tiny_bert())
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    for fast.quantize in ("int8", None, "int8"):
        assert torch.equal(answer(compiled), answer(fast))


def test_an_exported_program_keeps_its_options(tmp_path: Path) -> None:
    fast = int8(tiny_bert())
    expected = answer(fast)
    torch.export.save(torch.export.export(fast, (IDS,)), tmp_path / "fast.pt2")
    loaded = torch.export.load(tmp_path / "fast.pt2").module()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, expected)


def test_families_and_lengths_are_those_of_the_others() -> None:
    # What is said above of every family is said of all that there are.
    assert {family for _, family in CLASSIFIERS} == set(TINY_FAMILIES)
    assert LENGTH % 16
    assert pack_weight(torch.zeros(3, 16)).nbytes
