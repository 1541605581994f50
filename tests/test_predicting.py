"""A model in any process: what is asked as plain values, one copy of the weights a machine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import transformers
from support import tiny_bert

import fastcls
from fastcls.predicting.checkpoint import fingerprint, read_files, write_files
from fastcls.predicting.loaded import answers_of, load
from fastcls.predicting.machine import folder_of_machine
from fastcls.predicting.options import PredictOptions
from fastcls.predicting.predictor import Predictor
from fastcls.tools.demo import sample_texts, sample_tokenizer

ROOT = Path(__file__).parents[1]
TEXTS = ["fine", "not at all good", "", "very very good and warm", "où est 日本"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is shared with other tests' processes."""
    monkeypatch.setenv("FASTCLS_SHARED", str(tmp_path))
    return tmp_path / f"fastcls-{os.getuid()}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = sample_tokenizer(sample_texts())
    tiny_bert(vocab_size=len(tokenizer), id2label={0: "bad", 1: "fair", 2: "good"}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def mask_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("masks")
    tokenizer = sample_tokenizer(sample_texts())
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    config = tiny_bert(vocab_size=len(tokenizer)).config
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).eval().save_pretrained(folder)
    # As where a checkpoint's tokenizer has grown and its embeddings have not.
    tokenizer.add_tokens(["unheard"])
    tokenizer.save_pretrained(folder)
    return str(folder)


def table(texts: Sequence[str | None], **columns: list[Any]) -> Any:
    return pa.table({"text": pa.array(texts, pa.string()), **columns})


def test_a_table_has_what_the_classifier_says_of_each_row(model: str) -> None:
    found = Predictor(model, all_scores=True)(table(TEXTS, id=list(range(5)))).to_pylist()
    labels = fastcls.Classifier.from_pretrained(model, truncation=True)(TEXTS, top_k=None)
    assert [row["id"] for row in found] == list(range(5))
    assert [(row["label"], row["score"]) for row in found] == [(row[0]["label"], row[0]["score"]) for row in labels]
    assert [row["scores"] for row in found] == [
        {name: next(each["score"] for each in row if each["label"] == name) for name in ("bad", "fair", "good")}
        for row in labels
    ]
    assert {row["error"] for row in found} == {None}


def test_a_bad_row_says_why_and_harms_no_other(model: str) -> None:
    pairs = pa.table({"one": ["fine", None, "good"], "two": ["very", "warm", None]})
    found = Predictor(model, text_column="one", pair_column="two", prefix="p_")(pairs).to_pylist()
    assert [row["p_error"] for row in found] == [None, "one is null", "two is null"]
    assert [row["p_label"] is None for row in found] == [False, True, True]
    (expected,) = fastcls.Classifier.from_pretrained(model, truncation=True)([("fine", "very")])
    assert (found[0]["p_label"], found[0]["p_score"]) == (expected["label"], expected["score"])


def test_a_null_of_a_dictionary_column_is_a_bad_row(model: str) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0, None, 1], pa.int32()), pa.array(["fine", "good"]))
    found = Predictor(model)(pa.table({"text": column})).to_pylist()
    assert [row["error"] for row in found] == [None, "text is null", None]
    assert found[1]["label"] is None


@pytest.mark.parametrize("rows", [0, 1])
def test_a_table_of_no_row_or_one_has_all_columns(model: str, rows: int) -> None:
    found = Predictor(model)(table(["fine"] * rows))
    assert found.num_rows == rows
    assert found.column_names == ["text", "label", "score", "error"]


