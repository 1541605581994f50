"""A user's own head around a fast encoder, and several heads on one: the original's answers, or an error by name."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import IS_OLD, MANY_LABELS, TINY_FAMILIES, CountTokenProducts, assert_as_exact_as, tiny_model
from torch import Tensor, nn
from transformers import BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

import fastcls
from fastcls.heads.first_row import FirstRow
from fastcls.models import FastEncoder

LENGTH = 13
MASKS = {
    "right_padding": [[1] * LENGTH, [1] * 7 + [0] * 6, [1] + [0] * 12, [1] * 12 + [0]],
    "holes": [[1, 0, 1, 1, 0, 0, 1] + [1] * 6, [1, 1] + [0] * 10 + [1], [1, 0] * 6 + [1], [1] * LENGTH],
    "all_tokens": [[1] * LENGTH] * 4,
}


def inputs_of(mask: str = "right_padding") -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"input_ids": torch.randint(5, 199, (4, LENGTH)), "attention_mask": torch.tensor(MASKS[mask])}


class OwnHead(nn.Module):
    """A module as a tutorial has it: an encoder, and a head of its own."""

    def __init__(self, encoder: Any, labels: int = MANY_LABELS) -> None:
        super().__init__()
        width = encoder.config.hidden_size
        self.out = nn.Linear(width, labels)
        self.encoder = encoder
        self.dropout = nn.Dropout(0.5)
        self.both = nn.Linear(2 * width, labels)
        self.scores = nn.Linear(width, 1)
        self.transitions = nn.Parameter(torch.randn(labels, labels))

    def states(self, input_ids: Tensor, attention_mask: Tensor | None) -> Any:
        return self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state


class First(OwnHead):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.out(self.states(input_ids, attention_mask)[:, 0, :])


class MultiSample(OwnHead):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        # By index, behind dropout over all rows, as many notebooks have it.
        states = self.dropout(self.encoder(input_ids, attention_mask)[0])
        return torch.stack([self.out(self.dropout(states[:, 0])) for _ in range(3)]).mean(0)


class ClassifyThenTake(OwnHead):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.out(self.states(input_ids, attention_mask))[:, :1].squeeze(1)


class PoolerByName(OwnHead):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.out(self.encoder(input_ids=input_ids, attention_mask=attention_mask).pooler_output)


class PoolerByIndex(OwnHead):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        _, pooled = self.encoder(input_ids, attention_mask, return_dict=False)
        return self.out(pooled)


class Mean(OwnHead):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        states = self.states(input_ids, attention_mask)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        kept = mask.unsqueeze(-1).expand(states.size()).to(states.dtype)
        return self.out((states * kept).sum(1) / kept.sum(1).clamp(min=1e-9))


class FirstAndMean(OwnHead):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        states = self.states(input_ids, attention_mask)
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mean = (states * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)
        return self.both(torch.cat((states[:, 0], mean), -1))


class Maximum(OwnHead):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        states = self.states(input_ids, attention_mask)
        if attention_mask is not None:
            states = states + (1 - attention_mask[..., None].to(states.dtype)) * -1e4
        return self.out(states.max(1).values)


class AttentionPooling(OwnHead):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        states = self.states(input_ids, attention_mask)
        scores = self.scores(torch.tanh(states)).squeeze(-1)
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask == 0, torch.finfo(scores.dtype).min)
        return self.out((scores.softmax(-1)[..., None] * states).sum(1))


class Emissions(OwnHead):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.out(self.dropout(self.states(input_ids, attention_mask)))


class Chain(OwnHead):
    """As a CRF's forward algorithm: the log of the sum over all paths through the kept tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        emissions = self.out(self.states(input_ids, attention_mask))
        score = emissions[:, 0]
        for place in range(1, emissions.shape[1]):
            following = torch.logsumexp(score[:, :, None] + self.transitions, 1) + emissions[:, place]
            kept = True if attention_mask is None else attention_mask[:, place, None] != 0
            score = torch.where(torch.as_tensor(kept), following, score)
        return score


FOR_FIRST = (First, MultiSample, ClassifyThenTake, PoolerByName, PoolerByIndex)
FOR_ALL = (*FOR_FIRST, Mean, FirstAndMean, Maximum, AttentionPooling, Emissions, Chain)
CASES = [("first", head) for head in FOR_FIRST] + [("all", head) for head in FOR_ALL]
every_way_to_copy = pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
every_head = pytest.mark.parametrize(
    ("select", "head"), CASES, ids=[f"{select}-{head.__name__}" for select, head in CASES]
)


def built(head: type[OwnHead], family: str = "bert", model_class: str = "BertModel", labels: int = MANY_LABELS) -> Any:
    encoder = tiny_model(model_class, family, attn_implementation="eager")
    return head(encoder, labels).eval()


def answer(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Of tokens only what the mask keeps."""
    with torch.no_grad():
        found: Tensor = model(**inputs)
    return found[inputs["attention_mask"].bool()] if found.ndim == 3 else found


def close(actual: Tensor, expected: Tensor, bound: float) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= bound * max(1.0, float(expected.abs().max()))
    assert float(expected.std()) > 0.01, "answers that do not differ would prove nothing"


@pytest.mark.covering(alone=["mask"])
@pytest.mark.parametrize("mask", list(MASKS))
@every_head
def test_a_head_gives_its_own_answer(select: Any, head: type[OwnHead], mask: str) -> None:
    model, inputs = built(head).double(), inputs_of(mask)
    close(answer(fastcls.optimize_encoder(model, select=select), inputs), answer(model, inputs), 1e-12)


@pytest.mark.covering(alone=["select", "head"])
@every_head
def test_a_head_is_as_exact_as_its_own_in_bfloat16(select: Any, head: type[OwnHead]) -> None:
    rounded = built(head).to(torch.bfloat16)
    lengths = torch.tensor([13, 3, 7, 1, 12, 13, 9, 8] * 4)
    inputs = {"input_ids": torch.randint(5, 199, (len(lengths), LENGTH))}
    inputs["attention_mask"] = (torch.arange(LENGTH) < lengths[:, None]).long()
    exact = answer(copy.deepcopy(rounded).double(), inputs)
    fast = fastcls.optimize_encoder(rounded, select=select)
    assert_as_exact_as(answer(fast, inputs), [answer(rounded, inputs)], exact)


BASES = {
    family: name
    for family, name in (
        ("distilbert", "DistilBertModel"),
        ("xlm-roberta", "XLMRobertaModel"),
        ("electra", "ElectraModel"),
        ("modernbert", "ModernBertModel"),
        ("deberta-v2", "DebertaV2Model"),
    )
    if family in TINY_FAMILIES
}


@pytest.mark.parametrize("family", list(BASES))
@pytest.mark.parametrize("head", [First, Mean])
def test_any_family_can_be_inside(head: type[OwnHead], family: str) -> None:
    model, inputs = built(head, family, BASES[family]), inputs_of()
    select: Any = "first" if head is First else "all"
    close(answer(fastcls.optimize_encoder(model, select=select), inputs), answer(model, inputs), 1e-5)


class Tagged(BertPreTrainedModel):
    """A user's subclass, with a loss."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.bert = BertModel(config)
        self.dropout = nn.Dropout(0.3)
        self.post_init()

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, token_type_ids: Any = None, labels: Any = None
    ) -> SequenceClassifierOutput:
        outputs = self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


@pytest.fixture
def tagged() -> Tagged:
    torch.manual_seed(0)
    model = Tagged(tiny_model("BertModel", "bert").config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_a_subclass_keeps_its_class_names_and_checkpoints(tagged: Tagged, tmp_path: Path) -> None:
    inputs, before = inputs_of(), copy.deepcopy(tagged.state_dict())
    fast = fastcls.optimize_encoder(tagged, select="first")
    assert type(fast) is Tagged
    assert fast.config is fast.bert.config is not tagged.config
    labels = torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        actual, expected = fast(**inputs, labels=labels), tagged(**inputs, labels=labels)
    close(actual.logits, expected.logits, 1e-5)
    torch.testing.assert_close(actual.loss, expected.loss)
    ours = fast.state_dict()
    assert ours.keys() == before.keys() == tagged.state_dict().keys()
    assert all(torch.equal(ours[name], each) for name, each in before.items())
    assert all(torch.equal(tagged.state_dict()[name], each) for name, each in before.items())
    assert type(tagged.bert) is BertModel
    assert not tagged._forward_hooks
    assert not tagged._forward_pre_hooks
    fast.save_pretrained(tmp_path / "saved")
    again = Tagged.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], each) for name, each in before.items())


# A part that is loaded after its head has stopped following by then, and has nothing to warn of.
@pytest.mark.filterwarnings("ignore:.*follows that model no longer")
def test_loaded_weights_are_the_copys_own(tagged: Tagged) -> None:
    inputs, other = inputs_of(), copy.deepcopy(tagged)
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    before = answer_of_logits(tagged, inputs)
    fast = fastcls.optimize_encoder(tagged)
    fast.load_state_dict(other.state_dict())
    close(answer_of_logits(fast, inputs), answer_of_logits(other, inputs), 1e-5)
    assert torch.equal(answer_of_logits(tagged, inputs), before)


def answer_of_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


