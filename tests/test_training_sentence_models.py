"""sentence-transformers' trainers train a fast model as the library's own, in all its modules."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_model
from test_training import quiet
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import fastcls

library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
models = pytest.importorskip("sentence_transformers.models")
losses = pytest.importorskip("sentence_transformers.losses")

STEPS, BATCH = 10, 8
QUERIES = [
    f"how {word} was the film that everybody talked about"[: 9 + 3 * index] for index, word in enumerate("abcdefgh")
]
PASSAGES = [
    *("a visually stunning rumination on love, memory, history and the war between art and commerce", "no", "dull"),
    *("it's a charming and often affecting journey, told with more care than its subject asks for", "will not hold"),
    *(
        "unflinchingly bleak and desperate",
        "allows us to hope that nolan is poised to embark on a major career",
        "well",
    ),
]
Make = Callable[..., Any]


@pytest.fixture
def made(minilm_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Make:
    """Writes a tiny checkpoint, without dropout unless it is asked for, and gives its folder."""

    def make(model_class: str = "BertModel", *, drops: bool = False, **options: Any) -> str:
        folder = tmp_path / "given"
        make_model = tiny_model if drops else quiet
        model: Any = make_model(model_class, "bert", vocab_size=len(minilm_tokenizer), **options)
        model.save_pretrained(folder)
        minilm_tokenizer.save_pretrained(folder)
        return str(folder)

    return make


def _cross_encoder(made: Make) -> Any:
    model = library.CrossEncoder(made("BertForSequenceClassification", num_labels=1), device="cpu")
    model.max_seq_length = 64
    return model


def _bi_encoder(made: Make, pooling: str = "mean", *, dense: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    modules = [models.Transformer(made(**options), max_seq_length=64), models.Pooling(64, pooling_mode=pooling)]
    if dense:
        modules += [models.Dense(64, 48), models.LayerNorm(48), models.Normalize()]
    return library.SentenceTransformer(modules=modules, device="cpu")


def _trainer(model: Any, folder: Path, loss: Any = None, *, labelled: bool = False, **options: Any) -> Any:
    """A trainer of the library, over batches in one order."""
    datasets = pytest.importorskip("datasets", reason="the library's trainers need datasets, which is not installed")
    pytest.importorskip("accelerate", reason="the library's trainers need accelerate, which is not installed")
    columns: dict[str, Any] = {"query": QUERIES * 4, "passage": (PASSAGES[3:] + PASSAGES[:3]) * 4}
    if labelled:
        columns["label"] = [float(index % 3 == 0) for index in range(len(columns["query"]))]
    rows = datasets.Dataset.from_dict(columns)
    name = type(model).__name__
    arguments = getattr(library, f"{name}TrainingArguments")(
        **{
            "output_dir": str(folder),
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 1,
            "save_strategy": "no",
            # Adam makes steps of the rounding noise of gradients that are zero, as those of a key's bias are.
            "optim": "sgd",
            "learning_rate": 0.02,
            **options,
        }
    )
    evaluated = {"eval_dataset": rows} if options.get("eval_strategy") else {}
    return getattr(library, f"{name}Trainer")(model=model, args=arguments, train_dataset=rows, loss=loss, **evaluated)


def _assert_trains_alike(
    fast: Any, reference: Any, folder: Path, make_loss: Callable[[Any], Any], **options: Any
) -> Any:
    """Trains both, and compares losses, gradients' norms and weights; returns the fast one's trainer."""
    before = {name: weight.clone() for name, weight in reference.state_dict().items()}
    trainers: list[Any] = []
    for each in (reference, fast):
        # In other places, so that neither loads what the other one saved.
        trainers.append(_trainer(each, folder / str(len(trainers)), make_loss(each), **options))
        trainers[-1].train()
    expected, found = (
        [
            each[name]
            for each in trainer.state.log_history
            for name in ("loss", "eval_loss", "grad_norm")
            if name in each
        ]
        for trainer in trainers
    )
    assert len(found) >= 2 * STEPS
    assert found == pytest.approx(expected, rel=1e-5)
    ours, theirs = fast.state_dict(), reference.state_dict()
    assert list(ours) == list(theirs)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-5, rtol=1e-5)
    moved = [name for name in before if not torch.allclose(theirs[name], before[name], atol=1e-4)]
    assert len(moved) > len(before) / 4, "weights that did not move would prove nothing"
    assert {name.split(".")[0] for name in moved} == {name.split(".")[0] for name in before}
    return trainers[1]


def test_a_cross_encoder_trains_is_evaluated_saved_and_loaded_again(made: Make, tmp_path: Path) -> None:
    model = _cross_encoder(made)
    reference = copy.deepcopy(model)
    fast = fastcls.optimize(model).train()
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5}
    options |= {"labelled": True, "load_best_model_at_end": True}
    trainer = _assert_trains_alike(fast, reference, tmp_path, lambda _: None, **options)
    assert trainer.state.best_model_checkpoint is not None
    pairs = list(zip(QUERIES, PASSAGES, strict=True))
    expected = fast.predict(pairs)
    assert not fast.training
    fast.save_pretrained(str(tmp_path / "saved"))
    again = library.CrossEncoder(str(tmp_path / "saved"), device="cpu")
    # What the given model was made with is what was learnt, too.
    for each in (again, model):
        np.testing.assert_allclose(each.predict(pairs), expected, atol=1e-5)


CASES = [
    pytest.param("cls", False, "MultipleNegativesRankingLoss", {}, id="cls", marks=pytest.mark.full),
    pytest.param("cls", True, "CachedMultipleNegativesRankingLoss", {"mini_batch_size": 3}, id="cls-dense-cached"),
    pytest.param("mean", True, "MultipleNegativesRankingLoss", {}, id="mean-dense", marks=pytest.mark.full),
    pytest.param(
        *("mean", False, "CachedMultipleNegativesRankingLoss", {"mini_batch_size": 3}),
        id="mean-cached",
        marks=pytest.mark.full,
    ),
    pytest.param("max", True, "MultipleNegativesRankingLoss", {}, id="max-dense", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("pooling", "dense", "loss", "options"), CASES)
def test_a_bi_encoder_trains_as_the_librarys_own(
    made: Make, tmp_path: Path, pooling: str, dense: bool, loss: str, options: dict[str, Any]
) -> None:
    model = _bi_encoder(made, pooling, dense=dense)
    reference = copy.deepcopy(model)
    fast = fastcls.optimize(model).train()
    _assert_trains_alike(fast, reference, tmp_path, lambda each: getattr(losses, loss)(each, **options))
    fast.save_pretrained(str(tmp_path / "saved"))
    again = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(again.encode(PASSAGES), fast.encode(PASSAGES), atol=1e-5)


@pytest.mark.full
def test_a_sparse_encoder_trains_as_the_librarys_own(made: Make, tmp_path: Path) -> None:
    sparse = pytest.importorskip("sentence_transformers.sparse_encoder.losses")
    model = library.SparseEncoder(made("BertForMaskedLM"), device="cpu")
    reference = copy.deepcopy(model)

    def loss(each: Any) -> Any:
        ranking = sparse.SparseMultipleNegativesRankingLoss(each, scale=1e-3)
        return sparse.SpladeLoss(each, ranking, document_regularizer_weight=1e-4, query_regularizer_weight=1e-4)

    _assert_trains_alike(fastcls.optimize(model).train(), reference, tmp_path, loss, learning_rate=2e-3)


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "lasttoken", "weightedmean"])
@pytest.mark.parametrize("select", [None, "all"])
def test_gradients_behind_each_pooling_are_the_librarys_own(made: Make, pooling: str, select: Any) -> None:
    model = _bi_encoder(made, pooling, dense=True).double()
    reference = copy.deepcopy(model).train()
    fast = fastcls.optimize(model, select=select).train()
    found: list[dict[str, Tensor]] = []
    for each in (reference, fast):
        features = each.tokenizer(PASSAGES, padding=True, return_tensors="pt")
        each(features)["sentence_embedding"].sin().sum().backward()
        found.append({name: weight.grad for name, weight in each.named_parameters() if weight.grad is not None})
    largest = max(float(each.abs().max()) for each in found[0].values())
    assert {"0.auto_model.embeddings.word_embeddings.weight", "2.linear.weight"} <= {
        name.replace(".model.", ".auto_model.") for name in found[1]
    }
    for name, expected in found[0].items():
        assert float((found[1].get(name, torch.zeros(())) - expected).abs().max()) <= 1e-10 * largest, name


def test_dropout_is_the_same_where_the_loss_computes_embeddings_again(made: Make) -> None:
    fast = fastcls.optimize(_bi_encoder(made, drops=True)).train()

    def gradients(seed: int, name: str, **options: Any) -> list[Tensor]:
        features = [fast.tokenizer(texts, padding=True, return_tensors="pt") for texts in (QUERIES, PASSAGES)]
        torch.manual_seed(seed)
        fast.zero_grad()
        getattr(losses, name)(fast, **options)(features, None).backward()
        return [weight.grad.clone() for weight in fast.parameters() if weight.grad is not None]

    expected = gradients(1, "MultipleNegativesRankingLoss")
    # In one mini-batch it draws the same numbers, and once more behind the loss.
    found = gradients(1, "CachedMultipleNegativesRankingLoss", mini_batch_size=len(PASSAGES))
    other = gradients(2, "CachedMultipleNegativesRankingLoss", mini_batch_size=len(PASSAGES))
    largest = max(float(each.abs().max()) for each in expected)

    def apart(others: list[Tensor]) -> float:
        return max(float((one - two).abs().max()) for one, two in zip(others, expected, strict=True)) / largest

    assert apart(found) <= 1e-5
    assert apart(other) > 0.01


def _train_by_hand(model: Any, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(2):
        features = model.tokenizer(PASSAGES, padding=True, return_tensors="pt")
        model(features)["sentence_embedding"].sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_all_parameters_are_the_given_models(made: Make) -> None:
    model = _bi_encoder(made, dense=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fast = fastcls.optimize(model).train()
    pairs = list(zip(fast.named_parameters(), model.named_parameters(), strict=True))
    assert all(ours[0] == theirs[0] and ours[1] is theirs[1] for ours, theirs in pairs)
    before = fast.encode(PASSAGES)
    _train_by_hand(fast.train(), optimizer)
    after = fast.encode(PASSAGES)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(after, model.encode(PASSAGES), atol=1e-5)
    # Back to training, and again: nothing falls back to what the given model had.
    _train_by_hand(fast.train(), optimizer)
    assert np.abs(fast.encode(PASSAGES) - after).max() > 1e-3
    np.testing.assert_allclose(fast.encode(PASSAGES), model.encode(PASSAGES), atol=1e-5)


@pytest.mark.parametrize("why", ["gone", "another_dtype", "copied"])
def test_a_model_with_weights_of_its_own_is_trained_in_all_modules(made: Make, why: str) -> None:
    model = _bi_encoder(made, dense=True)
    model[2].linear.bias.requires_grad_(False)
    expected = copy.deepcopy(model)
    fast = fastcls.optimize(model)
    if why == "gone":
        del model
        gc.collect()
    elif why == "another_dtype":
        fast.bfloat16()
        model.encode(PASSAGES)
    else:
        fast = copy.deepcopy(fast)
    fast.train()
    before = {name: weight.detach().clone() for name, weight in fast.named_parameters()}
    _train_by_hand(fast, torch.optim.SGD(fast.parameters(), lr=0.1))
    fast.encode(PASSAGES)
    moved = {name for name, weight in fast.named_parameters() if not torch.equal(weight, before[name])}
    assert "2.linear.weight" in moved
    assert "2.linear.bias" not in moved
    assert any(name.startswith("0.") for name in moved)
    if why != "gone":
        for one, other in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.covering(alone=["is_there", "dense"])
@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_an_optimizer_that_was_made_too_early_is_refused(
    made: Make, tmp_path: Path, is_there: bool, dense: bool
) -> None:
    model = [_bi_encoder(made, dense=dense)]
    fast = fastcls.optimize(model[0])
    if not is_there:
        model.clear()
        gc.collect()
    with pytest.raises(RuntimeError, match=r"call train\(\) before the optimizer, or transformers' Trainer"):
        _trainer(fast, tmp_path, losses.MultipleNegativesRankingLoss(fast)).train()


def test_a_head_is_trained_on_an_encoder_that_stays_in_eval_mode(made: Make) -> None:
    model = _bi_encoder(made, dense=True)
    fast = fastcls.optimize(model)
    fast[0].auto_model.stays_in_eval = True
    assert not fast.train()[0].auto_model.training
    encoder = {name: weight.clone() for name, weight in model[0].state_dict().items()}
    before = fast.encode(PASSAGES)
    _train_by_hand(fast.train(), torch.optim.SGD(fast[2].parameters(), lr=0.5))
    assert np.abs(fast.encode(PASSAGES) - before).max() > 1e-3
    assert all(torch.equal(weight, encoder[name]) for name, weight in model[0].state_dict().items())


def test_a_model_in_training_is_not_made_fast_again(made: Make) -> None:
    fast = fastcls.optimize(_bi_encoder(made)).train()
    with pytest.raises(TypeError, match="must hold a transformers model"):
        fastcls.optimize(fast)
