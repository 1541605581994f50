"""The short run takes few cases, and every pair of parameters stands in one of them."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies
from short_run import Case, covering

TESTS = Path(__file__).parent
GRID: list[Case] = [
    {"dtype": dtype, "rows": rows, "tile": tile, "bias": bias}
    for dtype, rows, tile, bias in itertools.product("abc", range(7), range(4), (True, False))
]


def pairs_of(cases: list[Case]) -> set[frozenset[object]]:
    return {frozenset(pair) for case in cases for pair in itertools.combinations(case.items(), 2)}


def test_every_pair_stands_in_one_of_few_cases() -> None:
    chosen = [GRID[place] for place in covering(GRID)]
    assert pairs_of(chosen) == pairs_of(GRID)
    # Rows and tiles alone make 28 pairs.
    assert 28 <= len(chosen) <= 34


@hypothesis.given(strategies.sets(strategies.sampled_from(range(len(GRID)))))
def test_pairs_that_no_case_has_are_not_missed(places: set[int]) -> None:
    cases = [GRID[place] for place in sorted(places)]
    assert pairs_of([cases[place] for place in covering(cases)]) == pairs_of(cases)


def test_a_parameter_alone_is_taken_value_by_value() -> None:
    chosen = [GRID[place] for place in covering(GRID, alone=["rows", "tile"])]
    assert {case["rows"] for case in chosen} == set(range(7))
    assert {(case["dtype"], case["bias"]) for case in chosen} == set(itertools.product("abc", (True, False)))
    assert len(chosen) == 7


def test_of_one_parameter_every_case_is_taken() -> None:
    assert covering([{"text": text} for text in ("one", "two", "one", "three")]) == [0, 1, 3]


def collected(*arguments: str) -> list[str]:
    """The cases that pytest would run."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:xdist", *arguments]
    # Options that this run was given by PYTEST_ADDOPTS, such as --full, would be that run's as well.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.full
def test_a_case_that_is_asked_for_runs_and_the_full_run_takes_all(tmp_path: Path) -> None:
    file = "tests/test_gated.py"
    short, full = (collected(file, *options) for options in ((), ("--full",)))
    left_out = [case for case in full if case not in short]
    assert set(short) < set(full)
    assert left_out
    assert collected(left_out[0]) == left_out[:1]
    assert set(collected(left_out[0], file)) == {*short, left_out[0]}
    # Those that failed last, by pytest's own record of them.
    record = tmp_path / "v" / "cache" / "lastfailed"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({left_out[0]: True}))
    assert collected(file, "--lf", "-o", f"cache_dir={tmp_path}") == left_out[:1]


@pytest.mark.full
def test_pairs_stand_in_the_cases_that_other_options_leave() -> None:
    file = "tests/test_gated.py"
    short = collected(file)
    others = collected(file, *(f"--deselect={case}" for case in short))
    assert others
    assert not set(others) & set(short)
