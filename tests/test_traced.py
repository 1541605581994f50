"""Fast models in graphs: torch.compile without a break, torch.export for every batch and length."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import has_compiler, tiny_bert, tiny_model
from test_families import CLASSES, answers, arithmetic, family_and_head, shaped_for
from test_imports import BLOCK, run
from torch import Tensor
from torch.export import Dim

import fastcls
from fastcls.engine import operator

# Every head, and every family.
CHOSEN = [pair for pair in CLASSES if pair[1] == "bert" or pair[0].endswith("ForSequenceClassification")]
# Those with options, tables or layers of their own, of which the others have none.
OWN_PARTS = ("bert", "albert", "deberta-v2", "ernie", "esm", "modernbert", "xmod")
every_class = pytest.mark.parametrize(("model_class", "family"), CHOSEN, ids=[name for name, _ in CHOSEN])
OPERATORS = ["fastcls.forward.default", "fastcls.pool.default"]


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that keeps the graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward


def batch(rows: int, length: int, device: str = "cpu") -> dict[str, Tensor]:
    ids = torch.randint(5, 199, (rows, length), device=device)
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def assert_same(found: Any, expected: Any, inputs: dict[str, Tensor]) -> None:
    ours, theirs = answers(lambda **_: found, inputs), answers(lambda **_: expected, inputs)
    assert ours.keys() == theirs.keys() != set()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def calls(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if "fastcls" in str(node.target)]


@arithmetic
@pytest.mark.parametrize(
    ("model_class", "family"),
    [pytest.param(*each, id=each[0], marks=[] if each[1] in OWN_PARTS else [pytest.mark.full]) for each in CHOSEN],
)
def test_compiled_without_a_break(model_class: str, family: str, device: str) -> None:
    fast = fastcls.optimize(tiny_model(model_class, family).to(device))
    backend = Counting()
    compiled = torch.compile(fast, fullgraph=True, backend=backend)
    for rows, length in ((3, 7), (4, 9), (2, 30), (5, 11)):
        inputs = shaped_for(model_class, batch(rows, length, device))
        assert_same(compiled(**inputs), fast(**inputs), inputs)
    # One for the first shape, one for all others; each the model in one node, and perhaps its pooler.
    assert len(backend.graphs) == 2
    assert all(calls(graph) in (OPERATORS, OPERATORS[:1]) for graph in backend.graphs)


@pytest.mark.full
def test_compiled_by_inductor(device: str) -> None:
    if device == "cpu" and not has_compiler():
        pytest.skip("needs a C++ compiler: install g++ or set CXX")
    fast = fastcls.optimize(tiny_bert().to(device))

    def score(**inputs: Tensor) -> Tensor:
        return fast(**inputs).logits.softmax(-1)

    compiled = torch.compile(score, fullgraph=True, dynamic=True)
    for rows, length in ((3, 7), (4, 9)):
        inputs = batch(rows, length, device)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs), score(**inputs))


@pytest.mark.gpu
def test_compiled_with_graphs_around_it() -> None:
    fast = fastcls.optimize(tiny_bert().to("cuda"))

    def score(**inputs: Tensor) -> Tensor:
        return fast(**inputs).logits.softmax(-1)

    compiled = torch.compile(score, mode="reduce-overhead")
    for _ in range(4):
        # Other ids of one shape: what a graph that held the pass would take for those that it was made of.
        inputs = batch(3, 7, "cuda")
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).clone(), score(**inputs))


@family_and_head
@every_class
def test_exported_for_every_batch_and_length(model_class: str, family: str) -> None:
    fast = fastcls.optimize(tiny_model(model_class, family))
    shape = {0: Dim("texts"), 1: Dim("tokens")}
    if "MultipleChoice" in model_class:
        shape = {1: Dim("choices"), 2: Dim("tokens")}
    inputs = shaped_for(model_class, batch(3, 7))
    program = torch.export.export(fast, (), inputs, dynamic_shapes=dict.fromkeys(inputs, shape))
    module = program.module()
    for rows, length in ((3, 7), (6, 40), (2, 2)):
        inputs = shaped_for(model_class, batch(rows, length))
        assert_same(module(**inputs), fast(**inputs), inputs)


@pytest.mark.full
@pytest.mark.parametrize(
    ("model_class", "blocked"),
    [
        pytest.param("BertForSequenceClassification", (), marks=pytest.mark.full),
        ("BertForSequenceClassification", ("transformers",)),
        pytest.param("BertModel", ("transformers",), marks=pytest.mark.full),
        pytest.param("BertForMaskedLM", ("transformers",), marks=pytest.mark.full),
    ],
)
def test_an_exported_program_runs_in_another_process(
    tmp_path: Path, model_class: str, blocked: tuple[str, ...]
) -> None:
    fast = fastcls.optimize(tiny_model(model_class, "bert"), last_layer="selected")
    inputs = batch(3, 7)
    shape = {0: Dim("texts"), 1: Dim("tokens")}
    program = torch.export.export(fast, (), inputs, dynamic_shapes=dict.fromkeys(inputs, shape))
    torch.export.save(program, tmp_path / "fast.pt2")
    other = batch(5, 9)
    torch.save({"inputs": other, "outputs": dict(fast(**other))}, tmp_path / "expected.pt")
    script = (
        BLOCK.format(blocked=blocked)
        + """
