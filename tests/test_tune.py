"""The tuner: only what is right and faster is chosen, and the rules it writes give back what it measured."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
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
from tune import Choice, Tuner, in_processes, verdict
from typer.testing import CliRunner

from fastcls_benchmarks import provenance, tiles
from fastcls_benchmarks.kernels import OPERATIONS, Arguments, Operation, Random, Shape, random_numbers
from fastcls_benchmarks.results import AGAIN, Case
from fastcls_benchmarks.tiles import CANDIDATES, Facts, Point, Problem, Tile, Winner, label, points_of
from fastcls_kernels import HAS_TRITON, PackedLayout, use_backend
from fastcls_kernels.runtime import tile_tables
from fastcls_kernels.runtime.tile_tables import Rule

CPU = torch.device("cpu")
HALF = torch.float16


# Rules

NAMES = ["width", "size", "rows"]
TILES = st.sampled_from(["a", "b", "c"]).map(lambda name: {"BY": name})
# Over one to three facts, each section of an outer fact with inner values of its own.
WINNERS = st.integers(1, 3).flatmap(
    lambda facts: st.dictionaries(st.tuples(*[st.integers(1, 5)] * facts), TILES, min_size=1, max_size=20).map(
        lambda found: [(dict(zip(NAMES, values, strict=False)), tile) for values, tile in found.items()]
    )
)


def first_fit(rules: Iterable[Rule], facts: Facts) -> Tile:
    return next(rule.tile for rule in rules if all(facts[name] <= limit for name, limit in rule.limits.items()))


def next_larger(winners: list[Winner], facts: Facts) -> Tile:
    """The winner of the next larger value of each fact in turn, or of the largest."""
    for name in facts:
        values = sorted({each[name] for each, _ in winners})
        taken = next((value for value in values if value >= facts[name]), values[-1])
        winners = [(each, tile) for each, tile in winners if each[name] == taken]
    return winners[0][1]


@given(WINNERS, st.data())
def test_rules_give_each_point_its_winner_and_others_the_next_larger_one(
    winners: list[Winner], data: st.DataObject
) -> None:
    rules = tiles.rules_from(winners)
    assert [first_fit(rules, facts) for facts, _ in winners] == [tile for _, tile in winners]
    between = {name: data.draw(st.integers(1, 7)) for name in winners[0][0]}
    assert first_fit(rules, between) == next_larger(winners, between)
    assert len(rules) <= len(winners)


def test_neighbours_that_agree_are_one_rule_and_the_largest_has_no_limit() -> None:
    a, b = {"BY": "a"}, {"BY": "b"}
    rows = [({"rows": 1}, a), ({"rows": 16}, a), ({"rows": 64}, b), ({"rows": 512}, a), ({"rows": 4096}, a)]
    rules = [Rule({"rows": 16}, a), Rule({"rows": 64}, b), Rule({}, a)]
    assert tiles.rules_from(rows) == rules
    # Sections that agree are one, too, whatever their outer fact.
    both = [({"width": width, **facts}, tile) for width in (384, 768) for facts, tile in rows]
    assert tiles.rules_from(both) == rules
    wider = [Rule({"width": 768, **each.limits}, each.tile) for each in rules]
    assert tiles.rules_from([*both, ({"width": 1024, "rows": 1}, b)]) == [*wider, Rule({}, b)]


# The file


@pytest.mark.parametrize("file", sorted(tile_tables.CONFIGS.glob("*.json")), ids=lambda file: file.stem)
def test_a_table_is_written_as_it_was_read(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert tiles.written(json.loads(text)) == text


def forget_tables() -> None:
    tile_tables.rules_of.cache_clear()
    tile_tables._forget_choices()


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of tables of its own, with the shipped ones in it."""
    for file in tile_tables.CONFIGS.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(tile_tables, "CONFIGS", tmp_path)
    forget_tables()
    yield tmp_path
    monkeypatch.undo()
    forget_tables()


def table_in(folder: Path, chip: str = "sm_90") -> dict[str, Any]:
    table: dict[str, Any] = json.loads((folder / f"{chip}.json").read_text(encoding="utf-8"))
    return table


def gelu_tile(problem: Problem) -> Tile:
    """Another one for each width and for few rows."""
    height = 16 if problem.texts <= 64 else 64
    return tile_tables.GeluTile("triton", False, height, 64, problem.shape[0], 4, 3)._asdict()


