#!/usr/bin/env bash
# A layer under torch.distributed.fsdp.fully_shard, two processes: its weight as forward sees it, before and after an
# optimizer's step.
#
# Expected: another tensor, or the same one with a higher count of changes (Tensor._version), since its numbers are
# others: the count is how autograd, and whoever keeps what follows from a weight, knows that it is stale.
# Seen (torch 2.13.0): the same tensor at the same count, with other numbers. The gathered weight is one tensor for the
# life of the module, whose memory is filled anew for each forward pass under a guard that keeps the count.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy

cat > "$folder/gathers.py" <<'PY'
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Layer(torch.nn.Linear):
    seen: list

    def forward(self, rows):
        self.seen.append((self.weight, self.weight._version, self.weight.detach().clone()))
        return super().forward(rows)


def run(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = Layer(8, 8)
    layer.seen = []
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        layer(torch.ones(3, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    (first, count, numbers), (second, later, changed) = layer.seen
    if rank == 0:
        print("torch", torch.__version__)
        print("the same tensor:", first is second, "- its count:", count, later)
        print("the same numbers:", torch.equal(numbers, changed))
        assert first is second and count == later and not torch.equal(numbers, changed), "no longer so"
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(run, args=(os.path.join(os.path.dirname(os.path.abspath(__file__)), "store"),), nprocs=2)
PY
"$folder/venv/bin/python" -W ignore "$folder/gathers.py"