def test_training_the_original_is_followed(tagged: Tagged) -> None:
    inputs = inputs_of()
    fast = fastcls.optimize_encoder(tagged, select="first")
    before = answer_of_logits(fast, inputs)
    optimizer = torch.optim.AdamW(tagged.parameters(), lr=0.01)
    tagged.train()(**inputs, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    tagged.eval()
    assert float((answer_of_logits(fast, inputs) - before).abs().max()) > 0.01
    close(answer_of_logits(fast, inputs), answer_of_logits(tagged, inputs), 1e-5)
    tagged.classifier.bias = nn.Parameter(torch.full((3,), 5.0))
    close(answer_of_logits(fast, inputs), answer_of_logits(tagged, inputs), 1e-5)


class ReadsItsWeightsFirst(OwnHead):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        weight = self.out.weight * 2
        return self.states(input_ids, attention_mask)[:, 0] @ weight.T


def test_a_head_that_reads_its_weights_before_the_encoder_runs_has_them_as_they_are_now() -> None:
    model, inputs = built(ReadsItsWeightsFirst), inputs_of()
    fast = fastcls.optimize_encoder(model, select="first")
    with torch.no_grad():
        model.out.weight.mul_(-3)
    close(answer(fast, inputs), answer(model, inputs), 1e-5)


def test_a_head_can_be_trained_on_the_frozen_encoder() -> None:
    model, inputs = built(First), inputs_of()
    theirs = copy.deepcopy(model.state_dict())
    fast = fastcls.optimize_encoder(model, select="first").train()
    assert fast.dropout.training
    assert not fast.encoder.training
    optimizer = torch.optim.SGD([each for each in fast.parameters() if each.requires_grad], lr=0.1)
    fast(**inputs).sum().backward()
    optimizer.step()
    expected = theirs["out.weight"] - 0.1 * fast.out.weight.grad
    torch.testing.assert_close(fast.out.weight, expected)
    answer(fast.eval(), inputs)
    # What was learnt stays, and the given model does, too.
    torch.testing.assert_close(fast.out.weight, expected)
    assert all(torch.equal(model.state_dict()[name], each) for name, each in theirs.items())


@every_way_to_copy
@pytest.mark.parametrize("select", ["first", "all"])
def test_copies_have_weights_of_their_own(how: Callable[[Any], Any], select: Any) -> None:
    model, inputs = built(First), inputs_of()
    expected = answer(model, inputs)
    other = how(fastcls.optimize_encoder(model, select=select))
    for parameter in model.parameters():
        parameter.data.zero_()
    close(answer(other, inputs), expected, 1e-5)


def test_a_model_that_is_gone_leaves_its_weights() -> None:
    model, inputs = built(First), inputs_of()
    expected = answer(model, inputs)
    fast = fastcls.optimize_encoder(model, select="first")
    del model
    gc.collect()
    close(answer(fast, inputs), expected, 1e-5)


def test_the_last_layer_runs_for_first_rows_alone() -> None:
    model, inputs = built(First), inputs_of("all_tokens")
    counts = {}
    for select in ("first", "all"):
        chosen: Any = select
        fast = fastcls.optimize_encoder(model, select=chosen, pack_weights=False)
        answer(fast, inputs)
        with CountTokenProducts(4 * LENGTH) as counted:
            answer(fast, inputs)
        counts[select] = counted.count
    assert 0 < counts["first"] < counts["all"]


def refuses(model: Any, message: str, kind: type[Exception] = ValueError, **options: Any) -> None:
    with pytest.raises(kind, match=message):
        fastcls.optimize_encoder(model, **options)


class ReadsARow(OwnHead):
    """A head that reads what ``reading`` reads of the last hidden state."""

    reading: Callable[[Any, Tensor], Any]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return type(self).reading(self.states(input_ids, attention_mask), attention_mask)


READINGS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "another_row": (lambda states, _: states[:, 1], r"got \[:, 1\]"),
    "last_row": (lambda states, _: states[:, -1], r"got \[:, -1\]"),
    "some_rows": (lambda states, _: states[:, 1:], r"got \[:, 1:\]"),
    "all_rows": (lambda states, _: states[:, :], r"got \[:, :\]"),
    "a_text": (lambda states, _: states[0], r"got \[0\]"),
    "last_of_each": (lambda states, mask: states[torch.arange(4), mask.sum(1) - 1], r"got \[a Tensor, a Tensor\]"),
    "mean": (lambda states, _: states.mean(1), r"got mean"),
    "mean_by_function": (lambda states, _: torch.mean(states, 1), r"got mean"),
    "masked_mean": (lambda states, mask: (states * mask[..., None]).sum(1), r"got mul"),
    "masked_from_the_left": (lambda states, mask: (mask[..., None] * states).sum(1), r"got r?mul"),
    "product": (lambda states, _: torch.ones(1, LENGTH) @ states, r"got r?matmul"),
    "sum_with_dropout": (lambda states, _: nn.functional.dropout(states, 0.1, False).sum(1), r"got sum"),
    "concatenated": (lambda states, _: torch.cat((states, states), -1), r"got cat"),
    "norm": (lambda states, _: nn.LayerNorm(64)(states), r"got layer_norm"),
    "lstm": (lambda states, _: nn.LSTM(64, 8, batch_first=True)(states), r"got "),
    "loop": (lambda states, _: list(states), r"got iter"),
    "array": (lambda states, _: states.numpy(), r"got numpy"),
}


