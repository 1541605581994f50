"""Weights that `fully_shard` has spread: here over one process, which gathers and lets go as several do.

test_training_processes.py trains in two.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import tiny_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastcls

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"
)

CLASSIFIER = "BertForSequenceClassification"
LAYERS = tuple(f"bert.encoder.layer.{index}" for index in range(3))


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


def quiet(model_class: str = CLASSIFIER) -> Any:
    return tiny_model(model_class, "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def spread(model: Any, parts: Sequence[str]) -> Any:
    mesh = init_device_mesh("cpu", (1,))
    for part in (*parts, ""):
        fully_shard(model.get_submodule(part), mesh=mesh)
    return model


def inputs_of(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(9) < torch.tensor([9, 1, 6, 4])[:, None]).long()
    return {"input_ids": torch.randint(5, 60, mask.shape, generator=generator), "attention_mask": mask}


def labelled(seed: int = 0) -> dict[str, Tensor]:
    return {**inputs_of(seed), "labels": torch.tensor([0, 2, 1, 0])}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients, whole."""
    found = {}
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            whole: Any = weight.grad
            found[name] = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
    return found


def assert_gradients_alike(found: nn.Module, expected: nn.Module) -> None:
    ours, theirs = gradients(found), gradients(expected)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("between", ["passes", "eval", "no_grad"])
@pytest.mark.parametrize("parts", [(), LAYERS], ids=["whole", "layers"])
def test_passes_between_a_pass_and_its_gradients(parts: Sequence[str], between: str) -> None:
    model = quiet()
    reference, fast = model.train(), spread(fastcls.optimize(copy.deepcopy(model)).train(), parts)
    for each in (reference, fast):
        total = each(**labelled(0)).loss
        if between == "passes":
            total = total + each(**labelled(1)).loss
        else:
            each.train(between == "no_grad")
            with torch.no_grad():
                each(**inputs_of(1))
            each.train()
        total.backward()
    assert_gradients_alike(fast, reference)


@pytest.mark.parametrize("part", ["pooler", "encoder.layer.0", "embeddings"])
def test_a_pooler_reads_weights_that_are_whole(part: str) -> None:
    model = quiet("BertModel")
    reference, fast = (fastcls.optimize(copy.deepcopy(model)).train() for _ in range(2))
    spread(fast, [part])
    for each in (reference, fast):
        each(**inputs_of()).pooler_output.sin().sum().backward()
    assert_gradients_alike(fast, reference)
    with torch.no_grad():
        found, expected = (each.eval()(**inputs_of()).pooler_output for each in (fast, reference))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("parts", [(), LAYERS], ids=["whole", "layers"])
@pytest.mark.parametrize("trains_first", [False, True])
def test_weights_that_are_loaded_after_the_model_is_spread(parts: Sequence[str], trains_first: bool) -> None:
    model = quiet()
    reference = fastcls.optimize(copy.deepcopy(model)).train()
    fast = spread(fastcls.optimize(quiet()).train().to("meta"), parts)
    fast.to_empty(device="cpu")
    set_model_state_dict(fast, reference.state_dict(), options=StateDictOptions(full_state_dict=True))
    fast.to("cpu")
    if trains_first:
        for each in (reference, fast):
            each(**labelled()).loss.backward()
        assert_gradients_alike(fast, reference)
    with torch.no_grad():
        found, expected = (each.eval()(**inputs_of()).logits for each in (fast, reference))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_model_that_is_spread_for_inference_is_moved() -> None:
    model = quiet().eval()
    fast = spread(fastcls.optimize(model), ())
    fast.to("cpu")
    with torch.no_grad():
        torch.testing.assert_close(fast(**inputs_of()).logits, model(**inputs_of()).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("part", ["classifier", f"{LAYERS[0]}.attention.self.query", "lora_A"])
def test_peft_modules_are_spread_by_themselves(part: str) -> None:
    peft = pytest.importorskip("peft", reason="adapters need peft, which is not installed")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(quiet(), config)
    name = f"{LAYERS[0]}.attention.self.query.lora_A.default" if part == "lora_A" else part
    reference = fastcls.optimize(copy.deepcopy(adapted)).train()
    fast = spread(fastcls.optimize(adapted).train(), [f"base_model.model.{name}"])
    for each in (reference, fast):
        optimizer = torch.optim.SGD([weight for weight in each.parameters() if weight.requires_grad], lr=0.1)
        for step in range(2):
            each(**labelled(step)).loss.backward()
            optimizer.step()
    assert_gradients_alike(fast, reference)
    for is_off in (False, True):
        logits = []
        for each in (reference, fast):
            each.eval()
            if is_off:
                each.base_model.disable_adapter_layers()
            with torch.no_grad():
                logits.append(each(**inputs_of()).logits)
        torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=0)
