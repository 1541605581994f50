"""The command line as a user runs it: real processes, real pipes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from support import tiny_bert
from typer.testing import CliRunner, Result

import fastcls
import fastcls_kernels
from fastcls.flow import MAX_ROWS
from fastcls.loading import parse_device
from fastcls.tools import doctor
from fastcls.tools.cli import app
from fastcls.tools.demo import sample_texts, sample_tokenizer

ROOT = Path(__file__).parents[1]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "fastcls", *map(str, arguments)]


def environment() -> dict[str, str]:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")))
    # Wide and without colours, so that messages stand on one line.
    return {**os.environ, "PYTHONPATH": paths, "COLUMNS": "500", "NO_COLOR": "1", "TRITON_INTERPRET": "0"}


def run(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command(*arguments), input=stdin, capture_output=True, check=False, env=environment(), timeout=300
    )


def inside(*arguments: str | Path, stdin: bytes = b"") -> Result:
    """The same without a process of its own, which would import everything anew."""
    return CliRunner().invoke(app, list(map(str, arguments)), input=stdin)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = sample_tokenizer(sample_texts())
    names = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
    tiny_bert(vocab_size=len(tokenizer), **names).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


LINES = ["Great service, thank you!", "", "où est le colis ?", "¿qué? 日本", "ok"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte order mark, Windows line ends, an empty line, no newline at the end, text beyond ASCII."""
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(LINES).encode())
    return file


@pytest.fixture(scope="module")
def in_ascii(model: Path, texts: Path) -> subprocess.CompletedProcess[bytes]:
    """What a process of its own makes of them where nothing beyond ASCII can be written: it takes long to start."""
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    return subprocess.run(
        command("classify", model, texts), capture_output=True, check=False, env={**environment(), **ascii_alone}
    )


def test_classify_gives_one_json_line_a_text(
    model: Path, texts: Path, in_ascii: subprocess.CompletedProcess[bytes]
) -> None:
    done, piped = in_ascii, inside("classify", model, stdin=texts.read_bytes())
    assert (done.returncode, piped.exit_code) == (0, 0), done.stderr.decode() + piped.output
    assert done.stderr == piped.stderr_bytes == b"", "progress belongs on a terminal only"
    for output in (done.stdout, piped.stdout_bytes):
        rows = [json.loads(line) for line in output.decode().splitlines()]
        assert [row["text"] for row in rows] == LINES
        assert all(set(row) == {"text", "label", "score"} and row["label"] in ("bad", "fair", "good") for row in rows)


def test_a_named_pipe_is_read_once_and_whole(model: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("one\ntwo\n",))
    writer.start()
    done = inside("classify", model, pipe)
    writer.join()
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == ["one", "two"]


def test_output_is_utf8_in_every_locale(in_ascii: subprocess.CompletedProcess[bytes]) -> None:
    assert in_ascii.returncode == 0, in_ascii.stderr.decode()
    assert [json.loads(line)["text"] for line in in_ascii.stdout.decode("utf-8").splitlines()] == LINES


def test_classify_pairs_and_top_k(model: Path) -> None:
    done = inside("classify", model, "--pairs", "--top-k", "2", stdin=b"is it late?\tno\nwhere?\there\n")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["text"], row["text_pair"], len(row["labels"])) for row in rows] == [
        ("is it late?", "no", 2),
        ("where?", "here", 2),
    ]


def test_only_line_ends_are_taken_from_a_text(model: Path) -> None:
    done = inside("classify", model, "--pairs", stdin=b"a\t\n\tb \r\n")
    assert done.exit_code == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["text"], row["text_pair"]) for row in rows] == [("a", ""), ("", "b ")]


