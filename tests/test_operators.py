"""The kernels as operators of torch.library: what they say of themselves, and graphs that they stand in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from support import cu_seqlens_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastcls_kernels
from fastcls_kernels import (
    AddNorm,
    Buckets,
    PackedLayout,
    absorb_query,
    add_layer_norm,
    apply_rotary_,
    attention_padded,
    attention_varlen,
    batch_invariant,
    cls_attention,
    cls_attention_kv,
    cls_output,
    disentangled_attention,
    embedding_layer_norm,
    gated_activation,
    layer_norm,
    linear,
    linear_activation,
    linear_add_layer_norm,
    linear_gelu,
    linear_per_head,
    mean_pool,
    pooler_classifier,
    unchecked,
)
from fastcls_kernels._ops import NAMESPACE
from fastcls_kernels.runtime import invariance

HEADS, HEAD_DIM, SIZE = 2, 16, 32
LENGTHS = (5, 1, 9)


class Inputs:
    """What the operations take, for texts of some lengths."""

    def __init__(self, lengths: tuple[int, ...], device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.device = device
        self.dtype = dtype
        self.lengths = lengths
        self.tokens = sum(lengths)
        self.cu_seqlens = cu_seqlens_of(lengths, device)
        self.first = self.cu_seqlens[:-1]
        self.packing = (self.cu_seqlens, max(lengths))
        self.rows = self.random(self.tokens, SIZE)
        self.heads = (self.tokens, HEADS, HEAD_DIM)
        self.square = self.random(SIZE, SIZE)
        self.vector = self.random(SIZE)
        self.positions = torch.cat([torch.arange(length, dtype=torch.int32) * 2 for length in lengths]).to(device)
        self.layout = PackedLayout(*self.packing, self.tokens, self.positions)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def wide(self, *shape: int) -> Tensor:
        """In float32 beside 16 bits."""
        return torch.randn(shape, dtype=torch.promote_types(self.dtype, torch.float32), device=self.device)

    @property
    def angles(self) -> Tensor:
        return torch.randn(40, HEAD_DIM // 2, device=self.device)

    def ids(self, size: int) -> Tensor:
        return torch.randint(0, size, (self.tokens,), device=self.device)

    @property
    def buckets(self) -> Buckets:
        return Buckets(torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32, device=self.device), (0, 1, 2, 3, 4))


# By operator: the operation as its users call it, in all its forms.
Cases = Mapping[str, Callable[[Inputs], tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]]
CASES: Cases = {
    "absorb_query": lambda i: (absorb_query, (i.rows, i.first, i.square, i.vector, i.square, HEADS), {}),
    "absorb_query-all": lambda i: (absorb_query, (i.rows, None, i.square, i.vector, i.square, HEADS), {}),
    "add_layer_norm": lambda i: (add_layer_norm, (i.rows, None, i.rows, i.vector, None, 1e-5), {"rows": i.first}),
    "add_layer_norm-sum": lambda i: (
        add_layer_norm,
        (i.rows, i.vector, i.rows, i.vector, i.vector, 1e-5),
        {"keep_sum": True},
    ),
    "add_layer_norm-rms": lambda i: (
        add_layer_norm,
        (i.rows, None, i.rows, i.vector, None, 1e-5),
        {"keep_sum": True, "rms": True},
    ),
    "apply_rotary_": lambda i: (
        apply_rotary_,
        (i.random(*i.heads), i.positions, i.angles, i.angles),
        {},
    ),
    "apply_rotary_-interleaved": lambda i: (
        apply_rotary_,
        (i.random(*i.heads), i.positions, i.angles, i.angles),
        {"interleaved": True},
    ),
    "attention_padded": lambda i: (
        attention_padded,
        (*i.random(3, 2, 7, HEADS, HEAD_DIM), torch.tensor([7, 3], device=i.device)),
        {},
    ),
    "attention_varlen": lambda i: (attention_varlen, (*i.random(3, *i.heads), *i.packing), {}),
    "attention_varlen-grouped": lambda i: (
        attention_varlen,
        (i.random(i.tokens, 3 * HEADS, HEAD_DIM), *i.random(2, *i.heads), *i.packing),
        {"bias": i.random(3 * HEADS, 5)},
    ),
    "attention_varlen-window": lambda i: (
        attention_varlen,
        (*i.random(3, *i.heads), *i.packing, 0.3),
        {"window_size": (2, 1), "bias": i.random(HEADS, 5), "layout": i.layout},
    ),
    "cls_attention": lambda i: (
        cls_attention,
        (i.random(len(i.lengths), HEADS, SIZE), i.rows, *i.packing, 0.3),
        {"norm": AddNorm(i.vector, i.rows, i.vector, i.vector, 1e-5)},
    ),
    "cls_attention-grouped": lambda i: (
        cls_attention,
        (i.random(len(i.lengths), 3 * HEADS, HEAD_DIM), i.rows, *i.packing, 0.3),
        {"keys": i.random(*i.heads)},
    ),
    "cls_attention-rows": lambda i: (
        cls_attention,
        (i.random(3, HEADS, HEAD_DIM), i.rows, *i.packing, 0.3),
        {
            "keys": i.random(*i.heads),
            "bias": i.wide(i.tokens, HEADS),
            "row_bounds": (i.cu_seqlens[[0, 1, 0]], i.cu_seqlens[[1, 2, 1]]),
            "num_splits": 1,
            "layout": i.layout,
        },
    ),
    "cls_attention_kv": lambda i: (
        cls_attention_kv,
        (i.random(len(i.lengths), HEADS, HEAD_DIM), *i.random(2, *i.heads), *i.packing),
        {"bias": i.wide(i.tokens, HEADS)},
    ),
    "cls_attention_kv-grouped": lambda i: (
        cls_attention_kv,
        (i.random(len(i.lengths), 3 * HEADS, HEAD_DIM), *i.random(2, *i.heads), *i.packing),
        {},
    ),
    "cls_output": lambda i: (
        cls_output,
        (
            *(i.random(len(i.lengths), HEADS, SIZE), i.square, i.vector, i.square, None, i.rows, i.first),
            *(i.vector, i.vector, 1e-5),
        ),
        {},
    ),
    "cls_output-sum": lambda i: (
        cls_output,
        (
            *(i.random(len(i.lengths), HEADS, SIZE), i.square, None, i.square, i.vector, i.rows[: len(i.lengths)]),
            *(None, i.vector, None, 1e-5),
        ),
        {"keep_sum": True},
    ),
    "cls_output-rms": lambda i: (
        cls_output,
        (
            *(i.random(len(i.lengths), HEADS, SIZE), i.square, None, i.square, None, i.rows, i.first),
            *(i.vector, None, 1e-5),
        ),
        {"rms": True},
    ),
    "disentangled_attention": lambda i: (
        disentangled_attention,
        (*i.random(3, *i.heads), *i.random(2, 5, HEADS, HEAD_DIM), i.buckets, *i.packing, 0.3),
        {"layout": i.layout},
    ),
    "embedding_layer_norm": lambda i: (
        embedding_layer_norm,
        (
            *(i.ids(50), i.ids(9), i.ids(2), i.random(50, SIZE), i.random(9, SIZE), i.random(2, SIZE)),
            *(i.vector, i.vector, 1e-5),
        ),
        {},
    ),
    "embedding_layer_norm-rms": lambda i: (
        embedding_layer_norm,
        (i.ids(50), None, None, i.random(50, SIZE), None, None, i.vector, None, 1e-5),
        {"rms": True},
    ),
    "embedding_layer_norm-none": lambda i: (
        embedding_layer_norm,
        (i.ids(50), i.ids(9), None, i.random(50, SIZE), i.random(9, SIZE), None, None, None, 1e-5),
        {},
    ),
    "gated_activation": lambda i: (gated_activation, (i.rows, "silu"), {}),
    "layer_norm": lambda i: (layer_norm, (i.rows, i.vector, None, 1e-5), {}),
    "layer_norm-rms": lambda i: (layer_norm, (i.rows, i.vector, i.vector, 1e-5), {"rms": True}),
    "linear": lambda i: (linear, (i.rows, i.square), {}),
    "linear_activation": lambda i: (linear_activation, (i.rows, i.square, i.vector, "relu"), {}),
    "linear_add_layer_norm": lambda i: (
        linear_add_layer_norm,
        (i.rows, i.square, None, i.rows, i.vector, i.vector, 1e-5),
        {},
    ),
    "linear_add_layer_norm-sum": lambda i: (
        linear_add_layer_norm,
        (i.rows, i.square, i.vector, i.rows, i.vector, None, 1e-5),
        {"keep_sum": True},
    ),
    "linear_add_layer_norm-rms": lambda i: (
        linear_add_layer_norm,
        (i.rows, i.square, None, i.rows, i.vector, None, 1e-5),
        {"keep_sum": True, "rms": True},
    ),
    "linear_gelu": lambda i: (linear_gelu, (i.rows, i.square, i.vector), {}),
    "linear_per_head": lambda i: (linear_per_head, (i.random(*i.heads), i.random(HEADS, HEAD_DIM, 7)), {}),
    "mean_pool": lambda i: (mean_pool, (i.rows, *i.packing), {"layout": i.layout}),
    "pooler_classifier": lambda i: (
        pooler_classifier,
        (i.rows, i.square, i.vector, i.random(3, SIZE), i.random(3)),
        {"activation": "gelu"},
    ),
}
every_case = pytest.mark.parametrize("case", list(CASES))


def results(made: Any) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


class Calls(TorchDispatchMode):
    """Notes the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastcls_kernels":
            self.made.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def operators() -> set[str]:
    """Those of operations, without those of their gradients."""
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    found = {name.removesuffix(".default") for namespace, name in names if namespace == NAMESPACE}
    return {name for name in found if not name.endswith("_backward")}


