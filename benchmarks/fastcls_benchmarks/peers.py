"""Other runtimes on a CPU, each in float32 and in the precisions that people use it in.

All read graphs that torch exports. A graph is made once for a model and kept in a folder that goes when the model does.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import sentences
from .provider import (
    REDUCED,
    Loaded,
    Model,
    Provider,
    bert_classifiers,
    beside_float32,
    not_installed,
    quietly,
    with_attention,
)
from .workloads import Batch

_FOLDERS: weakref.WeakKeyDictionary[Model, Path] = weakref.WeakKeyDictionary()


def _graph(model: Model, name: str, make: Callable[[Model, Path], None]) -> Path:
    """The model's file of that name, which ``make`` writes if it is not there yet."""
    if model not in _FOLDERS:
        _FOLDERS[model] = Path(tempfile.mkdtemp(prefix="fastcls-bench-"))
        weakref.finalize(model, shutil.rmtree, _FOLDERS[model], ignore_errors=True)
    path = _FOLDERS[model] / name
    if not path.exists():
        with quietly():
            make(model, path)
    return path


def _export(model: Model, attention: str, path: Path) -> None:
    """Writes the float32 graph of torch's older exporter: ORT's optimizer does not know the newer one's."""
    exported = with_attention(model, attention)
    exported = exported.to("cpu", torch.float32)  # type: ignore[arg-type]
    exported.config.return_dict = False
    names = ["input_ids", "attention_mask", "token_type_ids"]
    ids = torch.ones(2, 8, dtype=torch.int64)
    axes = {name: {0: "batch", 1: "length"} for name in names} | {"logits": {0: "batch"}}
    with torch.inference_mode():
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


def _fused(model: Model, path: Path) -> None:
    """Writes the graph after ORT's transformer optimizer in the model's dtype, and its fusions beside it.

    Raises:
        RuntimeError: attention, embeddings, layer norms or GELUs were left unfused: the peer is not at its best.
    """
    from onnxruntime.transformers.optimizer import optimize_model

    # The optimizer knows eager attention's exported graph; in sdpa's it fuses neither attention nor embeddings.
    exported = path.with_name("exported.onnx")
    _export(model, "eager", exported)
    config = model.config
    optimized = optimize_model(
        str(exported), model_type="bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size
    )
    exported.unlink()
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
    path.with_suffix(".txt").write_text(", ".join(f"{count} {name}" for name, count in fused.items()))
    optimized.save_model_to_file(str(path))


def _dynamic_int8(model: Model, path: Path) -> None:
    """Writes the optimized graph with int8 weights by output channel; activations get a scale a tensor at run time."""
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    # The types of what fused nodes give are unknown to onnx, and without this one it fails.
    known = {"DefaultTensorType": onnx.TensorProto.FLOAT}
    quantize_dynamic(str(_graph(model, "fused.onnx", _fused)), str(path), per_channel=True, extra_options=known)


def _calibrated_int8(model: Model, path: Path) -> None:
    """Writes OpenVINO's graph quantised by NNCF, whose activations' scales come from calibration texts."""
    # Without it importing NNCF starts to report each call to Google Analytics.
    os.environ.setdefault("NNCF_CI", "1")
    import nncf  # type: ignore[import-untyped,unused-ignore]
    import openvino

    graph = openvino.Core().read_model(_graph(model, "sdpa.onnx", _exported))
    names = [each.get_any_name() for each in graph.inputs]
    texts = [{name: batch[name].numpy() for name in names} for batch in sentences.calibration(model.config)]
    quantised = nncf.quantize(graph, nncf.Dataset(texts), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(texts))
    # By default it would round the weights that are left in float32 to float16.
    openvino.save_model(quantised, path, compress_to_fp16=False)


def _exported(model: Model, path: Path) -> None:
    _export(model, "sdpa", path)


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


def _onnxruntime(name: str, make: Callable[[Model, Path], None], spins: bool = True) -> Callable[[Model], Loaded]:
    """With as many threads as torch."""

    def load(model: Model) -> Loaded:
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

    return load


def _openvino(name: str, make: Callable[[Model, Path], None], **hints: str) -> Callable[[Model], Loaded]:
    """With as many threads as torch."""

    def load(model: Model) -> Loaded:
        import openvino

        settings: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            **hints,
        }
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(_graph(model, name, make)), "CPU", settings)
        names = [each.get_any_name() for each in compiled.inputs]
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()

        def forward(batch: Batch) -> Tensor:
            (logits,) = compiled({name: batch[name].numpy() for name in names}).values()
            return torch.from_numpy(logits.copy())

        return Loaded(forward, f"{'products in int8, the rest' if 'int8' in name else 'computes'} in {precision}")

    return load


_ONNX = ("onnx", "onnxscript")
_resting = partial(Provider, available=beside_float32(*_ONNX, "onnxruntime"), takes=bert_classifiers, preparing=7)
ONNXRUNTIME = Provider(
    "onnxruntime",
    "ONNX Runtime after its transformer optimizer",
    1e-4,
    _onnxruntime("fused.onnx", _fused),
    _onnxruntime_missing,
    bert_classifiers,
    spins=True,
    preparing=7,
)
ONNXRUNTIME_RESTING = _resting(
    "onnxruntime, no spin",
    "the same with threads that rest between runs, as beside other work",
    1e-4,
    _onnxruntime("fused.onnx", _fused, spins=False),
)
ONNXRUNTIME_INT8 = _resting(
    "onnxruntime int8",
    "the same, its products by quantize_dynamic: weights by channel, a scale for each tensor of activations",
    REDUCED,
    _onnxruntime("int8.onnx", _dynamic_int8, spins=False),
)
_spinning = partial(
    Provider, available=beside_float32(*_ONNX, "openvino"), takes=bert_classifiers, spins=True, preparing=4
)
OPENVINO = _spinning(
    "openvino",
    "OpenVINO, float32",
    1e-4,
    _openvino("sdpa.onnx", _exported, INFERENCE_PRECISION_HINT="f32"),
)
OPENVINO_DEFAULT = _spinning(
    "openvino default",
    "OpenVINO as it comes: in bfloat16 where the CPU can",
    REDUCED,
    _openvino("sdpa.onnx", _exported),
)
OPENVINO_INT8 = _spinning(
    "openvino int8",
    "OpenVINO as it comes, quantised by NNCF after calibration",
    REDUCED,
    _openvino("int8.xml", _calibrated_int8),
    available=beside_float32(*_ONNX, "openvino", "nncf"),
    preparing=12,
)
