"""Steps of fine-tuning: what computes other gradients is not timed, and less memory is seen to be less."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_benchmarks import CPU, TINY, Silent, TinyWorkload, new_report, text_of
from torch import Tensor, nn

from fastcls_benchmarks import first_call, roofline, runner, suites, training
from fastcls_benchmarks.provider import Loaded, Model, Provider
from fastcls_benchmarks.providers import EAGER, FASTCLS, PACKED, SDPA
from fastcls_benchmarks.results import AGAIN, Case
from fastcls_benchmarks.suites import FirstCallPlan, Plan, Suite
from fastcls_benchmarks.tables import render
from fastcls_benchmarks.training import TRAINING_PROVIDERS, Way
from fastcls_benchmarks.workloads import MASK_ID, MODELS, Batch, Workload, build_model, config_of

WORKLOAD = TinyWorkload(4, "sst2")


@pytest.fixture(autouse=True)
def tiny_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan may name the model "tiny"; the machine's own rates, whose products take seconds, are not measured."""
    monkeypatch.setitem(MODELS, "tiny", TINY)
    monkeypatch.setattr(roofline, "measured_rates", lambda *_: [])


def plan_of(*providers: Provider) -> Plan:
    return Plan("train", "tiny", WORKLOAD, torch.float32, providers, 0.0)


def broken(change: Callable[[Way], Way]) -> Provider:
    """transformers, changed."""
    right = TRAINING_PROVIDERS[SDPA.name]
    return dataclasses.replace(right, name="broken", load=lambda model: Loaded(change(way_of(right, model))))


def way_of(provider: Provider, model: Model) -> Way:
    way = provider.load(model).forward
    assert isinstance(way, Way)
    return way


def tiny(name: str, **options: Any) -> Way:
    return way_of(TRAINING_PROVIDERS[name], build_model("tiny", CPU, torch.float32, **options))


@pytest.mark.full
@pytest.mark.parametrize("is_there", [True, False])
def test_steps_with_adapters(is_there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_there:
        pytest.importorskip("peft", reason="adapters need peft, which is not installed")
    else:
        monkeypatch.setattr(runner, "not_installed", lambda *names: f"{' and '.join(names)} not installed")
    adapters = {"r": 2, "target_modules": ["query", "value"]}
    monkeypatch.setitem(MODELS, "tiny", dataclasses.replace(TINY, adapters=adapters))
    names = (SDPA.name, FASTCLS.name)
    report, plan = new_report("train"), plan_of(*(TRAINING_PROVIDERS[name] for name in names))
    runner.run(Suite("tiny", (plan,), (), 0.0), report, CPU, Silent())
    (case,) = report.cases
    expected = ("timed", "") if is_there else ("unavailable", "peft not installed")
    assert [(row.provider, row.status, row.detail) for row in case.rows] == [(name, *expected) for name in names]
    if is_there:
        theirs, ours = (row.step_bytes or 0 for row in case.rows)
        assert 0 < ours < theirs


def test_steps_are_timed_once_their_gradients_are_right() -> None:
    names = (SDPA.name, EAGER.name, PACKED.name, FASTCLS.name)
    report, plan = new_report("train"), plan_of(*(TRAINING_PROVIDERS[name] for name in names))
    runner.run(Suite("tiny", (plan,), (), 0.0), report, CPU, Silent())
    (case,) = report.cases
    assert case.name == "tiny, 4 x sst2, float32, training"
    assert [(row.provider, row.status, row.detail) for row in case.rows] == [(name, "timed", "") for name in names]
    assert case.seconds.keys() == {*names, SDPA.name + AGAIN}
    figures = report.figures().set_index("provider")
    assert (figures.difference.between(1e-8, 1e-5)).all()
    assert (figures.tokens > 0).all()
    assert figures.step_bytes[FASTCLS.name] < figures.step_bytes[PACKED.name] < figures.step_bytes[SDPA.name]
    text = text_of(*render(report))
    assert text.split("provider  ")[1].split("\n")[0].split()[-4:] == ["tokens/s", "MiB", "gradient", "off"]
    (shown,) = (line.split() for line in text.splitlines() if line.startswith(f" {FASTCLS.name} "))
    assert float(shown[-2]) == pytest.approx(figures.step_bytes[FASTCLS.name] / 2**20, rel=0.01)
    assert max(map(len, text.splitlines())) <= 100


def scaled(way: Way) -> Way:
    return Way(way.module, lambda batch: way.loss(batch) + 1e-3 * (loss := way.loss(batch)) - 1e-3 * loss.detach())


def shifted(way: Way) -> Way:
    return Way(way.module, lambda batch: way.loss(batch) + 1e-3)


def without_one(way: Way) -> Way:
    next(way.module.parameters()).requires_grad_(False)
    return way


def not_a_number(way: Way) -> Way:
    return Way(way.module, lambda batch: way.loss(batch) * torch.nan)


def with_padding(way: Way) -> Way:
    def loss(batch: Batch) -> Tensor:
        return way.loss({**batch, "attention_mask": torch.ones_like(batch["attention_mask"])})

    return Way(way.module, loss)


@pytest.mark.full
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (scaled, "gradients differ by 1.0e-03 of their norm"),
        (without_one, "gradients differ by"),
        (shifted, "the loss is off by 1.0e-03"),
        (with_padding, "the loss is off by"),
        (not_a_number, "the loss or the gradients are not finite"),
    ],
)
def test_wrong_way_is_not_timed(change: Callable[[Way], Way], reason: str) -> None:
    plan = plan_of(TRAINING_PROVIDERS[SDPA.name], broken(change))
    case = runner.new_case(plan)
    runner.measure_training(case, plan, CPU, lambda _: None)
    row = case.row("broken")
    assert row is not None
    assert (row.status, row.detail[: len(reason)]) == ("failed", reason)
    assert case.seconds.keys() == {SDPA.name, SDPA.name + AGAIN}


