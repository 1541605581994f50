#!/usr/bin/env bash
# `accelerate launch --cpu --num_processes 2 script.py`, on a machine without a GPU.
#
# Expected: two processes, or an error, as `torchrun --nproc_per_node 2` starts two.
# Seen (accelerate 1.15.0): one process, which says that it is one of one, status 0, and no word of the other. A run
# that was meant to halve its batches over two takes whole ones.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 accelerate==1.15.0 numpy

cat > "$folder/counts.py" <<'PY'
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
print(f"process {accelerator.process_index} of {accelerator.num_processes}", flush=True)
PY
cd "$folder"
export HF_HOME="$folder/home"
"$folder/venv/bin/accelerate" launch --cpu --num_processes 2 counts.py > launched
"$folder/venv/bin/torchrun" --nproc_per_node 2 counts.py > torchrun
echo "accelerate launch:"; cat launched
echo "torchrun:"; sort torchrun
test "$(grep -c '^process' torchrun)" = 2
test "$(cat launched | grep '^process')" = "process 0 of 1" || { echo "no longer so"; exit 1; }