@pytest.mark.parametrize("reading", list(READINGS))
def test_rows_that_were_not_computed_cannot_be_read(reading: str) -> None:
    read, told = READINGS[reading]
    model = built(type("Reads", (ReadsARow,), {"reading": staticmethod(read)}))
    fast = fastcls.optimize_encoder(model, select="first")
    with pytest.raises((ValueError, AttributeError), match=rf"may read last_hidden_state\[:, 0\] alone, {told}"):
        fast(**inputs_of())


def test_first_rows_have_the_shape_of_all() -> None:
    rows = torch.randn(4, 1, 8)
    first = FirstRow(rows, LENGTH)
    assert (first.shape, first.size(), first.size(1), first.dim(), first.ndim, len(first)) == (
        *((4, LENGTH, 8), (4, LENGTH, 8), LENGTH, 3, 3, 4),
    )
    assert (first.dtype, first.device) == (rows.dtype, rows.device)
    assert repr(first) == "FirstRow of (4, 13, 8)"
    for actual, expected in (
        (first[:, 0], rows[:, 0]),
        (first[1:3, 0, :5], rows[1:3, 0, :5]),
        (first[:, 0:1], rows),
        (first[2, 0], rows[2, 0]),
        (first[torch.tensor([True, False, True, False]), 0], rows[[0, 2], 0]),
        (first[[3, 1], 0], rows[[3, 1], 0]),
    ):
        assert torch.equal(actual, expected)
    assert not hasattr(first, "__cuda_array_interface__")


class UnmaskedMean(OwnHead):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.out(self.states(input_ids, attention_mask).mean(1))


class UnmaskedMaximum(OwnHead):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.states(input_ids, attention_mask).max(1).values


class Convolved(OwnHead):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        states = self.states(input_ids, attention_mask)
        return nn.functional.conv1d(states.transpose(1, 2), torch.ones(3, 64, 3)).transpose(1, 2).amax(1)


class LastLabel(OwnHead):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.out(self.states(input_ids, attention_mask))[:, -1].argmax(-1).tolist()


@pytest.mark.parametrize("head", [UnmaskedMean, UnmaskedMaximum, Convolved, LastLabel])
def test_a_head_that_reads_padding_is_told_at_the_first_padded_batch(head: type[OwnHead]) -> None:
    fast = fastcls.optimize_encoder(built(head))
    fast(**inputs_of("all_tokens"))
    for _ in range(2):
        with pytest.raises(ValueError, match="must leave padding out by the attention mask"):
            fast(**inputs_of())
    fastcls.optimize_encoder(built(head), check_padding=False)(**inputs_of())


def test_first_rows_under_left_padding_are_refused() -> None:
    inputs = inputs_of()
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    with pytest.raises(ValueError, match="attention_mask must be 1 in its first column"):
        fastcls.optimize_encoder(built(First), select="first")(**inputs)
    with pytest.raises(ValueError, match="must leave padding out"):
        fastcls.optimize_encoder(built(First), select="all")(**inputs)


def test_padding_is_looked_at_once_and_leaves_random_numbers_alone() -> None:
    model, inputs = built(Mean), inputs_of()
    fast = fastcls.optimize_encoder(model)
    calls: list[Any] = []
    fast.encoder.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(3)
    expected = torch.rand(1)
    for count in (3, 4, 5):
        torch.manual_seed(3)
        answer(fast, inputs)
        assert torch.equal(torch.rand(1), expected)
        assert len(calls) == count


class Normed(OwnHead):
    def __init__(self, encoder: Any, labels: int = MANY_LABELS) -> None:
        super().__init__(encoder, labels)
        self.norm = nn.BatchNorm1d(64)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        states = self.states(input_ids, attention_mask)
        return self.out(self.norm(states[:, 0]))


def test_padding_is_not_looked_at_while_a_head_is_trained() -> None:
    fast = fastcls.optimize_encoder(built(Normed)).train()
    fast(**inputs_of())
    assert int(fast.norm.num_batches_tracked) == 1


@pytest.mark.parametrize("select", ["first", "all"])
def test_a_model_in_training_mode_and_a_copy_in_another_dtype(select: Any) -> None:
    model, inputs = built(First), inputs_of()
    fast = fastcls.optimize_encoder(model.train(), select=select)
    assert not any(each.training for each in fast.modules())
    assert model.dropout.training
    model.eval()
    close(answer(fast, inputs), answer(model, inputs), 1e-5)
    fast.double()
    with torch.no_grad():
        model.out.weight.mul_(2)
        model.encoder.embeddings.word_embeddings.weight.mul_(1.5)
    close(answer(fast, inputs), answer(copy.deepcopy(model).double(), inputs), 1e-12)


class UsesAPart(OwnHead):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:  # noqa: ARG002
        return self.encoder.embeddings(input_ids)


class UsesALayer(OwnHead):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return [layer(self.states(input_ids, attention_mask)) for layer in self.encoder.encoder.layer]


class UsesAPartUnseen(OwnHead):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:  # noqa: ARG002
        inner = self.encoder
        return inner.embeddings(input_ids)