def test_a_step_moves_the_weights_in_inference_mode_too() -> None:
    (batch,) = training.batches("tiny", WORKLOAD, 1)
    for name in (SDPA.name, PACKED.name, FASTCLS.name):
        way = tiny(name)
        before = {name: weight.detach().clone() for name, weight in way.module.named_parameters()}
        with torch.inference_mode():
            assert way(batch).isfinite()
        moved = [name for name, weight in way.module.named_parameters() if not torch.equal(weight, before[name])]
        ends = ("word_embeddings.weight", "classifier.weight")
        assert all(any(name.endswith(end) for name in moved) for end in ends), name
        assert all(weight.grad is None for weight in way.module.parameters()), "an earlier step's would be added to"


def test_memory_is_what_the_backward_pass_reads_but_the_weights() -> None:
    layer, rows = nn.Linear(5, 3), torch.ones(7, 5, requires_grad=True)
    kept = training.kept_tensors(layer, lambda: layer(rows).exp().sum())
    # The input and the exponentials.
    assert sorted(each.shape for each in kept) == [(7, 3), (7, 5)]


def test_dropout_is_the_configs_but_for_the_check() -> None:
    (batch,) = training.batches("tiny", WORKLOAD, 1)
    for name, drops in ((SDPA.name, True), (PACKED.name, False), (FASTCLS.name, True)):
        for options in ({}, training.without_dropout("tiny")):
            losses = {way.loss(batch).item() for way in [tiny(name, **options)] for _ in range(2)}
            assert (len(losses) == 2) == (drops and not options), name
    # Of ESM one option that is named so is no rate.
    assert training.without_dropout("esm2-35m").keys() == {"hidden_dropout_prob", "attention_probs_dropout_prob"}


@pytest.mark.parametrize("name", ["bert-base-fill", "minilm-l6-reranker", "minilm-l6"])
def test_labels_are_those_of_the_task(name: str) -> None:
    config: Any = config_of(name)
    for batch in training.batches(name, Workload(4, "sst2"), 2):
        labels = batch["labels"]
        if name == "bert-base-fill":
            assert torch.equal(labels >= 0, batch["input_ids"] == MASK_ID)
            assert int(labels.max()) < config.vocab_size
        else:
            assert labels.shape == (4,)
            assert labels.is_floating_point() == (config.num_labels == 1)


def test_asked_for_cases_are_steps_too() -> None:
    like = suites.suite("train", CPU)
    plans = suites.custom(like, ["deberta-v3-base"], [8], ["16", "64"], [FASTCLS.name, SDPA.name], []).plans
    expected = (TRAINING_PROVIDERS[EAGER.name], TRAINING_PROVIDERS[FASTCLS.name])
    assert [(plan.kind, plan.providers) for plan in plans] == [("train", expected)] * 2
    # The baseline comes first, since the others' errors are told by its own.
    names = [each.name for each in suites.providers_of("train", "bert-base", [FASTCLS.name, SDPA.name])]
    assert names == [SDPA.name, FASTCLS.name]


@pytest.mark.full
def test_peak_of_a_step_is_measured_in_a_process_of_its_own() -> None:
    plan = FirstCallPlan("minilm-l6", Workload(8, "sst2"), torch.float32, TRAINING_PROVIDERS[FASTCLS.name], True)
    found = first_call.measure(plan, "cpu", 1)
    assert found.detail == ""
    gradients = 4 * sum(weight.numel() for weight in build_model("minilm-l6", CPU, torch.float32).parameters())
    assert found.peak_bytes is None or found.peak_bytes > gradients


def test_case_of_steps_is_no_latency() -> None:
    assert not Case("train", "tiny", "1 x sst2", "float32", SDPA.name, 1).is_latency
