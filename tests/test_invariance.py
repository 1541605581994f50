"""Batch invariance: a text's answer, bit for bit, whatever batch it comes in."""

from __future__ import annotations

import copy
import importlib
import random
from collections.abc import Callable, Sequence
from typing import Any, get_args

import pytest
import torch
from support import cu_seqlens_of, tiny_bert, tiny_model
from test_families import ANSWERS, CLASSIFIERS, every_class, every_classifier, family_and_head
from torch import Tensor

import fastcls
from fastcls.engine.spec import LastLayer
from fastcls_kernels import (
    Activation,
    attention_padded,
    batch_invariant,
    cls_attention,
    gated_activation,
    linear,
    use_backend,
)
from fastcls_kernels.runtime import invariance
from fastcls_kernels.runtime.invariance import in_blocks
from fastcls_kernels.runtime.tile_tables import attention_tile, rows_tile

LENGTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 40, 47, 64, 65, 80, 94, 5, 9, 12, 21, 26)
# Each kind of encoder, through kernels of its own.
KINDS = ("bert", "mpnet", "modernbert", "deberta-v2")


def texts_of(lengths: Sequence[int], device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, 199, (length,), generator=generator).to(device) for length in lengths]


def batch_of(texts: Sequence[Tensor], padding: int = 0) -> dict[str, Tensor]:
    length = max(map(len, texts)) + padding
    ids, mask = (torch.zeros(len(texts), length, dtype=torch.long, device=texts[0].device) for _ in range(2))
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def answers_of(model: Any, texts: Sequence[Tensor], padding: int = 0) -> list[list[Tensor]]:
    """All that a model answers to each text, of its tokens alone."""
    inputs = batch_of(texts, padding)
    shape = inputs["input_ids"].shape
    if "MultipleChoice" in model.model_class.__name__:
        # One choice a question: with more of them one answer would be of several texts.
        inputs = {name: tensor[:, None] for name, tensor in inputs.items()}
    with torch.no_grad():
        output = model(**inputs)
    found = [answer for name in ANSWERS if (answer := getattr(output, name, None)) is not None]
    of_tokens = [answer.shape[:2] == shape and answer.ndim > 1 and shape[1] > 1 for answer in found]
    return [
        [answer[row, : len(text)] if tokens else answer[row] for answer, tokens in zip(found, of_tokens, strict=True)]
        for row, text in enumerate(texts)
    ]


def assert_same_bits(found: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]], what: str) -> None:
    for text, (answers, alone) in enumerate(zip(found, expected, strict=True)):
        for answer, same in zip(answers, alone, strict=True):
            assert torch.equal(answer.flatten(), same.flatten()), f"text {text} of {what}"


def check_random_batches(model: Any, texts: Sequence[Tensor], batches: int, largest: int) -> None:
    alone = [answers_of(model, [text])[0] for text in texts]
    choose = random.Random(0)
    for number in range(batches):
        chosen = choose.choices(range(len(texts)), k=choose.randint(1, largest))
        found = answers_of(model, [texts[index] for index in chosen], padding=choose.choice((0, 1, 7)))
        assert_same_bits(found, [alone[index] for index in chosen], f"batch {number}: {chosen}")


@family_and_head
@every_class
def test_bits_of_every_head(model_class: str, family: str, device: str) -> None:
    model = fastcls.optimize(tiny_model(model_class, family).to(device), batch_invariant=True)
    # Two labels a token would look like two tokens of a text.
    check_random_batches(model, [text for text in texts_of(LENGTHS, device) if len(text) != 3], 6, 24)


