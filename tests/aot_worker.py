"""Compiles every launch of one chip ahead of time and prints what the compiler made of it, as JSON.

    python tests/aot_worker.py sm_90

The package's own launchers run, on tensors without memory and with a driver that only names the chip. So triton
specialises each argument exactly as it would on a GPU, and the constants, tiles and options are those that ship.
A process of its own because triton's interpreter, where it is on, takes the place of its compiler.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcls_kernels import PackedLayout
from fastcls_kernels.attention import _launch_attention
from fastcls_kernels.cls_attention import _launch_cls_attention, _launch_cls_attention_kv
from fastcls_kernels.embedding import _launch_embedding_layer_norm
from fastcls_kernels.layer_norm import _launch_add_layer_norm
from fastcls_kernels.linear import _launch_linear_gelu


class Model(NamedTuple):
    """The shapes of one encoder."""

    hidden: int
    heads: int
    ffn: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


MODELS = {
    "bert_base": Model(hidden=768, heads=12, ffn=3072),
    "bert_large": Model(hidden=1024, heads=16, ffn=4096),
    "minilm": Model(hidden=384, heads=12, ffn=1536),
}
# sm_86 has the shared memory of sm_89 and sm_120 too.
ARCHS = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
# One value for each tile that tuning.py has to choose from; test_aot.py checks that none is missing.
MAX_SEQLENS = {"short": 128, "long": 512}
ROWS = {"few_rows": 512, "many_rows": 4096}
TOKENS = 4096
SEQUENCES = 32


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without memory, whose address counts as aligned like that of a real one."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def heads_of(model: Model) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as views of one fused projection."""
    q, k, v = tensor(TOKENS, 3, model.heads, model.head_dim).unbind(1)
    return q, k, v


def packing() -> PackedLayout:
    return PackedLayout(tensor(SEQUENCES + 1, dtype=torch.int32), max_seqlen=512, total_tokens=TOKENS)


def launch_attention(model: Model, max_seqlen: int) -> None:
    row_bounds = (tensor(TOKENS, dtype=torch.int32), tensor(TOKENS, dtype=torch.int32))
    _launch_attention(*heads_of(model), row_bounds, max_seqlen, 0.125)


def launch_cls_attention(model: Model, dtype: torch.dtype, num_splits: int) -> None:
    query = tensor(SEQUENCES, model.heads, model.hidden, dtype=dtype)
    _launch_cls_attention(query, tensor(TOKENS, model.hidden), packing(), 0.125, num_splits)


def launch_cls_attention_kv(model: Model, num_splits: int) -> None:
    _, k, v = heads_of(model)
    query = tensor(SEQUENCES, model.heads, model.head_dim)
    _launch_cls_attention_kv(query, k, v, packing(), 0.125, num_splits)


def launch_linear_gelu(model: Model, rows: int) -> None:
    _launch_linear_gelu(tensor(rows, model.hidden), tensor(model.ffn, model.hidden), tensor(model.ffn))


def launch_add_layer_norm(model: Model, has_bias: bool) -> None:
    x, vector = tensor(TOKENS, model.hidden), tensor(model.hidden)
    _launch_add_layer_norm(x, vector if has_bias else None, x, vector, vector, 1e-12)


def launch_embedding_layer_norm(model: Model, has_types: bool) -> None:
    ids, vector = tensor(TOKENS, dtype=torch.int64), tensor(model.hidden)
    words, positions, types = (tensor(rows, model.hidden) for rows in (30522, 512, 2))
    type_ids = ids if has_types else None
    _launch_embedding_layer_norm(ids, ids, type_ids, words, positions, types, vector, vector, 1e-12)


