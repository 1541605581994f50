"""Several processes that share the batches train as one process trains on whole ones."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import torch
from aot_worker import run_worker
from processes_worker import PROCESSES, Way, prepared, train

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
    assert len(expected) >= way.steps
    assert found["losses"] == pytest.approx(expected, rel=1e-5)


LAYERS = tuple(f"bert.encoder.layer.{index}" for index in range(2))
ADAPTED = tuple(f"base_model.model.{name}" for name in LAYERS)
# One of each kind; the processes of all of them are forked by one parent, whose imports take longer than many steps.
WAYS = {
    "ddp": Way("ddp", evaluated=10),
    "ddp_accumulated": Way("ddp", accumulated=2, steps=5),
    "fsdp": Way("fsdp", steps=5, evaluated=2),
    "fsdp_layers": Way("fsdp", parts=LAYERS, evaluated=2),
    "fsdp_groups": Way("fsdp", parts=("bert.embeddings", LAYERS, "classifier"), accumulated=2, steps=10),
    "peft": Way("fsdp", adapted=True, parts=ADAPTED, steps=10, evaluated=3),
    "accelerate": Way("accelerate", parts=("BertLayer",), steps=10, evaluated=3),
}
LIBRARIES = ("peft", "accelerate")
REFUSED = Way("refused")
MORE_WAYS = {
    "ddp": (
        Way("ddp", accumulated=2, steps=20),
        Way("ddp", frozen="bert.embeddings", steps=10),
        Way("ddp", "ModernBertForMaskedLM", "modernbert", steps=10),
    ),
    "fsdp": (
        Way("fsdp", evaluated=2),
        Way("fsdp", accumulated=2, steps=20),
        Way("fsdp", frozen="bert.embeddings", steps=10),
        Way("fsdp", "BertForMaskedLM", steps=10),
        Way("fsdp", parts=(*LAYERS, "bert.encoder", "bert"), frozen="bert.encoder.layer.1", steps=10, evaluated=3),
        Way("fsdp", "ModernBertForMaskedLM", "modernbert", parts=("model.layers.0", "head"), steps=10, evaluated=3),
    ),
    "peft": (Way("ddp", adapted=True, steps=10),),
    "accelerate": (
        Way("accelerate", "ModernBertForMaskedLM", "modernbert", parts=("ModernBertEncoderLayer",), steps=10),
        Way("accelerate_meta", parts=("BertLayer",), steps=10, evaluated=3),
        Way("accelerate_meta", "ModernBertForMaskedLM", "modernbert", parts=("ModernBertEncoderLayer",), steps=10),
    ),
}


@pytest.fixture(scope="module")
def found() -> dict[Way, dict[str, Any]]:
    """What is found in each way whose library is installed, and what is refused."""
    ways = [way for name, way in WAYS.items() if name not in LIBRARIES or importlib.util.find_spec(name)]
    return dict(zip([*ways, REFUSED], found_by(*ways, REFUSED), strict=True))


def assert_is_trained_as_in_one_process(found: dict[str, Any], way: Way) -> None:
    assert_losses_of_one_process(found, way)
    assert found["are_equal"]
    assert found["has_keys"]
    assert found["is_loaded"]


@pytest.mark.full
@pytest.mark.parametrize("name", WAYS)
def test_halves_of_batches_in_two_processes(found: dict[Way, dict[str, Any]], name: str) -> None:
    if name in LIBRARIES:
        pytest.importorskip(name, reason=f"needs {name}, which is not installed")
    assert_is_trained_as_in_one_process(found[WAYS[name]], WAYS[name])


@pytest.mark.full
@pytest.mark.parametrize("name", MORE_WAYS)
def test_halves_of_batches_in_two_processes_in_more_ways(name: str) -> None:
    if name in LIBRARIES:
        pytest.importorskip(name, reason=f"needs {name}, which is not installed")
    for found, way in zip(found_by(*MORE_WAYS[name]), MORE_WAYS[name], strict=True):
        assert_is_trained_as_in_one_process(found, way)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < PROCESSES, reason="each of two processes needs a GPU of its own")
@pytest.mark.parametrize(("wrapper", "parts"), [("ddp", ()), ("fsdp", ()), ("fsdp", LAYERS)])
def test_halves_of_batches_on_two_gpus(wrapper: str, parts: tuple[str, ...]) -> None:
    way = Way(wrapper, parts=parts, evaluated=5, device="cuda")
    (found,) = found_by(way)
    assert_losses_of_one_process(found, way)
    assert found["are_equal"]
    assert found["is_loaded"]


@pytest.mark.full
def test_what_fully_shard_cannot_be_followed_in_is_refused(found: dict[Way, dict[str, Any]]) -> None:
    expected = {
        "parts_alone": "fully_shard must be called on the fast model, too",
        "parts_alone_in_eval_mode": "fully_shard must be called on the fast model, too",
        "hooked": "model.bert.encoder.layer.1 must have no hooks",
        "hooked_in_eval_mode": "model.bert.encoder.layer.1 must have no forward hooks",
        "narrow_parts": "mp_policy.param_dtype of fully_shard must be None or torch.float32",
        "narrow_outputs": "mp_policy.output_dtype of fully_shard must be None on parts of a model",
        "original": "call fully_shard on the fast model",
        "too_early": "fully_shard must be called after train()",
        "narrow": "mp_policy.param_dtype of fully_shard must be None or torch.float32",
        "narrow_in_eval_mode": "mp_policy.param_dtype of fully_shard must be None or torch.float32",
        "lists": "must be called as a whole",
        "saved": "state_dict must be given to save_pretrained",
    }
    refused = found[REFUSED]["refused"]
    assert refused.keys() == expected.keys()
    for name, words in expected.items():
        assert words in refused[name], name