def test_empty_input_gives_empty_output(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    for done in (inside("classify", model, tmp_path / "empty.txt"), inside("classify", model)):
        assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")


def test_bad_input_is_one_line_on_stderr(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("fine\ncafé\n".encode("latin-1"))
    long = tmp_path / "long.txt"
    long.write_text("ok\n" + "word " * 200 + "\n")
    for arguments, stdin, message in (
        ((model, latin), b"", f"{latin}, line 2: is not UTF-8 at byte 3 (0xe9): add --errors FILE"),
        ((model, latin, "--strict"), b"", f"{latin}, line 2: is not UTF-8 at byte 3 (0xe9)"),
        ((model,), latin.read_bytes(), "standard input, line 2: is not UTF-8"),
        ((model, tmp_path / "none.txt"), b"", "none.txt: there is no such file"),
        ((model, tmp_path), b"", f"{tmp_path}: "),
        ((tmp_path / "nowhere", latin.parent / "long.txt"), b"", "there is no such folder"),
        ((model, "--pairs"), b"no tab\n", "line 1: has 0 tabs, 1 was expected, between two texts"),
        ((model, "--resume"), b"", "--resume and --overwrite are for files: name one with --output"),
        ((model, "--normalize"), b"", "--normalize is for vectors"),
        ((model, "--threshold", "nan"), b"", "threshold must be a finite number"),
        ((model, "-o", tmp_path / "out.xyz"), b"", "--output must end with .parquet"),
        ((model, "--dtype", "int4"), b"", "dtype must be one of float32, float16, bfloat16, got 'int4'"),
        (
            (model, long, "--long-texts", "error"),
            b"",
            "long.txt, line 2: the text is longer than 96 tokens",
        ),
    ):
        done = inside("classify", *arguments, stdin=stdin)
        assert done.exit_code == 2, arguments
        assert done.stderr.startswith("Error: ")
        assert done.stderr.count("\n") == 1
        assert message in done.stderr
    done = inside("classify", model, long)
    assert done.stdout.count("\n") == 2
    assert done.stderr == "Cut: 1 texts were longer than the model takes; see --long-texts.\n"


@pytest.mark.parametrize(
    ("bad", "options", "message"),
    [
        ("x " * 600, ("--long-texts", "error"), "line 301: the text is longer than 96 tokens"),
        ("caf\udce9", (), "line 301: is not UTF-8 at byte 3"),
        ("no tab", ("--pairs",), "line 301: has 0 tabs"),
    ],
    ids=["too_long", "not_utf8", "no_tab"],
)
def test_all_lines_before_a_bad_one_are_written(model: Path, bad: str, options: tuple[str, ...], message: str) -> None:
    good = [f"some words{chr(9) if '--pairs' in options else ' '}{index}" for index in range(300)]
    stdin = "\n".join([*good, bad, "ok"]).encode(errors="surrogateescape")
    done = inside("classify", model, *options, stdin=stdin)
    assert done.exit_code == 2
    assert message in done.stderr.replace("\n", " ")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    written = ["\t".join(row[key] for key in ("text", "text_pair") if key in row) for row in rows]
    assert written == good


def saved_copy(model: Path, folder: Path, **config: object) -> Path:
    """The model in another folder, where its config says something else."""
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@pytest.fixture(scope="module")
def diverged(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a word whose embedding is no number: [UNK], which a letter from elsewhere becomes."""
    folder = saved_copy(model, tmp_path_factory.mktemp("diverged") / "model")
    tokenizer = sample_tokenizer(sample_texts())
    names = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
    made = tiny_bert(vocab_size=len(tokenizer), **names)
    made.bert.embeddings.word_embeddings.weight.data[tokenizer.unk_token_id] = float("nan")
    made.save_pretrained(folder)
    return folder


def test_scores_that_are_no_numbers_are_null_and_counted(diverged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    done = inside("classify", diverged, stdin="fine\n語\nfine\n語\n".encode())
    assert done.exit_code == 0
    rows = [json.loads(line, parse_constant=refuse) for line in done.stdout.splitlines()]
    assert [(row["label"] is None, row["score"] is None) for row in rows] == [(False, False), (True, True)] * 2
    assert done.stderr == ("Not finite: 2 rows have a score that is infinite or no number.\n")
    done = inside("classify", diverged, "--top-k", "2", stdin="語\n".encode())
    (row,) = (json.loads(line, parse_constant=refuse) for line in done.stdout.splitlines())
    assert [label["score"] for label in row["labels"]] == [None, None]
    assert [label["label"] for label in row["labels"]] == [None, None]


def test_labels_of_any_type_are_written(model: Path, tmp_path: Path) -> None:
    names = {"0": 1, "1": [1, "star"], "2": float("nan")}
    done = inside("classify", saved_copy(model, tmp_path / "model", id2label=names), "--top-k", "3", stdin=b"ok\n")
    (row,) = (json.loads(line, parse_constant=refuse) for line in done.stdout.splitlines())
    assert sorted(str(label["label"]) for label in row["labels"]) == ["1", "[1, 'star']", "nan"]


def test_truncate_cuts_to_what_the_tokenizer_says(model: Path, tmp_path: Path) -> None:
    folder = saved_copy(model, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 8}))
    lines = b"fine and good, and then much more\n" + b"fine and good, and then nothing\n"
    for options, same in (((), True), (("--max-length", "96"), False)):
        done = inside("classify", folder, *options, stdin=lines)
        first, second = (json.loads(line)["score"] for line in done.stdout.splitlines())
        assert (first == second) is same


@pytest.fixture
def many_texts(tmp_path: Path) -> Path:
    """More than a pipe holds, and far more than is classified before the test has acted."""
    file = tmp_path / "many.txt"
    file.write_text("some words to classify\n" * 20_000)
    return file


def start(*arguments: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        bufsize=0,
        # A shell that runs the tests in the background has them ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.full
def test_a_closed_pipe_ends_it_quietly(model: Path, many_texts: Path) -> None:
    with start("classify", model, many_texts) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == b"{"
        process.stdout.close()
        assert process.wait(timeout=120) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""


@pytest.mark.full
def test_ctrl_c_keeps_what_is_done(model: Path, many_texts: Path) -> None:
    with start("classify", model, many_texts) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 128 + signal.SIGINT
        rows = [json.loads(line) for line in (first + out).splitlines()]
        assert 0 < len(rows) < 20_000
        counted = re.fullmatch(r"Interrupted: (\d+) texts classified\.\n", err.decode())
        assert counted is not None, err.decode()
        # Of a window that is being written when Ctrl-C comes some lines are there, and none are counted.
        assert 0 <= len(rows) - int(counted.group(1)) <= MAX_ROWS


def test_doctor_says_what_runs_and_why() -> None:
    done = run("doctor")
    assert done.returncode == 0
    for expected in ("torch", "triton", "transformers", "plain PyTorch on packed data", "fastcls runs on"):
        assert expected in done.stdout.decode()


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cuda")])
def test_doctor_names_the_device_that_is_taken(gpus: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = SimpleNamespace(name="GPU", total_memory=2**33)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: made_up)
    monkeypatch.setattr(fastcls_kernels, "explain_backend", lambda _: ("torch", "it is made up"))
    out = io.StringIO()
    doctor.report(Console(file=out, width=200))
    assert f"fastcls runs on {device}." in out.getvalue()
    assert parse_device(None).type == device


INSTRUCTIONS: dict[str, tuple[dict[str, int], bool, str]] = {
    "both": (
        {"avx2": True, "avx512_vnni": True, "avx512_bf16": True, "l2_cache_size": 1},
        True,
        "int8 and bfloat16 are fast here: the CPU has AVX512_VNNI, AVX512_BF16$",
    ),
    "int8": (
        {"avx512_vnni": True, "avx_vnni": True, "avx512_bf16": False},
        True,
        "int8 is fast here, bfloat16 is not: the CPU has AVX512_VNNI, AVX_VNNI$",
    ),
    "not_built": (
        {"amx_int8": True, "amx_bf16": True},
        False,
        "bfloat16 is fast here, int8 is not: the CPU has AMX_INT8, AMX_BF16; int8 needs the compiled kernels, too$",
    ),
    "arm": ({"neon": True, "bf16": True}, False, "bfloat16 is fast here, int8 is not: the CPU has BF16$"),
    "told to take avx2": (
        {"avx_vnni": True, "avx512_vnni": True, "avx512_bf16": True, "told to take avx2": 0},
        True,
        "int8 is fast here, bfloat16 is not: the CPU has AVX_VNNI$",
    ),
    "neither": ({"avx2": True, "avx512_vnni": False}, False, "neither int8 nor bfloat16 is .*: the CPU has no VNNI"),
}


@pytest.mark.parametrize(("has", "compiled", "told"), list(INSTRUCTIONS.values()), ids=list(INSTRUCTIONS))
@pytest.mark.parametrize("told_by", ["torch", "system"])
def test_doctor_says_which_reduced_precision_is_fast(
    has: dict[str, int], compiled: bool, told: str, told_by: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "explain_compiled", lambda *_: (compiled, "it is made up"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    capability = "AVX2" if "told to take avx2" in has else "AVX512"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    if told_by == "system":
        monkeypatch.delattr(torch.cpu, "get_capabilities")
        flags = " ".join(name for name, value in has.items() if value is True)
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n")
        monkeypatch.setattr(doctor, "_CPUINFO", tmp_path / "cpuinfo")
    out = io.StringIO()
    doctor.report(Console(file=out, width=300))
    (path,) = (line for line in out.getvalue().splitlines() if line.split()[:1] == ["path"])
    assert ("compiled kernels, it is made up;" if compiled else "Compiled kernels cannot run: it is made up") in path
    (line,) = (line for line in out.getvalue().splitlines() if line.split()[:1] == ["reduced"])
    assert re.search(told, line.rstrip())


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "not_compiled"])
def test_doctor_goes_on_where_nothing_is_known_of_the_cpu(
    compiled: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "explain_compiled", lambda *_: (compiled, "it is made up"))
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(doctor, "_CPUINFO", tmp_path / "none")
    out = io.StringIO()
    doctor.report(Console(file=out, width=300))
    assert f"int8 is {'fast' if compiled else 'not fast'} here; nothing says what the CPU has for" in out.getvalue()
    assert "fastcls runs on" in out.getvalue()


def test_int8_reaches_the_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def recorded(given: Any, **options: Any) -> Any:
        asked.append(options.get("quantize"))
        return fastcls.optimize(given, **options)

    monkeypatch.setattr("fastcls.classifier.optimize", recorded)
    for options in ((), ("--quantize", "int8")):
        done = inside("classify", model, "--device", "cpu", *options, stdin=b"ok\n")
        assert (done.exit_code, done.stdout.count("\n")) == (0, 1), done.output
    assert asked == [None, "int8"]


@pytest.mark.parametrize("name", ["classify", "verify", "demo"])
def test_another_precision_than_int8_is_a_mistake(name: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    arguments = ("--model", model) if name == "demo" else (model,)
    done = inside(name, *arguments, "--quantize", "int4", stdin=b"ok\n")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "Error: quantize must be None or one of int8, got 'int4'\n"


def test_demo_on_a_checkpoint(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    done = inside("demo", "--model", model, "--rounds", "1", "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    out = done.stdout
    assert "labels equal 64 of 64" in out
    for row in ("transformers (sdpa)", "no padding", "last layer for [CLS] only"):
        assert row in out
    assert "labels mean nothing" not in out


def test_classify_by_the_own_model(tmp_path: Path) -> None:
    file = tmp_path / "reviews.txt"
    file.write_text("a wonderful film\na terrible film\n")
    for done in (inside("classify", "--demo", file), inside("classify", "--demo", stdin=file.read_bytes())):
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert [row["label"] for row in rows] == ["positive", "negative"], done.output


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_progress_is_said_from_time_to_time(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    pa = pytest.importorskip("pyarrow", reason="files are read with pyarrow")
    pq = pytest.importorskip("pyarrow.parquet", reason="files are read with pyarrow")
    monkeypatch.setattr("fastcls.tools.classify._REPORT_EVERY", 0.0)
    monkeypatch.setenv("COLUMNS", "500")
    file = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"text": ["some words to classify"] * 10}), file)
    done = inside("classify", model, file, "-o", tmp_path / f"labels.{ending}", "--shard-rows", "4")
    said = [re.sub(r"[\d,]+ (rows|tokens)/s", r"N \1/s", line) for line in done.stderr.splitlines()]
    said = [re.sub(r"busy \d+%", "busy N%", line) for line in said]
    busy = "N rows/s, N tokens/s, model busy N%"
    assert said[:3] == [f"{rows} rows, {busy}, {part}% done" for rows, part in ((4, 40), (8, 80), (10, 100))]
    assert said[3:6] == [f"{shards} of 3 shards joined, {part}% done" for shards, part in ((1, 33), (2, 67), (3, 100))]


def test_the_own_model_and_another_are_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    for arguments in ((model, "--demo"), (model, tmp_path / "reviews.txt", "--demo")):
        done = inside("classify", *arguments, stdin=b"ok\n")
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr == f"Error: --demo is a model of its own: leave MODEL out, got {model}\n"
    done = inside("classify", stdin=b"ok\n")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == (
        "Error: MODEL must be given, a checkpoint's folder or a name on the hub; or use --demo without it\n"
    )


def test_help_names_every_command() -> None:
    text = run("--help").stdout.decode()
    assert all(name in text for name in ("classify", "demo", "doctor"))
    assert run("--version").stdout.decode().startswith("fastcls 0.")
