#!/usr/bin/env bash
# PyTorch's scaled_dot_product_attention on a CPU, of queries one of which is NaN, by the number of keys.
#
# Expected: NaN in that query's row, whatever the number of keys is. Its scores are NaN, and so are their softmax and sum.
# The math backend gives that, and the flash one does with a mask that keeps everything.
# Seen (torch 2.13.0 for CPUs; 2.11.0, 2.14.1 and 2.15.0 do the same): without a mask the flash backend, which is the
# default, gives zeros while there are fewer keys than numbers in a vector, 16 in float32 with AVX-512. A model that
# diverged gives a finite, confident answer for short texts, and NaN for longer ones.
set -eu

grep -q -w avx512f /proc/cpuinfo || { echo "needs a CPU with AVX-512"; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy

cat > "$folder/attention.py" <<'PY'
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def without_nan(masked: bool) -> list[int]:
    """The numbers of keys at which the row of the NaN query has none."""
    found = []
    for keys in range(1, 40):
        q, k, v = torch.randn(3, 1, 1, keys, 16).unbind(0)
        q = q.clone()
        q[..., 0, :] = float("nan")
        mask = torch.ones(keys, keys, dtype=torch.bool) if masked else None
        if not F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0, 0, 0].isnan().all():
            found.append(keys)
    return found


print(torch.__version__, torch.backends.cpu.get_cpu_capability())
default = without_nan(masked=False)
print("default, no mask:", default)
masked = without_nan(masked=True)
print("default, a mask that keeps everything:", masked)
with sdpa_kernel(SDPBackend.MATH):
    plain = without_nan(masked=False)
print("math backend:", plain)
assert default == list(range(1, 16)), "no longer so"
assert masked == plain == []
PY
ATEN_CPU_CAPABILITY=avx512 "$folder/venv/bin/python" "$folder/attention.py"
