"""A chip's table of tiles: rules made of the winners of measured points, and the JSON that they are kept in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastcls_kernels.runtime import tile_tables
from fastcls_kernels.runtime.tile_tables import Rule

from .tile_candidates import OPERATIONS, Facts, Tile

Winner = tuple[Facts, Tile]

BITS = {"bits": 16}
ABOUT = "Measured by benchmarks/tune.py in bfloat16: what stands under measured. The rest was chosen by compiling."


def rules_from(winners: Sequence[Winner]) -> list[Rule]:
    """Rules that give each measured point its winner, and a point in between the winner of the next larger one.

    Facts are taken in their order: a limit on the first holds for all rules about the others. The largest value of each
    fact is no limit; neighbours that agree become one rule.
    """
    if not winners[0][0]:
        return [Rule({}, winners[0][1])]
    first, *others = winners[0][0]
    sections: list[tuple[int, list[Rule]]] = []
    for value in sorted({facts[first] for facts, _ in winners}):
        inner = [({name: facts[name] for name in others}, tile) for facts, tile in winners if facts[first] == value]
        rules = rules_from(inner)
        if sections and sections[-1][1] == rules:
            sections.pop()
        sections.append((value, rules))
    limits = [{first: value} for value, _ in sections[:-1]]
    return [
        Rule({**limit, **rule.limits}, rule.tile)
        for limit, (_, rules) in zip([*limits, {}], sections, strict=True)
        for rule in rules
    ]


def table_with(arch: str, winners: Mapping[str, Sequence[Winner]], measured: dict[str, Any]) -> dict[str, Any]:
    """The chip's table with new rules for some operations. Its rules for others, or for wider numbers, stay."""
    file = tile_tables.config_file(arch)
    own = file != tile_tables.CONFIGS / "default.json"
    table = json.loads(file.read_text(encoding="utf-8")) if own else {"measured": None, "rules": {}}
    rules = {name: table["rules"].get(name, []) for name in dict.fromkeys([*OPERATIONS, *table["rules"]])}
    for name, each in winners.items():
        wider = [rule for rule in rules[name] if rule.get("up_to", {}).get("bits", 32) > BITS["bits"]]
        rules[name] = [{"up_to": BITS | limits, "tile": tile} for limits, tile in rules_from(each)] + wider
    provenances = {**(table["measured"] or {}), **dict.fromkeys(winners, measured)}
    return {"about": ABOUT, "measured": provenances, "rules": {name: each for name, each in rules.items() if each}}


def written(table: dict[str, Any]) -> str:
    """JSON, each rule and each operation's provenance in one line."""
    provenances = (table["measured"] or {}).items()
    measured = ",\n".join(f"    {json.dumps(name)}: {json.dumps(each)}" for name, each in provenances)
    rules = ",\n".join(
        f"    {json.dumps(name)}: [\n" + ",\n".join(f"      {json.dumps(rule)}" for rule in each) + "\n    ]"
        for name, each in table["rules"].items()
    )
    parts = {
        "about": json.dumps(table["about"]),
        "measured": "{\n" + measured + "\n  }" if measured else "null",
        "rules": "{\n" + rules + "\n  }",
    }
    return "{\n" + ",\n".join(f'  "{name}": {part}' for name, part in parts.items()) + "\n}\n"