def test_the_table_chooses_what_was_measured(configs: Path) -> None:
    problems = [problem for (problem,) in points_of("linear_gelu")]
    before = table_in(configs)
    winners = {"linear_gelu": [(problem.facts, gelu_tile(problem)) for problem in problems]}
    table = tiles.table_with("sm_90", winners, {"chip": "a chip"})
    (configs / "sm_90.json").write_text(tiles.written(table), encoding="utf-8")
    forget_tables()
    for dtype, problem in itertools.product((torch.bfloat16, torch.float16), problems):
        assert tile_tables.linear_gelu_tile("sm_90", dtype, **problem.facts)._asdict() == gelu_tile(problem)
    assert tile_tables.linear_gelu_tile("sm_90", torch.bfloat16, 10**6, 10**4, 10**4).BLOCK_K == 1024
    assert tile_tables.linear_gelu_tile("sm_90", torch.float32, 64, 768, 3072).BY == "torch"
    after = table_in(configs)
    assert after["rules"].keys() == before["rules"].keys()
    assert after["rules"]["attention"] == before["rules"]["attention"]
    assert after["measured"] == {"linear_gelu": {"chip": "a chip"}}
    assert "tune.py" in after["about"]


def test_tables_of_other_chips_are_begun_and_added_to(configs: Path) -> None:
    tile = {"NORM": False, "BLOCK_H": 16, "BLOCK_N": 16, "MAX_BLOCK_W": 64, "num_warps": 4, "num_stages": 1}
    winners = {"cls_attention": [({"width": 384}, tile)]}
    # A chip without a table of its own does not copy the default's rules, which follow anyway.
    begun = tiles.table_with("sm_89", winners, {"chip": "first"})
    assert begun["rules"] == {"cls_attention": [{"up_to": {"bits": 16}, "tile": tile}]}
    # But those of AMD chips do not follow; and a rule for float32 stays.
    added = tiles.table_with("gfx950", winners, {"chip": "first"})
    there = json.loads(tile_tables.config_file("gfx950").read_text(encoding="utf-8"))["rules"]
    assert added["rules"].keys() == there.keys() > winners.keys()
    assert [rule.get("up_to", {}) for rule in added["rules"]["cls_attention"]] == [{"bits": 16}, {}]
    (configs / "sm_89.json").write_text(tiles.written(begun), encoding="utf-8")
    again = tiles.table_with("sm_89", {"absorb_query": [({"rows": 1}, {"BLOCK_B": 16})]}, {"chip": "second"})
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


@pytest.mark.parametrize(
    ("cases", "chosen"),
    [
        ([case(**STEADY, slow=[11.0] * 4, fast=[9.0] * 4, faster=[8.0] * 4)], "faster"),
        # The same gain counts only where there is less noise, and a better median only if no round is worse.
        ([case(**NOISY, other=[9.8, 10.8, 8.8, 10.3])], "present"),
        ([case(**STEADY, other=[9.8] * 4)], "other"),
        ([case(**STEADY, other=[9.0, 13.0, 9.5, 12.0])], "present"),
        # Problems that are one to the table count together.
        ([case(**STEADY, left=[5.0] * 4, both=[8.0] * 4)], "left"),
        ([case(**STEADY, left=[each] * 4, both=[8.0] * 4) for each in (5.0, 30.0)], "both"),
    ],
    ids=["the fastest", "within noise", "beyond noise", "not in all rounds", "one problem", "two problems"],
)
def test_the_fastest_beyond_the_noise_is_chosen(cases: list[Case], chosen: str) -> None:
    assert tune.choose(cases) == chosen


# An operation that multiplies by two, as fast as its tile says

TIMES = {"1": 10.0, "2": 6.0, "3": 4.0, "4": 8.0, "5": 1.0, "6": 2.0}


def scale(x: Tensor) -> Tensor:
    tile = tile_tables._first_fitting("interpreter", "scale", {"bits": 16, "rows": len(x)})["BLOCK_N"]
    if tile == 6:
        raise RuntimeError("out of resource: shared memory\nand much more")
    return x * (2.01 if tile == 5 else 2)


