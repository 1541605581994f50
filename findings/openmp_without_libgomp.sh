#!/usr/bin/env bash
# A C library with an OpenMP loop that was compiled with -fopenmp and linked without it, loaded by ctypes.
#
# Expected: "undefined symbol: GOMP_parallel". Nothing says where that function is, and what Python imports stays local
# to it, as sys.getdlopenflags() has no RTLD_GLOBAL.
# Seen (torch 2.13.0 for CPUs): alone it is so. After "import torch" the library loads and runs in PyTorch's threads, as
# many as torch.set_num_threads says: torch loads libtorch_global_deps.so, and libgomp.so.1 with it, for the whole process. So
# the missing -fopenmp of a linker's line goes unseen in every test that imports torch first; and on purpose, a library
# can share PyTorch's threads without one of its own.
set -eu

command -v cc > /dev/null || { echo "needs a C compiler with OpenMP"; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy

cat > "$folder/team.c" <<'EOF_C'
int team(void) {
  int size = 0;
#pragma omp parallel
#pragma omp atomic
  size++;
  return size;
}
EOF_C
cc -fopenmp -fPIC -c "$folder/team.c" -o "$folder/team.o"
cc -shared "$folder/team.o" -o "$folder/team.so"

cat > "$folder/load.py" <<'EOF_PY'
import ctypes
import sys

assert not sys.getdlopenflags() & ctypes.RTLD_GLOBAL
path = sys.argv[1]
try:
    ctypes.CDLL(path)
    alone = "loads"
except OSError as error:
    alone = str(error).partition(": ")[2]
print("alone:", alone)
import torch

library = ctypes.CDLL(path)
found = []
for count in (1, 2, 3):
    torch.set_num_threads(count)
    found.append(library.team())
print(f"after import torch ({torch.__version__}), with 1, 2 and 3 threads set: {found}")
assert alone == "undefined symbol: GOMP_parallel", "no longer so"
assert found == [1, 2, 3], "no longer so"
EOF_PY
"$folder/venv/bin/python" "$folder/load.py" "$folder/team.so"
