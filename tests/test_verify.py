"""The optimized model against the original, on texts of the user's own: what is counted, what is judged, and how."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support import TINY_FAMILIES, tiny_bert, tiny_model
from test_families import CLASSES, every_class, family_and_head
from torch import Tensor, nn
from transformers import BertForPreTraining, PreTrainedTokenizerBase
from typer.testing import CliRunner, Result

import fastcls
import fastcls.loading
import fastcls.tools.verify
from fastcls.tools.cli import app
from fastcls.tools.demo import sample_texts, sample_tokenizer
from fastcls.tools.verify import Verification, verify
from fastcls.tools.verify.comparison import MAX_CHANGED

TEXTS = [text for text in sample_texts() if len(text) < 160][:24]
TWO_NAMES: dict[str, Any] = {"num_labels": 2, "id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
HEADS = [name for name, model_type in CLASSES if model_type == "bert"]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    made = sample_tokenizer(sample_texts())
    made.add_special_tokens({"mask_token": "[MASK]"})
    return made


def sized(tokenizer: PreTrainedTokenizerBase, model_class: str, family: str = "bert", **overrides: Any) -> Any:
    """A tiny model for the tokenizer's words, and for its two kinds of tokens where the family knows kinds."""
    kinds = {"type_vocab_size": 2} if TINY_FAMILIES[family].get("type_vocab_size") == 1 else {}
    return tiny_model(model_class, family, vocab_size=len(tokenizer), **kinds, **overrides)


def texts_for(model_class: str, texts: list[str] = TEXTS) -> list[Any]:
    if "MultipleChoice" in model_class:
        # Questions with two choices and with three.
        return [(text, "yes", "no", "who knows")[: 3 + index % 2] for index, text in enumerate(texts)]
    if "NextSentence" in model_class:
        return [(text, "and so on") for text in texts]
    if "MaskedLM" in model_class:
        return [f"[MASK] {text} [MASK]" if index % 2 else text for index, text in enumerate(texts)]
    return [*texts]


def damaged(model: Any, damage: Callable[[Any], Any]) -> Any:
    """The fast model of a copy, whose weights are then changed."""
    fast = fastcls.optimize(copy.deepcopy(model))
    with torch.no_grad():
        damage(fast)
    return fast


def negate(fast: Any) -> None:
    fast.head.out_weight.neg_()
    fast.head.out_bias.neg_()


