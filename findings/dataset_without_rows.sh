#!/usr/bin/env bash
# Datasets of which no row is left, as a filter that nothing passes leaves them: a column added, and saved and loaded.
#
# Expected: a dataset without rows again, with the column, and with its features as they were saved.
# Seen (datasets 5.2.0): of one table it is so. Of two that were joined (concatenate_datasets), add_column raises
# ValueError "tables don't have the same number of rows", though both have none. What select([]) leaves is saved without
# any data file and without a word, and load_from_disk then raises IndexError "list index out of range"; what a filter
# leaves is saved with an empty file, and loads.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0

cat > "$folder/empty.py" <<'PY'
import pathlib
import sys
from collections.abc import Callable

import datasets
from datasets import Dataset

datasets.disable_progress_bars()
print("datasets", datasets.__version__)
place = pathlib.Path(sys.argv[1])
one = Dataset.from_dict({"text": ["a", "b"]})
joined = datasets.concatenate_datasets([one, one])


def outcome(work: Callable[[], Dataset]) -> str:
    try:
        dataset = work()
    except (ValueError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{len(dataset)} rows of {dataset.column_names}"


for name, whole in (("one table", one), ("joined tables", joined)):
    for way, empty in (("filter", whole.filter(lambda row: False)), ("select", whole.select([]))):
        added = outcome(lambda: empty.add_column("number", []))
        print(f"{name}, {way}, add_column: {added}")
        assert added.startswith("0 rows" if whole is one else "ValueError: "), "no longer so"
        saved = place / f"{name} {way}"
        empty.save_to_disk(saved)
        loaded = outcome(lambda: datasets.load_from_disk(saved))
        files = [path.name for path in saved.glob("*.arrow")]
        print(f"{name}, {way}, saved as {files or 'no file of data'}, loaded: {loaded}")
        assert loaded.startswith("0 rows" if way == "filter" else "IndexError: "), "no longer so"
PY
# Whatever datasets keeps of its own goes here, too.
HF_HOME="$folder/hub" "$folder/venv/bin/python" "$folder/empty.py" "$folder"