def test_every_operation_is_an_operator() -> None:
    operations = {
        name
        for name in fastcls_kernels.__all__
        if hasattr(getattr(fastcls_kernels, name), "__wrapped__") and name not in ("batch_invariant", "use_backend")
    }
    assert operations == {case.split("-")[0] for case in CASES} == operators()


# What exported programs hold.
SCHEMAS = {
    "absorb_query": (
        "(Tensor hidden_states, Tensor? rows, Tensor query_weight, Tensor query_bias, Tensor key_weight, "
        "SymInt num_heads) -> Tensor"
    ),
    "add_layer_norm": (
        "(Tensor hidden_states, Tensor? bias, Tensor residual, Tensor weight, Tensor? norm_bias, float eps, "
        "Tensor? rows, bool keep_sum, bool rms=False) -> Tensor[]"
    ),
    "apply_rotary_": "(Tensor(a0!) x, Tensor positions, Tensor cos, Tensor sin, bool interleaved=False) -> ()",
    "attention_padded": "(Tensor q, Tensor k, Tensor v, Tensor seqlens, float? softmax_scale=None) -> Tensor",
    "attention_varlen": (
        "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, float? softmax_scale, "
        "SymInt window_left, SymInt window_right, Tensor? bias, Tensor? positions) -> Tensor"
    ),
    "cls_attention": (
        "(Tensor query, Tensor hidden_states, Tensor cu_seqlens, SymInt max_seqlen, float softmax_scale, "
        "SymInt? num_splits, Tensor? positions, Tensor? keys, Tensor? bias, Tensor? row_starts, Tensor? row_ends, "
        "Tensor? norm_input_bias, Tensor? norm_residual, Tensor? norm_weight, Tensor? norm_bias, "
        "float norm_eps) -> Tensor"
    ),
    "cls_attention_kv": (
        "(Tensor query, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, float? softmax_scale, "
        "SymInt? num_splits, Tensor? positions, Tensor? bias, Tensor? row_starts, Tensor? row_ends) -> Tensor"
    ),
    "cls_output": (
        "(Tensor summed, Tensor value_weight, Tensor? value_bias, Tensor out_weight, Tensor? out_bias, "
        "Tensor hidden_states, Tensor? rows, Tensor norm_weight, Tensor? norm_bias, float eps, "
        "bool keep_sum, bool rms=False) -> Tensor[]"
    ),
    "disentangled_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor? pos_key, Tensor? pos_query, Tensor bucket_table, "
        "SymInt[] bucket_rows, Tensor cu_seqlens, SymInt max_seqlen, float softmax_scale, Tensor? positions) -> Tensor"
    ),
    "embedding_layer_norm": (
        "(Tensor token_ids, Tensor? position_ids, Tensor? token_type_ids, Tensor word_table, "
        "Tensor? position_table, Tensor? token_type_table, Tensor? weight, Tensor? norm_bias, float eps, "
        "bool rms=False) -> Tensor"
    ),
    "gated_activation": '(Tensor hidden_states, str activation="gelu") -> Tensor',
    "layer_norm": "(Tensor hidden_states, Tensor weight, Tensor? norm_bias, float eps, bool rms=False) -> Tensor",
    "linear": "(Tensor hidden_states, Tensor weight, Tensor? bias=None) -> Tensor",
    "linear_activation": "(Tensor hidden_states, Tensor weight, Tensor? bias, str activation) -> Tensor",
    "linear_add_layer_norm": (
        "(Tensor hidden_states, Tensor weight, Tensor? bias, Tensor residual, Tensor norm_weight, "
        "Tensor? norm_bias, float eps, bool keep_sum, bool rms=False) -> Tensor[]"
    ),
    "linear_gelu": "(Tensor hidden_states, Tensor weight, Tensor bias) -> Tensor",
    "linear_per_head": "(Tensor rows, Tensor weight) -> Tensor",
    "mean_pool": "(Tensor hidden_states, Tensor cu_seqlens, SymInt max_seqlen) -> Tensor",
    "pooler_classifier": (
        "(Tensor cls_states, Tensor pooler_weight, Tensor pooler_bias, Tensor classifier_weight, "
        "Tensor classifier_bias, str activation) -> Tensor"
    ),
}


