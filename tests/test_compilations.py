"""No length brings anything new to the compiler, once a model is warm."""

from __future__ import annotations

import random

import pytest
import torch
from aot_worker import run_worker
from support import tiny_bert

import fastcls
import fastcls_kernels


@pytest.mark.full
@pytest.mark.skipif(not fastcls_kernels.HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_two_hundred_random_batches_compile_nothing_new(arch: str) -> None:
    counts = run_worker("compilation_worker.py", arch, "200")
    assert counts["launches"] > 2000
    assert counts["after_all"] == counts["after_warming"], counts


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "no_graphs"])
def test_two_hundred_random_batches_compile_nothing_new_on_a_gpu(cuda_graphs: bool) -> None:
    from triton import knobs

    model = tiny_bert(max_position_embeddings=512).to(device="cuda", dtype=torch.bfloat16)
    fast = fastcls.optimize(model, cuda_graphs=cuda_graphs)
    compiled: list[str] = []
    fast.warm_up()
    previous = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **found: compiled.append(str(found["repr"]))
    try:
        draw = random.Random(0)
        for _ in range(200):
            longest = draw.choice((2, 20, 60, 200, 512))
            fast.logits_of([[5] * draw.randint(1, longest) for _ in range(draw.randint(1, 70))])
    finally:
        knobs.runtime.jit_post_compile_hook = previous
    assert compiled == []
