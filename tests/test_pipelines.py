"""transformers' own pipelines around a fast model: the same answers, and nothing to complain of."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Sentences
from support import tiny_model
from transformers import PreTrainedTokenizerBase
from transformers.pipelines import PIPELINE_REGISTRY

import fastcls

pipeline: Any = transformers.pipeline

TEXTS = [
    "a visually stunning rumination on love",
    "no",
    "it's a charming and often affecting journey, told with more care than its subject asks for",
    "unflinchingly bleak and desperate",
    "the film's center will not hold",
]
PAIRS = [{"text": TEXTS[index % 2], "text_pair": text} for index, text in enumerate(TEXTS)]


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    """Warnings and errors that transformers' pipelines log."""
    messages: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    keeper, logger = Keeper(level=logging.WARNING), logging.getLogger("transformers.pipelines.base")
    logger.addHandler(keeper)
    yield messages
    logger.removeHandler(keeper)


class Both:
    """One pipeline around a model, and one around the fast one."""

    def __init__(self, task: str, tokenizer: PreTrainedTokenizerBase, model: Any, **options: Any) -> None:
        if task not in PIPELINE_REGISTRY.get_supported_tasks():
            pytest.skip(f"transformers {transformers.__version__} has no pipeline for {task}")
        self.theirs = pipeline(task, model=model, tokenizer=tokenizer, device="cpu")
        self.ours = pipeline(task, model=fastcls.optimize(model, **options), tokenizer=tokenizer, device="cpu")

    def agree(self, *args: Any, **kwargs: Any) -> Any:
        """What ours gives, the same as theirs."""
        found = self.ours(*args, **kwargs)
        assert_same(found, self.theirs(*args, **kwargs))
        return found


