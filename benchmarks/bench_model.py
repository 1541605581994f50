"""The whole model: every provider on one batch of SST-2, checked before it is timed."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from transformers import BertForSequenceClassification

from .conftest import Timed
from .providers import PROVIDERS, Provider
from .verify import Reference
from .workloads import MODELS, WORKLOADS, Batch, UnavailableError, load_model

WORKLOAD = "sst2-32"
BY_DEFAULT = [provider for provider in PROVIDERS.values() if provider.by_default]


class Subject(NamedTuple):
    name: str
    model: BertForSequenceClassification
    batch: Batch
    reference: Reference


@pytest.fixture(scope="module", params=list(MODELS))
def subject(request: pytest.FixtureRequest, device: torch.device) -> Subject:
    try:
        model = load_model(request.param, device)
        batch = WORKLOADS[WORKLOAD].batches()[0]
    except UnavailableError as error:
        pytest.skip(str(error))
    return Subject(request.param, model, batch, Reference(model, [batch]))


@pytest.mark.benchmark(min_rounds=3, max_time=0.5)
@pytest.mark.parametrize("provider", BY_DEFAULT, ids=lambda provider: provider.name)
def test_forward(
    provider: Provider, subject: Subject, device: torch.device, timed: Timed, benchmark: BenchmarkFixture
) -> None:
    missing = provider.available(device)
    if missing:
        pytest.skip(missing)
    forward = provider.load(subject.model).forward
    verdict = subject.reference.check(provider, forward)
    assert verdict.passed, verdict.reason
    benchmark.group = f"{subject.name}, {WORKLOAD}"
    timed(lambda: forward(subject.batch))
