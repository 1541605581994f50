"""Who is measured: each provider takes a transformers model and gives a function from a batch to its logits.

Every provider works on a copy of the model, in eval mode and without gradients, and takes batches as the tokenizer
leaves them: on the CPU.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import fastcls
from fastcls.encoder import LastLayer

from .work import Flops, absorbed_flops, padded_flops, selected_flops, useful_flops
from .workloads import Batch

Forward = Callable[[Batch], Tensor]


class Loaded(NamedTuple):
    """A provider ready to run, and what there is to say about how it was prepared."""

    forward: Forward
    detail: str = ""


def _always(_: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """One way to compute a model's logits.

    Attributes:
        name: as tables show it.
        bound: the largest difference of a logit from the float32 reference, for a float32 model.
        load: makes the function that is timed. It leaves the model that it is given as it was.
        flops: the matrix work that it does for a batch.
        available: the reason why it cannot run on a device, or None.
        by_default: whether it runs without being asked for.
    """

    name: str
    bound: float
    load: Callable[[BertForSequenceClassification], Loaded]
    flops: Flops
    available: Callable[[torch.device], str | None] = _always
    by_default: bool = True


def _transformers(model: BertForSequenceClassification, attention: str) -> BertForSequenceClassification:
    copied = copy.deepcopy(model).eval()
    copied.set_attn_implementation(attention)
    return copied


def _forward_of(model: Callable[..., Any], device: torch.device) -> Forward:
    """For modules that want their inputs where their weights are."""

    @torch.inference_mode()
    def forward(batch: Batch) -> Tensor:
        logits: Tensor = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
        return logits

    return forward


def load_eager(model: BertForSequenceClassification) -> Loaded:
    return Loaded(_forward_of(_transformers(model, "eager"), model.device))


def load_sdpa(model: BertForSequenceClassification) -> Loaded:
    return Loaded(_forward_of(_transformers(model, "sdpa"), model.device))


def load_compiled(model: BertForSequenceClassification) -> Loaded:
    return Loaded(_forward_of(torch.compile(_transformers(model, "sdpa"), dynamic=True), model.device))


def _compiler_missing(device: torch.device) -> str | None:
    if device.type != "cpu" or shutil.which(os.environ.get("CXX", "g++")):
        return None
    return "no C++ compiler found: install g++ or set CXX"


def _onnxruntime_missing(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "measured on the CPU only"
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    return f'{" and ".join(missing)} not installed: pip install -e ".[bench]"' if missing else None


def _onnxruntime_loader(optimize: bool) -> Callable[[BertForSequenceClassification], Loaded]:
    """ONNX Runtime with as many threads as torch, after its own transformer optimizer or as exported."""

    def load(model: BertForSequenceClassification) -> Loaded:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            # The optimizer knows eager attention's graph; of sdpa's it fuses neither attention nor embeddings.
            _export(model, "eager" if optimize else "sdpa", path)
            detail = f"fused: {_fuse(model.config, path)}" if optimize else ""
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]

        def forward(batch: Batch) -> Tensor:
            (logits,) = session.run(None, {name: batch[name].numpy() for name in names})
            return torch.from_numpy(logits)

        return Loaded(forward, detail)

    return load


def _export(model: BertForSequenceClassification, attention: str, path: Path) -> None:
    """Writes the graph that torch's older exporter makes: the newer one's is foreign to ONNX Runtime's optimizer."""
    exported = _transformers(model, attention)
    exported.config.return_dict = False
    names = ["input_ids", "attention_mask", "token_type_ids"]
    ids = torch.ones(2, 8, dtype=torch.int64)
    axes = {name: {0: "batch", 1: "length"} for name in names} | {"logits": {0: "batch"}}
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            exported,
            (ids, ids, torch.zeros_like(ids)),
            path,
            input_names=names,
            output_names=["logits"],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )


def _fuse(config: BertConfig, path: Path) -> str:
    """Optimizes the graph in place; returns what it fused, counted.

    Raises:
        RuntimeError: attention, embeddings, layer norms or GELUs were left unfused: the peer is not at its best.
    """
    from onnxruntime.transformers.optimizer import optimize_model

    optimized = optimize_model(
        str(path), model_type="bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size
    )
    fused = {name: count for name, count in optimized.get_fused_operator_statistics().items() if count}
    layers = config.num_hidden_layers
    expected = {
        "EmbedLayerNormalization": 1,
        "Attention": layers,
        "SkipLayerNormalization": 2 * layers,
        "BiasGelu": layers,
    }
    if fused != expected:
        raise RuntimeError(f"ONNX Runtime's optimizer should fuse {expected}, but fused {fused}")
    optimized.save_model_to_file(str(path))
    return ", ".join(f"{count} {name}" for name, count in fused.items())


def _fastcls_loader(last_layer: LastLayer) -> Callable[[BertForSequenceClassification], Loaded]:
    def load(model: BertForSequenceClassification) -> Loaded:
        fast = fastcls.optimize(copy.deepcopy(model).eval(), last_layer=last_layer)

        @torch.inference_mode()
        def forward(batch: Batch) -> Tensor:
            logits: Tensor = fast(**batch).logits
            return logits

        return Loaded(forward)

    return load


EAGER = Provider("transformers eager", 1e-5, load_eager, padded_flops)
SDPA = Provider("transformers sdpa", 1e-5, load_sdpa, padded_flops)
COMPILED = Provider("torch.compile sdpa", 1e-5, load_compiled, padded_flops, _compiler_missing, by_default=False)
ONNXRUNTIME = Provider("onnxruntime", 1e-4, _onnxruntime_loader(True), padded_flops, _onnxruntime_missing)
# To see what its optimizer is worth.
ONNXRUNTIME_PLAIN = Provider(
    "onnxruntime plain", 1e-4, _onnxruntime_loader(False), padded_flops, _onnxruntime_missing, by_default=False
)
FULL = Provider("fastcls full", 1e-5, _fastcls_loader("full"), useful_flops)
SELECTED = Provider("fastcls selected", 1e-5, _fastcls_loader("selected"), selected_flops)
ABSORBED = Provider("fastcls absorbed", 1e-5, _fastcls_loader("absorbed"), absorbed_flops)

_ALL = (EAGER, SDPA, COMPILED, ONNXRUNTIME, ONNXRUNTIME_PLAIN, FULL, SELECTED, ABSORBED)
PROVIDERS = {provider.name: provider for provider in _ALL}
