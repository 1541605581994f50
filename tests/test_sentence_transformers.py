"""CrossEncoder, SentenceTransformer and SparseEncoder: one line makes them fast, and their answers stay their own."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Sentences
from support import TINY_FAMILIES, CountTokenProducts, tiny_model
from test_families import arithmetic
from torch import nn
from transformers import AutoModel, PreTrainedTokenizerBase

import fastcls
from fastcls.families import FAMILIES, head_in

sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
models = pytest.importorskip("sentence_transformers.models")
CrossEncoder, SentenceTransformer = sentence_transformers.CrossEncoder, sentence_transformers.SentenceTransformer

TEXTS = [
    "a visually stunning rumination on love, memory, history and the war between art and commerce",
    "no",
    "it's a charming and often affecting journey, told with more care than its subject asks for",
    "unflinchingly bleak and desperate",
    "the film's center will not hold",
    "allows us to hope that nolan is poised to embark on a major career",
    "",
]
PAIRS = [(TEXTS[index % 3], text) for index, text in enumerate(TEXTS)]
PROMPT = "represent this review: "


@pytest.fixture(scope="module")
def averaging(minilm_path: Path) -> Any:
    """all-MiniLM-L6-v2 as it is published: mean pooling, then normalisation."""
    return SentenceTransformer(str(minilm_path), device="cpu", prompts={"review": PROMPT})


@pytest.fixture(scope="module")
def first_token(minilm_path: Path) -> Any:
    """The same encoder, of which [CLS] is pooled."""
    return _pooled(minilm_path, "cls")


def _pooled(minilm_path: Path, mode: str, **options: Any) -> Any:
    encoder = models.Transformer(str(minilm_path))
    pooling = models.Pooling(384, pooling_mode=mode, **options)
    return SentenceTransformer(modules=[encoder, pooling], device="cpu", prompts={"review": PROMPT})


@pytest.fixture(scope="module", params=[1, 3], ids=["reranker", "three_labels"])
def cross_encoder(request: pytest.FixtureRequest, minilm_path: Path) -> Any:
    torch.manual_seed(0)
    model = CrossEncoder(str(minilm_path), num_labels=request.param, device="cpu", max_length=128)
    # What it starts with gives every pair nearly the same score.
    model.model.classifier.weight.data.normal_()
    return model


def _close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert type(actual) is type(expected)
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert np.abs(actual.astype(float) - expected.astype(float)).max(initial=0) <= tolerance


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"batch_size": 3, "normalize_embeddings": True}, id="normalised"),
        pytest.param({"prompt_name": "review"}, id="prompt"),
        pytest.param({"convert_to_tensor": True}, id="tensor"),
        pytest.param({"truncate_dim": 64}, id="truncated"),
    ],
)
@pytest.mark.parametrize("which", ["averaging", "first_token"])
def test_embeddings_are_the_librarys_own(request: pytest.FixtureRequest, which: str, options: dict[str, Any]) -> None:
    model = request.getfixturevalue(which)
    fast = fastcls.optimize(model)
    assert type(fast) is type(model)
    _close(fast.encode(TEXTS, **options), model.encode(TEXTS, **options))
    _close(fast.encode(TEXTS[0], **options), model.encode(TEXTS[0], **options))


@pytest.mark.parametrize("precision", ["int8", "ubinary"])
def test_embeddings_in_other_precisions(averaging: Any, precision: Any) -> None:
    # A number on the border of two steps may fall to either side of it.
    steps = 1 if precision == "int8" else 0
    fast = fastcls.optimize(averaging)
    _close(fast.encode(TEXTS, precision=precision), averaging.encode(TEXTS, precision=precision), steps)


@pytest.mark.parametrize("sentences", [64, pytest.param(256, marks=pytest.mark.full)])
def test_embeddings_of_real_sentences(averaging: Any, sst2: Callable[[str], Sentences], sentences: int) -> None:
    texts = sst2("dev").texts[:sentences]
    _close(fastcls.optimize(averaging).encode(texts), averaging.encode(texts))


@pytest.mark.parametrize("output", ["last_hidden_state", "pooler_output"])
def test_the_pooler_runs_where_it_is_read(minilm_path: Path, output: str) -> None:
    config = {"text": {"method": "forward", "method_output_name": output}}
    read, name = output == "pooler_output", "sentence_embedding" if output == "pooler_output" else "token_embeddings"
    try:
        encoder = models.Transformer(str(minilm_path), modality_config=config, module_output_name=name)
    except TypeError:
        pytest.skip("before 5.4 it is never read")
    model = SentenceTransformer(modules=[encoder] if read else [encoder, models.Pooling(384)], device="cpu")
    fast = fastcls.optimize(model)
    assert fast[0].auto_model.gives_pooler_output == read
    _close(fast.encode(TEXTS), model.encode(TEXTS))


def test_each_tokens_embedding(averaging: Any) -> None:
    fast = fastcls.optimize(averaging)
    found, expected = (model.encode(TEXTS, output_value="token_embeddings") for model in (fast, averaging))
    for ours, theirs in zip(found, expected, strict=True):
        _close(ours, theirs)


@pytest.mark.parametrize("mode", ["max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
def test_other_poolings(minilm_path: Path, mode: str) -> None:
    model = _pooled(minilm_path, mode)
    _close(fastcls.optimize(model).encode(TEXTS), model.encode(TEXTS), 1e-4 if mode == "mean_sqrt_len_tokens" else 1e-5)


@pytest.mark.parametrize("mode", ["cls", "mean"])
def test_a_prompt_that_is_not_pooled(minilm_path: Path, mode: str) -> None:
    model = _pooled(minilm_path, mode, include_prompt=False)
    options = {"prompt_name": "review"}
    _close(fastcls.optimize(model).encode(TEXTS, **options), model.encode(TEXTS, **options))


def test_bits_whatever_the_batch(averaging: Any, minilm_path: Path) -> None:
    fast = fastcls.optimize(averaging, batch_invariant=True)
    together = fast.encode(TEXTS)
    assert all((fast.encode([text])[0] == embedding).all() for text, embedding in zip(TEXTS, together, strict=True))
    encoder, pooling = models.Transformer(str(minilm_path)), models.Pooling(384)
    narrowed = SentenceTransformer(modules=[encoder, pooling, models.Dense(384, 31)], device="cpu")
    with pytest.raises(ValueError, match=r"batch_invariant must be left off for this model: its Linear 2.linear"):
        fastcls.optimize(narrowed, batch_invariant=True)


def test_where_cls_is_pooled_the_last_layer_runs_for_it_alone(first_token: Any) -> None:
    def products(fast: Any) -> int:
        tokens = len(fast.tokenizer(TEXTS[0])["input_ids"])
        with CountTokenProducts(tokens) as counted:
            fast.encode(TEXTS[0])
        return counted.count

    # Of a layer's four, none is left in the last one; where all tokens are wanted, all are.
    # What the compiled kernels multiply is not counted.
    assert products(fastcls.optimize(first_token, pack_weights=False)) == 4 * 5
    assert products(fastcls.optimize(first_token, pack_weights=False, select="all")) == 4 * 6


def test_what_is_not_computed_is_said(first_token: Any) -> None:
    fast = fastcls.optimize(first_token)
    with pytest.raises(ValueError, match=r'token embeddings were not computed.*select="all"'):
        fast.encode(TEXTS, output_value="token_embeddings")
    every = fastcls.optimize(first_token, select="all")
    found, expected = (model.encode(TEXTS, output_value="token_embeddings") for model in (every, first_token))
    for ours, theirs in zip(found, expected, strict=True):
        _close(ours, theirs)


@pytest.mark.parametrize("mode", ["cls", "mean", "lasttoken"])
def test_left_padded_texts(minilm_path: Path, mode: str) -> None:
    model = _pooled(minilm_path, mode)
    if mode == "cls" and not hasattr(model[1], "pooling_mode"):
        pytest.skip("before 5.4 sentence-transformers pools the first column, which is padding")
    model.tokenizer.padding_side = "left"
    _close(fastcls.optimize(model).encode(TEXTS), model.encode(TEXTS))


class _Averaging(nn.Module):
    """Replaces what was pooled by the mean over tokens."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        kept = features["attention_mask"][:, :, None]
        features["sentence_embedding"] = (features["token_embeddings"] * kept).sum(1) / kept.sum(1)
        return features