def test_exported_programs_find_the_schemas_that_they_hold() -> None:
    found = {name: str(getattr(torch.ops.fastcls_kernels, name).default._schema) for name in operators()}
    assert found == {name: f"{NAMESPACE}::{name}{schema}" for name, schema in SCHEMAS.items()}


def test_what_belongs_together_is_given_together() -> None:
    inputs = Inputs(LENGTHS)
    query = inputs.random(len(LENGTHS), HEADS, SIZE)
    given = (query, inputs.rows, *inputs.packing, 0.3, None, None, None, None)
    with pytest.raises(ValueError, match="row_starts, row_ends must all be given or none, got row_starts"):
        torch.ops.fastcls_kernels.cls_attention(*given, inputs.first, None, None, None, None, None, 0.0)
    with pytest.raises(ValueError, match="norm_residual, norm_weight, norm_bias must all be given or none"):
        torch.ops.fastcls_kernels.cls_attention(*given, None, None, None, inputs.rows, inputs.vector, None, 0.0)


@pytest.mark.parametrize(("case", "invariant"), [*((case, False) for case in CASES), ("linear", True)])
def test_the_default_device_has_no_say(monkeypatch: pytest.MonkeyPatch, case: str, invariant: bool) -> None:
    # What was tried of blocks already would not be tried again.
    monkeypatch.setattr(invariance, "_agreeing", {})
    (operation, args, kwargs), (_, same_args, same) = (CASES[case](Inputs(LENGTHS)) for _ in range(2))
    with batch_invariant(invariant):
        with torch.device("meta"):
            found = operation(*args, **kwargs)
        expected = operation(*same_args, **same)
    for here, there in zip(results(found), results(expected), strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=0)


