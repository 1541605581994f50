"""Checks that the public functions share. Each message names the argument, what it must be and what it was."""

from __future__ import annotations

import torch

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_tensor(name: str, tensor: torch.Tensor, shape: str, like: torch.Tensor | None = None) -> None:
    """Checks dimensions (``shape`` is a text such as "(total_tokens, nheads, headdim)"), dtype and device.

    Without ``like`` the dtype must be one that the kernels compute in; with it, dtype and device must match.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape {shape}, got {type(tensor).__name__}")
    ndim = shape.count(",") + (0 if shape.endswith(",)") else 1)
    if tensor.ndim != ndim:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if like is None:
        # float64 exists to prove exactness on the PyTorch path; no GPU kernel computes in it.
        allowed = FLOAT_DTYPES if tensor.is_cuda else (*FLOAT_DTYPES, torch.float64)
        if tensor.dtype not in allowed:
            raise TypeError(f"{name} must be one of {', '.join(map(str, allowed))}, got {tensor.dtype}")
        return
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} must be {like.dtype} like the other inputs, got {tensor.dtype}")
    check_device(name, tensor, like)


def check_no_gradient(name: str, tensor: torch.Tensor) -> None:
    """Checks that no gradient is asked for, where one would be computed."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} must not require gradients, which this operation does not compute: detach it, "
            "or call this inside torch.no_grad() or torch.inference_mode()"
        )


def check_device(name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    """Checks that ``tensor`` lies where ``like`` lies."""
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the other inputs, got {tensor.device}")


def has_contiguous_rows(tensor: torch.Tensor) -> bool:
    """Whether neighbours in the last dimension, if there is one, are neighbours in memory."""
    return tensor.ndim == 0 or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1


def check_last_dim_contiguous(name: str, tensor: torch.Tensor) -> None:
    """Checks that neighbours in the last dimension are neighbours in memory."""
    if not has_contiguous_rows(tensor):
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}")


def check_head_dim(name: str, head_dim: int) -> None:
    """Checks that the kernels have a tile for this head size."""
    if not 4 <= head_dim <= 128:
        raise ValueError(f"{name} must have a head size from 4 to 128, got {head_dim}")


def check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: str) -> None:
    """Checks queries, keys and values of one ``shape``, such as "(total_tokens, nheads, headdim)"."""
    check_tensor("q", q, shape)
    check_tensor("k", k, shape, like=q)
    check_tensor("v", v, shape, like=q)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape:
            raise ValueError(f"{name} must have q's shape {tuple(q.shape)}, got {tuple(tensor.shape)}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_last_dim_contiguous(name, tensor)
    check_head_dim("q", q.shape[-1])


def check_key_heads(name: str, keys: torch.Tensor, shape: str, queries: torch.Tensor, total_tokens: int) -> None:
    """Checks the sizes of packed keys or values of one ``shape``, such as "(total_tokens, nheads_k, headdim)".

    Of ``queries``, (rows, nheads, headdim), equally many heads read each of theirs.
    """
    num_heads, head_dim = queries.shape[1:]
    num_heads_k = keys.shape[1]
    is_shared = num_heads_k == num_heads or (0 < num_heads_k < num_heads and num_heads % num_heads_k == 0)
    if not is_shared or keys.shape != (total_tokens, num_heads_k, head_dim):
        raise ValueError(
            f"{name} must have shape {shape} = ({total_tokens}, {num_heads} or a divisor of it, {head_dim}), "
            f"got {tuple(keys.shape)}"
        )


def num_rows_of(tokens: torch.Tensor, rows: torch.Tensor | None) -> int:
    """The number of selected rows, which is all of ``tokens`` where ``rows`` is None."""
    return tokens.shape[0] if rows is None else rows.shape[0]


def check_rows(name: str, rows: torch.Tensor, tokens: torch.Tensor) -> None:
    """Checks indices of rows of ``tokens``; their values only on the CPU, since reading them would stall a GPU."""
    check_integers(name, rows)
    if rows.ndim != 1 or not rows.is_contiguous():
        raise ValueError(f"{name} must be contiguous, of shape (num_rows,), got {tuple(rows.shape)}")
    check_device(name, rows, tokens)
    check_range(name, rows, tokens.shape[0])


def check_integers(name: str, tensor: torch.Tensor) -> None:
    """Checks that ``tensor`` is an int32 or int64 tensor."""
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in (torch.int32, torch.int64):
        found = getattr(tensor, "dtype", type(tensor).__name__)
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {found}")


def check_range(name: str, indices: torch.Tensor, size: int) -> None:
    """Checks that ``indices`` lie from 0 to ``size - 1``, on the CPU alone: reading them would stall a GPU."""
    if indices.device.type == "cpu" and indices.numel():
        low, high = (int(bound) for bound in torch.aminmax(indices))
        if low < 0 or high >= size:
            raise ValueError(f"{name} must lie from 0 to {size - 1}, got {low} to {high}")
