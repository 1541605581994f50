"""This package's operators in ``torch.ops``: their namespace, and the decorator that makes a function one of them.

A copy for the Hugging Face hub has another namespace, which ``kernels/assemble_hub.py`` writes here, so that one
process can load both.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

NAMESPACE = "fastcls_kernels"

_Operation = TypeVar("_Operation", bound=Callable[..., Any])


def add_op_namespace_prefix(name: str) -> str:
    """The name by which ``torch.library`` knows this package's operator ``name``."""
    return f"{NAMESPACE}::{name}"


class Members(NamedTuple):
    """An argument that no schema can hold, and the operator's arguments in place of it.

    Attributes:
        argument: its name in the function.
        split: takes the argument, and gives the operator's arguments by name.
        join: takes all of the operator's arguments by name, and gives the argument.
    """

    argument: str
    split: Callable[[Any], Mapping[str, Any]]
    join: Callable[[Mapping[str, Any]], Any]


def operator(
    schema: str, fake: Callable[..., Any], members: Sequence[Members] = ()
) -> Callable[[_Operation], _Operation]:
    """Registers a function as the operator of its name: one node of a graph that torch.compile or torch.export traces.

    The function runs when the node does, since it checks and chooses by values, which no graph can hold. Outside of a
    graph a call goes to the function itself. The node's gradients are a node, too, NAME_backward, which computes the
    function once more, so that a graph keeps the arguments alone.

    Args:
        schema: the operator's, without its name. ``Tensor[]`` stands for a function that returns one tensor or several,
            and ``()`` for one that returns the argument it writes to.
        fake: takes the operator's arguments, and returns its results unfilled.
        members: one for each argument that the schema cannot hold.
    """

    def register(function: _Operation) -> _Operation:
        parsed = torch._C.parse_schema(add_op_namespace_prefix(function.__name__) + schema)
        taken = tuple(argument.name for argument in parsed.arguments)
        written = tuple(each.name for each in parsed.arguments if each.alias_info and each.alias_info.is_write)
        gives_list = not written and str(parsed.returns[0].type) == "List[Tensor]"
        parameters = inspect.signature(function).parameters.values()
        names = tuple(each.name for each in parameters)
        by_place = tuple(each.name for each in parameters if each.kind is not inspect.Parameter.KEYWORD_ONLY)
        defaults = {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}

        def run(*arguments: Any) -> Any:
            # The dispatcher leaves out the last arguments that have their defaults.
            given = dict(zip(taken, arguments, strict=False))
            given.update({each.argument: each.join(given) for each in members})
            made = function(**{name: given[name] for name in names if name in given})
            if written:
                return None
            # Contiguous, as the fake results are that the graph was made for.
            tensors = [each.contiguous() for each in ((made,) if isinstance(made, Tensor) else made)]
            return tensors if gives_list else tensors[0]

        run.__name__ = function.__name__
        name = add_op_namespace_prefix(function.__name__)
        registered = torch.library.custom_op(name, run, mutates_args=written, schema=schema)
        registered.register_fake(fake)
        if not written:
            _register_gradients(registered, function.__name__, schema, run)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                return function(*args, **kwargs)
            given = {**defaults, **dict(zip(by_place, args, strict=False)), **kwargs}
            twice = set(by_place[: len(args)]) & set(kwargs)
            if len(args) > len(by_place) or twice or set(given) != set(names):
                raise TypeError(f"{function.__name__}() takes {', '.join(names)}, got {', '.join(given)}")
            for each in members:
                given.update(each.split(given[each.argument]))
            made = registered(*[given[name] for name in taken])
            if written:
                return given[written[0]]
            return made if not gives_list else made[0] if len(made) == 1 else tuple(made)

        return call  # type: ignore[return-value]

    return register


def check_together(**tensors: Tensor | None) -> bool:
    """Whether the members of an argument are given.

    Raises:
        ValueError: some are given, and others are not.
    """
    given = [name for name, tensor in tensors.items() if tensor is not None]
    if given and len(given) < len(tensors):
        raise ValueError(f"{', '.join(tensors)} must all be given or none, got {', '.join(given)}")
    return bool(given)


def _register_gradients(registered: Any, name: str, schema: str, run: Callable[..., Any]) -> None:
    """Gives an operator its gradients, an operator of their own: ``run`` by its differentiable form."""

    def compute(grads: Sequence[Tensor], wanted: Sequence[int], *arguments: Any) -> list[Tensor]:
        given = list(arguments)
        for index in wanted:
            given[index] = arguments[index].detach().requires_grad_()
        leaves = [given[index] for index in wanted]
        with recording():
            made = run(*given)
            results = [made] if isinstance(made, Tensor) else made
            found = torch.autograd.grad(results, leaves, grads, allow_unused=True, materialize_grads=True)
        memory = {each.untyped_storage().data_ptr() for each in (*grads, *arguments) if isinstance(each, Tensor)}
        return [_own(each, memory) for each in found]

    arguments = schema.removeprefix("(").rpartition(" -> ")[0]
    backward = torch.library.custom_op(
        add_op_namespace_prefix(f"{name}_backward"),
        compute,
        mutates_args=(),
        schema=f"(Tensor[] grads, int[] wanted, {arguments} -> Tensor[]",
    )
    backward.register_fake(lambda _grads, wanted, *given: [given[each].new_empty(given[each].shape) for each in wanted])

    def keep(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        ctx.rest = [None if isinstance(each, Tensor) else each for each in inputs]
        ctx.places = [index for index, each in enumerate(inputs) if isinstance(each, Tensor)]
        ctx.save_for_backward(*(inputs[index] for index in ctx.places))
        outputs = [output] if isinstance(output, Tensor) else output
        ctx.shapes = [(each.shape, each.dtype, each.device) for each in outputs]

    def differentiate(ctx: Any, *grads: Any) -> Any:
        given = list(ctx.rest)
        for index, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            given[index] = tensor
        (incoming,) = grads if isinstance(grads[0], list | tuple) else (grads,)
        filled = [
            torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
            for grad, (shape, dtype, device) in zip(incoming, ctx.shapes, strict=True)
        ]
        wanted = [index for index in ctx.places if ctx.needs_input_grad[index]]
        found = dict(zip(wanted, backward(filled, wanted, *given), strict=True))
        # The dispatcher leaves out the last arguments that have their defaults.
        return tuple(found.get(index) for index in range(len(ctx.needs_input_grad)))

    registered.register_autograd(differentiate, setup_context=keep)


def _own(tensor: Tensor, memory: set[int]) -> Tensor:
    """Contiguous, as the fake gradients that a graph was made for, and in memory of its own, as a node's results."""
    tensor = tensor.contiguous()
    if tensor.untyped_storage().data_ptr() in memory:
        tensor = tensor.clone()
    memory.add(tensor.untyped_storage().data_ptr())
    return tensor


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Autograd as outside of an operator, where PyTorch calls it below what records."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield
