"""Other runtimes on a CPU, each in float32 and in the precisions that people use it in, with as many threads as torch.

All read graphs that torch exports. A graph is made once for a model and kept in a folder that goes when the model does.
And DeBERTa on a GPU by two libraries whose attention is Triton's, each over the given model's weights.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DebertaV2ForSequenceClassification

from . import sentences
from .packed_torch import Packed
from .provider import Loaded, Model, bert_classifiers, beside_float32, described, not_installed, own_copy, quietly
from .workloads import Batch

Make = Callable[[Model, Path], None]
_FOLDERS: weakref.WeakKeyDictionary[Model, Path] = weakref.WeakKeyDictionary()


def _graph(model: Model, name: str, make: Make) -> Path:
    """The model's file of that name, which ``make`` writes if it is not there yet."""
    if model not in _FOLDERS:
        _FOLDERS[model] = Path(tempfile.mkdtemp(prefix="fastcls-bench-"))
        weakref.finalize(model, shutil.rmtree, _FOLDERS[model], ignore_errors=True)
    path = _FOLDERS[model] / name
    if not path.exists():
        with quietly():
            make(model, path)
    return path


def _export(model: Model, path: Path, attention: str = "sdpa") -> None:
    """Writes the float32 graph of torch's older exporter: ORT's optimizer does not know the newer one's."""
    exported = own_copy(model, attention).to("cpu", torch.float32)  # type: ignore[arg-type]
    exported.config.return_dict = False
    names = ["input_ids", "attention_mask", "token_type_ids"]
    ids = torch.ones(2, 8, dtype=torch.int64)
    axes = {name: {0: "batch", 1: "length"} for name in names} | {"logits": {0: "batch"}}
    options: dict[str, Any] = {"input_names": names, "output_names": ["logits"], "dynamic_axes": axes}
    with torch.inference_mode():
        torch.onnx.export(exported, (ids, ids, torch.zeros_like(ids)), path, opset_version=17, dynamo=False, **options)


def _fused(model: Model, path: Path) -> None:
    """Writes the graph after ORT's transformer optimizer in the model's dtype, and its fusions beside it.

    Raises:
        RuntimeError: attention, embeddings, layer norms or GELUs were left unfused: the peer is not at its best.
    """
    from onnxruntime.transformers.optimizer import optimize_model

    # The optimizer knows eager attention's exported graph; in sdpa's it fuses neither attention nor embeddings.
    exported, config = path.with_name("exported.onnx"), model.config
    _export(model, exported, "eager")
    sizes = {"num_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
    optimized = optimize_model(str(exported), model_type="bert", **sizes)
    exported.unlink()
    fused = {name: count for name, count in optimized.get_fused_operator_statistics().items() if count}
    layers = config.num_hidden_layers
    expected = {"EmbedLayerNormalization": 1, "Attention": layers, "SkipLayerNormalization": 2 * layers}
    expected["BiasGelu"] = layers
    if fused != expected:
        raise RuntimeError(f"ONNX Runtime's optimizer should fuse {expected}, but fused {fused}")
    if model.dtype == torch.float16:
        optimized.convert_float_to_float16(keep_io_types=True)
    path.with_suffix(".txt").write_text(", ".join(f"{count} {name}" for name, count in fused.items()))
    optimized.save_model_to_file(str(path))


def _dynamic_int8(model: Model, path: Path) -> None:
    """Writes the optimized graph with int8 weights by output channel; activations get a scale a tensor at run time."""
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    # The types of what fused nodes give are unknown to onnx, and without this one it fails.
    known = {"DefaultTensorType": onnx.TensorProto.FLOAT}
    quantize_dynamic(str(_graph(model, "fused.onnx", _fused)), str(path), per_channel=True, extra_options=known)


@cache
def _core() -> Any:
    """One for the process: once all of OpenVINO is freed, Ctrl-C ends Python by a segmentation fault (2026.4.1)."""
    import openvino

    return openvino.Core()


def _calibrated_int8(model: Model, path: Path) -> None:
    """Writes OpenVINO's graph quantised by NNCF, whose activations' scales come from calibration texts."""
    # Without it importing NNCF starts to report each call to Google Analytics.
    os.environ.setdefault("NNCF_CI", "1")
    import nncf  # type: ignore[import-untyped,unused-ignore]
    import openvino

    graph = _core().read_model(_graph(model, "sdpa.onnx", _export))
    names = [each.get_any_name() for each in graph.inputs]
    texts = [{name: batch[name].numpy() for name in names} for batch in sentences.calibration(model.config)]
    quantised = nncf.quantize(graph, nncf.Dataset(texts), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(texts))
    # By default it would round the weights that are left in float32 to float16.
    openvino.save_model(quantised, path, compress_to_fp16=False)


def _onnxruntime_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    missing = not_installed("onnx", "onnxscript", "onnxruntime")
    if missing:
        return missing
    if device.type == "cpu":
        return None if dtype == torch.float32 else "measured in float32 on a CPU"
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "this build of onnxruntime has no CUDA"
    return None if dtype == torch.float16 else "measured in float16 on a GPU"


def _onnxruntime(name: str, make: Make, spins: bool, model: Model) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    if not spins:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    place = "CUDA" if model.device.type == "cuda" else "CPU"
    path = _graph(model, name, make)
    session = onnxruntime.InferenceSession(str(path), options, providers=[f"{place}ExecutionProvider"])
    if session.get_providers()[0] != f"{place}ExecutionProvider":
        raise RuntimeError(f"ONNX Runtime could not load its {place} libraries and would run elsewhere")
    names = [each.name for each in session.get_inputs()]

    def forward(batch: Batch) -> Tensor:
        (logits,) = session.run(None, {name: batch[name].numpy() for name in names})
        return torch.from_numpy(logits)

    return Loaded(forward, f"fused: {path.with_name('fused.txt').read_text()}")


def _openvino(name: str, make: Make, model: Model, **hints: str) -> Loaded:
    settings: Any = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY", **hints}
    core = _core()
    compiled = core.compile_model(core.read_model(_graph(model, name, make)), "CPU", settings)
    names = [each.get_any_name() for each in compiled.inputs]
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()

    def forward(batch: Batch) -> Tensor:
        (logits,) = compiled({name: batch[name].numpy() for name in names}).values()
        return torch.from_numpy(logits.copy())

    return Loaded(forward, f"{'products in int8, the rest' if 'int8' in name else 'computes'} in {precision}")


def _triton_missing(packages: list[str], device: torch.device, dtype: torch.dtype) -> str | None:
    fits = device.type == "cuda" and dtype != torch.float32
    return not_installed(*packages, "triton") if fits else "needs a GPU and 16 bits"


def _deberta_classifiers(model_class: type[Model]) -> str | None:
    return None if issubclass(model_class, DebertaV2ForSequenceClassification) else "written for DeBERTa v2 classifiers"


def _disentangled_flash(model: Model) -> Loaded:
    with quietly():
        copied: Any = own_copy(model)
        library = import_module("disentangled_flash")
        encode = library.optimize_deberta(copied.deberta).encoder.forward_packed

    @torch.inference_mode()
    def forward(batch: Batch) -> Tensor:
        packed = Packed.of(batch, model.device, varlen=True)
        ids = [each[None] for each in (packed.token_ids, packed.token_type_ids, packed.position_ids)]
        info = library.validate_cu_seqlens(packed.cu_seqlens.cpu(), len(packed.token_ids))
        rows = encode(copied.deberta.embeddings(*ids)[0], packed.cu_seqlens, packed_info=info).last_hidden_state
        return cast(Tensor, copied.classifier(copied.pooler(rows[packed.first][:, None])))

    return Loaded(forward, "packed")


def _flashdeberta(model: Model) -> Loaded:
    with quietly(), torch.device(model.device):
        flash: Any = import_module("flashdeberta").FlashDebertaV2ForSequenceClassification(own_copy(model).config)
        flash.eval().load_state_dict(model.state_dict(), assign=True)

    @torch.inference_mode()
    def forward(batch: Batch) -> Tensor:
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        return cast(Tensor, flash(**inputs, return_dict=True).logits)

    return Loaded(forward, "padded")


_bert = partial(described, takes=bert_classifiers)
_in_float32 = partial(beside_float32, "onnx", "onnxscript")
_fused_session, _read = partial(_onnxruntime, "fused.onnx", _fused), partial(_openvino, "sdpa.onnx", _export)
ONNXRUNTIME = _bert("onnxruntime", partial(_fused_session, True), available=_onnxruntime_missing)
_on_cpu = partial(_bert, available=_in_float32("onnxruntime"))
ONNXRUNTIME_RESTING = _on_cpu("onnxruntime, no spin", partial(_fused_session, False))
ONNXRUNTIME_INT8 = _on_cpu("onnxruntime int8", partial(_onnxruntime, "int8.onnx", _dynamic_int8, True))
_spinning = partial(_bert, available=_in_float32("openvino"))
OPENVINO = _spinning("openvino", partial(_read, INFERENCE_PRECISION_HINT="f32"))
OPENVINO_DEFAULT = _spinning("openvino default", _read)
_calibrated = partial(_openvino, "int8.xml", _calibrated_int8)
OPENVINO_INT8 = _bert("openvino int8", _calibrated, available=_in_float32("openvino", "nncf"))
_deberta = partial(described, takes=_deberta_classifiers)
_there = partial(partial, _triton_missing)
DISENTANGLED_FLASH = _deberta("disentangled-flash", _disentangled_flash, available=_there(["disentangled_flash"]))
FLASHDEBERTA = _deberta("flashdeberta", _flashdeberta, available=_there(["flashdeberta", "einops"]))
