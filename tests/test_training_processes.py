"""Several processes that share the batches train as one process trains on whole ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from aot_worker import run_worker
from processes_worker import Way, prepared, train

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without gloo, by which processes on a CPU speak to each other",
)


def found_by(*ways: Way) -> list[dict[str, Any]]:
    """What the first of two processes finds in each way."""
    given = [json.dumps(way._asdict()) for way in ways]
    found = run_worker("processes_worker.py", *given)
    for each in found.values():
        assert "error" not in each, each["error"]
    return [found[each] for each in given]


def assert_losses_of_one_process(found: dict[str, Any], way: Way) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = train(prepared(way), way)
    finally:
        torch.set_num_threads(threads)
    assert len(found["losses"]) == way.steps
    assert found["losses"] == pytest.approx(expected, rel=1e-5)


def test_halves_of_batches_in_two_processes() -> None:
    ways = (
        Way("ddp"),
        Way("ddp", accumulated=2, steps=20),
        Way("ddp", frozen="bert.embeddings", steps=10),
        Way("ddp", "ModernBertForMaskedLM", "modernbert", steps=10),
    )
    for found, way in zip(found_by(*ways), ways, strict=True):
        assert_losses_of_one_process(found, way)
        assert found["are_equal"]
        assert found["has_keys"]
        assert found["is_loaded"]
