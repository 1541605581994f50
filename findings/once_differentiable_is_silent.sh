#!/usr/bin/env bash
# PyTorch's `once_differentiable`, which authors of autograd functions put on a backward pass that has no gradient of its own.
#
# Expected: an error where a second derivative is asked for (`create_graph=True`), as the name says and as a function
# without a formula for it gives.
# Seen (torch 2.13.0): an error only where the gradient that comes in requires a gradient itself. That of `.sum()` or
# `.mean()`, or of a loss that is a sum of the function's results, does not: the gradient comes back as a constant, a penalty
# on it adds its value to the loss and nothing to any gradient, and nobody is told.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy

cat > "$folder/cube.py" <<'PY'
import torch
from torch.autograd.function import once_differentiable


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 3 * x**2


def with_penalty(cube) -> float:
    """The gradient of x³ + (dx³/dx)² at 2: 12 and, of the penalty, 2 · 12 · 12."""
    x = torch.tensor(2.0, requires_grad=True)
    out = cube(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    (out + slope**2).backward()
    return x.grad.item()


print(torch.__version__)
right, found = with_penalty(lambda x: x**3), with_penalty(Cube.apply)
print("PyTorch's own power:", right)
print("a function with once_differentiable:", found)
assert (right, found) == (300.0, 12.0), "no longer so"
try:
    x = torch.tensor(2.0, requires_grad=True)
    (slope,) = torch.autograd.grad((Cube.apply(x) ** 2).sum(), x, create_graph=True)
    slope.backward()
    raise SystemExit("no longer so")
except RuntimeError as error:
    print("where the incoming gradient has one:", error)
PY
"$folder/venv/bin/python" "$folder/cube.py"