@torch.no_grad()
def logits(model: Any, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    found: Tensor = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    return found


def words(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> int:
    return sum(len(tokenizer(text)["input_ids"]) for text in texts)


# Families and heads


@family_and_head
@every_class
def test_every_family_and_head_is_fine(model_class: str, family: str, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = texts_for(model_class)[:6]
    found = verify(sized(tokenizer, model_class, family), tokenizer, texts, reduced=(), batch_size=4)
    (comparison,) = found.comparisons
    assert found.fine()
    assert (found.texts, found.interrupted, comparison.beyond_rounding) == (6, False, 0)
    # Not 0: it would have been compared with itself.
    assert 0 < comparison.differences.largest < 1e-4
    assert comparison.rounding is not None
    assert 0 < comparison.rounding < 1e-4


@pytest.mark.parametrize("model_class", ["BertForSequenceClassification", "BertForMaskedLM", "BertModel"])
def test_it_runs_where_the_model_is(model_class: str, device: str, tokenizer: PreTrainedTokenizerBase) -> None:
    # Tuples instead of outputs by name are an option of the config.
    model = sized(tokenizer, model_class, return_dict=False).to(device)
    found = verify(model, tokenizer, texts_for(model_class)[:6], reduced=(), batch_size=4)
    assert (found.device.startswith(device), found.fine()) == (True, True)


def expected_labels(model_class: str, tokenizer: PreTrainedTokenizerBase) -> int:
    if "MaskedLM" in model_class:
        return 2 * (len(TEXTS) // 2) + words(tokenizer, TEXTS[::2])
    if "TokenClassification" in model_class:
        return words(tokenizer, TEXTS)
    if model_class == "BertModel":
        return 0
    return len(TEXTS) * (2 if "QuestionAnswering" in model_class else 1)


@pytest.mark.parametrize("model_class", HEADS)
def test_the_command_finds_the_head_and_counts_its_labels(
    model_class: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = saved(sized(tokenizer, model_class), tokenizer, tmp_path)
    lines = ["\t".join((text,) if isinstance(text, str) else text) for text in texts_for(model_class)]
    (tmp_path / "texts.txt").write_text("\n".join(lines) + "\n")
    pairs = ["--pairs"] if "NextSentence" in model_class else []
    done = run(folder, tmp_path / "texts.txt", "--json", "--reduced", "none", *pairs)
    assert (done.exit_code, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["model_class"], found["texts"], found["fine"]) == (model_class, len(TEXTS), True)
    assert found["comparisons"][0]["labels"] == expected_labels(model_class, tokenizer)


def test_an_encoder_saved_without_its_pooler_is_one(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    from transformers import BertModel

    model = BertModel(sized(tokenizer, "BertModel").config, add_pooling_layer=False)
    folder = saved(model, tokenizer, tmp_path)
    assert run(folder, stdin=b"one text\n").exit_code == 0


def test_an_embedders_vectors_are_compared_by_their_angle(tokenizer: PreTrainedTokenizerBase) -> None:
    model = sized(tokenizer, "BertModel")
    fine = verify(model, tokenizer, TEXTS).comparisons[0]
    assert fine.mean_cosine == pytest.approx(1, abs=1e-9)

    def damage_the_last_layer(fast: Any) -> None:
        next(p for name, p in fast.named_parameters() if "layers.2.output_norm_weight" in name).neg_()

    found = verify(model, tokenizer, TEXTS, fast=damaged(model, damage_the_last_layer))
    assert not found.fine()
    assert found.comparisons[0].cosines[2] < 0.9
    places = {changed.place for changed in found.comparisons[0].kept}
    assert places
    assert all(place is not None and place.startswith(("token ", "first token")) for place in places)


def test_a_masked_model_keeps_what_its_owner_has_set(tokenizer: PreTrainedTokenizerBase) -> None:
    model = sized(tokenizer, "BertForMaskedLM")
    fast = fastcls.optimize(model, mask_token_id=5, dense=False)
    found = verify(model, tokenizer, ["a [MASK]", "no mask"], fast=fast, reduced=())
    assert found.comparisons[0].decisions == 1 + words(tokenizer, ["no mask"])
    assert (fast.mask_token_id, fast.dense) == (5, False)


# What counts as changed, and what rounding explains


def at_margin(tokenizer: PreTrainedTokenizerBase, roundings: float) -> tuple[Any, float]:
    """A classifier into two that prefers the first label for the first text by so many of its own rounding errors."""
    model = sized(tokenizer, "BertForSequenceClassification", **TWO_NAMES)
    rounding = verify(copy.deepcopy(model), tokenizer, TEXTS, reduced=()).comparisons[0].rounding
    assert rounding is not None
    first, second = logits(copy.deepcopy(model).double(), tokenizer, TEXTS[:1])[0].tolist()
    model.classifier.bias.data[1] += first - second - roundings * rounding
    return model, roundings * rounding


# Rounding explains six of them, and the margin is itself rounded.
@pytest.mark.parametrize(("roundings", "explained"), [(3, True), (100, False)])
def test_a_label_may_change_by_rounding_and_no_more(
    tokenizer: PreTrainedTokenizerBase, roundings: float, explained: bool
) -> None:
    model, margin = at_margin(tokenizer, roundings)
    fast = damaged(model, lambda fast: fast.head.out_bias[1].add_(2 * margin))
    found = verify(model, tokenizer, TEXTS, fast=fast, reduced=())
    comparison = found.comparisons[0]
    assert (comparison.changed, comparison.beyond_rounding, found.fine()) == (1, int(not explained), explained)
    (changed,) = comparison.kept
    assert (changed.line, changed.text, changed.beyond_rounding) == (1, TEXTS[0], not explained)
    assert changed.original is not None
    assert changed.fastcls is not None
    assert (changed.original.label, changed.fastcls.label) == ("bad", "good")
    assert changed.margin == pytest.approx(margin, abs=2 * margin / roundings)
    # Both sides of the tie: half the score each, each a little more.
    assert changed.original.score == pytest.approx(0.5 + margin / 4, abs=margin / roundings)
    assert changed.fastcls.score == pytest.approx(0.5 + margin / 4, abs=margin / roundings)


def test_the_bound_is_the_originals_own_error(tokenizer: PreTrainedTokenizerBase) -> None:
    model = sized(tokenizer, "BertForSequenceClassification")
    exact = copy.deepcopy(model).double()
    found = verify(model, tokenizer, TEXTS, batch_size=8, reduced=())
    own = max(
        float((logits(model, tokenizer, part).double() - logits(exact, tokenizer, part)).abs().max())
        for part in (TEXTS[:8], TEXTS[8:16], TEXTS[16:])
    )
    assert found.comparisons[0].rounding == pytest.approx(own)


def test_a_change_behind_the_first_texts_is_judged_by_its_own_error(tokenizer: PreTrainedTokenizerBase) -> None:
    model = sized(tokenizer, "BertForSequenceClassification", **TWO_NAMES)
    exact = copy.deepcopy(model).double()
    errors = [own_error(model, exact, tokenizer, text) for text in TEXTS]
    best, worst = TEXTS[errors.index(min(errors))], TEXTS[errors.index(max(errors))]
    first, second = logits(exact, tokenizer, [worst])[0].tolist()
    model.classifier.bias.data[1] += first - second - 3 * max(errors)
    fast = damaged(model, lambda fast: fast.head.out_bias[1].add_(6 * max(errors)))
    found = verify(model, tokenizer, [*[best] * 64, worst], fast=fast, reduced=())
    (changed,) = found.comparisons[0].kept
    assert changed.line == 65
    own = own_error(model, copy.deepcopy(model).double(), tokenizer, worst)
    assert found.comparisons[0].rounding is not None
    assert own > found.comparisons[0].rounding
    assert changed.explained == pytest.approx(6 * own)


def own_error(model: Any, exact: Any, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    return float((logits(model, tokenizer, [text]).double() - logits(exact, tokenizer, [text])).abs().max())


def test_the_worst_changes_are_kept_and_all_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    model = sized(tokenizer, "BertForSequenceClassification", **TWO_NAMES)
    texts = sample_texts()
    found = verify(model, tokenizer, texts, fast=damaged(model, negate), reduced=(), truncation=True)
    comparison = found.comparisons[0]
    assert not found.fine()
    assert (comparison.changed, comparison.beyond_rounding) == (len(texts), len(texts))
    margins = [changed.margin for changed in comparison.kept]
    assert len(margins) == 20
    assert margins == sorted(margins, reverse=True)
    every = logits_of(model, tokenizer, texts).diff(dim=1).abs()[:, 0].sort(descending=True).values
    torch.testing.assert_close(torch.tensor(margins), every[:20], rtol=1e-4, atol=1e-5)


def logits_of(model: Any, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    classifier = fastcls.Classifier(model, tokenizer, truncation=True)
    return classifier.logits(texts)


def test_each_of_many_labels_goes_by_its_sign(tokenizer: PreTrainedTokenizerBase) -> None:
    model = sized(tokenizer, "BertForSequenceClassification", problem_type="multi_label_classification", **TWO_NAMES)
    expected = logits(model, tokenizer, TEXTS)

    def flip_the_second(fast: Any) -> None:
        fast.head.out_weight[1].neg_()
        fast.head.out_bias[1].neg_()

    comparison = verify(model, tokenizer, TEXTS, fast=damaged(model, flip_the_second), reduced=()).comparisons[0]
    assert (comparison.decisions, comparison.changed) == (2 * len(TEXTS), len(TEXTS))
    for changed in comparison.kept:
        logit = float(expected[changed.line - 1, 1])
        assert changed.original is not None
        assert changed.fastcls is not None
        labels = (changed.original.label, changed.fastcls.label)
        assert labels == (("good", "not good") if logit > 0 else ("not good", "good"))
        assert changed.margin == pytest.approx(abs(logit), abs=1e-5)
        assert changed.original.score == pytest.approx(1 / (1 + 2.718281828 ** -abs(logit)), abs=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_scores_without_labels_are_judged_by_their_difference(tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    model = sized(tokenizer, "BertForSequenceClassification", num_labels=1)
    for first in range(0, 4 * count, count):
        # One number alone may be exact by chance, and what rounding explains must not be nothing then.
        found = verify(model, tokenizer, TEXTS[first : first + count], reduced=())
        assert found.fine(), first
        assert found.comparisons[0].decisions == 0
    found = verify(model, tokenizer, TEXTS, fast=damaged(model, negate), reduced=())
    assert not found.fine()
    assert found.comparisons[0].kept[0].original is None


def test_tokens_are_named_where_their_label_changed(tokenizer: PreTrainedTokenizerBase) -> None:
    model = sized(tokenizer, "BertForTokenClassification", **TWO_NAMES)
    found = verify(model, tokenizer, ["it is late", "ok"], fast=damaged(model, negate), reduced=())
    comparison = found.comparisons[0]
    assert comparison.changed == words(tokenizer, ["it is late", "ok"])
    names = tokenizer.convert_ids_to_tokens(tokenizer("ok")["input_ids"])
    assert {changed.place for changed in comparison.kept if changed.line == 2} == {
        f"token {place} {name}" for place, name in enumerate(names)
    }


def test_answers_begin_and_end_outside_the_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    model = sized(tokenizer, "BertForQuestionAnswering")
    found = verify(model, tokenizer, ["ok", TEXTS[0]], fast=damaged(model, negate), reduced=())
    comparison = found.comparisons[0]
    assert comparison.differences.count == 2 * words(tokenizer, ["ok", TEXTS[0]])
    short = [changed for changed in comparison.kept if changed.line == 1]
    assert {changed.place for changed in short} <= {"start", "end"}
    assert all(changed.fastcls is not None and "[PAD]" not in changed.fastcls.label for changed in comparison.kept)


@pytest.mark.parametrize("whose", ["original", "fastcls"])
def test_what_is_no_number_is_no_rounding(tokenizer: PreTrainedTokenizerBase, whose: str) -> None:
    model = sized(tokenizer, "BertForSequenceClassification")
    fast = damaged(model, lambda fast: fast.head.out_bias[2].fill_(float("nan") if whose == "fastcls" else 0.0))
    if whose == "original":
        model.classifier.bias.data[2] = float("nan")
    found = verify(model, tokenizer, TEXTS, fast=fast, reduced=())
    comparison = found.comparisons[0]
    assert comparison.differences.not_finite == len(TEXTS)
    assert comparison.changed > 0
    assert comparison.beyond_rounding == comparison.changed
    assert (comparison.not_finite, comparison.other_than_original) == (len(TEXTS), len(TEXTS))
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("model_class", "number"),
    [
        ("BertForSequenceClassification", float("nan")),
        ("BertForTokenClassification", float("inf")),
        ("BertModel", float("nan")),
    ],
    ids=["nan", "infinite_tokens", "nan_states"],
)
def test_a_model_whose_numbers_are_not_finite_is_never_fine(
    model_class: str, number: float, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = sized(tokenizer, model_class)
    encoder = model if model_class == "BertModel" else model.bert
    # A letter from elsewhere is [UNK], and so in the second text and the fourth.
    encoder.embeddings.word_embeddings.weight.data[tokenizer.unk_token_id] = number
    found = verify(model, tokenizer, ["fine", "語", "fine", "語"], reduced=(), batch_size=2)
    comparison = found.comparisons[0]
    assert not found.fine()
    assert (comparison.not_finite, comparison.other_than_original, comparison.first_not_finite) == (2, 0, 2)
    assert comparison.differences.not_finite > 0
    assert math.isnan(comparison.cosines[2]) is (model_class == "BertModel")
    json.dumps(found.to_json(), allow_nan=False)
    out = io.StringIO()
    fastcls.tools.verify.show(found, Console(file=out, width=300), strict=False)
    assert "Fine" not in out.getvalue()
    assert "what 2 of 4 texts get in float32 is not finite, the first in line 2; the original gives" in out.getvalue()


@pytest.mark.parametrize("damage", ["scaled", "infinite"])
def test_logits_that_are_off_are_not_fine_where_no_label_changed(
    tokenizer: PreTrainedTokenizerBase, damage: str
) -> None:
    model = sized(tokenizer, "BertForSequenceClassification", num_labels=2)
    with torch.no_grad():
        # One label for all texts, so that none changes below.
        model.classifier.bias[0] += 10.0

    def scale(fast: Any) -> None:
        fast.head.out_weight.mul_(1.5)

    def lose_a_logit(fast: Any) -> None:
        fast.head.out_bias[1] = -float("inf")

    fast = damaged(model, scale if damage == "scaled" else lose_a_logit)
    texts = sample_texts()[:72]
    found = verify(model, tokenizer, texts, fast=fast, reduced=(), truncation=True)
    comparison = found.comparisons[0]
    assert (comparison.changed, comparison.far_off, found.fine()) == (0, len(texts), False)
    off = (
        logits_of(model, tokenizer, texts) - fastcls.Classifier(fast, tokenizer, truncation=True).logits(texts)
    ).abs()
    assert comparison.furthest == (int(off.amax(1).argmax()) + 1 if damage == "scaled" else 1)
    own = verify(model, tokenizer, texts, truncation=True)
    assert own.fine(strict=True)
    assert [each.far_off for each in own.comparisons] == [0, 0, 0]


def test_every_difference_is_in_the_histogram(tokenizer: PreTrainedTokenizerBase) -> None:
    for comparison in verify(sized(tokenizer, "BertForTokenClassification"), tokenizer, TEXTS).comparisons:
        differences = comparison.differences
        assert sum(count for *_, count in differences.bins()) == differences.count - differences.equal
        low, below, _ = list(differences.bins())[-1]
        assert low <= differences.largest < below
        assert differences.mean < differences.largest


# Reduced precision


def test_reduced_precision_is_shown_of_both_models(tokenizer: PreTrainedTokenizerBase) -> None:
    model = sized(tokenizer, "BertForSequenceClassification")
    found = verify(model, tokenizer, TEXTS, reduced=["bfloat16", torch.float16])
    assert [(each.name, each.dtype) for each in found.comparisons] == [
        ("fastcls", "float32"),
        ("original", "bfloat16"),
        ("fastcls", "bfloat16"),
        ("original", "float16"),
        ("fastcls", "float16"),
    ]
    lower = nn.Module.to(copy.deepcopy(model), torch.bfloat16)
    expected = (logits(model, tokenizer, TEXTS) - logits(lower, tokenizer, TEXTS).float()).abs().max()
    _, original, fast, *_ = found.comparisons
    assert original.differences.largest == pytest.approx(float(expected))
    # The original in a dtype is what fastcls in it is judged by, and is not judged itself.
    assert original.rounding is None
    assert fast.rounding == pytest.approx(float(expected))
    assert found.fine(strict=True)
    assert [timed.texts for timed in found.timed] == [len(TEXTS)] * 6
    assert model.dtype == torch.float32


def test_only_a_strict_verdict_asks_reduced_precision(tokenizer: PreTrainedTokenizerBase) -> None:
    found = verify(sized(tokenizer, "BertForSequenceClassification"), tokenizer, TEXTS[:4])
    found.comparisons[2].beyond_rounding = 1
    assert found.fine()
    assert not found.fine(strict=True)


# Int8


def quantised(model: Any, damage: Callable[[Any], Any] | None = None) -> Any:
    """The int8 model of a copy, whose weights are then changed."""
    fast = fastcls.optimize(copy.deepcopy(model))
    # Whatever the CPU.
    fast.quantize = "int8"
    with torch.no_grad():
        if damage is not None:
            damage(fast)
    return fast


def prefer_the_second(by: float) -> Callable[[Any], Any]:
    return lambda fast: fast.head.out_bias[1].add_(by)


def half_changed(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Any, int]:
    """A classifier into two, an int8 model of it that changes about half of the labels of `TEXTS`, and how many."""
    model = sized(tokenizer, "BertForSequenceClassification", **TWO_NAMES)
    # All texts get the first label, with margins from 10 on.
    model.classifier.bias.data[0] += 10 + logits(model, tokenizer, TEXTS).diff(dim=1).max()
    first, second = logits(quantised(model), tokenizer, TEXTS).unbind(1)
    margins = (first - second).sort().values
    # In the widest gap of the middle, so that no text is near a tie.
    middle = slice(len(TEXTS) // 4, -len(TEXTS) // 4)
    below = len(TEXTS) // 4 + int(margins[middle].diff().argmax())
    return model, quantised(model, prefer_the_second(float(margins[below : below + 2].mean()))), below + 1


def test_of_int8_the_share_of_changed_labels_decides(tokenizer: PreTrainedTokenizerBase) -> None:
    model, fast, changed = half_changed(tokenizer)
    percent = 100 * changed / len(TEXTS)
    for allowed, fine in ((percent, True), (percent - 0.01, False), (None, False), (100, True), (0, False)):
        found = verify(model, tokenizer, TEXTS, fast=fast, max_changed=allowed, batch_size=7)
        comparison = found.comparisons[0]
        assert (comparison.dtype, comparison.changed, comparison.decisions) == ("int8", changed, len(TEXTS))
        assert comparison.changed_percent == pytest.approx(percent)
        assert (found.fine(), comparison.beyond_rounding, comparison.rounding) == (fine, 0, None), allowed
        assert {
            (each.original.label, each.fastcls.label) for each in comparison.kept if each.original and each.fastcls
        } == {("bad", "good")}
        assert found.comparisons[1].changed == 0


def test_logits_of_int8_may_be_far_off(tokenizer: PreTrainedTokenizerBase) -> None:
    model = sized(tokenizer, "BertForSequenceClassification", **TWO_NAMES)
    model.classifier.bias.data[0] += 10
    # The same number for both logits changes no label.
    fast = quantised(model, lambda fast: fast.head.out_bias.add_(3.0))
    found = verify(model, tokenizer, TEXTS, fast=fast, max_changed=0)
    assert found.fine()
    assert (found.comparisons[0].changed, found.comparisons[0].far_off) == (0, 0)
    assert found.comparisons[0].differences.mean == pytest.approx(3, abs=0.5)
    assert found.comparisons[0].differences.largest == pytest.approx(3, abs=1)


def test_what_is_no_number_is_not_fine_in_int8(tokenizer: PreTrainedTokenizerBase) -> None:
    model = sized(tokenizer, "BertForSequenceClassification")
    fast = quantised(model, lambda fast: fast.head.out_bias[2].fill_(float("nan")))
    found = verify(model, tokenizer, TEXTS[:4], fast=fast, max_changed=100)
    assert not found.fine()
    out = io.StringIO()
    fastcls.tools.verify.show(found, Console(file=out, width=300), strict=False)
    assert "Not numbers: what 4 of 4 texts get in int8 is not finite" in out.getvalue()
    assert "Fine" not in out.getvalue()


def test_int8_is_shown_beside_float32(tokenizer: PreTrainedTokenizerBase) -> None:
    model = sized(tokenizer, "BertForSequenceClassification")
    fast = quantised(model)
    done: list[int] = []
    # It is asked at the end, when weights are packed.
    fast.get_memory_footprint = lambda: 100 + done[-1]
    found = verify(model, tokenizer, TEXTS, fast=fast, quantize="int8", batch_size=8, progress=done.append)
    assert found.quantize == "int8"
    assert [(each.name, each.dtype) for each in found.comparisons] == [("fastcls", "int8"), ("fastcls", "float32")]
    assert [(each.name, each.dtype, each.texts) for each in found.timed] == [
        ("original", "float32", len(TEXTS)),
        ("fastcls", "int8", len(TEXTS)),
        ("fastcls", "float32", len(TEXTS)),
    ]
    float32 = found.comparisons[1]
    assert (float32.changed, float32.far_off, float32.max_changed) == (0, 0, None)
    assert float32.differences.largest < 1e-4
    weights = [each.weight_bytes for each in found.timed]
    assert weights[:2] == [model.get_memory_footprint(), 100 + len(TEXTS)]
    assert weights[2] > weights[1]
    for timed, seconds in zip(found.timed, (4, 2, 1), strict=True):
        timed.seconds = seconds
    out = io.StringIO()
    fastcls.tools.verify.show(found, Console(file=out, width=300), strict=False)
    rows = [line.split() for line in out.getvalue().splitlines()]
    assert f"fastcls int8 {len(TEXTS) // 2} 2.00 0.0".split() in rows
    assert f"fastcls float32 {len(TEXTS)} 4.00 {weights[2] / 1e6:.1f}".split() in rows
    without = verify(model, tokenizer, TEXTS[:4])
    assert without.quantize is None
    assert [each.max_changed for each in without.comparisons] == [None] * 3


def test_int8_is_compared_where_it_is_slow(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sized(tokenizer, "BertForSequenceClassification")
    for runs in (False, True):
        for module in ("fastcls.conversion", "fastcls.tools.verify.report"):
            monkeypatch.setattr(f"{module}.explain_compiled", lambda _, runs=runs: (runs, "it is made up"))
        found = verify(model, tokenizer, TEXTS, quantize="int8", max_changed=100)
        assert (found.quantize, found.comparisons[0].dtype) == ("int8", "int8")
        assert found.comparisons[0].differences.largest > 100 * found.comparisons[1].differences.largest
        out = io.StringIO()
        fastcls.tools.verify.show(found, Console(file=out, width=300), strict=False)
        told = "Here optimize would leave int8 out: the compiled kernels cannot compute it, it is made up."
        assert (told in out.getvalue()) is not runs


def test_a_strict_verdict_asks_every_dtype_beside_int8(tokenizer: PreTrainedTokenizerBase) -> None:
    model = sized(tokenizer, "BertForSequenceClassification")
    found = verify(model, tokenizer, TEXTS[:4], quantize="int8", max_changed=100, reduced=["bfloat16"])
    assert [each.dtype for each in found.comparisons] == ["int8", "float32", "bfloat16", "bfloat16"]
    assert found.fine(strict=True)
    found.comparisons[3].beyond_rounding = 1
    assert (found.fine(), found.fine(strict=True)) == (True, False)


@pytest.mark.parametrize("number", [0.0, float("nan")], ids=["numbers", "nan"])
def test_a_model_without_labels_gets_no_share(tokenizer: PreTrainedTokenizerBase, number: float) -> None:
    model = sized(tokenizer, "BertForSequenceClassification", num_labels=1)
    with pytest.raises(ValueError, match="max_changed must be left out for a model without labels, got 5"):
        verify(model, tokenizer, TEXTS, quantize="int8", max_changed=5)
    found = verify(model, tokenizer, TEXTS, fast=quantised(model, lambda fast: fast.head.out_bias.add_(3 + number)))
    assert (found.comparisons[0].max_changed, found.comparisons[0].changed_percent) == (None, None)
    assert found.fine() is not math.isnan(number)
    out = io.StringIO()
    fastcls.tools.verify.show(found, Console(file=out, width=300), strict=False)
    assert "No labels that int8 could change" in out.getvalue()
    assert ("Not numbers" in out.getvalue()) is math.isnan(number)


# True labels


@pytest.mark.parametrize("given", ["names", "numbers", "digits"])
def test_accuracy_is_that_of_both_models(tokenizer: PreTrainedTokenizerBase, given: str) -> None:
    model = sized(tokenizer, "BertForSequenceClassification", **TWO_NAMES)
    fast = damaged(model, negate)
    right = logits(model, tokenizer, TEXTS).argmax(1).tolist()
    # Every fourth label is another than the original's, and all of the damaged model's are.
    true = [1 - index if place % 4 == 0 else index for place, index in enumerate(right)]
    labels: list[Any] = [("bad", "good")[index] if given == "names" else index for index in true]
    labels = [str(label) for label in labels] if given == "digits" else labels
    found = verify(model, tokenizer, TEXTS, fast=fast, labels=labels, batch_size=5, reduced=["bfloat16"])
    wrong = len(TEXTS) // 4
    accuracy = found.comparisons[0].accuracy
    assert accuracy == (len(TEXTS), len(TEXTS) - wrong, wrong)
    assert accuracy is not None
    assert accuracy.to_json() == {"texts": len(TEXTS), "original": 75.0, "compared": 25.0, "difference": -50.0}
    assert [each.accuracy is not None for each in found.comparisons] == [True] * 3
    assert verify(model, tokenizer, TEXTS[:4]).comparisons[0].accuracy is None


def test_names_that_are_numbers_are_names(tokenizer: PreTrainedTokenizerBase) -> None:
    stars: dict[str, Any] = {"id2label": {0: "1", 1: "2", 2: "3"}, "label2id": {"1": 0, "2": 1, "3": 2}}
    model = sized(tokenizer, "BertForSequenceClassification", **stars)
    labels = [index + 1 for index in logits(model, tokenizer, TEXTS).argmax(1).tolist()]
    accuracy = verify(model, tokenizer, TEXTS, labels=labels, reduced=()).comparisons[0].accuracy
    assert accuracy == (len(TEXTS), len(TEXTS), len(TEXTS))
    with pytest.raises(ValueError, match=r"labels\[1\] must be one of \['1', '2', '3'\], got 0"):
        verify(model, tokenizer, TEXTS, labels=[1, 0, 1], reduced=())


# Options of the function


def test_bad_options_are_named(tokenizer: PreTrainedTokenizerBase) -> None:
    model = sized(tokenizer, "BertForSequenceClassification")
    half = nn.Module.to(copy.deepcopy(model), torch.bfloat16)
    without_padding = copy.deepcopy(tokenizer)
    without_padding.pad_token = None
    token_classifier = fastcls.optimize(sized(tokenizer, "BertForTokenClassification"))
    unnamed = sized(tokenizer, "BertForSequenceClassification", id2label={1: "a", 2: "b", 3: "c"})
    short = copy.deepcopy(tokenizer)
    short.model_max_length = 1
    scores = sized(tokenizer, "BertForSequenceClassification", num_labels=1)
    four_bits: Any = "int4"
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, "batch_size must be at least 1, got 0", lambda: verify(model, tokenizer, TEXTS, batch_size=0)),
        (ValueError, "limit must be at least 1, got 0", lambda: verify(model, tokenizer, TEXTS, limit=0)),
        (ValueError, "must hold at least one text", lambda: verify(model, tokenizer, [])),
        (TypeError, "texts must be an iterable of texts, got str", lambda: verify(model, tokenizer, "ok")),
        (TypeError, r"texts\[1\] must be a string or a pair", lambda: verify(model, tokenizer, ["ok", 3])),  # type: ignore[list-item]
        (ValueError, r"texts\[0\] must be one text or a pair", lambda: verify(model, tokenizer, [("a", "b", "c")])),
        (TypeError, "which a set has not", lambda: verify(model, tokenizer, {"a", "b"})),
        (TypeError, r"texts\[0\] must be .*NoneType: None, a missing text", lambda: verify(model, tokenizer, [None])),  # type: ignore[list-item]
        (ValueError, r"texts\[1\] holds .*lone surrogate", lambda: verify(model, tokenizer, ["ok", "\ud800"])),
        (ValueError, "id2label must name each", lambda: verify(unnamed, tokenizer, TEXTS)),
        (ValueError, r"must be at least 2", lambda: verify(model, short, TEXTS, truncation=True)),
        (ValueError, "eval mode", lambda: verify(copy.deepcopy(model).train(), tokenizer, TEXTS)),
        (ValueError, "padding token", lambda: verify(model, without_padding, TEXTS)),
        (
            ValueError,
            "bfloat16 or float16, got 'float32'",
            lambda: verify(model, tokenizer, TEXTS, reduced=["float32"]),
        ),
        (ValueError, "in float32, got one in bfloat16", lambda: verify(half, tokenizer, TEXTS, reduced=["float16"])),
        (ValueError, "fast must be in float32", lambda: verify(model, tokenizer, TEXTS, fast=fastcls.optimize(half))),
        (TypeError, "for sequence classification, got", lambda: verify(model, tokenizer, TEXTS, fast=token_classifier)),
        (ValueError, "None or one of int8, got 'int4'", lambda: verify(model, tokenizer, TEXTS, quantize=four_bits)),
        (
            ValueError,
            "quantize must be that of fast, None, or left out, got 'int8'",
            lambda: verify(model, tokenizer, TEXTS, fast=fastcls.optimize(model), quantize="int8"),
        ),
        (
            ValueError,
            "max_changed must be left out where nothing is quantised",
            lambda: verify(model, tokenizer, TEXTS, max_changed=1),
        ),
        (
            ValueError,
            "max_changed must be a percentage from 0 to 100, got nan",
            lambda: verify(model, tokenizer, TEXTS, quantize="int8", max_changed=math.nan),
        ),
        (
            ValueError,
            r"labels\[1\] must be one of .*'0', '1', '2'\], got 3",
            lambda: verify(model, tokenizer, ["ok", "ok"], labels=[0, 3]),
        ),
        (ValueError, "got 1 for more texts", lambda: verify(model, tokenizer, ["ok", "ok"], labels=[0])),
        (ValueError, "got more for 2 texts", lambda: verify(model, tokenizer, ["ok", "ok"], labels=[0, 1, 2])),
        (ValueError, "does not give each text one of several", lambda: verify(scores, tokenizer, TEXTS, labels=[0])),
        (ValueError, "does not fit the model.*below 199", lambda: verify(tiny_bert(), tokenizer, TEXTS)),
        (ValueError, r"texts\[0\] is 202 tokens long.*96", lambda: verify(model, tokenizer, ["ok " * 200])),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def test_texts_are_cut_to_what_the_tokenizer_says(tokenizer: PreTrainedTokenizerBase) -> None:
    short = copy.deepcopy(tokenizer)
    short.model_max_length = 8
    model = sized(tokenizer, "BertForSequenceClassification")
    assert verify(model, short, ["ok " * 200] * 2, truncation=True, reduced=()).tokens == 16


def test_who_pads_with_the_same_tokenizer_pads_nothing_here(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: Any = copy.deepcopy(tokenizer)
    setting = type(shared).set_truncation_and_padding

    def then_another_pads(self: Any, *arguments: Any, **options: Any) -> None:
        setting(self, *arguments, **options)
        shared._tokenizer.enable_padding(length=64)

    monkeypatch.setattr(type(shared), "set_truncation_and_padding", then_another_pads)
    model = sized(tokenizer, "BertForSequenceClassification")
    assert verify(model, shared, ["ok"], reduced=()).tokens == words(tokenizer, ["ok"])


@pytest.mark.parametrize("names", [["bad", "good"], {"0": "bad", "1": "good"}], ids=["list", "strings"])
def test_labels_are_named_as_the_config_says(tokenizer: PreTrainedTokenizerBase, names: Any) -> None:
    model = sized(tokenizer, "BertForSequenceClassification", problem_type="multi_label_classification", **TWO_NAMES)
    fast = damaged(model, negate)
    model.config.id2label = names
    comparison = verify(model, tokenizer, TEXTS[:4], fast=fast, reduced=()).comparisons[0]
    assert comparison.decisions == 8
    assert {each.original.label.removeprefix("not ") for each in comparison.kept if each.original} == {"bad", "good"}


def test_a_model_in_16_bits_is_compared_in_them_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    model = nn.Module.to(sized(tokenizer, "BertForSequenceClassification"), torch.bfloat16)
    found = verify(model, tokenizer, TEXTS)
    assert [(each.name, each.dtype) for each in found.comparisons] == [("fastcls", "bfloat16")]
    assert found.fine()


def test_ctrl_c_keeps_what_was_compared(tokenizer: PreTrainedTokenizerBase) -> None:
    found = verify(
        sized(tokenizer, "BertForSequenceClassification"), tokenizer, broken_off(iter(TEXTS), 10), batch_size=4
    )
    assert (found.interrupted, found.texts, found.comparisons[0].decisions) == (True, 8, 8)


def broken_off(texts: Iterator[Any], after: int) -> Iterator[Any]:
    for _ in range(after):
        yield next(texts)
    raise KeyboardInterrupt


@pytest.mark.full
def test_real_sentences(
    minilm_sst2: Any, minilm_tokenizer: PreTrainedTokenizerBase, sst2: Callable[[str], Any]
) -> None:
    found = verify(minilm_sst2, minilm_tokenizer, sst2("dev").texts, limit=128, reduced=())
    assert found.fine()
    comparison = found.comparisons[0]
    assert (comparison.decisions, comparison.changed) == (128, 0)
    assert comparison.differences.largest < 1e-5


# The command


def run(*arguments: object, stdin: bytes = b"", columns: int = 200) -> Result:
    environment = {"COLUMNS": str(columns), "NO_COLOR": "1"}
    done = CliRunner(env=environment).invoke(app, ["verify", *map(str, arguments)], input=stdin)
    # Of any other exception the runner makes status 1, which is a verdict here.
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return done


def saved(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def checkpoint(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = sized(tokenizer, "BertForSequenceClassification", **TWO_NAMES)
    return saved(model, tokenizer, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    # An empty line is a text, and markup in a text is text.
    path.write_text("\n".join(["[bold]not bold[/bold]", "", *TEXTS]) + "\n")
    return path


def test_the_report_says_all_of_it(checkpoint: Path, file: Path) -> None:
    done = run(checkpoint, file)
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    for expected in (
        f"BertForSequenceClassification (sequence classification), float32 on cpu: {len(TEXTS) + 2} texts",
        f"0 of {len(TEXTS) + 2}",
        "original bfloat16",
        "texts a second",
        "Differences",
        "Fine: no label changed in float32.",
    ):
        assert expected in done.stdout


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command compares with a fast model whose labels are all wrong."""

    def compare(model: Any, *arguments: Any, **options: Any) -> Verification:
        return verify(model, *arguments, **options, fast=damaged(model, negate))

    monkeypatch.setattr(fastcls.tools.verify, "verify", compare)


@pytest.mark.usefixtures("wrong")
def test_a_changed_label_is_shown_and_is_status_1(checkpoint: Path, file: Path) -> None:
    done = run(checkpoint, file, "--reduced", "none")
    assert done.exit_code == 1
    count = len(TEXTS) + 2
    assert f"Differs: labels changed by more than rounding explains: {count} in float32." in done.stdout
    assert f"and {count - 20} more" in done.stdout
    found = json.loads(run(checkpoint, file, "--json", "--reduced", "none").stdout)
    worst = found["comparisons"][0]["changed_labels"][0]
    line = next(line for line in done.stdout.splitlines() if line.split()[:1] == [str(worst["line"])])
    for name in ("original", "fastcls"):
        assert f"{worst[name]['label']} {worst[name]['score']:.4f}" in line
    shown = run(checkpoint, "--reduced", "none", stdin=b"[bold]not bold[/bold]\n")
    assert "[bold]not bold[/bold]" in shown.stdout


def test_logits_that_are_off_are_status_1(checkpoint: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(model: Any, *arguments: Any, **options: Any) -> Verification:
        # The same number for both logits changes no label.
        fast = damaged(model, lambda fast: fast.head.out_bias.add_(1.0))
        return verify(model, *arguments, **options, fast=fast)

    monkeypatch.setattr(fastcls.tools.verify, "verify", compare)
    done = run(checkpoint, file, "--reduced", "none")
    assert done.exit_code == 1
    told = f"Differs: logits are off by more than 10 times what rounding explains: {len(TEXTS) + 2} in float32"
    assert told in done.stdout


@pytest.mark.usefixtures("wrong")
def test_a_narrow_terminal_keeps_every_number(checkpoint: Path, file: Path) -> None:
    done = run(checkpoint, file, "--reduced", "bfloat16", "--reduced", "float16", columns=80)
    assert max(map(len, done.stdout.splitlines())) <= 80
    worst = json.loads(run(checkpoint, file, "--json", "--reduced", "none").stdout)["comparisons"][0]["changed_labels"]
    rows = [line.split() for line in done.stdout.splitlines()]
    for changed in worst:
        numbers = [f"{changed[name]:.1e}" for name in ("margin", "explained_up_to")]
        assert any(row[:1] == [str(changed["line"])] and row[-2:] == numbers for row in rows)
    # The rows of the picture keep their powers of ten.
    assert ["equal"] in [row[:1] for row in rows]
    assert any(row and row[0].startswith("1e-0") for row in rows)


@pytest.fixture
def half_wrong(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkpoint, which the command compares with an int8 model that changes about half of the labels of `TEXTS`."""
    model, fast, _ = half_changed(tokenizer)

    def compare(model: Any, *arguments: Any, **options: Any) -> Verification:
        return verify(model, *arguments, **options, fast=fast)

    monkeypatch.setattr(fastcls.tools.verify, "verify", compare)
    return saved(model, tokenizer, tmp_path)


def test_int8_is_status_1_beyond_the_share_that_may_change(half_wrong: Path) -> None:
    stdin = ("\n".join(TEXTS) + "\n").encode()
    for arguments, allowed, status in (
        (("--max-changed", 99), "99%", 0),
        (("--max-changed", "0.5"), "0.5%", 1),
        ((), "1%", 1),
    ):
        done = run(half_wrong, "--quantize", "int8", *arguments, stdin=stdin)
        assert done.exit_code == status, done.output
        found = json.loads(run(half_wrong, "--quantize", "int8", *arguments, "--json", stdin=stdin).stdout)
        assert_fits(found, SCHEMA)
        assert (found["fine"], found["quantize"]) == (status == 0, "int8")
        int8 = found["comparisons"][0]
        assert int8["changed_percent"] == pytest.approx(100 * int8["changed"] / len(TEXTS))
        assert f"{int8['max_changed']:g}%" == allowed
        counts = f"{int8['changed']} of {len(TEXTS)} labels changed in int8, {int8['changed_percent']:.3g}%"
        assert f"{'Differs' if status else 'Fine'}: {counts}; --max-changed allows {allowed}." in done.stdout
        assert "With --quantize that share decides, not rounding" in done.stdout
        for row in ("original float32", "fastcls int8", "fastcls float32", "Changed in int8"):
            assert row in done.stdout
        assert "not finite" not in done.stdout
        assert "weights, MB" in done.stdout


def test_int8_fits_a_narrow_terminal(half_wrong: Path) -> None:
    stdin = ("\n".join(f"{text}\t0" for text in TEXTS) + "\n").encode()
    done = run(half_wrong, "--quantize", "int8", "--labelled", "--reduced", "bfloat16", stdin=stdin, columns=80)
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_accuracy_is_shown_of_labelled_lines(half_wrong: Path) -> None:
    # The original gives all of them the first label.
    named = "\n".join(f"{text}\tbad" for text in TEXTS) + "\n"
    done = run(half_wrong, "--quantize", "int8", "--labelled", stdin=named.encode())
    found = json.loads(run(half_wrong, "--quantize", "int8", "--labelled", "--json", stdin=named.encode()).stdout)
    assert_fits(found, SCHEMA)
    changed = found["comparisons"][0]["changed"]
    right, after = len(TEXTS) - changed, 100 - 100 * changed / len(TEXTS)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert f"original float32 {len(TEXTS)} of {len(TEXTS)} 100.00%".split() in rows
    assert f"fastcls int8 {right} of {len(TEXTS)} {after:.2f}% {after - 100:+.2f}".split() in rows
    accuracy = found["comparisons"][0]["accuracy"]
    assert accuracy["texts"] == len(TEXTS)
    assert [accuracy[name] for name in ("original", "compared", "difference")] == pytest.approx(
        [100, after, after - 100]
    )
    pairs = run(
        half_wrong, "--quantize", "int8", "--labelled", "--pairs", "--json", stdin=b"is it late?\tno\t0\n\t\t1\n"
    )
    assert json.loads(pairs.stdout)["comparisons"][0]["accuracy"]["texts"] == 2
    limited = run(half_wrong, "--quantize", "int8", "--labelled", "--limit", 3, "--json", stdin=named.encode())
    assert json.loads(limited.stdout)["comparisons"][0]["accuracy"]["texts"] == 3


def test_help_says_how_much_int8_may_change() -> None:
    assert f"Default: {MAX_CHANGED:g}." in " ".join(run("--help").stdout.split())


SCHEMA: dict[str, Any] = {
    "model_class": str,
    "task": str,
    "device": str,
    "dtype": str,
    "quantize": (str, type(None)),
    "texts": int,
    "tokens": int,
    "interrupted": bool,
    "fine": bool,
    "versions": {"fastcls": str, "torch": str, "transformers": str},
    "times": [
        {"name": str, "dtype": str, "texts": int, "seconds": float, "texts_per_second": float, "weight_bytes": int}
    ],
    "comparisons": [
        {
            "name": str,
            "dtype": str,
            "labels": int,
            "changed": int,
            "changed_percent": float,
            "max_changed": (float, type(None)),
            "accuracy": ({"texts": int, "original": float, "compared": float, "difference": float}, type(None)),
            "beyond_rounding": (int, type(None)),
            "far_off": (int, type(None)),
            "furthest_line": (int, type(None)),
            "differences": {
                "count": int,
                "equal": int,
                "not_finite": int,
                "largest": float,
                "mean": float,
                "histogram": [{"from": float, "below": float, "count": int}],
            },
            "rounding_error_of_the_original": (float, type(None)),
            "embedding_cosine": type(None),
            "changed_labels": [
                {
                    "line": int,
                    "text": str,
                    "place": type(None),
                    "original": {"label": str, "score": float},
                    "fastcls": {"label": str, "score": float},
                    "margin": float,
                    "explained_up_to": (float, type(None)),
                    "beyond_rounding": bool,
                }
            ],
        }
    ],
}


def assert_fits(value: Any, schema: Any, where: str = "") -> None:
    if isinstance(schema, dict):
        assert set(value) == set(schema), where
        for name, part in schema.items():
            assert_fits(value[name], part, f"{where}.{name}")
    elif isinstance(schema, tuple) and isinstance(schema[0], dict):
        if value is not None:
            assert_fits(value, schema[0], where)
    elif isinstance(schema, list):
        for part in value:
            assert_fits(part, schema[0], f"{where}[]")
    else:
        assert isinstance(value, schema), f"{where}: {value!r}"


@pytest.mark.usefixtures("wrong")
def test_json_has_its_schema(checkpoint: Path, file: Path) -> None:
    done = run(checkpoint, file, "--json")
    assert (done.exit_code, done.stderr) == (1, "")
    found = json.loads(done.stdout)
    assert_fits(found, SCHEMA)
    assert not found["fine"]
    assert found["comparisons"][0]["changed_labels"]


def test_limit_truncate_pairs_and_standard_input(checkpoint: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("word " * 200 + "\nok\nok\n")
    done = run(checkpoint, long, "--json", "--truncate", "--limit", 2, "--batch-size", 1, "--dtype", "bfloat16")
    found = json.loads(done.stdout)
    assert (found["texts"], found["tokens"], found["dtype"], len(found["comparisons"])) == (2, 96 + 3, "bfloat16", 1)
    done = run(checkpoint, "--pairs", "--json", "--reduced", "none", stdin=b"is it late?\tno\n\t\n")
    assert json.loads(done.stdout)["texts"] == 2


def test_the_picture_is_one(checkpoint: Path, file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run(checkpoint, file, "--plot", tmp_path / "out.png").exit_code == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    reduced = ("--quantize", "int8", "--reduced", "bfloat16", "--reduced", "float16")
    assert run(checkpoint, file, *reduced, "--max-changed", 100, "--plot", tmp_path / "int8.png").exit_code == 0
    assert (tmp_path / "int8.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_is_status_130_with_a_report(
    checkpoint: Path, file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    after = 9

    def compare(model: Any, tokenizer: Any, texts: Any, **options: Any) -> Verification:
        return verify(model, tokenizer, broken_off(iter(texts), after), **options)

    monkeypatch.setattr(fastcls.tools.verify, "verify", compare)
    done = run(checkpoint, file, "--batch-size", 4, "--reduced", "none")
    assert (done.exit_code, done.stderr) == (130, "Interrupted: 8 texts compared.\n")
    assert "8 texts" in done.stdout
    after = 0
    picture = ["--plot", tmp_path / "none.png"] if importlib.util.find_spec("matplotlib") else []
    done = run(checkpoint, file, *picture)
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "Interrupted: 0 texts compared.\n")
    assert not (tmp_path / "none.png").exists()

    def break_off(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fastcls.loading, "load_tokenizer", break_off)
    done = run(checkpoint, file)
    # Not 1, which would say that a label changed.
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


def edited(folder: Path, to: Path, **changes: Any) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return to


def test_mistakes_are_one_line_and_status_2(
    checkpoint: Path, file: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty, latin, long, labelled = (tmp_path / name for name in ("empty.txt", "latin.txt", "long.txt", "labels.txt"))
    labelled.write_text("fine\tgood\nbad\t2\n")
    empty.touch()
    latin.write_bytes("fine\ncafé\n".encode("latin-1"))
    long.write_text("ok\n" + "word " * 200 + "\n")
    choice = saved(sized(tokenizer, "BertForMultipleChoice"), tokenizer, tmp_path / "choice")
    follows = saved(sized(tokenizer, "BertForNextSentencePrediction"), tokenizer, tmp_path / "follows")
    other = saved(BertForPreTraining(sized(tokenizer, "BertModel").config), tokenizer, tmp_path / "other")
    bare = tmp_path / "bare"
    sized(tokenizer, "BertForSequenceClassification").save_pretrained(bare)
    nameless = edited(checkpoint, tmp_path / "nameless", architectures=None)
    headless = edited(checkpoint, tmp_path / "headless", architectures=["BertForMaskedLM"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for arguments, message in (
        ((checkpoint, empty), f"{empty} must hold at least one text, got none"),
        ((checkpoint, latin), f"{latin}, line 2: not UTF-8"),
        ((checkpoint, long), f"{long}, line 2 is 402 tokens long and the model has 96 positions: add --truncate"),
        ((checkpoint, tmp_path / "none.txt"), "none.txt: No such file"),
        ((checkpoint, file, "--pairs"), "line 1: --pairs needs a tab between two texts"),
        ((checkpoint, file, "--dtype", "int4"), "dtype must be one of float32, float16, bfloat16, got 'int4'"),
        ((checkpoint, file, "--device", "gpu"), "device must be one that torch can use here, got 'gpu'"),
        (
            (checkpoint, file, "--reduced", "none", "--reduced", "bfloat16"),
            "--reduced none must stand alone, got none,",
        ),
        ((checkpoint, file, "--quantize", "int4"), "quantize must be None or one of int8, got 'int4'"),
        ((tmp_path / "nowhere", file, "--quantize", "int4"), "quantize must be None or one of int8, got 'int4'"),
        ((checkpoint, file, "--max-changed", "1"), "--max-changed needs --quantize"),
        ((checkpoint, file, "--labelled"), f"{file}, line 1: --labelled needs a tab before the label, got"),
        (
            (checkpoint, labelled, "--labelled"),
            f"{labelled}, line 2: label must be one of ['bad', 'good', '0', '1'], got",
        ),
        ((checkpoint, labelled, "--labelled", "--pairs"), "--pairs needs a tab"),
        ((choice, labelled, "--labelled"), "--labelled must be left out: the model does not give each text one of"),
        ((checkpoint, file, "--reduced", "int8"), "reduced must name bfloat16 or float16, got 'int8'"),
        ((checkpoint, file, "--dtype", "float16", "--reduced", "bfloat16"), "with an original in float32"),
        ((checkpoint, file, "--plot", tmp_path / "a.txt"), "--plot must be a file that ends in .pdf, .png, .svg"),
        ((checkpoint, file, "--plot", tmp_path / "no" / "a.png"), "--plot must be a file in a folder that is there"),
        ((checkpoint, file, "--plot", tmp_path / "a.png"), "--plot needs matplotlib: pip install matplotlib"),
        ((choice, file), "line 1 must be a question and two choices or more"),
        ((choice, file, "--pairs"), "--pairs is not for multiple choice"),
        ((follows, file), "line 1 must be a pair of texts (--pairs)"),
        ((other, file), "got BertForPreTraining with a config of 'bert'"),
        ((nameless, file), "its config.json must name a model class in architectures"),
        ((headless, file), "not trained for masked language modelling"),
        ((bare, file), "holds no tokenizer"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2, (arguments, done.output)
        assert done.stdout == ""
        assert done.stderr.startswith("Error: "), done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert message in done.stderr