@pytest.fixture
def doubling(configs: Path, monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    """Tile 1 is the present choice, 5 wrong and 6 broken. Clocks are stand-ins; gives two points."""
    table = table_in(configs, "default")
    table["rules"]["scale"] = [{"tile": {"BLOCK_N": 1}}]
    (configs / "default.json").write_text(json.dumps(table), encoding="utf-8")
    operation = Operation(lambda random, _, layout: (random(layout.total_tokens, 8),), scale, lambda x: x + x)
    tried = [{"for": {}, "tile": {"BLOCK_N": number}} for number in range(1, 7)]
    measured = {"shapes": [(8, 8)], "sizes": [(4, 1), (32, 1)], "facts": ["rows"], "tiles": tried}
    monkeypatch.setitem(OPERATIONS, "scale", operation)
    monkeypatch.setitem(CANDIDATES, "scale", measured)
    monkeypatch.setattr("fastcls_benchmarks.timing.INPUT_BYTES", 0)

    def by_the_table(case: Case, functions: Mapping[str, Any], *_: object) -> None:
        for name in [*functions, case.baseline + AGAIN]:
            case.seconds[name] = [[TIMES[name.replace(AGAIN, "")]]] * 3

    monkeypatch.setattr("fastcls_benchmarks.timing.time_rounds", by_the_table)
    return points_of("scale")


def tuner_until(end: float = math.inf) -> Tuner:
    return Tuner("interpreter", CPU, end, lambda tasks: itertools.starmap(verdict, tasks), HALF)


@pytest.mark.parametrize("present", [1, 6], ids=["it runs", "it breaks"])
def test_the_fastest_right_tile_replaces_the_present_choice(doubling: list[Point], configs: Path, present: int) -> None:
    text = (configs / "default.json").read_text(encoding="utf-8")
    (configs / "default.json").write_text(text.replace('{"BLOCK_N": 1}', f'{{"BLOCK_N": {present}}}'), encoding="utf-8")
    tuner = tuner_until()
    choices = list(tuner.choices(doubling))
    found = [(choice.point[0].facts, choice.former, choice.chosen, choice.tile) for choice in choices]
    assert found == [({"rows": rows}, str(present), "3", {"BLOCK_N": 3}) for rows in (4, 32)]
    assert choices[0].cases[0].typical_seconds("3") == 4.0
    # What is wrong or breaks is named, and not timed.
    assert not any({"5", "6"} & choice.cases[0].seconds.keys() for choice in choices)
    assert tuner.skipped.keys() == {"scale, 8 x 8: 5", "scale, 8 x 8: 6"}
    assert "RMS error" in tuner.skipped["scale, 8 x 8: 5"]
    assert tuner.skipped["scale, 8 x 8: 6"] == "RuntimeError: out of resource: shared memory"


def test_nothing_is_begun_when_the_time_is_over(doubling: list[Point]) -> None:
    assert list(tuner_until(time.monotonic() - 1).choices(doubling)) == []


def test_a_point_that_breaks_is_named_and_the_others_go_on(
    doubling: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(random: Random, _: Shape, layout: PackedLayout) -> Arguments:
        if layout.total_tokens == 4:
            raise RuntimeError("out of memory")
        return (random(layout.total_tokens, 8),)

    monkeypatch.setitem(OPERATIONS, "scale", OPERATIONS["scale"]._replace(make=make))
    tuner = tuner_until()
    assert [choice.point[0].facts for choice in tuner.choices(doubling)] == [{"rows": 32}]
    assert tuner.skipped["scale, all of {'rows': 4}"] == "RuntimeError: out of memory"


# Checking


def test_a_library_is_checked_in_float16_too(doubling: list[Point], monkeypatch: pytest.MonkeyPatch) -> None:
    operation = OPERATIONS["scale"]._replace(run=lambda x: x * (2.01 if x.dtype == HALF else 2))
    monkeypatch.setitem(OPERATIONS, "scale", operation)
    problem = doubling[0][0]
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
    # The third needs more memory than there is: it was never loaded, and does not know.
    kernels = {1: SimpleNamespace(hash="1", n_spills=0), 2: SimpleNamespace(hash="2", n_spills=4)}
    compiled: dict[int, Any] = {}
    cache = SimpleNamespace(device_caches={0: (compiled, "and more")})
    monkeypatch.setattr(tile_tables, "_stand_in_kernel", cache, raising=False)

    def compiles(x: Tensor) -> Tensor:
        number = tile_tables._first_fitting("interpreter", "scale", {"bits": 16, "rows": 0})["BLOCK_N"]
        compiled[number] = kernels.get(number, SimpleNamespace(hash="3"))
        if number == 3:
            raise RuntimeError("out of resource")
        return x * 2

    monkeypatch.setitem(OPERATIONS, "scale", OPERATIONS["scale"]._replace(run=compiles))
    verdicts = [verdict(doubling[0][0], {"BLOCK_N": number}, "cpu", HALF) for number in (2, 3, 1)]
    assert verdicts == ["it spills registers", "RuntimeError: out of resource", ""]


def test_a_tile_that_ends_its_process_harms_no_other() -> None:
    judged = ["'right'", "__import__('os')._exit(1)", "'right again'", "1 / 0", "'and again'"]
    found = list(in_processes(eval, [(each,) for each in judged], math.inf))
    assert found[::2] == ["right", "right again", "and again"]
    assert [reason.split(":")[0] for reason in found[1::2]] == ["BrokenProcessPool", "ZeroDivisionError"]
    assert list(in_processes(eval, [("1 / 0",)], time.monotonic() - 1)) == ["there was no time to check it"]


# What is measured


@pytest.mark.parametrize("name", list(CANDIDATES))
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_candidates_begin_with_the_present_choice(name: str, arch: str) -> None:
    listed = [each["tile"] for each in CANDIDATES[name]["tiles"]]
    for problem, *_ in points_of(name):
        tried = problem.candidates(arch)
        assert next(iter(tried.values())) == tile_tables._first_fitting(arch, name, {"bits": 16, **problem.facts})
        assert 4 <= len(tried) <= 25
        assert not any(tile.get("TMA") for tile in tried.values()) or arch in ("sm_90", "sm_100")
        # A label is a tile's own.
        assert [tile for tile in listed if tile != tried.get(label(tile), tile)] == []
    assert len(set(map(label, listed))) == len(listed)


interpreter = pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="needs triton's interpreter, which is off where there is a GPU"
)


@interpreter
@pytest.mark.parametrize("name", list(CANDIDATES))
def test_operations_ask_the_table_by_the_facts_of_the_problem(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, int]] = []
    choose = tile_tables._first_fitting

    def recorded(arch: str, operation: str, facts: Mapping[str, int]) -> dict[str, Any]:
        assert operation == name
        asked.append(dict(facts))
        return choose(arch, operation, facts)

    monkeypatch.setattr(tile_tables, "_first_fitting", recorded)
    shape = (2, 16) if name == "attention" else (32, 48) if name.startswith("linear") else (2, 32)
    (_, mean), *_ = CANDIDATES[name]["sizes"]
    problem = Problem(name, shape, 3, 21) if mean > 2 else Problem(name, shape, 5, mean)
    operation = OPERATIONS[name]
    arguments = operation.make(random_numbers(CPU, HALF), shape, problem.layout(CPU))
    tile_tables._forget_choices()
    with use_backend("triton"):
        found = operation.run(*arguments)
    tile_tables._forget_choices()
    assert asked[0] == {"bits": 16, **problem.facts}
    # And the definition takes the same arguments.
    eager, exact = (operation.define(arguments, dtype) for dtype in (HALF, torch.float64))
    assert tune.shortfall(found, eager, exact) == ""


