"""What a head gets where only the first row of each text was computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

# They compute each row by itself, so that they may run before the first row is taken.
_ROW_BY_ROW = (F.dropout, F.linear)


class FirstRow:
    """Stands in for ``last_hidden_state`` (batch, seqlen, hidden_size), of which only each text's first row is there.

    It is no tensor, since a mean or a product over its one row would be a number, and the wrong one. ``[:, 0]`` and
    ``[:, :1]`` give tensors, with any index of texts before the 0 and of columns behind it. Dropout and ``nn.Linear``
    may come before. All else raises an error that names it.

    Args:
        rows: (batch, 1, width).
        seqlen: the batch's.
    """

    def __init__(self, rows: Tensor, seqlen: int) -> None:
        self._rows = rows
        self._seqlen = seqlen

    @property
    def shape(self) -> torch.Size:
        """(batch, seqlen, width), of the rows that a transformers encoder would give."""
        batch, _, width = self._rows.shape
        return torch.Size((batch, self._seqlen, width))

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self._rows.ndim

    @property
    def ndim(self) -> int:
        return self._rows.ndim

    @property
    def device(self) -> torch.device:
        return self._rows.device

    @property
    def dtype(self) -> torch.dtype:
        return self._rows.dtype

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"FirstRow of {tuple(self.shape)}"

    def __getitem__(self, key: Any) -> Tensor:
        if not (isinstance(key, tuple) and len(key) in (2, 3) and _takes_texts(key[0]) and _is_first(key[1])):
            _refuse(f"[{_shown(key)}]")
        return self._rows[key]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> FirstRow:
        if func not in _ROW_BY_ROW or not args or not isinstance(args[0], cls):
            _refuse(getattr(func, "__name__", str(func)))
        rows: Tensor = func(args[0]._rows, *args[1:], **(kwargs or {}))
        return cls(rows, args[0]._seqlen)

    def __getattr__(self, name: str) -> NoReturn:
        # An AttributeError, so that code that looks whether a tensor's attribute is there finds none.
        raise AttributeError(name if name.startswith("__") else _message(name))


def _takes_texts(index: object) -> bool:
    """Whether an index chooses among texts alone."""
    if isinstance(index, Tensor):
        return index.ndim <= 1
    return isinstance(index, (slice, list)) or (isinstance(index, int) and not isinstance(index, bool))


def _is_first(index: object) -> bool:
    if isinstance(index, slice):
        return index.start in (None, 0) and index.stop == 1 and index.step in (None, 1)
    return isinstance(index, int) and not isinstance(index, bool) and index == 0


def _shown(key: object) -> str:
    if isinstance(key, tuple):
        return ", ".join(map(_shown, key))
    if isinstance(key, slice):
        ends = ("" if end is None else str(end) for end in (key.start, key.stop))
        return ":".join(ends) + ("" if key.step is None else f":{key.step}")
    return "..." if key is Ellipsis else f"a {type(key).__name__}" if isinstance(key, (Tensor, list)) else str(key)


def _message(what: str) -> str:
    return (
        f'with select="first" a head may read last_hidden_state[:, 0] alone, got {what}: '
        'the other rows were not computed. select="all" computes them'
    )


def _refuse(what: str) -> NoReturn:
    raise ValueError(_message(what))


def _refusing(name: str) -> Callable[..., NoReturn]:
    def method(*_: object, **__: object) -> NoReturn:
        _refuse(name.strip("_"))

    return method


# Python looks for operators on the class, and numpy would make an array that holds the object.
for _name in (
    *("__iter__", "__array__", "__neg__", "__abs__", "__pow__", "__setitem__", "__float__"),
    *(f"__{side}{operator}__" for operator in ("add", "sub", "mul", "truediv", "matmul") for side in ("", "r", "i")),
    *("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"),
):
    setattr(FirstRow, _name, _refusing(_name))
