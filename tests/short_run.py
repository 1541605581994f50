"""What `pytest` runs without ``--full``: of each parametrised test, cases that cover every pair of its parameters.

A fault shows with one value of a parameter, or where two meet (a dtype and a schedule, say), so that most of the
product only says it again. The cases are chosen by their parameters alone: the same ones every time.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import pytest

Case = Mapping[str, Hashable]


def covering(cases: Sequence[Case], alone: Collection[str] = ()) -> list[int]:
    """Places of a few ``cases`` in which each pair of values stands that stands in any of them, in rising order.

    Args:
        cases: the values of a case's parameters, by their names.
        alone: parameters each of whose values is wanted once, with whatever others.
    """
    missing: list[set[Hashable]] = []
    for case in cases:
        values = [(name, value) for name, value in case.items() if name not in alone]
        pairs = itertools.combinations(values, 2) if len(values) > 1 else [(value,) for value in values]
        missing.append({*pairs, *((name, case[name]) for name in alone if name in case)})
    chosen = []
    while any(missing):
        # The first of the best, so that the order of the cases decides and nothing else.
        best = max(range(len(cases)), key=lambda place: len(missing[place]))
        found = set(missing[best])
        chosen.append(best)
        for wanted in missing:
            wanted -= found
    return sorted(chosen)


def in_short_run(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Those of ``items`` that the short run takes, in their order.

    The marker ``full`` leaves a case to the full run. ``covering(alone=[...])`` names parameters that are covered value
    by value, and ``covering(by=parts_of)`` gives a function from a case's parameters to those covered in their place.
    """
    functions: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if not item.get_closest_marker("full"):
            functions[item.nodeid.partition("[")[0]].append(item)
    taken: set[pytest.Item] = set()
    for cases in functions.values():
        marker = cases[0].get_closest_marker("covering")
        options = marker.kwargs if marker else {}
        parts_of = options.get("by", dict)
        values = [{name: _key(part) for name, part in parts_of(parameters_of(item)).items()} for item in cases]
        places = covering(values, options.get("alone", ()))
        taken |= {cases[place] for place in places} or set(cases)
    return [item for item in items if item in taken]


def parameters_of(item: pytest.Item) -> dict[str, Any]:
    """The values of a case's parameters, by their names."""
    return dict(item.callspec.params) if hasattr(item, "callspec") else {}


def _key(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        # A list, say: all of its cases hold the same one.
        return id(value)
    # 1 and True are the same key by themselves.
    return type(value), value