import torch
import fastcls.engine
expected = torch.load(sys.argv[2])
outputs = torch.export.load(sys.argv[1]).module()(**expected["inputs"])
for name, tensor in expected["outputs"].items():
    torch.testing.assert_close(getattr(outputs, name), tensor, rtol=0, atol=0)
assert list(outputs) == list(expected["outputs"])
assert "transformers" not in sys.modules
try:
    outputs.attentions
except AttributeError as error:
    assert "has no attentions: it holds " in str(error)
"""
    )
    command = [sys.executable, "-c", script, str(tmp_path / "fast.pt2"), str(tmp_path / "expected.pt")]
    path = os.pathsep.join(sys.path)
    # Without a compiler in reach.
    environment = {**os.environ, "PYTHONPATH": path, "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.full
def test_transformers_outputs_take_the_place_of_stand_ins() -> None:
    code = (
        "import fastcls.engine, fastcls.traced\n"
        "from torch.utils._pytree import SERIALIZED_TYPE_TO_PYTHON_TYPE as types\n"
        "from transformers.modeling_outputs import SequenceClassifierOutput\n"
        "print(types['transformers.modeling_outputs.SequenceClassifierOutput'] is SequenceClassifierOutput)"
    )
    assert run(code) == "True"


@pytest.mark.parametrize("model_class", ["BertForSequenceClassification", "BertForMultipleChoice", "BertModel"])
def test_a_node_of_an_earlier_program_leaves_the_fill_to_the_task(model_class: str) -> None:
    fast = fastcls.optimize(tiny_model(model_class, "bert"))
    inputs = batch(3, 7)
    inputs["attention_mask"][1] = 0
    given = (inputs["input_ids"], inputs["attention_mask"], None, None, None)
    weights = [weight for _, weight in fast.named_parameters()]
    # An earlier program gives the options that there were then.
    found = torch.ops.fastcls.forward(weights, fast.description, *fast.options[:3], "texts", 0.0, None, *given)
    expected = torch.finfo(torch.float32).min if model_class == "BertForMultipleChoice" else float("nan")
    torch.testing.assert_close(found[1], torch.full_like(found[1], expected), equal_nan=True)
    assert torch.isfinite(found[[0, 2]]).all()


def test_opcheck() -> None:
    fast = fastcls.optimize(tiny_model("BertModel", "bert"))
    weights = [weight for _, weight in fast.named_parameters()]
    inputs = batch(3, 7)
    given = (inputs["input_ids"], inputs["attention_mask"], None, None, None)
    for rows, selected in (("texts", None), ("tokens", None)):
        arguments = (weights, fast.description, *fast.options[:3], rows, 0.0, selected, *given, *fast.options[3:])
        torch.library.opcheck(torch.ops.fastcls.forward.default, arguments)
    states = torch.randn(3, fast.spec.hidden_size)
    torch.library.opcheck(torch.ops.fastcls.pool.default, (weights, fast.description, *fast.options[:3], states))
    filler = fastcls.optimize(tiny_model("BertForMaskedLM", "bert"))
    weights, masked = [weight for _, weight in filler.named_parameters()], inputs["input_ids"] > 100
    arguments = (weights, filler.description, *filler.options[:3], "tokens", 0.0, masked, *given)
    torch.library.opcheck(torch.ops.fastcls.forward.default, arguments)


@pytest.mark.parametrize("mask_token_id", [None, 4])
@pytest.mark.parametrize("labelled", [False, True])
def test_masks_are_filled_in_a_graph(mask_token_id: int | None, labelled: bool) -> None:
    fast = fastcls.optimize(tiny_model("BertForMaskedLM", "bert"), mask_token_id=mask_token_id)
    inputs = batch(3, 9)
    inputs["input_ids"][:, 2] = 4
    if labelled:
        inputs["labels"] = torch.where(inputs["input_ids"] == 4, 17, -100)
    compiled = torch.compile(fast, fullgraph=True, backend="eager")(**inputs)
    expected = fast(**inputs)
    assert torch.equal(compiled.logits, expected.logits)
    assert compiled.rows is None
    if labelled:
        torch.testing.assert_close(compiled.loss, expected.loss)


@pytest.mark.parametrize(
    ("model_class", "labels"),
    [
        ("BertForSequenceClassification", {"labels": torch.tensor([0, 1, 2])}),
        ("BertForTokenClassification", {"labels": torch.randint(0, 3, (3, 9))}),
        (
            "BertForQuestionAnswering",
            {"start_positions": torch.tensor([1, 2, 0]), "end_positions": torch.ones(3).long()},
        ),
    ],
)
def test_losses_in_a_graph(model_class: str, labels: dict[str, Tensor]) -> None:
    fast = fastcls.optimize(tiny_model(model_class, "bert"))
    inputs = {"input_ids": torch.randint(5, 199, (3, 9)), **labels}
    compiled = torch.compile(fast, fullgraph=True, backend="eager")(**inputs)
    torch.testing.assert_close(compiled.loss, fast(**inputs).loss)


def test_what_a_graph_cannot_hold_is_refused() -> None:
    ids = torch.randint(5, 199, (2, 7))
    encoder = fastcls.optimize(tiny_model("BertModel", "bert"))
    with pytest.raises(Exception, match="select must be 'all' or 'first' in a graph"):
        torch.compile(encoder, fullgraph=True, backend="eager")(ids, select=ids > 100)
    filler = fastcls.optimize(tiny_model("BertForMaskedLM", "bert"), dense=False)
    with pytest.raises(Exception, match="dense must be True in a graph"):
        torch.compile(filler, fullgraph=True, backend="eager")(ids)


def with_hook_inside(model_class: str) -> Any:
    fast = fastcls.optimize(tiny_model(model_class, "bert"))
    fast.encoder.layers[0].register_forward_hook(lambda _module, _given, made: (made[0] * 1.5, *made[1:]))
    return fast


def released(model_class: str) -> Any:
    fast = fastcls.optimize(tiny_model(model_class, "bert"))
    fast.quantize = "int8"
    fast.let_go()
    return fast


# What a whole graph refuses: the model, and arguments beside a batch.
OUTSIDE: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "released": (lambda: released("BertForSequenceClassification"), {}),
    "released encoder": (lambda: released("BertModel"), {}),
    "released fill": (lambda: released("BertForMaskedLM"), {}),
    "hook": (lambda: with_hook_inside("BertForSequenceClassification"), {}),
    "hook in an encoder": (lambda: with_hook_inside("BertModel"), {}),
    "mask": (lambda: fastcls.optimize(tiny_model("BertModel", "bert")), {"select": torch.eye(3, 7).bool()}),
    "not dense": (
        lambda: fastcls.optimize(tiny_model("BertForMaskedLM", "bert"), dense=False),
        {"labels": torch.eye(3, 7).long() * 101 - 100},
    ),
}


@pytest.mark.full
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.full] if "encoder" in case else []) for case in OUTSIDE]
)
def test_a_graph_with_breaks_leaves_outside_what_it_cannot_hold(case: str) -> None:
    make, given = OUTSIDE[case]
    fast, inputs = make(), batch(3, 7)
    expected = fast(**inputs, **given)
    compiled = torch.compile(fast, backend="eager")
    for _ in range(2):
        assert_same(compiled(**inputs, **given), expected, inputs)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="graph"):
        torch.compile(fast, backend="eager", fullgraph=True)(**inputs, **given)


def test_a_hook_around_the_model_may_stand_beside_a_graph() -> None:
    fast, inputs = fastcls.optimize(tiny_bert()), batch(3, 7)
    fast.register_forward_hook(lambda _module, _given, made: type(made)(logits=made.logits * 3))
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**inputs).logits, fast(**inputs).logits)


def test_bad_values_are_named_when_the_graph_runs() -> None:
    compiled = torch.compile(fastcls.optimize(tiny_bert()), fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="input_ids must lie from 0 to 198"):
        compiled(torch.full((2, 3), 199))


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
def test_a_graph_sees_weights_and_options_change(family: str) -> None:
    name = "BertForSequenceClassification" if family == "bert" else "DebertaV2ForSequenceClassification"
    fast = fastcls.optimize(tiny_model(name, family))
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    inputs = batch(3, 7)
    before = compiled(**inputs).logits
    fast.load_state_dict({name: value * 1.1 for name, value in fast.state_dict().items()})
    after = compiled(**inputs).logits
    assert not torch.equal(before, after)
    assert torch.equal(after, fast(**inputs).logits)
    fast.last_layer = "full"
    assert torch.equal(compiled(**inputs).logits, fast(**inputs).logits)
    fast.to(torch.bfloat16)
    assert compiled(**inputs).logits.dtype == torch.bfloat16
    assert torch.equal(compiled(**inputs).logits, fast(**inputs).logits)


def test_a_weight_that_does_not_fit_is_named_when_the_graph_runs() -> None:
    fast = fastcls.optimize(tiny_bert())
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    compiled(**batch(3, 7))
    weight = fast.get_parameter("encoder.layers.0.up_weight")
    weight.data = weight.data[:-1]
    with pytest.raises(ValueError, match=r"encoder.layers.0.up_weight must be contiguous, of shape"):
        compiled(**batch(3, 7))


def test_a_graph_sees_one_weight_move_to_other_memory() -> None:
    fast = fastcls.optimize(tiny_bert())
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    inputs = batch(3, 7)
    before = compiled(**inputs).logits
    last = list(fast.parameters())[-1]
    last.data = last + 1.0
    after = compiled(**inputs).logits
    assert torch.equal(after, fast(**inputs).logits)
    assert not torch.equal(after, before)


def test_a_graph_forgets_with_its_model() -> None:
    fast = fastcls.optimize(tiny_model("DebertaV2ForSequenceClassification", "deberta-v2"))
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    inputs = batch(3, 7)
    before = compiled(**inputs).logits
    # By hand, which only those who clear are told of.
    fast.encoder.relative.table_weight.data.mul_(1.5)
    fast.clear_caches()
    assert torch.equal(compiled(**inputs).logits, fast(**inputs).logits)
    assert not torch.equal(compiled(**inputs).logits, before)


def test_old_weights_are_not_kept(device: str) -> None:
    fast = fastcls.optimize(tiny_bert().to(device))
    torch.compile(fast, fullgraph=True, backend="eager")(**batch(3, 7, device))
    old = weakref.ref(operator._built[next(fast.parameters())][fast.description, fast.options].engine)
    fast.to(torch.bfloat16)
    torch._dynamo.reset()
    gc.collect()
    assert old() is None


def test_two_graphs_of_one_model_do_not_take_turns_in_making_it() -> None:
    fast = fastcls.optimize(tiny_bert())
    inputs = batch(3, 7)
    program = torch.export.export(fast, (), inputs).module()
    fast.last_layer = "full"
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    program(**inputs), compiled(**inputs)
    made = {key: built.engine for models in operator._built.values() for key, built in models.items()}
    program(**inputs), compiled(**inputs)
    again = {key: built.engine for models in operator._built.values() for key, built in models.items()}
    assert all(again[key] is model for key, model in made.items())


def test_what_runs_in_graphs_is_gone_with_its_model() -> None:
    fast = fastcls.optimize(tiny_bert())
    torch.compile(fast, fullgraph=True, backend="eager")(**batch(3, 7))
    twin = copy.deepcopy(fast)
    gone = weakref.ref(operator._built[next(fast.parameters())][fast.description, fast.options].engine)
    del fast
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None
    assert torch.isfinite(twin(**batch(3, 7)).logits).all()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_writes_to_copied_weights_are_seen_in_a_graph_with_labels(backend: str) -> None:
    model = tiny_model("BertForSequenceClassification", "bert").eval()
    fast = fastcls.optimize(model)
    compiled = torch.compile(fast, backend=backend)
    inputs = {"input_ids": torch.arange(5, 17).view(2, 6), "labels": torch.tensor([0, 1])}
    for _ in range(4):
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)
            for layer in model.bert.encoder.layer:
                layer.attention.self.query.weight.mul_(1.5)