@pytest.mark.covering(alone=["model_class", "last_layer"])
@pytest.mark.parametrize("last_layer", get_args(LastLayer))
@every_classifier
def test_bits_of_every_rung(model_class: str, family: str, last_layer: LastLayer, device: str) -> None:
    model = fastcls.optimize(
        tiny_model(model_class, family).to(device), last_layer=last_layer, batch_invariant=True, cuda_graphs=False
    )
    check_random_batches(model, texts_of(LENGTHS, device), 3, 20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@every_classifier
@pytest.mark.covering(alone=["model_class", "family", "dtype"])
def test_bits_in_16_bits(model_class: str, family: str, dtype: torch.dtype, device: str) -> None:
    model = fastcls.optimize(tiny_model(model_class, family).to(device, dtype), batch_invariant=True)
    check_random_batches(model, texts_of(LENGTHS, device), 3, 20)


@pytest.mark.parametrize("batches", [50, pytest.param(1000, marks=pytest.mark.full)])
def test_bits_over_many_batches(device: str, batches: int) -> None:
    model = fastcls.optimize(tiny_bert().to(device), batch_invariant=True)
    check_random_batches(model, texts_of(range(1, 97), device), batches, 24)


@pytest.mark.parametrize("batches", [2, pytest.param(20, marks=pytest.mark.full)])
def test_bits_of_real_weights(
    minilm_sst2: Any, minilm_tokenizer: Any, sst2: Callable[[str], Any], batches: int
) -> None:
    texts = [torch.tensor(ids) for ids in minilm_tokenizer(sst2("dev").texts[: 5 * batches])["input_ids"]]
    check_random_batches(fastcls.optimize(copy.deepcopy(minilm_sst2), batch_invariant=True), texts, batches, 40)


@pytest.fixture
def sums_in_order(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Has the interpreter add a product's terms one after another, so that tiles alone decide the bits.

    The interpreter's own products are NumPy's, whose BLAS on some CPUs gives a row other bits in another place of the
    same tile, which a GPU's do not. Gives the device.
    """

    def create_dot(_builder: Any, a: Any, b: Any, accumulator: Any, *_options: Any) -> Any:
        left, right, before = (tile.data.astype(accumulator.data.dtype) for tile in (a, b, accumulator))
        # From zero, not from what there is before: else where one tile ends and another begins would not be seen.
        total = left[..., :, 0, None] * right[..., 0, None, :]
        for term in range(1, left.shape[-1]):
            total = total + left[..., :, term, None] * right[..., term, None, :]
        return interpreter.TensorHandle(before + total, accumulator.dtype.scalar)

    if kernel_device == "cpu":
        interpreter = importlib.import_module("triton.runtime.interpreter")
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    return kernel_device


@pytest.mark.parametrize(
    "kind", [pytest.param(each, marks=[] if each == "bert" else [pytest.mark.full]) for each in KINDS]
)
def test_bits_through_the_kernels(kind: str, sums_in_order: str) -> None:
    name = {family: name for name, family in CLASSIFIERS}[kind]
    model = fastcls.optimize(tiny_model(name, kind).to(sums_in_order), batch_invariant=True)
    with use_backend("triton"):
        # Sequences that share tiles, and begin at odd places in them.
        check_random_batches(model, texts_of((5, 17, 33, 40), sums_in_order), 2, 5)


def test_long_texts_are_split_alike(sums_in_order: str) -> None:
    # Alone a long text would be shared out among programs, which a batch of them has enough of.
    torch.manual_seed(0)
    lengths = [300, 20, 300, 7]
    query, x = (torch.randn(shape, device=sums_in_order) for shape in ((4, 2, 32), (sum(lengths), 32)))
    with batch_invariant(), use_backend("triton"):
        together = cls_attention(query, x, cu_seqlens_of(lengths, sums_in_order), 300, 0.3)
        alone = cls_attention(query[:1], x[:300], cu_seqlens_of([300], sums_in_order), 300, 0.3)
    assert torch.equal(together[:1], alone)


@pytest.mark.parametrize("arch", ["interpreter", "sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_no_tile_is_chosen_by_the_size_of_a_batch(arch: str, dtype: torch.dtype) -> None:
    with batch_invariant():
        for operation in ("absorb_query", "cls_output", "pooler_classifier"):
            assert len({rows_tile(arch, operation, dtype, rows) for rows in (1, 16, 17, 300, 10**6)}) == 1
        tiles = {attention_tile(arch, dtype, 64, mean, tma=False) for mean in (1, 16, 48, 100, 500)}
    assert [tile.PER_SEQUENCE for tile in tiles] == [True]


@every_classifier
def test_answers_are_the_same_up_to_rounding(model_class: str, family: str) -> None:
    model = fastcls.optimize(tiny_model(model_class, family))
    texts = texts_of(LENGTHS)
    usual = torch.cat([answer[0][None] for answer in answers_of(model, texts)])
    model.batch_invariant = True
    invariant = torch.cat([answer[0][None] for answer in answers_of(model, texts)])
    assert float((usual - invariant).abs().max()) <= 1e-5 * max(1.0, float(usual.abs().max()))


def test_masked_tokens_alone() -> None:
    model = fastcls.optimize(tiny_model("BertForMaskedLM", "bert"), mask_token_id=4, batch_invariant=True)
    texts = texts_of((5, 9, 21))
    for text in texts:
        text[2:4] = 4
    check_random_batches(model, texts, 10, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_neighbour_whose_mask_has_holes(kind: str, device: str) -> None:
    name = {family: name for name, family in CLASSIFIERS}[kind].replace("Sequence", "Token")
    model = fastcls.optimize(tiny_model(name, kind).to(device), batch_invariant=True)
    for length in (3, 7, 20, 40):
        inputs = batch_of(texts_of((length, length, length), device))
        alone = model(**{name: tensor[:1] for name, tensor in inputs.items()}).logits
        holes = torch.ones_like(inputs["attention_mask"])
        holes[1, 1] = 0
        assert torch.equal(model(**{**inputs, "attention_mask": holes}).logits[:1], alone)
        # And the one with holes itself.
        own = model(inputs["input_ids"][1:2], attention_mask=holes[1:2]).logits
        assert torch.equal(model(**{**inputs, "attention_mask": holes}).logits[1:2], own)


@pytest.mark.full
@every_classifier
def test_bits_in_float64(model_class: str, family: str) -> None:
    model = fastcls.optimize(tiny_model(model_class, family).double(), batch_invariant=True)
    check_random_batches(model, texts_of(LENGTHS), 3, 20)


def test_embeddings_of_the_callers() -> None:
    model = fastcls.optimize(tiny_bert(), batch_invariant=True)
    embedded = torch.randn(5, 9, 64)
    together = model(inputs_embeds=embedded).logits
    assert torch.equal(torch.cat([model(inputs_embeds=row[None]).logits for row in embedded]), together)


@pytest.mark.parametrize("kind", KINDS)
def test_the_context_holds_around_a_model(kind: str, device: str) -> None:
    name = {family: name for name, family in CLASSIFIERS}[kind]
    model = fastcls.optimize(tiny_model(name, kind).to(device))
    # What it keeps is made the other way first.
    answers_of(model, texts_of(LENGTHS, device))
    with batch_invariant():
        check_random_batches(model, texts_of(LENGTHS, device), 3, 20)


def test_padded_attention() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 40, 4, 16)
    with batch_invariant():
        both = attention_padded(q, k, v, torch.tensor([7, 40]))
        alone = attention_padded(q[:1, :9], k[:1, :9], v[:1, :9], torch.tensor([7]))
    assert torch.equal(both[0, :7], alone[0, :7])
    torch.testing.assert_close(both, attention_padded(q, k, v, torch.tensor([7, 40])))


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33, 63, 64, 65, 300, 0])
def test_blocks_hold_every_row_once(rows: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 32), torch.randn(24, 32)
    with batch_invariant():
        found = linear(x, weight)
    torch.testing.assert_close(found, linear(x, weight))


# The rows that a library computes at a time.
@pytest.mark.parametrize("period", [2, 8, 16, 1024])
def test_a_library_that_is_not_invariant_is_refused(period: int) -> None:
    def by_place(rows: Tensor) -> Tensor:
        return rows + torch.arange(rows.shape[0])[:, None] % period

    with pytest.raises(RuntimeError, match=r"batch_invariant must be left off on this CPU .*: the sum by place"):
        in_blocks(by_place, torch.zeros(3, 4), name=f"sum by place in {period}")


@pytest.mark.parametrize("number", [0.0, float("nan")])
def test_weights_decide_nothing(number: float) -> None:
    # A product by zeros is the same in every order, and NaN is never the same.
    odd, even = torch.full((312, 1200), number, dtype=torch.float64), torch.randn(312, 1200, dtype=torch.float64)
    x = torch.randn(300, 1200, dtype=torch.float64)
    with batch_invariant():
        assert linear(x, odd).shape == (300, 312)
        assert torch.equal(linear(x, even)[3:7], linear(x[3:7], even))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("activation", get_args(Activation))
def test_activations_do_not_go_by_the_share_of_a_thread(threads: int, activation: Activation) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(2000, 2 * 112, dtype=torch.float64)
        with batch_invariant():
            together = gated_activation(x, activation)
            apart = torch.cat([gated_activation(rows, activation) for rows in x.split([1, 63, 300, 1636])])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, apart)


def test_sizes_that_differ_are_not_mixed() -> None:
    sizes = set()

    def by_size(rows: Tensor) -> Tensor:
        sizes.add(rows.shape[0])
        return rows + rows.shape[0]

    found = in_blocks(by_size, torch.zeros(300, 2), name="by size")
    assert bool((found == invariance._BLOCKS[0]).all())
    assert sizes == set(invariance._BLOCKS)


def test_other_devices_are_refused() -> None:
    with batch_invariant(), use_backend("torch"), pytest.raises(RuntimeError, match="must be left off on meta"):
        linear(torch.empty(3, 4, device="meta"), torch.empty(2, 4, device="meta"))


def test_it_ends_with_its_block() -> None:
    with batch_invariant():
        assert invariance.is_batch_invariant()
        with batch_invariant(enabled=False):
            assert not invariance.is_batch_invariant()
    assert not invariance.is_batch_invariant()