def _mean_of(_module: nn.Module, _given: object, features: dict[str, Any]) -> dict[str, Any]:
    return _Averaging()(features)


def _replace_pooling(model: Any) -> None:
    model[1] = models.Pooling(384, pooling_mode="mean")


def _set_pooling(model: Any) -> None:
    if not hasattr(model[1], "pooling_mode"):
        pytest.skip("before 5.4 each mode was an attribute")
    model[1].pooling_mode = "max"


def _leave_prompt_out(model: Any) -> None:
    model[1].include_prompt = False


def _pad_left(model: Any) -> None:
    if not hasattr(model[1], "pooling_mode"):
        pytest.skip("before 5.4 sentence-transformers pools the first column, which is padding")
    model.tokenizer.padding_side = "left"


def _weigh_words(model: Any) -> None:
    vocabulary = sorted(model.tokenizer.get_vocab(), key=model.tokenizer.get_vocab().get)
    weights = {word: index % 7 / 7 for index, word in enumerate(vocabulary)}
    model.insert(1, models.WordWeights(vocabulary, weights))
    model[2].pooling_mode = "mean"


def _narrow_tokens(model: Any) -> None:
    torch.manual_seed(0)
    names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    try:
        model.append(models.Dense(384, 384, **names))
    except TypeError:
        pytest.skip("this version's Dense reads sentence embeddings")
    model.append(models.Pooling(384, pooling_mode="max"))


