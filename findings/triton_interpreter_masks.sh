#!/usr/bin/env bash
# A mask of a block and a condition that holds for all of it, as `(offsets < n) & (tl.program_id(0) == 0)`, which is how one
# program of several stores a result; run by Triton's interpreter on a CPU, and compiled for sm_80 (no GPU is needed).
#
# Expected: what compiles runs in the interpreter, too: TRITON_INTERPRET=1 is there to debug kernels.
# Seen: triton 3.9.0's interpreter refuses it with "mask has unsupported dtype", and its compiler takes it. It computes
# such a mask in int32, and names it int1; triton 3.8.0 does the same, and its load and store take that. So kernels that
# were tested in the interpreter fail there from 3.9 on. A comparison of blocks is taken by all of them:
# `offsets + tl.program_id(0) * n < n`.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/masks.py" <<'EOF_PY'
import os

import torch
import triton
import triton.language as tl


@triton.jit
def by_condition(out_ptr, n):
    offsets = tl.arange(0, 16)
    tl.store(out_ptr + offsets, offsets.to(tl.float32), mask=(offsets < n) & (tl.program_id(0) == 0))


@triton.jit
def by_comparison(out_ptr, n):
    offsets = tl.arange(0, 16)
    tl.store(out_ptr + offsets, offsets.to(tl.float32), mask=offsets + tl.program_id(0) * n < n)


def outcome(kernel):
    if os.environ.get("TRITON_INTERPRET") != "1":
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        triton.compile(ASTSource(kernel, {"out_ptr": "*fp32", "n": "i32"}), target=GPUTarget("cuda", 80, 32))
        return "compiled"
    out = torch.full((16,), -1.0)
    try:
        kernel[(2,)](out, 5)
    except triton.runtime.errors.InterpreterError as error:
        return str(error.__cause__)
    return "right" if out.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0] + 11 * [-1.0] else "wrong"


for kernel in (by_condition, by_comparison):
    print(f"{triton.__version__} {kernel.fn.__name__}: {outcome(kernel)}")
EOF_PY

run() {
  python3 -m venv "$folder/$1"
  "$folder/$1/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
  "$folder/$1/bin/pip" install --quiet --disable-pip-version-check --no-deps --force-reinstall "triton==$1"
  for interpret in 1 0; do
    TRITON_INTERPRET=$interpret TRITON_CACHE_DIR="$folder/cache" "$folder/$1/bin/python" -W ignore "$folder/masks.py"
  done
}

run 3.8.0 > "$folder/seen"
run 3.9.0 >> "$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'EOF_SEEN'
3.8.0 by_condition: right
3.8.0 by_comparison: right
3.8.0 by_condition: compiled
3.8.0 by_comparison: compiled
3.9.0 by_condition: mask has unsupported dtype
3.9.0 by_comparison: right
3.9.0 by_condition: compiled
3.9.0 by_comparison: compiled
EOF_SEEN
