"""Columns of logits: against the classifier's own labels and scores, and what is null."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcls.labels import ScoreFunction, scores_of
from fastcls.results import Results, Wanted

pyarrow: Any = pytest.importorskip("pyarrow", reason="columns are those of Arrow")

NAMES = ["bad", "fair", "good"]
NAN = float("nan")
NULL_ROW = 3


def logits_of(rows: int = 17) -> Tensor:
    logits = torch.randn(rows, len(NAMES), generator=torch.Generator().manual_seed(5)) * 3
    # Equal scores: the first label is the best.
    logits[1] = torch.tensor([1.0, 2.0, 2.0])
    return logits


def labels_of(scores: list[float], names: list[str] = NAMES) -> list[dict[str, Any]]:
    """A row's labels, best first, in the plainest Python."""
    ranked = sorted(range(len(names)), key=lambda index: -scores[index])
    return [{"label": names[index], "score": scores[index]} for index in ranked]


@pytest.mark.parametrize("apply", ["softmax", "sigmoid"])
def test_a_score_does_not_depend_on_how_many_others_there_are(apply: ScoreFunction) -> None:
    for labels in (1, 2, 3, 28):
        logits = torch.randn(67, labels, generator=torch.Generator().manual_seed(labels)) * 4
        whole = scores_of(logits, apply)
        for count in (1, 7, 16, 33):
            parts = torch.cat([scores_of(part, apply) for part in logits.split(count)])
            assert torch.equal(whole, parts), (labels, count)


def test_sigmoid_is_exact_to_the_ends() -> None:
    logits = torch.tensor([[-torch.inf, -200.0, -80.0, -3.0, 0.0, 3.0, 16.0, 89.0, 200.0, torch.inf, torch.nan]])
    expected = logits.double().sigmoid().float()
    found = scores_of(logits, "sigmoid")
    torch.testing.assert_close(found, expected, rtol=4e-7, atol=0.0, equal_nan=True)
    assert bool((found[0, :-1].diff() >= 0).all())


@pytest.mark.parametrize("apply", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_label_and_score_are_those_of_the_best(apply: ScoreFunction, dtype: torch.dtype) -> None:
    logits = logits_of().to(dtype)
    results = Results(Wanted(), NAMES, apply)
    batch = results.columns(logits)
    batch.validate(full=True)
    assert batch.schema == results.schema
    assert results.schema.field("label").type == pyarrow.string()
    assert results.schema.field("score").type == pyarrow.float32()
    assert batch.to_pylist() == [labels_of(scores)[0] for scores in scores_of(logits, apply).tolist()]


@pytest.mark.parametrize(("top_k", "threshold"), [(1, None), (2, None), (99, None), (None, 0.4), (1, 0.2), (None, 2.0)])
def test_labels_are_the_best_of_at_least_the_threshold(top_k: int | None, threshold: float | None) -> None:
    logits = logits_of()
    results = Results(Wanted(top_k=top_k, threshold=threshold), NAMES, "sigmoid")
    batch = results.columns(logits, missing=[NULL_ROW])
    batch.validate(full=True)
    assert batch.schema.names == ["labels"]
    bound = -math.inf if threshold is None else threshold
    expected: list[Any] = [
        [label for label in labels_of(scores)[:top_k] if label["score"] >= bound]
        for scores in scores_of(logits, "sigmoid").tolist()
    ]
    expected[NULL_ROW] = None
    assert batch.column("labels").to_pylist() == expected


def test_a_score_that_equals_the_threshold_is_kept() -> None:
    # 0.9 is another number in float32.
    batch = Results(Wanted(threshold=0.9), ["one", "two"], "none").columns(torch.tensor([[0.9, 0.1]]))
    assert [label["label"] for label in batch.column("labels")[0].as_py()] == ["one"]


def test_of_equal_scores_the_first_labels_come_first() -> None:
    # Of few labels any sort keeps the order.
    logits = torch.randint(3, (50, 300), generator=torch.Generator().manual_seed(1)).float()
    names = [f"name {index}" for index in range(300)]
    batch = Results(Wanted(top_k=300), names, "none").columns(logits)
    assert batch.column("labels").to_pylist() == [labels_of(scores, names) for scores in logits.tolist()]


def test_all_columns_stand_side_by_side_under_their_prefix() -> None:
    logits = logits_of()
    wanted = Wanted(top_k=2, all_scores=True, logits=True, prefix="p_")
    batch = Results(wanted, NAMES, "softmax").columns(logits, missing={NULL_ROW, 0})
    batch.validate(full=True)
    assert batch.schema.names == ["p_labels", "p_scores", "p_logits"]
    scores = scores_of(logits, "softmax")
    for name, numbers in (("p_scores", scores), ("p_logits", logits)):
        expected: list[Any] = [dict(zip(NAMES, row, strict=True)) for row in numbers.tolist()]
        expected[0] = expected[NULL_ROW] = None
        assert batch.column(name).to_pylist() == expected
    assert Results(Wanted(all_scores=True), NAMES, "none").schema.names == ["label", "score", "scores"]


def test_missing_rows_are_null_and_nan_stays() -> None:
    logits = logits_of()
    logits[NULL_ROW] = NAN
    logits[7] = NAN
    for missing in ([], [NULL_ROW]):
        batch = Results(Wanted(all_scores=True), NAMES, "softmax").columns(logits, missing)
        assert [batch.column(name).null_count for name in ("label", "score", "scores")] == [
            2,
            len(missing),
            len(missing),
        ]
        assert batch.column("label")[7].as_py() is None
        assert math.isnan(batch.column("score")[7].as_py())
        assert all(math.isnan(score) for score in batch.column("scores")[7].as_py().values())


def test_nan_does_not_read_as_nothing_found() -> None:
    logits = torch.tensor([[NAN, 9.0, -9.0], [-9.0, -9.0, -9.0]])
    nan, none = Results(Wanted(threshold=0.5), NAMES, "sigmoid").columns(logits).column("labels").to_pylist()
    assert none == []
    assert [label["label"] for label in nan] == [None, "fair"]
    assert math.isnan(nan[0]["score"])


def test_no_rows_and_one_label_are_fine() -> None:
    for wanted in (Wanted(), Wanted(top_k=2, all_scores=True)):
        results = Results(wanted, ["only"], "sigmoid")
        assert results.columns(torch.zeros(0, 1)).num_rows == 0
        assert results.columns(torch.zeros(2, 1)).num_rows == 2


def test_names_of_any_type_are_given_as_text() -> None:
    batch = Results(Wanted(all_scores=True), [0, None], "none").columns(torch.tensor([[2.0, 3.0]]))
    assert batch.to_pylist() == [{"label": "None", "score": 3.0, "scores": {"0": 2.0, "None": 3.0}}]


WRONG: dict[str, tuple[dict[str, Any], list[Any], str]] = {
    "no_labels": ({"top_k": 0}, NAMES, "top_k must be a positive int or None, got 0"),
    "nan": ({"threshold": NAN}, NAMES, "threshold must be a finite number or None, got nan"),
    "infinite": ({"threshold": math.inf}, NAMES, "threshold must be a finite number or None, got inf"),
    "text": ({"threshold": "0.5"}, NAMES, "threshold must be a finite number or None, got '0.5'"),
    "true": ({"threshold": True}, NAMES, "threshold must be a finite number or None, got True"),
    "same_names": ({"all_scores": True}, ["a", "b", "a"], "all_scores must be off .*two labels 'a'"),
    "same_texts": ({"logits": True}, [1, "1"], "logits must be off .*two labels '1'"),
}


@pytest.mark.parametrize(("options", "names", "message"), list(WRONG.values()), ids=list(WRONG))
def test_bad_options_are_named(options: dict[str, Any], names: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Results(Wanted(**options), names, "softmax")


def test_a_prefix_is_text() -> None:
    prefix: Any = 3
    with pytest.raises(TypeError, match="prefix must be a str, got 3"):
        Results(Wanted(prefix=prefix), NAMES, "softmax")


def test_labels_that_share_a_name_are_fine_where_none_has_a_field() -> None:
    batch = Results(Wanted(top_k=2), ["a", "a"], "none").columns(torch.tensor([[2.0, 3.0]]))
    assert batch.column("labels").to_pylist() == [[{"label": "a", "score": 3.0}, {"label": "a", "score": 2.0}]]


@pytest.mark.parametrize("shape", [(2, 2), (3,), (1, 2, 3)])
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"logits must have the shape \(rows, 3\), .* got \("):
        Results(Wanted(), NAMES, "softmax").columns(torch.zeros(shape))
