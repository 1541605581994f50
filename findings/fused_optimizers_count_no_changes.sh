#!/usr/bin/env bash
# The count of changes of a parameter, Tensor._version, after a step of torch's fused optimizers on a CPU.
#
# Expected: more, as after a step of the same optimizer without fused=True, which adds 2. The count is how autograd knows that a
# tensor it saved was written to, and how whoever caches what follows from a weight knows that it is stale.
# Seen (torch 2.13.0 for CPUs; 2.11.0 and 2.15.0 do the same): AdamW, SGD and Adagrad with fused=True change the numbers, and the count stays; AdamW with
# foreach=True and with neither counts. transformers 5's Trainer takes the fused AdamW where nobody says otherwise.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy

cat > "$folder/steps.py" <<'PY'
import torch
from torch.optim import SGD, Adagrad, AdamW


def counted(optimizer_class: type, **options: bool) -> tuple[bool, int]:
    """Whether a step changed a weight, and by how much it raised the count."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 8))
    optimizer = optimizer_class([weight], lr=0.1, **options)
    weight.square().sum().backward()
    before, count = weight.detach().clone(), weight._version
    optimizer.step()
    return not torch.equal(weight, before), weight._version - count


print(torch.__version__)
for optimizer_class, options, expected in (
    (AdamW, {}, True),
    (AdamW, {"foreach": True}, True),
    (AdamW, {"fused": True}, False),
    (SGD, {"fused": True}, False),
    (Adagrad, {"fused": True}, False),
):
    changed, more = counted(optimizer_class, **options)
    print(optimizer_class.__name__, options, "changed the weight:", changed, "and raised its count by", more)
    assert changed
    assert (more > 0) == expected, "no longer so"
PY
"$folder/venv/bin/python" "$folder/steps.py"