# Operation and variant -> its launch.
LAUNCHES: dict[tuple[str, str], Callable[[Model], None]] = {
    **{
        ("attention", name): functools.partial(launch_attention, max_seqlen=max_seqlen)
        for name, max_seqlen in MAX_SEQLENS.items()
    },
    ("cls_attention", "one_split"): functools.partial(launch_cls_attention, dtype=torch.bfloat16, num_splits=1),
    ("cls_attention", "splits"): functools.partial(launch_cls_attention, dtype=torch.bfloat16, num_splits=2),
    ("cls_attention", "float32_query"): functools.partial(launch_cls_attention, dtype=torch.float32, num_splits=2),
    ("cls_attention_kv", "one_split"): functools.partial(launch_cls_attention_kv, num_splits=1),
    ("cls_attention_kv", "splits"): functools.partial(launch_cls_attention_kv, num_splits=2),
    **{("linear_gelu", name): functools.partial(launch_linear_gelu, rows=rows) for name, rows in ROWS.items()},
    ("add_layer_norm", "bias"): functools.partial(launch_add_layer_norm, has_bias=True),
    ("add_layer_norm", "no_bias"): functools.partial(launch_add_layer_norm, has_bias=False),
    ("embedding_layer_norm", "types"): functools.partial(launch_embedding_layer_norm, has_types=True),
    ("embedding_layer_norm", "no_types"): functools.partial(launch_embedding_layer_norm, has_types=False),
}


def case_id(operation: str, model: str, arch: str, variant: str) -> str:
    return f"{operation}-{model}-{arch}-{variant}"


class _NamesTheChip:
    """Stands in for triton's driver, which would ask a GPU."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def compile_only(arch: str) -> list[Any]:
    """From here on this process is on ``arch``, and a kernel launch adds its compiled kernel to the list returned."""
    # Not at the top: pytest reads this file's cases where triton is not installed, too.
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    triton.runtime.driver.set_active(_NamesTheChip(target))
    for name, module in sys.modules.items():
        if name.startswith("fastcls_kernels.") and hasattr(module, "arch_of"):
            vars(module)["arch_of"] = lambda _device: arch
    compiled: list[Any] = []
    triton.JITFunction.__getitem__ = lambda kernel, grid: (
        lambda **arguments: compiled.append(kernel.warmup(grid=grid, **arguments))
    )
    return compiled


def disassemble(cubin: bytes) -> str:
    """The resource usage and the instructions of a cubin, by the ``cuobjdump`` in triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def numbers(text: str, *names: str) -> list[int]:
    """The number after each name; a name that is missing is an error, never a zero."""
    found = {name: re.search(rf"(?<!\w){re.escape(name)}:\s*(\d+)", text) for name in names}
    missing = [name for name, match in found.items() if match is None]
    if missing:
        raise ValueError(f"no {', '.join(missing)} in:\n{text[-4000:]}")
    return [int(match.group(1)) for match in found.values() if match]


@functools.cache
def inspect(compiled: Any) -> dict[str, Any]:
    """What the compiler made of one kernel: registers, spills, memory and matrix instructions."""
    metadata, asm = compiled.metadata, compiled.asm
    if "cubin" in asm:
        code = disassemble(asm["cubin"])
        registers, stack, local = numbers(code, "REG", "STACK", "LOCAL")
        spills = stack + local + len(re.findall(r"\b(?:STL|LDL)\b", code))
        code += asm["ptx"]
    else:
        code = asm["amdgcn"]
        registers, *spilled = numbers(
            code, ".vgpr_count", ".vgpr_spill_count", ".sgpr_spill_count", ".private_segment_fixed_size"
        )
        spills = sum(spilled)
    return {
        "kernel": metadata.name,
        "num_warps": metadata.num_warps,
        "num_stages": metadata.num_stages,
        "fp_fusion": metadata.enable_fp_fusion,
        "registers": registers,
        "spills": spills,
        "shared": metadata.shared,
        "tensor_memory": getattr(metadata, "tmem_size", None) or 0,
        "matrix_units": sorted(set(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA|tcgen05\.mma|v_mfma)", code))),
    }


def report(arch: str) -> dict[str, Any]:
    """Each case's kernels, or the error in their place."""
    compiled = compile_only(arch)
    cases: dict[str, Any] = {}
    for (operation, variant), launch in LAUNCHES.items():
        for name, model in MODELS.items():
            compiled.clear()
            try:
                launch(model)
                result: Any = [inspect(kernel) for kernel in compiled]
            except Exception:
                result = traceback.format_exc()
            cases[case_id(operation, name, arch, variant)] = result
    return cases


if __name__ == "__main__":
    json.dump(report(sys.argv[1]), sys.stdout)