# What it looks at is said of an operator, whatever the dtype.
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.full)], ids=str)
@every_case
def test_opcheck(monkeypatch: pytest.MonkeyPatch, case: str, device: str, dtype: torch.dtype) -> None:
    operation, args, kwargs = CASES[case](Inputs(LENGTHS, device, dtype))
    # As a graph is traced; the node itself runs outside of it.
    answers = iter([True])
    with Calls() as calls, monkeypatch.context() as traced:
        traced.setattr(torch.compiler, "is_compiling", lambda: next(answers, False))
        operation(*args, **kwargs)
    (called,) = calls.made
    torch.library.opcheck(*called)


@pytest.mark.parametrize(
    "case",
    [
        *("linear", "cls_output", "cls_output-sum", "linear_add_layer_norm-sum", "layer_norm"),
        *(case for case in CASES if case.endswith("-rms")),
        "embedding_layer_norm-none",
    ],
)
def test_without_its_checks_an_operation_gives_the_same(case: str, device: str) -> None:
    operation, args, kwargs = CASES[case](Inputs(LENGTHS, device))
    found = results(getattr(unchecked, operation.__name__)(*args, **kwargs))
    for here, there in zip(found, results(operation(*args, **kwargs)), strict=False):
        torch.testing.assert_close(here, there, rtol=0, atol=0)


