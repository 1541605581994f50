"""fastcls plan: exact arithmetic, options refused by name, what a measurement counts, and what the report says."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from test_cli import inside, model
from transformers import PreTrainedTokenizerFast

from fastcls import Classifier
from fastcls.loading import load_tokenizer
from fastcls.tools import plan as command
from fastcls.tools import throughput
from fastcls.tools.demo import sample_texts
from fastcls.tools.plan_report import needs

__all__ = ["model"]

QUICK = ("--seconds", "0.05", "--device", "cpu")


@pytest.fixture(autouse=True)
def wide_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages stand on one line, and few texts are made up."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(throughput, "TEXTS", 512)


@pytest.mark.parametrize(
    ("texts", "rate", "hours", "seconds", "machines"),
    [
        (36_000_000, 1000.0, 5.0, 36_000.0, 2),
        (36_000_001, 1000.0, 5.0, 36_000.001, 3),
        # 0.3 is a little less as a float: 11 machines would be one too many.
        (10_800_000, 1000.0, 0.3, 10_800.0, 10),
        (10**12, 250.0, 24.0, 4e9, 46_297),
        (1, 0.5, 100.0, 2.0, 1),
        # Three texts on two machines: one of them has two, and an hour is enough for one.
        (3, 1 / 2400, 1.0, 7200.0, 3),
        (3, 1 / 4000, 1.0, 12_000.0, None),
        (7, 2.0, None, 3.5, None),
    ],
)
def test_arithmetic_is_exact(
    texts: int, rate: float, hours: float | None, seconds: float, machines: int | None
) -> None:
    need = needs(texts, rate, hours)
    assert need.seconds == pytest.approx(seconds, rel=1e-15)
    assert need.machines == machines
    assert need.cost is None


def test_the_price_is_that_of_all_hours_whatever_the_deadline() -> None:
    assert needs(36_000_000, 1000.0, None, 0.3).cost == needs(36_000_000, 1000.0, 0.5, 0.3).cost == 3.0


@pytest.mark.parametrize(("given", "count"), [("1e9", 10**9), ("1_000_000", 10**6), ("1", 1), ("1.5e3", 1500)])
def test_counts_of_texts(given: str, count: int) -> None:
    assert command.read_texts(given) == count


MEAN = ("--mean-tokens", "20")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            (
                ("--texts", bad, *MEAN),
                f"--texts must be a whole number from 1 to 1e18, as 1e9 or 1_000_000, got '{bad}'",
            )
            for bad in ("0", "-5", "nan", "inf", "1.5", "1e19", "many", "")
        ),
        (("--texts", "9"), "must be said once: by --mean-tokens or by --like"),
        (("--texts", "9", *MEAN, "--like", "x.txt"), "must be said once: by --mean-tokens or by --like"),
        (("--texts", "9", "--mean-tokens", "2.9"), "--mean-tokens must be from 3 to 100,000, got 2.9"),
        (("--texts", "9", "--mean-tokens", "nan"), "--mean-tokens must be from 3 to 100,000, got nan"),
        (("--texts", "9", "--mean-tokens", "1e6"), "--mean-tokens must be from 3 to 100,000, got 1e+06"),
        (("--texts", "9", *MEAN, "--hours", "0"), "--hours must be a number above 0, got 0"),
        (("--texts", "9", *MEAN, "--price", "-1"), "--price must be a number above 0, got -1"),
        (("--texts", "9", *MEAN, "--seconds", "inf"), "--seconds must be a number above 0, got inf"),
        (("--texts", "9", *MEAN, "--demo"), "--demo is a model of its own: leave MODEL out, got nowhere/at/all"),
        (("--texts", "9", *MEAN, "--dtype", "int4"), "dtype must be one of float32, float16, bfloat16, got 'int4'"),
        (("--texts", "9", *MEAN, "--quantize", "int4"), "quantize must be"),
        (("--texts", "9", *MEAN, "--device", "abacus"), "device must be one that torch can use here, got 'abacus'"),
        (("--texts", "9", "--like", "none.txt"), "none.txt: No such file"),
        (("--texts", "9", "--like", "."), "--like must be a file of texts, . is a folder"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_looked_for(options: tuple[str, ...], message: str) -> None:
    done = inside("plan", "nowhere/at/all", *options)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: ")
    assert message in done.stderr


def test_a_model_must_be_named() -> None:
    done = inside("plan", "--texts", "9", *MEAN)
    assert done.exit_code == 2
    assert "MODEL must be given" in done.stderr


@pytest.mark.parametrize("mean", [1.0, 1.4, 10.0, 118.0])
def test_made_lengths_have_the_mean_and_the_spread_that_are_named(mean: float) -> None:
    lengths = throughput.made_lengths(mean, 4096)
    assert sum(lengths) == round(mean * 4096)
    assert min(lengths) >= 1
    if mean >= 10:
        assert statistics.pstdev(lengths) / mean == pytest.approx(0.5, abs=0.01)


def test_made_texts_are_different_and_have_as_many_tokens_as_asked(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    texts = throughput.made_texts(tokenizer, 12.5)
    assert len(set(texts)) == len(texts) == throughput.TEXTS
    tokens = tokenizer(texts)["input_ids"]
    assert sum(map(len, tokens)) == 12.5 * len(texts)
    assert not any(tokenizer.unk_token_id in row for row in tokens)


def test_a_vocabulary_without_words_is_refused() -> None:
    from tokenizers import Tokenizer, models

    letters = Tokenizer(models.WordLevel({"[UNK]": 0, "1": 1, "?": 2}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="[UNK]")
    with pytest.raises(ValueError, match="--mean-tokens needs a vocabulary that has words"):
        throughput.made_texts(tokenizer, 12)


class Clock:
    """Stands still but for what `stream` adds to it."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