def _replace_encoder(model: Any) -> None:
    model[0].auto_model = AutoModel.from_pretrained(model.tokenizer.name_or_path)
    model[1] = models.Pooling(384, pooling_mode="mean")


LATER: dict[str, Callable[[Any], Any]] = {
    "pooling_replaced": _replace_pooling,
    "mode_set": _set_pooling,
    "prompt_left_out": _leave_prompt_out,
    "padding_side": _pad_left,
    "word_weights_inserted": _weigh_words,
    "dense_over_tokens_appended": _narrow_tokens,
    "own_module_appended": lambda model: model.append(_Averaging()),
    "hook_on_the_encoder": lambda model: model[0].register_forward_hook(
        lambda _module, _given, features: (
            features.update(token_embeddings=features["token_embeddings"].roll(-1, 1)) or features
        )
    ),
    "hook_on_the_pooling": lambda model: model[1].register_forward_hook(_mean_of),
    "encoder_replaced": _replace_encoder,
}


@pytest.mark.covering(alone=["change", "when"])
@pytest.mark.parametrize("change", list(LATER))
@pytest.mark.parametrize("when", ["before", "afterwards"])
def test_what_is_changed_is_followed(first_token: Any, when: str, change: str) -> None:
    options: dict[str, Any] = {"prompt_name": "review"}
    model = copy.deepcopy(first_token)
    if when == "before":
        LATER[change](model)
        fast = fastcls.optimize(model)
    else:
        fast = fastcls.optimize(model)
        # So that what is remembered of one call would show in the next.
        fast.encode(TEXTS[:1])
        LATER[change](model)
        LATER[change](fast)
    expected = model.encode(TEXTS, **options)
    assert np.abs(expected - first_token.encode(TEXTS, **options)).max() > 1e-3 or change == "padding_side"
    _close(fast.encode(TEXTS, **options), expected)


def test_an_encoder_taken_out_gives_all_rows(first_token: Any) -> None:
    fast = fastcls.optimize(first_token)
    other = SentenceTransformer(modules=[fast[0], models.Pooling(384, pooling_mode="mean")], device="cpu")
    expected = SentenceTransformer(modules=[first_token[0], models.Pooling(384, pooling_mode="mean")], device="cpu")
    _close(other.encode(TEXTS), expected.encode(TEXTS))
    _close(fast.encode(TEXTS), first_token.encode(TEXTS))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_follows_its_own_modules(first_token: Any, how: str) -> None:
    fast = fastcls.optimize(first_token)
    copied = copy.deepcopy(fast) if how == "deepcopy" else pickle.loads(pickle.dumps(fast))
    _replace_pooling(fast)
    _close(copied.encode(TEXTS), first_token.encode(TEXTS))
    _replace_pooling(copied)
    _close(copied.encode(TEXTS), fast.encode(TEXTS))


