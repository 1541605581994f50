"""The providers that are measured: each makes of a transformers model a function from a batch to its logits.

A classifier gives one row of logits per text, a masked language model one row for each [MASK].

Every provider works on a copy of the model over the same weights, in eval mode and without gradients, and takes batches
as a tokenizer leaves them: on the CPU.
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
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification, PreTrainedModel

import fastcls
from fastcls.engine.spec import LastLayer

from .packed_torch import Packed, PackedTorchBert
from .workloads import MASK_ID, Batch, fills_masks, masked_rows

Forward = Callable[[Batch], Tensor]
Model = PreTrainedModel
ModelClass = type[PreTrainedModel]


class Loaded(NamedTuple):
    """A provider ready to run, and remarks on how it was prepared."""

    forward: Forward
    detail: str = ""


Available = Callable[[torch.device, torch.dtype], str | None]


def _always(_device: torch.device, _dtype: torch.dtype) -> str | None:
    return None


def _any_model(_model_class: ModelClass) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """One way to compute a model's logits.

    Attributes:
        name: as tables show it.
        description: what it is, in a line.
        bound: the largest difference of a logit from the float32 reference, for a float32 model.
        load: makes the function that is timed, and leaves the given model as it was.
        available: the reason why it cannot run on a device in a dtype, or None.
        takes: the reason why it cannot run models of a class, or None.
        spins: whether its threads stay busy for a while after a run.
    """

    name: str
    description: str
    bound: float
    load: Callable[[Model], Loaded]
    available: Available = _always
    takes: Callable[[ModelClass], str | None] = _any_model
    spins: bool = False

    def missing(self, model_class: ModelClass, device: torch.device, dtype: torch.dtype) -> str | None:
        """The reason why it cannot run models of a class on a device in a dtype, or None."""
        return self.available(device, dtype) or self.takes(model_class)


def own_copy(model: Model) -> Model:
    """A copy over the same weights: changes to it do not show in ``model``."""
    shared: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.data, requires_grad=False) for parameter in model.parameters()
    }
    return copy.deepcopy(model, shared).eval()


def _transformers(model: Model, attention: str) -> Model:
    copied = own_copy(model)
    copied.set_attn_implementation(attention)
    return copied


def _forward_of(model: Callable[..., Any], device: torch.device, fills: bool) -> Forward:
    """For modules that need their inputs on their weights' device; from a mask filler, the masked tokens' logits."""

    @torch.inference_mode()
    def forward(batch: Batch) -> Tensor:
        logits: Tensor = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
        return logits[tuple(masked_rows(batch).T)] if fills else logits

    return forward


def _transformers_loader(attention: str) -> Callable[[Model], Loaded]:
    def load(model: Model) -> Loaded:
        no_sdpa = attention == "eager" and baseline_of(type(model)) is EAGER
        detail = "the baseline, because transformers has no sdpa for this model" if no_sdpa else ""
        return Loaded(_forward_of(_transformers(model, attention), model.device, fills_masks(type(model))), detail)

    return load


def _compiled_loader(tuned: bool) -> Callable[[Model], Loaded]:
    def load(model: Model) -> Loaded:
        mode = "max-autotune" if tuned and model.device.type == "cuda" else None
        # On a CPU tuned products need weights that are constants.
        options: dict[str, Any] | None = {"max_autotune": True, "freezing": True} if tuned and mode is None else None
        attention = "eager" if baseline_of(type(model)) is EAGER else "sdpa"
        compiled = torch.compile(_transformers(model, attention), dynamic=True, mode=mode, options=options)
        detail = f"dynamic shapes, {attention} attention"
        return Loaded(_forward_of(compiled, model.device, fills_masks(type(model))), detail)

    return load


def _packed_loader(compiled: bool) -> Callable[[Model], Loaded]:
    def load(model: Model) -> Loaded:
        packed = PackedTorchBert(cast(BertForSequenceClassification, own_copy(model)))
        forward_packed = torch.compile(packed, dynamic=True) if compiled else packed

        @torch.inference_mode()
        def forward(batch: Batch) -> Tensor:
            logits: Tensor = forward_packed(Packed.of(batch, model.device, packed.varlen))
            return logits

        return Loaded(forward, "attention: torch.nn.attention.varlen" if packed.varlen else "attention: padded sdpa")

    return load


def _bert_classifiers(model_class: ModelClass) -> str | None:
    return None if issubclass(model_class, BertForSequenceClassification) else "written for BERT classifiers alone"


def _classes_with_sdpa(model_class: ModelClass) -> str | None:
    return None if model_class._supports_sdpa else "transformers has no sdpa for them: eager is the baseline"


def _classes_with_flash(model_class: ModelClass) -> str | None:
    return None if model_class._supports_flash_attn else "transformers has no flash-attention for them"


def compiler_missing(device: torch.device, _dtype: torch.dtype) -> str | None:
    """Why torch.compile cannot run there."""
    if device.type != "cpu" or shutil.which(os.environ.get("CXX", "g++")):
        return None
    return "no C++ compiler found: install g++ or set CXX"


def _not_installed(*packages: str) -> str | None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def _flash_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" or dtype == torch.float32:
        return "flash-attention needs a GPU and 16 bits"
    return _not_installed("flash_attn")


def _onnxruntime_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    missing = _not_installed("onnx", "onnxscript", "onnxruntime")
    if missing:
        return missing
    if device.type == "cpu":
        return None if dtype == torch.float32 else "measured in float32 on a CPU"
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "this build of onnxruntime has no CUDA"
    return None if dtype == torch.float16 else "measured in float16 on a GPU"


def load_onnxruntime(model: Model) -> Loaded:
    """ONNX Runtime after its own transformer optimizer, with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    place = "CUDA" if model.device.type == "cuda" else "CPU"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        # The optimizer knows eager attention's exported graph; in sdpa's it fuses neither attention nor embeddings.
        _export(model, "eager", path)
        detail = f"fused: {_fuse(model, path)}"
        session = onnxruntime.InferenceSession(str(path), options, providers=[f"{place}ExecutionProvider"])
    if session.get_providers()[0] != f"{place}ExecutionProvider":
        raise RuntimeError(f"ONNX Runtime could not load its {place} libraries and would run elsewhere")
    names = [each.name for each in session.get_inputs()]

    def forward(batch: Batch) -> Tensor:
        (logits,) = session.run(None, {name: batch[name].numpy() for name in names})
        return torch.from_numpy(logits)

    return Loaded(forward, detail)


