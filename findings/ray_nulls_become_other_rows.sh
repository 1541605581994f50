#!/usr/bin/env bash
# Ray Data: a null in a dictionary-encoded column of strings reaches map_batches as another row's text.
#
# Expected: in the default batch format ("numpy") a null is None, or nan, or an error; in no case a value of another
# row. Parquet files written from categories (pandas, polars) have such columns, and pyarrow reads them as dictionaries
# where asked, or where the file's stored schema says so.
# Seen with Ray 2.60.0 and pyarrow 26.0.1: for ["b", null, "c", null] the function is given ["b", "c", "c", "c"]. Without
# a word, so a classifier labels rows that have no text. batch_format="pyarrow" gives None, "pandas" gives nan.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "ray[data]==2.60.0" pyarrow==26.0.1 numpy==2.4.6 pandas==3.1.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import pandas
import pyarrow
import ray

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
ray.data.DataContext.get_current().enable_progress_bars = False
column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, None, 1, None], pyarrow.int32()), ["b", "c"])
dataset = ray.data.from_arrow(pyarrow.table({"text": column}))


def by_numpy(batch):
    return {"seen": [repr(value) for value in batch["text"].tolist()]}


def by_pandas(batch):
    return pandas.DataFrame({"seen": [repr(value) for value in batch["text"]]})


def by_pyarrow(batch):
    return pyarrow.table({"seen": [repr(value) for value in batch.column("text").to_pylist()]})


def seen(function, **options):
    return [row["seen"] for row in dataset.map_batches(function, **options).take_all()]


default, pandas_, arrow = seen(by_numpy), seen(by_pandas, batch_format="pandas"), seen(by_pyarrow, batch_format="pyarrow")
print("default", default, "pandas", pandas_, "pyarrow", arrow)
assert default == ["'b'", "'c'", "'c'", "'c'"], "the default format no longer gives other rows' texts"
assert pandas_ == ["'b'", "nan", "'c'", "nan"]
assert arrow == ["'b'", "None", "'c'", "None"]
PYTHON
echo "still so: nulls of a dictionary column are other rows' texts"
