"""Counts what random batches bring to the compiler, as JSON: after warming up, and over all of them.

    python tests/compilation_worker.py sm_90 200

A small model passes batches of all lengths, on tensors that lie in memory as a GPU's would, under a driver that only
names the chip: triton specialises and compiles every launch, and nothing is run.
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import torch
from aot_worker import compile_only
from support import tiny_bert

import fastcls
from fastcls.graphs import bucket_of
from fastcls.packing import fill_rows, pack
from fastcls_kernels import _backend


def count(arch: str, num_batches: int) -> dict[str, int]:
    compiled: list[Any] = compile_only(arch)
    _backend._override.set("triton")
    fast = fastcls.optimize(tiny_bert(max_position_embeddings=512).to(torch.bfloat16))
    fast.warm_up()
    after_warming = len(set(map(id, compiled)))
    draw = random.Random(0)
    for number in range(num_batches):
        longest = draw.choice((2, 20, 60, 200, 512))
        texts = [[5] * draw.randint(1, longest) for _ in range(draw.randint(1, 70))]
        source = fast._source_of_lists(texts, [[0] * len(text) for text in texts] if number % 3 else None)
        assert source is not None
        with torch.no_grad():
            # As they are, and filled up to the shape that a graph has.
            for packed in pack(source, 65536, fill_rows if number % 2 else bucket_of):
                fast._compute(packed, "absorbed")
    return {"after_warming": after_warming, "after_all": len(set(map(id, compiled))), "launches": len(compiled)}


if __name__ == "__main__":
    json.dump(count(sys.argv[1], int(sys.argv[2])), sys.stdout)
