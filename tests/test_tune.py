"""The tuner: only what is right and faster is chosen, and the rules it writes give back what it measured."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import tune
import typer
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from tune import Choice, Point, Tuner, in_processes, label, points_of, verdict
from typer.testing import CliRunner

from fastcls_benchmarks import tile_candidates, tile_rules
from fastcls_benchmarks.results import AGAIN, Case
from fastcls_benchmarks.tile_candidates import OPERATIONS, Facts, Operation, Problem, Tile
from fastcls_kernels import HAS_TRITON, use_backend
from fastcls_kernels.runtime import tile_tables
from fastcls_kernels.runtime.tile_tables import Rule

CPU = torch.device("cpu")
HALF = torch.float16
FOREVER = math.inf


# Rules

TILES = st.sampled_from(["a", "b", "c"]).map(lambda name: {"BY": name})
VALUES = st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True)


@st.composite
def grids(draw: st.DrawFn) -> list[tile_rules.Winner]:
    """Winners over one to three facts, each section of an outer fact with inner values of its own."""
    facts = draw(st.integers(1, 3))

    def below(depth: int) -> Iterator[tuple[int, ...]]:
        if depth == facts:
            yield ()
            return
        for value in draw(VALUES):
            yield from ((value, *rest) for rest in below(depth + 1))

    names = ["width", "size", "rows"][:facts]
    return [(dict(zip(names, values, strict=True)), draw(TILES)) for values in below(0)]


def first_fit(rules: Iterable[Rule], facts: Facts) -> Tile:
    return next(rule.tile for rule in rules if all(facts[name] <= limit for name, limit in rule.limits.items()))


def next_larger(winners: list[tile_rules.Winner], facts: Facts) -> Tile:
    """The winner of the next larger value of each fact in turn, or of the largest."""
    for name in facts:
        values = sorted({each[name] for each, _ in winners})
        taken = next((value for value in values if value >= facts[name]), values[-1])
        winners = [(each, tile) for each, tile in winners if each[name] == taken]
    return winners[0][1]


@given(grids(), st.data())
def test_rules_give_each_point_its_winner_and_others_the_next_larger_one(
    winners: list[tile_rules.Winner], data: st.DataObject
) -> None:
    rules = tile_rules.rules_from(winners)
    for facts, tile in winners:
        assert first_fit(rules, facts) == tile
    between = {name: data.draw(st.integers(1, 12)) for name in winners[0][0]}
    assert first_fit(rules, between) == next_larger(winners, between)
    assert len(rules) <= len(winners)


def test_neighbours_that_agree_are_one_rule_and_the_largest_has_no_limit() -> None:
    a, b = {"BY": "a"}, {"BY": "b"}
    rows = [({"rows": 1}, a), ({"rows": 16}, a), ({"rows": 64}, b), ({"rows": 512}, a), ({"rows": 4096}, a)]
    assert tile_rules.rules_from(rows) == [Rule({"rows": 16}, a), Rule({"rows": 64}, b), Rule({}, a)]
    # Sections that agree are one, too, whatever their outer fact.
    both = [({"width": width, **facts}, tile) for width in (384, 768) for facts, tile in rows]
    assert tile_rules.rules_from(both) == tile_rules.rules_from(rows)
    wide = [*both, ({"width": 1024, "rows": 1}, b)]
    assert tile_rules.rules_from(wide) == [
        *(Rule({"width": 768, **each.limits}, each.tile) for each in tile_rules.rules_from(rows)),
        Rule({}, b),
    ]


# The file


@pytest.mark.parametrize("file", sorted(tile_tables.CONFIGS.glob("*.json")), ids=lambda file: file.stem)
def test_a_table_is_written_as_it_was_read(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert tile_rules.written(json.loads(text)) == text


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of tables of its own, with the shipped ones in it."""
    for file in tile_tables.CONFIGS.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(tile_tables, "CONFIGS", tmp_path)
    tile_tables.rules_of.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    tile_tables.rules_of.cache_clear()
    tile_tables._forget_choices()


def choices_at(points: list[Point], tile: Callable[[Point], Tile]) -> list[Choice]:
    return [Choice(point, "former", label(tile(point)), tile(point), []) for point in points]


