"""CrossEncoder, SentenceTransformer and SparseEncoder: one line makes them fast, and their answers stay their own."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Sentences
from support import TINY_FAMILIES, CountTokenProducts, tiny_model
from torch import nn
from transformers import PreTrainedTokenizerBase

import fastcls

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
    assert np.abs(actual.astype(float) - expected.astype(float)).max() <= tolerance


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


def test_embeddings_of_real_sentences(averaging: Any, sst2: Callable[[str], Sentences]) -> None:
    texts = sst2("dev").texts[:256]
    _close(fastcls.optimize(averaging).encode(texts), averaging.encode(texts))


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
    assert products(fastcls.optimize(first_token)) == 4 * 5
    assert products(fastcls.optimize(first_token, select="all")) == 4 * 6


def test_what_is_not_computed_is_said(first_token: Any) -> None:
    fast = fastcls.optimize(first_token)
    with pytest.raises(ValueError, match=r'token embeddings were not computed.*select="all"'):
        fast.encode(TEXTS, output_value="token_embeddings")
    every = fastcls.optimize(first_token, select="all")
    found, expected = (model.encode(TEXTS, output_value="token_embeddings") for model in (every, first_token))
    for ours, theirs in zip(found, expected, strict=True):
        _close(ours, theirs)


def test_left_padded_texts_keep_all_rows(minilm_path: Path) -> None:
    model = _pooled(minilm_path, "cls")
    if not hasattr(model[1], "pooling_mode"):
        pytest.skip("before 5.4 sentence-transformers pools the first column, which is padding")
    model.tokenizer.padding_side = "left"
    _close(fastcls.optimize(model).encode(TEXTS), model.encode(TEXTS))


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


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
def test_every_family_reranks_and_embeds(
    family: str, minilm_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    # BERT's tokenizer tells the two texts of a pair apart.
    types = {} if family == "mpnet" else {"type_vocab_size": 2}
    sizes = {"vocab_size": len(minilm_tokenizer), **types}
    head = "DebertaV2" if family == "deberta-v2" else _class_prefix(family)
    for task, make in (("ForSequenceClassification", CrossEncoder), ("Model", SentenceTransformer)):
        folder = str(tmp_path / task)
        tiny_model(head + task, family, **sizes, **({"num_labels": 1} if "For" in task else {})).save_pretrained(folder)
        minilm_tokenizer.save_pretrained(folder)
        # Its longest texts are those of the tiny model.
        model = make(folder, device="cpu", **({"max_length": 64} if make is CrossEncoder else {}))
        model.max_seq_length = 64
        fast = fastcls.optimize(model)
        if make is CrossEncoder:
            _close(fast.predict(PAIRS), model.predict(PAIRS))
        else:
            _close(fast.encode(TEXTS), model.encode(TEXTS))


def _class_prefix(family: str) -> str:
    names = {"bert": "Bert", "mpnet": "MPNet", "xlm-roberta": "XLMRoberta", "distilbert": "DistilBert"}
    names |= {"modernbert": "ModernBert"}
    return names.get(family, family.capitalize())


def test_a_sparse_encoder(minilm_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tiny_model("BertForMaskedLM", "bert", vocab_size=len(minilm_tokenizer)).save_pretrained(tmp_path)
    minilm_tokenizer.save_pretrained(tmp_path)
    model = sentence_transformers.SparseEncoder(str(tmp_path), device="cpu")
    fast = fastcls.optimize(model)
    found, expected = (each.encode(TEXTS).to_dense() for each in (fast, model))
    _close(found.numpy(), expected.numpy())


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
    ours = {each.data_ptr() for each in fast.parameters()}
    dense = next(parameter for name, parameter in model.named_parameters() if name.startswith("2."))
    assert {encoder.auto_model.embeddings.word_embeddings.weight.data_ptr(), dense.data_ptr()} <= ours
    fast.max_seq_length = 8
    fast.prompts["other"] = "something else: "
    fast.bfloat16()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.max_seq_length != 8
    assert "other" not in model.prompts
    assert np.array_equal(model.encode(TEXTS), before)
    assert fast.model_card_data.model is fast


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
    assert not fastcls.optimize(model)[0].can_flatten_inputs


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
