#!/usr/bin/env bash
# The loop of an int8 product: sums of 16 numbers by _mm512_dpbusd_epi32, which begin at zero in each group of columns.
#
# Expected: one vpdpbusd a step and sum, which adds to its register in place. The same loop with the instruction as inline
# assembly has that, and so has clang's.
# Seen (GCC 12.2.0; 11.3.0 does the same): the intrinsic's loop copies every sum to another register and back at each step,
# two moves for each vpdpbusd. With twelve sums that takes a quarter longer (AMD EPYC). Where the loop does not stand in an
# outer one that sets the sums to zero again, nothing is copied: so a small test of the loop does not show it.
set -eu

compiler=$(command -v gcc-12) || { echo "needs gcc-12, and objdump of binutils"; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# Brings clang 22.1.8.
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ziglang==0.17.1

cat > "$folder/product.c" <<'EOF_C'
#include <immintrin.h>
#include <stdint.h>

void product(const int32_t *row, const __m512i *weight, const float *scales, int groups, int steps, float *out) {
  __m512 total[ROWS][4] = {{{0}}};
  for (int group = 0; group < groups; group++) {
    __m512i sums[ROWS][4] = {{{0}}};
    for (int step = 0; step < steps; step++, row++, weight += 4)
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        const __m512i element = _mm512_set1_epi32(row[r * groups * steps]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
#ifdef ASSEMBLY
          __asm__("vpdpbusd %2, %1, %0" : "+v"(sums[r][j]) : "v"(element), "v"(weight[j]));
#else
          sums[r][j] = _mm512_dpbusd_epi32(sums[r][j], element, weight[j]);
#endif
      }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++)
        total[r][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][j]), _mm512_set1_ps(scales[group]), total[r][j]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) _mm512_storeu_ps(out + 16 * (4 * r + j), total[r][j]);
}
EOF_C

cat > "$folder/loop.py" <<'EOF_PY'
import re
import subprocess
import sys

listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", sys.argv[1]], capture_output=True, text=True, check=True)
code = [(int(place, 16), text) for place, text in re.findall(r"^ *([0-9a-f]+):\t(.*)", listing.stdout, re.MULTILINE)]
jumps = [(place, int(to[1], 16)) for place, text in code if (to := re.match(r"j\w+ +([0-9a-f]+) ", text))]
loops = [[text for place, text in code if to <= place <= end] for end, to in jumps if to < end]
# Of the loops around them the innermost, which is the shortest.
inner = min((loop for loop in loops if "vpdpbusd" in str(loop)), key=len)
copies = sum(re.match(r"vmovdq\w+ +%zmm\d+,%zmm\d+", text) is not None for text in inner)
print(f"{str(inner).count('vpdpbusd')} vpdpbusd, {copies} copies")
EOF_PY

loop() {
  "$@" -O3 -mavx512f -mavx512vnni -c "$folder/product.c" -o "$folder/product.o"
  "$folder/venv/bin/python" "$folder/loop.py" "$folder/product.o"
}
clang() { "$folder/venv/bin/python" -m ziglang cc -target x86_64-linux-gnu "$@"; }

"$compiler" --version | head -1
{
  printf 'GCC, one row: %s\n' "$(loop "$compiler" -DROWS=1)"
  printf 'GCC, three rows: %s\n' "$(loop "$compiler" -DROWS=3)"
  printf 'GCC, one row, assembly: %s\n' "$(loop "$compiler" -DROWS=1 -DASSEMBLY)"
  printf 'clang, one row: %s\n' "$(loop clang -DROWS=1)"
} | tee "$folder/seen"
diff "$folder/seen" - <<'EOF_SEEN'
GCC, one row: 4 vpdpbusd, 8 copies
GCC, three rows: 12 vpdpbusd, 24 copies
GCC, one row, assembly: 4 vpdpbusd, 0 copies
clang, one row: 8 vpdpbusd, 0 copies
EOF_SEEN
