"""NaN stays NaN: of inputs that are not finite no operation makes a number where its definition makes none."""

# Arguments come by the list, which mypy cannot count.
# mypy: disable-error-code="arg-type,call-arg,call-overload"

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import pytest
import torch
from support import cu_seqlens_of
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import fastcls_kernels
from fastcls_kernels import Activation, AddNorm, Buckets, reference

# Odd, and texts of fewer tokens than a vector has places, of one alone, and of more.
LENGTHS = (18, 3, 1)
TOKENS, HEADS, HEAD_DIM, WIDTH = sum(LENGTHS), 2, 12, 19
SIZE = HEADS * HEAD_DIM
CU_SEQLENS = cu_seqlens_of(LENGTHS)
PACKING = (CU_SEQLENS, max(LENGTHS))
FIRST = CU_SEQLENS[:-1]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])
TABLE = torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32)
SEQLENS = torch.tensor([1, 3, 18])
IDS = torch.arange(TOKENS) % 5

TEXTS = (TOKENS, HEADS, HEAD_DIM)
ROWS, VECTOR = (TOKENS, WIDTH), (WIDTH,)
EPS = 1e-5


class Case(NamedTuple):
    """An operation over tensors of some shapes, and its definition over the same."""

    shapes: Sequence[tuple[int, ...]]
    run: Callable[..., Tensor]
    defined: Callable[..., Tensor]


def operation(name: str) -> Callable[..., Any]:
    """The public function of that name, which takes what it is given to the device of the tensors in question."""

    def call(*args: Any, **options: Any) -> Any:
        devices = {tensor.device for tensor in tree_leaves((args, options)) if isinstance(tensor, Tensor)}
        device = max(devices, key=lambda device: device.type != "cpu")
        args, options = tree_map_only(Tensor, lambda tensor: tensor.to(device), (args, options))
        return getattr(fastcls_kernels, name)(*args, **options)

    return call


def case(name: str, shapes: Sequence[tuple[int, ...]], arrange: Callable[..., tuple[Any, ...]], **options: Any) -> Case:
    """One whose definition takes the same arguments: ``arrange`` makes them of the tensors."""
    functions = (operation(name), getattr(reference, f"{name}_reference"))
    return Case(shapes, *(lambda *t, f=f: f(*arrange(*t), **options) for f in functions))


