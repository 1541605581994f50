"""The backend that an operation runs on: its Triton kernel or plain PyTorch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal, get_args

import torch

from .triton import HAS_TRITON, INTERPRETED

Backend = Literal["triton", "torch"]

_override: ContextVar[Backend | None] = ContextVar("fastcls_kernels_backend", default=None)


@functools.cache
def _device_backend(device: torch.device) -> tuple[Backend, str]:
    if device.type != "cuda":
        return "torch", f"{device.type} tensors run the PyTorch path on the same packed data"
    if not HAS_TRITON:
        return "torch", "triton is not installed"
    if torch.version.hip is not None:
        return "triton", "AMD GPU with triton"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return "torch", f"compute capability {major}.{minor} is below the 8.0 that the kernels need"
    return "triton", f"NVIDIA GPU of compute capability {major}.{minor} with triton"


def explain_backend(device: torch.device | str) -> tuple[Backend, str]:
    """The backend of operations on ``device``, and the reason in one phrase."""
    override = _override.get()
    if override is not None:
        return override, f'chosen by use_backend("{override}")'
    return _device_backend(torch.device(device))


def is_plain_torch() -> bool:
    """Whether `use_backend` asks for PyTorch's operators, on a CPU too."""
    return _override.get() == "torch"


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether operations on ``tensor`` run as Triton kernels."""
    override = _override.get()
    if override is not None:
        return override == "triton"
    # Every operation asks this first, and reading a tensor's device takes longer than the rest.
    return tensor.is_cuda and _device_backend(tensor.device)[0] == "triton"


@contextlib.contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Run the operations inside the ``with`` block on the backend of your choice, in this thread.

    ``"triton"`` works on GPU tensors, and on CPU tensors inside Triton's interpreter (set ``TRITON_INTERPRET=1``
    before python starts). ``"torch"`` works everywhere, and leaves the compiled kernels of a CPU out.

    Raises:
        ValueError: ``backend`` is neither ``"triton"`` nor ``"torch"``.
        RuntimeError: ``"triton"`` was asked for where it can run on no tensor at all.
    """
    if backend not in get_args(Backend):
        raise ValueError(f'backend must be "triton" or "torch", got {backend!r}')
    if backend == "triton" and not (INTERPRETED or (HAS_TRITON and torch.cuda.is_available())):
        raise RuntimeError(
            'use_backend("triton") needs triton and a GPU, or triton and TRITON_INTERPRET=1 set before python starts; '
            f"found: triton {'installed' if HAS_TRITON else 'missing'}, no GPU, interpreter off"
        )
    token = _override.set(backend)
    try:
        yield
    finally:
        _override.reset(token)


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, so that a kernel launches where its data is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def multiprocessor_count(device: torch.device) -> int:
    """Multiprocessors (NVIDIA) or compute units (AMD) of a GPU; in the interpreter a small stand-in."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