@pytest.mark.parametrize("which", ["averaging", "first_token"])
def test_features_are_taken_twice(request: pytest.FixtureRequest, which: str) -> None:
    model = request.getfixturevalue(which)
    fast = fastcls.optimize(model)
    features = model.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        first, second = (fast(features)["sentence_embedding"] for _ in range(2))
        assert torch.equal(first, second)
        # Nothing of ours is in the way of the original.
        torch.testing.assert_close(model(features)["sentence_embedding"], first, atol=1e-5, rtol=0)
    assert "select" not in features


def test_every_way_of_reading_what_is_not_computed_is_refused(first_token: Any) -> None:
    missing = fastcls.optimize(first_token).encode(TEXTS[:1], output_value=None)[0]["token_embeddings"]
    for read in (len, list, np.asarray, lambda each: each[0], lambda each: each.shape, lambda each: each.mean(1)):
        with pytest.raises((ValueError, AttributeError), match="token embeddings were not computed"):
            read(missing)


def test_modules_that_read_padding_are_refused(averaging: Any) -> None:
    message = "the modules must leave out CNN, which reads what a model computes at padding"
    fast, model = fastcls.optimize(averaging), copy.deepcopy(averaging)
    for each in (fast, model):
        each.insert(1, models.CNN(384, 16))
        each[2] = models.Pooling(48)
    model.encode(TEXTS)
    with pytest.raises(ValueError, match=message):
        fast.encode(TEXTS)
    with pytest.raises(ValueError, match=message):
        fastcls.optimize(model)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"batch_size": 2, "convert_to_tensor": True}, id="tensor"),
        pytest.param({"activation_fn": nn.Tanh()}, id="activation"),
        pytest.param({"apply_softmax": True}, id="softmax"),
    ],
)
def test_scores_of_pairs_are_the_librarys_own(cross_encoder: Any, options: dict[str, Any]) -> None:
    fast = fastcls.optimize(cross_encoder)
    assert type(fast) is CrossEncoder
    _close(fast.predict(PAIRS, **options), cross_encoder.predict(PAIRS, **options))
    _close(fast.predict(PAIRS[0], **options), cross_encoder.predict(PAIRS[0], **options))


@pytest.mark.parametrize("mode", ["cls", "mean"])
def test_a_cross_encoder_whose_head_is_modules(minilm_path: Path, tmp_path: Path, mode: str) -> None:
    own = pytest.importorskip("sentence_transformers.base.modules", reason="before 5.4 a CrossEncoder has no modules")
    torch.manual_seed(0)
    head = [
        models.Pooling(384, pooling_mode=mode),
        own.Dense(384, 32, module_output_name="sentence_embedding"),
        own.Dense(32, 1, activation_function=nn.Identity(), module_output_name="scores"),
    ]
    model = CrossEncoder(modules=[own.Transformer(str(minilm_path)), *head], device="cpu")
    fast = fastcls.optimize(model)
    _close(fast.predict(PAIRS), model.predict(PAIRS))
    model.save_pretrained(str(tmp_path))
    again = CrossEncoder(str(tmp_path), device="cpu")
    _close(fastcls.optimize(again).predict(PAIRS), model.predict(PAIRS))
    assert float(np.std(model.predict(PAIRS))) > 1e-3, "scores that do not differ would prove nothing"


def test_what_is_changed_in_a_cross_encoder(cross_encoder: Any) -> None:
    model = copy.deepcopy(cross_encoder)
    fast = fastcls.optimize(model)
    for each in (model, fast):
        if not hasattr(each, "activation_fn"):
            pytest.skip("this version of sentence-transformers takes an activation with each call")
        each.activation_fn = nn.Tanh()
        each.max_seq_length = 12
    _close(fast.predict(PAIRS), model.predict(PAIRS))
    # A module of the library's own, with other weights.
    other = copy.deepcopy(cross_encoder)
    other.model.classifier.weight.data.mul_(-1)
    fast[0] = other[0]
    _close(fast.predict(PAIRS, activation_fn=nn.Identity()), other.predict(PAIRS, activation_fn=nn.Identity()))