def assert_same(found: Any, expected: Any) -> None:
    """The same structure, words and whole numbers, and the same fractions to 1e-5."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, (str, int)) or expected is None:
        assert found == expected
    else:
        assert float(found) == pytest.approx(float(expected), abs=1e-5)


def _model(head: str, tokenizer: PreTrainedTokenizerBase, **overrides: Any) -> Any:
    return tiny_model(f"Bert{head}", "bert", vocab_size=len(tokenizer), **overrides)


@pytest.fixture
def classification(minilm_tokenizer: PreTrainedTokenizerBase) -> Both:
    return Both("text-classification", minilm_tokenizer, _model("ForSequenceClassification", minilm_tokenizer))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"top_k": None}, id="all_labels"),
        pytest.param({"top_k": 2, "batch_size": 3}, id="batches"),
        pytest.param({"function_to_apply": "sigmoid"}, id="sigmoid"),
        pytest.param({"truncation": True, "max_length": 8, "batch_size": 2}, id="truncated"),
    ],
)
def test_text_classification(classification: Both, options: dict[str, Any]) -> None:
    classification.agree(TEXTS, **options)
    classification.agree(TEXTS[0], **options)
    classification.agree(PAIRS, **options)
    classification.agree(PAIRS[0], **options)


def test_a_generator_of_texts(classification: Both) -> None:
    def texts() -> Iterator[str]:
        yield from TEXTS

    found = list(classification.ours(texts(), batch_size=2))
    assert_same(found, list(classification.theirs(texts(), batch_size=2)))
    assert len(found) == len(TEXTS)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_other_problems(minilm_tokenizer: PreTrainedTokenizerBase, problem: str) -> None:
    labels = 1 if problem == "regression" else 3
    model = _model("ForSequenceClassification", minilm_tokenizer, problem_type=problem, num_labels=labels)
    Both("text-classification", minilm_tokenizer, model).agree(TEXTS, top_k=None)


def test_real_sentences(minilm_path: Path, minilm_tokenizer: Any, sst2: Callable[[str], Sentences]) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(minilm_path).eval()
    model.classifier.weight.data.normal_()
    Both("text-classification", minilm_tokenizer, model).agree(sst2("dev").texts[:64], batch_size=32)


@pytest.mark.parametrize("place", [0, 2], ids=["entailment_first", "entailment_last"])
def test_zero_shot_classification(minilm_tokenizer: PreTrainedTokenizerBase, place: int) -> None:
    names = ["contradiction", "neutral"]
    names.insert(place, "ENTAILMENT")
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    model = _model("ForSequenceClassification", minilm_tokenizer, **labels)
    both = Both("zero-shot-classification", minilm_tokenizer, model)
    both.agree(TEXTS, candidate_labels=["praise", "blame"])
    both.agree(TEXTS[0], candidate_labels=["praise", "blame"], multi_label=True)


@pytest.mark.parametrize("strategy", ["none", "simple", "max"])
def test_token_classification(minilm_tokenizer: PreTrainedTokenizerBase, strategy: str) -> None:
    both = Both("token-classification", minilm_tokenizer, _model("ForTokenClassification", minilm_tokenizer))
    found = both.agree(TEXTS, aggregation_strategy=strategy, batch_size=2)
    assert any(found)
    both.agree(TEXTS[0], aggregation_strategy=strategy)


@pytest.mark.parametrize("by_mask", [False, True], ids=["every_token", "masked_tokens"])
def test_fill_mask(minilm_tokenizer: Any, by_mask: bool) -> None:
    masked = [f"{text} [MASK] and that is all" for text in TEXTS]
    options = {"mask_token_id": minilm_tokenizer.mask_token_id} if by_mask else {}
    both = Both("fill-mask", minilm_tokenizer, _model("ForMaskedLM", minilm_tokenizer), **options)
    both.agree(masked, top_k=3)
    both.agree(masked, batch_size=2)
    both.agree("[MASK] and [MASK]", targets=["love", "war"])


def test_what_fill_mask_says_of_a_text_without_a_mask(minilm_tokenizer: Any) -> None:
    both = Both("fill-mask", minilm_tokenizer, _model("ForMaskedLM", minilm_tokenizer))
    for pipe in (both.theirs, both.ours):
        with pytest.raises(Exception, match=r"No mask_token \(\[MASK\]\) found on the input"):
            pipe("no mask here")


def test_feature_extraction(minilm_tokenizer: PreTrainedTokenizerBase) -> None:
    both = Both("feature-extraction", minilm_tokenizer, _model("Model", minilm_tokenizer))
    both.agree(TEXTS)
    found, expected = (pipe(TEXTS[0], return_tensors=True) for pipe in (both.ours, both.theirs))
    assert torch.allclose(found, expected, atol=1e-5)


def test_features_of_padding_are_zeros(minilm_tokenizer: Any) -> None:
    both = Both("feature-extraction", minilm_tokenizer, _model("Model", minilm_tokenizer))
    lengths = [len(ids) for ids in minilm_tokenizer(TEXTS)["input_ids"]]
    found, expected = (pipe(TEXTS, batch_size=len(TEXTS)) for pipe in (both.ours, both.theirs))
    for length, one, other in zip(lengths, found, expected, strict=True):
        assert_same(one[0][:length], other[0][:length])
        assert not any(any(row) for row in one[0][length:])


def test_question_answering(minilm_tokenizer: Any) -> None:
    both = Both("question-answering", minilm_tokenizer, _model("ForQuestionAnswering", minilm_tokenizer))
    context = " ".join(TEXTS)
    both.agree(question="what is it?", context=context)
    both.agree(question="what is it?", context=context, top_k=3, max_seq_len=32, doc_stride=8)


@pytest.mark.parametrize(
    ("task", "head"),
    [
        ("text-classification", "ForSequenceClassification"),
        ("token-classification", "ForTokenClassification"),
        ("fill-mask", "ForMaskedLM"),
        ("question-answering", "ForQuestionAnswering"),
        ("feature-extraction", "Model"),
    ],
)
def test_nothing_is_complained_of(
    task: str, head: str, minilm_tokenizer: PreTrainedTokenizerBase, complaints: list[str]
) -> None:
    both = Both(task, minilm_tokenizer, _model(head, minilm_tokenizer))
    assert complaints == []
    # transformers writes the model's name, inputs and outputs there.
    assert type(both.ours.model).__name__ in repr(both.ours)


def test_a_model_of_another_task_is_still_complained_of(
    minilm_tokenizer: PreTrainedTokenizerBase, complaints: list[str]
) -> None:
    Both("token-classification", minilm_tokenizer, _model("ForSequenceClassification", minilm_tokenizer))
    assert any("FastClassifier' is not supported for token-classification" in message for message in complaints)


def test_transformers_loads_what_it_always_did(minilm_path: Path) -> None:
    # Ours are registered for their names alone.
    model = transformers.AutoModelForSequenceClassification.from_pretrained(minilm_path)
    assert type(model) is transformers.BertForSequenceClassification
    assert type(fastcls.optimize(model)) is fastcls.FastClassifier


def test_a_saved_pipeline_is_transformers_own(classification: Both, tmp_path: Path) -> None:
    classification.ours.save_pretrained(tmp_path)
    loaded = pipeline("text-classification", model=str(tmp_path), device="cpu")
    assert type(loaded.model) is transformers.BertForSequenceClassification
    assert_same(loaded(TEXTS), classification.theirs(TEXTS))