CASES: dict[str, Case] = {
    "absorb_query": case(
        "absorb_query", [ROWS, (SIZE, WIDTH), (SIZE,), (SIZE, WIDTH)], lambda x, q, b, k: (x, FIRST, q, b, k, HEADS)
    ),
    "add_layer_norm": case("add_layer_norm", [ROWS, VECTOR, ROWS, VECTOR, VECTOR], lambda *tensors: (*tensors, EPS)),
    "apply_rotary_": Case(
        [TEXTS],
        lambda x: operation("apply_rotary_")(x.clone(), POSITIONS, *turns(torch.float32)),
        lambda x: reference.apply_rotary_reference(x, POSITIONS, *turns(x.dtype)),
    ),
    "attention_padded": case("attention_padded", [(3, 18, HEADS, HEAD_DIM)] * 3, lambda *texts: (*texts, SEQLENS)),
    "attention_varlen": case("attention_varlen", [TEXTS] * 3, lambda *texts: (*texts, *PACKING)),
    # As a model's are.
    "attention_varlen-views_of_one": case(
        "attention_varlen",
        [TEXTS] * 3,
        lambda *texts: (
            *torch.cat([each.flatten(1) for each in texts], 1).unflatten(1, (3, -1, HEAD_DIM)).unbind(1),
            *PACKING,
        ),
    ),
    "attention_varlen-bias": Case(
        [TEXTS] * 3,
        lambda q, k, v: operation("attention_varlen")(q, k, v, *PACKING, bias=q.new_zeros(HEADS, 5)),
        lambda q, k, v: reference.attention_varlen_reference(q, k, v, *PACKING, bias=q.new_zeros(HEADS, 5)),
    ),
    "attention_varlen-window": Case(
        # Not of values: what lies outside of the window has no part in a row.
        [TEXTS, TEXTS, (HEADS, 5)],
        lambda q, k, b: operation("attention_varlen")(q, k, torch.ones_like(k), *PACKING, window_size=(2, 1), bias=b),
        lambda q, k, b: reference.attention_varlen_reference(
            q, k, torch.ones_like(k), *PACKING, window_size=(2, 1), bias=b
        ),
    ),
    "cls_attention": case("cls_attention", [(3, HEADS, WIDTH), ROWS], lambda query, x: (query, x, *PACKING, 0.3)),
    "cls_attention-keys": Case(
        [(3, HEADS, HEAD_DIM), ROWS, TEXTS],
        lambda q, x, k: operation("cls_attention")(q, x, *PACKING, 0.3, keys=k, num_splits=2),
        lambda q, x, k: reference.cls_attention_reference(q, x, *PACKING, 0.3, keys=k),
    ),
    "cls_attention-norm": Case(
        [(3, HEADS, WIDTH), ROWS, VECTOR, ROWS, VECTOR, VECTOR],
        lambda q, x, *n: operation("cls_attention")(q, x, *PACKING, 0.3, norm=AddNorm(*n, EPS)),
        lambda q, x, *n: reference.cls_attention_reference(
            q, reference.add_layer_norm_reference(x, *n, EPS), *PACKING, 0.3
        ),
    ),
    "cls_attention_kv": case("cls_attention_kv", [(3, HEADS, HEAD_DIM), TEXTS, TEXTS], lambda *t: (*t, *PACKING)),
    "cls_attention_kv-bias": Case(
        [(3, HEADS, HEAD_DIM), TEXTS, TEXTS, (TOKENS, HEADS)],
        lambda q, k, v, b: operation("cls_attention_kv")(q, k, v, *PACKING, bias=b.float()),
        lambda q, k, v, b: reference.cls_attention_kv_reference(q, k, v, *PACKING, bias=b),
    ),
    "cls_output": case(
        "cls_output",
        [(3, HEADS, WIDTH), (SIZE, WIDTH), (SIZE,), (WIDTH, SIZE), VECTOR, ROWS, VECTOR, VECTOR],
        lambda *t: (*t[:6], FIRST, *t[6:], EPS),
    ),
    "disentangled_attention": Case(
        [*[TEXTS] * 3, *[(5, HEADS, HEAD_DIM)] * 2],
        lambda *t: operation("disentangled_attention")(
            *t, Buckets(TABLE.to(t[0].device), tuple(TABLE.tolist())), *PACKING, 0.3
        ),
        lambda *t: reference.disentangled_attention_reference(*t, TABLE, POSITIONS, CU_SEQLENS, 0.3),
    ),
    "embedding_layer_norm": case(
        "embedding_layer_norm", [(5, WIDTH)] * 3 + [VECTOR] * 2, lambda *t: (IDS, IDS, IDS, *t, EPS)
    ),
    "layer_norm": case("layer_norm", [ROWS, VECTOR, VECTOR], lambda *t: (*t, EPS)),
    "linear_add_layer_norm": Case(
        [ROWS, (WIDTH, WIDTH), VECTOR, ROWS, VECTOR, VECTOR],
        lambda *t: operation("linear_add_layer_norm")(*t, EPS),
        lambda x, w, b, *n: reference.add_layer_norm_reference(torch.nn.functional.linear(x, w), b, *n, EPS),
    ),
    "linear_per_head": Case(
        [TEXTS, (HEADS, HEAD_DIM, 7)],
        operation("linear_per_head"),
        lambda x, w: torch.einsum("thi,hio->tho", x, w),
    ),
    "pooler_classifier": case(
        "pooler_classifier", [ROWS, (17, WIDTH), (17,), (3, 17), (3,)], lambda *t: t, activation="relu"
    ),
    "mean_pool": case("mean_pool", [ROWS], lambda x: (x, *PACKING)),
}
for activation in get_args(Activation):
    CASES[f"linear-{activation}"] = case(
        "linear_activation", [ROWS, (17, WIDTH), (17,)], lambda *t, name=activation: (*t, name)
    )
    CASES[f"gated-{activation}"] = case("gated_activation", [(TOKENS, 2 * WIDTH)], lambda x, name=activation: (x, name))


def turns(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.arange(max(LENGTHS) * HEAD_DIM // 2, dtype=dtype).view(max(LENGTHS), -1)
    return angles.cos(), angles.sin()


def lost(case: Case, dtype: torch.dtype, device: str, value: float, element: int = -1) -> list[str]:
    """Which of the tensors may hold ``value`` without a NaN that the definition makes of it.

    It stands in the last number, which is a remainder where numbers are computed in vectors, or another.
    """
    found = []
    for place, shape in enumerate(case.shapes):
        tensors = [torch.randn(shape).to(dtype) for shape in case.shapes]
        tensors[place].view(-1)[element] = value
        expected = case.defined(*(tensor.double() for tensor in tensors))
        actual = case.run(*(tensor.to(device) for tensor in tensors)).cpu()
        if bool((expected.isnan() & ~actual.isnan()).any()):
            found.append(f"number {place}, {shape}")
    return found


@pytest.mark.covering(alone=["name", "dtype"])
@pytest.mark.parametrize("name", list(CASES))
def test_nan_stays_nan_in_pytorch(torch_path: str, dtype: torch.dtype, name: str) -> None:
    assert not lost(CASES[name], dtype, torch_path, float("nan"))


@pytest.mark.covering(alone=["name", "dtype"])
@pytest.mark.parametrize("name", list(CASES))
def test_nan_stays_nan_in_kernels(kernels: str, dtype: torch.dtype, name: str) -> None:
    assert not lost(CASES[name], dtype, kernels, float("nan"))


@pytest.mark.covering(alone=["value"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("attention", "cls_attention_kv"))])
def test_infinity_less_infinity_is_nan(torch_path: str, dtype: torch.dtype, name: str, value: float) -> None:
    # In texts of all lengths, and several times: of which sign scores are is chance.
    for element in (0, -1) * 4:
        assert not lost(CASES[name], dtype, torch_path, value, element)