class UsesItsOwnEncoderUnseen(OwnHead):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        inner = self.encoder
        return inner.encoder(torch.randn(*input_ids.shape, 64), attention_mask=attention_mask)


def test_submodules_of_the_encoder_are_refused_by_name() -> None:
    refuses(built(UsesAPart), r"UsesAPart.forward must not use the encoder's submodules, got encoder.embeddings")
    refuses(built(UsesALayer), r"UsesALayer.forward must not use the encoder's submodules, got encoder.encoder")
    fast = fastcls.optimize_encoder(built(UsesAPartUnseen))
    with pytest.raises(AttributeError, match=r"encoder.embeddings is not there: a head calls the encoder as a whole"):
        fast(**inputs_of())
    with pytest.raises((TypeError, AttributeError)):
        fastcls.optimize_encoder(built(UsesItsOwnEncoderUnseen))(**inputs_of())


def test_a_part_that_is_held_elsewhere_is_refused() -> None:
    model = built(First)
    model.words = model.encoder.embeddings.word_embeddings
    refuses(model, "model must hold encoder.embeddings.word_embeddings in its encoder alone")
    model = built(First)
    model.kept = [model.encoder.encoder.layer[1]]
    refuses(model, r"model must hold encoder.encoder.layer.1 in its encoder alone")


def test_what_a_trainer_gives_for_the_loss_may_reach_the_encoder() -> None:
    given = {"num_items_in_batch": torch.tensor(4)}
    model = built(type("Trained", (AsksFor,), {"asked": given})).double()
    fast, inputs = fastcls.optimize_encoder(model), inputs_of()
    with torch.no_grad():
        close(fast(**inputs).pooler_output, model(**inputs).pooler_output, 1e-12)


class AsksFor(OwnHead):
    asked: dict[str, Any]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.encoder(input_ids, attention_mask=attention_mask, **type(self).asked)


