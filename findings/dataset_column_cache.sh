#!/usr/bin/env bash
# A column of numbers added to a dataset that was loaded from a disk and shuffled: add_column.
#
# Expected: the column is kept beside the rest, as it is where the dataset is not shuffled: nothing is written.
# Seen (datasets 5.2.0): all columns of all rows are first written in the new order (flatten_indices), into a file
# cache-*.arrow in the dataset's own folder, which stays there when the process has ended. So a dataset takes twice its
# place on the disk for one more number a row. The same follows select, for the selected rows, unless they are one
# range. After disable_caching() the copy goes to a folder of temporary files. A dataset in memory writes nothing.
# fastcls makes its columns as long as the unshuffled dataset and keeps the order of rows as it is.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0

cat > "$folder/column.py" <<'PY'
import pathlib
import sys

import datasets

datasets.disable_progress_bars()
print("datasets", datasets.__version__)
place = pathlib.Path(sys.argv[1]) / "texts"
ROWS = 2000


def sizes() -> dict[pathlib.Path, int]:
    return {path: path.stat().st_size for path in pathlib.Path(sys.argv[1]).rglob("*.arrow")}


def written_by_a_column(dataset: datasets.Dataset) -> int:
    """The bytes of the files that are new when a column is added."""
    before = sizes()
    with_numbers = dataset.add_column("number", list(range(len(dataset))))
    assert with_numbers["number"][:] == list(range(len(dataset)))
    new = {path: size for path, size in sizes().items() if path not in before}
    assert all(path.parent == place for path in new), new
    return sum(new.values())


in_memory = datasets.Dataset.from_dict({"text": ["a text of some words " * 40] * ROWS})
in_memory.save_to_disk(place)
stored = sum(sizes().values())
print(f"{ROWS} rows, {stored} bytes; a column of numbers is {8 * ROWS}")
loaded = datasets.load_from_disk(place)
written = {
    "loaded": written_by_a_column(loaded),
    "loaded, rows of one range": written_by_a_column(loaded.select(range(ROWS // 2))),
    "loaded, every second row": written_by_a_column(loaded.select(range(0, ROWS, 2))),
    "loaded, shuffled": written_by_a_column(loaded.shuffle(seed=0)),
    "in memory, shuffled": written_by_a_column(in_memory.shuffle(seed=0)),
}
for name, number in written.items():
    print(f"{name}: {number} bytes written to the dataset's folder")
assert not written["loaded"] + written["loaded, rows of one range"] + written["in memory, shuffled"]
assert written["loaded, every second row"] > 0.4 * stored, "no longer so"
assert written["loaded, shuffled"] > 0.8 * stored, "no longer so"
PY
# Whatever datasets keeps of its own goes here, too.
HF_HOME="$folder/hub" "$folder/venv/bin/python" "$folder/column.py" "$folder"
echo "left behind, with their sizes:"
find "$folder/texts" -name "cache-*.arrow" -size +100k -printf "%f %s\n" | grep .
