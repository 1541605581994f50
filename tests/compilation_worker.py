"""Counts what random batches bring to the compiler, as JSON: after warming up, and over all of them.

    python tests/compilation_worker.py sm_90 200
    python tests/compilation_worker.py sm_90 0 bert_base

A model passes batches of all lengths, on tensors that lie in memory as on a GPU, under a driver that only names the
chip: triton specialises and compiles every launch, and nothing is run. It is a small one, or has the widths of the one
that is named. The seconds of warming up are the compiler's; a second run, which finds all compiled, shows what is not.
"""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

import torch
from aot_worker import compile_only
from support import pack_parts, tiny_bert

import fastcls
from fastcls.engine.cuda_graphs import bucket_of
from fastcls.engine.packing import fill_rows
from fastcls_kernels.runtime import backend

WIDTHS = {
    "tiny": {},
    "bert_base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    "bert_large": {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096},
}


def count(arch: str, num_batches: int, model: str = "tiny") -> dict[str, float]:
    compiled: list[Any] = compile_only(arch)
    backend._override.set("triton")
    fast = fastcls.optimize(
        tiny_bert(max_position_embeddings=512, num_hidden_layers=2, **WIDTHS[model]).to(torch.bfloat16)
    )
    start = time.perf_counter()
    fast.warm_up()
    seconds = time.perf_counter() - start
    after_warming = len(set(map(id, compiled)))
    draw = random.Random(0)
    for number in range(num_batches):
        longest = draw.choice((2, 20, 60, 200, 512))
        texts = [[5] * draw.randint(1, longest) for _ in range(draw.randint(1, 70))]
        source = fast._reader.flatten_lists(texts, [[0] * len(text) for text in texts] if number % 3 else None)
        assert source is not None
        with torch.no_grad():
            # As they are, and filled up to the shape that a graph has.
            for packed in pack_parts(source, 65536, fill_rows if number % 2 else bucket_of):
                fast._compute(packed, "first", fast.last_layer)
    return {
        "warming_seconds": round(seconds, 1),
        "after_warming": after_warming,
        "after_all": len(set(map(id, compiled))),
        "launches": len(compiled),
    }


if __name__ == "__main__":
    json.dump(count(sys.argv[1], int(sys.argv[2]), *sys.argv[3:4]), sys.stdout)
