#!/usr/bin/env bash
# NumPy's float32 product of a matrix whose rows are all the same number for number, by one thread.
#
# Expected: rows that are the same. Each is the same sum of the same products, and the place of a row is no part of it.
# Seen (numpy 2.4.6 with its own OpenBLAS 0.3.31, x86-64): with OpenBLAS's code for Haswell, which CPUs with AVX2 and
# without AVX-512 get, some rows have other bits than the first: 6 of 16 at 16 x 16 x 16, 34 of 64 at 64 x 64 x 64. With
# its code for SandyBridge, which is older, all are the same. So a test of bits that goes through NumPy's product, by
# Triton's interpreter for one, passes or fails by the CPU that it runs on.
set -eu

grep -q -w avx2 /proc/cpuinfo || { echo "needs an x86-64 CPU with AVX2"; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6

cat > "$folder/rows.py" <<'EOF'
import numpy as np

draw = np.random.default_rng(0)
for size in (16, 64):
    row, matrix = (draw.standard_normal(shape, dtype=np.float32) for shape in ((1, size), (size, size)))
    product = np.repeat(row, size, axis=0) @ matrix
    print(f"{size}: {int((product != product[0]).any(axis=1).sum())} rows differ")
EOF

rows() {
  env -u OPENBLAS_L2_SIZE OPENBLAS_CORETYPE="$1" OPENBLAS_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/rows.py"
}

haswell=$(rows Haswell)
sandybridge=$(rows Sandybridge)
printf 'Haswell:\n%s\nSandyBridge:\n%s\n' "$haswell" "$sandybridge"
[ "$haswell" = $'16: 6 rows differ\n64: 34 rows differ' ]
[ "$sandybridge" = $'16: 0 rows differ\n64: 0 rows differ' ]