def test_texts_have_the_mean_that_the_table_is_asked_by() -> None:
    for problem, *_ in points_of("attention"):
        layout, mean = problem.layout(CPU), problem.mean_seqlen
        lengths = layout.cu_seqlens.diff()
        assert int(lengths.sum()) == layout.total_tokens == 24_576 == mean * layout.num_sequences
        assert mean // 2 <= int(lengths.min()) < int(lengths.max()) <= mean * 3 // 2 + 1


@pytest.mark.full
@interpreter
def test_real_kernels_are_checked_timed_and_chosen(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = {"BLOCK_B": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
    tried = [tile, {**tile, "BLOCK_B": 64, "BLOCK_N": 32, "BLOCK_K": 32}, {**tile, "BLOCK_N": 24}]
    measured = {"shapes": [(2, 32)], "sizes": [(64, 2)], "tiles": [{"for": {}, "tile": each} for each in tried]}
    monkeypatch.setitem(CANDIDATES, "pooler_classifier", CANDIDATES["pooler_classifier"] | measured)
    monkeypatch.setattr("fastcls_benchmarks.timing.INPUT_BYTES", 0)
    table = {"about": "", "measured": None, "rules": {"pooler_classifier": [{"tile": tile}]}}
    (configs / "default.json").write_text(json.dumps(table), encoding="utf-8")
    forget_tables()
    tuner = tuner_until(time.monotonic() + 10)
    with use_backend("triton"):
        (choice,) = tuner.choices(points_of("pooler_classifier"))
    right = {label(each) for each in tried[:2]}
    assert right <= set(choice.cases[0].seconds)
    assert choice.former == label(tile)
    assert choice.chosen in right
    assert list(tuner.skipped) == [f"pooler_classifier, 2 x 32: {label(tried[2])}"]


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


NO_GPU = "tune.py needs a GPU: there is no GPU that torch can use. With --dry-run it needs none.\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dry-run", "--operation", "softmax"], "got softmax"),
        (["--dry-run", "--out", "missing/x.json"], "there is no folder missing"),
        pytest.param([], NO_GPU, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    ],
    ids=["operation", "folder", "GPU"],
)
def test_what_there_is_not_is_named(arguments: list[str], said: str) -> None:
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert said in refused.output


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chip on which Ctrl-C is pressed after the first operation and a point of the next."""

    def choices(self: Tuner, points: list[Point]) -> Iterator[Choice]:
        self.skipped["linear_gelu, 1 x 1: a tile"] = "it [spills]"
        done = [point for point in points if point[0].operation == "linear_gelu"]
        rest = [point for point in points if point[0].operation == "linear_add_layer_norm"]
        for point in [*done, *rest[:1]]:
            yield Choice(point, "former", label(gelu_tile(point[0])), gelu_tile(point[0]), [])
        raise KeyboardInterrupt

    found = provenance.collect(CPU)
    monkeypatch.setattr(Tuner, "choices", choices)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "explain_backend", lambda _: ("triton", ""))
    monkeypatch.setattr(tile_tables, "arch_of", lambda _: "sm_90")
    monkeypatch.setattr(provenance, "collect", lambda _: found)


OPTIONS = ("--operation", "linear_gelu", "--operation", "linear_add_layer_norm")


@pytest.mark.usefixtures("interrupted")
def test_ctrl_c_keeps_and_writes_what_is_complete(configs: Path) -> None:
    before = table_in(configs)["rules"]
    report = run(*OPTIONS)
    assert report.exit_code == 0
    after = table_in(configs)["rules"]
    assert after["linear_gelu"] != before["linear_gelu"]
    assert "linear_add_layer_norm" not in after
    said = " ".join(report.output.split())
    assert "Interrupted" in said
    assert "linear_gelu is written to" in said
    assert "linear_add_layer_norm stays as it is: measured at 1 of 60 points." in said
    assert "Not timed (1): linear_gelu, 1 x 1: a tile: it [spills]" in said


@pytest.mark.usefixtures("interrupted")
def test_another_file_leaves_the_table_alone_and_says_what_its_figures_depend_on(configs: Path, tmp_path: Path) -> None:
    before = (configs / "sm_90.json").read_bytes()
    assert run(*OPTIONS, "--out", str(tmp_path / "mine.json")).exit_code == 0
    assert (configs / "sm_90.json").read_bytes() == before
    ((name, kept),) = table_in(tmp_path, "mine")["measured"].items()
    assert name == "linear_gelu"
    assert list(kept) == ["chip", "driver", "commit", "dirty", "source_digest", "date", "torch", "triton"]
    # Some wheels add the build ("+cpu") to their own version only, not to that of the package.
    assert kept["torch"].partition("+")[0] == torch.__version__.partition("+")[0]


def test_the_report_shows_the_former_and_the_chosen_tile() -> None:
    measured = case(**{name: [each / 1e6 for each in rounds] for name, rounds in STEADY.items()}, other=[5e-6] * 4)
    table = tune.result_of([Choice([], "present", chosen, {}, [measured]) for chosen in ("other", "present")])
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [
        ("scale", "1 x 1", "present", "10.00", "other", "5.000", "2.00 x"),
        ("scale", "1 x 1", "present", "10.00", "the same", "10.00", "-"),
    ]
