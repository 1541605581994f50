#!/usr/bin/env bash
# A plain attention kernel (tiles of 64 x 32, head size 32, bfloat16, 8 warps), compiled ahead of time for sm_80; no GPU
# is needed.
#
# Expected: no spill. A thread may have 255 registers, and the kernel needs 85.
# Seen (triton 3.9.0): it is given 80 and spills 8 bytes to the stack. With 80 a multiprocessor's 65,536 registers hold
# three programs of 256 threads, with 85 two. The launch option maxnreg=255, which is the hardware's limit anyway, gives
# it 85, and nothing is spilled. Triton 3.7.1 does the same, with 84. So a spill does not say that a tile is too large, and
# triton's n_spills, or a table of tiles that is chosen by it, turns with small changes of a kernel or the compiler.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/spills.py" <<'EOF'
import pathlib
import re
import subprocess

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def attention(
    q_ptr, k_ptr, v_ptr, out_ptr, length, stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, DIM)
    q = tl.load(q_ptr + rows[:, None] * stride + columns, mask=rows[:, None] < length, other=0.0)
    top = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    for start in range(0, length, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptr + keys[None, :] * stride + columns[:, None], mask=keys[None, :] < length, other=0.0)
        score = tl.where(keys[None, :] < length, tl.dot(q, k) * 0.125, -1e30)
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        v = tl.load(v_ptr + keys[:, None] * stride + columns, mask=keys[:, None] < length, other=0.0)
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None])
        total = total * shrink + tl.sum(weight, 1)
        top = higher
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * stride + columns, out, mask=rows[:, None] < length)


def usage(**options):
    constants = {"BLOCK_M": 64, "BLOCK_N": 32, "DIM": 32}
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16")
    signature = {**pointers, "length": "i32", "stride": "i32", **dict.fromkeys(constants, "constexpr")}
    aligned = {(place,): [["tt.divisibility", 16]] for place in (0, 1, 2, 3, 5)}
    options = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True, **options}
    source = ASTSource(attention, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    cubin = pathlib.Path(__file__).with_suffix(".cubin")
    cubin.write_bytes(compiled.asm["cubin"])
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return "registers {}, stack {}".format(*(re.search(rf"(?<!\w){name}:(\d+)", text)[1] for name in ("REG", "STACK")))


print(f"{usage()}; maxnreg=255: {usage(maxnreg=255)}")
EOF

spills() {
  python3 -m venv "$folder/$1"
  "$folder/$1/bin/pip" install --quiet --disable-pip-version-check "$1"
  TRITON_CACHE_DIR="$folder/cache-$1" "$folder/$1/bin/python" "$folder/spills.py"
}

old=$(spills triton==3.7.1)
new=$(spills triton==3.9.0)
printf 'triton 3.7.1: %s\ntriton 3.9.0: %s\n' "$old" "$new"
[ "$old" = "registers 80, stack 8; maxnreg=255: registers 84, stack 0" ]
[ "$new" = "registers 80, stack 8; maxnreg=255: registers 85, stack 0" ]