def gelu_tile(point: Point) -> Tile:
    """Another one for each width and for few rows."""
    few = point.facts["rows"] <= 64
    return tile_tables.GeluTile("triton", False, 16 if few else 64, 64, point.facts["in_features"], 4, 3)._asdict()


def test_the_table_chooses_what_was_measured(configs: Path) -> None:
    points = points_of("linear_gelu")
    winners = [(point.facts, gelu_tile(point)) for point in points]
    before = json.loads((configs / "sm_90.json").read_text(encoding="utf-8"))
    table = tile_rules.table_with("sm_90", {"linear_gelu": winners}, {"chip": "a chip"})
    (configs / "sm_90.json").write_text(tile_rules.written(table), encoding="utf-8")
    tile_tables.rules_of.cache_clear()
    tile_tables._forget_choices()
    for dtype in (torch.bfloat16, torch.float16):
        for point in points:
            chosen = tile_tables.linear_gelu_tile("sm_90", dtype, **{name: point.facts[name] for name in point.facts})
            assert chosen._asdict() == gelu_tile(point)
    assert tile_tables.linear_gelu_tile("sm_90", torch.bfloat16, 10**6, 10**4, 10**4).BLOCK_K == 1024
    assert tile_tables.linear_gelu_tile("sm_90", torch.float32, 64, 768, 3072).BY == "torch"
    after = json.loads((configs / "sm_90.json").read_text(encoding="utf-8"))
    assert after["rules"].keys() == before["rules"].keys()
    assert after["rules"]["attention"] == before["rules"]["attention"]
    assert after["measured"] == {"linear_gelu": {"chip": "a chip"}}
    assert "tune.py" in after["about"]


def test_tables_of_other_chips_are_begun_and_added_to(configs: Path) -> None:
    tile = {"NORM": False, "BLOCK_H": 16, "BLOCK_N": 16, "MAX_BLOCK_W": 64, "num_warps": 4, "num_stages": 1}
    winners = {"cls_attention": [({"width": 384}, tile)]}
    # A chip without a table of its own does not copy the default's rules, which follow anyway.
    begun = tile_rules.table_with("sm_89", winners, {"chip": "first"})
    assert begun["rules"] == {"cls_attention": [{"up_to": {"bits": 16}, "tile": tile}]}
    # But those of AMD chips do not follow; and a rule for float32 stays.
    added = tile_rules.table_with("gfx950", winners, {"chip": "first"})
    assert added["rules"].keys() == {
        "attention",
        "cls_attention",
        "disentangled_attention",
        "invariant_attention",
        "invariant_disentangled_attention",
        "linear_gelu",
    }
    assert [rule.get("up_to", {}) for rule in added["rules"]["cls_attention"]] == [{"bits": 16}, {}]
    (configs / "sm_89.json").write_text(tile_rules.written(begun), encoding="utf-8")
    again = tile_rules.table_with("sm_89", {"absorb_query": [({"rows": 1}, {"BLOCK_B": 16})]}, {"chip": "second"})
    assert again["measured"] == {"cls_attention": {"chip": "first"}, "absorb_query": {"chip": "second"}}
    assert list(again["rules"]) == ["cls_attention", "absorb_query"]


# Choosing


def case(**seconds: list[float]) -> Case:
    """A case whose baseline, ``present``, is as noisy as is said."""
    found = Case("kernel", "scale", "1 x 1", "float16", "present")
    found.seconds = {name.replace("_again", AGAIN): [[each] for each in rounds] for name, rounds in seconds.items()}
    return found


STEADY = {"present": [10.0, 10.0, 10.0, 10.1], "present_again": [10.0, 10.0, 10.1, 10.0]}
NOISY = {"present": [10.0, 11.0, 9.0, 10.5], "present_again": [11.0, 10.0, 10.4, 9.0]}


def test_the_fastest_beyond_the_noise_is_chosen() -> None:
    assert tune.choose([case(**STEADY, slow=[11.0] * 4, fast=[9.0] * 4, faster=[8.0] * 4)]) == "faster"


def test_within_the_noise_the_present_choice_stays() -> None:
    assert tune.choose([case(**NOISY, other=[9.8, 10.8, 8.8, 10.3])]) == "present"
    # The same gain counts where there is less noise.
    assert tune.choose([case(**STEADY, other=[9.8] * 4)]) == "other"
    # A median that is better in spite of rounds that are worse does not.
    assert tune.choose([case(**STEADY, other=[9.0, 13.0, 9.5, 12.0])]) == "present"


def test_problems_that_are_one_to_the_table_count_together() -> None:
    first = case(**STEADY, left=[5.0] * 4, both=[8.0] * 4)
    second = case(**STEADY, left=[30.0] * 4, both=[8.0] * 4)
    assert tune.choose([first]) == "left"
    assert tune.choose([first, second]) == "both"


# An operation that multiplies by two, as fast as its tile says

TIMES = {"1": 10.0, "2": 6.0, "3": 4.0, "4": 8.0, "5": 1.0, "6": 2.0}


def scale(x: Tensor) -> Tensor:
    tile = tile_tables._first_fitting("interpreter", "scale", {"bits": 16, "rows": len(x)})["BLOCK_N"]
    if tile == 5:
        return x * 2.01
    if tile == 6:
        raise RuntimeError("out of resource: shared memory\nand much more")
    return x * 2


@pytest.fixture
def doubling(configs: Path, monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    """Tile 1 is the present choice, 5 wrong and 6 broken. Clocks are stand-ins; gives two points."""
    table = json.loads((configs / "default.json").read_text(encoding="utf-8"))
    table["rules"]["scale"] = [{"tile": {"BLOCK_N": 1}}]
    (configs / "default.json").write_text(json.dumps(table), encoding="utf-8")
    operation = Operation(
        scale,
        lambda x: x + x,
        lambda random, problem: (random(problem.rows, 8),),
        lambda problem: {"rows": problem.rows},
        [{"BLOCK_N": number} for number in range(1, 7)],
        [(8, 8)],
        [(4,), (32,)],
    )
    monkeypatch.setitem(OPERATIONS, "scale", operation)
    monkeypatch.setattr("fastcls_benchmarks.runner.INPUT_BYTES", 0)

    def by_the_table(case: Case, functions: Mapping[str, Any], *_: object) -> None:
        for name in [*functions, case.baseline + AGAIN]:
            case.seconds[name] = [[TIMES[name.replace(AGAIN, "")]]] * 3

    monkeypatch.setattr("fastcls_benchmarks.timing.time_rounds", by_the_table)
    return points_of("scale")


def here(tasks: list[tuple[Any, ...]]) -> Iterator[str]:
    return itertools.starmap(verdict, tasks)


def test_the_fastest_right_tile_is_chosen(doubling: list[Point]) -> None:
    tuner = Tuner("interpreter", CPU, FOREVER, here, HALF)
    choices = list(tuner.choices(doubling))
    assert [(choice.point.facts, choice.former, choice.chosen) for choice in choices] == [
        ({"rows": 4}, "1", "3"),
        ({"rows": 32}, "1", "3"),
    ]
    assert choices[0].tile == {"BLOCK_N": 3}
    assert choices[0].cases[0].typical_seconds("3") == 4.0


def test_what_is_wrong_or_breaks_is_skipped_and_named(doubling: list[Point]) -> None:
    tuner = Tuner("interpreter", CPU, FOREVER, here, HALF)
    for choice in tuner.choices(doubling):
        assert not {"5", "6"} & choice.cases[0].seconds.keys()
    assert tuner.skipped.keys() == {"scale, 8 x 8: 5", "scale, 8 x 8: 6"}
    assert "RMS error" in tuner.skipped["scale, 8 x 8: 5"]
    assert tuner.skipped["scale, 8 x 8: 6"] == "RuntimeError: out of resource: shared memory"


def test_where_the_present_choice_breaks_another_is_chosen(doubling: list[Point], configs: Path) -> None:
    text = (configs / "default.json").read_text(encoding="utf-8")
    (configs / "default.json").write_text(text.replace('{"BLOCK_N": 1}', '{"BLOCK_N": 6}'), encoding="utf-8")
    tile_tables.rules_of.cache_clear()
    choice, _ = Tuner("interpreter", CPU, FOREVER, here, HALF).choices(doubling)
    assert (choice.former, choice.chosen) == ("6", "3")


def test_a_point_that_breaks_is_named_and_the_others_go_on(
    doubling: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Tuner.measure

    def breaks_at_first(self: Tuner, point: Point, *others: Any) -> list[Case]:
        if point.facts == {"rows": 4}:
            raise RuntimeError("out of memory")
        return measure(self, point, *others)

    monkeypatch.setattr(Tuner, "measure", breaks_at_first)
    tuner = Tuner("interpreter", CPU, FOREVER, here, HALF)
    assert [choice.point.facts for choice in tuner.choices(doubling)] == [{"rows": 32}]
    assert tuner.skipped["scale, all of {'rows': 4}"] == "RuntimeError: out of memory"


def test_nothing_is_begun_when_the_time_is_over(doubling: list[Point]) -> None:
    assert list(Tuner("interpreter", CPU, time.monotonic() - 1, here, HALF).choices(doubling)) == []


# Checking


def test_a_library_is_checked_in_float16_too(doubling: list[Point], monkeypatch: pytest.MonkeyPatch) -> None:
    operation = OPERATIONS["scale"]._replace(run=lambda x: x * (2.01 if x.dtype == HALF else 2))
    monkeypatch.setitem(OPERATIONS, "scale", operation)
    problem = doubling[0].problems[0]
    assert verdict(problem, {"BY": "cublaslt"}, "cpu", torch.bfloat16).startswith("float16: RMS error")
    # What is compiled is compiled in one of the two alone.
    assert verdict(problem, {"BY": "triton"}, "cpu", torch.bfloat16) == ""


def test_one_bad_element_and_nan_are_wrong() -> None:
    exact = torch.randn(100_000, dtype=torch.float64)
    eager = exact.to(HALF)
    assert tune.shortfall(eager, eager, exact) == ""
    off, nan = eager.double(), eager.clone()
    off[7] = exact[7] + 3 * (eager - exact).abs().max()
    nan[7] = math.nan
    assert "worst error" in tune.shortfall(off, eager, exact)
    assert "RMS error" in tune.shortfall(nan, eager, exact)
    assert "RMS error" in tune.shortfall(eager * 1.001, eager, exact)


def test_a_kernel_that_spills_is_refused(doubling: list[Point], monkeypatch: pytest.MonkeyPatch) -> None:
    problem = doubling[0].problems[0]
    compiled: dict[int, Any] = {}
    kernel = SimpleNamespace(device_caches={0: (compiled, "and more")})
    monkeypatch.setattr(tile_tables, "_stand_in_kernel", kernel, raising=False)
    spills = {1: 0, 2: 4}

    def compiles(x: Tensor) -> Tensor:
        number = tile_tables._first_fitting("interpreter", "scale", {"bits": 16, "rows": 0})["BLOCK_N"]
        # The third needs more memory than there is: it was never loaded, and does not know.
        loaded = {"n_spills": spills[number]} if number in spills else {}
        compiled[number] = SimpleNamespace(hash=str(number), **loaded)
        if not loaded:
            raise RuntimeError("out of resource")
        return x * 2

    monkeypatch.setitem(OPERATIONS, "scale", OPERATIONS["scale"]._replace(run=compiles))
    verdicts = [verdict(problem, {"BLOCK_N": number}, "cpu", HALF) for number in (2, 3, 1)]
    assert verdicts == ["it spills registers", "RuntimeError: out of resource", ""]


def test_a_tile_that_ends_its_process_harms_no_other() -> None:
    judged = ["'right'", "__import__('os')._exit(1)", "'right again'", "1 / 0", "'and again'"]
    found = list(in_processes(eval, [(each,) for each in judged], FOREVER))
    assert found[::2] == ["right", "right again", "and again"]
    assert [reason.split(":")[0] for reason in found[1::2]] == ["BrokenProcessPool", "ZeroDivisionError"]
    assert list(in_processes(eval, [("1 / 0",)], time.monotonic() - 1)) == ["there was no time to check it"]


# What is measured


@pytest.mark.parametrize("name", list(OPERATIONS))
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_candidates_begin_with_the_present_choice(name: str, arch: str) -> None:
    for point in points_of(name):
        tiles = point.candidates(arch)
        present = tile_tables._first_fitting(arch, name, {"bits": 16, **point.facts})
        assert next(iter(tiles.values())) == present
        assert 4 <= len(tiles) <= 25
        assert not any(tile.get("TMA") for tile in tiles.values()) or arch in ("sm_90", "sm_100")
        # A label is a tile's own.
        assert [tile for tile in OPERATIONS[name].tiles if label(tile) in tiles and tile != tiles[label(tile)]] == []
    assert len({label(tile) for tile in OPERATIONS[name].tiles}) == len(OPERATIONS[name].tiles)


SMALL = {
    "attention": Problem("attention", (2, 16), 3 * 21, 21),
    "cls_attention": Problem("cls_attention", (2, 32), 3 * 21, 21),
    "linear_gelu": Problem("linear_gelu", (32, 48), 5),
    "linear_add_layer_norm": Problem("linear_add_layer_norm", (32, 48), 5),
    "absorb_query": Problem("absorb_query", (2, 32), 5),
    "cls_output": Problem("cls_output", (2, 32), 5),
    "pooler_classifier": Problem("pooler_classifier", (2, 32), 5),
}
interpreter = pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="needs triton's interpreter, which is off where there is a GPU"
)


@interpreter
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_operations_ask_the_table_by_the_facts_of_the_problem(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, int]] = []
    choose = tile_tables._first_fitting

    def recorded(arch: str, operation: str, facts: Mapping[str, int]) -> dict[str, Any]:
        assert operation == name
        asked.append(dict(facts))
        return choose(arch, operation, facts)

    monkeypatch.setattr(tile_tables, "_first_fitting", recorded)
    problem = SMALL[name]
    arguments = OPERATIONS[name].make(tune._source("cpu", HALF, 0), problem)
    tile_tables._forget_choices()
    with use_backend("triton"):
        found = OPERATIONS[name].run(*arguments)
    tile_tables._forget_choices()
    assert asked[0] == {"bits": 16, **OPERATIONS[name].facts(problem)}
    # And the definition takes the same arguments.
    exact = tune._define(problem, arguments, torch.float64)
    assert tune.shortfall(found, tune._define(problem, arguments, HALF), exact) == ""


def test_texts_have_the_mean_that_the_table_is_asked_by() -> None:
    for mean in tile_candidates.MEAN_SEQLENS:
        layout = tile_candidates._packing(Problem("attention", (12, 64), tile_candidates.TOKENS, mean), CPU)
        lengths = layout.cu_seqlens.diff()
        assert int(lengths.sum()) == layout.total_tokens == tile_candidates.TOKENS == mean * layout.num_sequences
        assert mean // 2 <= int(lengths.min()) < int(lengths.max()) <= mean * 3 // 2 + 1


@pytest.mark.full
@interpreter
def test_real_kernels_are_checked_timed_and_chosen(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = {"BLOCK_B": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
    tiles = [tile, {**tile, "BLOCK_B": 64, "BLOCK_N": 32, "BLOCK_K": 32}, {**tile, "BLOCK_N": 24}]
    operation = OPERATIONS["pooler_classifier"]._replace(tiles=tiles, shapes=[(2, 32)], sizes=[(64,)])
    monkeypatch.setitem(OPERATIONS, "pooler_classifier", operation)
    monkeypatch.setattr(tune, "suits", lambda *_: True)
    monkeypatch.setattr("fastcls_benchmarks.runner.INPUT_BYTES", 0)
    table = {"about": "", "measured": None, "rules": {"pooler_classifier": [{"tile": tile}]}}
    (configs / "default.json").write_text(json.dumps(table), encoding="utf-8")
    tile_tables.rules_of.cache_clear()
    tuner = Tuner("interpreter", CPU, time.monotonic() + 10, here, HALF)
    with use_backend("triton"):
        (choice,) = tuner.choices(points_of("pooler_classifier"))
    right = {label(tiles[0]), label(tiles[1])}
    assert right <= set(choice.cases[0].seconds)
    assert choice.former == label(tiles[0])
    assert choice.chosen in right
    assert list(tuner.skipped) == [f"pooler_classifier, 2 x 32: {label(tiles[2])}"]


# The command


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(tune.main)
    return CliRunner().invoke(app, list(arguments))


def test_the_plan_needs_no_gpu() -> None:
    plan = run("--dry-run", "--operation", "attention", "--operation", "cls_output", "--seconds", "99")
    assert plan.exit_code == 0
    for shown in ("sm_90", "attention", "12 x 64", "2048", "cls_output", "16 x 1024", "of 99"):
        assert shown in plan.output
    assert "linear_gelu" not in plan.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_without_a_gpu_is_refused_in_one_line() -> None:
    refused = run()
    assert refused.exit_code == 2
    assert refused.output == (
        "tune.py needs a GPU: there is no GPU that torch can use. With --dry-run it needs none.\n"
    )


def test_what_there_is_not_is_named(tmp_path: Path) -> None:
    unknown = run("--dry-run", "--operation", "softmax")
    assert unknown.exit_code == 2
    assert "got softmax" in unknown.output
    nowhere = run("--dry-run", "--out", str(tmp_path / "missing" / "x.json"))
    assert nowhere.exit_code == 2
    assert "there is no folder" in nowhere.output


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chip on which Ctrl-C is pressed after the first operation and a point of the next."""

    def choices(self: Tuner, points: list[Point]) -> Iterator[Choice]:
        self.skipped["linear_gelu, 1 x 1: a tile"] = "it [spills]"
        done = [point for point in points if point.operation == "linear_gelu"]
        rest = [point for point in points if point.operation == "linear_add_layer_norm"]
        yield from choices_at([*done, *rest[:1]], gelu_tile)
        raise KeyboardInterrupt

    monkeypatch.setattr(Tuner, "choices", choices)
    monkeypatch.setattr(tune, "chip", lambda: ("sm_90", ""))
    monkeypatch.setattr(tune, "provenance_of", lambda _: {"chip": "a chip"})


OPTIONS = ("--operation", "linear_gelu", "--operation", "linear_add_layer_norm")


@pytest.mark.usefixtures("interrupted")
def test_ctrl_c_keeps_and_writes_what_is_complete(configs: Path) -> None:
    before = json.loads((configs / "sm_90.json").read_text(encoding="utf-8"))["rules"]
    report = run(*OPTIONS)
    assert report.exit_code == 0
    after = json.loads((configs / "sm_90.json").read_text(encoding="utf-8"))["rules"]
    assert after["linear_gelu"] != before["linear_gelu"]
    assert after["attention"] == before["attention"]
    assert "linear_add_layer_norm" not in after
    assert "Interrupted" in report.output
    assert "linear_add_layer_norm stays as it is: measured at 1 of 60 points." in report.output
    assert "Not timed (1):" in report.output
    assert "linear_gelu, 1 x 1: a tile: it [spills]" in report.output


@pytest.mark.usefixtures("interrupted")
def test_another_file_leaves_the_table_alone(configs: Path, tmp_path: Path) -> None:
    before = (configs / "sm_90.json").read_bytes()
    assert run(*OPTIONS, "--out", str(tmp_path / "mine.json")).exit_code == 0
    assert (configs / "sm_90.json").read_bytes() == before
    assert list(json.loads((tmp_path / "mine.json").read_text(encoding="utf-8"))["measured"]) == ["linear_gelu"]


def test_the_report_shows_the_former_and_the_chosen_tile() -> None:
    measured = case(**STEADY, other=[5.0] * 4)
    for each in measured.seconds.values():
        each[:] = [[seconds / 1e6 for seconds in calls] for calls in each]
    point = Point("scale", {"rows": 1}, [])
    table = tune.result_of(
        [Choice(point, "present", "other", {}, [measured]), Choice(point, "present", "present", {}, [measured])]
    )
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [
        ("scale", "1 x 1", "present", "10.00", "other", "5.000", "2.00 x"),
        ("scale", "1 x 1", "present", "10.00", "the same", "10.00", "-"),
    ]


def test_provenance_says_what_the_figures_depend_on() -> None:
    found = tune.provenance_of(CPU)
    assert list(found) == ["chip", "driver", "commit", "dirty", "source_digest", "date", "torch", "triton"]
    # Some wheels add the build ("+cpu") to their own version only, not to that of the package.
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