def test_no_pairs_and_many_threads(cross_encoder: Any) -> None:
    fast = fastcls.optimize(cross_encoder)
    _close(fast.predict([]), cross_encoder.predict([]))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda size: fast.predict(PAIRS, batch_size=size), (1, 2, 3, 7)))
    for each in found:
        _close(each, cross_encoder.predict(PAIRS))


def test_ranks(cross_encoder: Any) -> None:
    fast, options = fastcls.optimize(cross_encoder), {"return_documents": True, "top_k": 5}
    if cross_encoder.config.num_labels != 1:
        with pytest.raises(ValueError, match="num_labels=1"):
            fast.rank("a journey", TEXTS)
        return
    found, expected = (model.rank("a charming journey", TEXTS, **options) for model in (fast, cross_encoder))
    assert [(each["corpus_id"], each["text"]) for each in found] == [
        (each["corpus_id"], each["text"]) for each in expected
    ]
    _close([each["score"] for each in found], [each["score"] for each in expected])


@pytest.mark.full
@arithmetic
@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
def test_every_family_reranks_and_embeds(
    family: str, minilm_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    # BERT's tokenizer tells the two texts of a pair apart.
    types = {} if family == "mpnet" else {"type_vocab_size": 2}
    sizes = {"vocab_size": len(minilm_tokenizer), **types}
    classes = next(each.heads for each in FAMILIES if each.model_type == family)
    for task, make in (("SequenceClassification", CrossEncoder), ("", SentenceTransformer)):
        folder = str(tmp_path / task)
        name = next(each for each in classes if head_in(each) == task)
        tiny_model(name, family, **sizes, **({"num_labels": 1} if task else {})).save_pretrained(folder)
        minilm_tokenizer.save_pretrained(folder)
        # Its longest texts are those of the tiny model.
        model = make(folder, device="cpu", **({"max_length": 64} if make is CrossEncoder else {}))
        model.max_seq_length = 64
        fast = fastcls.optimize(model)
        if make is CrossEncoder:
            _close(fast.predict(PAIRS), model.predict(PAIRS))
        else:
            _close(fast.encode(TEXTS), model.encode(TEXTS))


def test_a_sparse_encoder(minilm_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tiny_model("BertForMaskedLM", "bert", vocab_size=len(minilm_tokenizer)).save_pretrained(tmp_path)
    minilm_tokenizer.save_pretrained(tmp_path)
    model = sentence_transformers.SparseEncoder(str(tmp_path), device="cpu")
    fast = fastcls.optimize(model)
    found, expected = (each.encode(TEXTS).to_dense() for each in (fast, model))
    _close(found.numpy(), expected.numpy())
    # Its pooling is read at each call, too.
    for each in (fast, model):
        each[1].pooling_strategy = "sum"
    found, expected = (each.encode(TEXTS).to_dense() for each in (fast, model))
    _close(found.numpy(), expected.numpy(), 1e-4)


@pytest.fixture
def workers(cross_encoder: Any, first_token: Any) -> Iterator[list[tuple[Any, Any]]]:
    """Fast models, each with a pool of processes."""
    if cross_encoder.config.num_labels != 1:
        pytest.skip("one cross-encoder in processes of its own is enough")
    started = []
    try:
        for model, devices in ((first_token, ["cpu", "cpu"]), (cross_encoder, ["cpu"])):
            if hasattr(model, "start_multi_process_pool"):
                fast = fastcls.optimize(model)
                started.append((fast, fast.start_multi_process_pool(devices)))
        yield started
    finally:
        for fast, pool in started:
            fast.stop_multi_process_pool(pool)


@pytest.mark.full
def test_processes_of_their_own(workers: list[tuple[Any, Any]], cross_encoder: Any, first_token: Any) -> None:
    for fast, pool in workers:
        if isinstance(fast, CrossEncoder):
            _close(fast.predict(PAIRS, pool=pool, chunk_size=4), cross_encoder.predict(PAIRS))
        else:
            _close(fast.encode(TEXTS, pool=pool, chunk_size=4), first_token.encode(TEXTS))


def test_weights_are_shared_and_the_given_model_stays_as_it_is(minilm_path: Path) -> None:
    encoder = models.Transformer(str(minilm_path))
    torch.manual_seed(0)
    model = SentenceTransformer(modules=[encoder, models.Pooling(384), models.Dense(384, 32)], device="cpu")
    before = model.encode(TEXTS)
    fast = fastcls.optimize(model)
    assert encoder.auto_model.embeddings.word_embeddings.weight.data_ptr() in {
        each.data_ptr() for each in fast.parameters()
    }
    fast.max_seq_length = 8
    fast.prompts["other"] = "something else: "
    fast.bfloat16()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.max_seq_length != 8
    assert "other" not in model.prompts
    assert np.array_equal(model.encode(TEXTS), before)
    assert fast.model_card_data.model is fast


def _facts_of(model: nn.Module) -> dict[str, Any]:
    """What there is to be said of a model, down to its storages and hooks."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "tensors": {
            name: (id(each), each.data_ptr(), each.untyped_storage().data_ptr(), each.stride(), each._version)
            for name, each in tensors.items()
        },
        "modules": {name: (id(each), each.training, sorted(vars(each))) for name, each in model.named_modules()},
        "hooks": {name: [*each._forward_hooks.values()] for name, each in model.named_modules()},
        "config": str(model.config),
        "bits": [each.clone() for each in tensors.values()],
    }


def test_nothing_of_the_given_model_is_touched(minilm_path: Path) -> None:
    torch.manual_seed(0)
    modules = [models.Transformer(str(minilm_path)), models.Pooling(384, pooling_mode="cls"), models.Dense(384, 32)]
    model = SentenceTransformer(modules=modules, device="cpu")
    model[1].register_forward_hook(_mean_of)
    # Flattened texts are what flash-attention alone would make of them.
    model[0].can_flatten_inputs = True
    before = _facts_of(model)
    fast = fastcls.optimize(model)
    after = _facts_of(model)
    assert all(map(torch.equal, before.pop("bits"), after.pop("bits")))
    assert before == after
    assert not any(module.training for module in fast.modules())
    # The library writes into configs, and so does the copy into its own.
    fast.config.num_labels = 7
    assert str(model.config) == before["config"]
    assert fast[0].config is fast.config


def test_what_is_written_to_the_given_model_is_read(minilm_path: Path) -> None:
    torch.manual_seed(0)
    modules = [models.Transformer(str(minilm_path)), models.Pooling(384), models.Dense(384, 32)]
    model = SentenceTransformer(modules=modules, device="cpu")
    fast = fastcls.optimize(model)
    theirs, ours = model[2].linear.weight, fast[2].linear.weight
    with torch.no_grad():
        theirs.mul_(2)
    _close(fast.encode(TEXTS), model.encode(TEXTS))
    assert torch.equal(ours, theirs)


def _by_assigning(model: Any) -> None:
    model.load_state_dict({name: weight * 1.1 for name, weight in model.state_dict().items()}, assign=True)


def _by_moving(model: Any) -> None:
    model.half()
    model.float()


def _by_other_parameters(model: Any) -> None:
    dense = model[2].linear
    dense.weight = torch.nn.Parameter(dense.weight.detach() * 2)


def _by_a_vector(model: Any) -> None:
    weights = list(model[2].parameters())
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(weights) * 2, weights)


def _by_an_optimizer(model: Any) -> None:
    for weight in model[2].parameters():
        weight.grad = torch.ones_like(weight)
    torch.optim.AdamW(model[2].parameters(), lr=0.1, fused=True).step()


CHANGES = (_by_assigning, _by_moving, _by_other_parameters, _by_a_vector, _by_an_optimizer)


@pytest.mark.parametrize("change", CHANGES)
def test_all_modules_follow_the_given_model(change: Callable[[Any], None], first_token: Any) -> None:
    torch.manual_seed(0)
    model = copy.deepcopy(first_token)
    model.append(models.Dense(384, 32))
    fast = fastcls.optimize(model)
    fast.encode(TEXTS[:1])
    for _ in range(2):
        change(model)
        _close(fast.encode(TEXTS), model.eval().encode(TEXTS))
    assert torch.equal(fast.state_dict()["2.linear.weight"], model[2].linear.weight)


def _with_dense(first_token: Any) -> Any:
    torch.manual_seed(0)
    model = copy.deepcopy(first_token)
    model.append(models.Dense(384, 32))
    return model


def test_what_is_loaded_into_a_copy_is_its_own(first_token: Any) -> None:
    model = _with_dense(first_token)
    fast, state = fastcls.optimize(model), {name: weight.clone() for name, weight in model.state_dict().items()}
    kept = model.encode(TEXTS)
    with pytest.warns(RuntimeWarning, match="goes on with these"):
        fast.load_state_dict({name: weight * 1.1 for name, weight in state.items()})
    assert np.array_equal(model.encode(TEXTS), kept)
    expected = fast.encode(TEXTS)
    assert np.abs(expected - kept).max() > 0.01
    _by_assigning(model)
    assert np.array_equal(fast.encode(TEXTS), expected)


def test_the_same_weights_loaded_change_nothing(first_token: Any) -> None:
    model = _with_dense(first_token)
    fast = fastcls.optimize(model)
    both = torch.nn.ModuleList([model, fast])
    state = {name: weight.clone() for name, weight in both.state_dict().items()}
    _by_an_optimizer(model)
    both.load_state_dict(state)
    _by_assigning(model)
    _close(fast.encode(TEXTS), model.encode(TEXTS))


def test_what_is_trained_in_a_copy_is_its_own(first_token: Any) -> None:
    model = _with_dense(first_token)
    fast = fastcls.optimize(model)
    _by_an_optimizer(fast)
    expected = fast.encode(TEXTS)
    _by_assigning(model)
    assert np.array_equal(fast.encode(TEXTS), expected)


def _deep_copy(_model: list[Any], fast: Any) -> Any:
    return copy.deepcopy(fast)


def _pickle(_model: list[Any], fast: Any) -> Any:
    return pickle.loads(pickle.dumps(fast))


def _drop(model: list[Any], fast: Any) -> Any:
    model.clear()
    gc.collect()
    return fast


@pytest.mark.parametrize("end", [_deep_copy, _pickle, _drop])
def test_a_change_just_before_a_copy_follows_no_more_is_in_all_modules(
    end: Callable[..., Any], first_token: Any
) -> None:
    model = [_with_dense(first_token)]
    fast = fastcls.optimize(model[0])
    _by_assigning(model[0])
    _by_an_optimizer(model[0])
    expected = model[0].encode(TEXTS)
    ended = end(model, fast)
    if model:
        _by_an_optimizer(model[0])
    _close(ended.encode(TEXTS), expected)


def test_what_counts_no_changes_is_seen_in_all_modules_after_clear_caches(first_token: Any) -> None:
    model = _with_dense(first_token)
    fast = fastcls.optimize(model)
    model[2].linear.weight.data.mul_(2)
    fast[0].auto_model.clear_caches()
    _close(fast.encode(TEXTS), model.encode(TEXTS))


def test_a_module_that_was_replaced_in_the_given_model_is_named(first_token: Any) -> None:
    model = copy.deepcopy(first_token)
    model.append(models.Dense(384, 32))
    fast = fastcls.optimize(model)
    expected = fast.encode(TEXTS)
    model[2] = models.Dense(384, 32)
    with pytest.raises(RuntimeError, match="2 of the model that this one was made of was replaced since"):
        fast.encode(TEXTS)
    fast[0].auto_model.stop_following()
    assert np.array_equal(fast.encode(TEXTS), expected)


@pytest.mark.parametrize("place", ["Pooling", "Normalize"])
def test_a_class_that_was_patched_is_not_taken_for_the_librarys(
    place: str, first_token: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mean_of_all(_self: Any, features: Any, **_options: Any) -> Any:
        return features | {"sentence_embedding": features["token_embeddings"].mean(1)}

    model = copy.deepcopy(first_token)
    model.append(models.Normalize())
    fast = fastcls.optimize(model)
    monkeypatch.setattr(getattr(models, place), "forward", mean_of_all)
    texts = ["one and two", "six and ten"]
    _close(fast.encode(texts), model.encode(texts))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_another_dtype(averaging: Any, dtype: torch.dtype) -> None:
    exact = averaging.encode(TEXTS, convert_to_tensor=True).double()
    options: dict[str, Any] = {"convert_to_tensor": True}
    found = fastcls.optimize(averaging).to(dtype).encode(TEXTS, **options)
    loaded = SentenceTransformer(averaging.tokenizer.name_or_path, device="cpu").to(dtype)
    eager = loaded.encode(TEXTS, **options)
    assert found.dtype == dtype
    assert (found.double() - exact).square().mean() <= (1.1 * (eager.double() - exact)).square().mean()


def test_what_is_saved_is_the_librarys_own(averaging: Any, cross_encoder: Any, tmp_path: Path) -> None:
    fastcls.optimize(averaging).save_pretrained(str(tmp_path / "encoder"))
    _close(SentenceTransformer(str(tmp_path / "encoder"), device="cpu").encode(TEXTS), averaging.encode(TEXTS))
    fastcls.optimize(cross_encoder).save_pretrained(str(tmp_path / "reranker"))
    # Before 5.4 what was given to one call stays, and is not saved.
    options = {"activation_fn": nn.Identity()}
    loaded = CrossEncoder(str(tmp_path / "reranker"), device="cpu")
    _close(loaded.predict(PAIRS, **options), cross_encoder.predict(PAIRS, **options))


def test_a_trainer_is_not_copied(minilm_path: Path) -> None:
    model = _pooled(minilm_path, "cls")
    # It stands for a trainer: it cannot be copied.
    model.model_card_data.trainer = threading.Lock()
    assert fastcls.optimize(model).model_card_data.trainer is model.model_card_data.trainer


def test_texts_are_not_joined_for_flash_attention(minilm_path: Path) -> None:
    model = _pooled(minilm_path, "mean")
    if not hasattr(model[0], "can_flatten_inputs"):
        pytest.skip("this version of sentence-transformers joins no texts")
    model[0].can_flatten_inputs = True
    fast = fastcls.optimize(model)
    assert not fast[0].can_flatten_inputs
    assert model[0].can_flatten_inputs
    # What is saved is the user's own setting.
    assert fast[0].unpad_inputs is None


@pytest.mark.full
def test_sentence_transformers_is_not_imported_for_other_models() -> None:
    code = (
        "import sys, fastcls, support; fastcls.optimize(support.tiny_bert()); "
        "assert 'sentence_transformers' not in sys.modules"
    )
    paths = [str(Path(__file__).parents[1] / name) for name in (".", "kernels", "tests")]
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {paths}; {code}"], check=True)


def _in_float32(minilm_path: Path) -> Any:
    model = CrossEncoder(str(minilm_path), num_labels=1, device="cpu")
    if not hasattr(model, "set_keep_in_fp32_modules"):
        pytest.skip("this version of sentence-transformers keeps no modules in float32")
    model.set_keep_in_fp32_modules(["0.model.classifier"])
    return model


def _without_transformers(_: Path) -> Any:
    words = models.BoW(["a", "b"])
    return SentenceTransformer(modules=[words], device="cpu")


REFUSED: dict[str, tuple[Callable[[Path], Any], dict[str, Any], type[Exception], str]] = {
    "kept_in_float32": (_in_float32, {}, ValueError, "keep_in_fp32_modules must be empty"),
    "no_transformers_model": (_without_transformers, {}, TypeError, "must hold a transformers model.*BoW"),
    "first_where_all_are_pooled": (
        lambda path: _pooled(path, "mean"),
        {"select": "first"},
        ValueError,
        "select must be 'all' or left out",
    ),
    "unknown_select": (lambda path: _pooled(path, "cls"), {"select": "last"}, ValueError, "select must be 'all' or"),
    "mask": (lambda path: _pooled(path, "cls"), {"mask_token_id": 3}, ValueError, "mask_token_id and dense must be"),
    "optimized": (lambda path: fastcls.optimize(_pooled(path, "cls")), {}, TypeError, "must hold a transformers model"),
    "module": (lambda _: nn.Linear(2, 2), {}, TypeError, "model must be a transformers model.*Linear"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_made_fast_is_refused(case: str, minilm_path: Path) -> None:
    make, options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        fastcls.optimize(make(minilm_path), **options)
