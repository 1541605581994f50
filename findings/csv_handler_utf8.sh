#!/usr/bin/env bash
# A CSV file of another encoding than UTF-8, all of whose columns are read as bytes (type binary, check_utf8=False),
# with an invalid_row_handler that skips rows of too many columns.
#
# Expected: the handler is called for each such row, and the rest is read, since nothing is to be decoded.
# Seen (pyarrow 26.0.1): pyarrow decodes a bad row's text for the handler, as UTF-8. Where a byte of it is no UTF-8, the
# handler is not called: UnicodeDecodeError goes to stderr as "Exception ignored in", and the whole reading ends with
# ArrowInvalid "Expected 2 columns, got 3", as if no handler had been given. Rows of the right shape with the same bytes
# are read. With encoding="latin-1" the handler is called.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1

cat > "$folder/rows.py" <<'PY'
import io

import pyarrow as pa
import pyarrow.csv

print("pyarrow", pa.__version__)


def read(content: bytes, encoding: str = "utf8") -> tuple[int | str, list[str]]:
    """How many rows are read, or the error, and the rows that the handler was called for."""
    bad: list[str] = []

    def note(row: pyarrow.csv.InvalidRow) -> str:
        bad.append(row.text)
        return "skip"

    try:
        table = pyarrow.csv.read_csv(
            io.BytesIO(content),
            pyarrow.csv.ReadOptions(encoding=encoding),
            pyarrow.csv.ParseOptions(invalid_row_handler=note),
            pyarrow.csv.ConvertOptions(column_types={"a": pa.binary(), "b": pa.binary()}, check_utf8=False),
        )
    except pa.ArrowInvalid as error:
        return f"{type(error).__name__}: {error}", bad
    return table.num_rows, bad


right = read(b"a,b\ncaf\xe9,1\n")
print("right shape, no UTF-8:", right)
ascii_only = read(b"a,b\nx,1\nx,y,z\nx,2\n")
print("too many columns, ASCII:", ascii_only)
other = read(b"a,b\nx,1\ncaf\xe9,y,z\nx,2\n")
print("too many columns, no UTF-8:", ascii(other))
named = read(b"a,b\nx,1\ncaf\xe9,y,z\nx,2\n", "latin-1")
print("the same with its encoding named:", named)
assert right == (1, [])
assert ascii_only == (2, ["x,y,z"])
assert named == (2, ["caf\u00e9,y,z"])
assert isinstance(other[0], str) and "Expected 2 columns, got 3" in other[0] and not other[1], "no longer so"
PY
"$folder/venv/bin/python" "$folder/rows.py"