@pytest.mark.parametrize(
    ("asked", "kind", "told"),
    [
        ({"output_hidden_states": True}, ValueError, "output_hidden_states must be False"),
        ({"output_attentions": True}, ValueError, "output_attentions must be False"),
        ({"past_key_values": ((1,),)}, TypeError, "no argument past_key_values"),
        ({"encoder_hidden_states": torch.ones(1)}, TypeError, "no argument encoder_hidden_states"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_computed_cannot_be_asked_for(asked: dict[str, Any], kind: type[Exception], told: str) -> None:
    fast = fastcls.optimize_encoder(built(type("Asks", (AsksFor,), {"asked": asked})))
    with pytest.raises(kind, match=told):
        fast(**inputs_of())


@pytest.mark.skipif(IS_OLD, reason="earlier releases keep the option elsewhere")
def test_a_config_that_asks_for_hidden_states_is_refused() -> None:
    model = built(First)
    model.encoder.config.output_hidden_states = True
    refuses(model, "output_hidden_states must be False")


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.document = built(Mean), built(Mean)
        for parameter in self.document.parameters():
            parameter.data.mul_(1.2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.query(input_ids, attention_mask) * self.document(input_ids, attention_mask)


def test_an_encoder_among_several_has_to_be_named() -> None:
    towers, inputs = Towers().eval(), inputs_of()
    there = r"query.encoder \(BertModel\), document.encoder \(BertModel\)"
    refuses(towers, rf"name must say which of the encoders is to be fast, got None: there are {there}")
    refuses(towers, rf"name must lead to an encoder without a head, got 'query': there are {there}", name="query")
    refuses(towers, "name must lead to an encoder, got none", name=())
    one = fastcls.optimize_encoder(towers, name="document.encoder")
    assert type(one.query.encoder) is BertModel
    both = fastcls.optimize_encoder(towers, name=("query.encoder", "document.encoder"))
    assert isinstance(both.query.encoder, FastEncoder)
    with torch.no_grad():
        towers.query.out.weight.mul_(2)
        towers.query.encoder.embeddings.word_embeddings.weight.mul_(1.5)
        towers.document.encoder.encoder.layer[0].output.dense.weight.mul_(1.5)
    for fast in (one, both):
        close(answer(fast, inputs), answer(towers, inputs), 1e-5)


def test_one_encoder_under_two_names_stays_one() -> None:
    model, inputs = built(First), inputs_of()
    model.backbone = model.encoder
    fast = fastcls.optimize_encoder(model, select="first")
    assert fast.backbone is fast.encoder
    close(answer(fast, inputs), answer(model, inputs), 1e-5)


class Tied(OwnHead):
    def __init__(self, encoder: Any, labels: int = MANY_LABELS) -> None:
        super().__init__(encoder, labels)
        self.decoder = nn.Linear(64, 199, bias=False)
        self.decoder.weight = encoder.embeddings.word_embeddings.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.decoder(self.states(input_ids, attention_mask)[:, 0])


def test_a_weight_that_is_tied_to_the_encoders_follows() -> None:
    model, inputs = built(Tied), inputs_of()
    fast = fastcls.optimize_encoder(model, select="first")
    close(answer(fast, inputs), answer(model, inputs), 1e-5)
    with torch.no_grad():
        model.decoder.weight.mul_(1.5)
    close(answer(fast, inputs), answer(model, inputs), 1e-5)


def test_what_holds_no_encoder_is_refused() -> None:
    refuses(nn.Linear(3, 3), "model must hold an encoder, .* with no model of transformers")
    gpt = transformers.GPT2Model(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2))
    refuses(nn.Sequential(gpt), r"model must hold an encoder, .* with 0 \(.*GPT2Model\)")
    refuses(tiny_model("BertModel", "bert"), "which is one: give it to optimize", TypeError)
    refuses("bert", "model must be a torch module of your own", TypeError)
    refuses(torch.compile(built(First), backend="eager"), "model must be a torch module of your own", TypeError)
    refuses(built(First), "select must be 'all' or 'first', got 'mean'", select="mean")
    model = built(First)
    model.encoder.encoder.layer[0].register_forward_hook(lambda *_: None)
    refuses(model, "must have no forward hooks")


def test_an_encoder_whose_name_sounds_like_a_heads_is_taken() -> None:
    model, inputs = built(First, "roformer", "RoFormerModel"), inputs_of()
    close(answer(fastcls.optimize_encoder(model, select="first"), inputs), answer(model, inputs), 1e-5)
    with pytest.raises(TypeError, match=r"fastcls\.optimize_encoder makes the encoder inside it fast, encoder"):
        fastcls.optimize(model)


def test_optimize_says_where_own_heads_go(tagged: Tagged) -> None:
    for model in (tagged, built(First)):
        with pytest.raises(TypeError, match=r"fastcls.optimize_encoder makes the encoder inside it fast"):
            fastcls.optimize(model)


def test_in_a_compiled_graph() -> None:
    model, inputs = built(First), inputs_of()
    compiled = torch.compile(fastcls.optimize_encoder(model, select="first"), backend="eager")
    close(answer(compiled, inputs), answer(model, inputs), 1e-5)
    torch._dynamo.reset()


# Several heads.


def shared(*pairs: tuple[str, str], family: str = "bert", tie: bool = False) -> dict[str, Any]:
    """Models of the same encoder, with heads, and poolers, of their own."""
    models: dict[str, Any] = {}
    for index, (name, model_class) in enumerate(pairs):
        model = tiny_model(model_class, family, attn_implementation="eager", num_labels=2 + index)
        for key, parameter in model.named_parameters():
            if not key.startswith(model.base_model_prefix + ".") or "pooler" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        if models:
            ours, theirs = model.base_model, next(iter(models.values())).base_model
            for key, child in theirs._modules.items():
                if tie and key != "pooler":
                    ours._modules[key] = child
                elif key != "pooler":
                    ours._modules[key].load_state_dict(child.state_dict())
        models[name] = model
    return models


def expected_of(models: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    expected = {name: answer_of_logits(model, inputs) for name, model in models.items()}
    kept = inputs["attention_mask"][..., None]
    return {name: each * kept if each.ndim == 3 else each for name, each in expected.items()}


def assert_answers(several: Any, models: dict[str, Any], inputs: dict[str, Tensor], bound: float = 1e-5) -> None:
    logits, expected = several(**inputs).logits, expected_of(models, inputs)
    assert list(logits) == list(models)
    for name, each in expected.items():
        close(logits[name], each, bound)


SEQUENCES = (("topic", "BertForSequenceClassification"), ("toxic", "BertForSequenceClassification"))
MIXED = (*SEQUENCES, ("names", "BertForTokenClassification"), ("next", "BertForNextSentencePrediction"))


@pytest.mark.covering(alone=["mask", "pairs"])
@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("pairs", [SEQUENCES, MIXED, MIXED[::-1]], ids=["sequences", "mixed", "tokens_first"])
def test_several_models_answer_from_one_encoder(pairs: Any, mask: str) -> None:
    models = {name: model.double() for name, model in shared(*pairs).items()}
    assert_answers(fastcls.optimize_heads(models), models, inputs_of(mask), 1e-12)


@pytest.mark.parametrize("tie", [False, True], ids=["same_numbers", "same_tensors"])
def test_several_models_answer_as_exactly_as_each_in_bfloat16(tie: bool) -> None:
    models = {name: model.to(torch.bfloat16) for name, model in shared(*MIXED[:3], tie=tie).items()}
    lengths = torch.tensor([13, 3, 7, 1, 12, 13, 9, 8] * 8)
    inputs = {"input_ids": torch.randint(5, 199, (len(lengths), LENGTH))}
    inputs["attention_mask"] = (torch.arange(LENGTH) < lengths[:, None]).long()
    logits = fastcls.optimize_heads(models)(**inputs).logits
    eager = expected_of(models, inputs)
    exact = expected_of({name: copy.deepcopy(model).double() for name, model in models.items()}, inputs)
    for name, each in logits.items():
        assert_as_exact_as(each, [eager[name]], exact[name], name)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("modernbert", {"classifier_pooling": "mean"}),
        ("modernbert", {"classifier_pooling": "cls"}),
        ("eurobert", {"classifier_pooling": "late"}),
        ("deberta-v2", {}),
        ("distilbert", {}),
    ],
    ids=["modernbert-mean", "modernbert-cls", "eurobert-late", "deberta", "distilbert"],
)
def test_heads_of_other_families(family: str, options: dict[str, Any]) -> None:
    kind = {"modernbert": "ModernBert", "eurobert": "EuroBert", "deberta-v2": "DebertaV2", "distilbert": "DistilBert"}
    models: dict[str, Any] = {}
    for name in ("Sequence", "Token"):
        model = tiny_model(f"{kind[family]}For{name}Classification", family, attn_implementation="eager", **options)
        if models:
            model.base_model.load_state_dict(models["Sequence"].base_model.state_dict())
        models[name] = model
    assert_answers(fastcls.optimize_heads(models), models, inputs_of())


def test_the_encoder_is_computed_once() -> None:
    models, inputs = shared(*MIXED), inputs_of("all_tokens")
    several = fastcls.optimize_heads(models)
    calls: list[Any] = []
    several.encoder.encoder.register_forward_hook(lambda *_: calls.append(1))
    assert_answers(several, models, inputs)
    assert len(calls) == 1
    first, every = (fastcls.optimize_heads(shared(*pairs), pack_weights=False) for pairs in (SEQUENCES, MIXED))
    alone = fastcls.optimize(models["topic"], pack_weights=False)
    counts = []
    for each in (alone, first, every):
        each(**inputs)
        with CountTokenProducts(4 * LENGTH) as counted:
            each(**inputs)
        counts.append(counted.count)
    assert 0 < counts[0] == counts[1] < counts[2], "heads of first rows alone leave out the last layer's others"


def test_several_models_are_followed() -> None:
    models, inputs = shared(*MIXED[:3], tie=True), inputs_of()
    several = fastcls.optimize_heads(models)
    assert_answers(several, models, inputs)
    optimizer = torch.optim.AdamW(models["topic"].parameters(), lr=0.01)
    models["topic"](**inputs, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    optimizer.step()
    models["toxic"].classifier.bias = nn.Parameter(torch.full((3,), 5.0))
    with torch.no_grad():
        models["names"].classifier.weight.mul_(2)
    assert_answers(several, models, inputs)
    models["toxic"].classifier.weight.data.mul_(3)
    several.clear_caches()
    assert_answers(several, models, inputs)


def test_an_encoder_that_is_trained_apart_is_told() -> None:
    models, inputs = shared(*MIXED[:3]), inputs_of()
    several = fastcls.optimize_heads(models)
    several(**inputs)
    weight = models["toxic"].bert.encoder.layer[1].attention.self.key.weight
    with torch.no_grad():
        weight[3, 5] += 1
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match=r"models\['toxic'\] must have the first model's encoder, got other numbers in "
            r"bert.encoder.layer.1.attention.self.key.weight",
        ):
            several(**inputs)
    with torch.no_grad():
        weight.copy_(models["topic"].bert.encoder.layer[1].attention.self.key.weight)
    assert_answers(several, models, inputs)


def test_other_encoders_are_refused() -> None:
    def refused(models: Any, told: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=told):
            fastcls.optimize_heads(models)

    models = shared(*SEQUENCES)
    models["toxic"].bert.embeddings.word_embeddings.weight.data[7, 3] += 1
    refused(models, r"models\['toxic'\] .* got other numbers in bert.embeddings.word_embeddings.weight")
    models = shared(*SEQUENCES)
    models["toxic"].bert.encoder.layer[2].attention.self.value.bias.data[3] += 1
    refused(models, r"got other numbers in bert.encoder.layer.2.attention.self.value.bias")
    other = tiny_model("BertForSequenceClassification", "bert", num_hidden_layers=2)
    refused({"a": shared(*SEQUENCES)["topic"], "b": other}, r"models\['b'\] .* got layers \(0, 1\) and not \(0, 1, 2\)")
    models = shared(*SEQUENCES)
    refused(
        {**models, "toxic": models["toxic"].double()}, "got bert.*weight of torch.float64 on cpu and not torch.float32"
    )
    filler = tiny_model("BertForMaskedLM", "bert")
    refused({"filler": filler}, r"models\['filler'\] must be for one of .*, got one for masked language modelling")
    refused({"a": tiny_model("BertModel", "bert")}, "got one for encoder")
    refused({"a": nn.Linear(3, 3)}, "model must be", TypeError)
    refused({}, "there must be a dict with at least one head")
    refused({"a.b": models["topic"]}, "a head's name must be one that a torch module can have, got 'a.b'")
    refused({"keys": models["topic"]}, "got 'keys'")


@every_way_to_copy
def test_copies_of_several_heads_have_weights_of_their_own(how: Callable[[Any], Any]) -> None:
    models, inputs = shared(*MIXED[:3]), inputs_of()
    several = fastcls.optimize_heads(models)
    models["toxic"].classifier.bias = nn.Parameter(torch.full((3,), 5.0))
    other = how(several)
    expected = expected_of(models, inputs)
    for model in models.values():
        for parameter in model.parameters():
            parameter.data.zero_()
    for name, each in other(**inputs).logits.items():
        close(each, expected[name], 1e-5)


def test_state_dicts_of_several_heads_round_trip_and_leave_the_models_alone() -> None:
    models, others, inputs = shared(*MIXED[:3]), shared(*MIXED[:3]), inputs_of()
    for name, model in others.items():
        with torch.no_grad():
            model.base_model.embeddings.word_embeddings.weight.mul_(1.5)
            model.classifier.weight.mul_(2 if name == "topic" else 3)
    several = fastcls.optimize_heads(models)
    before = expected_of(models, inputs)
    with pytest.warns(RuntimeWarning, match="follows that model no longer"):
        several.load_state_dict(fastcls.optimize_heads(others).state_dict())
    assert_answers(several, others, inputs)
    after = expected_of(models, inputs)
    assert all(torch.equal(after[name], each) for name, each in before.items())


def test_several_heads_go_on_without_the_models() -> None:
    models, inputs = shared(*MIXED[:3]), inputs_of()
    expected = expected_of(models, inputs)
    several = fastcls.optimize_heads(models)
    several.stop_following()
    for model in models.values():
        for parameter in model.parameters():
            parameter.data.zero_()
    gone = fastcls.optimize_heads(models := shared(*MIXED[:3]))
    models.clear()
    gc.collect()
    for each in (several, gone):
        for name, logits in each(**inputs).logits.items():
            close(logits, expected[name], 1e-5)


def test_texts_without_tokens_and_left_padding() -> None:
    inputs = inputs_of()
    inputs["attention_mask"][2] = 0
    for pairs in (SEQUENCES, MIXED[:3]):
        logits = fastcls.optimize_heads(shared(*pairs))(**inputs).logits
        assert logits["topic"][2].isnan().all()
        assert logits["topic"][[0, 1, 3]].isfinite().all()
        assert "names" not in logits or bool((logits["names"][2] == 0).all())
        inputs["attention_mask"][1] = torch.tensor(MASKS["right_padding"][1]).flip(0)
        with pytest.raises(ValueError, match="attention_mask must be 1 in its first column"):
            fastcls.optimize_heads(shared(*pairs))(**inputs)
        inputs["attention_mask"][1] = torch.tensor(MASKS["right_padding"][1])


@pytest.fixture
def own_heads() -> tuple[Any, dict[str, nn.Module]]:
    torch.manual_seed(0)
    encoder = tiny_model("BertModel", "bert", attn_implementation="eager").double()
    heads: dict[str, nn.Module] = {name: nn.Linear(64, 4).double() for name in ("first", "mean", "all")}
    return encoder, heads


@pytest.mark.parametrize("mask", list(MASKS))
def test_modules_of_ones_own_on_one_encoder(own_heads: tuple[Any, dict[str, nn.Module]], mask: str) -> None:
    (encoder, heads), inputs = own_heads, inputs_of(mask)
    several = fastcls.MultiHead(fastcls.optimize(encoder), heads, rows={name: name for name in heads})  # type: ignore[misc]
    with torch.no_grad():
        encoder.embeddings.word_embeddings.weight.mul_(1.1)
        states, kept = encoder(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        rows = {"first": states[:, 0], "mean": (states * kept).sum(1) / kept.sum(1), "all": states * kept}
        for name, logits in several(**inputs).logits.items():
            close(logits, heads[name](rows[name]), 1e-12)
    several.train()
    several(**inputs).logits["mean"].sum().backward()
    assert heads["mean"].weight.grad is not None
    assert not several.encoder.training


def test_what_several_heads_cannot_be(own_heads: tuple[Any, dict[str, nn.Module]]) -> None:
    encoder, heads = own_heads
    fast, make = fastcls.optimize(encoder), fastcls.MultiHead
    with pytest.raises(TypeError, match=r"encoder must be what fastcls.optimize makes of an encoder, got .*BertModel"):
        make(encoder, heads)
    with pytest.raises(TypeError, match=r"heads\['a'\] must be a torch module, got builtins.str"):
        make(fast, {"a": "linear"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="rows must name the heads first, mean, all, got first"):
        make(fast, heads, rows={"first": "first"})
    with pytest.raises(ValueError, match="rows of 'first' must be one of first, mean, all, got 'last'"):
        make(fast, heads, rows="last")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes no argument labels"):
        make(fast, heads)(**inputs_of(), labels=torch.tensor([1, 0, 1, 0]))
