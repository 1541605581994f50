"""What `benchmarks/tune.py` measures, as tiles.json lists it, and the rules and tables that it makes of the winners."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastcls_kernels import PackedLayout
from fastcls_kernels.runtime import tile_tables
from fastcls_kernels.runtime.tile_tables import Rule

from .kernels import Shape, layout_of

Tile = dict[str, Any]
Facts = dict[str, int]
Winner = tuple[Facts, Tile]

BITS = {"bits": 16}
ABOUT = "Measured by benchmarks/tune.py in bfloat16: what stands under measured. The rest was chosen by compiling."

# What is measured of each operation: shapes, sizes, facts and tiles; tiles.json says what they are.
CANDIDATES: dict[str, dict[str, Any]] = {
    name: {**group, "shapes": [tuple(shape) for shape in shapes]}
    for group in json.loads(Path(__file__).with_name("tiles.json").read_text(encoding="utf-8"))["groups"]
    for name, shapes in group["shapes"].items()
}


class Problem(NamedTuple):
    """An operation's shape, for which kernels are compiled, and its texts, known only at run time."""

    operation: str
    shape: Shape
    texts: int
    mean_seqlen: int

    @property
    def name(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]}, {self.texts} x {self.mean_seqlen}"

    @property
    def facts(self) -> Facts:
        """The keys into the table."""
        known = {"in_features": self.shape[0], "rows": self.texts, "mean_seqlen": self.mean_seqlen}
        return {name: known.get(name, self.shape[1]) for name in CANDIDATES[self.operation]["facts"]}

    def to_check(self) -> Problem:
        """A small problem of the same shape, whose sizes no tile divides."""
        return self._replace(texts=9, mean_seqlen=150) if self.mean_seqlen > 2 else self._replace(texts=201)

    def layout(self, device: torch.device | str) -> PackedLayout:
        """Texts of half to one and a half times the mean length, evenly spread; the mean is exact."""
        texts, mean = self.texts, self.mean_seqlen
        short = [round(mean * (0.5 + (index + 0.5) / texts)) for index in range(texts // 2)]
        return layout_of([*short, *[mean] * (texts % 2), *(2 * mean - length for length in reversed(short))], device)

    def candidates(self, arch: str) -> dict[str, Tile]:
        """The tiles to try by their labels, the table's present choice first."""
        has_tma = arch.startswith("sm_") and int(arch[3:]) >= 90
        tiles = [tile_tables._first_fitting(arch, self.operation, {**BITS, **self.facts})]
        for each in CANDIDATES[self.operation]["tiles"]:
            fits = all(low <= self.facts[name] <= high for name, (low, high) in each["for"].items())
            if fits and (has_tma or not each["tile"].get("TMA")):
                tiles.append(each["tile"])
        return {label(tile): tile for tile in tiles}


# Problems that the table cannot tell apart.
Point = list[Problem]


def points_of(name: str) -> list[Point]:
    """An operation's points, by shape and size."""
    points: dict[tuple[int, ...], Point] = {}
    for shape, size in itertools.product(CANDIDATES[name]["shapes"], CANDIDATES[name]["sizes"]):
        problem = Problem(name, shape, *size)
        points.setdefault(tuple(problem.facts.values()), []).append(problem)
    return list(points.values())


def label(tile: Tile) -> str:
    """A tile's name in tables."""
    blocks = "x".join(str(value) for name, value in tile.items() if "BLOCK" in name)
    shorts = {"num_warps": "w", "num_stages": "s", "SPLITS": "splits"}
    counts = [f"{short}{tile[name]}" for name, short in shorts.items() if name in tile]
    flags = [name for name, value in tile.items() if value is True]
    return " ".join(filter(None, [tile.get("BY"), blocks, *counts, *flags]))


def rules_from(winners: Sequence[Winner]) -> list[Rule]:
    """Rules that give each measured point its winner, and a point in between the winner of the next larger one.

    Facts are taken in their order: a limit on the first holds for all rules about the others. The largest value of each
    fact is no limit; neighbours that agree become one rule.
    """
    if not winners[0][0]:
        return [Rule({}, winners[0][1])]
    first, *others = winners[0][0]
    sections: list[tuple[Facts, list[Rule]]] = []
    for value in sorted({facts[first] for facts, _ in winners}):
        inner = [({name: facts[name] for name in others}, tile) for facts, tile in winners if facts[first] == value]
        rules = rules_from(inner)
        if sections and sections[-1][1] == rules:
            sections.pop()
        sections.append(({first: value}, rules))
    sections[-1] = ({}, sections[-1][1])
    return [Rule({**limit, **rule.limits}, rule.tile) for limit, rules in sections for rule in rules]


def table_with(arch: str, winners: Mapping[str, Sequence[Winner]], measured: dict[str, Any]) -> dict[str, Any]:
    """The chip's table with new rules for some operations. Its rules for others, or for wider numbers, stay."""
    file = tile_tables.config_file(arch)
    own = file.name != "default.json"
    table = json.loads(file.read_text(encoding="utf-8")) if own else {"measured": None, "rules": {}}
    rules = {name: table["rules"].get(name, []) for name in dict.fromkeys([*CANDIDATES, *table["rules"]])}
    for name, each in winners.items():
        wider = [rule for rule in rules[name] if rule.get("up_to", {}).get("bits", 32) > BITS["bits"]]
        rules[name] = [{"up_to": BITS | limits, "tile": tile} for limits, tile in rules_from(each)] + wider
    measured_now = {**(table["measured"] or {}), **dict.fromkeys(winners, measured)}
    return {"about": ABOUT, "measured": measured_now, "rules": {name: each for name, each in rules.items() if each}}


def written(table: dict[str, Any]) -> str:
    """JSON, each rule and each operation's provenance in one line."""
    provenances = (table["measured"] or {}).items()
    measured = ",\n".join(f"    {json.dumps(name)}: {json.dumps(each)}" for name, each in provenances)
    rules = ",\n".join(
        f"    {json.dumps(name)}: [\n" + ",\n".join(f"      {json.dumps(rule)}" for rule in each) + "\n    ]"
        for name, each in table["rules"].items()
    )
    about, measured = json.dumps(table["about"]), f"{{\n{measured}\n  }}" if measured else "null"
    return f'{{\n  "about": {about},\n  "measured": {measured},\n  "rules": {{\n{rules}\n  }}\n}}\n'