def test_the_next_half_adds_to_the_norm_where_no_sum_is_kept(device: str) -> None:
    for case in ("cls_output", "linear_add_layer_norm"):
        _, args, kwargs = CASES[case](Inputs(LENGTHS, device))
        normed, summed = getattr(unchecked, case)(*args, **kwargs)
        assert summed is normed


def test_every_operation_without_checks_has_its_public_name() -> None:
    assert set(unchecked.__all__) <= set(fastcls_kernels.__all__)


@pytest.mark.full
@every_case
def test_a_graph_holds_it_as_one_node(case: str, device: str) -> None:
    inputs = Inputs(LENGTHS, device)
    operation, args, kwargs = CASES[case](inputs)
    kwargs.pop("layout", None)
    constants = {name: value for name, value in kwargs.items() if name == "norm"}
    kwargs = {name: value for name, value in kwargs.items() if name not in constants}
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        return operation(*args, **kwargs, **constants)

    torch._dynamo.reset()
    # In place it may not work on the arguments of both calls.
    args_again = tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args)
    compiled = torch.compile(call, fullgraph=True, backend=backend)(*args, **kwargs)
    assert len(graphs) == 1
    called = [str(node.target) for node in graphs[0].graph.nodes if "fastcls_kernels" in str(node.target)]
    assert called == [f"fastcls_kernels.{case.split('-')[0]}.default"]
    for found, expected in zip(results(compiled), results(call(*args_again, **kwargs)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_wrong_calls_are_refused_in_a_graph_too() -> None:
    x, weight = torch.randn(3, 4), torch.randn(2, 4)
    q, cu_seqlens = torch.randn(6, 2, 16), cu_seqlens_of([2, 4])
    wrong: tuple[Callable[[], Any], ...] = (
        lambda: linear(x, weight, hidden_states=x),  # type: ignore[misc]
        lambda: attention_varlen(q, q, q, cu_seqlens, 4, window_size=(1, 1, 9)),  # type: ignore[arg-type]
        lambda: cls_attention_kv(q[:2], q, q, cu_seqlens, 4, row_bounds=()),  # type: ignore[arg-type]
    )
    for call in wrong:
        with pytest.raises(Exception, match=r"takes hidden_states|argument 2 is (longer|shorter)|zip\(\)"):
            torch.compile(call, fullgraph=True, backend="eager")()
        torch.compiler.reset()
