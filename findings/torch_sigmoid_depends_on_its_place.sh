#!/usr/bin/env bash
# torch on a CPU: the sigmoid of a number has other bits in another place of a tensor, or beside another count of numbers.
#
# Expected: a function of each number alone gives the same number the same answer, wherever it stands. A reranker's score
# of one pair, taken alone, is then bit for bit the one that it has in a batch, if its logit is.
# Seen with torch 2.13.0 on x86: in 1 x 16 numbers, or 40, some sigmoids differ in their last bit from those of the same
# numbers one by one: full vectors go through one exponential, the last numbers of a tensor through another. So do silu,
# mish and gelu with approximate="tanh"; relu, tanh, exp, erf, log1p and a softmax along a short last dimension do not.
# Sizes that are multiples of 32 hide it, and with several threads a large tensor has such ends within, too.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
functions = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "mish": F.mish,
    "log1p of a square": lambda x: torch.log1p(x * x),
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "erf": torch.erf,
    "softmax of pairs": lambda x: torch.stack((x, torch.zeros_like(x)), -1).softmax(-1)[..., 0],
}


def moved(function, count):
    """How many of so many numbers have another answer in company than alone."""
    different = 0
    for _ in range(200):
        x = torch.randn(count, generator=generator) * 3
        alone = torch.cat([function(each) for each in x.split(1)])
        different += int((function(x) != alone).sum())
    return different


found = {name: moved(function, 40) for name, function in functions.items()}
print(torch.__version__, torch.backends.cpu.get_cpu_capability(), found)
for name in ("sigmoid", "silu", "mish", "gelu by tanh"):
    assert found[name] > 0, f"{name} no longer depends on a number's place"
for name in ("relu", "tanh", "exp", "erf", "log1p of a square", "softmax of pairs"):
    assert found[name] == 0, f"{name} depends on a number's place, too"
PYTHON
echo "still so: some functions of single numbers depend on the numbers beside them"
