"""Lists of token ids as callers hold them: in any form that has an order, and what is none, by name."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_bert, tiny_model

import fastcls

IDS = [[2, 7, 8, 3], [2, 9, 3], [2, 5, 6, 7, 3]]
TYPES = [[0, 0, 1, 1], [0, 1, 1], [0, 0, 0, 1, 1]]
# Each takes lists apart and gives the same ids in another form.
FORMS: dict[str, Callable[[list[list[int]]], Any]] = {
    "map": lambda lists: map(list, lists),
    "generator_of_generators": lambda lists: ((number for number in each) for each in lists),
    "iterators": lambda lists: [iter(each) for each in lists],
    "zip": lambda lists: (each for each, _ in zip(lists, lists, strict=True)),
    "values": lambda lists: dict(enumerate(lists)).values(),
    "tuples": lambda lists: tuple(map(tuple, lists)),
    "arrays": lambda lists: [array("q", each) for each in lists],
    "rows": lambda lists: [np.array(each) for each in lists],
    "rows_of_a_column": lambda lists: [np.stack([each, each], 1)[:, 1] for each in lists],
    "rows_of_32_bits": lambda lists: [np.array(each, dtype=np.int32) for each in lists],
    "rows_of_other_bytes": lambda lists: [np.array(each, dtype=">i8") for each in lists],
    "rows_and_a_list": lambda lists: [np.array(lists[0]), *lists[1:]],
    "tensors": lambda lists: [torch.tensor(each) for each in lists],
}


@pytest.mark.parametrize("form", list(FORMS.values()), ids=list(FORMS))
def test_ids_in_any_form_are_read_once_and_whole(form: Callable[[list[list[int]]], Any]) -> None:
    fast = fastcls.optimize(tiny_bert())
    assert torch.equal(fast.logits_of(form(IDS), form(TYPES)), fast.logits_of(IDS, TYPES))


def test_every_method_that_takes_ids_takes_a_generator() -> None:
    encoder = fastcls.optimize(tiny_model("BertModel", "bert"))
    assert torch.equal(encoder.embeddings_of(map(iter, IDS)), encoder.embeddings_of(IDS))
    (part,), (expected,) = encoder.pack(map(iter, IDS), map(iter, TYPES)), encoder.pack(IDS, TYPES)
    assert torch.equal(part.integers, expected.integers)


def test_an_empty_generator_is_no_texts() -> None:
    assert fastcls.optimize(tiny_bert()).logits_of(iter(())).shape == (0, 3)


NO_IDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "encoding": (({"input_ids": IDS},), r'token_ids must hold .*, got dict: pass what it holds as "input_ids"'),
    "rows": (([{"input_ids": IDS[0]}],), r'token_ids\[0\] must be a sequence .*got dict: .*"input_ids"'),
    "one_text": ((IDS[0],), r"token_ids\[0\] must be a sequence of ids, got int: 2"),
    "number": ((7,), "token_ids must hold a sequence of ids for each text, got int: 7"),
    "nothing": ((None,), "token_ids must hold .*got NoneType"),
    "array_of_one_text": ((np.array(IDS[0]),), r"token_ids\[0\] must be .*got int64"),
    "tensor_of_one_text": ((torch.tensor(IDS[0]),), r"token_ids\[0\] must be .*got Tensor: tensor\(2\)"),
    "floats": (([np.array([2.0, 3.0])],), "token_ids must hold integers"),
    "floats_behind_integers": (([np.array([2, 3]), np.array([2.0, 3.0])],), "token_ids must hold integers"),
    "masked": (([np.ma.array([2, 3, 3], mask=[False, True, False])],), "token_ids must hold integers"),
    "dates": (([np.array(["2026-01-01"], dtype="datetime64[D]")],), "token_ids must hold integers"),
    "set": (([IDS[0], {2, 3}],), r"token_ids\[1\] must be .*got set, which has no order"),
    "set_of_texts": (({(2, 3), (2, 4)},), "token_ids must hold .*got set, which has no order"),
    "types": ((IDS, iter([TYPES[0], 1, TYPES[2]])), r"token_type_ids\[1\] must be a sequence of ids, got int: 1"),
}


@pytest.mark.parametrize(("given", "message"), list(NO_IDS.values()), ids=list(NO_IDS))
def test_what_holds_no_ids_in_order_is_named(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fastcls.optimize(tiny_bert()).logits_of(*given)


def test_types_of_no_texts_are_missed() -> None:
    with pytest.raises(ValueError, match="token_type_ids must have the lengths of token_ids"):
        fastcls.optimize(tiny_bert()).logits_of([], [[0]])