class Windows:
    """A classifier of windows, each of which takes so long, the last of them again and again.

    So many windows are begun before the first one's results are given, as on a GPU.
    """

    def __init__(self, clock: Clock, size: int, seconds: Iterable[float], underway: int = 0) -> None:
        self.clock, self.size, self.seconds, self.underway = clock, size, list(seconds), underway

    def stream(self, texts: Iterator[str], *, truncation: bool) -> Iterator[str]:
        assert truncation
        waiting: list[list[str]] = []
        while window := list(islice(texts, self.size)):
            waiting.append(window)
            if len(waiting) > self.underway:
                yield from self.ended(waiting)
        while waiting:
            yield from self.ended(waiting)

    def ended(self, waiting: list[list[str]]) -> list[str]:
        self.clock.now += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        return waiting.pop(0)


def measured(
    monkeypatch: pytest.MonkeyPatch, size: int, times: list[float], seconds: float, underway: int = 0
) -> tuple[list[throughput.Block], list[float]]:
    clock, shown = Clock(), list[float]()
    monkeypatch.setattr(throughput, "time", clock)
    stand_in: Any = Windows(clock, size, times, underway)
    return throughput.measure(stand_in, list("abcde"), [1, 2, 3, 4, 5], seconds, shown.append), shown


@pytest.mark.parametrize("underway", [0, 1], ids=["cpu", "gpu"])
def test_blocks_are_whole_windows_after_the_warm_up(monkeypatch: pytest.MonkeyPatch, underway: int) -> None:
    # The first window is slow, and left out; then a tenth of 20 s is two windows of 1 s, four texts of the five each.
    blocks, shown = measured(monkeypatch, 4, [9.0, 1.0], 20.0, underway)
    assert [(block.texts, block.seconds) for block in blocks] == [(8, 2.0)] * 10
    # From the fifth text on: 5 1 2 3 4 5 1 2, then 3 4 5 1 2 3 4 5 and so on.
    assert [block.tokens for block in blocks[:3]] == [5 + 15 + 3, 12 + 15, 15 + 6 + 0]
    assert shown == [2.0 * number for number in range(1, 11)]


def test_a_slow_machine_has_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, _ = measured(monkeypatch, 5, [70.0, 60.0], 20.0)
    assert blocks == [(5, 15, 60.0)]
    assert throughput.quartiles(blocks) == (0.25, 0.25, 0.25)


def test_quartiles_are_of_tokens_a_second() -> None:
    blocks = [throughput.Block(1, tokens, 2.0) for tokens in (20, 40, 10, 30, 50)]
    assert throughput.quartiles(blocks) == (10.0, 15.0, 20.0)


def test_time_of_others_is_that_of_own_cores_less_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("cpu 0\ncpu0 100 20 30 999 999 4 5 6 7 8\ncpu1 1000 0 0 0 0 0 0 0 0 0\nintr 5\n")
    monkeypatch.setattr(throughput, "_STAT", tmp_path / "stat")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    monkeypatch.setattr(time, "process_time", lambda: 0.5)
    assert throughput.others_seconds() == pytest.approx(1.65 - 0.5)
    monkeypatch.setattr(throughput, "_STAT", tmp_path / "none")
    assert throughput.others_seconds() is None