def test_masks_are_filled_as_by_the_pipeline(mask_model: str) -> None:
    texts = ["a [MASK] film", "[MASK] is good and warm", "the film was very [MASK]"]
    pipe = transformers.pipeline("fill-mask", mask_model)
    expected = [[(each["token"], each["token_str"]) for each in row] for row in pipe(texts, top_k=3)]
    rows = table([*texts, "no mask", "[MASK] [MASK]", None, "unheard [MASK]"])
    found = Predictor(mask_model, fill_mask=True, top_k=3)(rows).to_pylist()
    assert [[(each["token"], each["token_str"]) for each in row["fills"]] for row in found[:3]] == expected
    exact = transformers.BertForMaskedLM.from_pretrained(mask_model, dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(mask_model)
    for text, row, eager in zip(texts, found, pipe(texts, top_k=3), strict=False):
        ids = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            logits = exact(**ids).logits[0]
        scores = logits[ids["input_ids"][0] == tokenizer.mask_token_id][0].softmax(-1)
        ours = max(abs(each["score"] - float(scores[each["token"]])) for each in row["fills"])
        theirs = max(abs(each["score"] - float(scores[each["token"]])) for each in eager)
        assert ours <= 2 * theirs + torch.finfo(torch.float32).eps
    assert [row["fills"] for row in found[3:]] == [None] * 4
    assert [row["error"] for row in found[3:]] == [
        "the text must have one [MASK] within the tokens that are computed, got 0",
        "the text must have one [MASK] within the tokens that are computed, got 2",
        "text is null",
        f"the text holds the id {exact.config.vocab_size}, outside the vocabulary of {exact.config.vocab_size}",
    ]
    best = Predictor(mask_model, fill_mask=True)(table(texts)).to_pylist()
    assert [(row["token"], row["token_str"]) for row in best] == [row[0] for row in expected]


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives(model: str, mask_model: str) -> None:
    cases: list[tuple[str, list[str], str, dict[str, Any]]] = [
        (model, TEXTS, "label", {}),
        (mask_model, ["a [MASK] film", "no mask", "very [MASK]"], "token", {"fill_mask": True}),
    ]
    for name, texts, column, options in cases:
        predictors = (Predictor(name, device=device, **options) for device in ("cpu", "cuda"))
        here, there = (predictor(table(texts)).to_pylist() for predictor in predictors)
        assert [row[column] for row in there] == [row[column] for row in here]
        assert [row["error"] for row in there] == [row["error"] for row in here]


def test_columns_are_known_without_the_weights(model: str, mask_model: str, tmp_path: Path) -> None:
    for name, options in (
        (model, {"all_scores": True}),
        (model, {"top_k": 2, "prefix": "p_"}),
        (model, {"embeddings": "mean"}),
        (mask_model, {"fill_mask": True, "top_k": 2}),
    ):
        asked = PredictOptions(**options)
        bare = tmp_path / f"{Path(name).name}{len(options)}{next(iter(options))}"
        bare.mkdir()
        for file, content in read_files(name).items():
            if not file.endswith(".safetensors"):
                (bare / file).write_bytes(content)
        assert answers_of(str(bare), asked).schema == load(name, asked).answers.schema


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 2}, "options must be long_texts, .*, got topk"),
        ({"embeddings": "last"}, "embeddings must be one of first, mean, got 'last'"),
        ({"embeddings": "mean", "fill_mask": True}, "embeddings and fill_mask ask for two things"),
        ({"embeddings": "mean", "top_k": 2}, "top_k is for labels: leave it out with embeddings"),
        ({"fill_mask": True, "logits": True}, "logits is for labels: leave it out with fill_mask"),
        ({"fill_mask": True, "long_texts": "window"}, "long_texts must not be window with fill_mask"),
        ({"embeddings": "mean", "threshold": 0.0}, "threshold is for labels: leave it out with embeddings"),
        ({"normalize": True}, "normalize is for vectors: add embeddings"),
        ({"errors": "ignore"}, "errors must be one of raise, null, column, got 'ignore'"),
        ({"threads": 0}, "threads must be a positive int"),
        ({"dtype": "float8"}, "dtype must be one of"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Predictor(model, **options)(table(["fine"]))


_HOLDER = """
import sys, time
from fastcls.predicting.loaded import load_shared
from fastcls.predicting.options import PredictOptions
loaded = load_shared(sys.argv[1], PredictOptions(device="cpu"))
print("ready", flush=True)
sys.stdin.readline()
"""


class Holder:
    """A process that has loaded a model."""

    def __init__(self, model: str) -> None:
        paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _HOLDER, model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def mapped(self, folder: Path) -> int:
        """Bytes of files in a folder that it maps."""
        lines = Path(f"/proc/{self.process.pid}/maps").read_text().splitlines()
        spans = [line.split()[0].split("-") for line in lines if str(folder) in line]
        return sum(int(end, 16) - int(start, 16) for start, end in spans)

    def end(self, how: signal.Signals | None = None) -> None:
        if how is not None:
            self.process.send_signal(how)
        self.process.communicate("\n", timeout=60)


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="what a process maps is read from /proc")
def test_processes_of_a_machine_map_one_file_that_the_last_one_removes(model: str, own_folder: Path) -> None:
    first, second = Holder(model), Holder(model)
    (file,) = (path for path in own_folder.iterdir() if re.fullmatch(r"model-\w+", path.name))
    weights = sum(each.numel() for each in transformers.BertModel.from_pretrained(model).parameters()) * 4
    assert first.mapped(own_folder) >= weights
    assert second.mapped(own_folder) >= weights
    first.end()
    assert file.exists()
    second.end()
    assert list(own_folder.iterdir()) == []


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="needs flock")
def test_what_a_killed_process_left_the_next_one_removes(model: str, own_folder: Path) -> None:
    killed = Holder(model)
    (left,) = (path for path in own_folder.iterdir() if re.fullmatch(r"model-\w+", path.name))
    killed.end(signal.SIGKILL)
    assert left.exists()
    other = Path(write_files("a" * 32, lambda: {"config.json": b"{}"}))
    assert not left.exists()
    assert (other / "config.json").read_bytes() == b"{}"


