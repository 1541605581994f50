"""Files of texts are read as they are: every row in its place, bad ones with their reason, bounded memory."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcls.files.rows import BATCH_ROWS
from fastcls.files.sources import Columns, Source, open_sources

pa = pytest.importorskip("pyarrow", reason="files are read with pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="files are read with pyarrow")

ANY = Columns()
LABELS = Columns(keep=("label",))


class Read(NamedTuple):
    texts: list[str | None]
    pairs: list[str | None] | None
    kept: list[dict[str, Any]]
    places: list[int]
    problems: dict[int, str]


def joined(source: Source, first: int = 0) -> Read:
    """All rows of a source, and that their batches are what they say."""
    texts: list[str | None] = []
    pairs: list[str | None] = []
    kept: list[dict[str, Any]] = []
    places: list[int] = []
    problems: dict[int, str] = {}
    has_pairs = False
    for rows in source.rows(first):
        count = len(rows.texts)
        assert 0 < count <= BATCH_ROWS
        assert rows.kept.schema.equals(source.schema, check_metadata=True)
        assert rows.kept.num_rows == len(rows.places) == count
        rows.kept.validate(full=True)
        problems |= {len(texts) + row: problem for row, problem in rows.problems.items()}
        texts += rows.texts
        kept += rows.kept.to_pylist()
        places += rows.places
        if rows.pairs is not None:
            has_pairs = True
            pairs += rows.pairs
    for row in range(len(texts)):
        is_missing = texts[row] is None or (has_pairs and pairs[row] is None)
        assert row in problems or not is_missing
    return Read(texts, pairs if has_pairs else None, kept, places, problems)


def opened(path: Path | str, columns: Columns = ANY, **options: Any) -> Source:
    (source,) = open_sources([str(path)], columns, **options)
    return source


def read(path: Path | str, columns: Columns = ANY, first: int = 0, **options: Any) -> Read:
    return joined(opened(path, columns, **options), first)


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def table(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def arrow(path: Path, content: Any, stream: bool = False, batch: int = 1000) -> Path:
    opened = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, opened(file, content.schema) as writer:
        writer.write_table(content, batch)
    return path


def lines_of(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# Strings whose bytes nobody checked.
def unchecked(values: Sequence[bytes | None]) -> Any:
    bytes_of = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), bytes_of.buffers())


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("", []),
        ("\n", [""]),
        ("one", ["one"]),
        ("one\n", ["one"]),
        ("one\n\n", ["one", ""]),
        ("a\r\nb\r\n\r\nc\r", ["a", "b", "", "c"]),
        ("\ufeffa\n\ufeffb\n", ["a", "\ufeffb"]),
        ("a\u2028b\x0bc\x85d\re\n", ["a\u2028b\x0bc\x85d\re"]),
        ("x" * 3_000_000 + "\nshort\n" + "y" * 2_000_000, ["x" * 3_000_000, "short", "y" * 2_000_000]),
    ],
    ids=["empty", "blank", "no_end", "one", "two_ends", "crlf", "mark", "no_ends_of_lines", "long"],
)
def test_lines_are_texts(tmp_path: Path, content: str, texts: list[str]) -> None:
    found = read(written(tmp_path / "a.txt", content))
    assert found == Read(list(texts), None, [{"text": text} for text in texts], [*range(1, len(texts) + 1)], {})


def test_line_that_is_not_utf8_is_bad_alone(tmp_path: Path) -> None:
    found = read(written(tmp_path / "a.txt", b"fine\nbad \xff\n\xe2\x82\nfine\n"))
    assert found.texts == ["fine", None, None, "fine"]
    assert found.problems == {1: "is not UTF-8 at byte 4 (0xff)", 2: "is not UTF-8 at byte 0 (0xe2)"}
    assert [row["text"] for row in found.kept] == found.texts


def test_line_may_hold_a_pair(tmp_path: Path) -> None:
    found = read(written(tmp_path / "a.txt", "a\tb\r\nc\nd\te\tf\n\t\n"), pairs_in_lines=True)
    assert found.texts == ["a", None, None, ""]
    assert found.pairs == ["b", None, None, ""]
    assert found.problems == {
        row: f"has {tabs} tabs, 1 was expected, between two texts" for row, tabs in ((1, 0), (2, 2))
    }
    assert found.kept[0] == {"text": "a", "text_pair": "b"}


def test_line_without_end_is_refused(tmp_path: Path) -> None:
    source = opened(written(tmp_path / "a.txt", b"a\nb\n" + b"x" * (20 << 20)))
    batches = source.rows()
    assert next(batches).texts == ["a", "b"]
    with pytest.raises(ValueError, match=r"a\.txt: line 3 is longer than 16 MiB"):
        next(batches)


def test_objects_are_rows(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": "a\u2028b", "label": 1}, {"label": 2, "text": "", "more": [1]}, {"text": "c"}]
    found = read(written(tmp_path / "a.jsonl", "\ufeff" + lines_of(rows)), LABELS)
    assert found == Read(["a\u2028b", "", "c"], None, [{"label": 1}, {"label": 2}, {"label": None}], [1, 2, 3], {})


BAD_LINES: dict[str, bytes] = {
    "is not JSON: Expecting value: line 1 column 1 (char 0)": b"nonsense",
    "must be an object, got [1]": b"[1]",
    "is empty": b" ",
    "has no column text": b'{"label": 1}',
    "text is null": b'{"text": null}',
    "text must be a string, got 3": b'{"text": 3}',
    "is not UTF-8 at byte 10 (0xff)": b'{"text": "\xff"}',
    "text holds half a character, a lone surrogate, at place 1": b'{"text": "a\\ud800"}',
    "label must be an integer of 64 bits, got 'x'": b'{"text": "a", "label": "x"}',
    "label must be an integer of 64 bits, got True": b'{"text": "a", "label": true}',
    "label must be an integer of 64 bits, got 9223372036854775808": b'{"text": "a", "label": 9223372036854775808}',
}


def test_bad_line_says_why(tmp_path: Path) -> None:
    good = b'{"text": "fine", "label": 7}'
    lines = [good, *(line for bad in BAD_LINES.values() for line in (bad, good))]
    # Blank lines at the end are no rows.
    found = read(written(tmp_path / "a.jsonl", b"\n".join(lines) + b"\n\n \n"), Columns(keep=("text", "label")))
    assert found.problems == {2 * index + 1: problem for index, problem in enumerate(BAD_LINES)}
    assert found.texts[::2] == ["fine"] * (len(BAD_LINES) + 1)
    assert found.places == [*range(1, len(lines) + 1)]
    # A row with a text whose label is bad keeps the text: its problem says the rest.
    assert found.kept[-2] == {"text": "a", "label": None}
    deep = read(written(tmp_path / "b.jsonl", b'{"text": "a"}\n' + b"[" * 100_000 + b"\n" + good + b"\n"))
    assert list(deep.problems) == [1]


def test_kept_columns_of_json_have_the_type_of_their_first_value(tmp_path: Path) -> None:
    first = {"s": "2024-01-01", "b": True, "i": 1, "d": 0.5, "wide": 1, "j": {"k": [1]}, "late": None, "none": None}
    second = {"s": None, "b": False, "i": -5, "d": 2, "wide": 2.5, "j": "é", "late": 3}
    path = written(tmp_path / "a.jsonl", lines_of([{"text": "a"}, {"text": "b"} | first, {"text": "c"} | second]))
    columns = Columns(keep=tuple(first))
    source = opened(path, columns)
    assert [str(kind) for kind in source.schema.types] == [
        *("string", "bool", "int64", "double", "double", "string", "int64", "string")
    ]
    found = joined(source)
    assert found.problems == {}
    assert found.kept[1] == first | {"j": '{"k": [1]}'}
    assert found.kept[2] == second | {"j": '"é"', "none": None}


def test_type_of_a_kept_column_may_stand_far_behind(tmp_path: Path) -> None:
    rows = [{"text": "x" * 1000, "label": None} for _ in range(3000)]
    path = written(tmp_path / "a.jsonl", lines_of([*rows, {"text": "end", "label": 0.5}]))
    assert opened(path, LABELS).schema.field("label").type == pa.float64()
    with pytest.raises(ValueError, match="has no column score; the columns are: text, label"):
        opened(path, Columns(keep=("score",)))


def test_rows_of_csv(tmp_path: Path) -> None:
    content = '\ufeff\r\nid,text,label\r\n1,"a ""b"", c\nd",x\r\n\r\n2,,\r\n3,"",NULL\r\n'
    found = read(written(tmp_path / "a.csv", content), Columns(keep=("id", "label")))
    assert found.texts == ['a "b", c\nd', None, ""]
    assert found.problems == {1: "text is null"}
    assert found.kept == [{"id": "1", "label": "x"}, {"id": "2", "label": None}, {"id": "3", "label": "NULL"}]
    assert found.places == [1, 2, 3]


def test_rows_of_another_width_stand_in_their_place(tmp_path: Path) -> None:
    # Good and bad ones, in runs of many lengths, over several of pyarrow's blocks.
    kinds = [(index * index // 7) % 5 for index in range(9_000)]
    kinds = [3, 3, *kinds, 4, 3, 3]
    pad = "p" * 4000
    rows = [
        {3: f"{index}", 4: f"{index},{pad},c"}.get(kind, f"{index},{pad}{kind}") for index, kind in enumerate(kinds)
    ]
    path = written(tmp_path / "a.csv", "text,pad\n" + "\n".join(rows))
    assert path.stat().st_size > 20 << 20
    problems = {3: "has 1 column, 2 were expected", 4: "has 3 columns, 2 were expected"}
    found = read(path, Columns(keep=("pad",)), first=0, header=True)
    assert found.problems == {index: problems[kind] for index, kind in enumerate(kinds) if kind in problems}
    assert found.texts == [None if kind in problems else str(index) for index, kind in enumerate(kinds)]
    assert [row["pad"] for row in found.kept] == [None if kind in problems else f"{pad}{kind}" for kind in kinds]
    later = read(path, Columns(keep=("pad",)), first=8_000)
    assert later.texts == found.texts[8_000:]
    assert later.places[0] == 8_001


def test_blocks_without_a_good_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = 1 << 16
    monkeypatch.setattr("fastcls.files.delimited.LONGEST_ROW", block)
    count = 6 * block // 101
    bad = ["x" * 100] * count
    lines = ["text,label", *bad, "first,1", *bad, *[""] * (5 * block), "last,2", *bad]
    texts = read(written(tmp_path / "a.csv", "\n".join(lines)), Columns("text")).texts
    assert texts == [*[None] * count, "first", *[None] * count, "last", *[None] * count]


def test_reading_may_end_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcls.files.delimited.LONGEST_ROW", 1 << 16)
    path = written(tmp_path / "a.csv.gz", gzip.compress(b"text\n" + b"a longer text\n" * 300_000))
    threads = threading.active_count()
    for _ in range(20):
        rows = opened(path).rows()
        assert next(rows).texts[0] == "a longer text"
        rows.close()  # type: ignore[attr-defined]
    assert threading.active_count() == threads


def test_bytes_of_csv_that_are_not_utf8_are_bad_alone(tmp_path: Path) -> None:
    # The character that stands for such a byte inside fastcls is none when it stands in a file.
    own = "\U0010f7ff"
    rows = [b"a,1", b"\xff\xfe", b"b \xff,2", b"c,\xe9", f"\u00e9{own},3".encode(), b"d\xc3,4", "é,é".encode()]
    found = read(written(tmp_path / "a.csv", b"text,label\n" + b"\n".join(rows)), Columns(keep=("text", "label")))
    assert found.texts == ["a", None, None, "c", f"é{own}", None, "é"]
    assert found.problems == {
        1: "has 1 column, 2 were expected",
        2: "text is not UTF-8 at byte 2 (0xff)",
        3: "label is not UTF-8 at byte 0 (0xe9)",
        5: "text is not UTF-8 at byte 1 (0xc3)",
    }
    assert [row["label"] for row in found.kept] == ["1", None, "2", None, "3", "4", "é"]


@pytest.mark.parametrize("shift", range(4))
def test_character_between_two_reads(tmp_path: Path, shift: int) -> None:
    text = "x" * ((1 << 20) - 3 - shift) + "😀é€"
    for name in ("a.csv", "a.txt"):
        path = written(tmp_path / name, ("text\n" if name == "a.csv" else "") + text + "\nb\n")
        found = read(path)
        assert found.texts == [text, "b"]
        assert found.problems == {}


def test_quotes_and_header_of_tsv(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tsv", 'text\tlabel\n"a\t1\n5" disk\t2\n')
    assert read(path).texts == ['"a', '5" disk']
    assert read(path, quotes=True).texts == ["a\t1\n5 disk"]
    bare = read(path, Columns("f0", keep=("f1",)), header=False)
    assert bare.texts == ["text", '"a', '5" disk']
    assert bare.kept[0] == {"f1": "label"}
    assert bare.places == [1, 2, 3]


@pytest.mark.parametrize(("name", "ends"), [("a.csv", ", or a quotation mark that nothing closes"), ("a.tsv", "")])
def test_row_that_never_ends(tmp_path: Path, name: str, ends: str) -> None:
    long = '"' + "x\n" * (17 << 20) if name == "a.csv" else "x" * (40 << 20)
    with pytest.raises(ValueError, match=rf"{name}: has a row of more than 16 MiB{ends}$"):
        read(written(tmp_path / name, "text\na\n" + long))


@pytest.mark.parametrize("content", ["text", "text\n", "\ufefftext\r\n"], ids=["bare", "line", "mark"])
def test_header_alone_is_no_row(tmp_path: Path, content: str) -> None:
    assert read(written(tmp_path / "a.csv", content)).texts == []


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ("", ANY, "is empty, it must have a header"),
        ("a,b\n1,2\n", ANY, "which column has the texts.* the columns are: a, b"),
        ("a,b\n1,2\n", Columns("c"), "has no column c; the columns are: a, b"),
        ("a,b\n1,2\n", Columns("a", "c"), "has no column c; the columns are: a, b"),
        ("a,b\n1,2\n", Columns("a", keep=("c",)), "has no column c; the columns are: a, b"),
        ("a,b,a\n1,2,3\n", Columns("a"), "has 2 columns named a"),
    ],
    ids=["empty", "unclear", "text", "pair", "keep", "twice"],
)
def test_columns_that_a_csv_has_not(tmp_path: Path, content: str, columns: Columns, message: str) -> None:
    with pytest.raises(ValueError, match=r"a\.csv: " + message):
        opened(written(tmp_path / "a.csv", content), columns)


def test_unwanted_column_may_stand_twice(tmp_path: Path) -> None:
    found = read(written(tmp_path / "a.csv", "a,b,a\n1,2,3\n"), Columns("b"))
    assert found.texts == ["2"]


TEXT_TYPES = [
    *("string", "large_string", "string_view", "binary", "large_binary"),
    *("binary_view", "dictionary", "dictionary_with_null", "null"),
]


def column_of(kind: str) -> Any:
    values = ["a", None, "é", "a"]
    if kind == "dictionary_with_null":
        return pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 0], pa.int8()), pa.array(["a", None, "é"]))
    if kind == "dictionary":
        return pa.array(values).dictionary_encode()
    if kind == "null":
        return pa.nulls(4)
    if "binary" in kind:
        return pa.array([value and value.encode() for value in values], getattr(pa, kind)())
    return pa.array(values, getattr(pa, kind)())


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        (form, kind)
        for form in ("parquet", "arrow", "stream")
        for kind in TEXT_TYPES
        # pyarrow does not write it.
        if (form, kind) != ("parquet", "dictionary_with_null")
    ],
)
def test_types_of_text_columns(tmp_path: Path, kind: str, form: str) -> None:
    content = {"text": column_of(kind), "label": [1, 2, 3, 4]}
    if form == "parquet":
        path = table(tmp_path / "a.parquet", content)
    else:
        path = arrow(tmp_path / "a.arrow", pa.table(content), stream=form == "stream")
    source = opened(path, Columns(keep=("label", "text")))
    assert source.num_rows == 4
    assert source.schema.equals(pa.schema([("label", pa.int64()), ("text", pa.string())]))
    found = joined(source)
    expected = [None] * 4 if kind == "null" else ["a", None, "é", "a"]
    assert found.texts == expected
    assert found.problems == {row: "text is null" for row, text in enumerate(expected) if text is None}
    assert [row["text"] for row in found.kept] == expected
    assert [row["label"] for row in found.kept] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["a.parquet", "a.feather"])
def test_strings_that_are_not_utf8_are_bad_alone(tmp_path: Path, name: str) -> None:
    columns = {
        "text": unchecked([b"a", b"b\xff", b"c", None]),
        "label": unchecked([b"x", b"y", b"\xfe", b"z"]),
        "more": [["x"], ["y"], ["z"], None],
        "codes": pa.DictionaryArray.from_arrays(pa.array([0, 1, 0, 0]), unchecked([b"ok", b"\xfd"]), safe=False),
    }
    path = tmp_path / name
    if name == "a.parquet":
        # pyarrow itself does not read such a dictionary.
        table(path, columns | {"codes": ["ok", None, "ok", "ok"]})
    else:
        arrow(path, pa.table(columns))
    found = read(path, Columns(keep=("text", "label", "more", "codes")))
    assert found.texts == ["a", None, "c", None]
    assert found.problems[1] == "text is not UTF-8 at byte 1 (0xff)"
    assert found.problems[2].startswith("label is not valid: ")
    assert found.problems[3] == "text is null"
    assert [row["label"] for row in found.kept] == ["x", "y", None, "z"]
    assert [row["codes"] for row in found.kept] == ["ok", None, "ok", "ok"]


def test_columns_of_tables(tmp_path: Path) -> None:
    one = table(tmp_path / "a.parquet", {"n": [1], "a.b": ["x"], "a": [{"b": 2}]})
    found = read(one, Columns(keep=("a", "n")))
    assert found.texts == ["x"]
    assert found.kept == [{"a": {"b": 2}, "n": 1}]
    assert read(one, Columns(keep=())).kept == [{}]
    with pytest.raises(ValueError, match=r"a\.parquet: column n must hold strings, it is int64"):
        opened(one, Columns("n"))
    with pytest.raises(ValueError, match=r"a\.parquet: column a must hold strings, it is struct"):
        opened(one, Columns("a.b", "a"))
    none = table(tmp_path / "b.parquet", {"text": pa.array([], pa.string())})
    assert opened(none).num_rows == 0
    assert read(none).texts == []


def many(count: int) -> list[str]:
    return [f"text {index}" for index in range(count)]


@pytest.mark.parametrize("first", [0, 1, 1000, 1999, 3100, 5000, 5001])
@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl", "a.csv", "a.tsv", "a.parquet", "a.arrow", "b.arrow", "a.csv.gz", "a.jsonl.zst"]
)
def test_rows_from_one_on(tmp_path: Path, name: str, first: int) -> None:
    texts = many(5000)
    path = tmp_path / name
    plain = {
        "txt": "\n".join(texts),
        "jsonl": lines_of([{"text": text} for text in texts]),
        "csv": "text\n" + "\n".join(texts),
        "tsv": "text\n" + "\n".join(texts),
    }.get(name.split(".")[1], "")
    if name == "a.parquet":
        table(path, {"text": texts}, row_group_size=1000)
    elif name.endswith(".arrow"):
        arrow(path, pa.table({"text": texts}), stream=name[0] == "b")
    elif name.endswith(".gz"):
        written(path, gzip.compress(plain.encode()))
    elif name.endswith(".zst"):
        written(path, pa.compress(plain.encode(), codec="zstd", asbytes=True))
    else:
        written(path, plain)
    source = opened(path)
    fractions: list[float] = []
    seen: list[str | None] = []
    for rows in source.rows(first):
        assert rows.places[0] == first + len(seen) + 1
        seen += rows.texts
        fraction = source.fraction()
        assert fraction is not None
        fractions.append(fraction)
    assert seen == texts[first:]
    assert fractions == sorted(fractions)
    assert source.fraction() == 1.0
    if first == 0:
        # Steadily, not at once with the first block.
        assert fractions[0] == pytest.approx(512 / 5000, abs=0.1)


def test_row_groups_before_the_first_row_are_not_read(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", {"text": many(3000)}, row_group_size=1000, compression="none")
    broken = path.read_bytes().replace(b"text 5", b"\xff\xff\xff\xff\xff\xff")
    pages = pq.ParquetFile(path).metadata.row_group(0).column(0)
    start = pages.dictionary_page_offset or pages.data_page_offset
    written(path, broken[:start] + b"\0" * 64 + broken[start + 64 :])
    assert read(path, first=1000).texts == many(3000)[1000:]
    with pytest.raises(OSError, match=r"a\.parquet: reading stopped after row 0: "):
        read(path)


@pytest.mark.parametrize(("rows", "length"), [(40_000, 1000), (400, 100_000)])
def test_of_a_parquet_file_little_is_held(tmp_path: Path, rows: int, length: int) -> None:
    texts = [os.urandom(length // 2).hex() for _ in range(rows)]
    path = table(tmp_path / "a.parquet", {"text": texts}, row_group_size=rows // 20, compression="none")
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in opened(path).rows()]
    # Of 40 million bytes those of a read, and pages and buffers of about a million each.
    assert max(held) < 15_000_000


@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv", "tsv"])
@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_compressed_files_of_several_members(tmp_path: Path, ending: str, compression: str) -> None:
    parts = {"jsonl": ['{"text": "a"}\n', '{"text": "b"}']}.get(ending, ["a\n", "b"])
    if ending in ("csv", "tsv"):
        parts[0] = "text\n" + parts[0]
    members = [
        gzip.compress(part.encode()) if compression == "gz" else pa.compress(part.encode(), codec="zstd", asbytes=True)
        for part in parts
    ]
    assert read(written(tmp_path / f"a.{ending}.{compression}", b"".join(members))).texts == ["a", "b"]


@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv", "tsv"])
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_rows_before_a_broken_end_are_read(tmp_path: Path, ending: str, compression: str) -> None:
    texts = [f"text {index} {hash((index, 7)) % 99991}" for index in range(200_000)]
    plain = lines_of([{"text": text} for text in texts]) if ending == "jsonl" else "\n".join(texts)
    if ending in ("csv", "tsv"):
        plain = "text\n" + plain
    packed = pa.compress(plain.encode(), codec=compression, asbytes=True) if compression == "zstd" else b""
    packed = packed or gzip.compress(plain.encode())
    path = written(tmp_path / f"a.{ending}.{'zst' if packed[0] == 0x28 else 'gz'}", packed[: len(packed) * 2 // 3])
    seen: list[str | None] = []

    def read_on() -> None:
        for rows in opened(path).rows():
            assert not rows.problems
            seen.extend(rows.texts)

    with pytest.raises(OSError, match=r"a\.\w+\.\w+: reading stopped after row \d+: ") as raised:
        read_on()
    # None of half a text.
    assert seen == texts[: len(seen)]
    assert len(seen) > 100_000
    assert f"after row {len(seen)}: " in str(raised.value)


def test_files_that_are_none_of_their_kind(tmp_path: Path) -> None:
    for name, content in (("a.parquet", b"PAR1 no"), ("b.arrow", b"ARROW1 no"), ("c.arrow", b""), ("d.feather", b"no")):
        with pytest.raises(ValueError, match=rf"{name}: cannot be read as (parquet|arrow): "):
            opened(written(tmp_path / name, content))
    stream = arrow(tmp_path / "e.arrow", pa.table({"text": many(3000)}), stream=True)
    written(stream, stream.read_bytes()[:-3000])
    source = opened(stream)
    assert source.num_rows is None
    with pytest.raises(OSError, match=r"e\.arrow: reading stopped after row 2000: "):
        joined(source)


def test_file_that_disappears(tmp_path: Path) -> None:
    for name in ("a.txt", "a.csv", "a.jsonl"):
        source = opened(written(tmp_path / name, '{"text": "a"}\n' if name == "a.jsonl" else "text\na\n"))
        (tmp_path / name).unlink()
        with pytest.raises(OSError, match=rf"{name}: reading stopped after row 0: "):
            joined(source)


def test_patterns_come_sorted(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.csv"):
        written(tmp_path / name, "text\n")
    (tmp_path / "[x].txt").write_text("literal\n")
    sources = open_sources([str(tmp_path / "[x].txt"), str(tmp_path / "?.*")], ANY)
    assert [Path(source.name).name for source in sources] == ["[x].txt", "a.txt", "b.txt", "c.csv"]


@pytest.mark.parametrize(
    ("paths", "options", "message"),
    [
        (["*.csv"], {}, r"\*\.csv: no file matches this pattern"),
        (["b.txt"], {}, r"b\.txt: there is no such file"),
        (["a.xyz"], {}, r"a\.xyz: its ending names no format .*\.parquet.*: pass format"),
        (["a.txt"], {"format": "xml"}, "format must be one of txt, .*, got 'xml'"),
        (["a.txt"], {"header": False}, "header is for files of the format csv or tsv"),
        (["a.txt"], {"quotes": False}, "quotes is for files of the format csv or tsv"),
        (["a.xyz"], {"format": "csv", "pairs_in_lines": True}, "pairs_in_lines is for files of the format txt"),
        (["-", "-"], {}, "only once"),
        (["-"], {"format": "parquet"}, "standard input must be txt, jsonl, csv or tsv, got parquet"),
        (["a.parquet.gz"], {}, r"a\.parquet\.gz: parquet is read only as it is"),
        (["."], {}, r"is a folder, but no data set that datasets' save_to_disk wrote"),
        ([], {}, "at least one file"),
        ("a.txt", {}, "must be a list of paths, got 'a.txt'"),
        (["a.txt"], {"columns": Columns(keep=("text", "text"))}, "each column once, got text, text"),
        (["a.txt"], {"columns": Columns("text", "text")}, "must be two columns, got text"),
        (["a.txt"], {"columns": Columns("body")}, r"a\.txt: has no column body; the columns are: text"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: Any, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "a.xyz", "a.parquet.gz"):
        written(tmp_path / name, "text\n")
    with pytest.raises(ValueError, match=message):
        open_sources(paths, options.pop("columns", ANY), **options)


def test_files_agree_in_their_kept_columns(tmp_path: Path) -> None:
    one = written(tmp_path / "a.jsonl", lines_of([{"text": "a", "label": 1}]))
    other = written(tmp_path / "b.jsonl", lines_of([{"text": "a", "label": "x"}]))
    message = r"b\.jsonl: its kept columns are label \(string\), those of .*a\.jsonl are label \(int64\)"
    with pytest.raises(ValueError, match=message):
        open_sources([str(one), str(other)], LABELS)
    # Nulls alone, or no row at all, fit to any type.
    nulls = written(tmp_path / "c.jsonl", lines_of([{"text": "a", "label": None}]))
    empty = written(tmp_path / "d.jsonl", "")
    sources = open_sources([str(nulls), str(empty), str(one)], LABELS)
    assert [source.schema.field("label").type for source in sources] == [pa.int64()] * 3
    assert [joined(source).kept for source in sources] == [[{"label": None}], [], [{"label": 1}]]
    # A type that JSON has not, too.
    pq.write_table(pa.table({"text": ["a"], "label": pa.array([1], pa.int32())}), tmp_path / "e.parquet")
    sources = open_sources([str(nulls), str(tmp_path / "e.parquet")], LABELS)
    assert [source.schema.field("label").type for source in sources] == [pa.int32()] * 2
    assert [joined(source).kept for source in sources] == [[{"label": None}], [{"label": 1}]]


@pytest.mark.parametrize(
    ("format_", "content"),
    [
        (None, "a\nb\n"),
        ("txt", "a\nb\n"),
        ("csv", "label,text\n1,a\n2,b\n"),
        ("tsv", "label\ttext\n1\ta\n2\tb\n"),
        ("jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n'),
    ],
)
def test_standard_input(monkeypatch: pytest.MonkeyPatch, format_: str | None, content: str) -> None:
    class Pipe:
        buffer = io.BytesIO(content.encode())

    monkeypatch.setattr(sys, "stdin", Pipe)
    source = opened("-", Columns(keep=("text",)), format=format_)
    assert source.name == "standard input"
    found = joined(source)
    assert found.texts == ["a", "b"]
    assert source.fraction() is None
    with pytest.raises(ValueError, match="standard input can be read only once"):
        joined(source)


def test_standard_input_of_more_than_its_first_block(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"é {index}" for index in range(150_000)]

    class Pipe:
        buffer = io.BytesIO(lines_of([{"text": text, "label": 1} for text in texts]).encode())

    monkeypatch.setattr(sys, "stdin", Pipe)
    seen = [text for rows in opened("-", LABELS, format="jsonl").rows() for text in rows.texts]
    assert seen == texts


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_whose_first_block_has_nulls_alone(tmp_path: Path) -> None:
    path, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    os.mkfifo(path)
    pq.write_table(pa.table({"text": ["a"], "label": pa.array([1], pa.int32())}), table)
    rows = [{"text": "x" * (1 << 20), "label": None}, {"text": "b", "label": 3}]
    writer = threading.Thread(target=path.write_text, args=[lines_of(rows)], daemon=True)
    writer.start()
    piped, _ = open_sources([str(path), str(table)], LABELS)
    assert joined(piped).problems == {1: "label must be null, as JSON has no int32, its type in other files, got 3"}


def test_data_sets_of_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="writes the folders")
    texts = many(2500)
    rows = datasets.Dataset.from_dict({"text": texts, "label": [*range(2500)]})
    rows.save_to_disk(str(tmp_path / "one"), num_shards=3)
    source = opened(tmp_path / "one", LABELS)
    assert source.num_rows == 2500
    found = joined(source, 1200)
    assert found.texts == texts[1200:]
    assert found.places[0] == 1201
    # Chosen rows are written as such.
    rows.select([3, 1]).save_to_disk(str(tmp_path / "two"))
    assert read(tmp_path / "two").texts == ["text 3", "text 1"]
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match=r"splits: holds splits, name one of .*splits/train, .*splits/test"):
        opened(tmp_path / "splits")
    assert opened(tmp_path / "splits" / "test").num_rows == 2500


def test_files_of_pandas(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="writes the files")
    frame = pandas.DataFrame({"text": ["a, b", "", 'c "d"\ne', "NA"], "label": pandas.Categorical(list("xyxz"))})
    frame.to_csv(tmp_path / "a.csv.gz", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True, force_ascii=False)
    for name in ("a.parquet", "a.jsonl"):
        found = read(tmp_path / name, Columns(keep=("label",)))
        assert found.texts == [*frame["text"]]
        assert [row["label"] for row in found.kept] == list("xyxz")
    # pandas writes an empty text like a missing one.
    assert read(tmp_path / "a.csv.gz").texts == ["a, b", None, 'c "d"\ne', "NA"]


TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=8)


@settings(max_examples=60)
@given(texts=TEXTS, labels=st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=8, max_size=8))
def test_round_trips(tmp_path_factory: pytest.TempPathFactory, texts: list[str], labels: list[int]) -> None:
    folder = tmp_path_factory.mktemp("round")
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=False)]
    jsonl = written(folder / "a.jsonl", lines_of(rows))
    parquet = table(folder / "a.parquet", {"text": pa.array(texts, pa.string()), "label": labels[: len(texts)]})
    for path in (jsonl, parquet):
        found = read(path, LABELS)
        assert found.texts == texts
        assert found.kept == [{"label": label} for label in labels[: len(texts)]]
    out = io.StringIO(newline="")
    writer = csv.writer(out, quoting=csv.QUOTE_ALL)
    writer.writerows([("text", "label"), *((row["text"], row["label"]) for row in rows)])
    found = read(written(folder / "a.csv", out.getvalue()), LABELS)
    assert found.texts == texts
    assert found.kept == [{"label": str(row["label"])} for row in rows]
