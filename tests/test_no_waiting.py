"""Nothing on the way from packed tokens to logits waits for the GPU.

Without a GPU the pass runs on tensors that hold no data, its kernels' launches left out: whatever would read a value,
as a wait for the device does, finds none and fails. With a GPU torch's own detector watches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from support import tiny_bert

import fastcls
from fastcls import FastClassifier
from fastcls.engine.spec import LastLayer

RUNGS = get_args(LastLayer)
TEXTS = [[5, 6, 7], [8] * 20, [9]]


@pytest.mark.parametrize("last_layer", RUNGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pass_reads_no_value(launches: list[Any], last_layer: LastLayer, dtype: torch.dtype) -> None:
    fast = fastcls.optimize(tiny_bert().to(dtype), last_layer=last_layer)
    (packed,) = fast.pack(TEXTS)
    fast = fast.to("meta")
    with torch.no_grad():
        logits = fast._compute(packed.to(torch.device("meta")), "first", last_layer)
    assert logits.shape == (3, 3)
    assert len(launches) >= 3


@pytest.fixture
def watched() -> Iterator[FastClassifier]:
    """A classifier on the GPU whose shapes have all been seen; from here on every wait is an error."""
    fast = fastcls.optimize(tiny_bert().to(device="cuda", dtype=torch.bfloat16))
    for _ in range(3):
        fast.logits_of(TEXTS)
        fast(**padded())
        fast(**padded("cuda"))
    yield fast
    torch.cuda.set_sync_debug_mode("default")


def padded(device: str = "cpu") -> dict[str, torch.Tensor]:
    width = max(map(len, TEXTS))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in TEXTS], device=device)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no_graphs"])
@pytest.mark.parametrize("last_layer", RUNGS)
def test_nothing_waits_for_the_gpu(watched: FastClassifier, last_layer: LastLayer, graphs: bool) -> None:
    watched.cuda_graphs = graphs
    watched.last_layer = last_layer
    (packed,) = watched.pack(TEXTS)
    inputs = padded()
    for _ in range(3):
        # Compiling and capturing may wait.
        watched.forward_packed(packed)
        watched(**inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    watched.forward_packed(packed)
    watched.logits_of(TEXTS)
    watched(**inputs)


@pytest.mark.gpu
def test_inputs_on_the_gpu_are_waited_for_once(watched: FastClassifier, recwarn: pytest.WarningsRecorder) -> None:
    inputs = padded("cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    watched(**inputs)
    torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in recwarn if "synchroniz" in str(warning.message)]
    assert len(waits) == 1, waits
