#!/usr/bin/env bash
# A Parquet file of many row groups, read with pyarrow's ParquetFile(path, buffer_size=1 << 20).iter_batches(), the way
# that is advised where a file is larger than the memory; each batch is dropped before the next one is read.
#
# Expected: pyarrow holds a batch and some pages, whatever the size of the file, as it does in pyarrow 24.0.0.
# Seen (pyarrow 26.0.1; 25.0.0 was the first): it holds all of the file that was read so far, until the file is closed,
# and of a file that is smaller than about 32 MiB all from the first batch on. ParquetFile's pre_buffer is True by default
# there, which fetches the chunks of columns ahead and keeps them for as long as the reader lives; buffer_size is then
# without effect, and nothing says so. With pre_buffer=False, or a call of iter_batches for each row group, it is as
# before.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/held.py" <<'PY'
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq

path = os.path.join(sys.argv[1], f"{pa.__version__}.parquet")
texts = pa.table({"text": [os.urandom(500).hex() for _ in range(80_000)]})
pq.write_table(texts, path, row_group_size=2000, compression="none")
size = os.path.getsize(path)
del texts


def held(**options: bool) -> tuple[float, float]:
    """The share of the file that pyarrow holds beside a first and a last batch."""
    before = pa.total_allocated_bytes()
    shares = []
    with pq.ParquetFile(path, buffer_size=1 << 20, **options) as file:
        for batch in file.iter_batches(1000):
            shares.append((pa.total_allocated_bytes() - before - batch.nbytes) / size)
    return shares[0], shares[-1]


default, without = held(), held(pre_buffer=False)
print(f"pyarrow {pa.__version__}: held of {size >> 20} MiB beside the first and the last batch, by default", end=" ")
print("{:.2f} and {:.2f}, with pre_buffer=False {:.2f} and {:.2f}".format(*default, *without))
assert max(without) < 0.1
if pa.__version__ == "24.0.0":
    assert max(default) < 0.1
else:
    assert default[-1] > 0.9, "no longer so"
PY

for package in pyarrow==24.0.0 pyarrow==26.0.1; do
    python3 -m venv "$folder/$package"
    "$folder/$package/bin/pip" install --quiet --disable-pip-version-check "$package"
    "$folder/$package/bin/python" "$folder/held.py" "$folder"
done