def _export(model: Model, attention: str, path: Path) -> None:
    """Writes the float32 graph of torch's older exporter: ORT's optimizer does not know the newer one's."""
    exported = _transformers(model, attention)
    exported = exported.to("cpu", torch.float32)  # type: ignore[arg-type]
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


def _fuse(model: Model, path: Path) -> str:
    """Optimizes the exported graph in place, in the model's dtype; returns the counts of its fusions.

    Raises:
        RuntimeError: attention, embeddings, layer norms or GELUs were left unfused: the peer is not at its best.
    """
    from onnxruntime.transformers.optimizer import optimize_model

    config = model.config
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
    if model.dtype == torch.float16:
        optimized.convert_float_to_float16(keep_io_types=True)
    optimized.save_model_to_file(str(path))
    return ", ".join(f"{count} {name}" for name, count in fused.items())


def _openvino_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu" or dtype != torch.float32:
        return "measured in float32 on the CPU"
    return _not_installed("onnx", "onnxscript", "openvino")


def load_openvino(model: Model) -> Loaded:
    """OpenVINO from the same exported graph, in float32, with as many threads as torch."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        _export(model, "sdpa", path)
        core = openvino.Core()
        # Compiled inside the folder's context, because reading maps the file's weights.
        compiled = core.compile_model(core.read_model(path), "CPU", settings)
        names = [each.get_any_name() for each in compiled.inputs]

    def forward(batch: Batch) -> Tensor:
        (logits,) = compiled({name: batch[name].numpy() for name in names}).values()
        return torch.from_numpy(logits.copy())

    return Loaded(forward)


def _no_graphs(device: torch.device, _dtype: torch.dtype) -> str | None:
    return None if device.type == "cuda" else "CUDA graphs are a GPU's: elsewhere it is fastcls itself"


def _fastcls_loader(
    last_layer: LastLayer, cuda_graphs: bool = False, batch_invariant: bool = False
) -> Callable[[Model], Loaded]:
    def load(model: Model) -> Loaded:
        # A masked language model gives only the rows of its masks.
        options: dict[str, Any] = {"mask_token_id": MASK_ID, "dense": False} if fills_masks(type(model)) else {}
        options |= {"last_layer": last_layer, "cuda_graphs": cuda_graphs, "batch_invariant": batch_invariant}
        fast = fastcls.optimize(own_copy(model), **options)

        @torch.inference_mode()
        def forward(batch: Batch) -> Tensor:
            logits: Tensor = fast(**batch).logits
            return logits

        return Loaded(forward)

    return load


EAGER = Provider("transformers eager", "attention by plain products", 1e-5, _transformers_loader("eager"))
SDPA = Provider(
    "transformers sdpa",
    "transformers as it comes: the baseline, but for models that it computes by eager alone",
    1e-5,
    _transformers_loader("sdpa"),
    takes=_classes_with_sdpa,
)
FLASH = Provider(
    "transformers flash",
    "flash-attention 2, which leaves padding out of attention",
    1e-5,
    _transformers_loader("flash_attention_2"),
    _flash_missing,
    _classes_with_flash,
)
COMPILED = Provider("torch.compile", "the baseline, compiled", 1e-5, _compiled_loader(tuned=False), compiler_missing)
AUTOTUNED = Provider(
    "torch.compile autotune",
    "the baseline, compiled with max-autotune (CUDA graphs on a GPU, frozen weights on a CPU)",
    1e-5,
    _compiled_loader(tuned=True),
    compiler_missing,
)
PACKED = Provider(
    "torch packed",
    "the packed model in torch alone",
    1e-5,
    _packed_loader(compiled=False),
    takes=_bert_classifiers,
)
PACKED_COMPILED = Provider(
    "torch packed, compiled",
    "the packed model in torch alone, compiled",
    1e-5,
    _packed_loader(compiled=True),
    compiler_missing,
    _bert_classifiers,
)
ONNXRUNTIME = Provider(
    "onnxruntime",
    "ONNX Runtime after its transformer optimizer",
    1e-4,
    load_onnxruntime,
    _onnxruntime_missing,
    _bert_classifiers,
    spins=True,
)
OPENVINO = Provider(
    "openvino", "OpenVINO, float32", 1e-4, load_openvino, _openvino_missing, _bert_classifiers, spins=True
)
FULL = Provider("fastcls packed only", "fastcls without padding, nothing else", 1e-5, _fastcls_loader("full"))
SELECTED = Provider(
    "fastcls + selected", "and the last layer for the rows that are read only", 1e-5, _fastcls_loader("selected")
)
ABSORBED = Provider(
    "fastcls + absorbed",
    "and its values not made, nor its keys where no position is in them",
    1e-5,
    _fastcls_loader("absorbed"),
    _no_graphs,
)
FASTCLS = Provider(
    "fastcls",
    "all of it, on a GPU with CUDA graphs: as users get it",
    1e-5,
    _fastcls_loader("absorbed", cuda_graphs=True),
)
INVARIANT = Provider(
    "fastcls, batch-invariant",
    "all of it, with the same bits for a text whatever batch it comes in",
    1e-5,
    _fastcls_loader("absorbed", cuda_graphs=True, batch_invariant=True),
)

# Our own providers, which are compared with peers.
OURS = frozenset(provider.name for provider in (FULL, SELECTED, ABSORBED, FASTCLS, INVARIANT))


def baseline_of(model_class: ModelClass) -> Provider:
    """transformers as it comes: with sdpa, or with eager for models that have nothing else."""
    return SDPA if SDPA.takes(model_class) is None else EAGER


_ALL = (
    EAGER,
    SDPA,
    FLASH,
    COMPILED,
    AUTOTUNED,
    PACKED,
    PACKED_COMPILED,
    ONNXRUNTIME,
    OPENVINO,
    FULL,
    SELECTED,
    ABSORBED,
    FASTCLS,
    INVARIANT,
)
PROVIDERS = {provider.name: provider for provider in _ALL}