def test_json_holds_what_the_arithmetic_makes_of_the_measurement(model: Path) -> None:
    options = ("--texts", "1e12", *MEAN, "--hours", "2.5", "--price", "0.4", "--json")
    done = inside("plan", model, *options, *QUICK)
    assert (done.exit_code, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    taken, planned = found["measured"], found["plan"]
    need = needs(10**12, taken["texts_per_second"], 2.5, 0.4)
    assert (planned["machine_seconds"], planned["machines"], planned["cost"]) == need
    assert taken["texts_per_second"] == taken["tokens_per_second"] / taken["mean_tokens_computed"]
    assert (taken["mean_tokens"], taken["tokens_limit"], taken["texts_from"]) == (20, 96, "made up")
    assert 0 < taken["tokenizer_share"] < 1
    assert taken["seconds"] >= 0.05
    assert taken["peak_memory_bytes"]["host"] > 2**20
    low, high = planned["machine_hours_quartiles"] or (planned["machine_hours"], planned["machine_hours"])
    assert low <= planned["machine_hours"] <= high
    machine = found["machine"]
    assert (machine["device"], machine["dtype"], machine["quantize"]) == ("cpu", "float32", None)
    said = "\n".join(found["assumptions"])
    for part in ("gamma distribution with mean 20 tokens", "split evenly", "at 0.4 each", "does nothing else"):
        assert part in said


def test_the_report_is_for_people(model: Path) -> None:
    done = inside("plan", model, "--texts", "1e9", *MEAN, "--hours", "24", "--price", "1", *QUICK)
    assert (done.exit_code, done.stderr) == (0, "")
    for part in ("1,000,000,000 texts", "texts a second", "one machine", "in 24 h", "cost", "What this rests on"):
        assert part in done.stdout
    without = inside("plan", model, "--texts", "1", *MEAN, *QUICK).stdout
    assert "1 text" in [line.strip() for line in without.splitlines()]
    for part in (" h  ", "cost", "split evenly", "are paid"):
        assert part not in without


def test_on_a_gpu_the_tokenizer_runs_beside_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_cpu = command._machine
    found = {"device": "cuda:0", "gpu": "Some GPU", "gpus": 8}
    monkeypatch.setattr(command, "_machine", lambda *given: {**of_cpu(*given), **found})
    monkeypatch.setattr(throughput, "peak_memory", lambda _: {"host": 2**31, "device": 2**30})
    report = inside("plan", model, "--texts", "1e9", *MEAN, *QUICK).stdout
    for part in ("Some GPU, beside ", "beside the GPU", "2.00 GiB, 1.00 GiB of the GPU", "on cuda:0 (of 8 GPUs)"):
        assert part in report


def test_a_deadline_shorter_than_a_text_is_not_possible(model: Path) -> None:
    done = inside("plan", model, "--texts", "1e3", *MEAN, "--hours", "1e-12", *QUICK)
    assert "not possible: one text takes longer" in done.stdout


def test_texts_beyond_the_models_positions_are_cut_and_it_is_said(model: Path) -> None:
    done = inside("plan", model, "--texts", "1e3", "--mean-tokens", "150", "--json", *QUICK)
    found = json.loads(done.stdout)
    taken = found["measured"]
    assert taken["mean_tokens"] == pytest.approx(150, abs=0.01)
    assert 80 < taken["mean_tokens_computed"] < 96
    # So much of the gamma distribution lies above 94.5 words of 148: exp(-t) (1 + t + t^2 / 2 + t^3 / 6) at t = 2.554.
    assert taken["cut_share"] == pytest.approx(0.746, abs=0.005)
    assert any("longer than 96 tokens and are cut there" in line for line in found["assumptions"])


def test_a_text_just_as_long_as_the_limit_is_not_cut(model: Path) -> None:
    classifier = Classifier.from_pretrained(model, device="cpu")
    texts = [" ".join(["service"] * words) for words in (1, 94, 95)]
    one, full, cut = (len(row) for row in classifier.tokenizer(texts)["input_ids"])
    assert (one, full, cut) == (3, 96, 97), "the word is one token"
    lengths = throughput.lengths_of(classifier, texts)
    assert (lengths.tokens, lengths.limit, lengths.cut) == ([3, 96, 96], 96, 1)
    assert lengths.mean == pytest.approx((3 + 96 + 97) / 3)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    file = tmp_path / "lines.txt"
    file.write_text("".join(f"{text} {number}\n" for number in range(5) for text in sample_texts()), encoding="utf-8")
    return file


@pytest.mark.parametrize("piped", [False, True], ids=["file", "standard_input"])
def test_like_takes_a_files_lengths(model: Path, lines: Path, piped: bool) -> None:
    rows = lines.read_text(encoding="utf-8").splitlines()
    assert 256 <= len(rows) <= throughput.TEXTS, "all are taken"
    like, stdin = ("-", lines.read_bytes()) if piped else (str(lines), b"")
    done = inside("plan", model, "--texts", "1e3", "--like", like, "--json", *QUICK, stdin=stdin)
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    tokens = [len(row) for row in load_tokenizer(model)(rows)["input_ids"]]
    assert found["measured"]["mean_tokens"] == pytest.approx(statistics.fmean(tokens))
    assert found["measured"]["texts_from"] == like
    assert any(f"like all {len(rows)} lines of {like}" in line for line in found["assumptions"])


def test_few_lines_and_lines_that_are_not_utf8_are_refused_by_name(tmp_path: Path) -> None:
    few, latin = tmp_path / "few.txt", tmp_path / "latin.txt"
    few.write_text("one\n" * 255)
    latin.write_bytes("fine\ncafé\n".encode("latin-1"))
    for file, message in (
        (few, "--like must have at least 256 lines for cpu, got 255 in"),
        (latin, "line 2: not UTF-8 at byte 4"),
    ):
        done = inside("plan", "nowhere/at/all", "--texts", "9", "--like", file, *QUICK)
        assert done.exit_code == 2
        assert message in done.stderr


def test_lines_are_drawn_evenly_and_stay_in_order(tmp_path: Path) -> None:
    file = tmp_path / "many.txt"
    file.write_text("".join(f"{number}\n" for number in range(10_000)))
    sample = command.drawn(file, 400)
    numbers = list(map(int, sample.texts))
    assert sample.lines == 10_000
    assert numbers == sorted(set(numbers))
    # 100 of each quarter, give or take five standard deviations.
    for quarter in range(4):
        assert 55 < sum(number // 2500 == quarter for number in numbers) < 145
    assert sample.mean_bytes == pytest.approx(statistics.fmean(len(text) + 1 for text in sample.texts))
    assert command.drawn(file, 20_000).texts == [str(number) for number in range(10_000)]


def test_ctrl_c_while_it_measures_is_status_130(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Classifier.stream

    def stream(self: Classifier, texts: Iterable[str], **options: Any) -> Iterator[Any]:
        for number, result in enumerate(whole(self, texts, **options)):
            if number == 300:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(Classifier, "stream", stream)
    done = inside("plan", model, "--texts", "1e3", *MEAN, "--seconds", "100", "--device", "cpu")
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


@pytest.mark.parametrize(
    ("others", "said"),
    [((7.0, 7.0), "anything else took 0.00 of"), ((7.0, 9999.0), "NOT MET"), ((None, None), "is not known")],
    ids=["alone", "busy", "unknown"],
)
def test_a_machine_that_is_not_alone_is_named(
    model: Path, monkeypatch: pytest.MonkeyPatch, others: tuple[float | None, ...], said: str
) -> None:
    values = iter(others)
    monkeypatch.setattr(throughput, "others_seconds", lambda: next(values))
    assert said in inside("plan", model, "--texts", "1e3", *MEAN, *QUICK).stdout


def test_the_report_shows_quartiles(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [throughput.Block(1, tokens, 2.0) for tokens in (800, 1600, 400, 1200, 2000)]
    monkeypatch.setattr(throughput, "measure", lambda *_: blocks)
    report = inside("plan", model, "--texts", "216_000", *MEAN, *QUICK).stdout
    # 400, 600 and 800 tokens a second, of which 20 make a text.
    for part in ("30 (+- 33.3%)", "2.0 h, 90.0 min to 3.0 h by the quartiles", "median of 5 blocks in 10.0 s"):
        assert part in report


def test_one_block_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "measure", lambda *_: [throughput.Block(10, 200, 2.0)])
    report = inside("plan", model, "--texts", "1e3", *MEAN, *QUICK).stdout
    assert "rests on one block of 2.0 s" in report
    assert "+-" not in report
    found = json.loads(inside("plan", model, "--texts", "1e3", *MEAN, "--json", *QUICK).stdout)
    assert found["measured"]["tokens_per_second_quartiles"] is found["plan"]["machine_hours_quartiles"] is None
    assert found["plan"]["machine_seconds"] == 200.0