def test_each_of_several_predictors_computes_what_it_was_asked(model: str) -> None:
    vectors = [Predictor(model, embeddings=pooling)(table(["very good"])) for pooling in ("mean", "first", "mean")]
    mean, first, again = (each.column("embedding").to_pylist() for each in vectors)
    assert mean == again != first


def test_files_are_written_once_a_machine_and_are_the_checkpoints(model: str) -> None:
    calls: list[int] = []

    def files() -> dict[str, bytes]:
        calls.append(1)
        return read_files(model)

    folders = {write_files("0" * 32, files) for _ in range(2)}
    assert len(folders) == len(calls) == 1
    assert fingerprint(folders.pop()) == fingerprint(model)


def test_a_folder_that_others_can_write_to_is_refused(own_folder: Path) -> None:
    own_folder.mkdir()
    own_folder.chmod(0o777)
    with pytest.raises(ValueError, match="must belong to this user alone"):
        folder_of_machine()


def test_others_files_stay(own_folder: Path) -> None:
    own_folder.mkdir(mode=0o700)
    for name in ("uv.lock", "uv.toml", "model-x.lock"):
        (own_folder / name).touch()
    write_files("b" * 32, lambda: {"config.json": b"{}"})
    assert {"uv.lock", "uv.toml", "model-x.lock"} <= {path.name for path in own_folder.iterdir()}


def test_files_of_which_some_are_gone_are_written_anew() -> None:
    for _ in range(2):
        folder = Path(write_files("c" * 32, lambda: {"config.json": b"{}", "sub/weights": b"1"}))
        assert (folder / "sub" / "weights").read_bytes() == b"1"
        (folder / "sub" / "weights").unlink()


def test_a_write_that_failed_is_no_checkpoint(model: str) -> None:
    def broken() -> dict[str, bytes]:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_files("0" * 32, broken)
    assert (Path(write_files("0" * 32, lambda: read_files(model))) / "config.json").exists()
