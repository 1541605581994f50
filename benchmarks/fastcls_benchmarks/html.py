"""One HTML file with everything: no network, no scripts."""

from __future__ import annotations

import base64
import io
from typing import Any

import jinja2

from . import tables
from .plots import plots
from .providers import FASTCLS
from .results import Case, FirstCall, Report
from .workloads import LENGTHS


def page(report: Report) -> str:
    """The report as a page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    remarks = tables.new_remarks(report.cases)
    # A list, not an iterator: the template asks whether there are any.
    cases = {
        kind: [_case(report, case, new) for case, new in zip(report.cases, remarks, strict=True) if case.kind == kind]
        for kind in ("model", "kernel")
    }
    used = {case.workload.split(" x ")[1] for case in report.cases}
    return environment.get_template("report.html.jinja").render(
        report=report,
        facts=tables.facts(report.provenance),
        machine=tables.machine_line(report),
        pictures=[{"text": plot.text, "data": _png(plot.figure)} for plot in plots(report)],
        groups=[("Models", cases["model"]), ("Single kernels", cases["kernel"])],
        first_calls=[_first_call(each) for each in report.first_calls],
        missing=tables.cannot_run(report),
        distributions={name: lengths for name, lengths in LENGTHS.items() if name in used},
        provenance=_flat(report.provenance) | {f"argument {name}": value for name, value in report.arguments.items()},
    )


def _png(figure: Any) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=160)
    return base64.b64encode(out.getvalue()).decode()


def _case(report: Report, case: Case, remarks: list[tuple[str, str]]) -> dict[str, Any]:
    def style(provider: str, status: str) -> str:
        return "failed" if status == "failed" else "ours" if provider == FASTCLS.name else ""

    return {
        "title": tables.title(case),
        "caption": tables.caption(report, case),
        "headings": tables.headings(case),
        "rows": [
            {
                "provider": row.provider,
                "cells": tables.cells(report, case, row),
                "style": style(row.provider, row.status),
            }
            for row in case.rows
            if row.status != "unavailable"
        ],
        "notes": remarks,
    }


def _first_call(each: FirstCall) -> tuple[str, ...]:
    return (each.provider, f"{each.model}, {each.workload}, {each.dtype}", *tables.first_call_cells(each))


def _flat(provenance: dict[str, Any]) -> dict[str, Any]:
    versions = provenance["versions"]
    facts = {name: value for name, value in provenance.items() if name != "versions"} | versions
    return {name: value for name, value in facts.items() if value is not None}
